"""The plans of published measurements: stages, recomputation, sharding and where states rest."""

from __future__ import annotations

import itertools
import re
from typing import Literal

from headway.errors import HeadwayError
from headway.hardware.cluster import Cluster
from headway.plan.plan import Plan, Stage
from headway.predict.published.cells import Line
from headway.predict.published.frameworks import Framework
from headway.workload.graph import Graph
from headway.workload.transformer import TransformerShape

__all__ = ["kind_of", "plan_of"]


def _cuts(line: Line, layers: int, chunks: int) -> list[int]:
    """Where the stages begin, in layers of the graph: the embedding, `layers` blocks, the head.

    Equal numbers of blocks where they divide; else equal numbers with the embedding and the head counted as one layer
    each, as Megatron and torchtitan do it; else as equal as can be, the ends of the pipeline lightest.
    """
    if layers % chunks == 0:
        each = layers // chunks
        return [0, *(1 + at * each for at in range(1, chunks)), layers + 2]
    if (layers + 2) % chunks == 0:
        return [at * ((layers + 2) // chunks) for at in range(chunks + 1)]
    if layers + 2 < chunks:
        line.refuse(f"pp: {chunks} stages for {layers} layers")
        return [0, layers + 2]
    line.assumed.append(f"{layers} layers over {chunks} stages as evenly as they go")
    small, more = divmod(layers + 2, chunks)
    first = (chunks - more) // 2
    sizes = [small + (first <= at < first + more) for at in range(chunks)]
    return [sum(sizes[:at]) for at in range(chunks + 1)]


def _recomputed(line: Line, framework: Framework, start: int, stop: int, layers: int) -> tuple[tuple[int, ...], ...]:
    """(layers run again, layers of which attention is run again) of a stage; embedding and head never are."""
    word = line.text("recompute").lower()
    blocks = tuple(range(max(start, 1), min(stop, layers + 1)))
    if word in ("full", "true", "yes"):
        return blocks, ()
    if word in ("selective", "selective-op") and framework.recipe.framework != "fsdp":
        # For torchtitan that is its selection by operator: `predict` keeps every other matrix product.
        return (), blocks
    if word in ("selective", "selective-layer", "selective-op"):
        if word != "selective-layer":
            line.assumed.append("selective checkpointing by operator taken as every other layer")
        return tuple(at for at in blocks if at % 2), ()
    if word not in ("none", "false", "no", ""):
        line.refuse(f"recompute: {word!r} is not full, selective, selective-layer or none")
    if not word:
        line.assumed.append("recompute = none (not stated)")
    return (), ()


def plan_of(
    line: Line, framework: Framework, shape: TransformerShape, graph: Graph, cluster: Cluster, precision,
    degrees: tuple[int, ...],
) -> Plan | None:  # fmt: skip
    """The plan with these degrees (tp, pp, dp, cp, ep, virtual stages, ZeRO stage); None: `line` says why not."""
    tp, pp, dp, cp, ep, virtual, zero = degrees
    cuts = _cuts(line, shape.layers, pp * virtual)
    stages = []
    for start, stop in itertools.pairwise(cuts):
        again, attention = _recomputed(line, framework, start, stop, shape.layers)
        stages.append(Stage(start=start, stop=stop, recompute=again, recompute_attention=attention))
    sharding: dict[str, Literal["column", "row"]] = {}
    if tp > 1:
        for block in graph.blocks:
            if block.divisor % tp == 0:
                sharding |= dict.fromkeys(block.columns, "column")
                sharding |= dict.fromkeys(block.rows, "row")
            elif block.columns and block.rows:
                line.refuse(f"tp: {tp} ranks cannot share {block.divisor} heads or features")
                return None
    batch, micro = line.number("global_batch"), line.number("micro_batch")
    count = batch // (micro * dp)
    schedule = "none" if pp == 1 else "interleaved" if virtual > 1 else "1f1b" if count >= pp else "gpipe"
    offload = _offload(line, zero)
    plan = Plan(
        model=graph.name,
        devices=tuple(device.name for device in cluster.devices[: tp * pp * dp * cp]),
        global_batch=batch,
        micro_batch=micro,
        stages=tuple(stages),
        data=dp,
        tensor=tp,
        pipeline=pp,
        context=cp,
        expert=ep,
        schedule=schedule,
        zero_stage=zero if dp * cp > 1 else 0,  # type: ignore[arg-type]
        tensor_sharding=sharding,
        precision=precision,
        overlap=framework.overlaps or zero >= 2,
        sequence_parallel=framework.sequence_parallel and tp > 1,
        **offload,
    )
    try:
        return plan.validate(graph)
    except HeadwayError as error:
        line.refuse(f"{error.place.rpartition(': ')[2]}: {error.message}")
        return None


def _offload(line: Line, zero: int) -> dict:
    """Where states rest, by the words of the notes (and, of one source, of its scripts)."""
    notes, source = line.text("notes").lower(), line.text("source").lower()
    found = {}
    if "cpuoffload=true" in notes.replace(" ", ""):
        found["activations_on"] = "host"
    if "experiments/gpt2" in source and zero == 3 and "megatron" in notes:
        line.assumed.append("activations on host (--checkpoint-in-cpu in the scripts of the source)")
        found["activations_on"] = "host"
    if re.search(r"optim\w* (cpu )?offload", notes):
        found["optimizer_on"] = "host"
    if re.search(r"(full|param\w*) (cpu )?offload", notes):
        found |= {"optimizer_on": "host", "parameters_on": "host"}
    return found


def kind_of(plan: Plan) -> str:
    """`"tensor+pipeline+data"`, `"ZeRO-3"`, `"one device"`."""
    zero = f"ZeRO-{plan.zero_stage}" if plan.zero_stage >= 2 else "data"
    names = {"tensor": plan.tensor, "pipeline": plan.pipeline, "context": plan.context, "expert": plan.expert}
    words = [name for name, degree in names.items() if degree > 1]
    return "+".join([*words, zero] if plan.data > 1 else words) or "one device"
