"""Alpa's recursion over the runs of a stage problem: tables of what is left of the devices, for a limit on all stages.

Two tables: with how few stages the devices can be taken at all, over all runs, and the least sum of their seconds, over
those runs that a bound has left (`prices.py`).
"""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

import numpy as np

from headway.compiled import compiled
from headway.search.prices import ROUNDING, Bound, Prices
from headway.search.problem import Assignment, StageProblem
from headway.search.runs import UNLIMITED, Runs, assignment, check_size, machines_of, reach_of, runs_within

__all__ = ["NONE", "Least", "Recursion"]

# Any send that ever ends.
_ANY = sys.float_info.max


@compiled(nogil=True)
def _ahead(seconds: np.ndarray, reach: np.ndarray, devices: np.ndarray) -> tuple[float, float]:
    """The least sum of seconds, and of seconds x devices, however the layers are cut and whatever is in flight."""
    options, rows, _ = seconds.shape
    found = np.full((2, rows), np.inf)
    found[:, 0] = 0.0
    for stop in range(1, rows):
        for option in range(options):
            for start in range(stop):
                if reach[option, start, stop] > 0:
                    value = seconds[option, start, stop]
                    found[0, stop] = min(found[0, stop], found[0, start] + value)
                    found[1, stop] = min(found[1, stop], found[1, start] + value * devices[option])
    return found[0, rows - 1], found[1, rows - 1]


