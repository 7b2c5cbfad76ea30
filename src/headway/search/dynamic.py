"""The best stages of a pipeline and the sub-mesh of each, exactly, by dynamic programming.

Alpa's inter-operator pass (Zheng et al., OSDI 2022, section 5.2): with a limit t on the slowest stage, the least sum
F(t) of all stages follows from a recursion over (stages, layers, devices), and the answer is the least
F(t) + (micro_batches - 1) t over all t. Alpa tries the limits in ascending order. F only falls as t grows, so here an
interval of limits [a, b] is known to hold nothing below F(b) + (micro_batches - 1) a: intervals that can't win are
dropped whole. Instead of F(b) a bound below it is enough for that, and it is had without the devices (`prices.py`).
The table of devices is filled only for the few runs of layers that the bound leaves.

Further than Alpa's: memory, by how many micro-batches a stage keeps in flight (which depends on the stages behind it),
several pools of devices, and the cost of sending. PipeDream's and DAPPLE's partitionings are special cases.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Sequence

import numpy as np

from headway.errors import InputError
from headway.search.prices import ROUNDING
from headway.search.problem import Assignment, Option, Solution, StageProblem
from headway.search.recursion import Recursion
from headway.search.runs import Runs
from headway.search.stages import stage_costs

__all__ = ["dapple", "minimise_slowest", "pipedream", "solve"]

# An interval of limits is halved until its ends differ by no more than this share of a step; only then are tables
# filled, at first only for sums that are no further above the bound.
_CLOSE = 0.02
# Of wider intervals tables are filled too, for a solution to beat, but only of so many runs.
_FEW = 50_000
# The least limit with any solution is told from the greatest without one to this share.
_APART = 0.02


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
    search = _Intervals(problem, epsilon, budget_seconds, better_than)
    bound = search.run()
    seconds = problem.evaluate(search.stages) if search.stages else math.inf
    return Solution(
        seconds, search.stages, search.recursion.evaluated, time.perf_counter() - search.began,
        proven=not search.out_of_time, bound_seconds=min(bound, search.best),
    )  # fmt: skip


class _Intervals:
    """Intervals of limits on the slowest stage, the one with the lowest bound first, until none can win."""

    def __init__(
        self, problem: StageProblem, epsilon: float, budget_seconds: float | None, better_than: float
    ) -> None:  # fmt: skip
        self.began = time.perf_counter()
        self.problem, self.epsilon, self.budget = problem, epsilon, budget_seconds
        self.behind = problem.micro_batches - 1
        # As good as the bar is not better, in whatever order its sum was made.
        self.best, self.stages = better_than * (1 - ROUNDING), ()
        self.recursion = Recursion(problem)
        self.out_of_time = False
        # (bound, number, first and last limit, runs, how far above the bound of sums the table was filled)
        self.heap: list[tuple[float, int, float, float, Runs, float]] = []
        self.pushed = 0
        # (limit, what no sum of stages within it can beat): what tables said so far.
        self.floors: list[tuple[float, float]] = []

    @property
    def enough(self) -> float:
        """What has no solution below this is not looked into."""
        return self.best * (1 - ROUNDING) / (1 + self.epsilon)

    def run(self) -> float:
        """Find the best stages; what no solution can beat comes back."""
        least = self._start()
        if math.isinf(least):
            return self.best
        while self.heap and self.heap[0][0] < self.enough and not self._late():
            _, _, first, last, runs, slack = heapq.heappop(self.heap)
            self._look(first, last, runs, slack)
        if self.out_of_time:
            return min((entry[0] for entry in self.heap), default=least)
        return self.enough if self.epsilon else self.best

    def _late(self) -> bool:
        self.out_of_time = self.budget is not None and time.perf_counter() - self.began > self.budget
        return self.out_of_time

    def _offer(self, stages: tuple[Assignment, ...]) -> None:
        seconds = self.problem.evaluate(stages)
        if seconds < self.best:
            self.best, self.stages = seconds, stages

    def _push(self, bound: float, first: float, last: float, runs: Runs, slack: float) -> None:
        if first <= last and bound < self.enough:
            self.pushed += 1
            heapq.heappush(self.heap, (bound, self.pushed, first, last, runs, slack))

    def _start(self) -> float:
        """First solutions, and all limits that may do better as one interval. A bound comes back (infinity: none)."""
        recursion, problem = self.recursion, self.problem
        stages = recursion.fewest(math.inf) if recursion.possible else ()
        if not stages:
            return math.inf
        self._offer(stages)
        total, area = recursion.ahead()
        # A stage of t seconds on n devices covers an area of t n: together they cover what the layers ask for.
        first, most = area / sum(problem.pools), self._slowest(stages)
        while self.behind and most > first * (1 + _APART) and total + self.behind * first < self.enough:
            if self._late():
                break
            middle = math.sqrt(first * most) if first > 0 else most / 2
            stages = recursion.fewest(middle)
            if stages:
                self._offer(stages)
                most = self._slowest(stages)
            else:
                first = middle
        last = (self.enough - total) / self.behind if self.behind else math.inf
        least = total + self.behind * first
        self.prices = recursion.prices(self.best)
        if not self.out_of_time and last >= first:
            self._push(least, first, last, recursion.runs(last), _CLOSE)
        return least

    def _slowest(self, stages: tuple[Assignment, ...]) -> float:
        return max(float(self.problem.seconds[one.option, one.start, one.stop]) for one in stages)

    def _look(self, first: float, last: float, runs: Runs, slack: float) -> None:
        """Bound an interval, leave out what can't be in a better solution, fill its table, and halve it."""
        behind, margin = self.behind, _CLOSE * self.best
        most = self.enough - behind * first
        bound = self.prices.bound(runs, last, most, max(margin, behind * (last - first)) / 16)
        if bound.seconds >= most:
            return
        before = self.prices.before(runs, last, bound)
        runs = runs.some(self.prices.kept(runs, last, bound, before, first, behind, self.enough))
        # The slowest stage is one of the runs.
        limits = runs.seconds[runs.seconds >= first]
        if not len(limits):
            return
        first, last = float(limits.min()), float(limits.max())
        most = self.enough - behind * first
        # What no sum under a higher limit can beat, none under this one can.
        total = max(bound.seconds, *(floor for limit, floor in self.floors if limit >= last), 0.0)
        if total >= most:
            return
        narrow = behind * (last - first) <= margin
        tried = min(most, total + slack * self.best)
        some = runs.some(self.prices.kept(runs, last, bound, before, 0.0, 0, tried))
        if narrow or (total + behind * last < self.best and len(some.level) <= _FEW):
            least = self.recursion.least(some, last, bound, before, tried)
            self.floors.append((last, min(tried, least.sum)))
            if least.stages:
                self._offer(least.stages)
                total = least.sum
                limits = limits[limits < least.slowest]
            elif tried >= most:
                return
            else:
                total = tried
                if narrow:
                    self._push(total + behind * first, first, last, runs, 4 * slack)
                    return
        middle = (first + last) / 2
        for half in (limits[limits <= middle], limits[limits > middle]):
            if len(half):
                self._push(total + behind * float(half.min()), float(half.min()), float(half.max()), runs, slack)


