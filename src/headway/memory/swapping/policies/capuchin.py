"""Capuchin: what a first iteration shows decides about each tensor (Peng et al., ASPLOS 2020).

From the measured times of accesses, each tensor's free time is (back access - time to swap in) - (evicted access +
time to swap out) (section 4.3). What has time enough is swapped, most free time first, until the transfers together
take as long as the pass that hides them. The rest is swapped or
recomputed, whichever delays the step less; recomputation is ordered by memory saved per second (section 4.4).
In-triggers begin one transfer ahead of the back access and move earlier by feedback: by 5 % of the transfer time, for
each tensor that arrived late in the iteration before (section 4.4).
"""

from __future__ import annotations

import bisect
import heapq
from itertools import accumulate

import msgspec

from headway.errors import DoesNotFitError
from headway.memory.swapping.decisions import Decision, backward_gap, fit, program
from headway.memory.swapping.pricing import lateness, price
from headway.memory.swapping.problem import Price, Problem, Schedule
from headway.plan.plan import Tier

__all__ = ["capuchin", "free_seconds"]

_ROUNDS = 40
_STEP = 0.05


def free_seconds(problem: Problem, tensor: int, begins: list[float]) -> float:
    """Time between a tensor's two accesses that is left once it has gone and come back; negative: it would be late.

    `begins`: when each operation begins in an iteration without a budget.
    """
    path = problem.paths[0]
    gap = backward_gap(problem, tensor)
    size = problem.tensors[tensor].bytes
    out = size / path.write_bytes_per_second + path.latency_seconds
    back = size / path.read_bytes_per_second + path.latency_seconds
    return (begins[gap.after] - back) - (begins[gap.before + 1] + out)


def capuchin(problem: Problem, budget_bytes: float) -> Schedule:
    """Swap what has time for it, then what costs least to bring back, and move the in-triggers by feedback."""
    begins = [0.0, *accumulate(operation.seconds for operation in problem.operations)]
    stop = problem.forward_stop
    # Transfers wait for each other: what the passes cannot hide together is exposed, whatever its own free time.
    room = min(begins[stop], begins[-1] - begins[stop])
    path = problem.paths[0] if problem.paths else None
    free = {at: free_seconds(problem, at, begins) for at in problem.saved} if path is not None else {}
    ranked: list[Decision] = []
    exposed: dict[int, float] = {}
    for at in sorted(problem.saved, key=lambda at: -free.get(at, 0.0)):
        exposed[at] = float("inf")
        if path is not None:
            transfer = problem.tensors[at].bytes / min(path.write_bytes_per_second, path.read_bytes_per_second)
            if free[at] >= 0 and transfer <= room:
                room -= transfer
                ranked.append(Decision(tensor=at, action="swap", tier=path.tier))
                del exposed[at]
            else:
                exposed[at] = max(-free[at], transfer - max(room, 0.0), 1e-12)
    attempts: list[tuple[Schedule, Price, list[Decision]]] = []
    failure: DoesNotFitError | None = None
    for retain in (True, False):
        try:
            costly = _by_saving(problem, exposed, path.tier if path is not None else "host", retain)
            attempts.append(fit(problem, [*ranked, *costly], budget_bytes, "capuchin", prefetch=False))
        except DoesNotFitError as error:
            failure = error
    if not attempts:
        assert failure is not None
        raise failure
    schedule, cost, chosen = min(attempts, key=lambda attempt: attempt[1].seconds)
    if path is None:
        return schedule
    lead = {decision.tensor: 1.0 for decision in chosen if decision.action == "swap"}
    best, best_cost = schedule, cost
    fixed: set[int] = set()  # whose trigger cannot move: there is no room earlier
    moving = _triggered(problem, chosen, lead, begins, path.read_bytes_per_second)
    previous = dict(lead)
    for _ in range(_ROUNDS):
        schedule = program(problem, moving, budget_bytes, "capuchin")
        cost = price(problem, schedule)
        if cost.peak_bytes > budget_bytes:
            # The triggers that were moved last go back and stay.
            changed = [at for at in lead if lead[at] != previous[at]] or [at for at in lead if at not in fixed]
            if not changed:
                break
            for at in changed[: max(1, len(changed) // 2)]:
                lead[at] = previous[at] if lead[at] != previous[at] else 0.0
                previous[at] = lead[at]
                fixed.add(at)
        else:
            if cost.seconds < best_cost.seconds:
                best, best_cost = schedule, cost
            late = [at for at in lateness(problem, schedule) if at in lead and at not in fixed]
            if not late:
                break
            previous = dict(lead)
            for at in late:
                lead[at] += max(_STEP, 0.25 * lead[at])
        moving = _triggered(problem, chosen, lead, begins, path.read_bytes_per_second)
    return best


def _by_saving(problem: Problem, exposed: dict[int, float], tier: Tier, retain: bool) -> list[Decision]:
    """Most memory saved per second first; what is dropped makes its followers dearer, so costs are looked at again."""
    dropped: set[int] = set()
    kept = set(problem.saved)

    def chain(tensor: int) -> float:
        seconds, seen, stack = 0.0, set(), [tensor]
        while stack:
            maker = problem.tensors[stack.pop()].maker
            if maker in seen or maker < 0:
                continue
            seen.add(maker)
            if not problem.operations[maker].repeatable:
                return float("inf")
            seconds += problem.operations[maker].seconds
            stack.extend(at for at in problem.operations[maker].inputs if at not in kept or at in dropped)
        return seconds

    def cost(tensor: int) -> tuple[float, float]:
        again = chain(tensor)
        return min(again, exposed[tensor]), again

    heap = [(cost(at)[0] / problem.tensors[at].bytes, at) for at in exposed]
    heapq.heapify(heap)
    found: list[Decision] = []
    while heap:
        _, at = heapq.heappop(heap)
        seconds, again = cost(at)
        if seconds == float("inf"):
            continue
        if heap and seconds / problem.tensors[at].bytes > heap[0][0] * (1 + 1e-9):
            heapq.heappush(heap, (seconds / problem.tensors[at].bytes, at))
            continue
        if again <= exposed[at]:
            dropped.add(at)
            found.append(Decision(tensor=at, action="recompute", retain=retain))
        else:
            found.append(Decision(tensor=at, action="swap", tier=tier))
    return found


def _triggered(
    problem: Problem, decisions: list[Decision], lead: dict[int, float], begins: list[float], rate: float
) -> list[Decision]:
    """The decisions with their in-triggers `lead` transfer times ahead of the back access."""
    found: list[Decision] = []
    for decision in decisions:
        if decision.tensor in lead and lead[decision.tensor] > 0:
            gap = backward_gap(problem, decision.tensor)
            moment = begins[gap.after] - lead[decision.tensor] * problem.tensors[decision.tensor].bytes / rate
            at = max(bisect.bisect_right(begins, moment) - 1, gap.before + 1)
            decision = msgspec.structs.replace(decision, in_at=at if at < gap.after else -1)
        found.append(decision)
    return found
