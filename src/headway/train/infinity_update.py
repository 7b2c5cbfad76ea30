"""One step of an optimizer on the device over slices that rest in a tier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from headway.train.infinity import Infinity
from headway.train.infinity_groups import Group

__all__ = ["update_slices"]


def update_slices(infinities: Sequence[Infinity], optimizer: torch.optim.Optimizer) -> None:
    """One step of `optimizer` over slices in a tier, group by group, the next read while one is updated.

    Only one group's slices, and the next one's, lie on the device. The optimizer must treat each parameter by itself,
    as all of torch's but LBFGS do.
    """
    given = [list(each["params"]) for each in optimizer.param_groups]
    slices = {id(member.slice) for each in infinities for group in each.groups for member in group.members}
    elsewhere = {id(p) for params in given for p in params} - slices
    try:
        for infinity in infinities:
            waiting = [group for group in infinity.groups if any(m.slice.grad is not None for m in group.members)]
            leaving: list[Group] = []
            for group, following in zip(waiting, [*waiting[1:], None]):
                infinity.bring(group)
                if following is not None and not following.is_whole:
                    infinity.begin_reading(following)
                _step(optimizer, given, {id(member.slice) for member in group.members})
                infinity.put_back(group)
                for earlier in leaving:
                    infinity.settle(earlier)
                leaving = [group]
        if any(p.grad is not None for params in given for p in params if id(p) in elsewhere):
            _step(optimizer, given, elsewhere)
    finally:
        for each, params in zip(optimizer.param_groups, given):
            each["params"] = params


def _step(optimizer: torch.optim.Optimizer, given: Sequence[list[nn.Parameter]], chosen: set[int]) -> None:
    for each, params in zip(optimizer.param_groups, given):
        each["params"] = [parameter for parameter in params if id(parameter) in chosen]
    optimizer.step()
