"""SwapAdvisor: a genetic search over the order of operations and over what is swapped (Huang et al., ASPLOS 2020).

A chromosome has a priority for each operation, which orders those that do not depend on each other, and for each saved
tensor whether it is swapped (section 5). Its fitness is the simulated time; one that is over the budget is repaired by
swapping more, largest first, as the swap planner evicts. Crossover cuts both strings at one point; mutation changes
single genes. With `reorder` off, the order stays as it was traced, which is what a runtime that does not own the order
can carry out.
"""

from __future__ import annotations

import heapq
import random
import time

from headway.memory.swapping.decisions import Decision, fit, prefetched, program, refuse
from headway.memory.swapping.pricing import price
from headway.memory.swapping.problem import Price, Problem, Schedule, Step, Tensor

__all__ = ["ordered", "swapadvisor"]

_POPULATION = 12
_Chromosome = tuple[tuple[float, ...], tuple[bool, ...]]


def swapadvisor(
    problem: Problem, budget_bytes: float, *, seed: int = 0, seconds: float = 20.0, reorder: bool = True
) -> Schedule:
    """The best schedule of a genetic search of `seconds`. Raises DoesNotFitError if swapping alone is not enough."""
    tier = problem.path(problem.paths[0].tier if problem.paths else "host").tier
    saved = problem.saved
    largest = sorted(saved, key=lambda at: -problem.tensors[at].bytes)
    schedule, cost, chosen = fit(
        problem, [Decision(tensor=at, action="swap", tier=tier) for at in largest], budget_bytes, "swapadvisor"
    )
    if not chosen:
        return schedule
    generator = random.Random(seed)
    count = len(problem.operations)
    swapped = {decision.tensor for decision in chosen}
    first: _Chromosome = (tuple(0.0 for _ in range(count)), tuple(at in swapped for at in saved))
    best, best_seconds = schedule, cost.seconds
    population: list[tuple[float, _Chromosome]] = [(cost.seconds, first)]
    end = time.monotonic() + seconds

    def evaluate(chromosome: _Chromosome) -> float:
        nonlocal best, best_seconds
        found, spent = _decode(problem, chromosome, budget_bytes, tier)
        over = max(0.0, spent.peak_bytes / budget_bytes - 1)
        if not over and spent.seconds < best_seconds:
            best, best_seconds = found, spent.seconds
        return spent.seconds if not over else 1e6 * (1 + over)

    while time.monotonic() < end:
        if len(population) < _POPULATION:
            child = _mutated(first, generator, reorder, 0.1)
        else:
            one, two = (min(generator.sample(population, 3), key=lambda pair: pair[0])[1] for _ in range(2))
            cut, place = generator.randrange(count), generator.randrange(len(saved))
            child = (one[0][:cut] + two[0][cut:], one[1][:place] + two[1][place:])
            child = _mutated(child, generator, reorder, 0.02)
        population.append((evaluate(child), child))
        if len(population) > 2 * _POPULATION:
            population.sort(key=lambda pair: pair[0])
            del population[_POPULATION:]
    if best_seconds == float("inf"):
        raise refuse(problem, "swapadvisor", cost.peak_bytes, budget_bytes)
    return best


def _mutated(chromosome: _Chromosome, generator: random.Random, reorder: bool, rate: float) -> _Chromosome:
    order, bits = chromosome
    if reorder:
        order = tuple(generator.gauss(gene, 2.0) if generator.random() < rate else gene for gene in order)
    return order, tuple(bit != (generator.random() < rate) for bit in bits)


def _decode(problem: Problem, chromosome: _Chromosome, budget_bytes: float, tier) -> tuple[Schedule, Price]:
    order, bits = chromosome
    decisions = [Decision(tensor=at, action="swap", tier=tier) for at, bit in zip(problem.saved, bits) if bit]
    permutation = None
    if any(order):
        permutation, problem_then = ordered(problem, order)
    else:
        problem_then = problem
    schedule = program(problem_then, prefetched(problem_then, decisions, budget_bytes), budget_bytes, "swapadvisor")
    spent = price(problem_then, schedule)
    if permutation is not None:
        schedule = Schedule(
            steps=tuple(
                Step(action=step.action, index=permutation[step.index]) if step.action.startswith("compute") else step
                for step in schedule.steps
            ),
            policy=schedule.policy,
        )
    return schedule, spent


def ordered(problem: Problem, priorities: tuple[float, ...]) -> tuple[list[int], Problem]:
    """Operations in another order that their dependencies allow: an operation moves by its priority's worth of places.

    Forward stays before backward, and what overwrites a tensor after what reads it. Returns for each new position the
    old one, and the problem in that order.
    """
    operations = problem.operations
    stop = problem.forward_stop
    waits: list[set[int]] = [set() for _ in operations]
    for position, operation in enumerate(operations):
        for tensor in operation.inputs:
            if problem.tensors[tensor].maker >= 0:
                waits[position].add(problem.tensors[tensor].maker)
        if operation.overwrites >= 0:
            waits[position].update(at for at in problem.readers[operation.overwrites] if at < position)
    followers: list[list[int]] = [[] for _ in operations]
    for position, sources in enumerate(waits):
        for source in sources:
            followers[source].append(position)
    left = [len(sources) for sources in waits]
    ready = [(at >= stop, at + priorities[at], at) for at in range(len(operations)) if not left[at]]
    heapq.heapify(ready)
    permutation: list[int] = []
    while ready:
        position = heapq.heappop(ready)[2]
        permutation.append(position)
        for follower in followers[position]:
            left[follower] -= 1
            if not left[follower]:
                heapq.heappush(ready, (follower >= stop, follower + priorities[follower], follower))
    place = {old: new for new, old in enumerate(permutation)}
    tensors = tuple(
        tensor
        if tensor.maker < 0
        else Tensor(name=tensor.name, bytes=tensor.bytes, maker=place[tensor.maker], encoding=tensor.encoding)
        for tensor in problem.tensors
    )
    return permutation, Problem(
        name=problem.name,
        operations=tuple(operations[old] for old in permutation),
        tensors=tensors,
        paths=problem.paths,
        streams=problem.streams,
    )
