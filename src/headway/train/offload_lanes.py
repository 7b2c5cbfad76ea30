"""The two roads between a device and its host while the optimizer rests there: gradients out, parameters back.

Each has a small ring of page-locked buffers and, on a GPU, a stream of its own, so that copies run beside computation,
in both directions at once. A copy waits for a free buffer: that alone holds backward up when the host is slow.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

from headway.memory.buffers import AlignedMemory
from headway.memory.tiers import Pending

__all__ = ["Lane", "Returning", "Transfer"]


@dataclass
class Transfer:
    """A copy under way: `tensor` is the host's side of it, valid once `wait` returns and until `free`."""

    tensor: torch.Tensor
    lane: Lane
    slot: int
    held: Any = None  # the device's side, kept alive until the copy is done
    events: tuple[Any, Any] | None = None

    def wait(self) -> torch.Tensor:
        """The host's side, once the copy is done."""
        if self.events is not None:
            start, stop = self.events
            stop.synchronize()
            self.lane.seconds += start.elapsed_time(stop) * 1e-3
            self.events = None
        self.held = None
        return self.tensor

    def free(self) -> None:
        """Give the buffer back."""
        self.lane.give_back(self.slot)


@dataclass
class Lane:
    """One direction between `device` and the host, with `count` buffers of `buffer_bytes`.

    `seconds` and `transferred_bytes` add up what was copied, and on a GPU how long the copies took there.
    """

    device: torch.device
    buffer_bytes: int
    count: int
    seconds: float = 0.0
    transferred_bytes: int = 0
    waited_seconds: float = 0.0
    _buffers: list[torch.Tensor] = field(default_factory=list)
    _free: queue.SimpleQueue[int] = field(default_factory=queue.SimpleQueue)
    _stream: Any = None

    def __post_init__(self) -> None:
        on_gpu = self.device.type == "cuda"
        self._memory = [AlignedMemory(self.buffer_bytes, pinned=on_gpu) for _ in range(self.count)]
        self._buffers = [memory.tensor for memory in self._memory]
        for slot in range(self.count):
            self._free.put(slot)
        if on_gpu:
            self._stream = torch.cuda.Stream(self.device)

    def buffer(self, elements: int, dtype: torch.dtype) -> Transfer:
        """A free host buffer seen as so many elements; waits for one."""
        started = time.perf_counter()
        slot = self._free.get()
        self.waited_seconds += time.perf_counter() - started
        return Transfer(self._buffers[slot][: elements * dtype.itemsize].view(dtype), self, slot)

    def out(self, tensor: torch.Tensor) -> Transfer:
        """Begin to copy a flat device tensor into a host buffer, after the work that makes it."""
        transfer = self.buffer(tensor.numel(), tensor.dtype)
        self._copy(transfer, transfer.tensor, tensor)
        transfer.held = tensor
        return transfer

    def back(self, transfer: Transfer, into: torch.Tensor) -> None:
        """Begin to copy a host buffer of this lane into a flat device tensor."""
        self._copy(transfer, into, transfer.tensor)

    def follow_compute(self) -> None:
        """Let copies begun from now on come after what the device has been given to compute."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def give_back(self, slot: int) -> None:
        self._free.put(slot)

    def close(self) -> None:
        """Let go of the memory, once every buffer was given back."""
        for memory in self._memory:
            memory.close()
        self._buffers.clear()

    def _copy(self, transfer: Transfer, into: torch.Tensor, source: torch.Tensor) -> None:
        self.transferred_bytes += source.numel() * source.element_size()
        if self._stream is None:
            started = time.perf_counter()
            into.copy_(source)
            self.seconds += time.perf_counter() - started
            return
        if source.is_cuda:
            self.follow_compute()
        with torch.cuda.stream(self._stream):
            # Who waits for one sleeps: the processor has an update to make meanwhile.
            start, stop = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
            start.record()
            into.copy_(source, non_blocking=True)
            stop.record()
        transfer.events = (start, stop)


class Returning:
    """Updated parameters on their way to where they rest, oldest first. May be used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: deque[tuple[Transfer | None, Pending | None]] = deque()

    def add(self, transfer: Transfer | None, pending: Pending | None) -> None:
        """Take over what is under way: a buffer to give back when it is there, a write, or both."""
        self._under_way.append((transfer, pending))

    def wait(self, at_most: int = 0) -> None:
        """Wait for the oldest, until no more than so many are under way. Raises what went wrong with one of them."""
        if at_most and len(self._under_way) <= at_most:
            return
        # That none is left does not say that all are there: another thread may be waiting for the last it took.
        with self._lock:
            while len(self._under_way) > at_most:
                transfer, pending = self._under_way.popleft()
                try:
                    if pending is not None:
                        pending.wait()
                    if transfer is not None:
                        transfer.wait()
                finally:
                    if transfer is not None:
                        transfer.free()