@compiled(nogil=True)
def _fewest(
    seconds: np.ndarray, reach: np.ndarray, size_of: np.ndarray, sends: np.ndarray, limit: float, send_limit: float,
    shifts: np.ndarray, real: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """[layer, state]: with how few stages of at most `limit` the layers from this one on can take just those devices.

    Fewer are never worse: the stages before have fewer micro-batches in flight.
    """
    options, rows, _ = seconds.shape
    states = len(real)
    none = np.int16(UNLIMITED + 1)
    found = np.full((rows, states), none, dtype=np.int16)
    found[rows - 1, 0] = 0
    first, last = np.full(rows, states), np.full(rows, -1)
    most_of = np.zeros((len(shifts), rows), dtype=np.int16)
    first[rows - 1], last[rows - 1] = 0, 0
    for start in range(rows - 2, -1, -1):
        if start > 0 and sends[start] > send_limit:
            continue
        target = found[start]
        most_of[:] = 0
        for option in range(options):
            for stop in range(start + 1, rows):
                if seconds[option, start, stop] <= limit:
                    size = size_of[option]
                    most_of[size, stop] = max(most_of[size, stop], reach[option, start, stop])
        for size in range(len(shifts)):
            shift = shifts[size]
            for stop in range(start + 1, rows):
                most = most_of[size, stop]
                if most == 0 or last[stop] < 0:
                    continue
                count = min(last[stop] + 1, states - shift) - first[stop]
                if count <= 0:
                    continue
                before = found[stop, first[stop] : first[stop] + count]
                after = target[first[stop] + shift : first[stop] + shift + count]
                for state in range(count):
                    # One stage more, if it still fits then.
                    value = before[state] + np.int16(1) if before[state] < most else none
                    after[state] = min(after[state], value)
        for state in range(states):
            if not real[state]:
                target[state] = none
            elif target[state] < none:
                first[start] = min(first[start], state)
                last[start] = state
    return found


@compiled(nogil=True)
def _relax(target: np.ndarray, source: np.ndarray, cost: float, shift: int, first: int, last: int) -> None:
    """`target[d + shift] = min(.., source[d] + cost)` for d from first to last, as far as there are states."""
    count = min(last + 1, len(target) - shift) - first
    if count <= 0:
        return
    # Views that begin at 0: no index can be negative, so the compiler makes vector code of it.
    after, before = target[first + shift : first + shift + count], source[first : first + count]
    for state in range(count):
        value = before[state] + cost
        after[state] = value if value < after[state] else after[state]


@compiled(nogil=True)
def _number(level: np.ndarray, start: np.ndarray, levels: int, layers: int) -> tuple[np.ndarray, int]:
    """Which row of the table stands for a level and the layer from which runs of it begin; -1: none does."""
    found = np.full((levels + 1, layers + 1), -1, dtype=np.int32)
    found[0, layers] = 0
    count = 1
    for at in range(len(level)):
        if found[level[at], start[at]] < 0:
            found[level[at], start[at]] = count
            count += 1
    return found, count


@compiled(nogil=True)
def _sums(
    sums: np.ndarray, row_of: np.ndarray, level: np.ndarray, start: np.ndarray, stop: np.ndarray, size: np.ndarray,
    seconds: np.ndarray, levels: int, open_ended: bool, sends: np.ndarray, limit: float, shifts: np.ndarray,
    left: np.ndarray, before: np.ndarray, most: float,
) -> None:  # fmt: skip
    """Fill `sums[row_of[s, i], d]`: the least sum of s stages for layers i to the end on devices d.

    Left out is what can't be part of a whole solution with a sum below `most`: `before[s, i] - left[d]` is a bound
    below the sum of the stages before.
    """
    spans = np.empty((len(sums), 2), dtype=np.int64)
    spans[:, 0], spans[:, 1] = len(left), -1
    sums[0] = np.inf
    sums[0, 0] = 0.0
    spans[0] = 0
    at = 0
    while at < len(level):
        own, begin = level[at], start[at]
        row = row_of[own, begin]
        target = sums[row]
        target[:] = np.inf
        lowest, highest = len(left), -1
        while at < len(level) and level[at] == own and start[at] == begin:
            if seconds[at] <= limit:
                cost, shift = seconds[at] + sends[begin], shifts[size[at]]
                for behind in range(own - 1, own + 1 if open_ended and own == levels else own):
                    source = row_of[behind, stop[at]]
                    if source >= 0 and spans[source, 1] >= 0:
                        _relax(target, sums[source], cost, shift, spans[source, 0], spans[source, 1])
                        lowest = min(lowest, spans[source, 0] + shift)
                        highest = max(highest, min(spans[source, 1] + shift, len(left) - 1))
            at += 1
        ahead = before[own, begin]
        for state in range(lowest, highest + 1):
            if not target[state] + ahead - left[state] < most:
                target[state] = np.inf
            elif target[state] < np.inf:
                spans[row, 0] = min(spans[row, 0], state)
                spans[row, 1] = state


@compiled(nogil=True)
def _trace(
    sums: np.ndarray, row_of: np.ndarray, level: np.ndarray, start: np.ndarray, stop: np.ndarray, size: np.ndarray,
    seconds: np.ndarray, levels: int, open_ended: bool, sends: np.ndarray, limit: float, shifts: np.ndarray,
    own: int, state: int,
) -> np.ndarray:  # fmt: skip
    """The runs behind `sums[row_of[own, 0], state]`, first to last, by their position: -1 stands after the last."""
    layers = row_of.shape[1] - 1
    found = np.full(layers + 1, -1, dtype=np.int64)
    count = 0
    begin = np.int64(0)
    # Behind a run come runs that stand before it in the list.
    for at in range(len(level) - 1, -1, -1):
        if level[at] != own or start[at] != begin or seconds[at] > limit or state < shifts[size[at]]:
            continue
        cost = seconds[at] + sends[begin]
        for behind in range(own - 1, own + 1 if open_ended and own == levels else own):
            source = row_of[behind, stop[at]]
            rest = state - shifts[size[at]]
            if source >= 0 and sums[source, rest] + cost == sums[row_of[own, begin], state]:
                found[count] = at
                count += 1
                begin = np.int64(stop[at])
                own, state = behind, int(rest)
                break
    return found


class Least(NamedTuple):
    """The least sum under a limit, the seconds of its slowest stage, and the stages."""

    sum: float
    slowest: float
    stages: tuple[Assignment, ...]


NONE = Least(math.inf, math.inf, ())


class Recursion:
    """Alpa's recursion over the runs of one problem, prepared once and run for any limit on the slowest stage."""

    def __init__(self, problem: StageProblem) -> None:
        self.problem = problem
        self.evaluated = 0
        machines = machines_of(problem)
        self.possible = machines is not None
        if machines is None:
            return
        self.machines = machines
        self.reach = reach_of(problem, machines)
        self.real = np.isfinite(machines.left[:, 0])
        self.full = int(np.flatnonzero((machines.left == 0).all(axis=1))[0])
        self.sends = np.zeros(problem.layers + 1)
        self.sends[1:-1] = problem.send_seconds[1 : problem.layers]
        self.table = np.empty(0)

    def prices(self, highest: float) -> Prices:
        """Prices of devices, none above `highest`."""
        return Prices(self.machines, self.sends, exactly=self.problem.exactly, highest=highest)

    def runs(self, limit: float, send_limit: float = _ANY) -> Runs:
        """All runs of at most `limit` seconds."""
        return runs_within(self.problem, self.machines, self.reach, limit, send_limit)

    def ahead(self) -> tuple[float, float]:
        """What no solution can beat: the least sum of seconds, and of seconds x devices, in whatever order they add."""
        devices = np.array([float(option.devices) for option in self.problem.options])
        seconds, area = _ahead(np.ascontiguousarray(self.problem.seconds), self.reach, devices)
        return seconds * (1 - ROUNDING), area * (1 - ROUNDING)

    def fewest(self, limit: float, send_limit: float = _ANY) -> tuple[Assignment, ...]:
        """Stages of which none takes longer than `limit`, as few as possible."""
        self.evaluated += 1
        problem, shifts = self.problem, self.machines.shifts[self.machines.size_of]
        counts = _fewest(
            np.ascontiguousarray(problem.seconds), self.reach, self.machines.size_of, self.sends, limit, send_limit,
            self.machines.shifts, self.real,
        )  # fmt: skip
        state = self.full if problem.exactly else int(np.argmin(np.where(self.real, counts[0], UNLIMITED + 1)))
        count, start, stages = int(counts[0, state]), 0, []
        if count > (problem.most_stages or UNLIMITED):
            return ()
        while start < problem.layers:
            fits = (problem.seconds[:, start] <= limit) & (self.reach[:, start] >= count)  # (options, layers + 1)
            behind = np.where(state >= shifts, state - shifts, 0)
            fits &= (state >= shifts)[:, None] & np.equal(counts[:, behind].T, count - 1)
            option, stop = (int(at) for at in np.argwhere(fits)[0])
            stages.append(Assignment(start, stop, option))
            start, state, count = stop, int(behind[option]), count - 1
        return tuple(stages)

    def least(self, runs: Runs, limit: float, bound: Bound, before: np.ndarray, most: float) -> Least:
        """The stages with the least sum among those of which none takes longer than `limit`.

        Sums from `most` on don't count. `bound` and `before` are of these runs, or of more under the same limit.

        Raises InputError if the devices have more states than memory holds.
        """
        self.evaluated += 1
        row_of, rows = _number(runs.level, runs.start, runs.levels, self.problem.layers)
        states = len(self.real)
        check_size(rows, states, 8)
        if self.table.size < rows * states:
            self.table = np.empty(rows * states)
        sums = self.table[: rows * states].reshape(rows, states)
        left = np.where(self.real, np.where(self.real[:, None], self.machines.left, 0.0) @ bound.prices, -math.inf)
        shared = (*runs, self.sends, limit, self.machines.shifts)
        scale = abs(bound.seconds) + 2 * float(np.abs(bound.prices) @ self.machines.supply)
        _sums(sums, row_of, *shared, left, before, most + ROUNDING * scale)
        tops = [(level, row) for level, row in enumerate(row_of[:, 0]) if row >= 0]
        if not tops:
            return NONE
        states_of = [self.full if self.problem.exactly else int(np.argmin(sums[row])) for _, row in tops]
        values = [float(sums[row, state]) for (_, row), state in zip(tops, states_of, strict=True)]
        at = int(np.argmin(values))
        if not values[at] < most:
            return NONE
        found = _trace(sums, row_of, *shared, tops[at][0], states_of[at])
        chosen = found[: int(np.argmin(found))]
        stages = tuple(
            assignment(self.problem, self.machines, self.reach, *(int(part) for part in parts))
            for parts in zip(runs.start[chosen], runs.stop[chosen], runs.size[chosen], runs.level[chosen], strict=True)
        )
        return Least(values[at], float(runs.seconds[chosen].max()), stages)
