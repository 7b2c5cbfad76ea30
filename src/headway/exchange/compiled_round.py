"""A worker's round with its hot path compiled: segments go out and sums come in without the interpreter.

`CompiledRound` sends the window, takes results in and puts them where they belong, as `Worker` and its caller would. As
soon as anything else is there to do (a time is up, another packet than a result comes, the aggregator is gone), it
tells the `Worker` how far it has come and leaves the rest to it.
"""

from __future__ import annotations

import enum
import errno
import math
import os
import time
from typing import Any

import numpy as np

from headway.collective.aggregation_worker import Worker
from headway.collective.packets import (
    COUNT_AT,
    EPOCH_AT,
    FLAGS_AT,
    HEADER_BYTES,
    JOB_AT,
    KIND_AT,
    LENGTH_AT,
    ROUND_END_AT,
    SEGMENT_AT,
    WORKER_AT,
    Kind,
    Operation,
    checksum,
    is_intact,
    read_field,
    seal,
    write_field,
)
from headway.compiled import compiled
from headway.exchange.block_exponents import quantise, restore
from headway.exchange.datagrams import NOT_READY, REFUSED, monotonic_seconds, receive, send, wait, workspace

__all__ = ["CompiledRound", "Stop"]

_BATCH = 8  # results taken in before more is sent: each turn costs a change of processes
_SEND_MILLISECONDS = 10  # to wait for room; then the datagram is lost, and asked for
_IDLE_SECONDS = 0.2  # at most in one wait: the interpreter looks at signals in between

_JOB, _EPOCH, _NUMBER, _START, _ROUND_END, _OPERATION, _WIDTH, _MODE, _BITS, _PATIENCE, _FIXED = range(11)
_LOW, _SENT, _WINDOW, _RECEIVED, _SIZE, _OVERFLOW, _COUNTS = range(7)
_DUE, _ANSWERED, _TIMES = range(3)
_COPIED, _AVERAGED, _QUANTISED, _QUANTISED_AVERAGE = range(4)
_UNSENT, _WAITING, _DONE = range(3)
_DATA, _RESULT = int(Kind.DATA), int(Kind.RESULT)
_PARTIAL_FLAG, _OVERFLOW_FLAG, _OPERATION_MASK = 1 << 4, 1 << 5, 0xF
_NOTHING = np.zeros(1, np.uint8)


class Stop(enum.IntEnum):
    """Why the compiled code has stopped."""

    DONE = 0  # the round is over
    TIME = 1  # something is due, or it is time to look around
    PACKET = 2  # a packet is for the worker to handle
    REFUSED = 3  # nobody listens there


@compiled(nogil=True)
def _part(vector: np.ndarray, fixed: np.ndarray, position: int) -> np.ndarray:
    return vector[position * fixed[_WIDTH] : (position + 1) * fixed[_WIDTH]]


@compiled(nogil=True)
def _send(descriptor, work, header, out, fixed, vector, own, agreed, position, no_address):
    """Send a segment: 0 or more, or minus an errno."""
    part = _part(vector, fixed, position)
    flags = fixed[_OPERATION]
    if fixed[_MODE] >= _QUANTISED:
        size = len(part)
        quantise(part.view(np.float32), own[position], agreed[position], fixed[_BITS], out[:size].view(np.int32))
        part = out[:size]
        if own[position] > agreed[position]:
            flags |= _OVERFLOW_FLAG
    write_field(header, KIND_AT, _DATA)
    write_field(header, JOB_AT, fixed[_JOB])
    write_field(header, EPOCH_AT, fixed[_EPOCH])
    write_field(header, WORKER_AT, fixed[_NUMBER])
    write_field(header, FLAGS_AT, flags)
    write_field(header, SEGMENT_AT, fixed[_START] + position)
    write_field(header, ROUND_END_AT, fixed[_ROUND_END])
    write_field(header, COUNT_AT, 0)
    write_field(header, LENGTH_AT, len(part))
    seal(header, checksum(part))
    status = send(descriptor, work, header, part, no_address, 0)
    if status == NOT_READY and wait(descriptor, -1, work, _SEND_MILLISECONDS, True) == 1:
        status = send(descriptor, work, header, part, no_address, 0)
    return status


