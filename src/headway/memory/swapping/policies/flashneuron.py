"""FlashNeuron: saved tensors go to an SSD, compressed where that shortens the transfer (Bae et al., FAST 2021).

The offloading scheduler (section 4.2) works in two phases. First it selects tensors in the order in which they are made
until the rest fits. If their transfers take longer than the computation that could hide them, it then prefers tensors
that compress well, in their compressed form. Here the compression is that of `Encoding`.
"""

from __future__ import annotations

from headway.memory.swapping.decisions import Decision, fit
from headway.memory.swapping.problem import Problem, Schedule

__all__ = ["flashneuron"]


def flashneuron(problem: Problem, budget_bytes: float) -> Schedule:
    """Swap to disk (to the first tier where there is no disk), in order, and compressed if that is faster."""
    tiers = [path.tier for path in problem.paths]
    tier = "disk" if "disk" in tiers else problem.path(tiers[0] if tiers else "disk").tier
    plain = [Decision(tensor=at, action="swap", tier=tier) for at in problem.saved]
    schedule, cost, _ = fit(problem, plain, budget_bytes, "flashneuron")
    if cost.waiting_seconds <= 0:
        return schedule
    compressed: list[tuple[float, Decision]] = []
    for at in problem.saved:
        encoding = problem.tensors[at].encoding
        ratio = encoding.ratio if encoding else 1.0
        compressed.append((ratio, Decision(tensor=at, action="swap", tier=tier, encoded=ratio < 1)))
    ranked = [decision for _, decision in sorted(compressed, key=lambda pair: pair[0])]
    other, other_cost, _ = fit(problem, ranked, budget_bytes, "flashneuron")
    return other if other_cost.seconds < cost.seconds else schedule
