"""Memory that the ranks of one machine share: how they find it, count their progress in it, and wait for one another.

The memory is an anonymous file (memfd) that never has a name: the first rank makes it, the others open it through
`/proc/<pid>/fd`, and when the last one is gone, however it went, the kernel frees it. It is not counted against the
size of /dev/shm either. Linux only.

**Layout.** A header, then a window for each rank. The header has lines of 128 bytes (two cache lines, because
processors fetch them in pairs), so that no two ranks write to the same one::

    line 0              token, abort, sleepers, time-out of one sleep
    4 lines per rank    progress | what it sleeps for | who it is, and what it is doing | signatures of the last runs
    texts               what each rank is doing; why the run was aborted

**Progress.** Each rank has one counter, which only it increases. Everything that ranks wait for is "the counter of rank
p has reached x". A waiting rank looks a few times, then lets others run, then sleeps on a futex of its own, after
writing down p and x; whoever increases a counter wakes exactly those that waited for that. So a rank costs no
processor time while it waits, and nobody makes a system call as long as nobody sleeps.
"""

from __future__ import annotations

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# (numba's intrinsics are called with one argument less than they are written with)
import contextlib
import mmap
import os
import platform
import secrets
import sys
import time
import weakref
from collections.abc import Sequence

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from headway.errors import RankFailedError, RunError, StalledError
from headway.exchange.tcp import Store, wait_for_key

__all__ = [
    "Segment", "advance", "atomic_add", "atomic_exchange", "atomic_load", "is_alive", "is_supported", "name_ranks",
    "ring", "wait_for",
]  # fmt: skip

_LINE = 128
_WORDS = _LINE // 8  # words of a line
_LINES = 4  # lines of a rank
_TOKEN, _ABORT, _SLEEPERS, _SLEEP_SECONDS, _SLEEP_NANOSECONDS = range(5)  # words of line 0
_PEER, _THRESHOLD, _BELL = range(3)  # words of a rank's second line
_STATE, _PID, _STARTED, _SEQUENCE = range(4)  # words of a rank's third line
_NOT_ATTACHED, _ATTACHED, _CLOSED = range(3)
_TEXT = 256  # bytes of a text
_SLEEP = 50_000_000  # nanoseconds until a sleeping rank looks whether the others are still alive
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_FUTEX = {"x86_64": 202, "aarch64": 98, "riscv64": 98}.get(platform.machine(), 0)  # number of the system call


def is_supported() -> bool:
    """Whether ranks can share memory here: on Linux, on a processor whose futex call is known."""
    return sys.platform == "linux" and _FUTEX != 0


# Atomic operations and waiting, for code that numba compiles. Addresses are int64.


@intrinsic
def atomic_load(context, address):
    """The int64 at `address`; what its writer had written before is visible from here on (acquire)."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def atomic_exchange(context, address, value):
    """Put `value` at `address` and return what was there; a full fence (sequentially consistent)."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("xchg", pointer, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def atomic_add(context, address, value):
    """Add `value` at `address` and return what was there; a full fence (sequentially consistent)."""

    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _pause(context):
    """Tell the processor that this is a loop that waits."""

    def generate(context, builder, signature, arguments):
        if platform.machine() == "x86_64":
            function = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, function, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _yield_processor(context):
    """Let another process run (sched_yield)."""

    def generate(context, builder, signature, arguments):
        function = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, function, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _futex(context, address, operation, value, timeout_address):
    """The futex system call on the low half of the word at `address`: 0 or more, or -1."""
    word = ir.IntType(64)

    def generate(context, builder, signature, arguments):
        # The C library's wrapper takes its arguments as longs; it is variadic in name only.
        function = ir.FunctionType(word, [word] * 7)
        call = cgutils.get_or_insert_function(builder.module, function, "syscall")
        address, operation, value, timeout = arguments
        zero = ir.Constant(word, 0)
        return builder.call(call, [ir.Constant(word, _FUTEX), address, operation, value, timeout, zero, zero])

    return types.int64(*[types.int64] * 4), generate


@njit(nogil=True, inline="always")
def _line(header, rank, line):
    return header + (1 + rank * _LINES + line) * _LINE


@njit(nogil=True)
def ring(header, rank):
    """Wake `rank`, if it sleeps."""
    bell = _line(header, rank, 1) + _BELL * 8
    atomic_add(bell, 1)
    _futex(bell, _FUTEX_WAKE, 1, 0)


@njit(nogil=True)
def advance(header, rank, size, progress):
    """Set the counter of `rank` to `progress`, and wake the ranks that sleep until it gets there."""
    # Whoever goes to sleep writes down what for and then looks at the counter; here it is the other way round, with a
    # fence on both sides. So at least one of the two sees the other.
    atomic_exchange(_line(header, rank, 0), progress)
    if atomic_load(header + _SLEEPERS * 8) == 0:
        return
    for other in range(size):
        sleeps = _line(header, other, 1)
        if atomic_load(sleeps + _PEER * 8) == rank + 1 and atomic_load(sleeps + _THRESHOLD * 8) <= progress:
            ring(header, other)


