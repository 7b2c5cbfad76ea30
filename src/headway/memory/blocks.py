"""Blocks of a file, read and written directly by several threads, each block with its CRC-32C.

A transfer is cut in blocks; threads take them in turn and hand them to the kernel (`os.preadv`, `os.pwritev`, which
let other threads run), straight from and to the caller's memory where it is aligned, through a block of their own where
it is not. The checksum is computed on the way out and compared on the way in, while other blocks are in flight: there
are more threads than requests, so that the disk never waits for a checksum.
"""

from __future__ import annotations

import errno
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from headway.errors import DoesNotFitError, FileError, HeadwayError
from headway.memory.buffers import PAGE_BYTES, AlignedMemory, padded
from headway.memory.checksum import copy_with_crc32c, crc32c

__all__ = ["BLOCK_BYTES", "BlockFile", "BlockThreads", "Done", "direct_refusal", "explained", "write_fully"]

BLOCK_BYTES = 4 << 20
"""Bytes of one request, and of what one checksum covers, unless said otherwise."""

Done = Callable[[Exception | None], None]
"""What a transfer calls when it has ended, with what went wrong. On a thread of the disk: it must return soon."""

_CHECKERS = 2  # threads beside those with a request in flight
_ACTORS = 4  # what they wait for, the disk does for several of them at once
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CORRUPTED = "the disk or another program changed it: take the tensor from a checkpoint"


class BlockFile:
    """An open file in which the blocks of the tensor called `tensor` begin at `offset`."""

    def __init__(self, descriptor: int, path: str, offset: int, tensor: str, block_bytes: int) -> None:
        self.descriptor = descriptor
        self.path = path
        self.offset = offset
        self.tensor = tensor
        self.block_bytes = block_bytes

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class BlockThreads:
    """Threads that carry blocks: `count` requests in flight, while two threads more compute checksums.

    Each has a block of `block_bytes` of its own, for memory that is not aligned. Others do what is no transfer: while
    they wait for the disk's own cache, as many blocks as ever are in flight.
    """

    def __init__(self, count: int, block_bytes: int) -> None:
        self._queue: queue.SimpleQueue[Callable[[np.ndarray], None] | None] = queue.SimpleQueue()
        self._actions: queue.SimpleQueue[Callable[[np.ndarray], None] | None] = queue.SimpleQueue()
        self._requests = threading.Semaphore(count)
        self._threads = [
            threading.Thread(target=self._work, args=(block_bytes,), name=f"headway-disk-{i}", daemon=True)
            for i in range(count + _CHECKERS)
        ]
        self._actors = [
            threading.Thread(target=self._act, name=f"headway-disk-actions-{i}", daemon=True) for i in range(_ACTORS)
        ]
        for thread in (*self._threads, *self._actors):
            thread.start()

    def read(self, file: BlockFile, first: int, into: np.ndarray, checksums: list[int], done: Done) -> None:
        """Begin to read the blocks from number `first` into `into` (uint8; it ends where a block or the tensor does).

        `done` gets a FileError naming the tensor and the file where bytes are missing or do not match `checksums`.
        """

        def transfer(block: np.ndarray, number: int, part: np.ndarray) -> None:
            _read_block(block, file, number, part, checksums[number], self._requests)

        self._each(file, first, into, transfer, done)

    def write(self, file: BlockFile, first: int, data: np.ndarray, checksums: list[int], done: Done) -> None:
        """Begin to write the blocks from number `first`, and put down their checksums."""

        def transfer(block: np.ndarray, number: int, part: np.ndarray) -> None:
            checksums[number] = _write_block(block, file, number, part, self._requests)

        self._each(file, first, data, transfer, done)

    def run(self, file: BlockFile, action: Callable[[], None], done: Done) -> None:
        """Begin something else that has to do with `file`; several such may run at once."""
        self._actions.put(_guarded(file, _Countdown(1, done), lambda _: action()))

    def close(self) -> None:
        """Stop, once all that was begun is done."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []
        for _ in self._actors:  # last: a transfer that ends may ask for one
            self._actions.put(None)
        for thread in self._actors:
            thread.join()
        self._actors = []

    def _each(
        self,
        file: BlockFile,
        first: int,
        memory: np.ndarray,
        transfer: Callable[[np.ndarray, int, np.ndarray], None],
        done: Done,
    ) -> None:
        if not memory.size:
            done(None)
            return
        starts = range(0, memory.size, file.block_bytes)
        countdown = _Countdown(len(starts), done)
        for number, start in enumerate(starts, first):
            part = memory[start : start + file.block_bytes]
            self._queue.put(
                _guarded(file, countdown, lambda block, number=number, part=part: transfer(block, number, part))
            )

    def _work(self, block_bytes: int) -> None:
        block = AlignedMemory(block_bytes).tensor.numpy()
        while (task := self._queue.get()) is not None:
            task(block)
            del task  # it holds the memory that it carried, and the next may be long in coming

    def _act(self) -> None:
        nothing = np.empty(0, np.uint8)
        while (task := self._actions.get()) is not None:
            task(nothing)
            del task


class _Countdown:
    """Calls `done` when `count` parts have ended, with the first error."""

    def __init__(self, count: int, done: Done) -> None:
        self._left = count
        self._done = done
        self._error: Exception | None = None
        self._lock = threading.Lock()

    def end(self, error: Exception | None) -> None:
        with self._lock:
            self._error = self._error or error
            self._left -= 1
            if self._left:
                return
        self._done(self._error)


def _guarded(
    file: BlockFile, countdown: _Countdown, action: Callable[[np.ndarray], None]
) -> Callable[[np.ndarray], None]:
    def run(block: np.ndarray) -> None:
        failure: Exception | None = None
        try:
            action(block)
        except OSError as error:
            failure = explained(error, file.tensor, file.path)
        except Exception as error:  # noqa: BLE001 - whoever waits gets it; the thread must go on
            failure = error
        countdown.end(failure)

    return run


def explained(error: OSError, tensor: str, path: str) -> HeadwayError:
    """What the kernel says, as an error that names the tensor and the file: DoesNotFitError when full, or FileError."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return DoesNotFitError(
            f"no room on disk for tensor {tensor!r}: {reason}",
            place=path,
            remedy="free some space there, choose another directory, or give the disk tier a smaller part",
        )
    return FileError(
        f"tensor {tensor!r} cannot be transferred: {reason}", place=path, remedy="see whether the disk works"
    )


