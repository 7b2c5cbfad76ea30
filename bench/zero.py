"""ZeRO's memory and communication, measured on real ranks beside the formulas of Rajbhandari et al. (SC 2020).

    python bench/zero.py                    # 2 and 4 ranks, all stages, the optimizer on the device and on the host
    python bench/zero.py --width 512 --output zero.json

Memory: bytes of parameters between forward and backward, and of gradients and optimizer states before the update.
Communication: elements handed to the collectives of one step, counted where torch hands them to the process group. An
all-reduce counts twice (reduce-scatter and all-gather), as in the paper; a reduction to an owner, a broadcast of what
it updated and an all-to-all count once. Beside them what the rank's process really sent, in elements of 4 bytes, as the
kernel counts it (gloo, by TCP). Gradients that a rank does not own (ZeRO-1) stand in DDP's buckets, and count. With the
optimizer on the host what rests there is counted by the store, and under ZeRO-2 and 3 each gradient leaves the device
as soon as it is made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from headway.exchange.ending import leave_group
from headway.plan.plan import Plan, Stage, Tier
from headway.train.parallel import Parallel, parallelise
from headway.workload.trace import trace
from record import new_record, save_record

__all__ = ["Measured", "float32_bytes", "measure_on", "mixed_precision_bytes", "offloaded_bytes"]


@dataclass(frozen=True)
class Measured:
    """Of the fullest rank: bytes of states, elements of the model, elements handed to collectives in a step.

    `host_bytes`: of what the store keeps on the host, with `optimizer_on` "host". `sent_elements`: what the process
    sent in the step, in units of 4 bytes.
    """

    stage: int
    ranks: int
    optimizer_on: Tier
    elements: int
    parameter_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    host_bytes: float
    volume_elements: float
    sent_elements: float

    @property
    def state_bytes(self) -> float:
        """All three on the device together."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes


def mixed_precision_bytes(stage: int, ranks: int, elements: float) -> float:
    """The paper's: 16P, 4P + 12P/N, 2P + 14P/N, 16P/N."""
    return _divided(stage, ranks, elements, 2, 2, 12)


def float32_bytes(stage: int, ranks: int, elements: float) -> float:
    """The same division of float32 weights, gradients and two moments: 16P, 8P + 8P/N, 4P + 12P/N, 16P/N."""
    return _divided(stage, ranks, elements, 4, 4, 8)


def offloaded_bytes(stage: int, ranks: int, elements: float) -> float:
    """What stays on the device with the optimizer on the host: weights and gradients, 8P; 4P; 4P/N.

    Under ZeRO-2 and 3 no gradient stays until the update.
    """
    return _divided(stage, ranks, elements, 4, 4 if stage < 2 else 0, 0)


def _divided(stage: int, ranks: int, elements: float, weight: int, gradient: int, optimizer: int) -> float:
    return elements * (
        weight / (ranks if stage >= 3 else 1)
        + gradient / (ranks if stage >= 2 else 1)
        + optimizer / (ranks if stage >= 1 else 1)
    )


class Counter:
    """Counts elements of collectives by wrapping the process group's own entry points."""

    def __init__(self, kind: type) -> None:
        self.elements = 0.0
        for name, weight, pick in _COLLECTIVES:
            if (inner := getattr(kind, name, None)) is not None:
                setattr(kind, name, self._counting(inner, weight, pick))
        self._depth = 0

    def _counting(self, inner: Any, weight: float, pick: int) -> Any:
        def call(group: Any, *arguments: Any, **options: Any) -> Any:
            if self._depth == 0:
                self.elements += weight * _elements(arguments[pick])
            self._depth += 1
            try:
                return inner(group, *arguments, **options)
            finally:
                self._depth -= 1

        return call


# Entry point, how often its elements count, which argument is the whole tensor.
_COLLECTIVES = (
    ("allreduce", 2.0, 0),
    ("allreduce_coalesced", 2.0, 0),
    ("reduce", 1.0, 0),
    ("broadcast", 1.0, 0),
    ("allgather", 1.0, 0),
    ("_allgather_base", 1.0, 0),
    ("all_gather_single", 1.0, 0),
    ("reduce_scatter", 1.0, 1),
    ("_reduce_scatter_base", 1.0, 1),
    ("reduce_scatter_single", 1.0, 1),
    ("allgather_into_tensor_coalesced", 1.0, 0),
    ("reduce_scatter_tensor_coalesced", 1.0, 1),
    ("alltoall_base", 1.0, 1),
    ("all_to_all_single", 1.0, 1),
)


def _elements(tensors: Any) -> int:
    return sum(map(_elements, tensors)) if isinstance(tensors, list | tuple) else tensors.numel()