@njit(nogil=True)
def wait_for(header, rank, peer, threshold, spins, yields):
    """Wait until the counter of `peer` has reached `threshold`, and return it.

    Returns a smaller number after about 50 ms, or when somebody rang: then it is time to look what is wrong.
    """
    counter = _line(header, peer, 0)
    for _ in range(spins):
        progress = atomic_load(counter)
        if progress >= threshold:
            return progress
        _pause()
    for _ in range(yields):
        progress = atomic_load(counter)
        if progress >= threshold:
            return progress
        _yield_processor()
    sleeps = _line(header, rank, 1)
    bell = sleeps + _BELL * 8
    before = atomic_load(bell)
    atomic_exchange(sleeps + _THRESHOLD * 8, threshold)
    atomic_exchange(sleeps + _PEER * 8, peer + 1)
    atomic_add(header + _SLEEPERS * 8, 1)
    progress = atomic_load(counter)
    if progress < threshold and atomic_load(header + _ABORT * 8) == 0:
        _futex(bell, _FUTEX_WAIT, before & 0xFFFFFFFF, header + _SLEEP_SECONDS * 8)
        progress = atomic_load(counter)
    atomic_add(header + _SLEEPERS * 8, -1)
    atomic_exchange(sleeps + _PEER * 8, 0)
    return progress


