"""Where slices of parameters rest, for an optimizer that updates them off the device.

On the host the optimizer writes to the resting tensor itself. On disk and in remote memory a group is one tensor: what
is updated of it is put together here, and written when it is complete.
"""

from __future__ import annotations

import threading

import torch

from headway.memory.tiers import Pending, Store
from headway.plan.plan import Tier
from headway.train.infinity_groups import Group, Member, local_of

__all__ = ["GroupHome", "SliceHome"]


class GroupHome:
    """Updated elements of a group on their way to its tier. May be used by another thread than the one that trains."""

    def __init__(self, group: Group, store: Store, tier: Tier) -> None:
        self.group, self.store, self.tier = group, store, tier
        self._lock = threading.Lock()
        self._elements = sum(local_of(member.slice).numel() for member in group.members)  # what is left is padding
        self._new: torch.Tensor | None = None
        self._ranges: list[tuple[int, int]] = []

    def put(self, start: int, values: torch.Tensor) -> Pending | None:
        """Take new elements of the group from `start` on; the write that this completes, if it does."""
        with self._lock:
            if self._new is None:
                self._new = self._room()
            self._new[start : start + values.numel()].copy_(values)
            self._ranges.append((start, start + values.numel()))
            if sum(stop - start for start, stop in self._ranges) < self._elements:
                return None
            return self._write()

    def finish(self) -> None:
        """Write what is there of a group that was not updated as a whole: the rest stays what it is."""
        with self._lock:
            if self._new is None:
                return
            new, self._new = self._new, self.read()
            for start, stop in self._ranges:
                self._new[start:stop] = new[start:stop]
            self.release(new)
            self._write()

    def read(self) -> torch.Tensor:
        """The whole part as it is in the tier, to be given back with `release`."""
        return self.store.read(self.group.name, into=self._room()).wait()

    def release(self, tensor: torch.Tensor) -> None:
        """Give back what `read` returned."""
        if self.store.pool.holder_of(tensor) is not None:
            self.store.release(tensor)

    def _room(self) -> torch.Tensor:
        """Memory for the part: one of the store's buffers; where none is free, waiting could be for ever, memory."""
        size = self.group.part.numel() * self.group.part.element_size()
        buffer = self.store.pool.try_acquire(size, f"the update of {self.group.name}") if size else None
        if buffer is None:
            return torch.empty(self.group.part.shape, dtype=self.group.part.dtype)
        return buffer.memory[:size].view(self.group.part.dtype)

    def _write(self) -> Pending:
        assert self._new is not None
        is_buffer = self.store.pool.holder_of(self._new) is not None
        pending = self.store.write(self.group.name, self._new, release=is_buffer)
        self._new = None
        self._ranges.clear()
        return pending


class SliceHome:
    """Where one slice rests (see `train.offload.Home`): its elements, flat, in the dtype in which it rests."""

    def __init__(self, home: GroupHome, member: Member) -> None:
        self._home = home
        self._start = member.part_at
        self._elements = local_of(member.slice).numel()

    def view(self) -> torch.Tensor | None:
        """All elements, where the processor can write to them: on the host."""
        if self._home.tier != "host":
            return None
        return self._home.store.resident(self._home.group.name)[self._start : self._start + self._elements]

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` (exclusive) as they are in the tier."""
        whole = self._home.read()
        values = whole[self._start + start : self._start + stop].clone()
        self._home.release(whole)
        return values

    def write(self, start: int, stop: int, values: torch.Tensor) -> Pending | None:
        """Take updated elements. They are copied; what is returned, if anything, is the write of the whole group."""
        view = self.view()
        if view is not None:
            view[start:stop].copy_(values)
            return None
        return self._home.put(self._start + start, values)
