"""The aggregator with its data path compiled: what comes all the time never meets the interpreter.

`CompiledAggregator` is the `Aggregator` of `headway.collective`, and gives the same answers to the same packets. A
contribution to a job in good order is handled on arrays, from the datagram to the answers: it stays in the buffer that
it was received in until the others are there. Everything else (membership, requests, Help, whatever is odd) is left to
the pure machine. When that looks at a set, it takes over what is in it, and keeps it until the set is used again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, MutableMapping
from typing import Any, NamedTuple

import numpy as np

from headway.collective.aggregator import Aggregator, Contributions, Job, Outgoing
from headway.collective.packets import (
    COUNT_AT,
    EPOCH_AT,
    FLAGS_AT,
    HEADER_BYTES,
    JOB_AT,
    KIND_AT,
    LARGEST_PAYLOAD_BYTES,
    LENGTH_AT,
    ROUND_END_AT,
    SEGMENT_AT,
    WORKER_AT,
    Kind,
    Operation,
    Packet,
    checksum,
    is_intact,
    read_field,
    seal,
    write_field,
)
from headway.compiled import compiled
from headway.exchange.datagrams import NOT_READY, receive, send, wait, workspace

__all__ = ["ADDRESS_BYTES", "CompiledAggregator"]

ADDRESS_BYTES = 32
"""How long a peer's address is: a `sockaddr`, and zeros."""

_BUFFER_BYTES = (HEADER_BYTES + LARGEST_PAYLOAD_BYTES + 8 + 63) // 64 * 64 + 192  # no power of two: caches dislike them
_MOST_WORKERS = 62  # of a job whose bitmaps fit into a word
_TURN = 256  # datagrams until the interpreter has its turn: for signals, and whoever wants to stop it
_IDLE_MILLISECONDS = 200

# Columns of the tables.
_NUMBER, _EPOCH, _IS_OPEN, _EVERYBODY, _SETTLED, _THRESHOLD, _OPENED, _JOB_COLUMNS = range(8)
_OWNER, _SEGMENT, _ROUND_END, _OPERATION, _LENGTH, _BITMAP, _OVERFLOW, _HAS_RESULT = range(8)
_COUNT, _PARTIAL, _RESULT, _SET_COLUMNS = range(8, 12)
_NOBODY, _HERE, _PURE = range(3)  # who has what is in a set
_FREE, _BUFFER, _SIZE, _ROW, _INDEX, _WORKER, _STATES = range(7)
_CONTRIBUTIONS, _RESULTS, _PARTIALS, _DUPLICATES, _REPEATED, _UNSENT, _COUNTERS = range(7)
_LEFT, _NOTHING, _TO_ONE, _TO_ALL = range(4)  # what becomes of a datagram: left to the pure machine, or answered

_DATA, _RESULT_KIND = int(Kind.DATA), int(Kind.RESULT)
_SUM_INT32, _SUM_FLOAT32, _MAX_UINT8 = (int(one) for one in Operation)
_PARTIAL_FLAG, _OVERFLOW_FLAG, _OPERATION_MASK = 1 << 4, 1 << 5, 0xF
_BLOCK = 1024  # elements that are summed up at a time, where there are more than two contributions


class _Tables(NamedTuple):
    pool: np.ndarray  # [buffer, byte]
    free: np.ndarray  # buffers that nobody uses: the first `state[_FREE]`
    jobs: np.ndarray  # [job, column]
    addresses: np.ndarray  # [job, worker, word]
    sets: np.ndarray  # [job, 2 · slot + set, column]
    parts: np.ndarray  # [job, 2 · slot + set, worker]: the buffer of a contribution
    state: np.ndarray
    counters: np.ndarray


@compiled(nogil=True)
def _payload(tables: _Tables, buffer: int, length: int) -> np.ndarray:
    return tables.pool[buffer][HEADER_BYTES : HEADER_BYTES + length]


@compiled(nogil=True)
def _release(tables: _Tables, row: int, index: int) -> None:
    """Give back the buffers of a set."""
    state, bitmap = tables.sets[row, index], tables.sets[row, index, _BITMAP]
    if state[_OWNER] == _HERE and state[_HAS_RESULT]:
        tables.free[tables.state[_FREE]] = state[_RESULT]
        tables.state[_FREE] += 1
    elif state[_OWNER] == _HERE:
        for worker in range(_MOST_WORKERS):
            if bitmap >> worker & 1:
                tables.free[tables.state[_FREE]] = tables.parts[row, index, worker]
                tables.state[_FREE] += 1
    state[_OWNER] = _NOBODY


