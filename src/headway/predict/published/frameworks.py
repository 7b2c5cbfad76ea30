"""What a source's framework does with numbers and kernels, by the words of the source and of the notes."""

from __future__ import annotations

from typing import Literal, NamedTuple

from headway.predict.published.cells import Line, precision_of
from headway.workload.graph import OptimizerKind, Recipe

__all__ = ["Framework", "framework_of"]


class Framework(NamedTuple):
    """How a source's framework runs a model: what of it the tables do not say in columns."""

    recipe: Recipe
    optimizer: OptimizerKind
    dropout: bool = False
    packed: bool = False
    sequence_parallel: bool = False
    overlaps: bool = True  # gradients are reduced while backward goes on
    pads_vocabulary: bool = False  # to a multiple of 128 x tensor (Megatron)


# Mixed precision as Megatron and DeepSpeed keep it: 16-bit parameters, a float32 master copy beside Adam's moments,
# one fused kernel that reads gradient, master and moments and writes master, moments and parameter.
_FUSED_ADAM = OptimizerKind(traffic_bytes_per_element=30.0, temporary_bytes_per_element=0.0)
_FLOAT32_ADAM = OptimizerKind(temporary_bytes_per_element=0.0)


def _megatron(name: Literal["megatron", "megatron-deepspeed"], gradient_bytes: float, modern: bool) -> Framework:
    attention = "flash" if modern else "unfused"
    recipe = Recipe(
        framework=name, parameter_bytes=2.0, gradient_bytes=gradient_bytes, master_bytes=4.0, attention=attention,
        compiled=True,
    )  # fmt: skip
    return Framework(
        recipe, _FUSED_ADAM, dropout=not modern, packed=True, sequence_parallel=modern, overlaps=modern,
        pads_vocabulary=True,
    )  # fmt: skip


def framework_of(line: Line) -> Framework:
    """By the words of the source and of the notes: who measured says with what."""
    source, notes = line.text("source").lower(), line.text("notes").lower()
    words = f"{source} {line.text('model').lower()} {notes}"
    # Gradients of bfloat16 training are added up in float32; DeepSpeed's float16 engine keeps them in 16 bit.
    half = 2.0 if precision_of(line.text("precision")) == "float16" else 4.0
    if "torchtitan" in source:
        # Float8 linear layers are of use with torch.compile only, and its documentation measures them so.
        compiled = "compile" in notes or "async" in notes or precision_of(line.text("precision")) == "float8"
        recipe = Recipe(framework="torchtitan", compiled=compiled)
        return Framework(recipe, _FLOAT32_ADAM, sequence_parallel=True)
    if "llm-foundry" in source or "mosaic" in source:
        # MPT's norm and activation are one kernel each, and so is its loss (flash-attn's cross entropy).
        return Framework(Recipe(framework="fsdp", compiled=True), _FLOAT32_ADAM)
    if "megatron-bridge" in source or "nemo" in source:
        # Its performance recipes set ddp.grad_reduce_in_fp32 to false.
        return _megatron("megatron", 2.0, modern=True)
    if "bigscience" in source:
        if "megatron 3d" in notes:
            return _megatron("megatron", half, modern=False)
        # DeepSpeed's ZeRO 1 keeps gradients in 16 bit, bfloat16 too (the source: as much memory as with float16).
        found = _megatron("megatron-deepspeed", 2.0, modern=False)
        return found._replace(dropout=False) if "tr11" in source else found
    if "vtrain" in source:
        return _megatron("megatron-deepspeed", half, modern=False)
    if "dlperf" in source:
        return _megatron("megatron", half, modern=False)
    if "megatron-lm" in source:
        # The paper's baseline without model parallelism is DeepSpeed's.
        name = "megatron-deepspeed" if "zero-3" in words else "megatron"
        return _megatron(name, half, modern=False)._replace(overlaps="zero-3" in words)
    if "fsdp" in words:
        line.assumed.append("framework = fsdp (from the words of the row)")
        return Framework(Recipe(framework="fsdp"), _FLOAT32_ADAM)
    modern = "flash" in words or precision_of(line.text("precision")) in ("float8", "float4")
    name = "megatron-deepspeed" if "deepspeed" in words else "megatron"
    line.assumed.append(f"framework = {name} (not stated)")
    return _megatron(name, half, modern)
