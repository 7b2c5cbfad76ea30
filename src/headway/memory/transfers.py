"""How bytes get from one place to another: operations that are waited for, copies beside computation, and staging.

A place is a tensor in memory (host or GPU), a tensor on disk, or one in remote memory. `Carrier.carry` moves all bytes
from one place to another: straight where the disk can reach the memory, otherwise in pieces through buffers of the
pool, one piece being fetched while the one before is delivered.

Copies to and from a GPU run on streams of their own, one for each direction, after everything that the caller had
queued when the operation began; an operation is done when its bytes are there, for every stream.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol, TypeGuard

import numpy as np
import torch

from headway.errors import StalledError
from headway.memory.blocks import Done
from headway.memory.buffers import Buffer, BufferPool, Request, as_bytes
from headway.memory.disk import Disk, DiskTensor, DiskWrite
from headway.memory.threads import work_on

__all__ = ["SEGMENT_BYTES", "Carrier", "Operation", "Place", "RemoteRegion", "RemoteTensor"]

SEGMENT_BYTES = 4 << 20
"""Remote memory holds a tensor as segments of at most this many bytes."""

_PIECE_BYTES = 32 << 20  # of what is staged, where the pool is large enough


class RemoteRegion(Protocol):
    """Memory somewhere else, by names. Calls come from several threads at once, for different names."""

    @property
    def used_bytes(self) -> int:
        """What it holds, for whomever."""
        ...

    def read(self, name: str, into: memoryview) -> None:
        """Fill `into`, which is as long as what was written. Raises a HeadwayError naming what is missing or broken."""
        ...

    def write(self, name: str, data: memoryview) -> None:
        """Keep `data` under `name`, instead of what was there. Raises DoesNotFitError where it is full."""
        ...

    def remove(self, name: str) -> None:
        """Forget it. Nothing happens if it is not there."""
        ...


class RemoteTensor:
    """A tensor in remote memory: segments named `name/0`, `name/1`, …; zeros until written."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.size = size
        self.is_written = False

    def segments(self, start: int, stop: int) -> list[tuple[str, int, int]]:
        """Name, first and last byte (exclusive) of the segments from byte `start`, where one begins, to `stop`."""
        return [
            (f"{self.name}/{at // SEGMENT_BYTES}", at, min(at + SEGMENT_BYTES, stop))
            for at in range(start, stop, SEGMENT_BYTES)
        ]


Place = torch.Tensor | DiskTensor | RemoteTensor
"""Where the bytes of a tensor are."""


class Operation:
    """A transfer under way: a `Pending` of the store. `ready`: what a GPU has to finish before it begins."""

    def __init__(self, label: str, pool: BufferPool, ready: torch.cuda.Event | None = None) -> None:
        self.label = label
        self.ready = ready
        self.request: Request | None = None  # the buffer that it waits for
        self._pool = pool
        self._ended = threading.Event()
        self._result: torch.Tensor | None = None
        self._error: Exception | None = None
        self._is_reported = False
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._ended.is_set()

    @property
    def error(self) -> Exception | None:
        """What went wrong, so far."""
        return self._error

    @property
    def result(self) -> torch.Tensor | None:
        """What `wait` returns, once it is there."""
        return self._result

    def take_unreported_error(self) -> Exception | None:
        """What went wrong and nobody has been told yet."""
        if self._error is None or self._is_reported:
            return None
        self._is_reported = True
        return self._error

    def wait(self, timeout_seconds: float | None = None) -> torch.Tensor:
        """The tensor. Raises what went wrong; StalledError after `timeout_seconds`, or naming who holds the pool where
        the operation waits for a buffer and none is given back for the pool's `wait_seconds`."""
        self.settle(timeout_seconds)
        if self._error is not None:
            self._is_reported = True
            raise self._error
        assert self._result is not None
        return self._result

    def settle(self, timeout_seconds: float | None = None) -> None:
        """Wait until it has ended, well or not. Raises StalledError after `timeout_seconds`."""
        began = time.monotonic()
        deadline = None if timeout_seconds is None else began + timeout_seconds
        patience = self._pool.wait_seconds
        while not self._ended.is_set():
            now = time.monotonic()
            if deadline is not None and now >= deadline:
                raise StalledError(
                    f"{self.label} is not done after {timeout_seconds:g} s{self._why()}", remedy="wait for longer"
                )
            request = self.request
            if request is not None and request.is_waiting and now - max(began, self._pool.last_progress) > patience:
                error = self._pool.stalled(request)
                if self._pool.cancel(request):
                    self.end(None, error)
                    continue
            # Only a buffer that is waited for needs looking after; all else wakes us when it ends.
            slice_seconds = None if request is None or not request.is_waiting else min(patience / 4 + 0.01, 1.0)
            left = None if deadline is None else deadline - now
            self._ended.wait(min(filter(None, (slice_seconds, left, 1.0))))

    def end(self, result: torch.Tensor | None, error: Exception | None = None) -> None:
        """Say that it has ended."""
        with self._lock:
            if self._ended.is_set():
                return
            self._result, self._error = result, error
            self.ready = None
            self._ended.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def then(self, callback: Callable[[], None]) -> None:
        """Call `callback` when it has ended; at once if it has."""
        with self._lock:
            if not self._ended.is_set():
                self._callbacks.append(callback)
                return
        callback()

    def _why(self) -> str:
        request = self.request
        return f": {self._pool.stalled(request).message}" if request is not None and request.is_waiting else ""


