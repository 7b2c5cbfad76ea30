"""Where a pipeline is cut: consecutive layers on each stage so that the slowest stage is as fast as it can be.

The classical linear partition problem, solved exactly by dynamic programming over (stages, layers) as in PipeDream
(Narayanan et al., SOSP 2019, section 3.1). A stage may cost different things on different devices, and a stage that
would not fit into its device's memory can be forbidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["balanced_cuts", "stage_costs"]


def stage_costs(layer_costs: Sequence[float] | np.ndarray) -> np.ndarray:
    """`costs[j, i]`: the sum of layers j to i (exclusive) for j < i, and infinity elsewhere; shape (n + 1, n + 1)."""
    before = np.concatenate(([0.0], np.cumsum(np.asarray(layer_costs, dtype=float))))
    costs = before[None, :] - before[:, None]
    costs[np.tril_indices(len(before))] = np.inf
    return costs


def balanced_cuts(costs: Sequence[np.ndarray]) -> tuple[int, ...] | None:
    """Where each stage begins, and the number of layers at the end: `len(costs) + 1` positions.

    `costs[s][j, i]` is what layers j to i (exclusive) cost on stage s; infinity forbids them there. Minimises the
    largest cost of a stage; among those cuts the sum of squares, so that the others are even too; among those, the
    earlier stages are the lighter ones, because they keep more micro-batches in flight. None if every cut is forbidden.
    Takes O(stages x layers^2), in numpy.
    """
    largest = _bottleneck(costs)
    if not np.isfinite(largest):
        return None
    count = len(costs[0]) - 1
    best = np.full(count + 1, np.inf)
    best[0] = 0.0
    choices = []
    for cost in costs:
        # In units of the bottleneck and rounded: sums of equal layers must not differ by the order of additions.
        share = np.round(cost / largest, 9) if largest > 0 else np.where(np.isfinite(cost), 0.0, np.inf)
        share[share > 1 + 1e-8] = np.inf
        through = best[:, None] + share**2
        through = np.round(through, 9)
        # argmin takes the first: the smallest j, which is the heaviest last stage.
        choice = np.argmin(through, axis=0)
        best = through[choice, np.arange(count + 1)]
        choices.append(choice)
    cuts = [count]
    for choice in reversed(choices):
        cuts.append(int(choice[cuts[-1]]))
    return tuple(reversed(cuts))


def _bottleneck(costs: Sequence[np.ndarray]) -> float:
    """The least possible cost of the most costly stage."""
    count = len(costs[0]) - 1
    best = np.full(count + 1, np.inf)
    best[0] = 0.0
    for cost in costs:
        best = np.min(np.maximum(best[:, None], cost), axis=0)
    return float(best[count])
