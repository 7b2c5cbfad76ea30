"""Where slices of parameters rest, for an optimizer that updates them off the device.

On the host the optimizer writes to the resting tensor itself. On disk and in remote memory a group is one tensor, or
pieces of it where it is large; what is updated of a piece is put together in one of the store's buffers, and written
when it is complete. `Staging` keeps that within the store's pool: pieces are a small part of it, few are open at once,
and whoever needs a buffer waits for one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

import torch

from headway.memory.tiers import Pending, Store
from headway.plan.plan import Tier
from headway.train.infinity_groups import Group, Member, Together, local_of

__all__ = ["GroupHome", "SliceHome", "Staging", "piece_bytes"]

_OPEN_PIECES = 3  # those at both ends of a parameter, which its neighbours complete, and that in the middle
_POOL_SHARE = 32  # so open pieces, one that is read, and those on their way take a quarter of the pool


def piece_bytes(pool_bytes: int, tier: Tier) -> int:
    """Bytes of the pieces in which a group rests in `tier`, by those of the transfer buffers; 0: in one."""
    return max(4096, pool_bytes // _POOL_SHARE) if tier in ("disk", "remote") else 0


@dataclass(eq=False)
class _Open:
    """A piece of which some elements are updated. `values`: one of the store's buffers, seen as the piece."""

    home: GroupHome
    number: int
    values: torch.Tensor
    ranges: list[tuple[int, int]] = field(default_factory=list)


class Staging:
    """The pieces that are being put together, of all groups in one store: there is one for all stages of a rank.

    May be used by several threads.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[str, int], _Open] = OrderedDict()

    def put(self, home: GroupHome, number: int, start: int, values: torch.Tensor) -> Pending | None:
        """Take new elements of a piece from `start` on; the write that this completes, if it does."""
        with self._lock:
            key = home.group.name, number
            piece = self._open.get(key)
            if piece is None:
                while len(self._open) >= _OPEN_PIECES:
                    self._write_part(self._open.popitem(last=False)[1])
                piece = self._open[key] = _Open(home, number, self._room(home, number))
            piece.values[start : start + values.numel()].copy_(values)
            piece.ranges.append((start, start + values.numel()))
            if sum(stop - first for first, stop in piece.ranges) < home.elements_in(number):
                return None
            del self._open[key]
            return self._store.write(home.group.pieces[number].name, piece.values, release=True)

    def finish(self, home: GroupHome) -> None:
        """Write what is there of pieces that were not updated as a whole: the rest of them stays what it is."""
        with self._lock:
            for key in [key for key, piece in self._open.items() if piece.home is home]:
                self._write_part(self._open.pop(key))

    def _write_part(self, piece: _Open) -> None:
        name = piece.home.group.pieces[piece.number].name
        try:
            whole = self._store.read(name).wait()
            for start, stop in piece.ranges:
                whole[start:stop] = piece.values[start:stop]
        finally:
            self._store.release(piece.values)
        self._store.write(name, whole, release=True)

    def _room(self, home: GroupHome, number: int) -> torch.Tensor:
        """One of the store's buffers, waited for."""
        piece, dtype = home.group.pieces[number], home.group.part.dtype
        size = (piece.stop - piece.start) * dtype.itemsize
        buffer = self._store.pool.acquire(size, f"the update of {piece.name!r}")
        return buffer.memory[:size].view(dtype)


class GroupHome:
    """Updated elements of a group on their way to its tier. May be used by another thread than the one that trains."""

    def __init__(self, group: Group, store: Store, tier: Tier, staging: Staging) -> None:
        self.group, self.store, self.tier = group, store, tier
        self._staging = staging
        self._held = [(member.part_at, member.part_at + local_of(member.slice).numel()) for member in group.members]

    def elements_in(self, number: int) -> int:
        """Of a piece, those that belong to slices: what is left is padding."""
        piece = self.group.pieces[number]
        return sum(max(0, min(stop, piece.stop) - max(start, piece.start)) for start, stop in self._held)

    def put(self, start: int, values: torch.Tensor) -> Pending | None:
        """Take new elements of the group from `start` on; the writes that this completes, if it does."""
        stop, writes = start + values.numel(), []
        for number, piece in enumerate(self.group.pieces):
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                part = values[first - start : last - start]
                writes.append(self._staging.put(self, number, first - piece.start, part))
        found = [write for write in writes if write is not None]
        return Together(found, values) if found else None

    def finish(self) -> None:
        """Write what is there of what was not updated as a whole: the rest stays what it is."""
        self._staging.finish(self)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` (exclusive) as they are in the tier, one piece in a buffer at a time."""
        found = torch.empty(stop - start, dtype=self.group.part.dtype)
        for piece in self.group.pieces:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                values = self.store.read(piece.name).wait()
                found[first - start : last - start] = values[first - piece.start : last - piece.start]
                self.store.release(values)
        return found


class SliceHome:
    """Where one slice rests (see `train.offload_shares.Home`): its elements, flat, in the dtype in which it rests."""

    def __init__(self, home: GroupHome, member: Member) -> None:
        self._home = home
        self._start = member.part_at
        self._shape = local_of(member.slice).shape
        self._elements = self._shape.numel()

    def whole(self) -> torch.Tensor:
        """The slice as it is in the tier, in its shape."""
        return self.read(0, self._elements).view(self._shape)

    def view(self) -> torch.Tensor | None:
        """All elements, where the processor can write to them: on the host."""
        if self._home.tier != "host":
            return None
        (piece,) = self._home.group.pieces
        return self._home.store.resident(piece.name)[self._start : self._start + self._elements]

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` (exclusive) as they are in the tier."""
        view = self.view()
        if view is not None:
            return view[start:stop].clone()
        return self._home.read(self._start + start, self._start + stop)

    def write(self, start: int, stop: int, values: torch.Tensor) -> Pending | None:
        """Take updated elements. They are copied; what is returned, if anything, is the writes that they complete."""
        view = self.view()
        if view is not None:
            view[start:stop].copy_(values)
            return None
        return self._home.put(self._start + start, values)