class Carrier:
    """Threads and streams that carry bytes between places."""

    def __init__(
        self, device: torch.device, pool: BufferPool, disk: Disk | None, remote: RemoteRegion | None, threads: int = 4
    ) -> None:
        self._device = device
        self._pool = pool
        self._disk = disk
        self._remote = remote
        self._inward = self._outward = None  # seen from the GPU
        if device.type == "cuda":
            self._inward, self._outward = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"headway-carrier-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop, once all that was begun is done."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def carry(self, source: Place, target: Place, ready: torch.cuda.Event | None, done: Done) -> None:
        """Begin to carry all bytes of `source` to `target`, which is as large. Neither blocks nor raises."""
        if isinstance(target, DiskTensor) and _is_reachable(source):
            self._the_disk.write(target, as_bytes(source), done)
        elif isinstance(source, DiskTensor) and _is_reachable(target):
            self._the_disk.read(source, as_bytes(target), done)
        else:
            self._queue.put(lambda: self._carry(source, target, ready, done))

    def _work(self) -> None:
        work_on(self._device)
        while (task := self._queue.get()) is not None:
            task()
            del task  # it holds the tensors that it carried, and the next may be long in coming

    def _carry(self, source: Place, target: Place, ready: torch.cuda.Event | None, done: Done) -> None:
        try:
            if isinstance(source, torch.Tensor) and isinstance(target, torch.Tensor):
                self._copy(target, source, ready)
            else:
                self._stage(source, target, ready)
        except Exception as error:  # noqa: BLE001 - whoever waits gets it; the thread must go on
            done(error)
        else:
            done(None)

    def _copy(self, target: torch.Tensor, source: torch.Tensor, ready: torch.cuda.Event | None) -> None:
        target, source = target.detach(), source.detach()
        if _is_reachable(target) and _is_reachable(source):
            # torch would use all its threads for it, and they are the computation's; numpy uses this one.
            np.copyto(as_bytes(target), as_bytes(source))
            return
        stream = self._outward if target.device.type == "cpu" else self._inward
        if stream is None:
            target.copy_(source)
            return
        with torch.cuda.stream(stream):
            if ready is not None:
                stream.wait_event(ready)
            target.copy_(source, non_blocking=True)
            copied = torch.cuda.Event(blocking=True)  # who waits sleeps: the processor may have an update to make
            copied.record(stream)
        copied.synchronize()

    def _stage(self, source: Place, target: Place, ready: torch.cuda.Event | None) -> None:
        """Carry in pieces, through the pool or straight out of host memory."""
        whole: Buffer | None = None
        if isinstance(source, torch.Tensor) and not source.is_contiguous():
            whole = self._pool.acquire(source.nbytes, "a tensor that is not contiguous")
            gathered = whole.memory[: source.nbytes].view(source.dtype).view(source.shape)
            try:
                self._copy(gathered, source, ready)
            except BaseException:
                self._pool.release(whole)
                raise
            source = gathered
        try:
            writing = self._the_disk.begin_write(target) if isinstance(target, DiskTensor) else None
            try:
                self._stage_pieces(source, target, writing, ready)
                if writing is not None:
                    _waited_for(lambda done: self._the_disk.commit(writing, done))
            except BaseException:
                if writing is not None:
                    self._the_disk.abort(writing)
                raise
        finally:
            if whole is not None:
                self._pool.release(whole)
        if isinstance(target, RemoteTensor):
            target.is_written = True

    def _stage_pieces(
        self, source: Place, target: Place, writing: DiskWrite | None, ready: torch.cuda.Event | None
    ) -> None:
        size = source.nbytes if isinstance(source, torch.Tensor) else source.size
        piece_bytes = self._piece_bytes()
        fetching: deque[tuple[int, Buffer | None, np.ndarray, _Waiting]] = deque()
        delivering: list[_Waiting] = []

        def deliver_oldest() -> None:
            start, buffer, data, fetched = fetching.popleft()
            delivered = _Waiting()

            def done(error: Exception | None) -> None:
                if buffer is not None:
                    self._pool.release(buffer)
                delivered.end(error)

            try:
                fetched.wait()
            except BaseException as error:
                done(error if isinstance(error, Exception) else None)
                raise
            delivering.append(delivered)
            self._deliver(target, writing, start, data, ready, done)

        try:
            for start in range(0, size, piece_bytes):
                stop = min(start + piece_bytes, size)
                straight = self._straight(source, target, start, stop)
                buffer = None
                if straight is None:
                    label = f"a piece of {_label(source, target)}"
                    buffer = self._pool.try_acquire(stop - start, label)
                    # Never wait for a buffer while holding one that only we would give back.
                    while buffer is None and fetching:
                        deliver_oldest()
                        buffer = self._pool.try_acquire(stop - start, label)
                    buffer = buffer or self._pool.acquire(stop - start, label)
                    straight = buffer.memory.numpy()[: stop - start]
                fetched = _Waiting()
                fetching.append((start, buffer, straight, fetched))
                self._fetch(source, start, straight, ready, fetched.end)
                if len(fetching) > 1:
                    deliver_oldest()
            while fetching:
                deliver_oldest()
        finally:
            # Also after an error: what is under way uses memory of ours.
            for _, buffer, _, fetched in fetching:
                fetched.settle()
                if buffer is not None:
                    self._pool.release(buffer)
            for delivered in delivering:
                delivered.settle()
        for delivered in delivering:
            delivered.wait()

    def _piece_bytes(self) -> int:
        """Bytes of a piece: whole blocks of the disk and whole segments, several of which fit into the pool."""
        unit = max(self._disk.block_bytes if self._disk is not None else 0, SEGMENT_BYTES)
        if self._disk is not None and (unit % self._disk.block_bytes or unit % SEGMENT_BYTES):
            unit = self._disk.block_bytes * SEGMENT_BYTES
        return max(min(self._pool.budget_bytes // 8, _PIECE_BYTES) // unit, 1) * unit

    def _straight(self, source: Place, target: Place, start: int, stop: int) -> np.ndarray | None:
        """The piece's bytes in host memory at either end, where no buffer is needed in between."""
        for place in (source, target):
            if _is_reachable(place):
                return as_bytes(place)[start:stop]
        return None

    def _fetch(self, source: Place, start: int, into: np.ndarray, ready: torch.cuda.Event | None, done: Done) -> None:
        if isinstance(source, DiskTensor):
            self._the_disk.read(source, into, done, offset=start)
            return
        try:
            if isinstance(source, RemoteTensor):
                if source.is_written:
                    for name, first, last in source.segments(start, start + into.size):
                        self._the_remote.read(name, into[first - start : last - start].data)
                else:
                    into[:] = 0
            elif not _is_reachable(source):
                part = source.detach().reshape(-1).view(torch.uint8)[start : start + into.size]
                self._copy(torch.from_numpy(into), part, ready)
        except Exception as error:  # noqa: BLE001 - to whoever waits
            done(error)
        else:
            done(None)

    def _deliver(
        self,
        target: Place,
        writing: DiskWrite | None,
        start: int,
        data: np.ndarray,
        ready: torch.cuda.Event | None,
        done: Done,
    ) -> None:
        if writing is not None:
            self._the_disk.put(writing, start, data, done)
            return
        try:
            if isinstance(target, RemoteTensor):
                for name, first, last in target.segments(start, start + data.size):
                    self._the_remote.write(name, data[first - start : last - start].data)
            elif isinstance(target, torch.Tensor) and not _is_reachable(target):
                part = target.detach().reshape(-1).view(torch.uint8)[start : start + data.size]
                self._copy(part, torch.from_numpy(data), ready)
        except Exception as error:  # noqa: BLE001 - to whoever waits
            done(error)
        else:
            done(None)

    @property
    def _the_disk(self) -> Disk:
        assert self._disk is not None
        return self._disk

    @property
    def _the_remote(self) -> RemoteRegion:
        assert self._remote is not None
        return self._remote


class _Waiting:
    """The end of a part, waited for."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._error: Exception | None = None

    def end(self, error: Exception | None) -> None:
        self._error = error
        self._ended.set()

    def settle(self) -> None:
        self._ended.wait()

    def wait(self) -> None:
        self._ended.wait()
        if self._error is not None:
            raise self._error


def _waited_for(begin: Callable[[Done], None]) -> None:
    waiting = _Waiting()
    begin(waiting.end)
    waiting.wait()


def _is_reachable(place: Place) -> TypeGuard[torch.Tensor]:
    """Whether its bytes lie in host memory, one after the other."""
    return isinstance(place, torch.Tensor) and place.device.type == "cpu" and place.is_contiguous()


def _label(source: Place, target: Place) -> str:
    names = [repr(place.name) for place in (source, target) if not isinstance(place, torch.Tensor)]
    return " to ".join(names) or "a tensor"
