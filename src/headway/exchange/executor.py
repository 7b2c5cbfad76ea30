"""Carries a `Program` out on real processes: through shared memory in a machine, through a transport between machines.

A `Communicator` is a rank's place in a group. `run` turns the program into the steps of this rank (`lowering`, once for
each program and size), and lets the `interpreter` go through them: reductions and copies straight on the windows of the
other ranks. There is no barrier: a rank that is done returns, and one that is early waits only for what it needs.
Python is back at work when a rank has waited for 50 ms, to see what became of the others, and for messages to other
machines.

**When something goes wrong** whoever notices writes it into the shared memory and wakes everybody, so all ranks raise
the same error: RankFailedError naming the rank that died (noticed by those who wait, within a tenth of a second),
StalledError naming who did not come in time, MismatchError naming who runs something else. A communicator that has
raised one of these is of no more use.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from headway.collective.program import Program
from headway.errors import InputError, MismatchError, ProgramError, RankFailedError, RunError, StalledError
from headway.exchange import interpreter as at
from headway.exchange.kernels import check_operation, reduction_kernel
from headway.exchange.lowering import (
    CHUNK,
    FIRST_SOURCE,
    KIND,
    LENGTH,
    PEER,
    PIECE,
    RECEIVE,
    SLOT,
    SOURCE_SLOT,
    STEP_STAGE,
    Instructions,
    Schedule,
    instructions,
    schedule,
)
from headway.exchange.shared import Segment, is_supported, name_ranks

__all__ = ["Communicator", "Transport"]

_AREA_BYTES = 8 * 2**20  # of a window: half of it, because runs take turns with the halves
_SLICE_BYTES = 512 * 2**10  # of the vector, so that all windows together stay in the cache
_MESSAGE_SLICE_BYTES = 4 * 2**20  # where messages to other machines are involved
_STAGES = 3  # slices that a rank works on at a time
_PLANS = 256  # sizes and programs that are remembered
_FAILED, _STALLED, _MISMATCHED, _ABORTED = range(1, 5)
_ERRORS: dict[int, type[RunError]] = {
    _FAILED: RankFailedError, _STALLED: StalledError, _MISMATCHED: MismatchError, _ABORTED: RankFailedError,
}  # fmt: skip


class Transport(Protocol):
    """Moves bytes between ranks of different machines.

    Messages from one rank to another arrive in the order in which they were sent, one `receive` for one `send` of
    the same length. Both block, give up after a time-out with StalledError naming the other rank, raise
    RankFailedError when it is gone, and may be called from several threads at once (one for each other rank and
    direction).
    """

    def send(self, target: int, array: np.ndarray, /) -> None:
        """Send the bytes of `array` (uint8, contiguous); it may be changed once this returns."""
        ...

    def receive(self, source: int, array: np.ndarray, /) -> None:
        """Fill `array` (uint8, contiguous) with the next message from `source`."""
        ...

    @property
    def failure(self) -> RunError | None:
        """Why it is of no more use, if so."""
        ...

    def close(self, error: RunError | None = None) -> None:
        """Close it. With an `error`, all that waits in ranks at the other ends raises the same."""
        ...


@dataclass(slots=True, eq=False)
class _Prepared:
    """All that a run needs that does not change from one to the next."""

    program: Program  # held, so that its identity is not used again
    steps: Instructions
    registers: np.ndarray
    addresses: np.ndarray
    signature: int
    text: bytes


class Communicator:
    """What the ranks of a group carry programs out with.

    `store` is any `torch.distributed.Store` that all ranks see; `machines[r]` says on which machine rank `r` lives
    (all on this one, unless given). All ranks must make one with the same `name`, and run the same programs in the
    same order. Ranks of different machines need a `transport`; so do ranks of one machine where memory cannot be
    shared (any system but Linux). Not to be used by two threads at once, except for `abort`.

    It takes until all ranks of the machine have come, at most `timeout_seconds`, which is also how long a run waits for
    another rank. Raises StalledError, RankFailedError, InputError.
    """

    def __init__(
        self,
        *,
        rank: int,
        size: int,
        store: dist.Store,
        machines: Sequence[str] | None = None,
        timeout_seconds: float = 300.0,
        name: str = "world",
        transport: Transport | None = None,
    ) -> None:
        if not 0 <= rank < size:
            raise InputError(f"there is no rank {rank} among {size}", place=name, remedy=f"0 to {size - 1}")
        if machines is not None and len(machines) != size:
            raise InputError(f"{len(machines)} machines are named for {size} ranks", place=name, remedy="one for each")
        self.rank, self.size, self.name, self.timeout_seconds = rank, size, name, timeout_seconds
        names = list(machines or ["this machine"] * size)
        if not is_supported():
            names = [f"{name} {position}" for position, name in enumerate(names)]
        order = list(dict.fromkeys(names))
        self._machines = tuple(order.index(name) for name in names)
        if len(order) > 1 and transport is None:
            raise InputError(
                f"the ranks are on {len(order)} machines, and there is no transport between them",
                place=name,
                remedy="give a transport, or place all ranks on one machine",
            )
        self._transport = transport
        self._members = tuple(other for other in range(size) if names[other] == names[rank])
        self._local = self._members.index(rank)
        self._sequence = 0
        self._schedules: OrderedDict[int, tuple[Program, Schedule, bytes]] = OrderedDict()
        self._prepared: OrderedDict[tuple, _Prepared] = OrderedDict()
        self._last: _Prepared | None = None
        self._senders: dict[int, _Sender] = {}
        self._broken: RunError | None = None
        self._closed = False
        among = len(self._members)
        at.warm_up()  # compiled before anybody waits
        self._segment = Segment(
            rank=self._local,
            members=self._members,
            window_bytes=2 * _AREA_BYTES,
            store=dist.PrefixStore(f"headway/{name}/{self._machines[rank]}", store),
            timeout_seconds=timeout_seconds,
        )
        self._bases = np.zeros(among, np.int64)
        self._seen = np.zeros(among, np.int64)
        self._needs = np.zeros((2, among), np.int64)
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Where each rank has a processor of its own, what it waits for comes soon; elsewhere, it must let others run.
        self._patience = (50, 50) if among <= processors else (0, 8)
        self._windows = (self._segment.windows, self._segment.windows + _AREA_BYTES)

    def run(self, program: Program, buffer: torch.Tensor, *, operation: str = "sum") -> None:
        """Carry `program` out on `buffer`, in place.

        `buffer` is a flat, contiguous CPU tensor of the collective's whole vector, laid out as `Program.bounds` says,
        rounded down to whole elements; in all-to-all, what arrives takes the place of what is sent. At the end every
        place that `Program.ends_with` names holds the result; other places are undefined.

        `operation`: sum, average, min, max, product, and for integers band, bor, bxor. Every rank that holds a chunk's
        result holds the same bits, run after run. Contributions are reduced in the order of the program; half-precision
        numbers in float32 as long as they arrive at one rank with nobody reading in between, and rounded then: so a
        ring rounds at each rank, and a program in which one rank reduces all contributions rounds once.

        Raises ProgramError if the program is for another number of ranks, MismatchError if ranks call with different
        programs, dtypes, sizes or operations, RankFailedError naming a rank that died, StalledError naming one that
        did not come in time.
        """
        if self._broken is not None:
            raise type(self._broken)(self._broken.message, place=self.name, remedy="make a new communicator")
        if self._closed:
            raise RunError("the communicator is closed", place=self.name, remedy="make a new one")
        count = buffer.numel()
        key = (id(program), count, buffer.dtype, operation)
        prepared = self._prepared.get(key) or self._prepare(key, program, buffer, operation)
        if not buffer.is_contiguous() or buffer.dim() != 1 or buffer.device.type != "cpu":
            raise InputError(
                f"cannot work on {tuple(buffer.shape)} on {buffer.device}", place=self.name,
                remedy="give a flat, contiguous tensor in this machine's memory",
            )  # fmt: skip
        self._sequence += 1
        sequence = self._sequence
        segment = self._segment
        if segment.is_aborted:
            self._check_aborted()
        segment.begin(sequence, prepared.signature, None if prepared is self._last else prepared.text)
        self._last = prepared
        registers, steps = prepared.registers, prepared.steps
        half = sequence & 1
        source = buffer.clone() if program.collective == "all_to_all" else buffer
        registers[at.FROM_USER], registers[at.INTO_USER] = source.data_ptr(), buffer.data_ptr()
        registers[at.PERIOD] = registers[at.STEP] = 0
        arguments = (
            registers, steps.steps, steps.sources, steps.waits, steps.chunks, steps.strides, self._windows[half],
            self._bases, self._needs[half], self._seen, prepared.addresses,
        )  # fmt: skip
        try:
            since, stands = time.monotonic(), (-1, -1)
            while (status := at.interpret(*arguments)) != at.DONE:
                if status == at.MESSAGE:
                    self._message(prepared, self._windows[half], buffer.element_size())
                    since = time.monotonic()
                else:
                    if (now := (registers[at.PERIOD], registers[at.STEP])) != stands:
                        stands, since = now, time.monotonic()
                    self._look(registers, since)
            for sender in self._senders.values():
                sender.flush(self._check_aborted)
            self._bases += steps.totals
            # Whoever reads this half of the window may still do so: it is written again only when they are done.
            np.copyto(self._needs[half], self._bases, where=steps.readers)
            if others := segment.disagreeing(sequence):
                self._disagree(others[0])
        except BaseException as error:
            self._break(error)
            raise

    def abort(self, reason: str = "") -> None:
        """Make every rank's current and later `run` raise RankFailedError, as if this rank had died."""
        self._break(RankFailedError(f"rank {self.rank} gave up" + (f": {reason}" if reason else ""), place=self.name))

    def close(self) -> None:
        """End threads. Others that still wait for this rank see that it has left; the memory goes with this object."""
        if not self._closed:
            self._closed = True
            for sender in self._senders.values():
                sender.close()
            self._segment.close()

    def _prepare(self, key: tuple, program: Program, buffer: torch.Tensor, operation: str) -> _Prepared:
        if program.size != self.size:
            raise ProgramError(
                f"is for {program.size} ranks, and there are {self.size}", place=program.name,
                remedy="generate it for as many devices as there are ranks",
            )  # fmt: skip
        check_operation(buffer.dtype, operation) if program.reduces else None
        if program.collective == "all_to_all" and buffer.numel() % self.size:
            raise InputError(
                f"{buffer.numel()} elements cannot be divided among {self.size} ranks", place=program.name,
                remedy="pad the vector",
            )  # fmt: skip
        known = self._schedules.get(id(program))
        if known is None:
            known = (program, schedule(program, self._machines), msgspec.json.encode(program))
            self._schedules[id(program)] = known
            if len(self._schedules) > _PLANS:
                self._schedules.popitem(last=False)
        _, plan, encoded = known
        messages = len(set(self._machines)) > 1
        steps = instructions(
            program,
            plan,
            rank=self.rank,
            members=self._members,
            count=buffer.numel(),
            element_bytes=buffer.element_size(),
            window_bytes=_AREA_BYTES,
            slice_bytes=_MESSAGE_SLICE_BYTES if messages else _SLICE_BYTES,
            most_stages=_STAGES,
        )
        kind = str(buffer.dtype).removeprefix("torch.")
        text = f"{program.collective} ({program.name}), {kind}[{buffer.numel()}], {operation}"
        digest = hashlib.blake2b(encoded + text.encode(), digest_size=8).digest()
        registers = np.zeros(at.REGISTERS, np.int64)
        registers[at.HEADER], registers[at.RANK] = self._segment.header, self._local
        registers[at.SIZE], registers[at.ELEMENT_BYTES] = len(self._members), buffer.element_size()
        registers[at.KERNEL] = reduction_kernel(buffer.dtype, operation) if program.reduces else 0
        registers[at.DIVISOR] = self.size if operation == "average" else 1
        registers[at.SLICES], registers[at.COPIES] = steps.slices, steps.copies
        registers[at.PERIODS] = steps.slices + steps.stages - 1
        registers[at.SPINS], registers[at.YIELDS] = self._patience
        prepared = _Prepared(
            program,
            steps,
            registers,
            at.scratch(steps.steps),
            int.from_bytes(digest, "little", signed=True),
            text.encode(),
        )
        self._prepared[key] = prepared
        if len(self._prepared) > _PLANS:
            self._prepared.popitem(last=False)
        return prepared

    # Messages to and from other machines.

    def _message(self, prepared: _Prepared, windows: np.ndarray, element_bytes: int) -> None:
        """Carry out the SEND or RECEIVE at which the interpreter has stopped."""
        registers, steps = prepared.registers, prepared.steps
        period, step = int(registers[at.PERIOD]), int(registers[at.STEP])
        row = steps.steps[step]
        which = period - int(row[STEP_STAGE])
        length, piece = (int(steps.chunks[row[CHUNK], column]) for column in (LENGTH, PIECE))
        length_bytes = min(piece, length - which * piece) * element_bytes
        slot = row[SLOT] if row[KIND] == RECEIVE else steps.sources[row[FIRST_SOURCE], SOURCE_SLOT]
        copy = which % steps.copies
        address = int(windows[self._local]) + copy * int(steps.strides[self._local]) + int(slot)
        array = np.ctypeslib.as_array((ctypes.c_uint8 * length_bytes).from_address(address))
        peer = int(row[PEER])
        transport = self._transport
        assert transport is not None
        if row[KIND] == RECEIVE:
            transport.receive(peer, array)
        else:
            sender = self._senders.get(peer)
            if sender is None:
                sender = self._senders[peer] = _Sender(transport, peer)
            sender.put(array, period, self._check_aborted)
        registers[at.STEP] += 1

    # When something takes long, or goes wrong.

    def _look(self, registers: np.ndarray, since: float) -> None:
        """See why this rank waits, as it has done since `since`; raise if in vain."""
        segment = self._segment
        self._check_aborted()
        if others := segment.disagreeing(self._sequence):
            self._disagree(others[0])
        for other, rank in enumerate(self._members):
            if not segment.has_left(other) and not segment.is_alive(other):
                raise RankFailedError(
                    f"rank {rank} died", place=self.name, remedy="see its output; start again from a checkpoint"
                )
        awaited = int(registers[at.AWAITED])
        # In this order: a rank that has left makes no more progress.
        if segment.has_left(awaited) and segment.progress(awaited) < registers[at.AWAITED_PROGRESS]:
            raise RankFailedError(
                f"rank {self._members[awaited]} has left the group", place=self.name, remedy="see its output"
            )
        if time.monotonic() - since > self.timeout_seconds:
            missing = [self._members[other] for other in segment.behind(self._sequence)]
            raise StalledError(
                f"{name_ranks(missing or [self._members[awaited]])} did not come within {self.timeout_seconds:g} s to"
                f" {segment.describe(self._local)}",
                place=self.name,
                remedy="see what that rank does, or allow more time",
            )

    def _check_aborted(self) -> None:
        kind, reason = self._segment.aborted()
        if kind:
            raise _ERRORS[kind](reason, place=self.name)
        failure = self._transport.failure if self._transport is not None else None
        if failure is not None:
            raise failure

    def _disagree(self, other: int) -> None:
        first, second = sorted((self._local, other))
        raise MismatchError(
            f"rank {self._members[first]} runs {self._segment.describe(first)}, and rank {self._members[second]}"
            f" {self._segment.describe(second)}",
            place=self.name,
            remedy="let every rank run the same programs on the same sizes, in the same order",
        )

    def _break(self, error: BaseException) -> None:
        """Tell everybody why this rank gives up."""
        kind = next((kind for kind, known in _ERRORS.items() if type(error) is known), _ABORTED)
        if not isinstance(error, RunError):
            error = RankFailedError(f"rank {self.rank} stopped: {type(error).__name__}: {error}", place=self.name)
        self._broken = error
        self._segment.abort(kind, error.message)
        if self._transport is not None:
            self._transport.close(error)


