"""What is gained by fusing small tensors? The 161 gradients of ResNet-50, all-reduced one by one and fused.

    python bench/fusion.py                     gloo and Headway's own backend, 2 and 4 processes; a few minutes
    python bench/fusion.py --ranks 2 --backends gloo --rounds 3
    python bench/fusion.py --only training     real training steps, 2 processes

Each way is measured in turn in each round (median over the rounds, slowest rank): "one by one" waits for each
all-reduce, "all at once" starts all 161 and then waits; "fused" copies tensors into buffers of at most the threshold
by `headway.collective.fusion.fuse`, all-reduces these and copies back. Beside each stands what `simulate.overlap` says
for the same, given what single all-reduces of a few sizes and a copy took in the same processes.

Training is ResNet-50 on small random images: DistributedDataParallel on either backend, gradients by priority past the
end of the step on either (`PriorityExchange`), and the negotiated, fused exchange of `headway.horovod` with its
autotuner. All see the same data, so their losses must be equal. They take turns, two steps each; time is of the slowest
rank, the median over the turns, processor time of both ranks together. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from headway.collective.fusion import Request, fuse
from headway.exchange.ending import leave_group
from headway.exchange.scheduled import PriorityExchange
from headway.simulate.overlap import Fifo, Fused, Layer, Policy, play_step
from headway.units import format_bytes, format_seconds
from headway.workload import zoo
from record import new_record, save_record

HERE = Path(__file__).parent
MODEL = "resnet50"
TRAINING = "training"
MEBIBYTE = 2**20
THRESHOLDS = (1 * MEBIBYTE, 8 * MEBIBYTE, 32 * MEBIBYTE, 128 * MEBIBYTE)
SIZES = (256, 4096, 65536, MEBIBYTE, 8 * MEBIBYTE, 32 * MEBIBYTE, 128 * MEBIBYTE)
COPIED = 64 * MEBIBYTE  # beyond any cache, as the gradients are
LONGEST_SECONDS = 900.0  # for one set of processes
STEPS = 2  # of training, in a turn
IMAGES, PIXELS = 4, 64


def gradient_shapes() -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order in which backward produces them: roughly the parameters', backwards."""
    with torch.device("meta"):
        model = zoo.build(MODEL)
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()][::-1]


# In each of the processes.


def one_by_one(gradients: list[torch.Tensor]) -> None:
    for gradient in gradients:
        dist.all_reduce(gradient)


def all_at_once(gradients: list[torch.Tensor]) -> None:
    works = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]
    for work in works:
        if work is not None:  # None: this rank is not in the group
            work.wait()


def fused(gradients: list[torch.Tensor], batches: list[list[int]], buffer: torch.Tensor) -> None:
    for batch in batches:
        if len(batch) == 1:
            dist.all_reduce(gradients[batch[0]])
            continue
        parts = [gradients[i].view(-1) for i in batch]
        used = buffer[: sum(part.numel() for part in parts)]
        torch.cat(parts, out=used)
        dist.all_reduce(used)
        for part, result in zip(parts, used.split([part.numel() for part in parts])):
            part.copy_(result)


def join(arguments: argparse.Namespace, backend: str) -> None:
    dist.init_process_group(
        backend,
        init_method=f"file://{arguments.folder}/store",
        rank=arguments.rank,
        world_size=arguments.size,
        timeout=datetime.timedelta(seconds=120),
    )


