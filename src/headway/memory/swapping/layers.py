"""What each layer of a plan does with its activations: a schedule as coarse as a `Stage` can say.

For each layer of a stage: keep its activations, recompute its attention core, recompute the layer, or swap what it
saved to the plan's tier for activations. Each choice leaves some bytes between forward and backward and costs some
seconds; the least seconds within the budget are found exactly, by merging layers one by one and keeping only what no
other choice beats in both.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from headway.errors import DoesNotFitError
from headway.memory.swapping.problem import Path
from headway.plan.plan import Plan, Stage
from headway.predict.latency import Latency
from headway.workload.graph import Graph, Layer

__all__ = ["LayerChoice", "layer_choices", "plan_layers"]

_MOST = 4000  # points of the frontier; beyond, the closest are merged, towards more bytes


class LayerChoice(NamedTuple):
    """One way to treat a layer: bytes of a micro-batch left between forward and backward, and seconds that it costs."""

    kind: str  # "keep", "attention", "recompute", "swap"
    bytes: float
    seconds: float


def layer_choices(
    graph: Graph, position: int, plan: Plan, latency: Latency, path: Path | None = None
) -> tuple[LayerChoice, ...]:
    """What can be done with the layer at `position`, in float32 terms of the traced graph.

    What is swapped hides behind the layer's own forward and backward; the rest of the transfer is exposed.
    """
    layer: Layer = graph.layers[position]
    samples = plan.micro_batch
    precision = plan.precision
    time = latency.layer_time(position, samples, precision=precision)
    saved = layer.saved.at(samples)
    choices = [LayerChoice("keep", saved, 0.0), LayerChoice("recompute", 0.0, time.forward_seconds)]
    if layer.attention is not None and layer.attention.core_saved.at(samples) > 0:
        left = saved - layer.attention.core_saved.at(samples)
        choices.append(LayerChoice("attention", max(0.0, left), time.attention_seconds))
    if path is not None:
        out = saved / path.write_bytes_per_second + path.latency_seconds
        back = saved / path.read_bytes_per_second + path.latency_seconds
        exposed = max(0.0, out - time.forward_seconds) + max(0.0, back - time.backward_seconds)
        choices.append(LayerChoice("swap", 0.0, exposed))
    return tuple(choices)


def plan_layers(
    graph: Graph, plan: Plan, budget_bytes: float, latency: Latency, *, path: Path | None = None
) -> tuple[Stage, ...]:
    """The plan's stages with `recompute`, `recompute_attention` and `swap` chosen anew.

    `budget_bytes`: for saved activations, on each device, of all micro-batches in flight (1F1B: as many as there are
    stages from this one on; GPipe: all). `path`: the way to the plan's tier for activations, without which nothing is
    swapped. Raises DoesNotFitError naming the stage if recomputing every layer is not enough.
    """
    stages: list[Stage] = []
    for at, stage in enumerate(plan.stages):
        in_flight = 1
        if plan.pipeline > 1:
            rest = max(1, plan.pipeline - at % plan.pipeline)
            in_flight = plan.micro_batches if plan.schedule == "gpipe" else min(plan.micro_batches, rest)
        choices = [layer_choices(graph, layer, plan, latency, path) for layer in range(stage.start, stage.stop)]
        # What crosses into a recomputed layer is kept: its input.
        inputs = sum(
            kind.bytes(plan.micro_batch)
            for kind in (graph.layers[layer].input for layer in range(stage.start, stage.stop))
            if kind is not None
        )
        chosen = _least(choices, budget_bytes / in_flight - inputs)
        if chosen is None:
            raise DoesNotFitError(
                f"activations of {in_flight} micro-batches need {inputs * in_flight:.4g} bytes with every layer "
                f"recomputed, and the budget is {budget_bytes:.4g}",
                place=f"stage {at}",
                remedy="use a smaller micro-batch or more stages",
            )
        layers: dict[str, list[int]] = {"keep": [], "recompute": [], "attention": [], "swap": []}
        for layer, kind in enumerate(chosen, start=stage.start):
            layers[kind].append(layer)
        stages.append(
            msgspec.structs.replace(
                stage,
                recompute=tuple(layers["recompute"]),
                recompute_attention=tuple(layers["attention"]),
                swap=tuple(layers["swap"]),
            )
        )
    return tuple(stages)


def _least(layers: list[tuple[LayerChoice, ...]], budget_bytes: float) -> list[str] | None:
    """The kinds with the least seconds in all whose bytes stay within the budget; None if none do."""
    # (bytes, seconds, how it was reached)
    frontier: list[tuple[float, float, tuple | None]] = [(0.0, 0.0, None)]
    for choices in layers:
        reached = [
            (bytes_ + choice.bytes, seconds + choice.seconds, (choice.kind, trail))
            for bytes_, seconds, trail in frontier
            for choice in choices
            if bytes_ + choice.bytes <= budget_bytes * (1 + 1e-12)
        ]
        reached.sort(key=lambda point: (point[0], point[1]))
        frontier = []
        for point in reached:
            if not frontier or point[1] < frontier[-1][1]:
                frontier.append(point)
        if len(frontier) > _MOST:
            every = len(frontier) / _MOST
            frontier = [frontier[int(at * every)] for at in range(_MOST - 1)] + [frontier[-1]]
    if not frontier or budget_bytes < 0:
        return None
    trail = min(frontier, key=lambda point: point[1])[2]
    kinds: list[str] = []
    while trail is not None:
        kinds.append(trail[0])
        trail = trail[1]
    return kinds[::-1]
