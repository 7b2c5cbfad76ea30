"""Gist: saved tensors wait for backward in a lossless encoding (Jain et al., ISCA 2018).

Which tensors have one follows from what backward reads of them (`building.with_encodings`). Nothing is moved and
nothing is computed again, so the budget cannot go below what the encodings leave.
"""

from __future__ import annotations

from headway.memory.swapping.decisions import Decision, fit
from headway.memory.swapping.problem import Problem, Schedule

__all__ = ["gist"]


def gist(problem: Problem, budget_bytes: float) -> Schedule:
    """Encode what saves most bytes for each second of encoding and decoding first, until the budget is met."""

    def gain(at: int) -> float:
        encoding = problem.tensors[at].encoding
        assert encoding is not None
        return problem.tensors[at].bytes * (1 - encoding.ratio) / max(encoding.seconds, 1e-12)

    able = [at for at in problem.saved if problem.tensors[at].encoding is not None]
    ranked = [Decision(tensor=at, action="encode") for at in sorted(able, key=lambda at: -gain(at))]
    return fit(problem, ranked, budget_bytes, "gist")[0]