def measure_on(ranks: int, width: int = 64) -> list[Measured]:
    """Train a small model for two steps under every stage, on so many processes: the optimizer here, then there."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        command = [
            sys.executable,
            __file__,
            "--worker",
            "--ranks",
            str(ranks),
            "--width",
            str(width),
            "--folder",
            folder,
        ]
        started = [subprocess.Popen([*command, "--rank", str(rank)], env=environment) for rank in range(ranks)]
        codes = [process.wait() for process in started]
        if any(codes):
            raise RuntimeError("a rank failed")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    return [
        max((Measured(**each[at]) for each in found), key=lambda one: (one.state_bytes, one.volume_elements))
        for at in range(len(found[0]))
    ]


def _worker(ranks: int, rank: int, width: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    counter = Counter(dist.ProcessGroup)
    results = [
        asdict(_measure(stage, tier, ranks, rank, width, counter)) for tier in ("device", "host") for stage in range(4)
    ]
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))
    leave_group(torch.device("cpu"))


def _model(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(16)))


def _measure(stage: int, tier: Tier, ranks: int, rank: int, width: int, counter: Counter) -> Measured:
    loss = nn.functional.mse_loss
    graph = trace(_model(width), torch.randn(2, width), name="m", loss=loss, target=torch.randn(2, width))
    plan = Plan(
        model="m", devices=tuple(str(each) for each in range(ranks)), global_batch=2 * ranks, micro_batch=2, data=ranks,
        zero_stage=stage, optimizer_on=tier, stages=(Stage(start=0, stop=len(graph.layers)),),
    )  # fmt: skip
    model = _model(width)
    elements = sum(parameter.numel() for parameter in model.parameters())
    parallel = parallelise(model, torch.optim.AdamW(model.parameters()), plan, graph, rank=rank, loss=loss)
    batch = [(torch.randn(2, width), torch.randn(2, width))]
    parallel.step(batch)
    sizes: dict[str, float] = {}
    parallel.pieces[0].module.register_forward_hook(
        # What backward begins with. (Under ZeRO-2 `fully_shard` keeps a rank's share of 4P/N beside what is gathered.)
        lambda module, *_: sizes.update(parameter_bytes=_bytes(list(module.parameters())))
    )
    update = parallel._update

    def look_and_update() -> None:
        sizes.update(_sizes(parallel))
        update()

    parallel._update = look_and_update  # type: ignore[method-assign]
    before, sent_before = counter.elements, _sent_bytes()
    parallel.step(batch)
    volume, sent = counter.elements - before, (_sent_bytes() - sent_before) / 4
    host = parallel.tier_bytes().get("host", 0.0)
    parallel.close()
    return Measured(stage, ranks, tier, elements, volume_elements=volume, sent_elements=sent, host_bytes=host, **sizes)


def _sent_bytes() -> int:
    """Bytes that this process has written to sockets and files so far; nothing here writes files during a step."""
    return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])


def _sizes(parallel: Parallel) -> dict[str, float]:
    parameters = [parameter for _, parameter in parallel.parameters()]
    optimizer = parallel.optimizer if parallel.zero is None else parallel.zero.optim
    states = [value for state in optimizer.state.values() for value in state.values()]
    gradients: list[Any] = [parameter.grad for parameter in parameters]
    if any(isinstance(piece.wrapped, DistributedDataParallel) for piece in parallel.pieces):
        gradients = [parameter for parameter in parameters if parameter.requires_grad]  # its buckets are as large
    return {
        "gradient_bytes": _bytes(gradients),
        "optimizer_bytes": _bytes(states),
    }


def _bytes(tensors: list[Any]) -> float:
    local = [each.to_local() if isinstance(each, DTensor) else each for each in tensors]
    return float(sum(each.numel() * each.element_size() for each in local if isinstance(each, torch.Tensor)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--ranks", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "zero.json")
    for hidden in ("--rank", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _worker(options.ranks, int(options.rank), options.width, options.folder)
        return
    record = new_record(0, torch=torch.__version__)
    rows = []
    print("ranks stage optimizer  bytes/P  float32 formula  paper's (mixed)  host/P  volume/P  paper's  sent/P")
    for ranks in [options.ranks] if options.ranks else [2, 4]:
        for each in measure_on(ranks, options.width):
            formula = float32_bytes if each.optimizer_on == "device" else offloaded_bytes
            row = {
                "ranks": ranks,
                "stage": each.stage,
                "optimizer_on": each.optimizer_on,
                "elements": each.elements,
                "measured_bytes_per_parameter": each.state_bytes / each.elements,
                "host_bytes_per_parameter": each.host_bytes / each.elements,
                "float32_formula": formula(each.stage, ranks, 1.0),
                "volume_per_parameter": each.volume_elements / each.elements,
                "volume_formula": 3 if each.stage == 3 else 2,
                "sent_per_parameter": each.sent_elements / each.elements,
            }
            if each.optimizer_on == "device":
                row["mixed_precision_formula"] = mixed_precision_bytes(each.stage, ranks, 1.0)
            rows.append(row)
            papers = f"{row['mixed_precision_formula']:16.3f}" if "mixed_precision_formula" in row else f"{'-':>16}"
            print(
                f"{ranks:5} {each.stage:5} {each.optimizer_on:>9} {row['measured_bytes_per_parameter']:8.3f}", end=" "
            )
            print(f"{row['float32_formula']:16.3f} {papers} {row['host_bytes_per_parameter']:7.3f}", end=" ")
            print(f"{row['volume_per_parameter']:9.3f} {row['volume_formula']:8} {row['sent_per_parameter']:7.3f}")
    record["rows"] = rows
    save_record(record, options.output)


if __name__ == "__main__":
    main()
