"""One store of named tensors across tiers: device, host, remote memory, disk.

Whatever in Headway moves tensors between tiers does it through a `Store`: the optimizer off the device, activations,
checkpoints, model switching, replay. Reads and writes are asynchronous; buffers come from a small pool and never exceed
their budget: a request beyond it waits.

**Order.** Operations on one name take effect in the order in which they were begun; those on different names overlap.
Reads get their buffers in the order in which they were begun, so that waiting for them in that order always ends.

**Memory.** A tier holds at most its budget, counted when a tensor is created or moved, so that what does not fit is
refused before a byte is moved. Beside the budgets there are the pool (`buffer_bytes`) and one block for each thread of
the disk. Tensors on the host are pinned when the device is a GPU, so are the pool's buffers, and copies to and from it
run on streams of their own.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, Self

import torch

from headway.errors import HeadwayError, InputError
from headway.memory.blocks import BLOCK_BYTES
from headway.memory.buffers import Buffer, BufferPool, as_tensor
from headway.memory.disk import Disk, PersistentDisk, ScratchDisk
from headway.memory.places import UNLIMITED_BYTES, Places, Resting, TierUse, held_bytes
from headway.memory.transfers import Carrier, Operation, RemoteRegion, RemoteTensor
from headway.plan.plan import Tier

__all__ = ["UNLIMITED_BYTES", "Pending", "RemoteRegion", "Store", "TierUse", "held_bytes"]


class Pending(Protocol):
    """A transfer under way."""

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        ...

    def wait(self, timeout_seconds: float | None = None) -> torch.Tensor:
        """The tensor, once it is there (for a write: as it was written). Raises what went wrong, with the name."""
        ...


class _Entry:
    """A named tensor: where it rests, and what is being done with it."""

    def __init__(self, resting: Resting) -> None:
        self.resting = resting
        self.last_write: Operation | None = None
        self.reads: list[Operation] = []  # since the last write
        self.prefetched: Operation | None = None


class _Turn:
    """A read's place among those that want a buffer. `launch` asks for it."""

    def __init__(self, launch: Callable[[], None]) -> None:
        self.launch = launch
        self.is_ready = False  # the writes before it have ended


