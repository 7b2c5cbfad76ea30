"""What a rank holds along one step, and what takes most of it, in words: the figures of `residency.py`, told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from headway.plan.plan import Plan
from headway.predict.prediction import Memory
from headway.timeline import Timeline
from headway.units import format_bytes

if TYPE_CHECKING:
    from headway.predict.step import Predictor

__all__ = ["explain", "memory_over_time"]

_KINDS = {
    "parameters_bytes": "parameters",
    "gradients_bytes": "gradients",
    "optimizer_bytes": "optimizer states",
    "activations_bytes": "activations",
    "communication_bytes": "communication buffers",
    "workspace_bytes": "temporaries and what the allocator cannot use",
    "outside_bytes": "CUDA context and NCCL",
}


def memory_over_time(
    predictor: Predictor, plan: Plan, pipeline_rank: int, timeline: Timeline | None = None
) -> list[tuple[float, Memory]]:
    """Bytes by kind on the fullest device of a pipeline rank along one step: (seconds, what holds from then on).

    `timeline` says when micro-batches go forward and backward (a predicted or a simulated one, of this plan); without,
    the predicted one. A micro-batch's activations come when it goes forward and leave when it has gone backward. The
    largest total is the predicted peak if as many micro-batches are there as the schedule holds at most.
    """
    residency = predictor.residency
    timeline = timeline or predictor.timeline(plan)
    first = plan.first_rank(pipeline_rank)
    ranks = range(first, first + plan.width(pipeline_rank))
    memory = residency.memory(plan)
    fullest = max(ranks, key=lambda rank: memory[rank].total_bytes)
    peak = memory[fullest]
    shards, samples = residency.shards_of(plan, pipeline_rank), plan.samples_of(pipeline_rank)
    held = plan.stages_of(pipeline_rank)
    kept = {at: residency.activations(plan, plan.stages[at], samples, shards).kept for at in held}
    most = sum(kept[at] * flight for at, flight in zip(held, residency.flights(plan, pipeline_rank), strict=True))
    # Offloading and gradients that take the place of activations leave less than what is kept; inputs stay throughout.
    scale = min(1.0, peak.activations_bytes / most) if most else 0.0
    resting = peak.activations_bytes - most * scale
    lane = f"rank {fullest}/compute"
    events: list[tuple[float, int, float, int]] = []  # (seconds, order, activations, at work)
    for span in timeline.spans:
        if span.lane != lane or span.kind not in ("forward", "backward", "optimizer"):
            continue
        comes = goes = 0.0
        if span.kind == "forward":
            comes = kept[int(span.detail["stage"])] * scale
        elif span.kind == "backward":
            goes = -kept[int(span.detail["stage"])] * scale
        end = span.start_seconds + span.duration_seconds
        events.append((span.start_seconds, 1, comes, 1))
        events.append((end, 0, goes, -1))
    idle = msgspec.structs.replace(peak, activations_bytes=resting, workspace_bytes=0.0)
    points: list[tuple[float, Memory]] = [(0.0, idle)]
    activations, working = 0.0, 0
    for seconds, _, change, work in sorted(events):
        activations += change
        working += work
        now = msgspec.structs.replace(
            peak,
            activations_bytes=resting + max(0.0, activations),
            workspace_bytes=peak.workspace_bytes if working else 0.0,
        )
        if points[-1][0] == seconds:
            points[-1] = (seconds, now)
        else:
            points.append((seconds, now))
    return points


def explain(predictor: Predictor, plan: Plan, pipeline_rank: int = -1) -> str:
    """What takes most on the fullest device (of a pipeline rank, or with -1 of all), in one or two sentences."""
    residency = predictor.residency
    memory = residency.memory(plan)
    ranks = range(plan.world_size)
    if pipeline_rank >= 0:
        first = plan.first_rank(pipeline_rank)
        ranks = range(first, first + plan.width(pipeline_rank))
    rank = max(ranks, key=lambda at: memory[at].total_bytes)
    peak = memory[rank]
    parts = sorted(((getattr(peak, field), name) for field, name in _KINDS.items()), reverse=True)
    total = max(peak.total_bytes, 1.0)
    listed = ", ".join(f"{name} {format_bytes(size)}" for size, name in parts[1:3] if size > 0.01 * total)
    text = f"Rank {rank} holds {format_bytes(peak.total_bytes)}: {parts[0][1]} take most, {format_bytes(parts[0][0])}"
    text += f" ({parts[0][0] / total:.0%})" + (f", then {listed}." if listed else ".")
    if parts[0][1] == "activations" and plan.pipeline > 1:
        pipeline = plan.coordinates(rank)[0]
        flights = residency.flights(plan, pipeline)
        text += f" It is on pipeline rank {pipeline} and keeps {sum(flights)} micro-batches in flight."
    return text
