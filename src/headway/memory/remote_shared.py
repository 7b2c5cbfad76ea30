"""Passive memory nodes on this machine: a process that owns a region, and one-sided verbs of other processes on it.

    node = start_memory_node(2**30)                  # a process of its own, which sleeps from now on
    verbs = SharedVerbs([node.address])              # here, or in any process of this user
    verbs.fetch_and_add(0, 0, 1)

The region is shared memory without a name: clients open it through `/proc/<pid>/fd`. Nothing is left in /dev/shm
whoever is killed and whenever: the kernel frees the memory with the last process that maps it. A client that is killed
in the middle of a write leaves it torn, at words of 8 bytes, as a network card that loses its host would.

The verbs themselves are instructions of the client's processor (`shared_words`); the node's takes no part. Linux only.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from headway.errors import DoesNotFitError, InputError, RunError
from headway.hardware.host import available_bytes
from headway.memory import passive_node
from headway.memory.remote import WORD_BYTES, WORD_MASK, refuse_unaligned
from headway.memory.shared_words import compare_and_swap, copy_words, fetch_and_add
from headway.units import format_bytes
from headway.value import Value

__all__ = ["MemoryNode", "NodeAddress", "SharedVerbs", "is_supported", "start_memory_node"]

_SMALL_BYTES = 4096  # up to here word by word, whole words guaranteed by the language; above, the system's memcpy
_START_SECONDS = 60.0


class NodeAddress(Value):
    """Where a node's region is: a process, a descriptor of its, how many bytes, and a token to know it again."""

    pid: int
    descriptor: int
    bytes: int
    token: int

    @property
    def region_bytes(self) -> int:
        """What clients may use: all but the last page."""
        return self.bytes - mmap.PAGESIZE


class MemoryNode:
    """A started node. It ends with `close`, or (unless started with `stays`) when this process is gone, however."""

    def __init__(self, process: subprocess.Popen[bytes], address: NodeAddress) -> None:
        self.address = address
        self._process = process
        self._finalizer = weakref.finalize(self, _end, process)

    def close(self) -> None:
        """End the node's process; its memory is freed when the last client has gone too. Idempotent."""
        self._finalizer()

    def detach(self) -> None:
        """Let a node that `stays` live on beyond this process; `close` still ends it."""
        self._finalizer.atexit = False

    def __enter__(self) -> MemoryNode:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_supported() -> bool:
    """Whether memory nodes can be started here: on Linux."""
    return sys.platform == "linux" and hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")


