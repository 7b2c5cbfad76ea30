"""What a plan needs of a machine's memory and disk, and whether it is there, before the first byte is allocated.

Running out of host memory while states are made is the commonest complaint about offloading; here it is an error that
names the shortfall. The sizes follow the plan and the traced model: bf16 parameters and float32 masters and moments as
the runtime keeps them (`Plan.optimizer_on`), slices of the replicas, activations of the swapped layers, the store's
pool of buffers. What a process takes besides (the interpreter, torch, the script's data) is `PROCESS_BYTES` a rank.
"""

from __future__ import annotations

import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

from headway.errors import DoesNotFitError
from headway.hardware.cluster import Cluster
from headway.hardware.host import available_bytes, control_group_left, memory_bytes
from headway.plan.plan import Plan, Tier
from headway.predict.memory import Sizes
from headway.predict.operators import WHOLE
from headway.predict.tiers import keeps_masters, moments_bytes, wire_bytes
from headway.units import format_bytes
from headway.value import Value
from headway.workload.graph import Workload

__all__ = [
    "PROCESS_BYTES",
    "Available",
    "Needs",
    "available_here",
    "check_here",
    "checkpoint_bytes",
    "needs_of",
    "rank_needs",
]

PROCESS_BYTES = 400 * 2**20
"""Resident memory of one rank that holds no tensor: the interpreter with torch and numba."""


class Needs(Value):
    """Bytes that the ranks of one node need together, beyond their processes.

    `host`: pageable or pinned memory of the host, transfer buffers included; `pinned`: the part of it that is locked
    for a GPU's copies; `device`: the fullest device's resting states, no activations; `disk`, `remote`: what rests
    there, in remote memory with the `checkpoints` that are kept there; `largest_rank`: host memory of the rank that
    needs most, against limits on single processes.
    """

    node: str
    ranks: int
    host: float = 0.0
    pinned: float = 0.0
    device: float = 0.0
    disk: float = 0.0
    remote: float = 0.0
    checkpoints: float = 0.0
    largest_rank: float = 0.0


@dataclass(frozen=True)
class Available:
    """What this machine has, in bytes; infinity where nothing limits.

    `host`: free memory, and what the control group leaves; `process`: what a process may have (RLIMIT_AS, RLIMIT_DATA);
    `pinned`: what can be page-locked, at most all of the memory that no one else has locked; `locked_by_limit`:
    RLIMIT_MEMLOCK, which binds `mlock` and not CUDA's own pinning; `disk`: free under the directory.
    """

    host: float
    process: float = float("inf")
    pinned: float = float("inf")
    locked_by_limit: float = float("inf")
    disk: float = float("inf")


def needs_of(
    plan: Plan,
    workload: Workload,
    cluster: Cluster | None = None,
    *,
    buffer_bytes: float = 256 * 2**20,
    remote_checkpoints: bool = False,
) -> tuple[Needs, ...]:
    """What each node needs under `plan`. Without `cluster` all ranks are on one node of CPU processes.

    `remote_checkpoints`: whether the first node's remote memory holds the run's checkpoints.
    """
    by_name = {} if cluster is None else {device.name: device for device in cluster.devices}
    nodes: dict[str, list[dict[str, float]]] = {}
    for rank, name in enumerate(plan.devices):
        device = by_name.get(name)
        node = "this machine" if device is None else device.node
        on_gpu = (
            device is not None
            and cluster is not None
            and cluster.accelerators[device.accelerator].torch_device == "cuda"
        )
        nodes.setdefault(node, []).append(rank_needs(plan, workload, rank, on_gpu=on_gpu, buffer_bytes=buffer_bytes))
    # The newest, and the one that is being written.
    checkpoints = 2.0 * checkpoint_bytes(workload) if remote_checkpoints else 0.0
    for ranks in list(nodes.values())[:1]:
        ranks[0]["remote"] += checkpoints
    return tuple(
        Needs(
            node=node,
            checkpoints=checkpoints if node == next(iter(nodes)) else 0.0,
            ranks=len(ranks),
            device=max(each["device"] for each in ranks),
            largest_rank=max(each["host"] for each in ranks),
            **{kind: sum(each[kind] for each in ranks) for kind in ("host", "pinned", "disk", "remote")},
        )
        for node, ranks in nodes.items()
    )


