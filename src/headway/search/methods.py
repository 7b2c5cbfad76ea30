"""The same question to different searches: which plan is best, found how.

`find` (exact over uniform plans) is the default. `dynamic` and `heterogeneous` also give stages degrees of their own;
`mcmc` and `gradient` are stochastic, and say their seed. "auto" asks `find`, and where devices differ `heterogeneous`
too. What comes back is the same Ranking, each plan judged by the same predictor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, get_args

import msgspec

from headway.errors import DoesNotFitError, FieldError
from headway.hardware.cluster import Cluster
from headway.predict.measured import MeasuredTimes
from headway.predict.profile import Profile
from headway.predict.step import Predictor
from headway.search.find import find
from headway.search.ranking import Candidate, Constraints, Goal, Ranking
from headway.workload.graph import Workload

__all__ = ["Method", "find_by"]

Method = Literal["auto", "exact", "dynamic", "heterogeneous", "mcmc", "gradient"]

_BUDGET_SECONDS = 10.0
# What the search over stages decides by itself: nothing of it can be fixed.
_DECIDED = ("data", "tensor", "pipeline", "context", "expert", "micro_batch", "zero_stage", "schedule")


def find_by(
    method: str,
    workload: Workload,
    cluster: Cluster,
    *,
    goal: Goal = "time",
    devices: int | None = None,
    constraints: Constraints | None = None,
    profile: Profile | None = None,
    measured: MeasuredTimes | None = None,
    keep: int = 5,
    budget_seconds: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Ranking:
    """The best plans that `method` finds. `budget_seconds` bounds all but the exact search (None: 10 s where it must).

    Raises FieldError for a method that is not known, or that cannot meet the goal or the constraints; DoesNotFitError
    if nothing that it looked at fits.
    """
    wanted = constraints or Constraints()
    if method not in get_args(Method):
        raise FieldError(f"{method!r} is no method of search", place="search", remedy=", ".join(get_args(Method)))
    if method in ("auto", "exact"):
        ranking = find(
            workload, cluster, goal=goal, devices=devices, constraints=wanted, profile=profile, measured=measured,
            keep=keep, progress=progress,
        )  # fmt: skip
        if method == "exact" or cluster.is_homogeneous or wanted.runnable or goal != "time" or _fixed(wanted):
            return ranking
        method = "heterogeneous"
        more = _others(
            method, workload, cluster, devices, wanted, profile, measured, keep, budget_seconds, seed, progress
        )
        return _merged(ranking, more, keep)
    if goal != "time":
        raise FieldError(f"{method} searches for the fastest step", place="goal", remedy="use --search exact")
    if method != "mcmc":
        if wanted.runnable:
            raise FieldError(
                f"{method} gives stages degrees of their own, which `headway run` does not carry out yet",
                place="search", remedy="add --any, or use exact or mcmc",
            )  # fmt: skip
        if fixed := _fixed(wanted):
            raise FieldError(f"{method} decides {fixed} itself", place=f"constraints: {fixed}", remedy="leave it open")
    return _others(method, workload, cluster, devices, wanted, profile, measured, keep, budget_seconds, seed, progress)


def _fixed(constraints: Constraints) -> str:
    names = [name for name in _DECIDED if getattr(constraints, name) is not None]
    if constraints.recompute != "any":
        names.append("recompute")
    if constraints.offload != "none":
        names.append("offload")
    return ", ".join(names)


def _merged(one: Ranking, other: Ranking, keep: int) -> Ranking:
    both = [*one.best, *(candidate for candidate in other.best if candidate not in one.best)]
    both.sort(key=lambda candidate: (candidate.prediction.time.step_seconds, candidate.prediction.peak_bytes))
    return msgspec.structs.replace(
        one, best=tuple(both[:keep]), evaluated=one.evaluated + other.evaluated, seconds=one.seconds + other.seconds
    )


def _others(
    method: str, workload: Workload, cluster: Cluster, devices: int | None, constraints: Constraints,
    profile: Profile | None, measured: MeasuredTimes | None, keep: int, budget_seconds: float | None, seed: int,
    progress: Callable[[int, int], None] | None,
) -> Ranking:  # fmt: skip
    started = time.perf_counter()
    machines = cluster if devices is None else cluster.subset(devices)
    if constraints.precision is not None:
        workload = msgspec.structs.replace(workload, precision=constraints.precision)
    predictor = Predictor(workload, machines, profile, measured=measured)
    fraction = constraints.memory_fraction
    evaluated = 0
    found: list[Candidate] = []
    drawn = None
    history: tuple[tuple[float, float], ...] = ()
    if method in ("dynamic", "heterogeneous"):
        # Imported where used: these compile, and the exact search, which most runs need alone, does not.
        from headway.search.dynamic_plans import dynamic_search
        from headway.search.heterogeneous import search_heterogeneous

        search = dynamic_search if method == "dynamic" else search_heterogeneous
        found = search(
            workload, machines, predictor, keep=keep, budget_seconds=budget_seconds, progress=progress,
            memory_fraction=fraction,
        )  # fmt: skip
    elif method == "mcmc":
        from headway.search.plan_walk import mcmc_plans

        drawn = seed
        result = mcmc_plans(
            predictor, constraints=constraints, seed=seed, budget_seconds=budget_seconds or _BUDGET_SECONDS
        )
        evaluated = result.evaluated
        history = tuple((one.elapsed_seconds, one.seconds) for one in result.history)
        if result.plan is not None and result.prediction is not None:
            found = [Candidate(plan=result.plan, prediction=result.prediction)]
    else:
        drawn = seed
        found, evaluated = _by_gradient(
            workload, machines, predictor, fraction, seed, budget_seconds or _BUDGET_SECONDS, progress
        )
    if not found:
        raise DoesNotFitError(
            f"{method} found no plan for {workload.graph.name} that fits", place=machines.name,
            remedy="use --search exact, which says what is missing; more devices, or a smaller batch",
        )  # fmt: skip
    found.sort(key=lambda candidate: (candidate.prediction.time.step_seconds, candidate.prediction.peak_bytes))
    seen = evaluated or len(found)
    return Ranking(
        goal="time", best=tuple(found[:keep]), considered=seen, evaluated=seen, seed=drawn,
        seconds=time.perf_counter() - started, history=history,
    )  # fmt: skip


def _by_gradient(
    workload: Workload, cluster: Cluster, predictor: Predictor, fraction: float, seed: int, budget_seconds: float,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[Candidate], int]:  # fmt: skip
    """Descend on the tables of several micro-batches and ZeRO stages, an equal share of the budget on each."""
    from headway.search.dynamic_plans import fits
    from headway.search.gradient import gradient
    from headway.search.tables import plan_of, stage_problem

    batch = workload.global_batch
    sizes = sorted({max(1, batch // count) for count in (8, 16, 32, 64) if batch % max(1, batch // count) == 0})
    cases = [(size, zero) for zero in (1, 2, 3) for size in sizes]
    found: list[Candidate] = []
    evaluated = 0
    for position, (size, zero) in enumerate(cases):
        problem = stage_problem(
            workload, cluster, predictor, micro_batch=size, zero_stage=zero, memory_fraction=fraction
        )
        result = gradient(problem, seed=seed, budget_seconds=budget_seconds / len(cases))
        evaluated += result.evaluated
        if result.stages:
            plan = plan_of(problem, result.stages, workload, cluster)
            if fits(plan, cluster, predictor, fraction):
                found.append(Candidate(plan=plan, prediction=predictor.predict(plan)))
        if progress is not None:
            progress(position + 1, len(cases))
    return found, evaluated
