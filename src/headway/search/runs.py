"""Runs of layers on sub-meshes, by how many stages follow: what the stage programme chooses from.

A run is one possible stage: layers `start` to `stop` on a sub-mesh of some size, `level` stages to the end, itself
included. All options of a size take the same devices away, so of those that fit with so many micro-batches in flight
only the fastest counts. Lists of runs stand in the order in which tables are filled: few stages left first, and of
equal levels the later start first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from headway.compiled import compiled
from headway.errors import InputError
from headway.search.problem import Assignment, StageProblem

__all__ = ["UNLIMITED", "Machines", "Runs", "assignment", "check_size", "machines_of", "reach_of", "runs_within"]

# A run that fits however many stages follow.
UNLIMITED = np.int16(30000)
# A table may take so many bytes.
_MOST_BYTES = 2**31


class Machines(NamedTuple):
    """The devices of a problem as states of one axis: how many of each pool are taken.

    Pools lie within one another like the digits of a number. All but the last have room for a sub-mesh more than there
    is, so that a step along the axis that takes too many of them ends in a state that is not `real`, never in another.
    """

    sizes: tuple[tuple[int, int], ...]  # (pool, devices) of each size of sub-mesh
    size_of: np.ndarray  # (options,)
    pool: np.ndarray  # (sizes,)
    devices: np.ndarray  # (sizes,), as floats
    shifts: np.ndarray  # (sizes,): how far along the axis a sub-mesh leads
    left: np.ndarray  # (states, pools): devices that are not taken; infinity where the state is not real
    supply: np.ndarray  # (pools,): devices that can be taken, as floats
    most: int  # stages that there can be


class Runs(NamedTuple):
    """Possible stages, one a row, ordered by level and then by start, the last first."""

    level: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    size: np.ndarray
    seconds: np.ndarray
    levels: int  # the highest level
    open_ended: bool  # the highest level stands for itself and all above

    def some(self, kept: np.ndarray) -> Runs:
        """Those that a mask keeps."""
        at = np.flatnonzero(kept)
        return self._replace(
            level=self.level[at], start=self.start[at], stop=self.stop[at], size=self.size[at], seconds=self.seconds[at]
        )


def check_size(rows: int, states: int, each: int) -> None:
    """Raise InputError if a table of so many rows and states, `each` bytes an entry, is more than memory holds."""
    if rows * states * each > _MOST_BYTES:
        raise InputError(
            f"{rows} rows x {states} states of the devices is too much",
            place="stage problem",
            remedy="offer larger sub-meshes only, so that their sizes have a larger common divisor",
        )


def machines_of(problem: StageProblem) -> Machines | None:
    """The states of a problem's devices; None: no number of sub-meshes takes what must be taken.

    Raises InputError if there are more states than a table of them for each layer may have.
    """
    sizes = sorted({(option.pool, option.devices) for option in problem.options})
    size_of = np.array([sizes.index((option.pool, option.devices)) for option in problem.options], dtype=np.int64)
    of_pool = [[devices for pool, devices in sizes if pool == at] for at in range(len(problem.pools))]
    units = [math.gcd(*devices) for devices in of_pool]
    counts = [there // unit if unit else 0 for there, unit in zip(problem.pools, units, strict=True)]
    if problem.exactly and any(there % (unit or there + 1) for there, unit in zip(problem.pools, units, strict=True)):
        return None
    most = min(problem.layers, sum(there // min(own) for there, own in zip(problem.pools, of_pool, strict=True) if own))
    if not most:
        return None
    widths = [
        count + 1 + (min(max(own) // unit, count + 1) if own and at + 1 < len(counts) else 0)
        for at, (count, unit, own) in enumerate(zip(counts, units, of_pool, strict=True))
    ]
    strides = np.cumprod([1, *widths])
    check_size(problem.layers + 1, int(strides[-1]), 2)
    taken = np.arange(strides[-1])[:, None] // strides[:-1] % np.array(widths)
    everything = np.array(counts) * np.array(units)
    left = (everything - taken * np.array(units)).astype(float)
    left[(left < 0).any(axis=1)] = math.inf
    fits = [devices <= everything[pool] for pool, devices in sizes]
    # A size that is larger than its pool leads beyond the end of the axis.
    shifts = [
        strides[pool] * (devices // units[pool]) if fit else strides[-1]
        for (pool, devices), fit in zip(sizes, fits, strict=True)
    ]
    return Machines(
        tuple(sizes), size_of, np.array([pool for pool, _ in sizes]),
        np.array([float(devices) for _, devices in sizes]), np.array(shifts, dtype=np.int64), left,
        everything.astype(float), most,
    )  # fmt: skip


def reach_of(problem: StageProblem, machines: Machines) -> np.ndarray:
    """[option, start, stop]: with how many stages to the end, itself included, a run fits; `UNLIMITED`, or 0: never."""
    return _reach(
        np.ascontiguousarray(problem.seconds), np.ascontiguousarray(problem.fixed_bytes),
        np.ascontiguousarray(problem.kept_bytes), np.ascontiguousarray(problem.capacity_bytes, dtype=float),
        min(machines.most, problem.micro_batches),
    )  # fmt: skip


@compiled(nogil=True)
def _reach(
    seconds: np.ndarray, fixed: np.ndarray, kept: np.ndarray, capacity: np.ndarray, most: int
) -> np.ndarray:  # fmt: skip
    options, rows = seconds.shape[0], seconds.shape[1]
    found = np.zeros((options, rows, rows), dtype=np.int16)
    for option in range(options):
        for start in range(rows):
            for stop in range(start + 1, rows):
                if not seconds[option, start, stop] < np.inf:
                    continue
                stays, each, room = fixed[option, start, stop], kept[option, start, stop], capacity[option]
                if stays + most * each <= room:
                    found[option, start, stop] = UNLIMITED
                    continue
                # With more in flight it needs no less: the last that fits by bisection.
                fits, beyond = 0, most
                while beyond - fits > 1:
                    middle = (fits + beyond) // 2
                    if stays + middle * each <= room:
                        fits = middle
                    else:
                        beyond = middle
                found[option, start, stop] = fits
    return found


def runs_within(problem: StageProblem, machines: Machines, reach: np.ndarray, limit: float, send_limit: float) -> Runs:
    """All runs of at most `limit` seconds behind a cut of at most `send_limit` from which the last layer is reached."""
    binding = 0 < problem.most_stages < machines.most
    most = problem.most_stages if binding else min(machines.most, problem.micro_batches)
    possible = (problem.seconds <= limit) & (reach > 0)
    limited = possible & (reach < UNLIMITED)
    # Above the last level at which some run ceases to fit all levels are alike.
    levels = most if binding else min(most, 1 + int(reach[limited].max(initial=0)))
    open_ended = not binding and levels < machines.most
    order = np.argsort(machines.size_of, kind="stable")
    level, start, stop, size, seconds = _within(
        np.ascontiguousarray(problem.seconds), reach, possible, order, machines.size_of,
        np.asarray(problem.send_seconds, dtype=float), send_limit, levels, open_ended,
    )  # fmt: skip
    return Runs(level, start, stop, size, seconds, levels, open_ended)


@compiled(nogil=True)
def _within(
    seconds: np.ndarray, reach: np.ndarray, possible: np.ndarray, order: np.ndarray, size_of: np.ndarray,
    sends: np.ndarray, send_limit: float, levels: int, open_ended: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    rows = seconds.shape[1]
    layers = rows - 1
    # First the possible (start, stop, option), the options of a size side by side, and how many rows they can become.
    found = room = 0
    count = possible.sum()
    start_of, stop_of, of_size, fits_to = (
        np.empty(count, dtype=np.uint16), np.empty(count, dtype=np.uint16), np.empty(count, dtype=np.uint16),
        np.empty(count, dtype=np.uint16),
    )  # fmt: skip
    takes = np.empty(count)
    for start in range(layers - 1, -1, -1):
        if start > 0 and sends[start] > send_limit:
            continue
        for option in order:
            for stop in range(start + 1, rows):
                if possible[option, start, stop]:
                    start_of[found], stop_of[found], of_size[found] = start, stop, size_of[option]
                    takes[found], fits_to[found] = seconds[option, start, stop], reach[option, start, stop]
                    room += min(reach[option, start, stop], levels)
                    found += 1
    reached = np.zeros((levels + 1, rows), dtype=np.bool_)
    reached[0, layers] = True
    level_found, start_found, stop_found, size_found, seconds_found = (
        np.empty(room, dtype=np.uint16), np.empty(room, dtype=np.uint16), np.empty(room, dtype=np.uint16),
        np.empty(room, dtype=np.uint16), np.empty(room),
    )  # fmt: skip
    # [size, stop]: the row of this level and start
    row_of = np.full((size_of.max() + 1, rows), -1, dtype=np.int64)
    filled = 0
    for level in range(1, levels + 1):
        top = open_ended and level == levels
        begun, now = filled, -1
        for at in range(found):
            start, stop, size = start_of[at], stop_of[at], of_size[at]
            if start != now:
                begun, now = filled, start
            if fits_to[at] < level or not (reached[level - 1, stop] or (top and reached[level, stop])):
                continue
            row = row_of[size, stop]
            if begun <= row < filled and size_found[row] == size and stop_found[row] == stop:
                seconds_found[row] = min(seconds_found[row], takes[at])
                continue
            row_of[size, stop] = filled
            level_found[filled], start_found[filled], stop_found[filled], size_found[filled] = level, start, stop, size
            seconds_found[filled] = takes[at]
            filled += 1
            reached[level, start] = True
    return level_found[:filled], start_found[:filled], stop_found[:filled], size_found[:filled], seconds_found[:filled]


def assignment(
    problem: StageProblem, machines: Machines, reach: np.ndarray, start: int, stop: int, size: int, level: int
) -> Assignment:
    """The stage with the fastest option of that size that fits with `level` stages to the end."""
    fits = (machines.size_of == size) & (reach[:, start, stop] >= level)
    seconds = np.where(fits, problem.seconds[:, start, stop], math.inf)
    return Assignment(start, stop, int(np.argmin(seconds)))
