"""One-sided verbs on a passive memory node, and programs made of them.

A memory node is *passive*: it has registered a region, and its processor takes no part in any access. Clients read,
write, compare-and-swap and fetch-and-add it from outside. Nothing else is asked of a node, so whatever can carry out
these four verbs can stand below the stores of `headway.memory.disaggregated`: shared memory of one machine
(`remote_shared`), the deterministic simulator (`remote_simulated`), a binding to an RDMA library.

**Programs.** What a client does is a generator that yields steps and is sent their results, so that one code runs on
every transport::

    def increment(node: int, offset: int) -> Logic[int]:
        before = yield FetchAndAdd(node, offset, 1)
        return before + 1

Each `Read`, `Write`, `CompareAndSwap`, `FetchAndAdd`, each `Batch` of them (posted together, carried out in any order)
and each `Call` to a server is one round trip. The other steps cost none.

**What a node guarantees**, as RDMA does: an aligned 8-byte word is read and written whole, the two atomic verbs are
atomic on such a word; anything longer tears, at 8-byte boundaries and in any order. Words are little-endian and
unsigned. (Tsai, Shan and Zhang, "Disaggregating Persistent Memory and Controlling Them Remotely", ATC 2020.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any, Protocol, TypeVar

import msgspec

from headway.errors import InputError

__all__ = [
    "WORD_BYTES", "WORD_MASK", "Background", "Batch", "Blocking", "Call", "Clock", "CompareAndSwap", "FetchAndAdd",
    "Logic", "Pause", "Read", "Step", "Verb", "Verbs", "Write", "is_round_trip", "refuse_unaligned",
]  # fmt: skip

WORD_BYTES = 8
WORD_MASK = 2**64 - 1


class Read(msgspec.Struct, frozen=True):
    """`size` bytes at `offset` of `node`; the result is bytes. May be torn at words."""

    node: int
    offset: int
    size: int


class Write(msgspec.Struct, frozen=True):
    """Put `data` at `offset` of `node`; done when all of it is there."""

    node: int
    offset: int
    data: bytes


class CompareAndSwap(msgspec.Struct, frozen=True):
    """Replace the word at `offset` by `desired` if it is `expected`; the result is what was there."""

    node: int
    offset: int
    expected: int
    desired: int


class FetchAndAdd(msgspec.Struct, frozen=True):
    """Add `amount` to the word at `offset`, modulo 2⁶⁴; the result is what was there."""

    node: int
    offset: int
    amount: int


Verb = Read | Write | CompareAndSwap | FetchAndAdd


class Batch(msgspec.Struct, frozen=True):
    """Verbs posted together, in one round trip, carried out in any order; the result is the tuple of their results."""

    verbs: tuple[Verb, ...]


class Call(msgspec.Struct, frozen=True):
    """A request to a server with a processor (a coordinator, a metadata server; never a memory node), and its reply.

    Requests and replies are what MessagePack can hold: tuples come out as lists.
    """

    server: str
    request: tuple[Any, ...]


class Pause(msgspec.Struct, frozen=True):
    """Do nothing for so long."""

    seconds: float


class Clock(msgspec.Struct, frozen=True):
    """The time in seconds, on a clock that all clients share."""


class Background(msgspec.Struct, frozen=True):
    """Carry out another program of this client beside this one, off its critical path; its result is dropped."""

    logic: Generator[Any, Any, Any]


Step = Read | Write | CompareAndSwap | FetchAndAdd | Batch | Call | Pause | Clock | Background

_Result = TypeVar("_Result")
# A program of a client: it yields steps, is sent their results, and returns what the parameter says.
Logic = Generator[Step, Any, _Result]


class Verbs(Protocol):
    """What a transport offers, and what a binding to RDMA hardware would implement: four verbs that wait for their end.

    All raise InputError for what lies outside of the node or is not aligned, RunError when the node is gone.
    """

    def read_into(self, node: int, offset: int, into: memoryview) -> None:
        """Fill `into` with what is at `offset` (a multiple of 8)."""
        ...

    def write_from(self, node: int, offset: int, data: memoryview) -> None:
        """Put `data` at `offset` (a multiple of 8)."""
        ...

    def compare_and_swap(self, node: int, offset: int, expected: int, desired: int) -> int:
        """Replace the word at `offset` by `desired` if it is `expected`; what was there."""
        ...

    def fetch_and_add(self, node: int, offset: int, amount: int) -> int:
        """Add `amount` to the word at `offset`, modulo 2⁶⁴; what was there."""
        ...


def is_round_trip(step: Step) -> bool:
    """Whether the step crosses the network and waits for the answer."""
    return isinstance(step, Read | Write | CompareAndSwap | FetchAndAdd | Batch | Call)


def refuse_unaligned(offset: int, size: int, region_bytes: int, node: int) -> None:
    """Raise InputError unless `size` bytes from `offset`, a multiple of 8, lie within a region of `region_bytes`."""
    if offset % WORD_BYTES or offset < 0 or size < 0 or offset + size > region_bytes:
        raise InputError(
            f"{size} bytes at {offset} are not aligned to {WORD_BYTES} bytes, or outside of its {region_bytes} bytes",
            place=f"memory node {node}",
            remedy="give an offset that is a multiple of 8, within the region",
        )


class Blocking:
    """Carries programs out over `Verbs`, one step after the other, in the calling thread.

    `calls(server, request)` carries a `Call` out. Background programs are carried out after the program that asked for
    them, before `carry_out` returns. `round_trips` counts those of the last program, without the background's.
    """

    def __init__(
        self, verbs: Verbs, calls: Callable[[str, tuple[Any, ...]], Any] | None = None, *, name: str = "client"
    ) -> None:
        self.verbs = verbs
        self.name = name
        self.round_trips = 0
        self._calls = calls

    def carry_out(self, logic: Logic[_Result]) -> _Result:
        """What `logic` returns. Raises what it raises, and what the verbs raise."""
        background: list[Generator[Any, Any, Any]] = []
        result, self.round_trips = self._run(logic, background)
        while background:
            self._run(background.pop(0), background)
        return result

    def _run(self, logic: Logic[_Result], background: list[Generator[Any, Any, Any]]) -> tuple[_Result, int]:
        trips = 0
        answer: Any = None
        while True:
            try:
                step = logic.send(answer)
            except StopIteration as end:
                return end.value, trips
            trips += is_round_trip(step)
            if isinstance(step, Background):
                background.append(step.logic)
                answer = None
            else:
                answer = self._step(step)

    def _step(self, step: Step) -> Any:
        verbs = self.verbs
        if isinstance(step, Read):
            into = bytearray(step.size)
            verbs.read_into(step.node, step.offset, memoryview(into))
            return bytes(into)
        if isinstance(step, Write):
            return verbs.write_from(step.node, step.offset, memoryview(step.data))
        if isinstance(step, CompareAndSwap):
            return verbs.compare_and_swap(step.node, step.offset, step.expected, step.desired)
        if isinstance(step, FetchAndAdd):
            return verbs.fetch_and_add(step.node, step.offset, step.amount)
        if isinstance(step, Batch):
            return tuple(self._step(verb) for verb in step.verbs)
        if isinstance(step, Clock):
            return time.monotonic()  # the same for all processes of a machine
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        if isinstance(step, Call):
            if self._calls is None:
                raise InputError(f"asks the server {step.server!r}, and knows none", place=self.name)
            return self._calls(step.server, step.request)
        raise InputError(f"yields {step!r}, which is not a step", place=self.name)