def rank_needs(
    plan: Plan, workload: Workload, rank: int, *, on_gpu: bool = False, buffer_bytes: float = 256 * 2**20
) -> dict[str, float]:
    """What one rank needs, in bytes, by the names of the fields of `Needs`."""
    sizes = Sizes(workload.graph)
    stages = [plan.stages[position] for position in plan.stages_of(plan.coordinates(rank)[0])]
    held = [sizes.parameters(stage.start, stage.stop, WHOLE) for stage in stages]
    tensor = plan.degrees(plan.coordinates(rank)[0])[1]
    # What tensor parallelism does not divide is little beside what it does; preflight must not promise too much.
    divided = sum(_divided(workload, stage.start, stage.stop) for stage in stages) if tensor > 1 else 0.0
    whole = sum(each.bytes for each in held)
    share = 1.0 - (divided / whole * (1.0 - 1.0 / tensor) if whole else 0.0)
    trained = sum(each.trainable_elements for each in held) * share
    replicas = plan.degrees(plan.coordinates(rank)[0])[0] * plan.context
    low = plan.precision != "float32" and plan.optimizer_on != "device"
    parameters = whole * share * (0.5 if low else 1.0)
    states = workload.optimizer.state_bytes_per_element
    if plan.optimizer_on != "device":
        states = moments_bytes(states, plan.moments) + (4.0 if keeps_masters(plan, on_cpu=not on_gpu) else 0.0)
        if plan.delayed_update:
            states += wire_bytes(plan.precision)  # what is updated waits beside what is computed with
    resting = {"device": 0.0, "host": 0.0, "disk": 0.0, "remote": 0.0}
    sliced = replicas if plan.zero_stage == 3 or plan.parameters_on != "device" else 1
    resting[plan.parameters_on] += parameters / sliced
    optimizer = trained * states / (replicas if plan.zero_stage or plan.optimizer_on != "device" else 1)
    resting[plan.optimizer_on] += optimizer * (1.0 - plan.optimizer_kept)
    resting["device"] += optimizer * plan.optimizer_kept
    resting["device"] += (
        trained * (parameters / whole / share * 4.0 if whole else 0.0) / (replicas if plan.zero_stage >= 2 else 1)
    )
    resting[plan.activations_on] += _swapped(plan, workload, rank) if plan.activations_on != "device" else 0.0
    off = bool(plan.tiers)
    buffers = buffer_bytes if off else 0.0
    host = resting["host"] + buffers + (0.0 if on_gpu else resting["device"])
    pinned = resting["host"] + buffers if on_gpu else 0.0
    return {**resting, "host": host, "pinned": pinned}


def checkpoint_bytes(workload: Workload) -> float:
    """What one checkpoint takes, under whatever plan: float32 parameters, the optimizer's states, buffers."""
    graph = workload.graph
    trained = sum(parameter.elements for parameter in graph.parameters if parameter.trainable)
    held = sum(max(parameter.bytes, 4.0 * parameter.elements) for parameter in graph.parameters)
    return held + trained * workload.optimizer.state_bytes_per_element + graph.buffer_bytes


def _divided(workload: Workload, start: int, stop: int) -> float:
    known = workload.graph.parameter_by_name
    names = {
        name
        for block in workload.graph.blocks
        if start <= block.layer < stop
        for name in block.parameters
        if name in known
    }
    return float(sum(known[name].bytes for name in names))


def _swapped(plan: Plan, workload: Workload, rank: int) -> float:
    """Bytes of activations off the device at once: those of all micro-batches in flight."""
    total = 0.0
    pipeline = plan.coordinates(rank)[0]
    for position in plan.stages_of(pipeline):
        stage = plan.stages[position]
        flight = 1
        if plan.pipeline > 1:
            flight = (
                plan.micro_batches if plan.schedule == "gpipe" else min(plan.micro_batches, plan.pipeline - pipeline)
            )
        for at in plan.swapped_layers(stage):
            layer = workload.graph.layers[at]
            kind = layer.input
            saved = layer.saved.at(plan.micro_batch)
            if at in stage.recompute:
                saved = float(kind.bytes(plan.micro_batch)) if kind is not None else 0.0
            total += saved * flight
    return total


