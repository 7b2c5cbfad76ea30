"""SuperNeurons: expensive layers' outputs go to a pool on the host, cheap ones are computed again (PPoPP 2018).

Wang et al. find (section 3) that convolutions and fully connected layers take nearly all the time and hold half of the
memory: what pooling, activation and normalization make between them is recomputed, and they themselves are checkpoints,
offloaded when room is needed all the same, oldest first (the tensor cache of section 3.3.2). So are the joins of
branches: to recompute one would mean to recompute the network up to it. Cost-aware recomputation (section 3.4): a
segment whose tensors fit into the working set of the largest layer is recomputed once and kept (speed-centric);
otherwise each backward layer recomputes what it needs (memory-centric).
"""

from __future__ import annotations

from headway.memory.swapping.decisions import Decision, fit
from headway.memory.swapping.problem import EXPENSIVE_KINDS, Problem, Schedule

__all__ = ["superneurons"]


def superneurons(problem: Problem, budget_bytes: float) -> Schedule:
    """Recompute cheap segments, then offload checkpoints, oldest first, as far as the budget makes it necessary."""
    largest = problem.bytes_needed
    saved = set(problem.saved)
    swaps: list[Decision] = []
    cheap: list[Decision] = []
    segment: list[int] = []
    tier = problem.paths[0].tier if problem.paths else None

    def close() -> None:
        retain = sum(problem.tensors[at].bytes for at in segment) <= largest
        cheap.extend(Decision(tensor=at, action="recompute", retain=retain) for at in segment)
        segment.clear()

    for at in problem.saved:
        maker = problem.operations[problem.tensors[at].maker]
        if maker.kind in EXPENSIVE_KINDS or not maker.repeatable or _is_join(problem, at, saved):
            close()
            if tier is not None:
                swaps.append(Decision(tensor=at, action="swap", tier=tier))
        else:
            segment.append(at)
    close()
    return fit(problem, [*cheap, *swaps], budget_bytes, "superneurons")[0]


def _is_join(problem: Problem, tensor: int, saved: set[int]) -> bool:
    """Whether a tensor sums or concatenates branches, possibly through operations whose results are not saved."""
    stack = [tensor]
    while stack:
        maker = problem.operations[problem.tensors[stack.pop()].maker]
        sources = [at for at in maker.inputs if problem.tensors[at].bytes > 0]
        if maker.kind == "other" and len(sources) > 1:
            return True
        stack.extend(at for at in sources if at not in saved and problem.tensors[at].maker >= 0)
    return False
