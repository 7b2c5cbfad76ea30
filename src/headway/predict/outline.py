"""What of a plan its times and its memory depend on, rank by rank: worked out once for both."""

from __future__ import annotations

from typing import NamedTuple

from headway.plan.plan import Plan
from headway.predict.memory import Alike, Sizes
from headway.predict.operators import Shards
from headway.predict.splits import Splits

__all__ = ["Outline", "outline_of"]


class Outline(NamedTuple):
    """A plan by classes of stages, so that what costs the same is looked up under the same small key.

    For each pipeline rank `shards`, the `samples` of a micro-batch on one of its ranks, and the numbers of the classes
    of the stages that it holds. For each stage its class (`Sizes.alike`).
    """

    shards: tuple[Shards, ...]
    samples: tuple[float, ...]
    held: tuple[tuple[int, ...], ...]
    stages: tuple[Alike, ...]


def outline_of(plan: Plan, sizes: Sizes, splits: Splits) -> Outline:
    """The outline of a plan."""
    p = plan.pipeline
    if plan.is_uniform:
        shards = (splits.of(plan),) * p
        samples = (float(plan.micro_batch),) * p
        stages = sizes.alike(plan.stages, shards[0])
    else:
        shards = tuple(splits.of(plan, rank) for rank in range(p))
        samples = tuple(plan.samples_of(rank) for rank in range(p))
        stages = [sizes.alike((stage,), shards[at % p])[0] for at, stage in enumerate(plan.stages)]
    numbers = [stage.number for stage in stages]
    return Outline(shards, samples, tuple(tuple(numbers[rank::p]) for rank in range(p)), tuple(stages))