@compiled(nogil=True)
def _deliver(data, fixed, vector, agreed, position):
    """Put a sum where it belongs."""
    part = _part(vector, fixed, position)
    payload = data[HEADER_BYTES:]
    mode, count = fixed[_MODE], read_field(data, COUNT_AT)
    if mode == _COPIED:
        part[:] = payload
    elif mode == _AVERAGED:
        values, sums, divisor = part.view(np.float32), payload.view(np.float32), np.float32(count)
        for index in range(len(values)):
            values[index] = sums[index] / divisor
    else:
        factor = 1.0 / count if mode == _QUANTISED_AVERAGE else 1.0
        restore(payload.view(np.int32), agreed[position], fixed[_BITS], factor, part.view(np.float32))


@compiled(nogil=True)
def _run(
    descriptor, work, header, out, buffer, source, fixed, counts, times, status, since, found, partial,
    vector, own, agreed,
):  # fmt: skip
    """Send and receive until the round is over or something else is to be done: a `Stop`, or minus an errno."""
    length = len(status)
    taken = 0  # since more was sent
    patience = fixed[_PATIENCE] * 1e-9
    batch = max(1, min(_BATCH, counts[_WINDOW] // 4))
    while counts[_RECEIVED] < length:
        limit = min(length, counts[_LOW] + counts[_WINDOW])
        if counts[_SENT] < limit and (taken >= batch or counts[_SENT] == counts[_RECEIVED]):
            now = monotonic_seconds(work)
            while counts[_SENT] < limit:
                position = counts[_SENT]
                went = _send(descriptor, work, header, out, fixed, vector, own, agreed, position, source)
                if went < 0 and went != NOT_READY:
                    return 3 if went == REFUSED else went
                status[position], since[position] = _WAITING, now
                counts[_SENT] += 1
            times[_DUE] = min(times[_DUE], now + patience)
            taken = 0
        size = receive(descriptor, work, buffer, source)
        if size == NOT_READY:
            if counts[_SENT] < limit:
                taken = batch  # there is time to send
                continue
            now = monotonic_seconds(work)
            rest = min(times[_DUE] - now, _IDLE_SECONDS)
            if rest <= 0:
                return 1
            if wait(descriptor, -1, work, math.ceil(rest * 1000)) == 0 and rest == _IDLE_SECONDS:
                return 1
            continue
        if size < 0:
            return 3 if size == REFUSED else size
        counts[_SIZE] = size
        data = buffer[:size]
        if size <= HEADER_BYTES or read_field(data, KIND_AT) != _RESULT or not is_intact(data):
            return 2
        position = read_field(data, SEGMENT_AT) - fixed[_START]
        flags = read_field(data, FLAGS_AT)
        if (
            read_field(data, JOB_AT) != fixed[_JOB]
            or read_field(data, EPOCH_AT) != fixed[_EPOCH]
            or read_field(data, WORKER_AT) != fixed[_NUMBER]
            or flags & _OPERATION_MASK != fixed[_OPERATION]
            or position < 0
            or position >= length
            or status[position] != _WAITING
            or size - HEADER_BYTES != len(_part(vector, fixed, position))
        ):
            continue  # of the past
        _deliver(data, fixed, vector, agreed, position)
        status[position] = _DONE
        found[position] = read_field(data, COUNT_AT)
        partial[position] = flags & _PARTIAL_FLAG != 0
        counts[_OVERFLOW] |= flags & _OVERFLOW_FLAG
        counts[_RECEIVED] += 1
        while counts[_LOW] < counts[_SENT] and status[counts[_LOW]] == _DONE:
            counts[_LOW] += 1
        if since[position] > times[_ANSWERED]:
            # What was sent before this one, and has no answer, may be lost: it has to be looked at when it is due.
            times[_DUE] = min(times[_DUE], times[_ANSWERED] + patience)
            times[_ANSWERED] = since[position]
        taken += 1
    return 0


class CompiledRound:
    """The round that `worker` has just begun, on the connected socket `descriptor`, for the vector given as bytes.

    Each segment is `width_bytes` of it. With `exponents`, the workers' own and the agreed ones of the segments (uint8),
    the vector's float32 go out as integers of `bits` bits. `is_average`: divide each sum by how many are in it.
    """

    def __init__(
        self,
        worker: Worker,
        descriptor: int,
        vector: Any,
        width_bytes: int,
        operation: Operation,
        *,
        is_average: bool = False,
        exponents: tuple[Any, Any] | None = None,
        bits: int = 0,
    ) -> None:
        self._worker, self._descriptor, self._vector = worker, descriptor, vector
        length = -(-len(vector) // width_bytes)
        mode = (_QUANTISED if exponents is not None else _COPIED) + is_average
        self._fixed = np.zeros(_FIXED, np.int64)
        self._fixed[_OPERATION], self._fixed[_WIDTH], self._fixed[_MODE] = operation, width_bytes, mode
        self._fixed[_BITS], self._fixed[_PATIENCE] = bits, round(worker.patience_seconds * 1e9)
        self._own, self._agreed = exponents or (_NOTHING, _NOTHING)
        self._counts, self._times = np.zeros(_COUNTS, np.int64), np.zeros(_TIMES)
        self._status, self._since = np.zeros(length, np.uint8), np.zeros(length)
        self._found, self._partial = np.zeros(length, np.int64), np.zeros(length, np.bool_)
        self._work, self._header = workspace(), np.zeros(HEADER_BYTES, np.uint8)
        self._out = np.empty(width_bytes if exponents is not None else 4, np.uint8)
        self._buffer: Any = np.empty(1 << 16, np.uint8)
        self._source = np.zeros(4, np.uint64)

    def run(self) -> Stop:
        """Go on with the round from where the worker is, and tell it how far that went. Raises OSError."""
        worker, counts, times, fixed = self._worker, self._counts, self._times, self._fixed
        at = worker.progress()
        fixed[_JOB], fixed[_EPOCH], fixed[_NUMBER] = worker.job, worker.epoch, worker.number or 0
        fixed[_START], fixed[_ROUND_END] = at.start, at.round_end
        low, sent = at.low - at.start, at.sent - at.start
        self._status[counts[_LOW] : sent] = _DONE
        for segment, since in at.waiting.items():
            self._status[segment - at.start], self._since[segment - at.start] = _WAITING, since
        counts[:] = (low, sent, worker.window, at.received, 0, 0)
        times[:] = (at.due_seconds, at.answered_seconds)
        stopped = _run(
            self._descriptor, self._work, self._header, self._out, self._buffer, self._source, fixed, counts, times,
            self._status, self._since, self._found, self._partial, self._vector, self._own, self._agreed,
        )  # fmt: skip
        waiting = np.flatnonzero(self._status[low : counts[_SENT]] == _WAITING) + low
        worker.catch_up(
            at._replace(
                sent=at.start + int(counts[_SENT]),
                waiting={at.start + position: float(self._since[position]) for position in waiting.tolist()},
                received=int(counts[_RECEIVED]),
                due_seconds=float(times[_DUE]),
                answered_seconds=float(times[_ANSWERED]),
            ),
            self._found,
            self._partial,
            time.monotonic(),
            overflow=bool(counts[_OVERFLOW]),
        )
        if stopped < 0 and stopped != -errno.EINTR:  # a signal, which the interpreter is about to handle
            raise OSError(-stopped, os.strerror(-stopped))
        return Stop(stopped) if stopped > 0 else Stop.TIME if stopped else Stop.DONE

    @property
    def datagram(self) -> memoryview:
        """What came, when `run` has stopped for a packet."""
        return memoryview(self._buffer)[: int(self._counts[_SIZE])]