def minimise_slowest(problem: StageProblem) -> Solution:
    """The stages whose slowest, or slowest send between two, is as fast as can be; among those the least sum.

    PipeDream's objective (Narayanan et al., SOSP 2019, section 3.1): a pipeline that never drains goes at the pace of
    its slowest part, whatever the number of micro-batches. `seconds` and `bound_seconds` are of that part.
    """
    began = time.perf_counter()
    recursion = Recursion(problem)
    stages: tuple[Assignment, ...] = ()
    if recursion.possible:
        limits = np.unique(np.concatenate((problem.seconds[recursion.reach > 0], recursion.sends[1:-1])))
        limits = limits[np.isfinite(limits)]
        first, last = 0, len(limits) - 1
        while first <= last:
            middle = (first + last) // 2
            found = recursion.fewest(float(limits[middle]), float(limits[middle]))
            if found:
                stages, last = found, middle - 1
            else:
                first = middle + 1
    slowest = math.inf
    if stages:
        slowest = max(
            *(float(problem.seconds[one.option, one.start, one.stop]) for one in stages),
            *(float(problem.send_seconds[one.start]) for one in stages[1:]),
            0.0,
        )
        stages = _least_sum(recursion, slowest, stages)
    return Solution(slowest, stages, recursion.evaluated, time.perf_counter() - began, True, slowest)


def _least_sum(recursion: Recursion, limit: float, stages: tuple[Assignment, ...]) -> tuple[Assignment, ...]:
    """Of all stages and sends within a limit those with the least sum; some are known."""
    problem = recursion.problem
    most = sum(float(problem.seconds[one.option, one.start, one.stop]) for one in stages)
    most += sum(float(problem.send_seconds[one.start]) for one in stages[1:])
    most *= 1 + ROUNDING
    prices, runs = recursion.prices(most), recursion.runs(limit, limit)
    bound = prices.bound(runs, limit, math.inf, 1e-3 * most)
    before = prices.before(runs, limit, bound)
    runs = runs.some(prices.kept(runs, limit, bound, before, 0.0, 0, most))
    least = recursion.least(runs, limit, bound, before, most)
    return least.stages or stages


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
