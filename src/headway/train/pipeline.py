"""A rank's part of the pipeline: torch's stages and schedule, and parameters that several stages hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from headway.train.measure import Meter
from headway.workload.graph import Graph, TensorKind

if TYPE_CHECKING:
    from headway.train.rank import Parallel

__all__ = ["Tie", "make_schedule", "make_ties"]


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


def make_schedule(parallel: Parallel, graph: Graph) -> tuple[list[PipelineStage], Any]:
    """The stages of this rank, and what runs micro-batches through them as the plan's schedule says."""
    plan, group = parallel.plan, parallel.group("pipeline")
    stages: list[PipelineStage] = []
    for piece in parallel.pieces:
        stage = plan.stages[piece.position]
        received = None if stage.start == 0 else graph.layers[stage.start].input
        handed_on = None if piece.module.is_last else graph.layers[stage.stop].input
        made = _MeasuredStage(
            piece.wrapped,
            piece.position,
            len(plan.stages),
            parallel.device,
            input_args=() if received is None else (_example(received, plan.micro_batch),),
            output_args=(_example(handed_on, plan.micro_batch),),
            group=group,
        )
        made.meter = parallel.meter
        stages.append(made)
    make: Any = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}[plan.schedule]
    schedule = make(
        stages if plan.schedule == "interleaved" else stages[0],
        plan.micro_batches,
        loss_fn=lambda loss, _number: loss,  # the last stage has computed it
    )
    return stages, schedule


def _example(kind: TensorKind | None, samples: int) -> torch.Tensor:
    if kind is None:
        return torch.empty((), device="meta", requires_grad=True)
    return torch.empty(kind.shape(samples), dtype=getattr(torch, kind.dtype), device="meta", requires_grad=True)


class _MeasuredStage(PipelineStage):
    """A stage that tells the meter when it computes."""

    meter: Meter

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self.meter.section("forward", f"forward {fwd_chunk_id} (stage {self.stage_index})"):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self.meter.section("backward", f"backward {bwd_chunk_id} (stage {self.stage_index})"):
            return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def perform_reduce_grad(self, grad_scale_factor: int) -> Any:
        with self.meter.section("backward", f"reduce gradients (stage {self.stage_index})"):
            return super().perform_reduce_grad(grad_scale_factor)
