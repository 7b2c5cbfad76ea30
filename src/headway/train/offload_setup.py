"""From a plan to an `OffloadedOptimizer`: which elements each rank updates, and what its masters begin with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from headway.plan.plan import Plan
from headway.train.infinity_groups import bounds, local_of
from headway.train.offload import OffloadedOptimizer
from headway.train.offload_shares import Home, Share

if TYPE_CHECKING:
    from headway.train.parallel import Parallel

__all__ = ["Masters", "lay_out_rows", "lower_precision", "rest_optimizer"]

Masters = dict[int, dict[str, torch.Tensor]]
"""Position of a stage, then name of a parameter in its model: the float32 values before they were rounded."""


def lay_out_rows(model: nn.Module) -> None:
    """Let trained parameters lie in memory row after row: shares are flat views, which others (channels last) lack."""
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()


def lower_precision(model: nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
    """Let the device hold trained parameters in the plan's precision alone; the float32 values that they had, by name.

    Frozen parameters stay as they are, for they have no master that would remember what rounding takes from them.
    """
    if plan.optimizer_on == "device" or plan.precision == "float32":
        return {}
    dtype = getattr(torch, plan.precision)
    masters = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float32:
            masters[name] = parameter.data
            parameter.data = parameter.data.to(dtype)
    return masters


def rest_optimizer(
    parallel: Parallel, masters: Masters, homes: Mapping[int, Home] | None = None, *, staged: bool | None = None
) -> OffloadedOptimizer:
    """The optimizer of a rank's parameters off the device, as its plan says. `homes`: by id of the parameter."""
    plan = parallel.plan
    assert parallel.store is not None
    groups = {
        id(parameter): number
        for number, group in enumerate(parallel.optimizer.param_groups)
        for parameter in group["params"]
    }
    replica = parallel.coordinates[1]
    shares: list[Share] = []
    values: dict[Share, torch.Tensor] = {}
    for piece in parallel.pieces:
        known = masters.get(piece.position, {})
        # By the parameter and not by its name: tiles of a layer have the same.
        first = {
            id(piece.slice_of(parameter)): known[name]
            for name, parameter in piece.module.model.named_parameters()
            if name in known and not known[name].is_meta
        }
        for name, parameter in piece.parameters():
            if id(parameter) not in groups or not parameter.requires_grad:
                continue
            share = _share(name, parameter, groups[id(parameter)], plan, replica)
            share.home = (homes or {}).get(id(parameter))
            shares.append(share)
            if id(parameter) in first:
                values[share] = first[id(parameter)]

    def initial(share: Share) -> torch.Tensor | None:
        whole = values.pop(share, None)
        if whole is None:
            return None
        rows = share.rows
        if isinstance(share.parameter, DTensor):
            rows = bounds(tuple(whole.shape), plan.data, replica)
        return (whole if rows is None else whole[rows[0] : rows[1]]).reshape(-1)

    divided = parallel.row_owners is not None
    offloaded = OffloadedOptimizer(
        parallel.optimizer,
        shares,
        plan,
        parallel.store,
        device=parallel.device,
        group=parallel.group("data") if divided else None,
        clips=parallel.clip_norm is not None,
        initial=initial,
        staged=staged,
    )
    if plan.pipeline == 1 and not divided:
        offloaded.watch()
    return offloaded


def _share(name: str, parameter: nn.Parameter, group: int, plan: Plan, replica: int) -> Share:
    if isinstance(parameter, DTensor):
        return Share(name, parameter, group, local_of(parameter).numel())
    if plan.data == 1 or not parameter.ndim:
        return Share(name, parameter, group, parameter.numel())
    rows = bounds(tuple(parameter.shape), plan.data, replica)
    return Share(name, parameter, group, parameter[rows[0] : rows[1]].numel(), rows)
