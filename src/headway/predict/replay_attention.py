"""Attention on a GPU, where a trace made without one names the CPU's kernel.

A trace is made on fake CPU tensors, so scaled dot-product attention appears as the CPU's flash kernel, which no GPU
has. There the same call is made through torch's own choice of kernel; and as each kernel keeps other things for its
backward pass, that is reached through autograd, with the forward pass made again before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["on_gpu"]

_FORWARD = "aten._scaled_dot_product_flash_attention_for_cpu.default"
_BACKWARD = "aten._scaled_dot_product_flash_attention_for_cpu_backward.default"


def on_gpu(
    target: str, function: Callable[..., Any], arguments: Callable[[], tuple[list[Any], dict[str, Any]]]
) -> Callable[[], Any]:
    """A call to be timed on a GPU: of `function`, unless it is a CPU's attention kernel, which `target` names.

    `arguments` makes the call's arguments, casts included; it is timed with the call, but not for the backward pass of
    attention.
    """
    if target == _BACKWARD:
        positional, keywords = arguments()
        return _backward(*positional, **keywords)
    chosen = _forward if target == _FORWARD else function

    def call() -> Any:
        positional, keywords = arguments()
        return chosen(*positional, **keywords)

    return call


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float = 0.0, is_causal: bool = False, *,
    attn_mask: torch.Tensor | None = None, scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    out = F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    return out, query.new_empty(query.shape[:-1], dtype=torch.float32)


def _backward(
    grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
    logsumexp: torch.Tensor, dropout_p: float = 0.0, is_causal: bool = False, *,
    attn_mask: torch.Tensor | None = None, scale: float | None = None,
) -> Callable[[], Any]:  # fmt: skip
    del out, logsumexp  # of another kernel
    with torch.enable_grad():
        leaves = q, k, v = tuple(tensor.detach().requires_grad_() for tensor in (query, key, value))
        made = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)

    def call() -> Any:
        with torch.enable_grad():
            return torch.autograd.grad(made, leaves, grad_out)

    return call
