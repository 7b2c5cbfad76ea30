"""The best stages of a pipeline and the sub-mesh of each, exactly, by dynamic programming.

Alpa's inter-operator pass (Zheng et al., OSDI 2022, section 5.2): with a limit t on the slowest stage, the least sum
F(t) of all stages follows from a recursion over (stages, layers, devices), and the answer is the least
F(t) + (micro_batches - 1) t over all t. Alpa tries the limits in ascending order. F only falls as t grows, so here an
interval of limits (a, b] is known to hold nothing below F(b) + (micro_batches - 1) a', a' the first limit above a:
intervals that can't win are dropped whole, and a few dozen limits of some hundred thousand are tried.

Further than Alpa's: memory, by how many micro-batches a stage keeps in flight (which depends on the stages behind it),
several pools of devices, and the cost of sending. PipeDream's and DAPPLE's partitionings are special cases.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np

from headway.errors import InputError
from headway.search.problem import Assignment, Option, Solution, StageProblem
from headway.search.stages import stage_costs

__all__ = ["dapple", "minimise_slowest", "pipedream", "solve"]

# Sums of the same stages in another order differ by this share; no two limits are told apart by less.
_ROUNDING = 1e-12
# The table of sums may take so many bytes.
_MOST_BYTES = 2**31


@numba.njit(cache=True, nogil=True)
def _fastest(
    seconds: np.ndarray, fixed: np.ndarray, kept: np.ndarray, capacity: np.ndarray, size_of: np.ndarray, sizes: int,
    flights: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The fastest option of each size that fits, [level, size, start, stop], and which: level + 1 stages are left."""
    options, rows = seconds.shape[0], seconds.shape[1]
    best = np.full((len(flights), sizes, rows, rows), np.inf)
    which = np.full((len(flights), sizes, rows, rows), -1, dtype=np.int16)
    for option in range(options):
        size = size_of[option]
        for start in range(rows):
            for stop in range(start + 1, rows):
                value = seconds[option, start, stop]
                if not value < np.inf:
                    continue
                for level in range(len(flights)):
                    needs = fixed[option, start, stop] + flights[level] * kept[option, start, stop]
                    if not needs <= capacity[option]:
                        break  # with more in flight it needs no less
                    if value < best[level, size, start, stop]:
                        best[level, size, start, stop] = value
                        which[level, size, start, stop] = option
    return best, which


@numba.njit(cache=True, nogil=True)
def _relax(
    target: np.ndarray, source: np.ndarray, cost: float, shift: int, block: int, first: int, last: int
) -> None:  # fmt: skip
    """`target[d + shift] = min(.., source[d] + cost)` for d from first to last, within each block of states."""
    states = len(target)
    at = first // block * block
    while at <= last:
        begin = max(first, at)
        count = min(min(last + 1, at + block - shift), states - shift) - begin
        # Views that begin at 0: no index can be negative, so the compiler makes vector code of it.
        if count > 0:
            after, before = target[begin + shift : begin + shift + count], source[begin : begin + count]
            for state in range(count):
                value = before[state] + cost
                after[state] = value if value < after[state] else after[state]
        at += block


@numba.njit(cache=True, nogil=True)
def _prefixes(
    found: np.ndarray, table: np.ndarray, sends: np.ndarray, limit: float, send_limit: float, shifts: np.ndarray,
    blocks: np.ndarray, strides: np.ndarray, exactly: bool,
) -> None:  # fmt: skip
    """Fill `found[i, d]`: a bound below the sum of stages for layers 0 to i on devices d, none above `limit`.

    `table` holds each run of layers at its fastest, whatever is in flight. Not `exactly`: on d or fewer.
    """
    sizes, rows, _ = table.shape
    states = found.shape[1]
    found[:] = np.inf
    found[0, 0] = 0.0
    for stop in range(1, rows):
        target = found[stop]
        for size in range(sizes):
            for start in range(stop):
                seconds = table[size, start, stop]
                if not seconds <= limit or (start > 0 and sends[start] > send_limit):
                    continue
                cost = seconds + (sends[start] if start > 0 else 0.0)
                _relax(target, found[start], cost, shifts[size], blocks[size], 0, states - 1)
    if not exactly:
        for pool in range(len(strides) - 1):
            for stop in range(rows):
                _relax(found[stop], found[stop], 0.0, strides[pool], strides[pool + 1], 0, states - 1)


