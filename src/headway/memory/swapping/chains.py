"""Chains of equal tensors, where the least recomputation is known exactly.

Revolve (Griewank and Walther, ACM TOMS 26, 2000, Algorithm 799) counts like this: a chain of l forward steps is
reversed with s checkpoints, the first of which holds the chain's input. A state that is being advanced needs no
checkpoint of its own, and the reversal of a step includes its forward evaluation with a tape, which is not counted. So
a chain of 10 steps takes 9 evaluations with memory for everything, and 15 with 3 checkpoints.

As a problem: the input is given, free of charge; forward operation i makes state i + 1 in the place of state i where it
can; backward operation i reads state i. The last state is not needed. A budget of s tensors is then the same as s
checkpoints: s - 1 besides the input, and the state that is being advanced.
"""

from __future__ import annotations

import math
from functools import cache

from headway.memory.swapping.decisions import with_frees
from headway.memory.swapping.problem import Action, Operation, Problem, Schedule, Tensor

__all__ = ["as_chain", "chain_problem", "chain_schedule", "revolve_evaluations"]


def revolve_evaluations(steps: int, checkpoints: int) -> int:
    """The least forward evaluations that reverse a chain: r·l - C(s + r, r - 1), with the least r: C(s + r, s) >= l.

    The closed form of Griewank and Walther, with r their repetition number: 15 for 10 steps and 3 checkpoints.
    """
    if steps <= 1:
        return 0
    repetition = 1
    while math.comb(checkpoints + repetition, checkpoints) < steps:
        repetition += 1
    return repetition * steps - math.comb(checkpoints + repetition, repetition - 1)


def chain_problem(
    steps: int, *, forward_seconds: tuple[float, ...] = (), backward_seconds: float = 0.0, size_bytes: float = 1.0
) -> Problem:
    """A chain of `steps` forward and as many backward steps; forward takes a second each unless said otherwise."""
    seconds = forward_seconds or (1.0,) * (steps - 1)
    operations: list[Operation] = []
    tensors = [Tensor(name="input", bytes=0.0, maker=-1)]
    for at in range(steps - 1):
        tensors.append(Tensor(name=f"state {at + 1}", bytes=size_bytes, maker=at))
        operations.append(
            Operation(
                name=f"forward {at}", seconds=seconds[at], inputs=(at,), outputs=(at + 1,), overwrites=at if at else -1
            )
        )
    gradient = -1
    for at in range(steps - 1, -1, -1):
        tensors.append(Tensor(name=f"gradient {at}", bytes=0.0, maker=len(operations)))
        inputs = (at,) if gradient < 0 else (at, gradient)
        gradient = len(tensors) - 1
        operations.append(
            Operation(
                name=f"backward {at}",
                seconds=backward_seconds,
                inputs=inputs,
                outputs=(gradient,),
                backward=True,
                repeatable=False,
            )
        )
    return Problem(name=f"chain of {steps}", operations=tuple(operations), tensors=tuple(tensors))


def as_chain(problem: Problem) -> int:
    """The number of steps if the problem is a chain of equal tensors, as `chain_problem` makes them; otherwise 0."""
    stop = problem.forward_stop
    steps = stop + 1
    if len(problem.operations) != stop + steps or not problem.tensors or problem.tensors[0].maker >= 0:
        return 0
    sizes = {problem.tensors[at].bytes for at in range(1, min(steps, len(problem.tensors)))}
    if len(sizes) > 1:
        return 0
    for at, operation in enumerate(problem.operations):
        read = [tensor for tensor in operation.inputs if tensor < steps]
        wanted = at if at < stop else 2 * stop - at
        in_place = at >= stop or operation.overwrites == (at if at else -1)
        plain = operation.workspace_bytes == 0 and in_place
        if read != [wanted] or not plain or (at < stop and operation.outputs != (at + 1,)):
            return 0
        if at >= stop and any(problem.tensors[tensor].bytes for tensor in operation.outputs):
            return 0
    return steps


def chain_schedule(problem: Problem, budget_bytes: float) -> tuple[Schedule, float] | None:
    """The schedule with the least time for a chain of equal tensors, and that time; None if nothing fits.

    Dynamic programming over (first state, number of steps, checkpoints), exact for forward steps of any duration.
    """
    steps = as_chain(problem)
    size = problem.tensors[1].bytes if len(problem.tensors) > 1 else 0.0
    checkpoints = int(budget_bytes / size + 1e-9) if size else steps
    checkpoints = min(checkpoints, steps)
    if checkpoints < 1:
        return None
    seconds = [problem.operations[at].seconds for at in range(steps - 1)]
    through = [0.0]
    for each in seconds:
        through.append(through[-1] + each)

    @cache
    def best(first: int, count: int, slots: int) -> tuple[float, int]:
        """Least time to reverse `count` steps from state `first`, which holds one of `slots`; where to go first."""
        if count <= 1:
            return 0.0, 0
        if slots == 1:
            return sum(through[first + done] - through[first] for done in range(1, count)), 0
        return min(
            (
                through[first + ahead]
                - through[first]
                + best(first + ahead, count - ahead, slots - 1)[0]
                + best(first, ahead, slots)[0],
                ahead,
            )
            for ahead in range(1, count)
        )

    raw: list[tuple[Action, int, str]] = []

    def advance(start: int, end: int) -> None:
        raw.extend(("compute", at, "host") for at in range(start, end))

    def reverse(first: int, count: int, slots: int) -> None:
        while count > 1 and slots > 1:
            ahead = best(first, count, slots)[1]
            advance(first, first + ahead)
            reverse(first + ahead, count - ahead, slots - 1)
            count = ahead
        for done in range(count, 0, -1):
            advance(first, first + done - 1)
            raw.append(("compute", 2 * (steps - 1) - (first + done - 1), "host"))

    total = best(0, steps, checkpoints)[0]
    reverse(0, steps, checkpoints)
    schedule = Schedule(steps=with_frees(problem, raw, budget_bytes), policy="optimal")
    return schedule, total + problem.compute_seconds - through[-1]
