"""Checkpoints at the borders of segments, and everything between them computed again (Chen et al., arXiv:1604.06174).

A border is a place in the forward pass; the tensors that cross it are kept. Between borders nothing is, so that a step
with n operations needs memory of the order of the square root of n for one more forward pass.
"""

from __future__ import annotations

import math

from headway.memory.swapping.decisions import Decision, program, refuse
from headway.memory.swapping.pricing import price
from headway.memory.swapping.problem import Price, Problem, Schedule

__all__ = ["keep_all", "recompute_all", "segments", "square_root"]


def keep_all(problem: Problem, budget_bytes: float) -> Schedule:
    """Nothing is moved and nothing is computed again. Raises DoesNotFitError if that is over the budget."""
    schedule = program(problem, (), policy="keep-all")
    peak = price(problem, schedule).peak_bytes
    if peak > budget_bytes:
        raise refuse(problem, "keep-all", peak, budget_bytes)
    return schedule


def segments(problem: Problem, count: int) -> list[Decision]:
    """Decisions that keep what crosses the borders of `count` segments, of about equal bytes saved, and the last one.

    Each border is moved, within half a segment, to where the fewest bytes cross.
    """
    stop = problem.forward_stop
    saved = problem.saved
    if not saved or count < 2:
        return []
    crossing = _crossing_bytes(problem)
    total = sum(problem.tensors[at].bytes for at in saved)
    borders: list[int] = []
    through = 0.0
    for at in saved:
        through += problem.tensors[at].bytes
        if len(borders) < count - 1 and through >= total * (len(borders) + 1) / count:
            borders.append(problem.tensors[at].maker)
    reach = max(1, stop // (2 * count))
    borders = sorted(
        {
            min(range(max(0, at - reach), min(stop - 1, at + reach) + 1), key=lambda place: crossing[place])
            for at in borders
        }
    )
    kept = {tensor for border in borders for tensor in _crossing(problem, border)}
    last = borders[-1]
    decisions = [Decision(tensor=at, action="keep") for at in sorted(kept)]
    decisions += [
        Decision(tensor=at, action="recompute")
        for at in saved
        if at not in kept and problem.tensors[at].maker <= last and _may_repeat(problem, at)
    ]
    return decisions


def _may_repeat(problem: Problem, tensor: int) -> bool:
    return problem.operations[problem.tensors[tensor].maker].repeatable


def _crossing(problem: Problem, border: int) -> list[int]:
    stop = problem.forward_stop
    return [
        at
        for at, tensor in enumerate(problem.tensors)
        if 0 <= tensor.maker <= border and tensor.bytes > 0 and any(border < use < stop for use in problem.readers[at])
    ]


def _crossing_bytes(problem: Problem) -> list[float]:
    stop = problem.forward_stop
    change = [0.0] * (stop + 1)
    for at, tensor in enumerate(problem.tensors):
        if 0 <= tensor.maker < stop and tensor.bytes > 0:
            last = max((use for use in problem.readers[at] if use < stop), default=tensor.maker)
            change[tensor.maker] += tensor.bytes
            change[last] -= tensor.bytes
    found: list[float] = []
    through = 0.0
    for place in range(stop):
        through += change[place]
        found.append(through)
    return found


def _counts(problem: Problem) -> list[int]:
    most = max(2, min(len(problem.saved), int(4 * math.sqrt(problem.forward_stop)) + 1))
    return sorted({*range(2, min(most, 33)), *(round(32 * 1.25**step) for step in range(12) if 32 * 1.25**step < most)})


def _tried(problem: Problem, budget_bytes: float, policy: str) -> list[tuple[Schedule, Price]]:
    found: list[tuple[Schedule, Price]] = []
    for count in _counts(problem):
        schedule = program(problem, segments(problem, count), budget_bytes, policy)
        found.append((schedule, price(problem, schedule)))
    return found


def square_root(problem: Problem, budget_bytes: float) -> Schedule:
    """The cheapest number of segments that fits (the search over budgets of Chen et al., section 4.3, over counts)."""
    schedule = program(problem, (), policy="sqrt")
    cost = price(problem, schedule)
    if cost.peak_bytes <= budget_bytes:
        return schedule
    tried = _tried(problem, budget_bytes, "sqrt")
    fitting = [pair for pair in tried if pair[1].peak_bytes <= budget_bytes]
    if not fitting:
        raise refuse(
            problem, "sqrt", min((each.peak_bytes for _, each in tried), default=cost.peak_bytes), budget_bytes
        )
    return min(fitting, key=lambda pair: pair[1].seconds)[0]


def recompute_all(problem: Problem, budget_bytes: float) -> Schedule:
    """Everything between checkpoints computed again, whatever the budget: as many as need least memory."""
    tried = _tried(problem, 0.0, "recompute-all")
    if not tried:  # fewer than two operations of which anything is saved
        return keep_all(problem, budget_bytes)
    schedule, cost = min(tried, key=lambda pair: pair[1].peak_bytes)
    if cost.peak_bytes > budget_bytes:
        raise refuse(problem, "recompute-all", cost.peak_bytes, budget_bytes)
    return schedule
