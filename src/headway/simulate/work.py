"""What a team of a training step has to do, in seconds, as it is played: its stages, and what comes once in a step.

The predictor says how long each thing takes (`Predictor.parts`); here that is told apart layer by layer, because
parameters are gathered and gradients leave between the layers of a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from headway.hardware.cluster import Accelerator
from headway.plan.plan import Plan
from headway.predict.parts import RankParts, StageParts
from headway.predict.step import Predictor
from headway.simulate.played import StageWork

__all__ = ["Work", "work_of"]


class Work(NamedTuple):
    """What a team does: its stages by position, and what comes once in a step."""

    stages: dict[int, StageWork]
    once: RankParts
    overlaps: bool  # communication goes on beside compute
    slowdown: float  # seconds that compute loses for each second of communication beside it


def work_of(predictor: Predictor, plan: Plan, rank: int, kinds: tuple[Accelerator, ...]) -> Work:
    """The work of pipeline rank `rank` on devices of these kinds."""
    times = predictor.stages
    layout = times.layouts.of(plan)
    channels = layout.channels[rank]
    overlaps = times.overlaps(plan, kinds)
    return Work(
        {
            at: _stage_of(predictor, plan, at, times.parts(plan, at, kinds, channels), kinds[0], overlaps)
            for at in plan.stages_of(rank)
        },
        predictor.replicas.parts(plan, rank, kinds, channels, layout.along),
        overlaps,
        times.slowdown(kinds[0]),
    )


def _stage_of(
    predictor: Predictor, plan: Plan, position: int, parts: StageParts, kind: Accelerator, overlaps: bool
) -> StageWork:
    times = predictor.stages
    stage = plan.stages[position]
    rank = position % plan.pipeline
    shards = times.shards_of(plan, rank)
    share = plan.samples_of(rank) / plan.context
    columns = times.layer_times(kind, plan.world_size > 1, share, shards, plan.precision)
    layers = range(stage.start, stage.stop)
    weight = parts.backward_weight if plan.schedule == "zero_bubble" else 0.0
    hidden = overlaps and plan.zero_stage >= 2
    exchanges = [("tensor", parts.tensor), ("context", parts.context), ("expert", parts.expert)]
    exchanges.append(("copies", parts.transfer))
    if not hidden:
        exchanges += [("gather", parts.gather), ("scatter", parts.scatter)]
    sizes = [predictor.sizes.parameters(at, at + 1, shards, plan.expert) for at in layers]
    held = _shares([size.bytes for size in sizes])
    gradients = [times.gradient_bytes(size) for size in sizes]
    there, back = (), ()
    scatters: tuple[float, ...] = ()
    if hidden:
        there, back = (
            tuple(each * seconds for each in held) if seconds else ()
            for seconds in (parts.gather.forward, parts.gather.backward)
        )
        scatters = tuple(each * parts.scatter.backward for each in _shares(gradients))
    return StageWork(
        compute=(parts.forward, parts.backward - weight, weight),
        inside=(
            tuple((lane, each.exposed_forward) for lane, each in exchanges if each.exposed_forward),
            tuple((lane, each.exposed_backward) for lane, each in exchanges if each.exposed_backward),
            (),
        ),
        layers=(
            _shares([columns.forward[at + 1] - columns.forward[at] for at in layers]),
            _shares([columns.backward[at + 1] - columns.backward[at] for at in layers]),
        ),
        gathers=(there, back),
        scatters=scatters,
        gradients=tuple(gradients),
    )


def _shares(values: Sequence[float]) -> tuple[float, ...]:
    total = sum(values)
    return tuple(value / total for value in values) if total else (1 / len(values),) * len(values)
