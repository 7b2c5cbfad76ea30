"""ZeRO-1: each replica owns some parameters, gets their gradients alone, updates them, and sends them to the others.

Rajbhandari et al. (SC 2020), section 5.1: the optimizer's states are divided over the replicas. Section 7.1: then a
gradient is needed by its owner alone, so reducing gradients moves P elements where an all-reduce moves 2P, and with
the updated parameters, P more, a step communicates no more than without ZeRO: 2P.

torch's `ZeroRedundancyOptimizer` deals parameters out whole, updates and broadcasts; what it leaves to DDP, the
all-reduce, is replaced here by `Owners.reduce`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

if TYPE_CHECKING:
    from torch.distributed.optim import ZeroRedundancyOptimizer

__all__ = ["PACKED_BYTES", "Owners"]

PACKED_BYTES = 256 << 10
"""Gradients that lie together and are smaller than this travel with others to the same owner, in a copy.

Below, what a collective costs by itself is more than the two copies; above, gradients are reduced where they lie.
"""


class Owners:
    """Who updates which parameter among the replicas of `group`.

    Until `deal`, and for parameters that no optimizer updates, the owner is replica 0: whoever needs their gradients
    (their norm, when clipping) finds them at one place. `packed_bytes`: see `PACKED_BYTES`.
    """

    def __init__(self, group: dist.ProcessGroup, *, packed_bytes: int = PACKED_BYTES) -> None:
        self.group, self.packed_bytes = group, packed_bytes
        self.replica, self.replicas = dist.get_rank(group), dist.get_world_size(group)
        self._owner: dict[int, int] = {}
        self._everywhere: set[int] = set()

    def deal(self, optimizer: torch.optim.Optimizer) -> ZeroRedundancyOptimizer | None:
        """Divide what `optimizer` updates among the replicas; what updates this one's share, None where there is none.

        Whole parameters, the largest first, each to the replica that has the fewest elements so far.
        """
        groups = [group for group in optimizer.param_groups if group["params"]]
        if not groups:
            return None
        accepted = inspect.signature(type(optimizer).__init__).parameters
        defaults = {key: value for key, value in optimizer.defaults.items() if key in accepted}
        dtypes = {parameter.dtype for group in groups for parameter in group["params"]}
        with warnings.catch_warnings():
            # Importing it compiles with TorchScript, which torch itself deprecates; nobody else needs to pay for that.
            warnings.simplefilter("ignore")
            from torch.distributed.optim import ZeroRedundancyOptimizer

            zero = ZeroRedundancyOptimizer(
                [dict(group) for group in groups],
                type(optimizer),
                process_group=self.group,
                # One broadcast for each owner, and not one for each parameter.
                parameters_as_bucket_view=len(dtypes) == 1,
                **defaults,
            )
        self._owner = {id(parameter): replica for parameter, replica in zero._param_to_rank.items()}  # type: ignore[attr-defined]
        return zero

    def everywhere(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let every replica have the gradients of these: their sums over pipeline stages are yet to be made.

        Each stage deals for itself, so a tied parameter may have another owner in another stage.
        """
        self._everywhere.update(id(parameter) for parameter in parameters)

    def owner_of(self, parameter: torch.Tensor) -> int:
        """The replica that updates a parameter."""
        return self._owner.get(id(parameter), 0)

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """A DDP hook: the mean over the replicas of each gradient in `bucket`, at its owner. Elsewhere it is void."""
        flat = bucket.buffer()
        if flat.layout != torch.strided:
            return default_hooks.allreduce_hook(self.group, bucket)
        flat.div_(self.replicas)
        on_the_way: list[dist.Work] = []
        small: dict[int, list[torch.Tensor]] = {}
        for owner, first, last in self._runs(bucket.parameters()):
            part = flat[first:last]
            if owner is None:
                on_the_way.append(_started(dist.all_reduce(part, group=self.group, async_op=True)))
            elif part.nbytes < self.packed_bytes:
                small.setdefault(owner, []).append(part)
            else:
                on_the_way.append(self._reduce_to(owner, part))
        packed: list[tuple[int, torch.Tensor, list[torch.Tensor]]] = []
        for owner, parts in small.items():
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            on_the_way.append(self._reduce_to(owner, whole))
            packed.append((owner, whole, parts))

        def unpack(_last: object) -> torch.Tensor:
            # Collectives begin in order, so none of these waits for one that has not begun. On a GPU they are waited
            # for by the stream, which is why the last one's own future is followed: `collect_all` knows no device.
            for work in on_the_way:
                work.get_future().wait()
            for owner, whole, parts in packed:
                if owner == self.replica and len(parts) > 1:
                    for part, values in zip(parts, whole.split([each.numel() for each in parts]), strict=True):
                        part.copy_(values)
            return flat

        return on_the_way[-1].get_future().then(unpack)

    def reduce_by_itself(self, parameter: nn.Parameter) -> None:
        """The same for the gradient of one parameter, at once."""
        assert parameter.grad is not None
        parameter.grad /= self.replicas
        dist.reduce(parameter.grad, group=self.group, group_dst=self.owner_of(parameter))

    def drop_others(self, parameters: Iterable[nn.Parameter]) -> None:
        """Unset the gradients of parameters that other replicas own: here they are sums of no meaning."""
        for parameter in parameters:
            if self.owner_of(parameter) != self.replica:
                parameter.grad = None

    def _runs(self, parameters: Iterable[torch.Tensor]) -> Iterator[tuple[int | None, int, int]]:
        """(owner, None for all; first element; after the last) of what lies together in a bucket."""
        owner: int | None = None
        first = last = 0
        for parameter in parameters:
            whose = None if id(parameter) in self._everywhere else self.owner_of(parameter)
            if whose != owner and last > first:
                yield owner, first, last
                first = last
            owner = whose
            last += parameter.numel()
        if last > first:
            yield owner, first, last

    def _reduce_to(self, owner: int, tensor: torch.Tensor) -> dist.Work:
        return _started(dist.reduce(tensor, group=self.group, group_dst=owner, async_op=True))


def _started(work: dist.Work | None) -> dist.Work:
    assert work is not None
    return work
