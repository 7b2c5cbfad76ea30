"""Tensor parallelism, applied from outside: Linear modules split in pairs (Megatron-LM, arXiv:1909.08053, section 3).

A column module computes a part of the output features and hands them on as a DTensor, so that the model's own code in
between (views into heads, attention, activations) runs on the shapes it was written for while each rank computes its
share. A row module takes the parts and adds them up over the ranks. Parameters are plain tensors, this rank's slice
only, so that data parallelism and ZeRO apply to them as to any other.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from headway.errors import PlanError
from headway.workload.graph import Graph

__all__ = ["split_dimensions", "split_modules"]


class _SumGradient(torch.autograd.Function):
    """The identity, whose gradient is added up over the ranks: f in Figure 3 of Megatron-LM."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:  # type: ignore[override]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor):  # type: ignore[override]
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Sum(torch.autograd.Function):
    """The sum over the ranks, whose gradient is the identity: g in Figure 3 of Megatron-LM."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:  # type: ignore[override]
        # In place: the product that this sums is kept by nobody else.
        ctx.mark_dirty(x)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor):  # type: ignore[override]
        return gradient, None


class _Entrance:
    """The input of a block, made ready once for all of its column modules (query, key and value share one input).

    So there is one sum of its gradient in the backward pass, and not one for each module.
    """

    def __init__(self) -> None:
        self._input: torch.Tensor | None = None
        self._ready: torch.Tensor | None = None

    def ready(self, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        if self._input is not x or self._ready is None or self._ready.requires_grad != (
            x.requires_grad and torch.is_grad_enabled()
        ):  # fmt: skip
            self._input, self._ready = x, _SumGradient.apply(x, group)
        return self._ready  # type: ignore[return-value]

    def clear(self) -> None:
        self._input = self._ready = None


class _Column(ParallelStyle):
    """Splits the output features; what comes out is a DTensor divided in its last dimension."""

    def __init__(self, dims: dict[str, int], entrance: _Entrance) -> None:
        self._dims, self._entrance = dims, entrance

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _keep_slice(module, self._dims, device_mesh)
        group = device_mesh.get_group()

        def enter(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            if isinstance(x, DTensor):
                x = x.full_tensor()
            return (self._entrance.ready(x, group), *args[1:])

        def leave(_module: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            return DTensor.from_local(output, device_mesh, (Shard(output.ndim - 1),), run_check=False)

        # In front of any other hook: what is in between sees the DTensor, what is inside sees plain tensors.
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, prepend=True)
        return module


class _Row(ParallelStyle):
    """Splits the input features; the partial products are added up, and what comes out is whole on every rank."""

    def __init__(self, dims: dict[str, int], entrance: _Entrance) -> None:
        self._dims, self._entrance = dims, entrance

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _keep_slice(module, self._dims, device_mesh)
        group = device_mesh.get_group()
        transposed = self._dims["weight"] == 0  # transformers' Conv1D keeps (in, out), nn.Linear (out, in)

        def forward(x: torch.Tensor) -> torch.Tensor:
            weight: torch.Tensor = module.weight  # type: ignore[assignment]
            partial = torch.matmul(x, weight) if transposed else nn.functional.linear(x, weight)
            total = _Sum.apply(partial, group)
            # Each rank adding the bias before the sum would count it once for each of them.
            return total if module.bias is None else total + module.bias  # type: ignore[return-value]

        def enter(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            self._entrance.clear()
            x = args[0]
            if not isinstance(x, DTensor):
                raise PlanError(
                    "the input of a row module is whole, not divided by a column module before it",
                    place="plan: tensor_sharding",
                    remedy="split only the modules of blocks that the trace proves",
                )
            last = Shard(x.ndim - 1)
            if x.placements[0] != last:
                x = x.redistribute(placements=(last,))
            return (x.to_local(), *args[1:])

        module.forward = forward
        module.register_forward_pre_hook(enter)
        return module


def _keep_slice(module: nn.Module, dims: dict[str, int], mesh: DeviceMesh) -> None:
    for name, dim in dims.items():
        whole = getattr(module, name)
        mine = (
            whole.detach().chunk(mesh.size(), dim)[mesh.get_local_rank()].clone(memory_format=torch.contiguous_format)
        )
        setattr(module, name, nn.Parameter(mine, requires_grad=whole.requires_grad))
    for attribute, dim in (("out_features", 0), ("in_features", 1), ("nf", 1), ("nx", 0)):
        # What these modules know of their own size is used by transformers' Conv1D and by repr.
        if hasattr(module, attribute):
            weight: torch.Tensor = module.weight  # type: ignore[assignment]
            setattr(module, attribute, weight.shape[dim])


def split_dimensions(model: nn.Module, sharding: dict[str, str], graph: Graph | None = None) -> dict[str, int]:
    """Parameter name → the dimension along which tensor parallelism divides it; whole parameters are not listed.

    Raises PlanError for a module that is not there or is no Linear.
    """
    proven: dict[str, int] = {}
    for block in graph.blocks if graph is not None else ():
        proven.update(block.parameters)
    dims: dict[str, int] = {}
    for path, style in sharding.items():
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise PlanError("the model has no such module", place=f"plan: tensor_sharding.{path}") from None
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            raise PlanError(f"{type(module).__name__} is not a Linear module", place=f"plan: tensor_sharding.{path}")
        output_dim = 0 if isinstance(module, nn.Linear) else 1
        dim = output_dim if style == "column" else 1 - output_dim
        dims[f"{path}.weight"] = proven.get(f"{path}.weight", dim)
        if style == "column" and isinstance(getattr(module, "bias", None), torch.Tensor):
            dims[f"{path}.bias"] = 0
    return dims


def split_modules(model: nn.Module, sharding: dict[str, str], dims: dict[str, int], mesh: DeviceMesh) -> None:
    """Keep this rank's part of every module in `sharding`. Raises PlanError where a size does not divide."""
    _teach_attention()
    entrance = _Entrance()
    styles: dict[str, ParallelStyle] = {}
    for path, style in sharding.items():
        mine = {name: dims[f"{path}.{name}"] for name in ("weight", "bias") if f"{path}.{name}" in dims}
        module = model.get_submodule(path)
        for name, dim in mine.items():
            size = getattr(module, name).shape[dim]
            if size % mesh.size():
                raise PlanError(
                    f"{size} features cannot be split {mesh.size()} ways", place=f"plan: tensor_sharding.{path}"
                )
        styles[path] = (_Column if style == "column" else _Row)(mine, entrance)
    parallelize_module(model, mesh, styles)


