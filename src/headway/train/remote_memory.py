"""The memory node of a run: started before its ranks, told to them by a variable, ended after them.

A plan that rests something in remote memory needs a node to rest it in, and so do checkpoints that are to outlive the
ranks (`train.remote_checkpoint`). On one machine that is a process of its own
(`memory.remote_shared`), large enough for all ranks there. `headway run` starts it before the ranks; under torchrun or
Slurm the first rank on each machine does. It ends with the process that started it, however that ends, and the kernel
frees the memory when the last rank has gone.

    with memory_node(plan, workload) as variables:     # {} where the plan needs none
        ...                                            # start ranks with these variables
    region = attach(plan, rank, os.environ)            # in a rank
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from headway.errors import DoesNotFitError, FieldError, HeadwayError, RunError
from headway.exchange.ending import gather_bytes
from headway.exchange.placement import whole_number
from headway.memory.preflight import checkpoint_bytes, rank_needs
from headway.memory.remote_shared import MemoryNode, NodeAddress, SharedVerbs, start_memory_node
from headway.memory.remote_store import RemoteStore
from headway.memory.transfers import SEGMENT_BYTES
from headway.plan.plan import Plan
from headway.train.infinity_homes import piece_bytes
from headway.value import Value
from headway.workload.graph import Workload

__all__ = [
    "VARIABLE",
    "RemoteMemory",
    "attach",
    "join_memory_node",
    "memory_node",
    "region_size",
    "transfer_buffer_bytes",
]

VARIABLE = "HEADWAY_REMOTE_MEMORY"
"""Environment variable with a `RemoteMemory` in JSON: where ranks find the memory node of their run."""

# What resting states are estimated to take is a little more in extents, and activations are saved by whole storages.
_MARGIN = 1.1
_ACTIVATIONS_MARGIN = 1.5
_ROOM_BYTES = 16 * 2**20


class RemoteMemory(Value):
    """A memory node, and into how many names its region is divided (`RemoteStore`)."""

    node: NodeAddress
    slots: int


def transfer_buffer_bytes() -> int:
    """Those that a rank's store has for transfers: HEADWAY_BUFFER_BYTES, or 256 MiB."""
    return whole_number(os.environ, "HEADWAY_BUFFER_BYTES", 256 * 2**20)


def region_size(plan: Plan, workload: Workload, ranks: Sequence[int], *, checkpoints: bool = False) -> tuple[int, int]:
    """(bytes, names) of a region for what these ranks keep in remote memory, with some room to spare.

    `checkpoints`: two of the run's as well, the newest and the one that is being written. The variable
    HEADWAY_REMOTE_BYTES sets the bytes instead.
    """
    size = names = 0.0
    graph = workload.graph
    piece = min(SEGMENT_BYTES, piece_bytes(transfer_buffer_bytes(), "remote"))
    for rank in ranks:
        resting = rank_needs(plan, workload, rank)["remote"]
        size += resting * (_ACTIVATIONS_MARGIN if plan.activations_on == "remote" else _MARGIN)
        # Segments, or the pieces of groups where these are smaller; and what is smaller than one: chunks of states,
        # updated values that wait, groups, saved storages.
        names += 2 * resting / piece + 4 * len(graph.parameters) * max(1, sum(plan.tiles.values()))
        if plan.activations_on == "remote":
            names += 2 * len(graph.operators) * (plan.micro_batches if plan.pipeline > 1 else 1)
    if checkpoints:
        kept = 2.0 * checkpoint_bytes(workload)
        size += kept * _MARGIN
        # Parts of at least half a segment, or segments; each rank's last part; metadata, some kB for each parameter.
        names += 2.0 * kept / SEGMENT_BYTES + 16 * len(ranks)
        size += 2.0 * len(ranks) * 2**13 * (4 + len(graph.parameters))
    slots = 256 + int(names)
    wanted = os.environ.get("HEADWAY_REMOTE_BYTES", "")
    if wanted and not wanted.isdigit():
        raise FieldError(f"{wanted!r} is no number of bytes", place="HEADWAY_REMOTE_BYTES", remedy="a whole number")
    # A name takes 256 bytes of the region.
    return (int(wanted) if wanted else int(size) + _ROOM_BYTES) + 256 * (slots + 2), slots


