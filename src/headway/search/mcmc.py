"""Metropolis search over stages: small random changes, taken when they help and sometimes when they do not.

FlexFlow's search (Jia, Zaharia and Aiken, SysML 2019, section 6.2) on a `StageProblem`, with the proposals of
`proposals.py`. One that makes the step slower by a factor f is taken with probability f ** (-1 / temperature). The
temperature falls over the budget, and several walks (restarts) begin at different drawn solutions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from headway.errors import FieldError, PlanError
from headway.search.problem import Assignment, StageProblem
from headway.search.proposals import Walk

__all__ = ["Progress", "Record", "Result", "check_budget", "finish", "mcmc", "random_search"]

# Temperatures of log(seconds): 0.03 takes a step that is 3 % slower with probability 1/e.
_HOT, _COLD = 0.03, 0.0005
_FIRST_CHUNK, _LARGEST_CHUNK = 64, 1 << 16


class Progress(NamedTuple):
    """The best so far: after `elapsed_seconds` of searching and `evaluated` evaluations, a step takes `seconds`."""

    elapsed_seconds: float
    evaluated: int
    seconds: float


class Result(NamedTuple):
    """What a search found: `stages` take `seconds` a step, as `StageProblem.evaluate` says.

    Infinite `seconds` and no `stages`: none of the `evaluated` solutions fits, which does not prove that there is none.
    `history` has an entry for each improvement.
    """

    seconds: float
    stages: tuple[Assignment, ...]
    evaluated: int
    history: tuple[Progress, ...]


def mcmc(
    problem: StageProblem,
    *,
    seed: int = 0,
    evaluations: int | None = None,
    budget_seconds: float | None = None,
    restarts: int = 16,
    start: Sequence[Assignment] | None = None,
    temperature: tuple[float, float] = (_HOT, _COLD),
    progress: Callable[[Progress], Any] | None = None,
) -> Result:
    """Search for the fastest step by `restarts` walks that take turns, for so many evaluations or so many seconds.

    After each of the first three quarters of the budget the worse half of the walks is given up.

    A step slower by a factor f is taken with probability f ** (-1 / t), where t falls from the first `temperature` to
    the second over the budget, geometrically; (0, 0) only ever takes what is no worse. `start`: where the first walk
    begins, the others at drawn solutions. The same seed and `evaluations` give the same answer; under `budget_seconds`
    it depends on the machine. `progress` hears of each improvement. Raises PlanError if no options make up the devices.

    FlexFlow's acceptance is exp(beta (old - new)) in seconds; here it is of their logarithms, so that one temperature
    serves all problems. Proposals are not weighted by the chance of their reverse: this searches, it does not sample.
    """
    check_budget(evaluations, budget_seconds)
    if restarts < 1:
        raise FieldError(f"must be at least 1, not {restarts}", place="restarts")
    began = time.perf_counter()
    walk = Walk(problem, seed=seed, rows=restarts)
    if start is not None and not math.isfinite(problem.evaluate(start)):
        raise PlanError("is no solution of this problem", place="start", remedy="leave it out: one will be drawn")
    for row in range(restarts):
        walk.begin(row, start if row == 0 else None)
    record = Record(began, progress)
    record.note(walk.evaluated, walk.seconds)
    hot, cold = temperature
    chunk, quarters = _FIRST_CHUNK, 1
    while True:
        if evaluations is not None:
            done, chunk = walk.evaluated / evaluations, min(chunk, evaluations - walk.evaluated)
        else:
            assert budget_seconds is not None
            done = (time.perf_counter() - began) / budget_seconds
        if done >= 1 or chunk <= 0:
            break
        while quarters <= min(3.0, 4 * done):
            walk.halve()
            quarters += 1
        now = hot if math.isinf(hot) or cold <= 0 or hot <= 0 else hot * (cold / hot) ** done
        if not walk.run(chunk, now):
            break
        record.note(walk.evaluated, walk.seconds)
        # Chunks grow with what was done, so that the temperature falls smoothly and the calls cost little.
        chunk = int(min(_LARGEST_CHUNK, max(_FIRST_CHUNK, walk.evaluated // 64)))
        if evaluations is not None:
            chunk = max(1, min(chunk, evaluations // 128 + 1))
    return finish(problem, walk, record)


def random_search(
    problem: StageProblem,
    *,
    seed: int = 0,
    evaluations: int | None = None,
    budget_seconds: float | None = None,
    restarts: int = 16,
    progress: Callable[[Progress], Any] | None = None,
) -> Result:
    """What `mcmc` must beat: the same proposals, and every one that is a solution is taken; the best one is kept."""
    return mcmc(
        problem,
        seed=seed,
        evaluations=evaluations,
        budget_seconds=budget_seconds,
        restarts=restarts,
        temperature=(math.inf, math.inf),
        progress=progress,
    )


class Record:
    """The improvements of a search that began at `began` (of time.perf_counter)."""

    def __init__(self, began: float, progress: Callable[[Progress], Any] | None = None) -> None:
        self.began = began
        self.history: list[Progress] = []
        self._progress = progress

    def note(self, evaluated: int, seconds: float) -> None:
        """Remember `seconds` if they are better than before."""
        if math.isfinite(seconds) and (not self.history or seconds < self.history[-1].seconds):
            self.history.append(Progress(time.perf_counter() - self.began, evaluated, seconds))
            if self._progress is not None:
                self._progress(self.history[-1])


def finish(problem: StageProblem, walk: Walk, record: Record) -> Result:
    """The result of a walk, judged once more by the problem itself."""
    stages = walk.stages
    seconds = problem.evaluate(stages) if stages else math.inf
    assert math.isfinite(seconds) == math.isfinite(walk.seconds), "the walk and the problem disagree"
    return Result(seconds, stages, walk.evaluated, tuple(record.history))


def check_budget(evaluations: int | None, budget_seconds: float | None, *, name: str = "evaluations") -> None:
    """Raise FieldError unless exactly one of the two is given, and positive."""
    if (evaluations is None) == (budget_seconds is None):
        raise FieldError(f"give either {name} or budget_seconds", place="budget")
    if evaluations is not None and evaluations < 1:
        raise FieldError(f"must be at least 1, not {evaluations}", place=name)
    if budget_seconds is not None and budget_seconds <= 0:
        raise FieldError(f"must be positive, not {budget_seconds:g}", place="budget_seconds")