@cache
def _teach_attention() -> None:
    """Tell DTensor that attention works on divided heads: torch lacks the rule for the kernel that CPUs use."""
    aten = torch.ops.aten

    @register_sharding(aten._scaled_dot_product_flash_attention_for_cpu.default)
    def forward(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
        whole, heads = Replicate(), Shard(1)
        # The mask (batch, 1 or heads, T, S) is whole where it is the same for all heads.
        mask: list[Any] = [] if attn_mask is None else [heads if attn_mask.shape[-3:-2] == query.shape[1:2] else whole]
        rest = [None, None]
        return [
            ([whole, whole], [whole, whole, whole, *rest, *([whole] if mask else [])]),
            ([heads, heads], [heads, heads, heads, *rest, *mask]),
        ]

    @register_sharding(aten._scaled_dot_product_flash_attention_for_cpu_backward.default)
    def backward(
        grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None
    ):  # fmt: skip
        whole, heads = Replicate(), Shard(1)
        mask: list[Any] = [] if attn_mask is None else [heads if attn_mask.shape[-3:-2] == query.shape[1:2] else whole]
        rest = [None, None]
        return [
            ([whole] * 3, [*[whole] * 6, *rest, *([whole] if mask else [])]),
            ([heads] * 3, [*[heads] * 6, *rest, *mask]),
        ]
