"""Gradients of sliced parameters: reduced over the replicas, each of which keeps those of its slices.

A reduce-scatter begins when backward has made the gradients of a group; at most two are under way at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from headway.train.infinity_groups import Member, bounds, local_of, view_of

__all__ = ["Reductions"]

# torch 2.13 has another name for it, and warns of the old one, which is all that torch 2.11 knows.
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Reductions:
    """The reduce-scatters of one rank over the replicas of `mesh`."""

    def __init__(self, mesh: DeviceMesh, device: torch.device) -> None:
        self._mesh, self._device, self._replicas = mesh, device, mesh.size()
        self._reducing: list[tuple[_Holding, torch.Tensor, list[Member]]] = []

    @torch.no_grad()
    def begin(self, members: list[Member]) -> int:
        """Begin the reduce-scatter of these parameters' gradients; the bytes handed to it."""
        sizes = [member.part for member in members]
        total = sum(sizes)
        dtype = local_of(members[0].parameter.grad).dtype
        given = torch.zeros(self._replicas * total, dtype=dtype, device=self._device)
        at = 0
        for member, size in zip(members, sizes):
            gradient = local_of(member.parameter.grad)
            for replica in range(self._replicas):
                first, last = bounds(member.shape, self._replicas, replica)
                view_of(given, replica * total + at, (last - first, *member.shape[1:])).copy_(gradient[first:last])
            member.parameter.grad = None
            at += size
        given /= self._replicas
        kept = torch.empty(total, dtype=dtype, device=self._device)
        self.end(leave=1)
        work = _reduce_scatter(kept, given, group=self._mesh.get_group(), async_op=True)
        # The whole gradients live as long as the collective reads them.
        self._reducing.append((_Holding(work, given), kept, members))
        return given.numel() * given.element_size()

    @torch.no_grad()
    def end(self, leave: int = 0) -> None:
        """Wait until no more than `leave` are under way, and give slices their gradients."""
        while len(self._reducing) > leave:
            work, kept, members = self._reducing.pop(0)
            work.wait()
            at = 0
            for member in members:
                local = local_of(member.slice)
                gradient = view_of(kept, at, tuple(local.shape))
                at += member.part
                if member.slice.grad is None:
                    grad = DTensor.from_local(
                        gradient, member.slice.device_mesh, member.slice.placements,  # type: ignore[attr-defined]
                        run_check=False, shape=member.slice.shape, stride=member.slice.stride(),
                    )  # fmt: skip
                    member.slice.grad = grad
                else:
                    local_of(member.slice.grad).add_(gradient)
                # As autograd and `fully_shard` would: an optimizer off the device takes the gradient away here.
                for hook in list((getattr(member.slice, "_post_accumulate_grad_hooks", None) or {}).values()):
                    hook(member.slice)


class _Holding:
    """A collective, and the tensor that it reads."""

    def __init__(self, work: Any, tensor: torch.Tensor) -> None:
        self._work, self._tensor = work, tensor

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