def start_memory_node(size: int, *, stays: bool = False) -> MemoryNode:
    """Start a process that owns `size` bytes for others, and wait until it does.

    It ends with this process, even when that is killed; `stays`: not before it is closed, or gets a SIGTERM. All its
    memory is reserved at once. Raises DoesNotFitError where there is not as much, RunError where no process starts.
    """
    if not is_supported():
        raise RunError("memory nodes need Linux (memfd, pidfd)", place="memory node")
    if size <= 0:
        raise InputError(f"a region of {size} bytes", place="memory node", remedy="give a positive number of bytes")
    available = available_bytes()
    if size > available:
        raise DoesNotFitError(
            f"a region of {format_bytes(size)} and {format_bytes(available)} of memory available: "
            f"{format_bytes(size - available)} short",
            place="memory node",
            remedy="ask for a smaller region, or end what else uses memory",
        )
    whole = (-(-size // mmap.PAGESIZE) + 1) * mmap.PAGESIZE  # the last word is the token's
    command = [sys.executable, "-I", "-S", str(Path(passive_node.__file__)), str(whole)]
    # In a session of its own: a Ctrl-C at the terminal must not take the memory from under its clients.
    process = subprocess.Popen(
        [*command, "--stay"] if stays else command,
        stdin=subprocess.DEVNULL if stays else subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], _START_SECONDS)
    line = process.stdout.readline() if ready else b""
    process.stdout.close()
    if b'"token"' not in line:
        _end(process)
        reason = msgspec.json.decode(line).get("error", "") if line else "it ended, or said nothing"
        raise RunError(f"did not start: {reason}", place="memory node", remedy="ask for a smaller region")
    address = NodeAddress.from_json(line, place="memory node")
    return MemoryNode(process, address)


class SharedVerbs:
    """The four verbs on the regions of `addresses`; node i is the i-th. (`headway.memory.remote.Verbs`)

    Raises RunError, now or at a later verb, when a node's process is gone: its memory could be mapped still, and would
    be lost with this process.
    """

    def __init__(self, addresses: Sequence[NodeAddress]) -> None:
        self._nodes = [_Mapped(number, address) for number, address in enumerate(addresses)]

    def region_bytes(self, node: int) -> int:
        """How many bytes `node` has for clients."""
        return self._nodes[node].size

    def read_into(self, node: int, offset: int, into: memoryview) -> None:
        """Fill `into` with what is at `offset` (a multiple of 8)."""
        region = self._nodes[node]
        target = np.frombuffer(into, dtype=np.uint8)
        region.refuse(offset, target.size)
        _copy(region.bytes[offset : offset + target.size], target)

    def write_from(self, node: int, offset: int, data: memoryview) -> None:
        """Put `data` at `offset` (a multiple of 8)."""
        region = self._nodes[node]
        source = np.frombuffer(data, dtype=np.uint8)
        region.refuse(offset, source.size)
        _copy(source, region.bytes[offset : offset + source.size])

    def compare_and_swap(self, node: int, offset: int, expected: int, desired: int) -> int:
        """Replace the word at `offset` by `desired` if it is `expected`; what was there."""
        region = self._nodes[node]
        region.refuse(offset, WORD_BYTES)
        return compare_and_swap(region.start + offset, _signed(expected), _signed(desired)) & WORD_MASK

    def fetch_and_add(self, node: int, offset: int, amount: int) -> int:
        """Add `amount` to the word at `offset`, modulo 2⁶⁴; what was there."""
        region = self._nodes[node]
        region.refuse(offset, WORD_BYTES)
        return fetch_and_add(region.start + offset, _signed(amount)) & WORD_MASK

    def close(self) -> None:
        """Let go of the regions. Idempotent."""
        for node in self._nodes:
            node.close()


class _Mapped:
    """A region, mapped, and a handle on the process that owns it."""

    def __init__(self, number: int, address: NodeAddress) -> None:
        self.number, self.address = number, address
        self.size = address.region_bytes
        try:
            self._process = os.pidfd_open(address.pid)
        except OSError:
            raise self._gone() from None
        self._finalizer = weakref.finalize(self, os.close, self._process)
        try:
            descriptor = os.open(f"/proc/{address.pid}/fd/{address.descriptor}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            self.close()
            raise RunError(
                f"is gone, or may not be looked at: {error.strerror}",
                place=self._place(),
                remedy="run clients as the user of the node, where they see the same processes",
            ) from None
        try:
            is_same = os.fstat(descriptor).st_size == address.bytes
            token = os.pread(descriptor, WORD_BYTES, address.bytes - WORD_BYTES) if is_same else b""
            if int.from_bytes(token, "little") != address.token:
                self.close()
                raise RunError("is another process by now", place=self._place(), remedy="start the node again")
            self._memory = mmap.mmap(descriptor, address.bytes)
        finally:
            os.close(descriptor)
        self.bytes = np.frombuffer(self._memory, dtype=np.uint8)
        self.start: int = self.bytes.ctypes.data

    def refuse(self, offset: int, size: int) -> None:
        refuse_unaligned(offset, size, self.size, self.number)
        if not self._finalizer.alive:
            raise InputError("used after it was closed", place=self._place())
        poll = select.poll()  # made anew, because two threads may not ask one at once
        poll.register(self._process, select.POLLIN)
        if poll.poll(0):
            raise self._gone()

    def close(self) -> None:
        self._finalizer()

    def _place(self) -> str:
        return f"memory node {self.number} (process {self.address.pid})"

    def _gone(self) -> RunError:
        return RunError("is gone, and what it held is lost", place=self._place(), remedy="resume from a checkpoint")


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    words = source.size // WORD_BYTES if source.size <= _SMALL_BYTES else 0
    if words:
        copy_words(source.ctypes.data, target.ctypes.data, words)
    # What is left of a small access, or all of a large one; without the interpreter's lock.
    np.copyto(target[words * WORD_BYTES :], source[words * WORD_BYTES :])


def _signed(word: int) -> int:
    word &= WORD_MASK
    return word - 2**64 if word >> 63 else word


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
