"""A rank's part of each parameter, for an optimizer off the device: where it rests, and which rows it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from headway.memory.tiers import Pending
from headway.train.infinity_groups import bounds, local_of, rows_of_part

__all__ = ["Held", "Home", "Share", "gather_rows"]


class Home(Protocol):
    """Where this rank's share of a parameter rests between steps. Flat elements from `start` to `stop` (exclusive)."""

    def view(self) -> torch.Tensor | None:
        """All elements as a flat tensor that the processor can write to, or None where there is no such thing."""
        ...

    def read(self, start: int, stop: int) -> torch.Tensor:
        """The values now, in any floating dtype."""
        ...

    def write(self, start: int, stop: int, values: torch.Tensor) -> Pending | None:
        """Take updated values (host memory, the parameter's dtype), which stay as they are until that is done."""
        ...


@dataclass(eq=False)
class Share:
    """This rank's elements of one parameter: those of `rows` along dimension 0, or all (None).

    `kept`: how many, from the first, stay on the device with all their states. `steps`: updates made.
    """

    name: str
    parameter: nn.Parameter
    group: int  # in the optimizer's param_groups
    elements: int
    rows: tuple[int, int] | None = None
    home: Home | None = None  # None: the parameter's own memory
    kept: int = 0
    steps: int = 0
    chunks: tuple[tuple[int, int], ...] = ()  # (start, stop) of those off the device
    number: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype

    def read(self, start: int, stop: int) -> torch.Tensor:
        """The values now."""
        return self.flat()[start:stop] if self.home is None else self.home.read(start, stop)

    def view(self) -> torch.Tensor | None:
        """The elements where they can be written to, or None."""
        return self.flat() if self.home is None else self.home.view()

    def flat(self, tensor: torch.Tensor | None = None) -> torch.Tensor:
        """This share of the parameter, or of a tensor of its local shape, as a flat view."""
        local = local_of(self.parameter.detach() if tensor is None else tensor)
        if self.rows is not None:
            local = local[self.rows[0] : self.rows[1]]
        return local.reshape(-1)

    def sent_bytes(self, replicas: int) -> int:
        """Bytes of a replica's part, the largest: the same on all of them, however many rows this one has."""
        local = local_of(self.parameter)
        return rows_of_part(tuple(local.shape), replicas) * math.prod(local.shape[1:]) * self.dtype.itemsize

    def key(self, start: int) -> str:
        """The name of a chunk's states in the store."""
        return f"optimizer/{self.name}/{self.number}/{start}"

    def fresh_key(self, start: int) -> str:
        """The name of a chunk's parameters there that a delayed update has made."""
        return f"fresh/{self.name}/{self.number}/{start}"


@dataclass
class Held:
    """The gradient of a share until backward ends: whole where the device is the host, else in two parts."""

    whole: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    off: torch.Tensor | None = None
    square: torch.Tensor | None = None
    arriving: list[Future[None]] = field(default_factory=list)


def gather_rows(shares: Sequence[Share], group: dist.ProcessGroup) -> None:
    """Make parameters of one dtype whole on every rank of `group`, each rank giving the rows that are its own."""
    replicas = dist.get_world_size(group)
    mine = []
    for share in shares:
        local = local_of(share.parameter.detach())
        padded = torch.zeros(
            (rows_of_part(tuple(local.shape), replicas), *local.shape[1:]), dtype=local.dtype, device=local.device
        )
        assert share.rows is not None
        padded[: share.rows[1] - share.rows[0]] = local[share.rows[0] : share.rows[1]]
        mine.append(padded.reshape(-1))
    sent = torch.cat(mine)
    received = [torch.empty_like(sent) for _ in range(replicas)]
    dist.all_gather(received, sent, group=group)
    for replica, flat in enumerate(received):
        at = 0
        for share, padded in zip(shares, mine):
            local = local_of(share.parameter.detach())
            first, last = bounds(tuple(local.shape), replicas, replica)
            count = local[first:last].numel()
            local[first:last] = flat[at : at + count].view(last - first, *local.shape[1:])
            at += padded.numel()