@compiled(nogil=True)
def _members(bitmap: int) -> int:
    count = 0
    while bitmap:
        bitmap &= bitmap - 1
        count += 1
    return count


@compiled(nogil=True)
def _clip(value: Any) -> Any:
    return min(max(value, np.int64(-(1 << 31))), np.int64((1 << 31) - 1))


@compiled(nogil=True)
def _reduce(tables: _Tables, row: int, index: int) -> bool:
    """Put the contributions together in the buffer of the first worker's; whether a sum has left its range."""
    state = tables.sets[row, index]
    length, operation, bitmap = state[_LENGTH], state[_OPERATION], state[_BITMAP]
    buffers = np.empty(_MOST_WORKERS, np.int64)
    count = 0
    for worker in range(_MOST_WORKERS):
        if bitmap >> worker & 1:
            buffers[count] = tables.parts[row, index, worker]
            count += 1
    changed = np.int64(0)
    first = _payload(tables, buffers[0], length)
    if operation == _MAX_UINT8:
        for position in range(1, count):
            part = _payload(tables, buffers[position], length)
            for i in range(length):
                first[i] = max(first[i], part[i])
    elif operation == _SUM_FLOAT32:
        floats = first.view(np.float32)
        for position in range(1, count):
            more = _payload(tables, buffers[position], length).view(np.float32)
            for i in range(length // 4):
                floats[i] += more[i]
    elif count == 2:
        one, other = first.view(np.int32), _payload(tables, buffers[1], length).view(np.int32)
        for i in range(length // 4):
            value = np.int64(one[i]) + np.int64(other[i])
            clipped = _clip(value)
            changed |= clipped ^ value
            one[i] = clipped
    elif count > 2:
        wide = np.empty(_BLOCK, np.int64)
        for start in range(0, length // 4, _BLOCK):
            size = min(_BLOCK, length // 4 - start)
            wide[:size] = 0
            for position in range(count):
                block = _payload(tables, buffers[position], length).view(np.int32)[start : start + size]
                for i in range(size):
                    wide[i] += block[i]
            out = first.view(np.int32)[start : start + size]
            for i in range(size):
                clipped = _clip(wide[i])
                changed |= clipped ^ wide[i]
                out[i] = clipped
    state[_RESULT] = buffers[0]
    for position in range(count - 1, 0, -1):  # the latest is the first to be used again: it is in the cache
        tables.free[tables.state[_FREE]] = buffers[position]
        tables.state[_FREE] += 1
    return changed != 0


@compiled(nogil=True)
def _handle(tables: _Tables, source: np.ndarray) -> int:
    """What becomes of the datagram in the buffer: it is kept, or answered with the result of a set, or left."""
    state, jobs = tables.state, tables.jobs
    buffer, size = state[_BUFFER], state[_SIZE]
    data = tables.pool[buffer][:size]
    if size <= HEADER_BYTES or read_field(data, KIND_AT) != _DATA or not is_intact(data):
        return _LEFT
    number, worker = read_field(data, JOB_AT), read_field(data, WORKER_AT)
    row = 0
    while row < len(jobs) and jobs[row, _NUMBER] != number:
        row += 1
    if row == len(jobs) or worker >= _MOST_WORKERS:
        return _LEFT
    job, length = jobs[row], size - HEADER_BYTES
    segment, round_end = read_field(data, SEGMENT_AT), read_field(data, ROUND_END_AT)
    flags = read_field(data, FLAGS_AT)
    operation = flags & _OPERATION_MASK
    if not job[_IS_OPEN] or not job[_EVERYBODY] >> worker & 1 or read_field(data, EPOCH_AT) != job[_EPOCH]:
        return _LEFT
    for word in range(len(source)):
        if source[word] != tables.addresses[row, worker, word]:
            return _LEFT
    if operation > _MAX_UINT8 or (operation != _MAX_UINT8 and length % 4):
        return _LEFT
    if segment < job[_SETTLED] or round_end <= segment:  # a number of 64 bits that looks negative is left, too
        return _LEFT
    slots = tables.sets.shape[1] // 2
    index = segment % slots * 2 + segment // slots % 2
    kept = tables.sets[row, index]
    is_new = kept[_OWNER] == _NOBODY or kept[_SEGMENT] < segment
    if is_new:
        before = segment - slots
        if before >= 0:
            other = tables.sets[row, before % slots * 2 + before // slots % 2]
            if other[_OWNER] == _NOBODY or other[_SEGMENT] != before or not other[_HAS_RESULT]:
                return _LEFT
        _release(tables, row, index)
        kept[:] = 0
        kept[_OWNER], kept[_SEGMENT], kept[_ROUND_END] = _HERE, segment, round_end
        kept[_OPERATION], kept[_LENGTH] = operation, length
        job[_OPENED] = max(job[_OPENED], round_end)
    elif (
        kept[_OWNER] != _HERE
        or kept[_SEGMENT] > segment
        or kept[_OPERATION] != operation
        or kept[_LENGTH] != length
        or kept[_ROUND_END] != round_end
    ):
        return _LEFT
    state[_ROW], state[_INDEX], state[_WORKER] = row, index, worker
    is_there = kept[_BITMAP] >> worker & 1
    if kept[_HAS_RESULT]:
        tables.counters[_DUPLICATES] += is_there
        tables.counters[_REPEATED] += 1
        return _TO_ONE
    if is_there:
        tables.counters[_DUPLICATES] += 1
        return _NOTHING
    if state[_FREE] == 0:
        return _LEFT
    tables.parts[row, index, worker] = buffer
    state[_FREE] -= 1
    state[_BUFFER] = tables.free[state[_FREE]]
    kept[_BITMAP] |= np.int64(1) << worker
    if flags & _OVERFLOW_FLAG:
        kept[_OVERFLOW] = 1
    tables.counters[_CONTRIBUTIONS] += 1
    bitmap, awaited = kept[_BITMAP], job[_EVERYBODY]
    if job[_THRESHOLD]:
        if _members(bitmap) < min(job[_THRESHOLD], max(1, _members(awaited))):
            return _NOTHING
    elif bitmap & awaited != awaited:
        return _NOTHING
    if _reduce(tables, row, index):
        kept[_OVERFLOW] = 1
    kept[_HAS_RESULT], kept[_COUNT] = 1, _members(bitmap)
    kept[_PARTIAL] = int(bitmap & awaited != awaited)
    tables.counters[_RESULTS] += 1
    tables.counters[_PARTIALS] += kept[_PARTIAL]
    return _TO_ALL


@compiled(nogil=True)
def _answer(tables: _Tables, action: int, descriptor: int, address_bytes: int, work: np.ndarray, header: np.ndarray):
    """Send a set's result to all who take part, or to the one who has contributed again."""
    row, index, one = tables.state[_ROW], tables.state[_INDEX], tables.state[_WORKER]
    job, kept = tables.jobs[row], tables.sets[row, index]
    payload = _payload(tables, kept[_RESULT], kept[_LENGTH])
    of_payload = checksum(payload)
    flags = kept[_OPERATION]
    if kept[_PARTIAL]:
        flags |= _PARTIAL_FLAG
    if kept[_OVERFLOW]:
        flags |= _OVERFLOW_FLAG
    write_field(header, KIND_AT, _RESULT_KIND)
    write_field(header, JOB_AT, job[_NUMBER])
    write_field(header, EPOCH_AT, job[_EPOCH])
    write_field(header, FLAGS_AT, flags)
    write_field(header, SEGMENT_AT, kept[_SEGMENT])
    write_field(header, ROUND_END_AT, kept[_ROUND_END])
    write_field(header, COUNT_AT, kept[_COUNT])
    write_field(header, LENGTH_AT, kept[_LENGTH])
    for worker in range(_MOST_WORKERS):
        if job[_EVERYBODY] >> worker & 1 and (action == _TO_ALL or worker == one):
            write_field(header, WORKER_AT, worker)
            seal(header, of_payload)
            if send(descriptor, work, header, payload, tables.addresses[row, worker], address_bytes) < 0:
                tables.counters[_UNSENT] += 1


@compiled(nogil=True)
def _serve(
    tables: _Tables,
    descriptor: int,
    wake: int,
    address_bytes: int,
    work: np.ndarray,
    source: np.ndarray,
    header: np.ndarray,
) -> int:
    """Handle datagrams; 1 if the one in the buffer is left to the pure machine, 0 to look around, or minus an errno."""
    for _ in range(_TURN):
        size = receive(descriptor, work, tables.pool[tables.state[_BUFFER]], source)
        if size < 0:
            if size != NOT_READY:
                return size
            if wait(descriptor, wake, work, _IDLE_MILLISECONDS) != 1:
                return 0
            continue
        tables.state[_SIZE] = size
        action = _handle(tables, source)
        if action == _LEFT:
            return 1
        if action != _NOTHING:
            _answer(tables, action, descriptor, address_bytes, work, header)
    return 0


class _Sets(MutableMapping[tuple[int, int], Contributions]):
    """The sets of a job as the pure machine sees them. What it has looked at, it keeps."""

    def __init__(self, tables: _Tables, row: int, number: int) -> None:
        self._tables, self._row, self._number = tables, row, number
        self._kept: dict[int, Contributions] = {}
        self._slots = tables.sets.shape[1] // 2

    def __getitem__(self, key: tuple[int, int]) -> Contributions:
        index = 2 * key[0] + key[1]
        owner = self._tables.sets[self._row, index, _OWNER]
        if owner == _NOBODY:
            raise KeyError(key)
        if owner == _HERE:
            self[key] = self._take(index)
        return self._kept[index]

    def __setitem__(self, key: tuple[int, int], contributions: Contributions) -> None:
        index = 2 * key[0] + key[1]
        _release(self._tables, self._row, index)
        self._kept[index] = contributions
        self._tables.sets[self._row, index, _OWNER] = _PURE
        self.show()

    def __delitem__(self, key: tuple[int, int]) -> None:
        index = 2 * key[0] + key[1]
        _release(self._tables, self._row, index)
        self._kept.pop(index, None)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        owners = self._tables.sets[self._row, :, _OWNER]
        return iter([(int(index) // 2, int(index) % 2) for index in np.flatnonzero(owners != _NOBODY)])

    def __len__(self) -> int:
        return int(np.count_nonzero(self._tables.sets[self._row, :, _OWNER] != _NOBODY))

    def show(self) -> None:
        """Let the compiled code know how the sets stand that the pure machine has."""
        for index in list(self._kept):
            row = self._tables.sets[self._row, index]
            if row[_OWNER] != _PURE:
                del self._kept[index]  # used again since
                continue
            row[_SEGMENT] = min(self._kept[index].segment, (1 << 63) - 1)
            row[_HAS_RESULT] = self._kept[index].result is not None

    def result(self, index: int) -> Packet:
        """The result that the compiled code has in a set."""
        tables, row = self._tables, self._tables.sets[self._row, index].tolist()
        return Packet(
            kind=Kind.RESULT, job=self._number, epoch=int(tables.jobs[self._row, _EPOCH]), segment=row[_SEGMENT],
            round_end=row[_ROUND_END], count=row[_COUNT], operation=Operation(row[_OPERATION]),
            partial=bool(row[_PARTIAL]), overflow=bool(row[_OVERFLOW]),
            payload=_payload(tables, row[_RESULT], row[_LENGTH]).tobytes(),
        )  # fmt: skip

    def _take(self, index: int) -> Contributions:
        """What the compiled code has in a set, as the pure machine would have it."""
        tables, row = self._tables, self._tables.sets[self._row, index].tolist()
        made = Contributions(row[_SEGMENT], row[_ROUND_END], Operation(row[_OPERATION]), row[_LENGTH])
        made.overflow = bool(row[_OVERFLOW])
        if row[_HAS_RESULT]:
            made.bitmap, made.result = row[_BITMAP], self.result(index)
            return made
        for worker in range(_MOST_WORKERS):
            if row[_BITMAP] >> worker & 1:
                buffer = int(tables.parts[self._row, index, worker])
                made.add(worker, _payload(tables, buffer, made.length).tobytes())
        return made


class CompiledAggregator(Aggregator):
    """An `Aggregator` whose peers' addresses are bytes (`ADDRESS_BYTES`), and whose contributions stay in buffers.

    `buffers` is how many datagrams it can keep without the pure machine's help. Further arguments: see `Aggregator`.
    """

    def __init__(self, *, slots: int = 64, jobs: int = 16, buffers: int = 256, **options: Any) -> None:
        super().__init__(slots=slots, jobs=jobs, **options)
        buffers = max(buffers, 2)
        self._tables = tables = _Tables(
            pool=np.empty((buffers, _BUFFER_BYTES), np.uint8),
            free=np.arange(buffers, dtype=np.int64),
            jobs=np.zeros((jobs, _JOB_COLUMNS), np.int64),
            addresses=np.zeros((jobs, _MOST_WORKERS, ADDRESS_BYTES // 8), np.uint64),
            sets=np.zeros((jobs, 2 * slots, _SET_COLUMNS), np.int64),
            parts=np.zeros((jobs, 2 * slots, _MOST_WORKERS), np.int64),
            state=np.zeros(_STATES, np.int64),
            counters=np.zeros(_COUNTERS, np.int64),
        )
        tables.state[_FREE], tables.state[_BUFFER] = buffers - 1, buffers - 1
        tables.jobs[:, _NUMBER] = -1
        self._rows: dict[int, int] = {}
        self._work, self._source = workspace(), np.zeros(ADDRESS_BYTES // 8, np.uint64)
        self._header = np.zeros(HEADER_BYTES, np.uint8)
        self.unsent = 0  # results that the kernel did not take: they are asked for again

    @property
    def free_buffers(self) -> int:
        """How many of its buffers hold nothing."""
        return int(self._tables.state[_FREE])

    def receive(self, data: bytes | memoryview, source: Any) -> Outgoing:
        """What to send, to whom, after a datagram has come from `source`."""
        tables = self._tables
        if len(data) <= _BUFFER_BYTES:
            tables.pool[tables.state[_BUFFER], : len(data)] = np.frombuffer(data, np.uint8)
            tables.state[_SIZE] = len(data)
            self._source[:] = np.frombuffer(source, np.uint64)
            action = _handle(tables, self._source)
            self._count()
            if action != _LEFT:
                return self._answers(action)
        return super().receive(data, source)

    def handle(self, packet: Packet, source: Any) -> Outgoing:
        """Leave a packet to the pure machine."""
        self._fetch(packet.job)
        outgoing = super().handle(packet, source)
        self._publish(packet.job)
        return outgoing

    def remove(self, job_number: int, worker: int) -> Outgoing:
        """Take out a worker that is gone without a word; what only waited for it is finished."""
        self._fetch(job_number)
        outgoing = super().remove(job_number, worker)
        self._publish(job_number)
        return outgoing

    def serve(self, descriptor: int, wake: int, address_bytes: int) -> Outgoing:
        """Handle what comes to a UDP socket for a while, or until `wake` has something to be read.

        `address_bytes` is the length of a `sockaddr` of the socket. Gives what is still to be sent. Raises OSError.
        """
        status = _serve(self._tables, descriptor, wake, address_bytes, self._work, self._source, self._header)
        self._count()
        if status < 0 and status != -errno.EINTR:  # a signal, which the interpreter is about to handle
            raise OSError(-status, os.strerror(-status))
        if status <= 0:
            return []
        data = self._tables.pool[self._tables.state[_BUFFER], : self._tables.state[_SIZE]].tobytes()
        return super().receive(data, self._source.tobytes())

    def _new_sets(self, job_number: int) -> MutableMapping[tuple[int, int], Contributions]:
        row = next(row for row in range(self.most_jobs) if row not in self._rows.values())
        self._rows[job_number] = row
        return _Sets(self._tables, row, job_number)

    def _count(self) -> None:
        found, counters = self._tables.counters, self.counters
        if found.any():
            contributions, results, partial, duplicates, repeated, unsent = found.tolist()
            counters.contributions += contributions
            counters.results += results
            counters.partial += partial
            counters.duplicates += duplicates
            counters.repeated += repeated
            self.unsent += unsent
            found[:] = 0

    def _fetch(self, number: int) -> None:
        row = self._rows.get(number)
        if row is not None:
            self._jobs[number].opened = max(self._jobs[number].opened, int(self._tables.jobs[row, _OPENED]))

    def _publish(self, number: int) -> None:
        """Let the compiled code know how a job stands."""
        row = self._rows.get(number)
        if row is None:
            return
        job, tables = self._jobs.get(number), self._tables
        if job is None:
            del self._rows[number]
            for index in range(2 * self.slots):
                _release(tables, row, index)
            tables.jobs[row] = 0
            tables.jobs[row, _NUMBER] = -1
            return
        is_open = job.founded and not job.halted and job.next_worker <= _MOST_WORKERS and job.opened < 1 << 63
        tables.jobs[row] = (
            number, job.epoch, is_open, job.everybody if is_open else 0, min(job.settled, (1 << 63) - 1), job.threshold,
            min(job.opened, (1 << 63) - 1),
        )  # fmt: skip
        if is_open:
            for worker, member in job.members.items():
                tables.addresses[row, worker] = np.frombuffer(member.address, np.uint64)  # pyright: ignore
        assert isinstance(job.sets, _Sets)
        job.sets.show()

    def _answers(self, action: int) -> Outgoing:
        if action == _NOTHING:
            return []
        tables = self._tables
        row, index, one = (int(tables.state[column]) for column in (_ROW, _INDEX, _WORKER))
        number = int(tables.jobs[row, _NUMBER])
        job: Job = self._jobs[number]
        sets = job.sets
        assert isinstance(sets, _Sets)
        result = sets.result(index)
        return [
            (member.address, result._replace(worker=worker))
            for worker, member in job.members.items()
            if action == _TO_ALL or worker == one
        ]
