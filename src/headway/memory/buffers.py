"""Aligned host memory, and a pool of transfer buffers that never exceeds its budget.

Direct input and output (O_DIRECT) want addresses and lengths in multiples of 4096 bytes; copies to and from a GPU run
at the full rate, and beside computation, only out of pinned memory. The memory here is both: private anonymous
mappings, registered with the driver where there is a GPU.

The pool is one such mapping, in which buffers of any size are cut out best fit. A request that finds no room waits its
turn, first come, first served, and nothing is ever allocated beyond the budget.
"""

from __future__ import annotations

import bisect
import contextlib
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import torch

from headway.errors import DoesNotFitError, StalledError
from headway.units import format_bytes

__all__ = [
    "PAGE_BYTES", "AlignedMemory", "Buffer", "BufferPool", "Extents", "as_bytes", "as_tensor", "padded",
]  # fmt: skip

PAGE_BYTES = 4096
"""What O_DIRECT wants addresses, lengths and places in files to be multiples of."""

_HUGE_PAGE_BYTES = 2 << 20


def padded(count: int) -> int:
    """`count` bytes rounded up to whole pages; at least one."""
    return max(-(-count // PAGE_BYTES), 1) * PAGE_BYTES


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor in host memory, as an array of uint8 that shares them and keeps it alive."""
    return np.asarray(_Bytes(tensor.detach().reshape(-1).view(torch.uint8)))


class _Bytes:
    """Not `tensor.numpy()`: that forbids for ever to resize the storage, by which parameters come and go."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        address = tensor.data_ptr() if tensor.numel() else 0
        self.__array_interface__ = {
            "version": 3, "shape": (tensor.numel(),), "typestr": "|u1", "data": (address, False)
        }  # fmt: skip


def as_tensor(memory: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The first bytes of `memory` (uint8), seen as a tensor of `shape` and `dtype` that shares them."""
    count = prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return memory[: count * dtype.itemsize].view(dtype).view(shape)


def _driver() -> Any:
    """What registers host memory with the GPU's driver."""
    return torch.cuda.cudart()


class AlignedMemory:
    """`size` bytes of zeros at a multiple of 4096, pinned for a GPU if asked: `tensor` (uint8).

    Nothing is occupied until it is touched, but for pinned memory. Raises DoesNotFitError where the machine refuses it.
    """

    def __init__(self, size: int, *, pinned: bool = False) -> None:
        self._registered = 0
        length = padded(size)
        try:
            mapping = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError) as error:
            raise DoesNotFitError(
                f"the machine refuses {format_bytes(length)} of host memory: {error}",
                remedy="hold less on the host, or raise the limit of this process (ulimit -v, ulimit -d, cgroup)",
            ) from None
        if length >= _HUGE_PAGE_BYTES:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        self.tensor = torch.frombuffer(mapping, dtype=torch.uint8)
        if pinned:
            # Registering, where torch's allocator of pinned memory would round up to a power of two.
            code = int(_driver().cudaHostRegister(self.tensor.data_ptr(), length, 0))
            if code:
                # The driver keeps its last error, and the next kernel that this thread launches would raise it.
                with contextlib.suppress(RuntimeError, AssertionError):
                    torch.zeros(1, device="cuda")
                raise DoesNotFitError(
                    f"the driver refuses to pin {format_bytes(length)} of host memory (CUDA error {code})",
                    remedy="hold less on the host, or raise the limit of locked memory (ulimit -l)",
                )
            self._registered = self.tensor.data_ptr()

    def close(self) -> None:
        """Unpin the memory. It is given back when the last tensor that looks at it is gone. Idempotent."""
        if self._registered:
            _driver().cudaHostUnregister(self._registered)
            self._registered = 0


class Extents:
    """Which parts of a line of `capacity` bytes are free: best fit, free neighbours joined. Multiples of 4096 bytes.

    `capacity` None: the line grows as needed, and `end` says how far it reaches.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.end = 0 if capacity is None else capacity
        self._grows = capacity is None
        self._starts: list[int] = [] if capacity is None else [0]
        self._lengths: dict[int, int] = {} if capacity is None else {0: capacity}

    def take(self, size: int) -> int | None:
        """Where `size` bytes now belong to the caller, or None where no free part is long enough."""
        fitting = [(length, start) for start, length in self._lengths.items() if length >= size]
        if fitting:
            length, start = min(fitting)
            self._starts.remove(start)
            del self._lengths[start]
            if length > size:
                self._insert(start + size, length - size)
            return start
        if not self._grows:
            return None
        last = self._starts[-1] if self._starts else None
        if last is not None and last + self._lengths[last] == self.end:
            self._starts.pop()  # the free part at the end is too short: grow it
            del self._lengths[last]
            start = last
        else:
            start = self.end
        self.end = start + size
        return start

    def give(self, start: int, size: int) -> None:
        """Give back what `take` returned."""
        at = bisect.bisect_left(self._starts, start)
        if at < len(self._starts) and self._starts[at] == start + size:
            following = self._starts.pop(at)
            size += self._lengths.pop(following)
        if at > 0 and self._starts[at - 1] + self._lengths[self._starts[at - 1]] == start:
            start = self._starts.pop(at - 1)
            size += self._lengths.pop(start)
        self._insert(start, size)
        if self._grows and start + size == self.end:
            self._starts.remove(start)
            del self._lengths[start]
            self.end = start

    def _insert(self, start: int, length: int) -> None:
        bisect.insort(self._starts, start)
        self._lengths[start] = length


class Buffer:
    """A part of the pool: `memory` (uint8, `size` bytes, aligned), and for whom."""

    def __init__(self, memory: torch.Tensor, start: int, size: int, holder: str) -> None:
        self.memory = memory
        self.start = start
        self.size = size
        self.holder = holder


class Request:
    """A buffer asked for. `granted` is called with it, at once or by whoever gives back what was missing."""

    def __init__(self, size: int, holder: str, granted: Callable[[Buffer], None]) -> None:
        self.size = size
        self.holder = holder
        self.granted = granted
        self.is_waiting = True


class BufferPool:
    """Reused aligned buffers, `budget_bytes` of them together at most (rounded up to pages), pinned if asked.

    `device`: for which. `make_room`: called, without a lock, when a request has to wait: gives up what can be had again
    (prefetched data).
    """

    def __init__(
        self,
        budget_bytes: int,
        *,
        pinned: bool = False,
        device: torch.device | None = None,
        wait_seconds: float = 60.0,
        make_room: Callable[[], bool] | None = None,
    ) -> None:
        self.budget_bytes = padded(budget_bytes)
        self.wait_seconds = wait_seconds
        self.used_bytes = 0
        self.peak_bytes = 0
        self.last_progress = time.monotonic()
        self._pinned, self._device = pinned, device
        self._memory: AlignedMemory | None = None  # made by the first request: many stores need no buffer at all
        self._extents = Extents(self.budget_bytes)
        self._held: dict[int, Buffer] = {}  # by address
        self._waiting: deque[Request] = deque()
        self._lock = threading.Lock()
        self._make_room = make_room

    def request(self, size: int, holder: str, granted: Callable[[Buffer], None]) -> Request:
        """Ask for `size` bytes. Raises DoesNotFitError where they are more than the whole pool."""
        request = Request(padded(size), holder, granted)
        if request.size > self.budget_bytes:
            raise DoesNotFitError(
                f"{holder} needs a buffer of {format_bytes(request.size)}, "
                f"{format_bytes(request.size - self.budget_bytes)} more than the whole pool",
                remedy=f"raise buffer_bytes (now {self.budget_bytes}), or move the tensor in smaller parts",
            )
        with self._lock:
            self._waiting.append(request)
        self._serve()
        while request.is_waiting and self._make_room is not None and self._make_room():
            pass  # what it gave up was released, and so served
        return request

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for a buffer."""
        return bool(self._waiting)

    def try_acquire(self, size: int, holder: str) -> Buffer | None:
        """A buffer if there is one free right now and nobody waits for one."""
        size = padded(size)
        with self._lock:
            return None if self._waiting else self._cut(size, holder)

    def acquire(self, size: int, holder: str) -> Buffer:
        """A buffer, waited for. Raises StalledError when none is given back for `wait_seconds`."""
        granted = threading.Event()
        found: list[Buffer] = []

        def take(buffer: Buffer) -> None:
            found.append(buffer)
            granted.set()

        request = self.request(size, holder, take)
        began = time.monotonic()
        while not granted.wait(0.05 if self.wait_seconds < 5 else 1.0):
            since = max(began, self.last_progress)
            if time.monotonic() - since > self.wait_seconds and self.cancel(request):
                raise self.stalled(request)
        return found[0]

    def cancel(self, request: Request) -> bool:
        """Withdraw a request. False where it has been granted already."""
        with self._lock:
            if not request.is_waiting:
                return False
            self._waiting.remove(request)
            request.is_waiting = False
        self._serve()
        return True

    def release(self, buffer: Buffer) -> None:
        """Give a buffer back, and serve who waits."""
        with self._lock:
            if self._held.pop(buffer.memory.data_ptr(), None) is None:
                return
            self._extents.give(buffer.start, buffer.size)
            self.used_bytes -= buffer.size
            self.last_progress = time.monotonic()
        self._serve()

    def holder_of(self, tensor: torch.Tensor) -> Buffer | None:
        """The buffer that `tensor` begins in the first byte of, if it is one of ours."""
        return self._held.get(tensor.data_ptr())

    def stalled(self, request: Request) -> StalledError:
        """The error of a request that waited for too long: names who holds what."""
        with self._lock:
            held = sorted(self._held.values(), key=lambda buffer: -buffer.size)
        listing = ", ".join(f"{buffer.holder} ({format_bytes(buffer.size)})" for buffer in held[:8])
        more = f" and {len(held) - 8} more" if len(held) > 8 else ""
        return StalledError(
            f"{request.holder} waited {self.wait_seconds:g} s for a buffer of {format_bytes(request.size)}; "
            f"the pool of {format_bytes(self.budget_bytes)} is held by: {listing or 'nobody'}{more}",
            remedy="release() tensors once used, or raise buffer_bytes",
        )

    def close(self) -> None:
        """Unpin the memory and let go of it."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    def _cut(self, size: int, holder: str) -> Buffer | None:
        if self._memory is None:
            # Whichever thread comes first; that of a disk has never heard of this rank's GPU.
            on_gpu = self._device is not None and self._device.type == "cuda"
            with torch.cuda.device(self._device) if on_gpu else contextlib.nullcontext():
                self._memory = AlignedMemory(self.budget_bytes, pinned=self._pinned)
        start = self._extents.take(size)
        if start is None:
            return None
        buffer = Buffer(self._memory.tensor[start : start + size], start, size, holder)
        self._held[buffer.memory.data_ptr()] = buffer
        self.used_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return buffer

    def _serve(self) -> None:
        """Grant what now fits, in turn. Callbacks run without the lock: they begin transfers."""
        while True:
            with self._lock:
                if not self._waiting:
                    return
                request = self._waiting[0]
                try:
                    buffer = self._cut(request.size, request.holder)
                except BaseException:  # there is no memory: whoever asks again hears of it again
                    self._waiting.remove(request)
                    request.is_waiting = False
                    raise
                if buffer is None:
                    return
                self._waiting.popleft()
                request.is_waiting = False
                self.last_progress = time.monotonic()
            request.granted(buffer)
