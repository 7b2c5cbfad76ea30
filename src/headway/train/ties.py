"""Parameters that several stages of a pipeline hold, as tied weights are: where their copies are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import nn

from headway.workload.graph import Graph

if TYPE_CHECKING:
    from headway.train.rank import Parallel

__all__ = ["Tie", "make_ties"]


@dataclass
class Tie:
    """Copies of one parameter on this rank, held by several stages; `group` reaches the copies on other ranks."""

    copies: list[nn.Parameter]
    group: dist.ProcessGroup | None
    leads: bool  # this rank's first copy stands for all of them, in the norm and in checkpoints


def make_ties(parallel: Parallel, graph: Graph | None) -> list[Tie]:
    """Parameters that several stages read. Every rank of a holder's pipeline takes part in making their groups."""
    plan = parallel.plan
    if graph is None or len(plan.stages) == 1:
        return []
    holders: dict[str, list[int]] = {}
    for position, stage in enumerate(plan.stages):
        for name, parameter in graph.layer_parameters(stage.start, stage.stop).items():
            if parameter.trainable:
                holders.setdefault(name, []).append(position)
    ties = []
    groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
    mine: dict[tuple[int, str], nn.Parameter] = {
        (piece.position, name): parameter for piece in parallel.pieces for name, parameter in piece.parameters()
    }
    pipeline_rank, data, tensor = parallel.coordinates
    for name, positions in sorted(holders.items()):
        if len(positions) < 2:
            continue
        ranks = sorted({position % plan.pipeline for position in positions})
        if len(ranks) > 1:
            for d in range(plan.data):
                for t in range(plan.tensor):
                    members = tuple(plan.rank_of(p, d, t) for p in ranks)
                    if members not in groups:
                        made = dist.new_group(list(members))
                        groups[members] = made if isinstance(made, dist.ProcessGroup) else None
        copies = [mine[position, name] for position in positions if (position, name) in mine]
        if copies:
            members = tuple(plan.rank_of(p, data, tensor) for p in ranks)
            ties.append(Tie(copies, groups.get(members), leads=pipeline_rank == positions[0] % plan.pipeline))
    return ties
