"""How many FLOP an operator does: torch's own formulas, and those that it lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["FLOP_FORMULAS", "flop_formula"]

aten = torch.ops.aten


def _flash_for_cpu(query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _flash_for_cpu_backward(grad_out, query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_out.shape, query.shape, key.shape, value.shape)


def _grouped_mm(a, b, offs=None, *args, out_val=None, **kwargs) -> int:
    """2 x rows x inner x columns over all groups; each row (or inner index) belongs to one group only."""
    if a.dim() == 2 and b.dim() == 2:  # the inner dimension is divided among the groups
        return 2 * a.shape[0] * a.shape[1] * b.shape[1]
    if a.dim() == 2:  # rows of a are divided among the groups
        return 2 * a.shape[0] * a.shape[1] * b.shape[-1]
    if b.dim() == 2:  # columns of b are divided among the groups
        return 2 * a.shape[-2] * a.shape[-1] * b.shape[1]
    return 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[-1]


def _extra_formulas() -> dict[Any, Callable[..., int]]:
    formulas: dict[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: _flash_for_cpu,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_for_cpu_backward,
    }
    if hasattr(aten, "_grouped_mm"):
        formulas[aten._grouped_mm] = _grouped_mm
    for formula in formulas.values():
        # The mark by which torch's counter gives a formula the tensors instead of their shapes.
        formula._get_raw = True  # type: ignore[attr-defined]
    return {packet: formula for packet, formula in formulas.items() if packet not in flop_registry}


# What torch's registry lacks, in its own terms; pass as FlopCounterMode(custom_mapping=...) to get the same totals.
FLOP_FORMULAS = _extra_formulas()


def flop_formula(func: Any) -> Callable[..., int] | None:
    """What counts an operator's FLOP from its arguments and `out_val`, its result; None: it does none."""
    packet = getattr(func, "_overloadpacket", func)
    return flop_registry.get(packet) or FLOP_FORMULAS.get(packet) or _decomposed_flop(func)


def _decomposed_flop(func: Any) -> Callable[..., int] | None:
    """Operators that torch defines by others are counted by those, as torch's counter does."""
    if not isinstance(func, torch._ops.OpOverload):
        return None
    if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return None

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
            func.decompose(*args, **kwargs)
        return counter.get_total_flops()

    return count