class Store:
    """Named tensors, each resting in one tier.

    `budgets`: bytes that each tier may hold, missing: unlimited. `directory`: where the disk tier lives, needed for it
    alone. `device`: what "device" means here. `buffer_bytes`: the pool of transfer buffers (pinned when the device is a
    GPU), aligned for O_DIRECT; `wait_seconds`: how long a request waits for one while none is given back, before it
    fails and names who holds them. `remote`: the remote tier.

    `persistent`: tensors on disk outlast the store (the directory is its own, then, and they are there when it is
    opened again), and those in remote memory (which `adopt` takes over); otherwise they vanish with it, those on disk
    also when the process is killed. `disk_threads`: requests that the
    disk has in flight, of `block_bytes` each; `direct_io`: False goes through the page cache.

    A context manager. May be used by several threads. Raises FileError where the directory cannot be used.
    """

    def __init__(
        self,
        *,
        device: torch.device | str = "cpu",
        directory: str | Path | None = None,
        budgets: Mapping[Tier, int] | None = None,
        buffer_bytes: int = 256 * 2**20,
        remote: RemoteRegion | None = None,
        persistent: bool = False,
        wait_seconds: float = 60.0,
        disk_threads: int = 4,
        block_bytes: int = BLOCK_BYTES,
        direct_io: bool = True,
    ) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        budgets = dict(budgets or {})
        Places.check(budgets)
        if persistent and directory is None and remote is None:
            raise InputError("a persistent store needs a directory", remedy="give directory=")
        self._outlasts = persistent
        self._prefetched: list[_Entry] = []  # the oldest first
        self._turns: deque[_Turn] = deque()  # reads that have not asked for their buffer yet, in the order of the calls
        self._open: set[Operation] = set()
        self._failed: list[Operation] = []
        self._lock = threading.RLock()
        self._closed = False
        pinned = self.device.type == "cuda"
        self._pool = BufferPool(
            buffer_bytes,
            pinned=pinned,
            device=self.device,
            wait_seconds=wait_seconds,
            make_room=self._give_up_prefetched,
        )
        self._disk: Disk | None = None
        if directory is not None:
            kind = PersistentDisk if persistent else ScratchDisk
            self._disk = kind(directory, threads=disk_threads, block_bytes=block_bytes, direct=direct_io)
        self._carrier = Carrier(self.device, self._pool, self._disk, remote)
        self._places = Places(self.device, pinned=pinned, disk=self._disk, remote=remote, budgets=budgets)
        self._entries = {resting.name: _Entry(resting) for resting in self._places.found()}

    # What is there

    @property
    def direct_io_refusal(self) -> str:
        """Why the disk tier goes through the page cache; empty where it does not, or there is none."""
        return self._disk.refusal if self._disk is not None else ""

    @property
    def pool(self) -> BufferPool:
        """The transfer buffers: what they occupy now and at most."""
        return self._pool

    def tier_of(self, name: str) -> Tier:
        """Where it rests (until a move is done: where it comes from). Raises InputError if there is no such tensor."""
        with self._lock:
            return self._entry(name).resting.tier

    def names(self) -> tuple[str, ...]:
        """Of all tensors, in the order of their creation."""
        with self._lock:
            return tuple(self._entries)

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype. Raises InputError if there is no such tensor."""
        with self._lock:
            resting = self._entry(name).resting
            return resting.shape, resting.dtype

    def use(self) -> Mapping[Tier, TierUse]:
        """What each tier holds now, may hold, and held at most."""
        return self._places.use()

    def resident(self, name: str) -> torch.Tensor:
        """The tensor itself, without a copy, where its tier is directly addressable (device, host).

        Waits for writes and moves that are under way. Raises InputError where its tier is remote or disk.
        """
        with self._lock:
            write = self._entry(name).last_write
        if write is not None:
            write.wait()
        with self._lock:
            resting = self._entry(name).resting
            if not isinstance(resting.place, torch.Tensor):
                raise InputError(
                    f"tensor {name!r} rests on {resting.tier}, which no tensor can look at",
                    remedy="read() or move() it",
                )
            return resting.place

    # Changes

    def create(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, tier: Tier, *, pinned: bool | None = None
    ) -> None:
        """Make room for a tensor of zeros. Raises InputError if the name is taken, DoesNotFitError over the budget.

        `pinned` False: on the host, in memory that only the processor works on, which need not be pinned for a GPU.
        """
        with self._lock:
            self._create(name, tuple(shape), dtype, tier, announce=True, pinned=pinned)

    def adopt(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Take over a tensor that another store has left in remote memory (see `persistent`).

        Raises InputError if the name is taken, DoesNotFitError over the budget; to read what is not there fails.
        """
        with self._lock:
            place = self._create(name, tuple(shape), dtype, "remote", announce=False).resting.place
            assert isinstance(place, RemoteTensor)
            place.is_written = True

    def write(self, name: str, tensor: torch.Tensor, tier: Tier | None = None, *, release: bool = False) -> Pending:
        """Begin to write `tensor` (created at `tier` if new). The caller leaves `tensor` alone until it is done.

        `release`: give the tensor, a buffer that `read` returned, back to the pool as soon as it is written. Raises
        InputError where the name is new and no tier is given, or it rests elsewhere or has another shape or dtype;
        DoesNotFitError as `create`.
        """
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                self._check_open()
                if tier is None:
                    raise InputError(f"there is no tensor {name!r} yet", remedy="say which tier it is to rest in")
                entry = self._create(name, tuple(tensor.shape), tensor.dtype, tier, announce=False)
            elif tier is not None and tier != entry.resting.tier:
                raise InputError(
                    f"tensor {name!r} rests on {entry.resting.tier}, not on {tier}", remedy="move() it first"
                )
            self._check_like(entry, tensor)
            operation = self._operation(f"the write of {name!r}", tensor)
            if release:
                operation.then(lambda: self.release(tensor))
            target = entry

            def launch() -> None:
                assert target.resting.place is not None
                self._carrier.carry(tensor, target.resting.place, operation.ready, self._ending(operation, tensor))

            self._begin(entry, operation, launch, is_write=True)
        return operation

    def read(self, name: str, into: torch.Tensor | None = None) -> Pending:
        """Begin to read it, into `into` or into a buffer of the pool, which `release` gives back.

        `into` may be on the device or the host; a buffer is on the host. Raises InputError where there is no such
        tensor or `into` is not like it; the pending operation fails with DoesNotFitError where the tensor is larger
        than the pool, with StalledError where no buffer is given back in time, with FileError where the disk does not
        return what was written.
        """
        with self._lock:
            entry = self._entry(name)
            if into is not None:
                self._check_like(entry, into)
                if not into.is_contiguous() and entry.resting.tier in ("remote", "disk"):
                    raise InputError(f"reading {name!r} into strides", remedy="read into a contiguous tensor")
            prefetched = entry.prefetched
            if prefetched is not None:
                self._forget_prefetched(entry)
                if into is None:
                    return prefetched
                return self._copy_prefetched(entry, prefetched, into)
            operation = self._operation(f"the read of {name!r}", into)
            if into is not None or not entry.resting.size:
                self._begin(entry, operation, lambda: self._launch_read(entry, operation, into, None), is_write=False)
                return operation
            turn = _Turn(lambda: self._launch_read(entry, operation, None, None))
            self._turns.append(turn)
            self._begin(entry, operation, lambda: self._take_turns(turn), is_write=False)
        return operation

    def prefetch(self, name: str) -> None:
        """Begin to read it in expectation: the next `read` finds it there. Dropped if no buffer is free.

        A write before that read drops it too, and so does a read that needs the buffer more.
        """
        with self._lock:
            entry = self._entry(name)
            if entry.prefetched is not None or not entry.resting.size:
                return
            buffer = self._pool.try_acquire(entry.resting.size, f"{name!r} (prefetched)")
            if buffer is None:
                return
            operation = self._operation(f"the read of {name!r}", None)
            entry.prefetched = operation
            self._prefetched.append(entry)
            self._begin(entry, operation, lambda: self._launch_read(entry, operation, None, buffer), is_write=False)
        # Who began to wait while it was on its way could not be given its buffer then.
        operation.then(self._make_way)

    def release(self, tensor: torch.Tensor) -> None:
        """Give a buffer that `read` returned back to the pool. Raises InputError where it is none."""
        if not tensor.numel():
            return
        buffer = self._pool.holder_of(tensor)
        if buffer is None:
            raise InputError(
                "this tensor is no buffer of the pool, or was released before",
                remedy="release once what read() returned without `into`",
            )
        self._pool.release(buffer)

    def move(self, name: str, tier: Tier) -> Pending:
        """Begin to move it to another tier. Raises DoesNotFitError where that is full: the tensor stays where it is.

        `wait` returns the tensor where the new tier is addressable, otherwise one without data ("meta").
        """
        while True:
            with self._lock:
                write = self._entry(name).last_write
                if write is None or write.done:
                    return self._move(self._entry(name), tier)
            write.settle()  # it may be a move itself, and we have to know where from

    def remove(self, name: str) -> None:
        """Forget it and free its place, once what is being done with it has ended.

        Until then the name is taken: files and segments are called by it, and a new tensor's would be freed with them.
        """
        while True:
            with self._lock:
                entry = self._entry(name)
                if entry.prefetched is not None:
                    self._drop_prefetched(entry)
                begun = [*entry.reads, *([entry.last_write] if entry.last_write is not None else [])]
                under_way = [operation for operation in begun if not operation.done]
                if not under_way:
                    del self._entries[name]
                    self._places.discard(entry.resting)
                    return
            for operation in under_way:
                operation.settle()

    def flush(self) -> None:
        """Wait until everything begun is done and what is on disk is safe there. Raises the first error."""
        self._settle()
        if self._disk is not None and not self._closed:
            self._disk.synchronise()
        with self._lock:
            failed, self._failed = self._failed, []
        errors = [error for operation in failed if (error := operation.take_unreported_error()) is not None]
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Flush, stop the threads, remove this store's own files. Idempotent; also a context manager.

        Raises the first error of an operation that nobody has been told of; everything is closed all the same.
        """
        if self._closed:
            return
        try:
            self.flush()
        finally:
            self._closed = True
            self._carrier.close()
            if self._disk is not None:
                self._disk.close()
            self._places.let_go((entry.resting for entry in self._entries.values()), keep_remote=self._outlasts)
            self._entries.clear()
            self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(HeadwayError):  # what went wrong first is what matters
            self.close()

    # Tensors and their places

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("the store is closed", remedy="open another one")

    def _entry(self, name: str) -> _Entry:
        self._check_open()
        try:
            return self._entries[name]
        except KeyError:
            raise InputError(f"there is no tensor {name!r} in the store", remedy="create() or write() it") from None

    def _check_like(self, entry: _Entry, tensor: torch.Tensor) -> None:
        resting = entry.resting
        if tuple(tensor.shape) != resting.shape or tensor.dtype != resting.dtype:
            raise InputError(
                f"tensor {resting.name!r} is {resting.dtype} of {resting.shape}, "
                f"not {tensor.dtype} of {tuple(tensor.shape)}",
                remedy="remove() it and create it anew, or convert",
            )

    def _create(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        tier: Tier,
        *,
        announce: bool,
        pinned: bool | None = None,
    ) -> _Entry:
        self._check_open()
        if name in self._entries:
            raise InputError(f"there is a tensor {name!r} already", remedy="remove() it, or write() it anew")
        entry = _Entry(self._places.give(name, shape, dtype, tier, announce=announce, pinned=pinned))
        self._entries[name] = entry
        return entry

    # Operations

    def _operation(self, label: str, tensor: torch.Tensor | None) -> Operation:
        ready = None
        if self.device.type == "cuda" or (tensor is not None and tensor.is_cuda):
            device = tensor.device if tensor is not None and tensor.is_cuda else self.device
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(device))
        return Operation(label, self._pool, ready)

    def _begin(self, entry: _Entry, operation: Operation, launch: Callable[[], None], *, is_write: bool) -> None:
        """Launch an operation once those before it that concern it have ended. Holds the lock."""
        before = [] if entry.last_write is None else [entry.last_write]
        if is_write:
            before += entry.reads
            if entry.prefetched is not None:
                self._drop_prefetched(entry)
            entry.last_write, entry.reads = operation, []
        else:
            entry.reads = [read for read in entry.reads if not read.done]
            entry.reads.append(operation)
        self._open.add(operation)
        operation.then(lambda: self._end(operation, entry))
        before = [other for other in before if not other.done]
        if not before:
            launch()
            return
        left = [len(before)]
        count_lock = threading.Lock()

        def one_less() -> None:
            with count_lock:
                left[0] -= 1
                if left[0]:
                    return
            launch()

        for other in before:
            other.then(one_less)

    def _move(self, entry: _Entry, tier: Tier) -> Pending:
        resting = entry.resting
        label = f"the move of {resting.name!r} to {tier}"
        if resting.tier == tier:
            operation = self._operation(label, None)
            self._begin(entry, operation, lambda: self._ending(operation, _visible(resting))(None), is_write=True)
            return operation
        moved = self._places.give(resting.name, resting.shape, resting.dtype, tier, announce=False)
        operation = self._operation(label, None)  # after its place on the device has been filled with zeros

        def finish(error: Exception | None) -> None:
            with self._lock:
                gone = moved
                if error is None:
                    gone, entry.resting = resting, moved
                with contextlib.suppress(HeadwayError, OSError):
                    self._places.discard(gone)
            self._ending(operation, _visible(entry.resting))(error)

        def launch() -> None:
            assert resting.place is not None
            assert moved.place is not None
            self._carrier.carry(resting.place, moved.place, operation.ready, finish)

        self._begin(entry, operation, launch, is_write=True)
        return operation

    def _end(self, operation: Operation, entry: _Entry | None = None) -> None:
        with self._lock:
            self._open.discard(operation)
            if operation.error is not None:
                self._failed.append(operation)
            elif entry is not None:
                # It holds the tensor that was moved, which may be all that keeps that in memory.
                entry.last_write = None if entry.last_write is operation else entry.last_write
                entry.reads = [read for read in entry.reads if read is not operation]

    def _take_turns(self, ready: _Turn) -> None:
        """Let reads ask for their buffers in the order in which they were begun, as far as they can.

        Were a read that need not wait for a write to overtake one that must, it could take the last buffer, and a
        caller who waits for them in turn would never come to give it back.
        """
        with self._lock:
            ready.is_ready = True
            while self._turns and self._turns[0].is_ready:
                self._turns.popleft().launch()

    @staticmethod
    def _ending(operation: Operation, result: torch.Tensor) -> Callable[[Exception | None], None]:
        return lambda error: operation.end(None if error is not None else result, error)

    def _launch_read(
        self, entry: _Entry, operation: Operation, into: torch.Tensor | None, buffer: Buffer | None
    ) -> None:
        resting = entry.resting
        place = resting.place
        assert place is not None
        if into is not None:
            self._carrier.carry(place, into, operation.ready, self._ending(operation, into))
            return
        if not resting.size:
            operation.end(torch.empty(resting.shape, dtype=resting.dtype))
            return

        def granted(buffer: Buffer) -> None:
            operation.request = None
            tensor = as_tensor(buffer.memory, resting.shape, resting.dtype)

            def ended(error: Exception | None) -> None:
                if error is not None:
                    self._pool.release(buffer)
                self._ending(operation, tensor)(error)

            self._carrier.carry(place, tensor, operation.ready, ended)

        if buffer is not None:
            granted(buffer)
            return
        try:
            request = self._pool.request(resting.size, operation.label, granted)
        except HeadwayError as error:
            operation.end(None, error)
            return
        if request.is_waiting:
            operation.request = request

    # Prefetched tensors: entries whose bytes are in a buffer, or on the way there, and that nobody has asked for

    def _copy_prefetched(self, entry: _Entry, prefetched: Operation, into: torch.Tensor) -> Operation:
        operation = self._operation(f"the read of {entry.resting.name!r}", into)

        def copy() -> None:
            source = prefetched.result
            if source is None:
                operation.end(None, prefetched.error)
                return

            def copied(error: Exception | None) -> None:
                self.release(source)
                self._ending(operation, into)(error)

            self._carrier.carry(source, into, operation.ready, copied)

        # Not a read of the entry: a later write may begin as soon as the prefetch has ended.
        self._open.add(operation)
        operation.then(lambda: self._end(operation))
        prefetched.then(copy)
        return operation

    def _forget_prefetched(self, entry: _Entry) -> None:
        entry.prefetched = None
        self._prefetched.remove(entry)

    def _drop_prefetched(self, entry: _Entry) -> None:
        """Release what was prefetched, as soon as it can be."""
        operation = entry.prefetched
        assert operation is not None
        self._forget_prefetched(entry)

        def release() -> None:
            operation.take_unreported_error()  # nobody asked for it
            if operation.result is not None:
                self.release(operation.result)

        operation.then(release)

    def _give_up_prefetched(self) -> bool:
        """Give one prefetched buffer back, the one that was asked for last: it is needed latest. Whether there was."""
        with self._lock:
            for entry in reversed(self._prefetched):
                if entry.prefetched is not None and entry.prefetched.done:
                    self._drop_prefetched(entry)
                    return True
            return False

    def _make_way(self) -> None:
        while self._pool.is_wanted and self._give_up_prefetched():
            pass

    def _settle(self) -> None:
        while True:
            with self._lock:
                under_way = list(self._open)
            if not under_way:
                return
            for operation in under_way:
                operation.settle()


def _visible(resting: Resting) -> torch.Tensor:
    """What a move returns."""
    if isinstance(resting.place, torch.Tensor):
        return resting.place
    return torch.empty(resting.shape, dtype=resting.dtype, device="meta")
