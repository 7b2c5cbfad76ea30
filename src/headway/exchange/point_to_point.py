"""Carries a `Program` out through torch's batched point-to-point: over nccl between GPUs, or over any other backend.

Transfers that wait for one another are on different *levels*; those of one level may go at the same time. Each chunk is
cut into pieces, and step s moves piece p of level l wherever l + p = s, in one batch: while a piece is on the second
level, the next one is on the first, so that the chunks flow through the ranks like through a pipe. Reductions are
torch operations on the tensor's own device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from headway.collective.program import Program, Transfer
from headway.errors import InputError, MismatchError

__all__ = ["levels", "run_program"]

_PIECE_BYTES = 4 << 20
_MOST_PIECES = 64

_COMBINE: dict[str, Callable[..., torch.Tensor]] = {
    "sum": torch.add,
    "average": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
    "product": torch.mul,
    "band": torch.bitwise_and,
    "bor": torch.bitwise_or,
    "bxor": torch.bitwise_xor,
}


def levels(program: Program) -> tuple[int, ...]:
    """The level of each transfer: 0 if it waits for none, else one more than the highest of those it waits for.

    The program must be in order.
    """
    found: list[int] = []
    for transfer in program.transfers:
        found.append(1 + max((found[other] for other in transfer.after), default=-1))
    return tuple(found)


def run_program(
    program: Program,
    tensor: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    operation: str = "sum",
    *,
    piece_bytes: int = _PIECE_BYTES,
) -> None:
    """Carry `program` out on `tensor`, in place, among the ranks of `group`, a process group of torch's.

    `tensor` is the collective's whole vector, flat and contiguous, laid out as `Program.bounds` says. At the end every
    place that `Program.ends_with` names holds the result; the others are undefined. `operation`: sum, average, min,
    max, product, band, bor or bxor. Raises MismatchError if the program is for another number of ranks, and whatever
    the group's backend raises.
    """
    program = program.in_order()
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if size != program.size:
        raise MismatchError(
            f"the program is for {program.size} ranks, the group has {size}",
            place=program.name,
            remedy="generate the program for the group's ranks",
        )
    if operation not in _COMBINE:
        raise InputError(f"unknown operation {operation!r}", place=program.name, remedy=", ".join(_COMBINE))
    if tensor.dim() != 1 or not tensor.is_contiguous():
        raise InputError("the tensor must be flat and contiguous", place=program.name)
    places = _Places(program, tensor, rank)
    combine = _COMBINE[operation]
    rounds = _rounds(program, rank)
    pieces = _count_of_pieces(program, tensor, piece_bytes)
    for step in range(len(rounds) + pieces - 1 if rounds else 0):
        batch: list[dist.P2POp] = []
        reductions: list[tuple[torch.Tensor, torch.Tensor]] = []
        for level in range(max(0, step - pieces + 1), min(step + 1, len(rounds))):
            for transfer in rounds[level]:
                place = _piece(places[transfer.chunk], step - level, pieces)
                if not place.numel():
                    continue  # on both sides: the sizes are the same everywhere
                if transfer.source == rank:
                    batch.append(dist.P2POp(dist.isend, place, group=group, group_peer=transfer.target))
                    continue
                if transfer.reduce:
                    arriving = torch.empty_like(place)
                    reductions.append((place, arriving))
                    place = arriving
                batch.append(dist.P2POp(dist.irecv, place, group=group, group_peer=transfer.source))
        if not batch:
            continue
        for work in dist.batch_isend_irecv(batch):
            work.wait()
        for place, arriving in reductions:
            combine(place, arriving, out=place)
    if operation == "average":
        for place in (places[chunk] for chunk in range(len(program.chunks)) if program.ends_with(rank, chunk)):
            place.div_(size, rounding_mode=None if place.is_floating_point() or place.is_complex() else "trunc")


class _Places:
    """Where this rank keeps each chunk: in the tensor itself, but for all-to-all, whose input and output overlap."""

    def __init__(self, program: Program, tensor: torch.Tensor, rank: int) -> None:
        self._program = program
        self._tensor = tensor
        self._bounds = [
            (start * tensor.numel() // program.unit, stop * tensor.numel() // program.unit)
            for start, stop in program.bounds
        ]
        self._found: dict[int, torch.Tensor] = {}
        if program.collective == "all_to_all":
            self._lay_out(rank)

    def _lay_out(self, rank: int) -> None:
        given = self._tensor.clone()
        block = self._tensor.numel() // self._program.size
        for position, (chunk, (start, stop)) in enumerate(zip(self._program.chunks, self._bounds)):
            if chunk.target == rank:
                # It leaves its owner from block `target`, and arrives here in block `owner`.
                at = start - chunk.target * block + chunk.owner * block
                self._found[position] = self._tensor[at : at + stop - start]
                if chunk.owner == rank:
                    self._found[position].copy_(given[start:stop])
            elif chunk.owner == rank:
                self._found[position] = given[start:stop]
            else:
                self._found[position] = self._tensor.new_empty(stop - start)

    def __getitem__(self, chunk: int) -> torch.Tensor:
        found = self._found.get(chunk)
        if found is None:
            start, stop = self._bounds[chunk]
            found = self._found[chunk] = self._tensor[start:stop]
        return found


def _rounds(program: Program, rank: int) -> tuple[tuple[Transfer, ...], ...]:
    """Level by level, the transfers that `rank` has a part in, in the program's order."""
    # Kept with the program, as a cached property would be: to hash a program costs more than to carry it out.
    kept: dict[str, Any] = vars(program)  # type: ignore[assignment]
    key = f"_rounds_of_rank_{rank}"
    if key in kept:
        return kept[key]
    found = levels(program)
    rounds: list[list[Transfer]] = [[] for _ in range(max(found, default=-1) + 1)]
    for transfer, level in zip(program.transfers, found):
        if rank in (transfer.source, transfer.target):
            rounds[level].append(transfer)
    kept[key] = tuple(tuple(transfers) for transfers in rounds)
    return kept[key]


def _count_of_pieces(program: Program, tensor: torch.Tensor, piece_bytes: int) -> int:
    largest = max(chunk.weight for chunk in program.chunks) * tensor.nbytes / program.unit
    # Element counts are what must agree among ranks, and these are the same everywhere.
    return max(1, min(_MOST_PIECES, int(-(-largest // piece_bytes))))


def _piece(place: torch.Tensor, piece: int, pieces: int) -> torch.Tensor:
    length = place.numel()
    return place[piece * length // pieces : (piece + 1) * length // pieces]