@contextlib.contextmanager
def memory_node(plan: Plan, workload: Workload | Path, *, checkpoints: bool = False) -> Iterator[dict[str, str]]:
    """The variables that tell the ranks of `plan` where their memory node is, which lives as long as this is open.

    None, and no process, where neither the plan nor `checkpoints` need remote memory. Raises DoesNotFitError where
    there is too little.
    """
    if "remote" not in plan.tiers and not checkpoints:
        yield {}
        return
    workload = Workload.load(workload) if isinstance(workload, Path) else workload
    node, remote = _start(plan, workload, range(plan.world_size), checkpoints=checkpoints)
    with node:
        yield {VARIABLE: remote.to_json()}


def join_memory_node(
    plan: Plan, workload: Workload, rank: int, device: torch.device
) -> tuple[RemoteMemory, MemoryNode | None]:
    """The memory node of this machine's ranks where no launcher has started one: their first does, and tells the rest.

    A collective of all ranks. The node, of the rank that started it, is to be closed when all have let go of it.
    Raises on all ranks what went wrong on any.
    """
    here = f"{os.uname().nodename} {_boot()} {os.stat('/proc/self/ns/pid').st_ino}"
    alone = plan.world_size == 1 or not dist.is_initialized()
    places = [here] if alone else [each.decode() for each in gather_bytes(here.encode(), device)]
    mine = [other for other, place in enumerate(places) if place == here]
    node, told = None, b""
    if rank == mine[0]:
        try:
            node, remote = _start(plan, workload, mine)
            told = remote.to_json().encode()
        except HeadwayError as error:
            if alone:
                raise
            told = b"!" + str(error).encode()
    answers = [told] if alone else gather_bytes(told, device)
    failed = next((answer[1:].decode() for answer in answers if answer.startswith(b"!")), None)
    if failed is not None:
        if node is not None:
            node.close()
        raise RunError(f"no memory node: {failed}", place="plan", remedy="rest less in remote memory")
    return RemoteMemory.from_json(answers[mine[0]], place="memory node"), node


def attach(
    plan: Plan, rank: int, environment: Mapping[str, str], remote: RemoteMemory | None = None
) -> RemoteStore | None:
    """What a rank keeps in the memory node that `remote`, or the environment, names; None if neither does.

    Content is replaced in place: what a run rests there dies with it, so a torn replacement would help nobody.
    Raises RunError when the node is gone.
    """
    if remote is None:
        told = environment.get(VARIABLE, "")
        if not told or "remote" not in plan.tiers:
            return None
        remote = RemoteMemory.from_json(told, place=VARIABLE)
    return RemoteStore(
        SharedVerbs([remote.node]), remote.node.region_bytes, in_place=True, prefix=f"{rank}/", slots=remote.slots
    )


def _start(
    plan: Plan, workload: Workload, ranks: Sequence[int], *, checkpoints: bool = False
) -> tuple[MemoryNode, RemoteMemory]:
    size, slots = region_size(plan, workload, ranks, checkpoints=checkpoints)
    try:
        node = start_memory_node(size)
    except DoesNotFitError as error:
        fields = [f for f in ("parameters_on", "optimizer_on", "activations_on") if getattr(plan, f) == "remote"]
        raise DoesNotFitError(
            error.message,
            place="plan: " + ", ".join(fields) if fields else "checkpoints in remote memory",
            remedy='choose "disk", or end what else uses memory',
        ) from error
    return node, RemoteMemory(node=node.address, slots=slots)


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
