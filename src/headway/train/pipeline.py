"""A rank's part of the pipeline: torch's stages and schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from headway.train.measure import Meter
from headway.workload.graph import Graph, TensorKind

if TYPE_CHECKING:
    from headway.train.rank import Parallel

__all__ = ["make_schedule"]


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
