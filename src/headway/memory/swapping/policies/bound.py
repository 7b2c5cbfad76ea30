"""A time below that of every schedule under a budget, for steps of any number of operations.

The integer program of `optimal` has a stage for each operation, and so about as many variables as the square of their
number. Here only a few *instants* are looked at: the moments at which some operations run for the first time, among
them the one with the most memory in use where everything is kept. The time between two instants is an interval.

At an instant the operation's own working set and whatever else is held must fit. What is not held, and is needed later,
comes again: its maker runs again in a later interval, which needs the maker's inputs there (held at the interval's
beginning, or brought back in it themselves); or it is fetched in one, and then it had gone out before. What memory the
intervals themselves take is left out, and so is the order in them: every schedule obeys what is asked, so the least
time that obeys is below them all. With an instant for each operation it would be Checkmate's program (Jain et al.,
MLSys 2020, section 4); with one it is a knapsack with precedence.

Time: an interval takes at least its first computations and its repetitions. A tensor goes out after it was made and
before the instant at which it is not held, and comes in after that and before it is read; both streams carry one after
the other. So what is made just before the peak and read just after it cannot travel for nothing. Marks between the
instants divide time for that.

Below every schedule that has no encodings and computes operations in their order for the first time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

from headway.errors import MissingExtraError
from headway.memory.swapping.decisions import program
from headway.memory.swapping.policies.integer_program import model_of, new_solver
from headway.memory.swapping.pricing import memory_by_step
from headway.memory.swapping.problem import Problem

__all__ = ["lower_bound"]

_MARKS = 12  # of time, on each side of the first instant
_INSTANTS = ((1, 0.7), (3, 1.0))  # of one program after the other, and what each may take of the seconds left
_GAP = 1e-4  # between what a program has found and its bound: then the next is tried


def lower_bound(
    problem: Problem, budget_bytes: float, *, seconds: float = 20.0, known_seconds: float = float("inf")
) -> float:
    """Seconds that no schedule under `budget_bytes` goes below (infinite: none fits), by about `seconds` of search.

    `known_seconds`: what a schedule that fits takes. Nothing slower is looked at, which makes the search shorter.
    Schedules with encodings, or with another order of first computations, are not meant. Raises MissingExtraError
    without highspy (extra `solve`).
    """
    if problem.bytes_needed > budget_bytes:
        return float("inf")
    memory = _memory_by_operation(problem)
    over = [at for at, each in enumerate(memory) if each > budget_bytes]
    bound = problem.compute_seconds
    if not over:
        return bound
    begin = time.perf_counter()
    for count, share in _INSTANTS:
        left = seconds - (time.perf_counter() - begin)
        instants = _instants(memory, over, count)
        if left > 0 and len(instants) == count:
            bound = max(bound, _Relaxation(problem, budget_bytes, instants, known_seconds).solve(share * left))
    return bound


def _memory_by_operation(problem: Problem) -> list[float]:
    """Bytes in use while each operation runs, where everything is kept."""
    schedule = program(problem, ())
    found = [0.0] * len(problem.operations)
    for step, held in zip(schedule.steps, memory_by_step(problem, schedule), strict=True):
        if step.action.startswith("compute"):
            found[step.index] = held
    return found


def _instants(memory: Sequence[float], over: Sequence[int], count: int) -> list[int]:
    """The operation with the most memory, and others after it, at equal steps of memory down to the budget."""
    peak = max(over, key=lambda at: memory[at])
    after = [at for at in over if at > peak]
    chosen = {peak}
    if after and count > 1:
        low, high = min(memory[at] for at in after), memory[peak]
        for part in range(1, count):
            level = high - (high - low) * part / count
            # The last operation that has as much: from there on memory stays below.
            chosen.add(max((at for at in after if memory[at] >= level), default=peak))
    return sorted(chosen)


class _Relaxation:
    """The program for some instants; columns and rows are collected and handed to HiGHS at once."""

    def __init__(
        self, problem: Problem, budget_bytes: float, instants: Sequence[int], known_seconds: float = float("inf")
    ) -> None:
        self.problem = problem
        self.budget = budget_bytes
        self.instants = list(instants)
        self.known_seconds = known_seconds
        self.upper: list[float] = []
        self.lower: list[float] = []
        self.whole: list[bool] = []
        self.rows: list[tuple[float, list[tuple[int, float]]]] = []  # at least so much
        self.scale = problem.compute_seconds or 1.0
        self.unit = max((tensor.bytes for tensor in problem.tensors), default=1.0) or 1.0
        self.held: dict[tuple[int, int], int] = {}  # (interval, tensor) → column
        self.fetched: dict[tuple[int, int], int] = {}
        self.repeated: dict[tuple[int, int], int] = {}  # (interval, operation) → column
        self._build()

    def _column(self, upper: float = 1.0, *, whole: bool = True, lower: float = 0.0) -> int:
        self.lower.append(lower)
        self.upper.append(upper)
        self.whole.append(whole)
        return len(self.upper) - 1

    def _row(self, least: float, terms: list[tuple[int, float]]) -> None:
        self.rows.append((least, terms))

    def _in_seconds(self, tensor: int) -> float:
        """Of a transfer back, by the quickest way there is."""
        size, paths = self.problem.tensors[tensor].bytes, self.problem.paths
        return min(path.latency_seconds + size / path.read_bytes_per_second for path in paths)

    def _out_seconds(self, tensor: int) -> float:
        size, paths = self.problem.tensors[tensor].bytes, self.problem.paths
        return min(path.latency_seconds + size / path.write_bytes_per_second for path in paths)

    def _build(self) -> None:
        operations = self.problem.operations
        count = len(operations)
        first = self.instants[0]
        marks = {round(first * part / _MARKS) for part in range(_MARKS)}
        marks |= {round(first + (count - first) * part / _MARKS) for part in range(1, _MARKS)}
        self.places = sorted({0, *marks, *self.instants, count})
        infinite = float("inf")
        self.time = {place: self._column(infinite, whole=False) for place in self.places}
        self.upper[self.time[count]] = self.known_seconds / self.scale * (1 + 1e-9)
        for place, following in itertools.pairwise(self.places):
            passed = sum(operations[at].seconds for at in range(place, following))
            self._row(passed / self.scale, [(self.time[following], 1.0), (self.time[place], -1.0)])
        for interval in range(len(self.instants)):
            self._columns(interval)
        for interval in range(len(self.instants)):
            self._interval(interval)
        if self.problem.paths:
            self._transfers()

    def _columns(self, interval: int) -> None:
        """What may be held at an instant, repeated after it, fetched after it."""
        start = self.instants[interval]
        operations = self.problem.operations
        there = set(operations[start].inputs)
        for at in range(start):
            if operations[at].repeatable:
                self.repeated[interval, at] = self._column()
            for tensor in operations[at].outputs:
                if self.problem.tensors[tensor].bytes > 0:
                    self.held[interval, tensor] = self._column(lower=1.0 if tensor in there else 0.0)
                    if self.problem.paths:
                        self.fetched[interval, tensor] = self._column()

    def _sources(self, interval: int, tensor: int) -> list[tuple[int, float]] | None:
        """From where a tensor can come in an interval; None: it is there in any case, or costs nothing."""
        held = self.held.get((interval, tensor))
        if held is None:
            return None
        found = [(held, 1.0)]
        for column in (
            self.repeated.get((interval, self.problem.tensors[tensor].maker)),
            self.fetched.get((interval, tensor)),
        ):
            if column is not None:
                found.append((column, 1.0))
        return found

    def _interval(self, interval: int) -> None:
        operations, tensors = self.problem.operations, self.problem.tensors
        start = self.instants[interval]
        is_last = interval + 1 == len(self.instants)
        stop = len(operations) if is_last else self.instants[interval + 1]
        # What fits beside the working set of the instant. (What is read there is held and not counted twice.)
        beside = set(operations[start].inputs)
        limit = (self.budget * (1 + 1e-9) - self.problem.working_set(start)) / self.unit
        terms = [
            (column, -tensors[tensor].bytes / self.unit)
            for (each, tensor), column in self.held.items()
            if each == interval and tensor not in beside
        ]
        self._row(-limit, terms)
        needed = {tensor for at in range(start + 1, stop) for tensor in operations[at].inputs}
        if not is_last:
            needed |= set(operations[stop].inputs)
        for tensor in needed:
            sources = self._sources(interval, tensor)
            if sources is not None:
                self._row(1.0, sources)
        spent: list[tuple[int, float]] = []
        for at in range(start):
            column = self.repeated.get((interval, at))
            if column is None:
                continue
            spent.append((column, -operations[at].seconds / self.scale))
            for tensor in dict.fromkeys(operations[at].inputs):
                sources = self._sources(interval, tensor)
                if sources is not None:
                    self._row(0.0, [*sources, (column, -1.0)])
        passed = sum(operations[at].seconds for at in range(start, stop)) / self.scale
        self._row(passed, [(self.time[stop], 1.0), (self.time[start], -1.0), *spent])
        if not is_last:
            for (each, tensor), column in list(self.held.items()):
                sources = self._sources(interval, tensor) if each == interval + 1 else None
                if sources is not None:
                    self._row(0.0, [*sources, (column, -1.0)])

    def _transfers(self) -> None:
        operations, tensors, readers = self.problem.operations, self.problem.tensors, self.problem.readers
        count = len(operations)
        outs: dict[tuple[int, int], int] = {}  # (interval, tensor) → column: it had gone out before the instant
        for interval, start in reversed([*enumerate(self.instants)]):
            end = self.time[count]
            after = operations[start].seconds / self.scale
            later = [
                (column, -self._in_seconds(tensor) / self.scale)
                for (each, tensor), column in self.fetched.items()
                if each >= interval
            ]
            self._row(after, [(end, 1.0), (self.time[start], -1.0), *later])
            stop = count if interval + 1 == len(self.instants) else self.instants[interval + 1]
            gone: list[tuple[int, int, float]] = []  # maker, column, seconds
            due: list[tuple[int, int, float]] = []  # first reader, column, seconds
            for (each, tensor), column in list(self.fetched.items()):
                if each != interval:
                    continue
                # Fetched after the instant and not held at it: it had gone out before.
                out = outs[interval, tensor] = self._column(whole=False)
                held, again = self.held[interval, tensor], self.repeated.get((interval, tensors[tensor].maker))
                self._row(0.0, [(out, 1.0), (column, -1.0), (held, 1.0)])
                following = outs.get((interval + 1, tensor))
                if following is not None:
                    # So it had if it has by the next instant, and in between it neither was here nor was made.
                    terms = [(out, 1.0), (following, -1.0), (held, 1.0)]
                    self._row(0.0, terms if again is None else [*terms, (again, 1.0)])
                gone.append((tensors[tensor].maker, out, self._out_seconds(tensor) / self.scale))
                reader = next((at for at in readers[tensor] if start < at < stop), None)
                if reader is not None:
                    # Neither held nor repeated: it comes in before it is read. (Otherwise it may come later.)
                    soon = self._column(whole=False)
                    terms = [(soon, 1.0), (held, 1.0)]
                    self._row(1.0, terms if again is None else [*terms, (again, 1.0)])
                    due.append((reader, soon, self._in_seconds(tensor) / self.scale))
            for place in self.places:
                if place < start:
                    moved = [(column, -each) for maker, column, each in gone if maker >= place]
                    if moved:
                        made = operations[place].seconds / self.scale
                        self._row(made, [(self.time[start], 1.0), (self.time[place], -1.0), *moved])
                elif place > start:
                    moved = [(column, -each) for reader, column, each in due if reader <= place]
                    if moved and (place <= stop):
                        self._row(after, [(self.time[place], 1.0), (self.time[start], -1.0), *moved])

    def solve(self, seconds: float) -> float:
        """The bound in seconds that HiGHS has after so many: what is known, or infinite, where nothing obeys."""
        try:
            import highspy
        except ImportError:
            raise MissingExtraError(library="highspy", extra="solve", place="lower_bound") from None
        solver = new_solver(highspy, seconds)
        solver.setOptionValue("mip_rel_gap", _GAP)
        solver.passModel(self._model(highspy))
        solver.run()
        if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
            return self.known_seconds
        bound = float(solver.getInfo().mip_dual_bound)
        return bound * self.scale if 0 < bound < float("inf") else 0.0

    def _model(self, highspy: Any) -> Any:
        costs = [0.0] * len(self.upper)
        costs[self.time[len(self.problem.operations)]] = 1.0
        rows = [(least, float("inf"), terms) for least, terms in self.rows]
        return model_of(highspy, costs, self.lower, self.upper, rows, self.whole)
