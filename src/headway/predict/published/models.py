"""The models of published measurements: what is known of each family, and the transformer of a row's sizes."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal, NamedTuple

from headway.errors import HeadwayError
from headway.predict.published.cells import Line
from headway.predict.published.frameworks import Framework
from headway.workload.graph import Graph
from headway.workload.transformer import TransformerShape, transformer

__all__ = ["graph_of", "shape_of"]


class _Architecture(NamedTuple):
    """What a family of models is known by: facts of its published configuration."""

    pattern: str
    vocabulary: int = 0
    gated: bool = False
    tied: bool = True
    positions: Literal["learned", "rotary", "none"] = "learned"
    kv_heads: dict[int, int] = {}  # by hidden; others: as many as heads
    ffn: dict[int, int] = {}  # by hidden; others: 4 x hidden
    experts: int = 0
    chosen: int = 0
    expert_ffn: int = 0
    head_width: int = 0


_LLAMA_3 = {4096: 14336, 8192: 28672, 16384: 53248}
_ARCHITECTURES = (
    _Architecture(r"llama-?3", 128256, True, False, "rotary", dict.fromkeys(_LLAMA_3, 8), _LLAMA_3),
    _Architecture(
        r"llama", 32000, True, False, "rotary", {8192: 8}, {4096: 11008, 5120: 13824, 6656: 17920, 8192: 28672}
    ),
    _Architecture(r"mpt", 50368),
    _Architecture(r"bloom", 250880, positions="none"),
    _Architecture(r"mixtral.*8x7", 32000, True, False, "rotary", {4096: 8}, {4096: 14336}, 8, 2),
    _Architecture(r"mixtral.*8x22", 32768, True, False, "rotary", {6144: 8}, {6144: 16384}, 8, 2),
    _Architecture(r"qwen3.*30b.*a3b", 151936, True, False, "rotary", {2048: 4}, {2048: 6144}, 128, 8, 768, 128),
    _Architecture(r"qwen3.*235b", 151936, True, False, "rotary", {4096: 4}, {4096: 12288}, 128, 8, 1536, 128),
    _Architecture(r"gpt(?!.*oss)"),
)
# Vocabularies and heads that a source uses throughout, as its scripts say.
_VOCABULARIES = (("bigscience", 50257), ("vtrain", 50257), ("dlperf", 51200), ("sc21", 51200))
_HEADS = (("experiments/gpt2", 32), ("tr11-176b", 64))


def shape_of(line: Line, framework: Framework, tensor: int) -> TransformerShape | None:
    """The sizes of the model, padded as the framework does for `tensor` ranks; None: `line` says why not."""
    name, source = line.text("model").lower(), line.text("source").lower()
    known = next((one for one in _ARCHITECTURES if re.search(one.pattern, name)), None)
    if known is None:
        line.refuse(f"model: the architecture of {line.text('model')!r} is not known")
        return None
    hidden = line.number("hidden")
    usual_heads = next((count for word, count in _HEADS if word in source), None)
    heads = line.number("heads", usual_heads, "as in the scripts of the source")
    kv_heads = line.number("kv_heads", known.kv_heads.get(hidden, heads), "of this model")
    ffn = line.number("ffn", known.ffn.get(hidden, 4 * hidden), "of this model")
    usual = known.vocabulary or next((size for word, size in _VOCABULARIES if word in source), 0)
    vocabulary = line.number("vocab", usual or None, "of this model")
    if line.text("ep") not in ("", "1") and not known.experts:
        line.refuse("ep: the experts of this model are not known")
    if framework.pads_vocabulary:
        vocabulary = -(-vocabulary // (128 * tensor)) * 128 * tensor
    shape = TransformerShape(
        layers=line.number("layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_width=known.head_width,
        ffn=ffn,
        vocabulary=vocabulary,
        sequence=line.number("seq"),
        gated=known.gated,
        tied=known.tied,
        biases=not known.gated,
        positions=known.positions,
        norm="rms" if known.gated else "layer",
        dropout=framework.dropout and not known.gated,
        experts=known.experts,
        experts_chosen=known.chosen,
        expert_ffn=known.expert_ffn or (ffn if known.experts else 0),
        attention=framework.recipe.attention,
        fused=framework.recipe.compiled,
        packed=framework.packed,
    )
    try:
        return shape.completed()
    except HeadwayError as error:
        line.refuse(f"{error.place.rpartition(': ')[2]}: {error.message}")
        return None


@lru_cache(maxsize=256)
def graph_of(shape: TransformerShape, name: str) -> Graph:
    """The transformer of these sizes, made once."""
    return transformer(shape, name)