def work(arguments: argparse.Namespace) -> None:
    """One rank: measures, and rank 0 writes down the slowest rank's times."""
    torch.set_num_threads(1)
    if arguments.backend == "headway":
        import headway.exchange.process_group  # noqa: F401 - registers the backend
    join(arguments, arguments.backend)
    torch.manual_seed(arguments.rank)
    shapes = gradient_shapes()
    gradients = [torch.randn(shape) for _, shape in shapes]
    requests = [Request(name=str(i), shape=shape) for i, (_, shape) in enumerate(shapes)]
    ways: dict[str, Callable[[], object]] = {
        "one by one": lambda: one_by_one(gradients),
        "all at once": lambda: all_at_once(gradients),
    }
    for threshold in THRESHOLDS:
        batches = [[int(name) for name in batch.names] for batch in fuse(requests, threshold)]
        largest = max(sum(gradients[i].numel() for i in batch) for batch in batches)
        buffer = torch.empty(largest)
        ways[f"fused {threshold}"] = lambda batches=batches, buffer=buffer: fused(gradients, batches, buffer)
    check(gradients, ways)
    for size in SIZES:
        tensor = torch.zeros(size // 4)
        ways[f"single {size}"] = lambda tensor=tensor: dist.all_reduce(tensor)
    source, target = torch.zeros(COPIED // 4), torch.zeros(COPIED // 4)
    ways["copy"] = lambda: target.copy_(source)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(arguments.rounds + 1):
        for gradient in gradients:  # sums of sums would overflow in the end
            gradient.fill_(1.0)
        for name, way in ways.items():
            repeat = 20 if name in (f"single {SIZES[0]}", f"single {SIZES[1]}", f"single {SIZES[2]}") else 1
            dist.barrier()
            begun, spent = time.perf_counter(), time.process_time()
            for _ in range(repeat):
                way()
            took = torch.tensor([(time.perf_counter() - begun) / repeat, (time.process_time() - spent) / repeat])
            if round_:  # the first is a warm-up
                everybody = [torch.zeros(2) for _ in range(arguments.size)]
                dist.all_gather(everybody, took)
                seconds[name].append(max(float(one[0]) for one in everybody))
                processor[name].append(sum(float(one[1]) for one in everybody))
    if arguments.rank == 0:
        found = {
            name: {"seconds": statistics.median(seconds[name]), "cpu_seconds": statistics.median(processor[name])}
            for name in ways
        }
        (Path(arguments.folder) / "result.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def train(arguments: argparse.Namespace) -> None:
    """One rank of training: measures, checks that all ways have the same losses, and rank 0 writes it down."""
    import headway.horovod as hvd
    from headway.exchange import process_group

    os.environ["HOROVOD_AUTOTUNE"] = "1"
    torch.set_num_threads(1)
    join(arguments, "gloo")
    process_group.register()
    hvd.init()
    backends = {"gloo": None, "headway": dist.new_group(backend="headway")}
    steps: dict[str, Callable[[int], float]] = {}
    ends: dict[str, Callable[[], object]] = {}
    for backend, group in backends.items():
        model, optimizer = subject()
        wrapped = nn.parallel.DistributedDataParallel(model, process_group=group, broadcast_buffers=False)
        steps[f"DDP, {backend}"] = partial(step_of, wrapped, optimizer.step, optimizer)
    for backend, group in backends.items():
        model, optimizer = subject()
        exchange = PriorityExchange(model, optimizer, group)
        steps[f"by priority, {backend}"] = partial(step_of, model, exchange.step, None)
        ends[f"by priority, {backend}"] = exchange.synchronize
    model, optimizer = subject()
    horovod = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    steps["horovod, autotuned"] = partial(step_of, model, horovod.step, horovod)
    measured: dict[str, list[list[float]]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.rounds + 1):
        for name, step in steps.items():
            dist.barrier()
            begun, spent = time.perf_counter(), time.process_time()
            for number in range(STEPS):
                losses[name].append(step(STEPS * turn + number))
            ends.get(name, int)()
            took = torch.tensor([time.perf_counter() - begun, time.process_time() - spent], dtype=torch.float64) / STEPS
            everybody = [torch.zeros(2, dtype=torch.float64) for _ in range(arguments.size)]
            dist.all_gather(everybody, took)
            if turn:  # the first is a warm-up
                measured[name].append(
                    [max(float(one[0]) for one in everybody), sum(float(one[1]) for one in everybody)]
                )
    expected = losses["DDP, gloo"]
    for name, found in losses.items():
        if found != expected:
            raise SystemExit(f"{name} has losses {found}, DDP {expected}")
    if arguments.rank == 0:
        found = {
            name: {
                "seconds": statistics.median(one[0] for one in turns),
                "fastest_seconds": min(one[0] for one in turns),
                "cpu_seconds": statistics.median(one[1] for one in turns),
                "last_loss": losses[name][-1],
            }
            for name, turns in measured.items()
        }
        (Path(arguments.folder) / "result.json").write_text(json.dumps(found))
    hvd.shutdown()
    leave_group(torch.device("cpu"))


def subject() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = zoo.build(MODEL)
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def step_of(
    model: nn.Module, update: Callable[[], object], optimizer: torch.optim.Optimizer | None, number: int
) -> float:
    """One step of training; its loss."""
    source = torch.Generator().manual_seed(1000 * number + dist.get_rank())
    images = torch.randn(IMAGES, 3, PIXELS, PIXELS, generator=source)
    targets = torch.randint(0, 1000, (IMAGES,), generator=source)
    loss = nn.functional.cross_entropy(model(images), targets)
    loss.backward()
    update()
    if optimizer is not None:
        optimizer.zero_grad()
    return loss.item()


def check(gradients: list[torch.Tensor], ways: dict[str, Callable[[], object]]) -> None:
    """Every way gives the same sums."""
    before = [gradient.clone() for gradient in gradients]
    expected: list[torch.Tensor] | None = None
    for name, way in ways.items():
        for gradient, value in zip(gradients, before):
            gradient.copy_(value)
        way()
        if expected is None:
            expected = [gradient.clone() for gradient in gradients]
        for gradient, value in zip(gradients, expected):
            torch.testing.assert_close(gradient, value, msg=f"{name} gives other sums")


# In the process that starts them.


def measure(backend: str, size: int, rounds: int) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-W",
            "ignore::FutureWarning",
            __file__,
            "--folder",
            folder,
            "--size",
            str(size),
            "--rounds",
            str(rounds),
        ]
        ranks = [
            subprocess.Popen([*command, "--rank", str(rank), "--backend", backend], stdout=sys.stderr)
            for rank in range(size)
        ]
        try:
            deadline = time.monotonic() + LONGEST_SECONDS
            for rank, process in enumerate(ranks):
                if process.wait(max(1.0, deadline - time.monotonic())):
                    raise SystemExit(f"rank {rank} of {backend} ended with {process.returncode}")
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        return json.loads((Path(folder) / "result.json").read_text())


def predicted(name: str, found: dict[str, dict[str, float]]) -> tuple[float, int]:
    """What the simulation says for a way: its seconds, and the messages it sends."""
    copy_seconds_per_byte = found["copy"]["seconds"] / COPIED

    def single(size_bytes: float) -> float:
        """Between two measured sizes a straight line; beyond the last, its rate."""
        points = [(size, found[f"single {size}"]["seconds"]) for size in SIZES]
        if size_bytes <= points[0][0]:
            return points[0][1]
        for (low, low_seconds), (high, high_seconds) in itertools.pairwise(points):
            if size_bytes <= high:
                return low_seconds + (high_seconds - low_seconds) * (size_bytes - low) / (high - low)
        return points[-1][1] * size_bytes / points[-1][0]

    shapes = gradient_shapes()
    layers = [
        Layer(name=name_, size_bytes=4 * torch.Size(shape).numel()) for name_, shape in reversed(shapes)
    ]  # in the order of forward, all ready at once
    policy: Policy = Fifo()
    if name.startswith("fused"):
        policy = Fused(threshold_bytes=int(name.split()[1]), cycle_seconds=0.0)
        step = play_step(layers, policy, lambda size: single(size) + 2 * size * copy_seconds_per_byte)
    else:
        step = play_step(layers, policy, single)
    return step.step_seconds, step.messages


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--backends", nargs="+", default=["gloo", "headway"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=["exchange", TRAINING])
    parser.add_argument("--output", type=Path, default=HERE / "results" / "fusion.json")
    for name in ("--folder", "--backend"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--rank", "--size"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        train(arguments) if arguments.backend == TRAINING else work(arguments)
        return
    record = new_record("the rank", cores=os.cpu_count(), torch=torch.__version__) | {
        "rounds": arguments.rounds,
    }
    console = Console(width=100 if not sys.stdout.isatty() else None, highlight=False)
    if arguments.only != TRAINING:
        record |= exchanged(arguments, console)
    if arguments.only != "exchange":
        record[TRAINING] = trained(arguments, console)
    save_record(record, arguments.output)


def trained(arguments: argparse.Namespace, console: Console) -> dict[str, dict[str, float]]:
    found = measure(TRAINING, 2, arguments.rounds)
    title = f"A training step of {MODEL}, {IMAGES} images of {PIXELS} x {PIXELS} on each of 2 ranks; equal losses"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for column in ("way", "time", "fastest", "DDP, gloo", "CPU time", "DDP, gloo"):
        table.add_column(column, justify="left" if column == "way" else "right")
    plain = found["DDP, gloo"]
    for name, one in found.items():
        table.add_row(
            name,
            format_seconds(one["seconds"]),
            format_seconds(one["fastest_seconds"]),
            f"{one['seconds'] / plain['seconds']:.2f}x",
            format_seconds(one["cpu_seconds"]),
            f"{one['cpu_seconds'] / plain['cpu_seconds']:.2f}x",
        )
    console.print(table)
    return found


def exchanged(arguments: argparse.Namespace, console: Console) -> dict:
    shapes = gradient_shapes()
    total = sum(4 * torch.Size(shape).numel() for _, shape in shapes)
    title = f"All-reduce of the {len(shapes)} gradients of {MODEL} ({format_bytes(total)}, float32)"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for column in ("backend", "ranks", "way", "messages", "measured", "faster", "CPU time", "simulated", "error"):
        table.add_column(column, justify="left" if column in ("backend", "way") else "right")
    rows = []
    for size in arguments.ranks:
        for backend in arguments.backends:
            found = measure(backend, size, arguments.rounds)
            plain = found["one by one"]["seconds"]
            for name, times in found.items():
                if name.startswith("single") or name == "copy":
                    continue
                simulated, messages = predicted(name, found)
                comparable = name != "all at once"  # the simulation has no several all-reduces at the same time
                row = {
                    "backend": backend,
                    "ranks": size,
                    "way": name,
                    "messages": messages,
                    **times,
                    "times_faster_than_one_by_one": plain / times["seconds"],
                    "simulated_seconds": simulated if comparable else None,
                    "error": simulated / times["seconds"] - 1 if comparable else None,
                }
                rows.append(row)
                label = f"fused, {format_bytes(int(name.split()[1]))}" if name.startswith("fused") else name
                table.add_row(
                    backend,
                    str(size),
                    label,
                    str(messages),
                    format_seconds(times["seconds"]),
                    f"{row['times_faster_than_one_by_one']:.2f}x",
                    format_seconds(times["cpu_seconds"]),
                    format_seconds(simulated) if comparable else "",
                    f"{row['error']:+.0%}" if row["error"] is not None else "",
                )
            singles = {str(bytes_): found[f"single {bytes_}"]["seconds"] for bytes_ in SIZES}
            rows.append(
                {
                    "backend": backend,
                    "ranks": size,
                    "way": "single all-reduces",
                    "seconds_by_bytes": singles,
                    "copy_bytes_per_second": COPIED / found["copy"]["seconds"],
                }
            )
            table.add_section()
    console.print(table)
    return {"total_bytes": total, "rows": rows}


if __name__ == "__main__":
    main()