def available_here(directory: Path | None = None) -> Available:
    """What this machine has now. `directory`: where the disk tier is to lie."""
    limits = [_limit(resource.RLIMIT_AS), _limit(resource.RLIMIT_DATA)]
    disk = float("inf")
    if directory is not None:
        there = next((path for path in (directory, *directory.absolute().parents) if path.exists()), Path("/"))
        disk = float(shutil.disk_usage(there).free)
    return Available(
        host=available_bytes(),
        process=min(limits),
        pinned=min(
            memory_bytes("MemTotal") - memory_bytes("Mlocked") - memory_bytes("Unevictable"), control_group_left()
        ),
        locked_by_limit=_limit(resource.RLIMIT_MEMLOCK),
        disk=disk,
    )


def check_here(
    plan: Plan,
    workload: Workload,
    cluster: Cluster | None = None,
    *,
    directory: Path | None = None,
    available: Available | None = None,
    buffer_bytes: float = 256 * 2**20,
    remote_checkpoints: bool = False,
) -> tuple[Needs, ...]:
    """What the nodes need, if this machine has enough for the first of them.

    Checks nothing for a plan that keeps all on its devices, checkpoints in files included: the predictor's own check of
    the devices speaks for that.
    Raises DoesNotFitError naming the field of the plan, the shortfall, and what would help.
    """
    needs = needs_of(plan, workload, cluster, buffer_bytes=buffer_bytes, remote_checkpoints=remote_checkpoints)
    tiers: dict[Tier, list[str]] = {}
    for field in ("parameters_on", "optimizer_on", "activations_on"):
        tiers.setdefault(getattr(plan, field), []).append(field)
    if set(tiers) == {"device"} and not remote_checkpoints:
        return needs
    here = available or available_here(directory)
    mine = needs[0]

    def compare(kind: str, needed: float, there: float, tier: Tier, remedy: str) -> None:
        if needed > there:
            raise DoesNotFitError(
                f"{mine.ranks} {'rank needs' if mine.ranks == 1 else 'ranks need'} {format_bytes(needed)} of {kind} on "
                f"{mine.node}, and {format_bytes(there)} are there: {format_bytes(needed - there)} are missing",
                place="plan: " + ", ".join(tiers.get(tier, ["optimizer_on"])),
                remedy=remedy,
            )

    # The memory node of a run on one machine is a process there (`memory.remote_shared`).
    processes = mine.ranks * PROCESS_BYTES + (mine.remote if len(needs) == 1 else 0.0)
    less = 'rest states on "disk", keep more on the device (optimizer_kept), or use moments of "bfloat16" or "int8"'
    if 2 * mine.checkpoints > mine.host + processes:
        less = "leave checkpoints on disk (--checkpoint-on disk)"
        tiers = {"host": ["checkpoints in remote memory"]}
    elif mine.checkpoints:
        less = f"leave checkpoints on disk (--checkpoint-on disk), {less}"
    resting: Tier = "remote" if mine.remote > mine.host and "remote" in tiers else "host"
    compare("host memory", mine.host + processes, here.host, resting, less)
    limit = here.locked_by_limit
    compare(
        "pinned memory",
        mine.pinned,
        here.pinned,
        "host",
        less + (f" (ulimit -l allows {format_bytes(limit)}, which CUDA does not ask for)" if limit < 1e18 else ""),
    )
    compare(
        "memory in one process",
        mine.largest_rank + PROCESS_BYTES,
        here.process,
        "host",
        f"raise ulimit -v, -d; or {less}",
    )
    where = f" under {directory}" if directory is not None else ""
    compare(
        f"disk{where}", mine.disk, here.disk, "disk", "free some space, or set HEADWAY_TIER_DIRECTORY to another disk"
    )
    return needs


def _limit(kind: int) -> float:
    soft, _ = resource.getrlimit(kind)
    return float("inf") if soft == resource.RLIM_INFINITY else float(soft)
