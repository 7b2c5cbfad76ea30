"""vDNN: the inputs of layers go to the host in forward and come back in backward (Rhu et al., MICRO 2016).

The transfer out runs beside the layer that reads the tensor last, and the next layer waits until it has ended (section
III-C). In backward, a tensor begins to come back when the layer before, in backward's order, begins. What is moved does
not depend on the budget, except that nothing is when everything fits, as the dynamic variant finds first.
"""

from __future__ import annotations

import bisect

from headway.memory.swapping.decisions import Decision, backward_gap, program, refuse
from headway.memory.swapping.pricing import price
from headway.memory.swapping.problem import EXPENSIVE_KINDS, Problem, Schedule

__all__ = ["all_layers", "convolutions"]


def convolutions(problem: Problem, budget_bytes: float) -> Schedule:
    """vDNN-conv: the inputs of convolutions (of matrix products, where a model has no convolutions)."""
    kinds = {operation.kind for operation in problem.operations}
    wanted = {"convolution"} if "convolution" in kinds else {"matmul", "attention"}
    stop = problem.forward_stop
    moved = {
        at
        for at in problem.saved
        if any(problem.operations[reader].kind in wanted for reader in problem.readers[at] if reader < stop)
    }
    return _schedule(problem, budget_bytes, moved, "vdnn-conv")


def all_layers(problem: Problem, budget_bytes: float) -> Schedule:
    """vDNN-all: every tensor that forward leaves for backward."""
    return _schedule(problem, budget_bytes, set(problem.saved), "vdnn-all")


def _schedule(problem: Problem, budget_bytes: float, moved: set[int], policy: str) -> Schedule:
    schedule = program(problem, (), policy=policy)
    if price(problem, schedule).peak_bytes <= budget_bytes:
        return schedule
    tier = problem.paths[0].tier if problem.paths else "host"
    problem.path(tier)
    stop = problem.forward_stop
    # Where each layer's backward begins.
    layers = [at for at, operation in enumerate(problem.operations) if at >= stop and operation.kind in EXPENSIVE_KINDS]
    decisions: list[Decision] = []
    for at in sorted(moved, key=lambda tensor: backward_gap(problem, tensor).after):
        gap = backward_gap(problem, at)
        before = bisect.bisect_left(layers, gap.after) - 1
        # One layer ahead: while that layer works, this one's input comes.
        begin = layers[before] if before >= 0 else stop
        decisions.append(Decision(tensor=at, action="swap", tier=tier, out_at=gap.before - 1, in_at=begin))
    schedule = program(problem, decisions, 0.0, policy)
    peak = price(problem, schedule).peak_bytes
    if peak > budget_bytes:
        raise refuse(problem, policy, peak, budget_bytes)
    return schedule
