"""One door to all policies: a problem and a budget in, a checked schedule with its price out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping

from headway.errors import DoesNotFitError, InputError
from headway.hardware.cluster import Accelerator
from headway.memory.swapping.building import graph_problem
from headway.memory.swapping.interpreter import check
from headway.memory.swapping.policies.capuchin import capuchin
from headway.memory.swapping.policies.checkpointing import keep_all, recompute_all, square_root
from headway.memory.swapping.policies.dtr import dtr
from headway.memory.swapping.policies.flashneuron import flashneuron
from headway.memory.swapping.policies.gist import gist
from headway.memory.swapping.policies.superneurons import superneurons
from headway.memory.swapping.policies.swapadvisor import swapadvisor
from headway.memory.swapping.policies.vdnn import all_layers, convolutions
from headway.memory.swapping.pricing import price
from headway.memory.swapping.problem import Path, Price, Problem, Schedule
from headway.value import Value
from headway.workload.graph import Graph

__all__ = ["POLICIES", "Answer", "Row", "problem_table", "solve", "swap_table"]

_PLAIN: Mapping[str, Callable[[Problem, float], Schedule]] = {
    "keep-all": keep_all,
    "recompute-all": recompute_all,
    "sqrt": square_root,
    "vdnn-conv": convolutions,
    "vdnn-all": all_layers,
    "superneurons": superneurons,
    "capuchin": capuchin,
    "dtr": dtr,
    "gist": gist,
    "flashneuron": flashneuron,
}
POLICIES: tuple[str, ...] = (*_PLAIN, "swapadvisor", "optimal")


class Answer(Value):
    """A schedule, what it costs, and a bound: no schedule without encodings takes less (0: none is known).

    `optimal`: the schedule was proven to cost what the bound says, under the bound's model of transfers.
    """

    policy: str
    schedule: Schedule
    price: Price
    bound_seconds: float = 0.0
    optimal: bool = False
    solve_seconds: float = 0.0


class Row(Value):
    """One cell of a table of policies and budgets; `failure` says why there is no schedule, and then `price` is None.

    `overhead`: seconds over those of the step without a budget, minus one. `budget_share`: the budget over the peak of
    keeping everything.
    """

    policy: str
    budget_bytes: float
    budget_share: float
    overhead: float = 0.0
    price: Price | None = None
    bound_overhead: float = 0.0
    solve_seconds: float = 0.0
    failure: str = ""


def solve(
    problem: Problem,
    budget_bytes: float,
    policy: str = "capuchin",
    *,
    seed: int = 0,
    seconds: float = 20.0,
    reorder: bool = False,
) -> Answer:
    """What `policy` answers, checked by the interpreter.

    `seconds`, `seed`: for policies that search (swapadvisor, optimal). `reorder`: swapadvisor may change the order of
    operations too, which `execution` cannot carry out.

    Raises DoesNotFitError if the policy does not get below the budget, InputError for an unknown policy or a policy
    that needs a tier that the problem has no way to, and MissingExtraError for "optimal" without highspy.
    """
    begin = time.perf_counter()
    bound, proven = 0.0, False
    if policy in _PLAIN:
        schedule = _PLAIN[policy](problem, budget_bytes)
    elif policy == "swapadvisor":
        schedule = swapadvisor(problem, budget_bytes, seed=seed, seconds=seconds, reorder=reorder)
    elif policy == "optimal":
        from headway.memory.swapping.policies.optimal import optimal

        schedule, bound, proven = optimal(problem, budget_bytes, seconds=seconds, seed=seed)
    else:
        raise InputError(f"no policy {policy!r}", place="policy", remedy=f"policies are: {', '.join(POLICIES)}")
    spent = time.perf_counter() - begin
    cost = price(problem, schedule)
    check(problem, schedule, budget_bytes, cost)
    return Answer(
        policy=policy, schedule=schedule, price=cost, bound_seconds=bound, optimal=proven, solve_seconds=spent
    )


def swap_table(
    graph: Graph,
    accelerator: Accelerator,
    budgets: Iterable[float],
    policies: Iterable[str] = POLICIES,
    *,
    samples: int = 1,
    precision: str = "float32",
    paths: Iterable[Path] = (Path(),),
    seed: int = 0,
    seconds: float = 20.0,
) -> tuple[Row, ...]:
    """Every policy at every budget, for one step of `graph` on a device.

    `budgets`: above 1, bytes for activations; up to 1, shares of the peak of keeping everything.
    """
    problem = graph_problem(graph, samples, accelerator, precision=precision, paths=paths)
    return problem_table(problem, budgets, policies, seed=seed, seconds=seconds)


def problem_table(
    problem: Problem, budgets: Iterable[float], policies: Iterable[str], *, seed: int = 0, seconds: float = 20.0
) -> tuple[Row, ...]:
    """Every policy at every budget, for one problem; see `swap_table`."""
    whole = price(problem, keep_all(problem, float("inf")))
    rows: list[Row] = []
    for budget in budgets:
        limit = budget * whole.peak_bytes if budget <= 1 else budget
        for policy in policies:
            share = limit / whole.peak_bytes
            try:
                answer = solve(problem, limit, policy, seed=seed, seconds=seconds, reorder=True)
            except DoesNotFitError as error:
                rows.append(Row(policy=policy, budget_bytes=limit, budget_share=share, failure=error.message))
                continue
            rows.append(
                Row(
                    policy=policy,
                    budget_bytes=limit,
                    budget_share=share,
                    overhead=answer.price.seconds / whole.seconds - 1,
                    price=answer.price,
                    bound_overhead=max(0.0, answer.bound_seconds / whole.seconds - 1),
                    solve_seconds=answer.solve_seconds,
                )
            )
    return tuple(rows)