class Segment:
    """The memory that the ranks `members` of one machine share. All of them must make it; it takes until all have.

    Ranks are counted from 0 among the members here (`rank` is the position in `members`). `store` carries the place
    where the memory is. Raises StalledError naming who did not come within `timeout_seconds`, RankFailedError if the
    memory's maker died.

    `header` and `windows[i]` are addresses; each window has `window_bytes`.
    """

    def __init__(
        self,
        *,
        rank: int,
        members: Sequence[int],
        window_bytes: int,
        store: Store,
        timeout_seconds: float,
    ) -> None:
        size = len(members)
        self.rank, self.members, self.window_bytes = rank, tuple(members), window_bytes
        page = mmap.PAGESIZE
        texts = (1 + size * _LINES) * _LINE
        header_bytes = -(-(texts + (size + 2) * _TEXT) // page) * page
        total = header_bytes + size * window_bytes
        deadline = time.monotonic() + timeout_seconds
        descriptor = -1  # memory of one's own, where there is nobody to share it with
        if size > 1:
            descriptor = _make(total, store) if rank == 0 else _open(store, members, timeout_seconds)
        try:
            self._memory = mmap.mmap(descriptor, total)
            self._words = np.frombuffer(self._memory, dtype=np.int64, count=texts // 8).reshape(-1, _WORDS)
            self._texts = np.frombuffer(self._memory, dtype=np.uint8, count=(size + 2) * _TEXT, offset=texts)
            self._texts = self._texts.reshape(-1, _TEXT)
            self.header: int = self._words.ctypes.data
            self.windows = np.array([self.header + header_bytes + i * window_bytes for i in range(size)], np.int64)
            with contextlib.suppress(OSError, AttributeError):  # fewer page faults, where the system allows it
                self._memory.madvise(mmap.MADV_HUGEPAGE)
            self._line_of = self._words[1:].reshape(size, _LINES, _WORDS)
            self._signatures = self._line_of[:, 3]
            self._finalizer = weakref.finalize(self, _leave, self.header, self._line_of[rank, 2], size, self._memory)
            if rank == 0:
                self._words[0, _SLEEP_NANOSECONDS] = _SLEEP
            mine = self._line_of[rank, 2]
            if size > 1:
                mine[_PID], mine[_STARTED] = os.getpid(), _started(os.getpid())
                mine[_STATE] = _ATTACHED
                self._meet(deadline, timeout_seconds)
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _meet(self, deadline: float, timeout_seconds: float) -> None:
        states = self._line_of[:, 2, _STATE]
        pause = 0.0001
        while (missing := [self.members[i] for i in np.flatnonzero(states == _NOT_ATTACHED)]) != []:
            for i in np.flatnonzero(states == _ATTACHED):
                if not self.is_alive(int(i)):
                    raise RankFailedError(f"rank {self.members[i]} died while the ranks gathered", place="rendezvous")
            if time.monotonic() > deadline:
                raise StalledError(
                    f"{name_ranks(missing)} did not come within {timeout_seconds:g} s",
                    place="rendezvous",
                    remedy="look at that rank's output, or give it more time",
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.01)

    def begin(self, sequence: int, signature: int, text: bytes | None) -> None:
        """Write down that this rank begins its run number `sequence`, of a program with this `signature`.

        `text` describes it to people; None: as last time.
        """
        if text is not None:
            area = self._texts[self.rank]
            area[:] = 0
            area[: min(len(text), _TEXT)] = np.frombuffer(text[:_TEXT], np.uint8)
        # The lowest bits tell the run, the others the program; the slot will be used again `_WORDS` runs later.
        self._signatures[self.rank, sequence % _WORDS] = (signature & ~0xFFFF) | (sequence & 0xFFFF)
        self._line_of[self.rank, 2, _SEQUENCE] = sequence

    def disagreeing(self, sequence: int) -> list[int]:
        """Who runs another program than this rank as its run number `sequence`, as far as can be seen by now."""
        at = self._signatures[:, sequence % _WORDS].copy()
        mine = at[self.rank]
        if (at == mine).all():
            return []
        return [int(i) for i in np.flatnonzero(at != mine) if (at[i] ^ mine) & 0xFFFF == 0]

    def behind(self, sequence: int) -> list[int]:
        """Who has not begun its run number `sequence`."""
        return [int(i) for i in np.flatnonzero(self._line_of[:, 2, _SEQUENCE] < sequence)]

    def progress(self, rank: int) -> int:
        """The counter of `rank`."""
        return int(self._line_of[rank, 0, 0])

    def describe(self, rank: int) -> str:
        """What `rank` is doing, in words."""
        return self._texts[rank].tobytes().rstrip(b"\0").decode(errors="replace")

    def is_alive(self, rank: int) -> bool:
        """Whether the process of `rank` is still there."""
        if rank == self.rank:
            return True
        who = self._line_of[rank, 2]
        return is_alive(int(who[_PID]), int(who[_STARTED]))

    def has_left(self, rank: int) -> bool:
        """Whether `rank` has closed its communicator."""
        return int(self._line_of[rank, 2, _STATE]) == _CLOSED

    def abort(self, kind: int, reason: str) -> None:
        """Make all ranks stop waiting, now and later; the first reason counts. `kind` is a number above 0."""
        if self._words[0, _ABORT] == 0:
            text = reason.encode()[: 2 * _TEXT]
            area = self._texts[-2:].reshape(-1)
            area[: len(text)] = np.frombuffer(text, np.uint8)
            self._words[0, _ABORT] = kind
        for other in range(len(self.members)):
            ring(self.header, other)

    @property
    def is_aborted(self) -> bool:
        """Whether somebody has called `abort`."""
        return self._words[0, _ABORT] != 0

    def aborted(self) -> tuple[int, str]:
        """The kind and the reason of the first `abort`; kind 0: there was none."""
        kind = int(self._words[0, _ABORT])
        text = self._texts[-2:].reshape(-1).tobytes().rstrip(b"\0").decode(errors="replace") if kind else ""
        return kind, text

    def close(self) -> None:
        """Leave: the others that wait for this rank will see it. Nothing of this object may be used any more."""
        self._finalizer()


def is_alive(pid: int, started: int) -> bool:
    """Whether the process `pid` that started at `started` (clock ticks since boot) runs; a zombie doesn't."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()
    except OSError:
        return False
    return fields[0] not in (b"Z", b"X") and int(fields[19]) == started


def _started(pid: int) -> int:
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b") ")[2].split()[19])


def name_ranks(ranks: Sequence[int]) -> str:
    """ "rank 3", or "ranks 1, 3"."""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(str(rank) for rank in ranks)


def _make(total: int, store: Store) -> int:
    token = secrets.randbits(62)
    descriptor = os.memfd_create("headway")  # closed on exec
    try:
        os.ftruncate(descriptor, total)
        os.pwrite(descriptor, token.to_bytes(8, sys.byteorder), 8 * _TOKEN)
        store.set("segment", f"{os.getpid()} {descriptor} {token}")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _open(store: Store, members: Sequence[int], timeout_seconds: float) -> int:
    place = wait_for_key(store, "segment", timeout_seconds, who=f"rank {members[0]}")
    pid, descriptor, token = place.split()
    try:
        opened = os.open(f"/proc/{int(pid)}/fd/{int(descriptor)}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise RankFailedError(
            f"rank {members[0]} is gone, or may not be looked at: {error.strerror}",
            place="rendezvous",
            remedy="ranks of one machine must run as the same user and see the same processes",
        ) from None
    if int.from_bytes(os.pread(opened, 8, 8 * _TOKEN), sys.byteorder) != int(token):
        os.close(opened)
        raise RunError("the shared memory is somebody else's", place="rendezvous", remedy="start again")
    return opened


def _leave(header: int, mine: np.ndarray, size: int, memory: mmap.mmap) -> None:
    # The mapping itself goes when the last array on it does.
    mine[_STATE] = _CLOSED
    for other in range(size):
        ring(header, other)