@numba.njit(cache=True, nogil=True)
def _sums(
    sums: np.ndarray, spans: np.ndarray, tables: np.ndarray, sends: np.ndarray, limit: float, send_limit: float,
    shifts: np.ndarray, blocks: np.ndarray, open_ended: bool, most: float, before: np.ndarray, lowest: np.ndarray,
) -> int:  # fmt: skip
    """Fill `sums[s, i, d]`: the least sum of s stages for layers i to the end on devices d, none above `limit`.

    With `open_ended` the last s means "so many or more". `spans[s, i]`: the first and last d with a finite sum.
    Left out is what can't be part of a whole solution with a sum below `most` (`before[i, d]` is a bound below the sum
    of layers 0 to i on devices d), and what fewer stages do as fast: with them the stages before keep fewer
    micro-batches in flight. Comes back with the number of levels filled; further ones hold nothing.
    """
    levels, sizes, rows, _ = tables.shape
    layers, states = rows - 1, sums.shape[2]
    sums[0] = np.inf
    spans[0, :, 0] = states
    spans[0, :, 1] = -1
    sums[0, layers, 0] = 0.0
    spans[0, layers, :] = 0
    lowest[:] = np.inf
    for level in range(1, levels + 1):
        repeats = open_ended and level == levels
        sums[level] = np.inf
        spans[level, :, 0] = states
        spans[level, :, 1] = -1
        empty = True
        for start in range(layers - level, -1, -1):
            if start > 0 and sends[start] > send_limit:
                continue
            send = sends[start] if start > 0 else 0.0
            target, least, ahead = sums[level, start], lowest[start], before[start]
            for size in range(sizes):
                shift, block = shifts[size], blocks[size]
                for stop in range(start + 1, layers + 1):
                    lasts = spans[level - 1, stop, 1]
                    again = repeats and spans[level, stop, 1] >= 0
                    if lasts < 0 and not again:
                        continue
                    seconds = tables[level - 1, size, start, stop]
                    if not seconds <= limit:
                        continue
                    cost = seconds + send
                    if lasts >= 0:
                        _relax(target, sums[level - 1, stop], cost, shift, block, spans[level - 1, stop, 0], lasts)
                    if again:
                        _relax(
                            target, sums[level, stop], cost, shift, block, spans[level, stop, 0], spans[level, stop, 1]
                        )
            for state in range(states):
                value = target[state]
                if not value < np.inf:
                    continue
                if value >= least[state] or not value + ahead[states - 1 - state] < most:
                    target[state] = np.inf
                    continue
                least[state] = value
                spans[level, start, 0] = min(spans[level, start, 0], state)
                spans[level, start, 1] = state
                empty = False
        if empty:
            return level - 1
    return levels


@numba.njit(cache=True, nogil=True)
def _trace(
    sums: np.ndarray, tables: np.ndarray, sends: np.ndarray, limit: float, send_limit: float, shifts: np.ndarray,
    blocks: np.ndarray, open_ended: bool, level: int, state: int,
) -> np.ndarray:  # fmt: skip
    """The stages behind `sums[level, 0, state]`, first to last: rows of (start, stop, size, level)."""
    levels, sizes, rows, _ = tables.shape
    layers = rows - 1
    found = np.zeros((layers, 4), dtype=np.int64)
    count = start = 0
    while start < layers:
        send = sends[start] if start > 0 else 0.0
        wanted = sums[level, start, state]
        done = False
        for size in range(sizes):
            shift, block = shifts[size], blocks[size]
            if state % block < shift:
                continue
            for stop in range(start + 1, layers + 1):
                seconds = tables[level - 1, size, start, stop]
                if not seconds <= limit:
                    continue
                cost = seconds + send
                before = level - 1
                matches = sums[before, stop, state - shift] + cost == wanted
                if not matches and open_ended and level == levels:
                    before = level
                    matches = sums[before, stop, state - shift] + cost == wanted
                if matches:
                    found[count] = (start, stop, size, level)
                    count += 1
                    start, state, level = stop, state - shift, before
                    done = True
                    break
            if done:
                break
        if not done:
            return found[:0]  # cannot be: each sum was made from one of these
    return found[:count]


