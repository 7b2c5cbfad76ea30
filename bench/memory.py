"""Peak memory of plans, predicted beside measured: what each technique leaves on the device, and what rests elsewhere.

    python bench/memory.py                       # all, real processes, some minutes
    python bench/memory.py --only disk --steps 4 # those whose plan says so

Each plan is traced, predicted, checked by preflight, and carried out by real ranks of this machine. Measured is what
torch's allocator held at the peak of one step (parameters, gradients, states and buffers alive before it, plus the
highest level of its own log of allocations during it). On a CPU the device's memory *is* the host's, and the two are
told apart by who allocates: what rests in a tier, and the buffers on the way there, are mappings of the store's own,
which torch's allocator does not count; the store says how much they held. DeepSpeed's estimates are for 16-bit training
of model states; they stand beside for the plans that they speak of.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from headway.errors import HeadwayError, Interrupted
from headway.hardware.cluster import Accelerator, Cluster, Device, Link
from headway.memory.preflight import check_here
from headway.plan.plan import Plan
from headway.predict.deepspeed_estimate import zero2_estimate, zero3_estimate
from headway.predict.step import Predictor
from headway.search.find import Constraints, find
from headway.train.launch import launch, trace_script
from headway.workload.graph import Workload
from record import new_record, save_record

__all__ = ["CONFIGURATIONS", "plan_of"]

HERE = Path(__file__).parent

# Name, ranks, fields of the plan.
CONFIGURATIONS: list[tuple[str, int, dict[str, Any]]] = [
    ("one device", 1, {}),
    ("recompute", 1, {"recompute": "full"}),
    ("ZeRO-0", 2, {"data": 2}),
    ("ZeRO-1", 2, {"data": 2, "zero_stage": 1}),
    ("ZeRO-2", 2, {"data": 2, "zero_stage": 2}),
    ("ZeRO-3", 2, {"data": 2, "zero_stage": 3}),
    ("tensor", 2, {"tensor": 2}),
    ("pipeline", 2, {"pipeline": 2, "schedule": "1f1b", "micro_batch": 4}),
    ("optimizer on host", 1, {"optimizer_on": "host"}),
    ("optimizer on host, half kept", 1, {"optimizer_on": "host", "optimizer_kept": 0.5}),
    ("optimizer on host, ZeRO-0", 2, {"data": 2, "optimizer_on": "host"}),
    ("optimizer on host, ZeRO-1", 2, {"data": 2, "zero_stage": 1, "optimizer_on": "host"}),
    ("optimizer on disk, moments int8", 1, {"optimizer_on": "disk", "moments": "int8"}),
    ("optimizer remote, ZeRO-2", 2, {"data": 2, "zero_stage": 2, "optimizer_on": "remote"}),
    ("optimizer on host, bfloat16, delayed", 1, {"optimizer_on": "host", "precision": "bfloat16",
                                                 "delayed_update": True, "delay_warmup": 1}),
    ("parameters on host", 1, {"parameters_on": "host"}),
    ("parameters and optimizer on disk, ZeRO-3", 2, {"data": 2, "zero_stage": 3, "parameters_on": "disk",
                                                     "optimizer_on": "disk"}),
    ("activations on host", 1, {"activations_on": "host"}),
    ("activations on host, recompute", 1, {"activations_on": "host", "recompute": "full"}),
    ("swap two layers to disk", 1, {"activations_on": "disk", "swap": (1, 2)}),
    ("tiles, ZeRO-3", 2, {"data": 2, "zero_stage": 3, "tiles": {"blocks.0.up": 2}}),
]  # fmt: skip

_DEGREES = ("data", "tensor", "pipeline", "schedule", "micro_batch", "zero_stage", "recompute", "precision")


def cluster_of(ranks: int) -> Cluster:
    """So many CPU processes. Rates are nominal: only memory is asked for here."""
    kind = Accelerator(
        name="cpu", flop_per_second={"float32": 5e10}, memory_bytes=2.0**40, memory_bytes_per_second=1e10,
        torch_device="cpu", threads=1,
    )  # fmt: skip
    devices = tuple(Device(name=f"cpu {rank}", accelerator="cpu", node="local") for rank in range(ranks))
    names = [device.name for device in devices]
    links = tuple(
        Link(source=one, target=other, bytes_per_second=1e9, latency_seconds=1e-4, kind="memory")
        for one in names
        for other in names
        if one != other
    )
    return Cluster(name="local", accelerators={"cpu": kind}, devices=devices, links=links)


def plan_of(workload: Workload, ranks: int, fields: dict[str, Any]) -> Plan:
    """The plan that has these degrees, with these fields; `swap` names layers of the only stage."""
    degrees = {name: fields.get(name, 1) for name in ("data", "tensor", "pipeline")}
    chosen = {name: value for name, value in fields.items() if name in _DEGREES}
    micro_batch = fields.get("micro_batch", workload.global_batch // degrees["data"])
    fixed = {"recompute": "none", "zero_stage": 0, "micro_batch": micro_batch, "precision": "float32"}
    constraints = Constraints(**{**fixed, **chosen, **degrees})
    plan = find(workload, cluster_of(ranks), constraints=constraints, devices=ranks, keep=1).best[0].plan
    others = {name: value for name, value in fields.items() if name not in (*_DEGREES, "swap")}
    builtins = {**plan.to_builtins(), **others}
    if "swap" in fields:
        builtins["stages"] = [{**stage, "swap": fields["swap"]} for stage in builtins["stages"]]
    return Plan.from_json(json.dumps(builtins)).validate(workload.graph)


def measure(workload: Workload, plan: Plan, script: list[str], folder: Path) -> dict[str, Any]:
    """What the fullest rank of `plan` holds: predicted, and measured by really training."""
    folder.mkdir()
    cluster = cluster_of(plan.world_size)
    prediction = Predictor(workload, cluster).predict(plan)
    check_here(plan, workload, cluster, directory=folder)
    workload.save(folder / "workload.json")
    plan.save(folder / "plan.json")
    launch(
        HERE / "subjects.py", script, plan, run_directory=folder, workload_path=folder / "workload.json",
        plan_path=folder / "plan.json", cluster=cluster, on_event=lambda event: None,
        on_output=lambda rank, stream, line: print(f"[rank {rank}] {line}", file=sys.stderr),
    )  # fmt: skip
    found = json.loads((folder / "measured.json").read_text())
    fullest = max(range(plan.world_size), key=lambda rank: found["peak_bytes"][rank])
    memory, tiers = prediction.memory[fullest], found["tier_bytes"][fullest]
    predicted = memory.total_bytes
    return {
        "plan": plan.describe(),
        "predicted": predicted,
        "measured": found["peak_bytes"][fullest],
        "error": predicted / found["peak_bytes"][fullest] - 1.0,
        "resident": found["peak_resident_bytes"][fullest],
        "kinds": {name: size for name, size in memory.to_builtins().items() if size},
        "tiers_predicted": memory.tiers,
        "tiers": tiers,
        "deepspeed": _deepspeed(plan, workload),
    }


def _deepspeed(plan: Plan, workload: Workload) -> float | None:
    """DeepSpeed's estimate of what the device holds, where it has one for such a plan."""
    if plan.tensor > 1 or plan.pipeline > 1 or (plan.zero_stage < 2 and plan.optimizer_on == "device"):
        return None
    elements = sum(parameter.elements for parameter in workload.graph.parameters)
    off = plan.optimizer_on != "device"
    if plan.zero_stage < 3:
        return zero2_estimate(elements, plan.data, offload="optimizer" if off else "none").device_bytes
    layers: dict[int, int] = {}
    for layer in range(len(workload.graph.layers)):
        layers[layer] = sum(p.elements for p in workload.graph.layer_parameters(layer, layer + 1).values())
    offload = "any" if off and plan.parameters_on != "device" else "optimizer" if off else "none"
    return zero3_estimate(elements, max(layers.values()), plan.data, offload=offload).device_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", help="only configurations with this in their name")
    parser.add_argument("--subject", default="gpt", choices=("gpt", "mlp"))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "memory.json")
    arguments = parser.parse_args()
    record = new_record(seed=0, torch=torch.__version__)
    console = Console(width=100 if not sys.stdout.isatty() else None, highlight=False)
    table = Table(box=SIMPLE_HEAD, title="Peak memory of the fullest rank, MB", title_justify="left")
    for column in ("plan", "predicted", "measured", "error", "DeepSpeed", "off the device: predicted", "measured"):
        table.add_column(column, justify="left" if column == "plan" else "right")
    script = [arguments.subject, "--steps", str(arguments.steps)]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        workload = trace_script(HERE / "subjects.py", script, Path(scratch) / "workload.json", lambda *_: None)
        for number, (name, ranks, fields) in enumerate(CONFIGURATIONS):
            if arguments.only is not None and arguments.only not in name:
                continue
            row: dict[str, Any]
            try:
                plan = plan_of(workload, ranks, fields)
                row = {"name": name, **measure(workload, plan, script, Path(scratch) / str(number))}
            except Interrupted:
                raise
            except HeadwayError as error:
                row = {"name": name, "failed": str(error)}
                print(f"{name}: {error}", file=sys.stderr)
            rows.append(row)
            if "failed" in row:
                continue
            away = {tier: size for tier, size in row["tiers"].items() if tier != "buffers"}
            cells = [name, _megabytes(row["predicted"]), _megabytes(row["measured"]), f"{row['error']:+.1%}",
                     _megabytes(row["deepspeed"]), _tiers(row["tiers_predicted"]), _tiers(away)]  # fmt: skip
            table.add_row(*cells)
            print(" | ".join(cells), file=sys.stderr)
    console.print(table)
    errors = [abs(row["error"]) for row in rows if "error" in row]
    record["summary"] = {
        "configurations": len(errors),
        "failed": len(rows) - len(errors),
        "within 5 %": sum(error <= 0.05 for error in errors),
        "median error": statistics.median(errors) if errors else None,
        "largest error": max(errors, default=None),
    }
    record["rows"] = rows
    console.print(record["summary"])
    save_record(record, arguments.output)
    sys.exit(record["summary"]["failed"] > 0)


def _megabytes(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e6:.1f}"


def _tiers(found: dict[str, float]) -> str:
    return " ".join(f"{tier} {_megabytes(size)}" for tier, size in found.items() if size >= 1e4) or "-"


if __name__ == "__main__":
    main()