def direct_refusal(directory: Path) -> str:
    """Why files in `directory` cannot be read and written directly (O_DIRECT); empty if they can. Tries it out."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return "this system knows no O_DIRECT"
    path = directory / f".headway-probe-{os.getpid()}-{threading.get_ident()}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flag, 0o600)
    except OSError as error:
        path.unlink(missing_ok=True)  # some make the file before they refuse to open it
        return f"the file system refuses to open with O_DIRECT: {error.strerror}"
    try:
        page = AlignedMemory(PAGE_BYTES).tensor.numpy()
        os.pwritev(descriptor, [page], 0)  # type: ignore[list-item]
        os.preadv(descriptor, [page], 0)  # type: ignore[list-item]
    except OSError as error:
        return f"the file system refuses transfers with O_DIRECT: {error.strerror}"
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
    return ""


def write_fully(descriptor: int, data: np.ndarray, offset: int) -> None:
    """Write all of `data`; the kernel may take less at a time."""
    while data.size:
        written = os.pwritev(descriptor, [data], offset)  # type: ignore[list-item]
        data = data[written:]
        offset += written


def _write_block(
    block: np.ndarray, file: BlockFile, number: int, data: np.ndarray, requests: threading.Semaphore
) -> int:
    size = data.size
    if size % PAGE_BYTES or data.ctypes.data % PAGE_BYTES:
        checksum = copy_with_crc32c(block[:size], data, past_caches=True)
        block[size : padded(size)] = 0
        data = block[: padded(size)]
    else:
        checksum = crc32c(data)
    with requests:
        write_fully(file.descriptor, data, file.offset + number * file.block_bytes)
    return checksum


def _read_block(
    block: np.ndarray, file: BlockFile, number: int, into: np.ndarray, checksum: int, requests: threading.Semaphore
) -> None:
    size = into.size
    is_aligned = not (size % PAGE_BYTES or into.ctypes.data % PAGE_BYTES)
    target = into if is_aligned else block[: padded(size)]
    place = f"bytes {number * file.block_bytes} to {number * file.block_bytes + size}"
    read = 0
    while read < target.size:
        with requests:
            count = os.preadv(file.descriptor, [target[read:]], file.offset + number * file.block_bytes + read)  # type: ignore[list-item]
        if not count:
            raise FileError(
                f"tensor {file.tensor!r} is corrupted: its file ends before {place}", place=file.path, remedy=_CORRUPTED
            )
        read += count
    found = crc32c(target) if is_aligned else copy_with_crc32c(into, target[:size])
    if found != checksum:
        raise FileError(
            f"tensor {file.tensor!r} is corrupted: {place} do not match their checksum",
            place=file.path,
            remedy=_CORRUPTED,
        )