@numba.njit(cache=True, nogil=True)
def _ahead(table: np.ndarray, devices: np.ndarray) -> np.ndarray:
    """For layers 0 to i, however they are cut: the least sum of seconds, and of seconds x devices; shape (2, i)."""
    sizes, rows, _ = table.shape
    found = np.full((2, rows), np.inf)
    found[:, 0] = 0.0
    for stop in range(1, rows):
        for size in range(sizes):
            for start in range(stop):
                seconds = table[size, start, stop]
                found[0, stop] = min(found[0, stop], found[0, start] + seconds)
                found[1, stop] = min(found[1, stop], found[1, start] + seconds * devices[size])
    return found


class _Least(NamedTuple):
    """The least sum under a limit, the seconds of its slowest stage, and the stages."""

    sum: float
    slowest: float
    stages: tuple[Assignment, ...]


_NONE = _Least(math.inf, math.inf, ())


class _Recursion:
    """Alpa's recursion over the tables of one problem, prepared once and run for any limit on the slowest stage."""

    def __init__(self, problem: StageProblem) -> None:
        self.problem = problem
        self.evaluated = 0
        self.levels = 0
        sizes = sorted({(option.pool, option.devices) for option in problem.options})
        # All options of one size take the same devices away, so the fastest that fits is the best of them.
        size_of = np.array([sizes.index((option.pool, option.devices)) for option in problem.options])
        pools = range(len(problem.pools))
        units = [math.gcd(*(devices for pool, devices in sizes if pool == at)) for at in pools]
        counts = [problem.pools[at] // units[at] if units[at] else 0 for at in pools]
        if problem.exactly and any(there % (unit or there + 1) for there, unit in zip(problem.pools, units)):
            return  # a pool that no number of sub-meshes fills
        strides = np.cumprod([1, *(count + 1 for count in counts)])
        self.states = int(strides[-1])
        self.devices = np.array([devices for _, devices in sizes], dtype=float)
        self.shifts = np.array([strides[pool] * (devices // units[pool]) for pool, devices in sizes], dtype=np.int64)
        self.blocks = np.array([strides[pool + 1] for pool, _ in sizes], dtype=np.int64)
        smallest = [min((devices for pool, devices in sizes if pool == at), default=0) for at in pools]
        most = min(problem.layers, sum(there // least for there, least in zip(problem.pools, smallest) if least))
        binding = 0 < problem.most_stages < most
        if not most:
            return
        # Beyond so many stages a stage keeps no more micro-batches, and only their number could tell levels apart.
        levels = problem.most_stages if binding else min(most, problem.micro_batches)
        flights = np.minimum(np.arange(1, levels + 1), problem.micro_batches).astype(float)
        self.tables, self.which = _fastest(
            np.ascontiguousarray(problem.seconds), np.ascontiguousarray(problem.fixed_bytes),
            np.ascontiguousarray(problem.kept_bytes), np.ascontiguousarray(problem.capacity_bytes, dtype=float),
            size_of, len(sizes), flights,
        )  # fmt: skip
        if not binding:
            while levels > 1 and np.array_equal(self.tables[levels - 1], self.tables[levels - 2]):
                levels -= 1
        self.open_ended = not binding and levels < most
        self.tables, self.which = self.tables[:levels], self.which[:levels]
        needs = 8 * (levels + 1) * (problem.layers + 1) * self.states
        if needs > _MOST_BYTES:
            raise InputError(
                f"{levels} levels x {problem.layers + 1} layers x {self.states} states of the devices is too much",
                place="stage problem",
                remedy="offer larger sub-meshes only, so that their sizes have a larger common divisor",
            )
        used = np.arange(self.states)[:, None] // strides[:-1] % (np.array(counts) + 1) * np.array(units)
        self.used = used.sum(axis=1).astype(float)
        self.strides = strides.astype(np.int64)
        # Rounded down a little, so that no solution is lost to the order of additions.
        self.ahead = _ahead(self.tables[0], self.devices) * (1 - _ROUNDING)
        self.sums = np.empty((levels + 1, problem.layers + 1, self.states))
        self.spans = np.empty((levels + 1, problem.layers + 1, 2), dtype=np.int64)
        self.before, self.lowest = np.empty((2, problem.layers + 1, self.states))
        self.sends = np.ascontiguousarray(problem.send_seconds, dtype=float)
        self.levels = levels

    def limits(self) -> np.ndarray:
        """All seconds that a slowest stage may have, ascending, from a bound that none can beat."""
        if not self.levels:
            return np.zeros(0)
        # A stage of t seconds on n devices covers an area of t n: all of them together cover what the layers ask for.
        least = self.ahead[1, -1] / sum(self.problem.pools)
        found = np.unique(self.problem.seconds[np.isfinite(self.problem.seconds)])
        return found[found >= least]

    def least(self, limit: float, *, send_limit: float = math.inf, most: float = math.inf) -> _Least:
        """The stages with the least sum among those of which none takes longer than `limit` (finite).

        No cut may cost more than `send_limit` to send over; sums from `most` on don't count.
        """
        self.evaluated += 1
        fixed = (self.tables, self.sends, limit, send_limit, self.shifts, self.blocks, self.open_ended)
        if self.levels > 1:
            # One level without memory costs little beside all of them, and its bound leaves little of them to fill.
            _prefixes(
                self.before, self.tables[0], self.sends, limit, send_limit, self.shifts, self.blocks, self.strides,
                self.problem.exactly,
            )  # fmt: skip
            self.before *= 1 - _ROUNDING
        else:
            total, area = self.ahead[:, :, None]
            self.before = np.where(area <= limit * self.used, total, math.inf)
        if not self.before[-1, -1] < most:
            return _NONE
        filled = _sums(self.sums, self.spans, *fixed, most, self.before, self.lowest)
        if not filled:
            return _NONE
        whole = self.sums[1 : filled + 1, 0]
        level, state = (int(at) for at in np.unravel_index(np.argmin(whole), whole.shape))
        if self.problem.exactly:
            state = self.states - 1
            level = int(np.argmin(whole[:, state]))
        total = float(whole[level, state])
        if not math.isfinite(total):
            return _NONE
        rows = _trace(self.sums, *fixed, level + 1, state)
        stages = tuple(
            Assignment(int(start), int(stop), int(self.which[depth - 1, size, start, stop]))
            for start, stop, size, depth in rows
        )
        return _Least(
            total, max(float(self.problem.seconds[one.option, one.start, one.stop]) for one in stages), stages
        )


def solve(
    problem: StageProblem, *, epsilon: float = 0.0, budget_seconds: float | None = None, better_than: float = math.inf
) -> Solution:
    """The stages and options with the least seconds of a step.

    Alpa's dynamic programme (see the module). `epsilon`: no solution is faster by more than this share (0: none is
    faster at all, rounding aside). After `budget_seconds` the best so far is returned, `proven` or not. Only solutions
    below `better_than` are looked for; none is returned if there is none, which is proven then.

    Raises InputError if the devices have more states than memory holds.
    """
    if epsilon < 0:
        raise InputError(f"must not be negative, not {epsilon:g}", place="epsilon", remedy="0 asks for the very best")
    began = time.perf_counter()
    recursion = _Recursion(problem)
    limits = recursion.limits()
    behind = problem.micro_batches - 1
    # As good as the bar is not better, in whatever order its sum was made.
    best, stages = better_than * (1 - _ROUNDING), ()

    def try_limit(at: int, first: int) -> tuple[float, int]:
        """F of a limit, and the position of the smallest limit that has the same F.

        F is infinite where it's too much for anything from the limit `first` on to be the best.
        """
        nonlocal best, stages
        least = recursion.least(float(limits[at]), most=best - behind * float(limits[first]))
        seconds = least.sum + behind * least.slowest
        if seconds < best:
            best, stages = seconds, least.stages
        return least.sum, min(at, int(np.searchsorted(limits, least.slowest)))

    # Limits from `first` to `last` that have not been tried, with a sum that none of them can beat; best first.
    intervals: list[tuple[float, int, int, float]] = []

    def push(first: int, last: int, total: float) -> None:
        if first <= last and math.isfinite(total):
            heapq.heappush(intervals, (total + behind * float(limits[first]), first, last, total))

    if len(limits):
        total, smallest = try_limit(len(limits) - 1, 0)
        push(0, smallest - 1, total)
    out_of_time = False
    while intervals and intervals[0][0] < best * (1 - _ROUNDING) / (1 + epsilon):
        if budget_seconds is not None and time.perf_counter() - began > budget_seconds:
            out_of_time = True
            break
        _, first, last, total = heapq.heappop(intervals)
        if behind:
            # Further up even the least sum comes too late.
            last = min(last, int(np.searchsorted(limits, (best - total) / behind, side="right")) - 1)
        if first > last:
            continue
        middle = (first + last) // 2
        found, smallest = try_limit(middle, first)
        push(first, smallest - 1, found)
        push(middle + 1, last, total)
    bound = min((entry[0] for entry in intervals), default=best)
    return Solution(
        problem.evaluate(stages) if stages else math.inf,
        stages,
        recursion.evaluated,
        time.perf_counter() - began,
        proven=not out_of_time,
        bound_seconds=min(bound, best),
    )


def minimise_slowest(problem: StageProblem) -> Solution:
    """The stages whose slowest, or slowest send between two, is as fast as can be; among those the least sum.

    PipeDream's objective (Narayanan et al., SOSP 2019, section 3.1): a pipeline that never drains goes at the pace of
    its slowest part, whatever the number of micro-batches. `seconds` and `bound_seconds` are of that part.
    """
    began = time.perf_counter()
    recursion = _Recursion(problem)
    limits = recursion.limits()
    if len(limits):
        limits = np.unique(np.concatenate((limits, problem.send_seconds[1:-1])))
    best = _NONE
    first, last = 0, len(limits) - 1
    while first <= last:
        middle = (first + last) // 2
        least = recursion.least(float(limits[middle]), send_limit=float(limits[middle]))
        if least.stages:
            best, last = least, middle - 1
        else:
            first = middle + 1
    slowest = max((best.slowest, *(float(problem.send_seconds[one.start]) for one in best.stages[1:])))
    return Solution(slowest, best.stages, recursion.evaluated, time.perf_counter() - began, True, slowest)


def pipedream(
    compute_seconds: Sequence[float], weight_bytes: Sequence[float], output_bytes: Sequence[float], devices: int,
    bytes_per_second: float,
) -> Solution:  # fmt: skip
    """PipeDream's partitioning with replicated stages (Narayanan et al., SOSP 2019, section 3.1, one level).

    For each layer: seconds forward and backward of one minibatch on one device, bytes of weights and of what it hands
    on. A stage on r of the `devices` takes max(compute, 2 (r - 1) weights / bandwidth) / r for each minibatch, a cut 2
    outputs / bandwidth (activation and gradient). `seconds` is that of the slowest, and option o stands for o + 1
    devices. All devices are used.
    """
    compute, weights = stage_costs(compute_seconds), _sums_of(weight_bytes)
    seconds = np.stack(
        [
            np.maximum(compute, 2 * (replicas - 1) * weights / bytes_per_second) / replicas
            for replicas in range(1, devices + 1)
        ]
    )
    return minimise_slowest(_replicated(seconds, output_bytes, bytes_per_second, 1))


def dapple(
    compute_seconds: Sequence[float], weight_bytes: Sequence[float], output_bytes: Sequence[float], devices: int,
    bytes_per_second: float, micro_batches: int, *, epsilon: float = 0.0,
) -> Solution:  # fmt: skip
    """DAPPLE's partitioning (Fan et al., PPoPP 2021, section 4): replicated stages of a pipeline that is flushed.

    As `pipedream`, for micro-batches: r replicas divide each micro-batch between them, and sum their gradients once in
    a step by a ring. The time of a step is that of `StageProblem`; DAPPLE's own leaves out the part of that all-reduce
    which other stages' backward passes hide.
    """
    compute, weights = stage_costs(compute_seconds), _sums_of(weight_bytes)
    seconds = np.stack(
        [
            (compute + 2 * (replicas - 1) * weights / bytes_per_second / micro_batches) / replicas
            for replicas in range(1, devices + 1)
        ]
    )
    return solve(_replicated(seconds, output_bytes, bytes_per_second, micro_batches), epsilon=epsilon)


def _sums_of(each: Sequence[float]) -> np.ndarray:
    """[j, i]: the sum of layers j to i (exclusive)."""
    before = np.concatenate(([0.0], np.cumsum(np.asarray(each, dtype=float))))
    return before[None, :] - before[:, None]


def _replicated(
    seconds: np.ndarray, output_bytes: Sequence[float], bytes_per_second: float, micro_batches: int
) -> StageProblem:
    layers = seconds.shape[1] - 1
    none = np.zeros_like(seconds)
    sends = np.concatenate(([0.0], 2 * np.asarray(output_bytes, dtype=float) / bytes_per_second))
    sends[layers] = 0.0
    return StageProblem(
        layers=layers,
        options=tuple(Option(0, at + 1, data=at + 1) for at in range(len(seconds))),
        pools=(len(seconds),),
        micro_batches=micro_batches,
        seconds=seconds,
        fixed_bytes=none,
        kept_bytes=none,
        capacity_bytes=np.full(len(seconds), math.inf),
        send_seconds=sends,
    )