class _Sender:
    """A thread that sends to one rank, in order, straight from the window."""

    def __init__(self, transport: Transport, target: int) -> None:
        self._transport, self._target = transport, target
        self._waiting: deque[tuple[int, np.ndarray]] = deque()  # (period, bytes); the first is on its way
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"headway-sender-{target}", daemon=True)
        self._thread.start()

    def put(self, array: np.ndarray, period: int, check: Callable[[], None]) -> None:
        """Send `array` when its turn comes, after everything of earlier periods has been sent.

        The window has a copy of the slots more than there are stages; so what is sent in a period is written again two
        periods later at the earliest, and by then this has been called in the period between.
        """
        self._wait(lambda: not self._waiting or self._waiting[0][0] >= period, check)
        with self._changed:
            self._waiting.append((period, array))
            self._changed.notify_all()

    def flush(self, check: Callable[[], None]) -> None:
        """Wait until everything has been sent."""
        self._wait(lambda: not self._waiting, check)

    def close(self) -> None:
        """End the thread, as soon as the transport lets it go."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _wait(self, condition: Callable[[], bool], check: Callable[[], None]) -> None:
        with self._changed:
            while not self._changed.wait_for(lambda: self._error is not None or condition(), 0.1):
                check()
            if self._error is not None:
                raise self._error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                array = self._waiting[0][1]
            try:
                self._transport.send(self._target, array)
            except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._waiting.popleft()
                self._changed.notify_all()
