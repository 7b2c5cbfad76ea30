"""The least time under a budget, by an integer program in the manner of Checkmate (Jain et al., MLSys 2020).

Section 4 of the paper: the step is unrolled into stages, one for each operation; stage t computes operation t for the
first time, and whatever it needs again. R[t, k]: operation k is computed in stage t. S[t, x]: tensor x is on the device
when stage t begins. Memory within a stage follows by what each operation adds and what can go after it; F[t, k, x] says
that x goes after operation k of stage t. F needs no integrality, since R and S bound it by whole numbers.

Where the problem has a way to a tier, tensors may also rest there (as in POET, Patil et al., ICML 2022): H[t, x] in the
tier when stage t begins, I[t, k, x] fetched in it for operation k, P[t, x] fetched in it for a later one. T[t] is when
the first computation of stage t begins: a stage takes at least its computations; what was made from stage s on and is
gone by stage t went out between T[s] and T[t], since nothing is freed before it is out; and what is fetched from stage
s on comes in after T[s]. Without those windows half of a step could be moved beside the other half, and the bound says
nothing. The end of the step is then below every schedule that has no encodings, computes operations in their order for
the first time and does not move the same tensor out and back within one stage; the schedule itself is priced by the
simulator, waiting included.

The best answer of the other policies and of a local search (`annealing.py`) comes first: the program is asked for less
time only, which fixes much of it. Steps too long for all stages are left to the search.

Exact for operations with one output each; where one has several, a recomputation counts those that are still there
twice. A chain of equal tensors is solved by dynamic programming instead. What other policies find is the answer where
it is better than what the solver found in its time. The bound is the solver's or, where it is higher, that of
`bound.py`.
"""

from __future__ import annotations

import time
from typing import Any

from headway.errors import DoesNotFitError, MissingExtraError
from headway.memory.swapping.chains import as_chain, chain_schedule
from headway.memory.swapping.decisions import program, refuse, with_frees
from headway.memory.swapping.policies.annealing import annealed
from headway.memory.swapping.policies.bound import lower_bound
from headway.memory.swapping.policies.capuchin import capuchin
from headway.memory.swapping.policies.checkpointing import square_root
from headway.memory.swapping.policies.dtr import dtr
from headway.memory.swapping.policies.integer_program import model_of, new_solver
from headway.memory.swapping.policies.superneurons import superneurons
from headway.memory.swapping.pricing import price
from headway.memory.swapping.problem import Action, Problem, Schedule

__all__ = ["optimal"]

_LARGEST = 80  # operations
# Of the seconds: for the programs with all stages, and for the search before them; the rest is for the bound.
_STAGES, _SEARCH_BEFORE = 0.6, 0.1
_SEARCH_LONGEST = 0.01  # seconds for each operation: more does not help the search before the programs
_SEARCH = 0.7  # the same where there are no such programs
_RELAXATION = 0.8  # of the seconds may go to the linear relaxation
_INTERIOR = 1e-6  # what an interior point's objective may miss the optimum by
_WINDOWS = 8  # so many beginnings and ends of the windows in which transfers must have happened


