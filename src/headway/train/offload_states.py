"""Optimizer states off the device, in chunks: on the host in place, from disk or remote memory streamed through it.

A chunk is some consecutive elements of a parameter with all that the optimizer knows of them (float32 master, moments),
packed into one tensor of the store, so that one request reads it and one writes it back. Chunks come in the same order
in every step, so the next ones are read ahead while one is updated, and written back behind it (ZeRO-Infinity,
Rajbhandari et al., SC 2021, section 5.2.2).
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Sequence

import torch

from headway.memory.optimizer import StateTensor
from headway.memory.tiers import Pending, Store
from headway.plan.plan import Tier

__all__ = ["ChunkStates", "chunk_bytes"]

_ALIGNMENT = 64  # bytes: a cache line, and more than any vector instruction asks for


class ChunkStates:
    """Chunks of optimizer states in one tier of `store`; used by one thread at a time.

    `ahead`: how many chunks are read before they are asked for; as many may be on their way back. So the store's
    buffers must hold 2 `ahead` + 1 chunks. `waited_seconds`: how long `open` waited for chunks to come.
    """

    def __init__(self, store: Store, tier: Tier, *, ahead: int = 2) -> None:
        self.store, self.ahead = store, ahead
        self.tier: Tier = tier
        self.is_resident = tier in ("host", "device")
        self.waited_seconds = 0.0
        self._chunks: dict[str, tuple[int, tuple[StateTensor, ...]]] = {}
        self._coming: OrderedDict[str, Pending] = OrderedDict()
        self._leaving: OrderedDict[str, Pending] = OrderedDict()
        self._after: dict[str, str] = {}
        self._last: str | None = None
        self._buffers: dict[str, torch.Tensor] = {}

    def add(self, name: str, elements: int, sections: Sequence[StateTensor]) -> None:
        """Make room for a chunk of so many elements, all zeros."""
        self._chunks[name] = elements, tuple(sections)
        # On the host only the processor works on them, and pinning a hundred gigabytes takes minutes.
        self.store.create(name, (chunk_bytes(elements, sections),), torch.uint8, self.tier, pinned=False)

    def open(self, name: str) -> list[torch.Tensor]:
        """The chunk's tensors, one for each section, to be changed in place until `close`."""
        if self.is_resident:
            return self._views(name, self.store.resident(name))
        started = time.perf_counter()
        coming = self._coming.pop(name, None) or self.store.read(name)
        if self._last is not None:
            self._after[self._last] = name  # the order of this step is the forecast for the next
        self._last = name
        self._read_ahead(name)
        buffer = coming.wait()
        self.waited_seconds += time.perf_counter() - started
        self._buffers[name] = buffer
        return self._views(name, buffer)

    def close(self, name: str, *, changed: bool = True) -> None:
        """Let go of an open chunk; `changed` ones are written back behind the work that follows."""
        if self.is_resident:
            return
        buffer = self._buffers.pop(name)
        if not changed:
            self.store.release(buffer)
            return
        self._leaving[name] = self.store.write(name, buffer, release=True)
        while len(self._leaving) > self.ahead:
            self._leaving.popitem(last=False)[1].wait()

    def flush(self) -> None:
        """Wait for every write, and drop what was read ahead for nothing."""
        while self._leaving:
            self._leaving.popitem(last=False)[1].wait()
        while self._coming:
            _, pending = self._coming.popitem(last=False)
            self.store.release(pending.wait())

    def _read_ahead(self, name: str) -> None:
        following: str | None = name
        wanted = []
        for _ in range(self.ahead):
            following = self._after.get(following) if following is not None else None
            if following is None or following == name:
                break
            wanted.append(following)
        for stale in [each for each in self._coming if each not in wanted]:
            # The order has changed: its buffer is needed for what does come.
            self.store.release(self._coming.pop(stale).wait())
        for each in wanted:
            if each not in self._coming:
                self._coming[each] = self.store.read(each)

    def _views(self, name: str, packed: torch.Tensor) -> list[torch.Tensor]:
        views, start = [], 0
        elements, sections = self._chunks[name]
        for section in sections:
            count = section.count(elements)
            size = count * section.dtype.itemsize
            views.append(packed[start : start + size].view(section.dtype))
            start += _padded(size)
        return views


def chunk_bytes(elements: int, sections: Sequence[StateTensor]) -> int:
    """Bytes of a chunk of so many elements."""
    return max(_ALIGNMENT, sum(_padded(each.count(elements) * each.dtype.itemsize) for each in sections))


def _padded(size: int) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT
