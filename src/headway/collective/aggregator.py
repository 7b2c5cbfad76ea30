"""In-network aggregation, the aggregator's side: a pure state machine that adds up what workers send.

iSwitch (Li et al., ISCA 2019) adds up gradients in a switch: workers send segments of their vectors, the switch sums
what belongs together and broadcasts the result, so that a vector passes each worker's link once in either direction.
Neither this machine nor the workers' (`aggregation_worker`) has a clock or a socket: packets go in, and packets come
out. `exchange.aggregation` runs them on UDP, `simulate.switch` on simulated links.

A bare counter of contributions, as in the paper, is wrong as soon as the network duplicates or delays a packet. Here,
as in SwitchML (Sapio et al., NSDI 2021, section 3.5), each of an aggregator's slots has two sets that take turns, and
each (job, slot, set) has a bitmap of who has contributed:

- segment s of a job uses slot s mod S, and set (s div S) mod 2;
- a worker sends segment s only when it has the results of all segments up to s - S. So when a set is used again, 2 S
  segments later, everybody who counts has the result that was in it: it can be overwritten;
- a contribution that is in the bitmap adds nothing again, one for an earlier segment than the set's is refused, and a
  result stays until its set is used again, for whoever asks for it once more.

The same care is taken of all else: no two jobs or Resets have the same epoch, so what is left of an earlier one is
refused; a worker that has left is known by its nonce, and a Join of its that comes late does not bring it back; a
request carries a number, and is obeyed once.
"""

from __future__ import annotations

import hmac
from collections.abc import Hashable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from headway.collective.packets import Kind, Operation, Packet, Status, decode
from headway.compiled import compiled
from headway.errors import FieldError

__all__ = ["Aggregator", "Contributions", "Counters", "Job", "Outgoing", "reduce_contributions"]

Address = Hashable  # where packets of a worker come from and go to: (host, port), or anything in a simulation
Outgoing = list[tuple[Address, Packet]]

_DTYPES = {Operation.SUM_INT32: "<i4", Operation.SUM_FLOAT32: "<f4", Operation.MAX_UINT8: "u1"}
_ITEM_BYTES = {Operation.SUM_INT32: 4, Operation.SUM_FLOAT32: 4, Operation.MAX_UINT8: 1}
_REQUESTS = (Kind.SETH, Kind.FBCAST, Kind.RESET, Kind.HALT)
_NONCE_BYTES, _JOIN_BYTES = 8, 12
_MOST_WORKERS = 1 << 16  # in the life of a job: what a packet's field can say
_REMEMBERED = 1 << 14  # nonces of workers that have left


@dataclass
class Counters:
    """What an aggregator has seen; everything that it refused is counted here, by the reason."""

    contributions: int = 0
    results: int = 0
    partial: int = 0
    duplicates: int = 0  # contributions that were there already
    repeated: int = 0  # results sent once more, to one worker
    stale: int = 0  # of an earlier segment or epoch
    corrupt: int = 0  # no packet of ours, or a wrong checksum
    strange: int = 0  # from somebody who is no member, of no job, or with a wrong token
    wrong: int = 0  # of another length or operation than the segment's first
    early: int = 0  # beyond the window: results that come before are not there yet
    halted: int = 0  # data of a job that is suspended

    @property
    def refused(self) -> int:
        """Packets that were ignored, but for duplicates."""
        return self.stale + self.corrupt + self.strange + self.wrong + self.early + self.halted


@dataclass
class Contributions:
    """What is in one set of one slot: the segment, who has contributed to it, and what, or their sum."""

    segment: int
    round_end: int
    operation: Operation
    length: int
    bitmap: int = 0
    at_odds: int = 0  # who sent another type or length than the first, and so is not in the bitmap
    overflow: bool = False  # a worker had to clip its values
    total: np.ndarray | None = None  # of integers: they are added up as they come
    # Worker → contribution: of float32, until all are there; of int32, two at most, which need no wider total.
    parts: dict[int, bytes] = field(default_factory=dict)
    result: Packet | None = None

    def add(self, worker: int, payload: bytes | memoryview) -> None:
        """Take in a worker's contribution."""
        self.bitmap |= 1 << worker
        if self.operation is Operation.SUM_FLOAT32:
            self.parts[worker] = bytes(payload)
            return
        array = np.frombuffer(payload, dtype=_DTYPES[self.operation])
        if self.operation is Operation.MAX_UINT8:
            self.total = array.copy() if self.total is None else np.maximum(self.total, array)
        elif self.total is None and len(self.parts) < 2:
            self.parts[worker] = bytes(payload)
        else:
            if self.total is None:
                self.total = np.zeros(len(array), np.int64)
                for part in self.parts.values():
                    _add(self.total, np.frombuffer(part, dtype="<i4"))
                self.parts.clear()
            _add(self.total, array)


@dataclass
class _Member:
    address: Address
    nonce: bytes
    first_segment: int = 0  # from which on it takes part
    request: int = 0  # the number of the latest request that was obeyed


@dataclass
class Job:
    """A job: its members, what they have contributed, and from which segment on all of them take part (`settled`)."""

    token: bytes
    founders: int  # the job begins when so many have joined
    epoch: int
    threshold: int = 0  # H; 0: all that take part
    halted: bool = False
    founded: bool = False
    opened: int = 0  # one past the last segment of the latest round that anybody has begun
    next_worker: int = 0
    members: dict[int, _Member] = field(default_factory=dict)
    sets: MutableMapping[tuple[int, int], Contributions] = field(default_factory=dict)  # by slot and set
    everybody: int = 0  # bits of all members
    settled: int = 0  # from this segment on, all members take part

    def note_members(self) -> None:
        """Bring up to date what depends on who is a member."""
        self.everybody = sum(1 << worker for worker in self.members)
        self.settled = max((member.first_segment for member in self.members.values()), default=0)

    def taking_part(self, segment: int) -> int:
        """Bits of the members whose contributions the segment waits for."""
        if segment >= self.settled:
            return self.everybody
        return sum(1 << worker for worker, member in self.members.items() if member.first_segment <= segment)

    def worker_with(self, nonce: bytes) -> int | None:
        return next((worker for worker, member in self.members.items() if member.nonce == nonce), None)


def reduce_contributions(operation: Operation, parts: Sequence[bytes | memoryview]) -> tuple[np.ndarray, bool]:
    """What an aggregator makes of contributions (given in the order of the workers), and whether a sum overflowed.

    Integer sums are exact, and where one leaves the range of 32 bits it stays at the end of the range. Sums of float32
    are taken from the left.
    """
    arrays = [np.frombuffer(part, dtype=_DTYPES[operation]) for part in parts]
    if operation is Operation.MAX_UINT8:
        return np.maximum.reduce(arrays), False
    if operation is Operation.SUM_FLOAT32:
        total = arrays[0].copy()
        for array in arrays[1:]:
            total += array
        return total, False
    if len(arrays) == 2:
        return _add_two(*arrays)
    wide = arrays[0].astype(np.int64)
    for array in arrays[1:]:
        wide += array
    return _narrow(wide)


@compiled(nogil=True)
def _add_two(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, bool]:
    narrow = np.empty(len(one), np.int32)
    changed = np.int64(0)
    for index in range(len(one)):
        value = np.int64(one[index]) + np.int64(other[index])
        clipped = min(max(value, np.int64(-(1 << 31))), np.int64((1 << 31) - 1))
        changed |= clipped ^ value
        narrow[index] = clipped
    return narrow, changed != 0


@compiled(nogil=True)
def _narrow(wide: np.ndarray) -> tuple[np.ndarray, bool]:
    narrow = np.empty(len(wide), np.int32)
    overflow = False
    for index in range(len(wide)):
        value = wide[index]
        clipped = min(max(value, -(1 << 31)), (1 << 31) - 1)
        overflow |= clipped != value
        narrow[index] = clipped
    return narrow, overflow


@compiled(nogil=True)
def _add(total: np.ndarray, part: np.ndarray) -> None:
    for index in range(len(total)):
        total[index] += part[index]


