"""Where each tensor of a store rests: its bytes in one tier, counted in that tier's budget.

A tier holds at most its budget, counted when a tensor gets its place, so that what does not fit is refused before a
byte is moved. Nothing here moves bytes or waits (`tiers.py` does, in order); whoever calls holds the store's lock.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Protocol

import torch

from headway.errors import DoesNotFitError, HeadwayError, InputError
from headway.memory.buffers import AlignedMemory, as_tensor, padded
from headway.memory.disk import Disk, DiskTensor
from headway.memory.transfers import Place, RemoteRegion, RemoteTensor
from headway.plan.plan import Tier
from headway.units import format_bytes

__all__ = ["UNLIMITED_BYTES", "Places", "Resting", "TierUse", "held_bytes"]

UNLIMITED_BYTES = sys.maxsize
"""The budget of a tier that was given none."""

_ALIGNED_BYTES = 64 << 10  # tensors on the host from this size on have pages of their own
_TIERS: tuple[Tier, ...] = ("device", "host", "remote", "disk")


class TierUse(Protocol):
    """What a tier holds and may hold, in bytes."""

    used_bytes: int
    budget_bytes: int
    peak_bytes: int


class _Use:
    def __init__(self, budget_bytes: int) -> None:
        self.used_bytes = 0
        self.budget_bytes = budget_bytes
        self.peak_bytes = 0


class Resting:
    """A named tensor in one tier: shape, dtype, and the `place` of its bytes."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, tier: Tier) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.tier: Tier = tier
        self.place: Place | None = None  # None once it has been discarded
        self.memory: AlignedMemory | None = None  # under `place`, on the host

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


def held_bytes(size: int, tier: Tier) -> int:
    """What a tensor of `size` bytes counts for in a tier's budget: whole pages on disk, and on the host if large."""
    return padded(size) if tier == "disk" or (tier == "host" and size >= _ALIGNED_BYTES) else size


class Places:
    """The tiers of one store: gives tensors their places and frees them.

    `pinned`: tensors on the host are, unless asked otherwise. `budgets`: bytes that each tier may hold (`check` them
    first), missing: unlimited.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        pinned: bool,
        disk: Disk | None,
        remote: RemoteRegion | None,
        budgets: Mapping[Tier, int],
    ) -> None:
        self._device = device
        self._pinned = pinned
        self._disk = disk
        self._remote = remote
        self._use: dict[Tier, _Use] = {tier: _Use(budgets.get(tier, UNLIMITED_BYTES)) for tier in _TIERS}

    @staticmethod
    def check(budgets: Mapping[Tier, int]) -> None:
        """Raises InputError where a tier is unknown or a budget negative."""
        for tier, budget in budgets.items():
            if tier not in _TIERS or budget < 0:
                raise InputError(f"budgets: {tier!r}: {budget}", remedy=f"bytes for any of {', '.join(_TIERS)}")

    def use(self) -> Mapping[Tier, TierUse]:
        """What each tier holds now, may hold, and held at most."""
        return dict(self._use)

    def give(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        tier: Tier,
        *,
        announce: bool,
        pinned: bool | None = None,
    ) -> Resting:
        """A place for a tensor of zeros, counted in the tier's budget.

        `announce`: one on a persistent disk is found again even if it is never written. Raises DoesNotFitError over the
        budget or where the machine has no room, InputError where the store has no such tier: nothing is counted then.
        """
        resting = Resting(name, shape, dtype, tier)
        self._occupy(name, held_bytes(resting.size, tier), tier)
        try:
            self._settle_in(resting, announce=announce, pinned=self._pinned if pinned is None else pinned)
        except BaseException as error:
            self._use[tier].used_bytes -= held_bytes(resting.size, tier)
            if isinstance(error, torch.OutOfMemoryError):
                raise DoesNotFitError(
                    f"the device has no room for tensor {name!r} of {format_bytes(resting.size)}",
                    remedy="rest it in another tier, or set a budget for the device so that the plan is checked",
                ) from error
            raise
        return resting

    def found(self) -> Iterator[Resting]:
        """The tensors that a persistent disk has kept, counted. Raises DoesNotFitError over the budget."""
        for name in self._disk.names() if self._disk is not None else ():
            assert self._disk is not None
            kept = self._disk.tensor(name)
            resting = Resting(name, kept.shape, getattr(torch, kept.dtype), "disk")
            self._occupy(name, held_bytes(resting.size, "disk"), "disk")
            resting.place = kept
            yield resting

    def discard(self, resting: Resting) -> None:
        """Free a tensor's place."""
        place, memory = resting.place, resting.memory
        resting.place = resting.memory = None
        self._use[resting.tier].used_bytes -= held_bytes(resting.size, resting.tier)
        if memory is not None:
            memory.close()
        if isinstance(place, DiskTensor) and self._disk is not None:
            self._disk.remove(place)
        elif isinstance(place, RemoteTensor) and self._remote is not None and place.is_written:
            for segment, _, _ in place.segments(0, place.size):
                self._remote.remove(segment)

    def let_go(self, all_resting: Iterable[Resting], *, keep_remote: bool) -> None:
        """Unpin what is on the host; free what is in remote memory, unless it is to outlast the store."""
        for resting in all_resting:
            if not keep_remote and isinstance(resting.place, RemoteTensor):
                with contextlib.suppress(HeadwayError, OSError):
                    self.discard(resting)
            if resting.memory is not None:
                resting.memory.close()

    def _settle_in(self, resting: Resting, *, announce: bool, pinned: bool) -> None:
        name, shape, dtype, size = resting.name, resting.shape, resting.dtype, resting.size
        if resting.tier == "device":
            resting.place = torch.zeros(shape, dtype=dtype, device=self._device)
        elif resting.tier == "host":
            if size >= _ALIGNED_BYTES:
                resting.memory = AlignedMemory(size, pinned=pinned)
                resting.place = as_tensor(resting.memory.tensor, shape, dtype)
            else:
                resting.place = torch.zeros(shape, dtype=dtype, pin_memory=pinned)
        elif resting.tier == "disk":
            if self._disk is None:
                raise InputError("this store has no disk tier", remedy="give Store(directory=…)")
            kind = str(dtype).removeprefix("torch.")
            resting.place = self._disk.create(name, shape, kind, size, announce=announce)
        else:
            if self._remote is None:
                raise InputError("this store has no remote tier", remedy="give Store(remote=…)")
            resting.place = RemoteTensor(name, size)

    def _occupy(self, name: str, size: int, tier: Tier) -> None:
        if tier not in self._use:
            raise InputError(f"no tier is called {tier!r}", remedy=f"one of {', '.join(self._use)}")
        use = self._use[tier]
        if use.used_bytes + size > use.budget_bytes:
            shortfall = use.used_bytes + size - use.budget_bytes
            raise DoesNotFitError(
                f"tensor {name!r} of {format_bytes(size)} does not fit into the {tier} tier: "
                f"{format_bytes(use.used_bytes)} of {format_bytes(use.budget_bytes)} are taken, "
                f"{format_bytes(shortfall)} ({shortfall} bytes) are missing",
                remedy=f"raise the budget of {tier}, or rest tensors in another tier",
            )
        use.used_bytes += size
        use.peak_bytes = max(use.peak_bytes, use.used_bytes)