def optimal(
    problem: Problem, budget_bytes: float, *, seconds: float = 60.0, largest: int = _LARGEST, seed: int = 0
) -> tuple[Schedule, float, bool]:
    """The best schedule found in `seconds`, a bound below all of them, whether it was proven best.

    For more than `largest` operations there is no integer program with all stages: the schedule is the best of other
    policies and of the search, and the bound is that of `bound.py`. Raises DoesNotFitError if no schedule fits or none
    was found, MissingExtraError without highspy (extra `solve`).
    """
    if as_chain(problem):
        found = chain_schedule(problem, budget_bytes)
        if found is None:
            raise refuse(problem, "optimal", problem.bytes_needed, budget_bytes)
        return found[0], found[1], True
    if problem.bytes_needed > budget_bytes:
        raise refuse(problem, "optimal", problem.bytes_needed, budget_bytes)
    whole = program(problem, (), policy="optimal")
    if price(problem, whole).peak_bytes <= budget_bytes:
        return whole, problem.compute_seconds, True
    candidates: list[Schedule] = []
    for policy in (square_root, dtr, superneurons, capuchin):
        try:
            candidates.append(policy(problem, budget_bytes))
        except DoesNotFitError:
            continue
    is_small = len(problem.operations) <= largest
    # Without transfers first: fewer variables, and what they cannot hide is not in the program's objective.
    without = Problem(name=problem.name, operations=problem.operations, tensors=problem.tensors)
    asked = (without, problem) if problem.paths else (without,)
    longest = (
        min(_SEARCH_BEFORE * seconds, _SEARCH_LONGEST * len(problem.operations)) if is_small else _SEARCH * seconds
    )
    found = annealed(problem, budget_bytes, candidates, seconds=longest, seed=seed)
    if found is not None:
        candidates.append(found)
    bound, proven = 0.0, False
    if is_small:
        known = min((price(problem, candidate).seconds for candidate in candidates), default=float("inf"))
        for each in asked:
            share = 1.0 if not problem.paths else 0.15 if each is without else 0.85
            raw, bound, proven = _Program(each, budget_bytes, known).solve(share * _STAGES * seconds)
            if raw is not None:
                found = Schedule(steps=with_frees(problem, raw, budget_bytes), policy="optimal")
                if price(problem, found).peak_bytes <= budget_bytes * (1 + 1e-9):
                    candidates.append(found)
                    known = min(known, price(problem, found).seconds)
    if not proven:
        share = 1 - (_STAGES + _SEARCH_BEFORE if is_small else _SEARCH)
        known = min((price(problem, candidate).seconds for candidate in candidates), default=float("inf"))
        bound = max(bound, lower_bound(problem, budget_bytes, seconds=share * seconds, known_seconds=known))
    if not candidates:
        if proven or bound == float("inf"):
            raise refuse(problem, "optimal", float("inf"), budget_bytes)
        raise DoesNotFitError(
            f"no schedule was found in {seconds:.4g} s",
            place=problem.name,
            remedy="give the solver more seconds, or use another policy",
        )
    costs = [price(problem, candidate).seconds for candidate in candidates]
    least = min(costs)
    best = candidates[costs.index(least)]
    return Schedule(steps=best.steps, policy="optimal"), bound, least <= bound * (1 + 1e-6)


class _Program:
    """The integer program of one problem; columns and rows are collected and handed to HiGHS at once."""

    def __init__(self, problem: Problem, budget_bytes: float, known_seconds: float = float("inf")) -> None:
        self.problem = problem
        self.known_seconds = known_seconds  # of a schedule that there is: nothing slower is looked for
        self.budget = budget_bytes
        self.cost: list[float] = []
        self.upper: list[float] = []
        self.whole: list[bool] = []
        self.rows: list[tuple[float, float, list[tuple[int, float]]]] = []
        self.compute: dict[tuple[int, int], int] = {}
        self.held: dict[tuple[int, int], int] = {}
        self.fetched: dict[tuple[int, int, int], int] = {}  # (stage, operation, tensor)
        self.fetches: dict[tuple[int, int], list[tuple[int, int]]] = {}  # (stage, tensor) → (operation, column)
        self.resting: dict[tuple[int, int], int] = {}
        self.early: dict[tuple[int, int], int] = {}  # fetched in a stage for a later one
        self.path = problem.paths[0] if problem.paths else None
        self.unit = max((tensor.bytes for tensor in problem.tensors), default=1.0) or 1.0
        self._tensors = [at for at, tensor in enumerate(problem.tensors) if tensor.maker >= 0]
        self._build()

    def _column(self, cost: float = 0.0, upper: float = 1.0, whole: bool = True) -> int:
        self.cost.append(cost)
        self.upper.append(upper)
        self.whole.append(whole)
        return len(self.cost) - 1

    def _row(self, low: float, high: float, terms: list[tuple[int, float]]) -> None:
        self.rows.append((low, high, terms))

    def _build(self) -> None:
        operations, tensors, readers = self.problem.operations, self.problem.tensors, self.problem.readers
        count = len(operations)
        infinite = float("inf")
        scale = self.problem.compute_seconds or 1.0
        self.scale = scale
        # The objective is the longest of three streams, with a nudge towards moving little.
        time_column = self._column(1.0, self.known_seconds / scale * (1 + 1e-9), False)
        self.time_column = time_column
        streams: dict[str, list[tuple[int, float]]] = {"compute": [], "out": [], "in": []}
        for stage in range(count):
            for at in range(stage + 1):
                if at == stage or operations[at].repeatable:
                    column = self.compute[stage, at] = self._column()
                    streams["compute"].append((column, operations[at].seconds / scale))
                    if at == stage:
                        self._row(1.0, 1.0, [(column, 1.0)])
            for tensor in self._tensors:
                maker = tensors[tensor].maker
                # Held at the beginning of a stage: made before it, and read in it or later, by itself or again.
                if maker < stage and readers[tensor]:
                    self.held[stage, tensor] = self._column()
                    if self.path is not None and tensors[tensor].bytes > 0:
                        self.resting[stage, tensor] = self._column()
                        into = tensors[tensor].bytes / self.path.read_bytes_per_second + self.path.latency_seconds
                        for reader in readers[tensor]:
                            if reader <= stage and (stage, reader) in self.compute:
                                fetched = self.fetched[stage, reader, tensor] = self._column()
                                self.fetches.setdefault((stage, tensor), []).append((reader, fetched))
                                streams["in"].append((fetched, into / scale))
                        if stage + 1 < count:
                            early = self.early[stage, tensor] = self._column()
                            streams["in"].append((early, into / scale))
        for stage in range(count):
            self._stage(stage)
        if self.path is not None:
            self._windows()
            for tensor in self._tensors:
                last = self.resting.get((count - 1, tensor))
                if last is not None:
                    out = tensors[tensor].bytes / self.path.write_bytes_per_second + self.path.latency_seconds
                    streams["out"].append((last, out / scale))
                    self.cost[last] += 1e-5
        for terms in streams.values():
            if terms:
                self._row(0.0, infinite, [(time_column, 1.0), *((column, -weight) for column, weight in terms)])
        if self.problem.streams == 2:
            both = [*streams["in"], *streams["out"]]
            self._row(0.0, infinite, [(time_column, 1.0), *((column, -weight) for column, weight in both)])
        elif self.problem.streams == 1:
            every = [term for terms in streams.values() for term in terms]
            self._row(0.0, infinite, [(time_column, 1.0), *((column, -weight) for column, weight in every)])

    def _windows(self) -> None:
        """When stages begin, and what can have been moved between two of them."""
        assert self.path is not None
        path, tensors, operations = self.path, self.problem.tensors, self.problem.operations
        count, infinite, scale = len(operations), float("inf"), self.scale
        begins = [self._column(0.0, infinite, False) for _ in range(count)] + [self.time_column]
        # Seconds of all fetches before a stage: what comes after it is the difference to the last of them.
        came = [self._column(0.0, infinite, False) for _ in range(count + 1)]
        for stage in range(count):
            computed: list[tuple[int, float]] = []
            fetched: list[tuple[int, float]] = []
            for at in range(stage + 1):
                column = self.compute.get((stage, at))
                if column is not None:
                    computed.append((column, -operations[at].seconds / scale))
            for tensor in self._tensors:
                into = (tensors[tensor].bytes / path.read_bytes_per_second + path.latency_seconds) / scale
                fetched += [(column, -into) for _, column in self.fetches.get((stage, tensor), ())]
                if (stage, tensor) in self.early:
                    fetched.append((self.early[stage, tensor], -into))
            self._row(0.0, infinite, [(begins[stage + 1], 1.0), (begins[stage], -1.0), *computed])
            self._row(0.0, 0.0, [(came[stage + 1], 1.0), (came[stage], -1.0), *fetched])
            self._row(
                0.0, infinite, [(begins[count], 1.0), (begins[stage], -1.0), (came[count], -1.0), (came[stage], 1.0)]
            )
        for stage in sorted(
            {round(count * part / _WINDOWS) for part in range(1, _WINDOWS)} | {self.problem.forward_stop}
        ):
            gone: list[tuple[int, int, float]] = []  # maker, column, seconds
            for tensor in self._tensors:
                if (stage, tensor) in self.resting and self.problem.readers[tensor][-1] >= stage:
                    # Read later, not here and not made again: then it has gone out by now.
                    column, maker = self._column(0.0, 1.0, False), tensors[tensor].maker
                    again = (self.compute.get((later, maker)) for later in range(stage, count))
                    made = [(one, 1.0) for one in again if one is not None]
                    self._row(1.0, infinite, [(column, 1.0), (self.held[stage, tensor], 1.0), *made])
                    out = (tensors[tensor].bytes / path.write_bytes_per_second + path.latency_seconds) / scale
                    gone.append((maker, column, out))
            for first in sorted({round(stage * part / _WINDOWS) for part in range(_WINDOWS)}):
                terms = [(column, -out) for maker, column, out in gone if maker >= first]
                if terms:
                    self._row(0.0, infinite, [(begins[stage], 1.0), (begins[first], -1.0), *terms])

    def _stage(self, stage: int) -> None:
        operations, tensors, readers = self.problem.operations, self.problem.tensors, self.problem.readers
        infinite = float("inf")
        compute, held, resting = self.compute, self.held, self.resting
        done = [at for at in range(stage + 1) if (stage, at) in compute]
        for at in done:
            for tensor in operations[at].inputs:
                if tensors[tensor].maker < 0:
                    continue
                # What an operation reads is held, fetched, or made in this stage.
                self._row(-infinite, 0.0, [(compute[stage, at], 1.0), *self._sources(stage, tensor, -1.0, at)])
        for tensor in self._tensors:
            after = held.get((stage + 1, tensor))
            if after is not None:
                early = self.early.get((stage, tensor))
                arriving = [] if early is None else [(early, -1.0)]
                self._row(-infinite, 0.0, [(after, 1.0), *self._sources(stage, tensor, -1.0), *arriving])
                if early is not None:
                    self._row(-infinite, 0.0, [(early, 1.0), (resting[stage, tensor], -1.0)])
            rests = resting.get((stage + 1, tensor))
            if rests is not None:
                before = resting.get((stage, tensor))
                terms = [(rests, 1.0), *self._sources(stage, tensor, -1.0)]
                if before is not None:
                    terms.append((before, -1.0))
                    self._row(0.0, infinite, [(rests, 1.0), (before, -1.0)])
                self._row(-infinite, 0.0, terms)
            for reader, fetched in self.fetches.get((stage, tensor), ()):
                self._row(-infinite, 0.0, [(fetched, 1.0), (resting[stage, tensor], -1.0)])
                self._row(-infinite, 0.0, [(fetched, 1.0), (compute[stage, reader], -1.0)])
        # Memory, in units of the largest tensor: what is there at the beginning, and how each operation changes it.
        level: list[tuple[int, float]] = []
        for tensor in self._tensors:
            size = tensors[tensor].bytes / self.unit
            if size and (stage, tensor) in held:
                level.append((held[stage, tensor], size))
        limit = self.budget / self.unit * (1 + 1e-9)
        frees: dict[int, list[tuple[int, float]]] = {}
        for at in done:
            operation = operations[at]
            column = compute[stage, at]
            freed: list[tuple[int, float]] = []
            taken: list[tuple[int, float]] = []
            for tensor in dict.fromkeys(operation.inputs):
                came = self.fetched.get((stage, at, tensor))
                if came is not None:
                    level.append((came, tensors[tensor].bytes / self.unit))
            for tensor in dict.fromkeys((*operation.inputs, *operation.outputs)):
                size = tensors[tensor].bytes / self.unit
                if tensors[tensor].maker < 0 or not size:
                    continue
                free = self._column(0.0, 1.0, False)
                frees.setdefault(tensor, []).append((free, 1.0))
                self._row(-infinite, 0.0, [(free, 1.0), (column, -1.0)])
                after = held.get((stage + 1, tensor))
                if after is not None:
                    self._row(-infinite, 1.0, [(free, 1.0), (after, 1.0)])
                for reader in readers[tensor]:
                    if at < reader <= stage and (stage, reader) in compute:
                        self._row(-infinite, 1.0, [(free, 1.0), (compute[stage, reader], 1.0)])
                freed.append((free, -size))
                if tensor == operation.overwrites:
                    taken.append((free, -size))
            made = sum(tensors[tensor].bytes for tensor in operation.outputs) / self.unit
            level.append((column, made))
            self._row(-infinite, limit, [*level, (column, operation.workspace_bytes / self.unit), *taken])
            level.extend(freed)
        # No more of a tensor goes than was there. Whole numbers obey this anyway; without it halves of computations
        # each free what only one of them made, and the relaxation bounds nothing.
        for tensor, terms in frees.items():
            after, early = held.get((stage + 1, tensor)), self.early.get((stage, tensor))
            kept = [] if after is None else [(after, 1.0)]
            arriving = [] if early is None else [(early, -1.0)]
            self._row(-infinite, 0.0, [*terms, *kept, *arriving, *self._sources(stage, tensor, -1.0)])

    def _sources(self, stage: int, tensor: int, weight: float, until: int | None = None) -> list[tuple[int, float]]:
        """From where a tensor can be on the device in a stage: `until` an operation, or at its end."""
        found: list[tuple[int, float]] = []
        for column in (
            self.held.get((stage, tensor)),
            self.compute.get((stage, self.problem.tensors[tensor].maker)),
        ):
            if column is not None:
                found.append((column, weight))
        for reader, column in self.fetches.get((stage, tensor), ()):
            if until is None or reader <= until:
                found.append((column, weight))
        return found

    # ---------------------------------------------------------------------------------------------------- solving

    def solve(self, seconds: float) -> tuple[list[tuple[Action, int, str]] | None, float, bool]:
        """Steps without frees (None: nothing found), the bound in seconds, whether the question was settled."""
        try:
            import highspy
        except ImportError:
            raise MissingExtraError(library="highspy", extra="solve", place="policy optimal") from None
        begin = time.perf_counter()
        relaxed = self._relaxation(highspy, seconds * _RELAXATION)
        solver = new_solver(highspy, max(0.1, seconds - (time.perf_counter() - begin)))
        solver.setOptionValue("mip_rel_gap", 1e-6)
        solver.passModel(self._model(highspy))
        solver.run()
        status = solver.getModelStatus()
        info = solver.getInfo()
        settled = status in (highspy.HighsModelStatus.kOptimal, highspy.HighsModelStatus.kInfeasible)
        bound = max(0.0, relaxed, float(info.mip_dual_bound) - self._nudge()) * self.scale
        if status == highspy.HighsModelStatus.kInfeasible:
            bound = self.known_seconds  # there is nothing faster than what is known
        bound = max(bound, self.problem.compute_seconds) if bound < float("inf") else self.problem.compute_seconds
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return None, bound, settled
        return self._steps(list(solver.getSolution().col_value)), bound, settled

    def _relaxation(self, highspy: Any, seconds: float) -> float:
        """The bound of the linear relaxation (0: not solved in time): the search often ends before it has its own."""
        model = self._model(highspy)
        model.integrality_ = [highspy.HighsVarType.kContinuous] * len(self.whole)
        solver = new_solver(highspy, seconds)
        solver.setOptionValue("solver", "ipm")
        solver.setOptionValue("run_crossover", "off")
        solver.passModel(model)
        solver.run()
        if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return 0.0
        return (float(solver.getInfo().objective_function_value) - self._nudge()) * (1 - _INTERIOR)

    def _nudge(self) -> float:
        """The most that the nudge towards moving little can add to the objective."""
        return sum(self.cost) - 1.0

    def _model(self, highspy: Any) -> Any:
        return model_of(highspy, self.cost, [0.0] * len(self.cost), self.upper, self.rows, self.whole)

    def _steps(self, values: list[float]) -> list[tuple[Action, int, str]]:
        tier = self.path.tier if self.path is not None else "host"
        raw: list[tuple[Action, int, str]] = []
        count = len(self.problem.operations)

        def is_set(column: int | None) -> bool:
            return column is not None and values[column] > 0.5

        here: set[int] = set()
        for stage in range(count):
            here = {tensor for tensor in here if is_set(self.held.get((stage, tensor)))}
            leaving = {
                tensor
                for tensor in self._tensors
                if is_set(self.resting.get((stage + 1, tensor))) and not is_set(self.resting.get((stage, tensor)))
            }
            for tensor in sorted(leaving & here):
                raw.append(("offload", tensor, tier))
            leaving -= here
            for at in range(stage + 1):
                if not is_set(self.compute.get((stage, at))):
                    continue
                for tensor in dict.fromkeys(self.problem.operations[at].inputs):
                    if is_set(self.fetched.get((stage, at, tensor))) and tensor not in here:
                        raw.append(("fetch", tensor, tier))
                        here.add(tensor)
                raw.append(("compute", at, tier))
                for tensor in self.problem.operations[at].outputs:
                    here.add(tensor)
                    if tensor in leaving:
                        raw.append(("offload", tensor, tier))
                        leaving.discard(tensor)
            for tensor in self._tensors:
                if is_set(self.early.get((stage, tensor))) and tensor not in here:
                    raw.append(("fetch", tensor, tier))
                    here.add(tensor)
        return raw