class Aggregator:
    """Sums segments of the workers of several jobs, each in `slots` slots (of two sets each) of its own.

    `jobs` is how many there may be at a time; the first to join a job sets its token, and whoever joins later must have
    the same one. With `token` given, only that one is accepted. `first_epoch`, drawn at random, tells an aggregator
    from the one that was at its address before. `receive` never raises for what comes in.
    """

    def __init__(self, *, slots: int = 64, jobs: int = 16, token: bytes | None = None, first_epoch: int = 0) -> None:
        if slots < 1 or jobs < 1:
            raise FieldError("must be at least 1", place="aggregator: slots, jobs", remedy="64 slots are a good start")
        if not 0 <= first_epoch < 1 << 31:
            raise FieldError(f"{first_epoch}", place="aggregator: first_epoch", remedy="0 to 2**31 - 1")
        self.slots = slots
        self.most_jobs = jobs
        self.token = token
        self.counters = Counters()
        self._jobs: dict[int, Job] = {}
        self._next_epoch = first_epoch
        self._departed: dict[bytes, None] = {}  # nonces, the earliest first

    def members(self, job_number: int) -> tuple[int, ...]:
        """The numbers of the workers of a job; none if there is no such job."""
        job = self._jobs.get(job_number)
        return tuple(job.members) if job is not None else ()

    def receive(self, data: bytes | memoryview, source: Address) -> Outgoing:
        """What to send, to whom, after a datagram has come from `source`."""
        packet = decode(data)
        if packet is None:
            self.counters.corrupt += 1
            return []
        return self.handle(packet, source)

    def handle(self, packet: Packet, source: Address) -> Outgoing:
        """The same for a packet that has been decoded."""
        if packet.kind is Kind.JOIN:
            return self._join(packet, source)
        if packet.kind is Kind.LEAVE:
            return self._leave(packet, source)
        job = self._jobs.get(packet.job)
        member = job.members.get(packet.worker) if job is not None else None
        if job is None or member is None or member.address != source:
            self.counters.strange += 1
            # A worker that was removed, or an aggregator that was started anew: it need not wait for its time-out.
            return [(source, self._ack(packet, packet.epoch, Status.UNKNOWN))] if packet.kind is Kind.HELP else []
        if packet.epoch != job.epoch:
            self.counters.stale += 1
            # Whoever missed a Reset is told which epoch it is.
            return [(source, self._ack(packet, job.epoch, Status.EPOCH))]
        if packet.kind is Kind.DATA:
            return self._data(job, packet, member)
        if packet.kind is Kind.HELP:
            return self._help(job, packet, member)
        if packet.kind in _REQUESTS:
            return self._request(job, packet, member)
        self.counters.wrong += 1  # results and acks come from here, not to here
        return []

    def remove(self, job_number: int, worker: int) -> Outgoing:
        """Take out a worker that is gone without a word; what only waited for it is finished."""
        job = self._jobs.get(job_number)
        if job is None or worker not in job.members:
            return []
        self._remember(job.members.pop(worker).nonce)
        if not job.members:
            del self._jobs[job_number]
            return []
        job.note_members()
        for state in job.sets.values():
            state.at_odds &= ~(1 << worker)
        return self._finish_ready(job, job_number)

    # Membership

    def _join(self, packet: Packet, source: Address) -> Outgoing:
        payload = bytes(packet.payload)
        if len(payload) < _JOIN_BYTES:
            self.counters.wrong += 1
            return []
        nonce, token = payload[:_NONCE_BYTES], payload[_JOIN_BYTES:]
        founders = int.from_bytes(payload[_NONCE_BYTES:_JOIN_BYTES], "big")
        job = self._jobs.get(packet.job)
        expected = self.token if self.token is not None else job.token if job is not None else token
        if not hmac.compare_digest(token, expected):
            self.counters.strange += 1
            return []
        worker = job.worker_with(nonce) if job is not None else None
        if worker is None:
            if self._refuses(job, nonce, founders):
                self.counters.wrong += 1
                return [(source, self._ack(packet, packet.epoch, Status.REFUSED))]
            if job is None:
                job = self._jobs[packet.job] = Job(token, founders, self._new_epoch(), sets=self._new_sets(packet.job))
            worker = job.next_worker
            job.next_worker += 1
            # Who comes when rounds are going on takes part from the next round on that nobody has begun.
            job.members[worker] = _Member(source, nonce, first_segment=job.opened if job.founded else 0)
            job.note_members()
        assert job is not None
        if job.members[worker].address != source:
            self.counters.strange += 1
            return []
        if not job.founded and len(job.members) >= job.founders:
            job.founded = True
            return [(other.address, self._welcome(job, packet, number)) for number, other in job.members.items()]
        return [(source, self._welcome(job, packet, worker))]

    def _new_sets(self, job_number: int) -> MutableMapping[tuple[int, int], Contributions]:
        return {}

    def _remember(self, nonce: bytes) -> None:
        self._departed[nonce] = None
        if len(self._departed) > _REMEMBERED:
            del self._departed[next(iter(self._departed))]

    def _refuses(self, job: Job | None, nonce: bytes, founders: int) -> bool:
        if nonce in self._departed:
            return True  # a Join that comes late, from a worker that would never answer
        if job is None:
            return len(self._jobs) >= self.most_jobs or not 1 <= founders < _MOST_WORKERS
        return job.next_worker >= _MOST_WORKERS or (not job.founded and founders != job.founders)

    def _welcome(self, job: Job, packet: Packet, worker: int) -> Packet:
        return self._ack(packet, job.epoch, Status.DONE if job.founded else Status.WAITING)._replace(
            worker=worker, segment=job.members[worker].first_segment, round_end=self.slots,
            payload=bytes((Kind.JOIN,)) + job.founders.to_bytes(4, "big"),
        )  # fmt: skip

    def _leave(self, packet: Packet, source: Address) -> Outgoing:
        # By its nonce, which tells it from all others, in whatever epoch: a worker may leave before it is a member.
        nonce = bytes(packet.payload)
        job = self._jobs.get(packet.job)
        worker = job.worker_with(nonce) if job is not None else None
        goodbye = (source, self._ack(packet, packet.epoch, Status.DONE))
        if job is not None and worker is not None and job.members[worker].address == source:
            return [goodbye, *self.remove(packet.job, worker)]
        if worker is not None or len(nonce) != _NONCE_BYTES:
            self.counters.strange += 1
            return []
        self._remember(nonce)  # its Join may be on the way still
        return [goodbye]

    # Requests

    def _request(self, job: Job, packet: Packet, member: _Member) -> Outgoing:
        done = self._ack(packet, job.epoch, Status.DONE)._replace(round_end=packet.round_end)
        if packet.round_end <= member.request:
            self.counters.stale += 1
            return [(member.address, done)]
        member.request = packet.round_end
        if packet.kind is Kind.SETH:
            job.threshold = packet.count
            return [(member.address, done), *self._finish_ready(job, packet.job)]
        if packet.kind is Kind.FBCAST:
            state = self._find(job, packet.segment)
            if state is None or state.segment != packet.segment or state.result is not None:
                return [(member.address, done._replace(count=int(Status.GONE)))]
            return [(member.address, done), *self._finish(job, packet.job, state)]
        if packet.kind is Kind.HALT:
            job.halted = True
            suspended = [(other.address, self._halt(job, packet, worker)) for worker, other in job.members.items()]
            return [(member.address, done), *suspended]
        job.epoch = self._new_epoch()
        job.halted = False
        job.opened = 0
        job.sets.clear()
        for other in job.members.values():
            other.first_segment = 0
        job.note_members()
        return [(other.address, done._replace(epoch=job.epoch, worker=worker)) for worker, other in job.members.items()]

    def _new_epoch(self) -> int:
        self._next_epoch += 1
        return self._next_epoch - 1

    @staticmethod
    def _ack(packet: Packet, epoch: int, status: Status) -> Packet:
        return Packet(
            kind=Kind.ACK, job=packet.job, epoch=epoch, worker=packet.worker, segment=packet.segment,
            count=int(status), payload=bytes((packet.kind,)),
        )  # fmt: skip

    @staticmethod
    def _halt(job: Job, packet: Packet, worker: int) -> Packet:
        return Packet(kind=Kind.HALT, job=packet.job, epoch=job.epoch, worker=worker)

    # Data

    def _data(self, job: Job, packet: Packet, member: _Member) -> Outgoing:
        if job.halted:
            self.counters.halted += 1
            return [(member.address, self._halt(job, packet, packet.worker))]  # it has missed it
        if not job.founded:
            self.counters.stale += 1
            return []
        segment, length = packet.segment, len(packet.payload)
        if (
            segment < member.first_segment
            or packet.round_end <= segment
            or length % _ITEM_BYTES[packet.operation]
            or not length
        ):
            self.counters.wrong += 1
            return []
        key = (segment % self.slots, segment // self.slots % 2)
        state = job.sets.get(key)
        if state is None or state.segment < segment:
            if not self._may_open(job, segment):
                self.counters.early += 1
                return []
            state = job.sets[key] = Contributions(segment, packet.round_end, packet.operation, length)
            job.opened = max(job.opened, packet.round_end)
        elif state.segment > segment:
            self.counters.stale += 1
            return []
        elif (packet.operation, length, packet.round_end) != (state.operation, state.length, state.round_end):
            self.counters.wrong += 1
            return self._refuse_mismatch(job, packet, state)
        bit = 1 << packet.worker
        if state.result is not None:
            self.counters.duplicates += bool(state.bitmap & bit)
            self.counters.repeated += 1
            return [(member.address, state.result._replace(worker=packet.worker))]
        if state.bitmap & bit:
            self.counters.duplicates += 1
            return []
        state.add(packet.worker, packet.payload)
        state.overflow |= packet.overflow
        self.counters.contributions += 1
        if not self._is_complete(job, state):
            return []
        return self._finish(job, packet.job, state)

    def _may_open(self, job: Job, segment: int) -> bool:
        """Whether the set that is next for `segment` may be used: the slot's other set must have its result.

        A worker that keeps to the window has that result. One that has just joined may be ahead of all the others, and
        would take sets that they have not come to; unless there are no others any more.
        """
        before = segment - self.slots
        if before < 0:
            return True
        other = self._find(job, before)
        if other is not None and other.segment == before and other.result is not None:
            return True
        return not job.taking_part(before)

    def _refuse_mismatch(self, job: Job, packet: Packet, state: Contributions) -> Outgoing:
        """Tell everybody who would wait in vain: whoever has contributed, and the one at odds with them."""
        state.at_odds |= 1 << packet.worker
        told = 1 << packet.worker | (state.bitmap if state.result is None else 0)
        answer = self._mismatch(job, packet, state)
        return [
            (member.address, answer._replace(worker=worker))
            for worker, member in job.members.items()
            if told >> worker & 1
        ]

    def _mismatch(self, job: Job, packet: Packet, state: Contributions) -> Packet:
        return self._ack(packet, job.epoch, Status.MISMATCH)._replace(round_end=_first_bits(state.at_odds))

    def _is_complete(self, job: Job, state: Contributions) -> bool:
        awaited = job.taking_part(state.segment)
        if job.threshold:
            return state.bitmap.bit_count() >= min(job.threshold, max(1, awaited.bit_count()))
        return state.bitmap & awaited == awaited

    def _finish(self, job: Job, number: int, state: Contributions) -> Outgoing:
        total: Any  # pyright does not know that an array is a buffer
        if state.total is None:
            total, overflow = reduce_contributions(state.operation, [state.parts[key] for key in sorted(state.parts)])
            state.parts.clear()
        else:
            total, overflow = _narrow(state.total) if state.operation is Operation.SUM_INT32 else (state.total, False)
            state.total = None
        awaited = job.taking_part(state.segment)
        partial = state.bitmap & awaited != awaited
        state.result = Packet(
            kind=Kind.RESULT, job=number, epoch=job.epoch, segment=state.segment, round_end=state.round_end,
            count=state.bitmap.bit_count(), operation=state.operation, partial=partial,
            overflow=bool(overflow) or state.overflow, payload=memoryview(total).cast("B"),
        )  # fmt: skip
        self.counters.results += 1
        self.counters.partial += partial
        return [
            (member.address, state.result._replace(worker=worker))
            for worker, member in job.members.items()
            if member.first_segment <= state.segment
        ]

    def _finish_ready(self, job: Job, number: int) -> Outgoing:
        """After the members or the threshold have changed: what is complete now."""
        outgoing: Outgoing = []
        for state in sorted(job.sets.values(), key=lambda state: state.segment):
            if state.result is None and self._is_complete(job, state):
                outgoing += self._finish(job, number, state)
        return outgoing

    def _find(self, job: Job, segment: int) -> Contributions | None:
        """The set that is, or was, or will be the segment's, if anything is in it."""
        return job.sets.get((segment % self.slots, segment // self.slots % 2))

    def _help(self, job: Job, packet: Packet, member: _Member) -> Outgoing:
        if job.halted:
            return [(member.address, self._halt(job, packet, packet.worker))]
        state = self._find(job, packet.segment)
        if state is None or state.segment < packet.segment:
            return [(member.address, self._ack(packet, job.epoch, Status.RESEND))]
        if state.segment > packet.segment:
            return [(member.address, self._ack(packet, job.epoch, Status.GONE))]
        if state.result is not None:
            self.counters.repeated += 1
            return [(member.address, state.result._replace(worker=packet.worker))]
        if not state.bitmap >> packet.worker & 1:
            return [(member.address, self._ack(packet, job.epoch, Status.RESEND))]
        if state.at_odds:
            return [(member.address, self._mismatch(job, packet, state))]
        missing = job.taking_part(state.segment) & ~state.bitmap
        answer = self._ack(packet, job.epoch, Status.WAITING)
        return [(member.address, answer._replace(round_end=_first_bits(missing)))]


def _first_bits(workers: int) -> int:
    return workers & (1 << 64) - 1
