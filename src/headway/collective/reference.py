"""A program carried out on arrays, one transfer after the other: the plainest reading there is.

Tests compare the fast readers with it, and `order` lets them try every order that `after` allows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headway.collective.program import Program
from headway.errors import ProgramError

__all__ = ["evaluate", "expected"]


def evaluate(
    program: Program, vectors: Sequence[np.ndarray], *, order: Sequence[int] | None = None
) -> list[np.ndarray | None]:
    """What each rank ends with, or None for a rank that the collective gives nothing.

    `vectors[rank]` is what the rank brings: the whole vector (broadcast and scatter: the root's counts), or its block
    (all-gather, gather). The whole vector is a multiple of `program.unit` elements long. `order` (unless given: that
    of `Program.in_order`) lists all positions of transfers. Raises ProgramError for a read of what was never written.
    """
    if order is None:
        program, order = program.in_order(), range(len(program.transfers))
    bounds = program.bounds
    gathers = program.collective in ("all_gather", "gather")
    block = program.unit // program.size
    scale = len(vectors[program.root]) // (block if gathers else program.unit)
    places: dict[tuple[int, int], np.ndarray] = {}
    for chunk, (start, stop) in enumerate(bounds):
        for rank in range(program.size):
            if program.starts_with(rank, chunk):
                shift = program.chunks[chunk].owner * block if gathers else 0
                places[rank, chunk] = vectors[rank][(start - shift) * scale : (stop - shift) * scale].copy()
    for position in order:
        transfer = program.transfers[position]
        origin, goal = (transfer.source, transfer.chunk), (transfer.target, transfer.chunk)
        for place in (origin, goal) if transfer.reduce else (origin,):
            if place not in places:
                raise ProgramError("reads what was never written", place=f"{program.name}: transfers[{position}]")
        places[goal] = places[goal] + places[origin] if transfer.reduce else places[origin].copy()
    results: list[np.ndarray | None] = []
    for rank in range(program.size):
        parts = [
            (_start(program, chunk), places[rank, chunk])
            for chunk in range(len(program.chunks))
            if program.ends_with(rank, chunk) and (rank, chunk) in places
        ]
        parts.sort(key=lambda part: part[0])
        results.append(np.concatenate([values for _, values in parts]) if parts else None)
    return results


def _start(program: Program, chunk: int) -> int:
    start = program.bounds[chunk][0]
    if program.collective == "all_to_all":
        # What arrives is laid out by owner.
        what, block = program.chunks[chunk], program.unit // program.size
        return start + (what.owner - what.target) * block
    return start


def expected(program: Program, vectors: Sequence[np.ndarray]) -> list[np.ndarray | None]:
    """What each rank must end with, by the collective's definition alone; arguments as of `evaluate`."""
    size, root = program.size, program.root
    match program.collective:
        case "broadcast":
            return [vectors[root]] * size
        case "reduce":
            return [np.sum(vectors, axis=0) if rank == root else None for rank in range(size)]
        case "all_reduce":
            return [np.sum(vectors, axis=0)] * size
        case "reduce_scatter":
            return list(np.split(np.sum(vectors, axis=0), size))
        case "all_gather":
            return [np.concatenate(vectors)] * size
        case "gather":
            return [np.concatenate(vectors) if rank == root else None for rank in range(size)]
        case "scatter":
            return list(np.split(vectors[root], size))
        case "all_to_all":
            pieces = [np.split(vector, size) for vector in vectors]
            return [np.concatenate([pieces[owner][rank] for owner in range(size)]) for rank in range(size)]
