"""The compiled aggregator says and counts what the pure one does, whatever comes."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.collective.aggregator import Aggregator
from headway.collective.packets import HEADER_BYTES, LARGEST_PAYLOAD_BYTES, Kind, Operation, Packet, encode
from headway.exchange.compiled_aggregator import ADDRESS_BYTES, CompiledAggregator
from headway.exchange.datagrams import is_supported

pytestmark = pytest.mark.skipif(not is_supported(), reason="needs the system calls of Linux")
JOBS = (3, 9)


def address(worker: int) -> bytes:
    return worker.to_bytes(2, "little") * (ADDRESS_BYTES // 2)


def both(slots: int, buffers: int = 64, jobs: int = 2, token: bytes | None = None) -> tuple[Aggregator, Any]:
    options: dict[str, Any] = {"slots": slots, "jobs": jobs, "token": token, "first_epoch": 5}
    return Aggregator(**options), CompiledAggregator(buffers=buffers, **options)


def say(machines: tuple[Aggregator, Any], data: bytes, source: bytes) -> list:
    """Give a datagram to both; what they answer, which must be the same."""
    answers = [[(to, encode(packet)) for to, packet in machine.receive(data, source)] for machine in machines]
    assert answers[0] == answers[1]
    assert asdict(machines[0].counters) == asdict(machines[1].counters)
    for job in JOBS:
        assert machines[0].members(job) == machines[1].members(job)
    return answers[0]


def join(job: int, worker: int, founders: int) -> bytes:
    payload = worker.to_bytes(8, "big") + founders.to_bytes(4, "big")
    return encode(Packet(Kind.JOIN, job, payload=payload))


class Draw:
    """Packets as members of two jobs might send them, and as nobody should."""

    def __init__(self, seed: int, slots: int, workers: int) -> None:
        self.random = random.Random(seed)
        self.slots, self.workers = slots, workers
        self.epochs: dict[int, int] = dict.fromkeys(JOBS, 5)
        self.positions = {job: [0] * (workers + 1) for job in JOBS}
        self.sizes = self.random.choice(((4,), (8, 16), (4, 5, 8192 + 12)))

    def payload(self, operation: Operation, length: int) -> bytes:
        source = np.random.default_rng(self.random.randrange(1 << 30))
        if operation is Operation.SUM_FLOAT32 and length % 4 == 0:
            return source.standard_normal(length // 4).astype("<f4").tobytes()
        return source.bytes(length)

    def packet(self) -> tuple[bytes, bytes]:
        draw = self.random.random
        job, worker = self.random.choice(JOBS), self.random.randrange(self.workers)
        source = address(worker if draw() < 0.95 else self.random.randrange(self.workers + 2))
        epoch = self.epochs[job] if draw() < 0.95 else self.random.randrange(4, 12)
        positions = self.positions[job]
        segment = positions[worker] + self.random.choice((0, 0, 0, 0, 1, -1, -2 * self.slots, self.slots, 1 << 63))
        if draw() < 0.8:
            positions[worker] += 1
            segment = positions[worker] - 1
        segment = max(segment, 0)
        kind = Kind.DATA if draw() < 0.8 else self.random.choice(list(Kind))
        operation = Operation.SUM_INT32
        if draw() < 0.3:
            operation = self.random.choice(list(Operation))
        elif segment // 7 % 3:
            operation = Operation(segment // 7 % 3)
        length = self.sizes[segment // 5 % len(self.sizes)] if draw() < 0.95 else self.random.randrange(20)
        payload = self.payload(operation, length)
        if kind is Kind.JOIN:
            payload = worker.to_bytes(8, "big") + self.workers.to_bytes(4, "big")
        elif kind is Kind.LEAVE:
            payload = worker.to_bytes(8, "big")
        end = (segment // 20 + 1) * 20 if draw() < 0.97 else self.random.randrange(1 << 64)
        number = end if kind in (Kind.DATA, Kind.RESULT) else self.random.randrange(60)
        made = Packet(
            kind, job, epoch, worker, segment, number, self.random.choice((0, 0, 1, 2)), operation,
            False, draw() < 0.05, payload,
        )  # fmt: skip
        data = bytearray(encode(made))
        if draw() < 0.03:
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        return bytes(data), source


@given(
    seed=st.integers(0, 2**32),
    slots=st.integers(1, 4),
    workers=st.integers(1, 4),
    buffers=st.sampled_from((2, 5, 64)),
)
@settings(deadline=None, max_examples=60)
def test_it_answers_and_counts_like_the_pure_machine(seed, slots, workers, buffers):
    machines, draw = both(slots, buffers), Draw(seed, slots, workers)
    for job in JOBS:
        for worker in range(workers):
            say(machines, join(job, worker, workers), address(worker))
    draw.epochs = dict(zip(JOBS, (5, 6), strict=True))
    late: list[tuple[bytes, bytes]] = []
    for _ in range(300):
        sent = draw.packet()
        again = [late.pop()] if late and draw.random.random() < 0.3 else []
        for data, source in (sent, *again):
            for _, answer in say(machines, data, source):
                # What a Reset, or a question of an earlier epoch, tells.
                if answer[3] == Kind.ACK:
                    job = int.from_bytes(answer[4:8], "big")
                    draw.epochs[job] = max(draw.epochs[job], int.from_bytes(answer[8:12], "big"))
        if draw.random.random() < 0.2:
            late.insert(0, sent)
        if draw.random.random() < 0.005:
            gone = draw.random.randrange(workers)
            job = draw.random.choice(JOBS)
            answers = [[(to, encode(packet)) for to, packet in each.remove(job, gone)] for each in machines]
            assert answers[0] == answers[1]


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("operation", list(Operation))
@pytest.mark.parametrize("length", [4, 20, 8196, LARGEST_PAYLOAD_BYTES // 8 * 8])
def test_what_is_in_order_never_meets_the_pure_machine(workers, operation, length, monkeypatch):
    machines = both(4, buffers=workers + 12)
    for worker in range(workers):
        say(machines, join(3, worker, workers), address(worker))
    monkeypatch.setattr(machines[1], "handle", None)
    source = np.random.default_rng(workers)
    for segment in range(12):
        answers = []
        for worker in source.permutation(workers).tolist():
            # Numbers whose sums leave the range now and then.
            payload = source.integers(-(2**30), 2**30, length // 4).astype("<i4") * 2
            if operation is Operation.SUM_FLOAT32:
                payload = source.standard_normal(length // 4).astype("<f4")
            data = encode(Packet(Kind.DATA, 3, 5, worker, segment, 12, operation=operation, payload=payload.tobytes()))
            answers = say(machines, data, address(worker))
        assert [to for to, _ in answers] == [address(worker) for worker in range(workers)]
        assert len(answers[0][1]) == HEADER_BYTES + length
    assert machines[0].counters.results == 12


def test_buffers_come_back_when_jobs_end():
    machines = both(4, buffers=8)
    for turn in range(20):
        for worker in range(2):
            say(machines, join(3, 10 * turn + worker, 2), address(worker))
        epoch = 5 + turn
        for segment in range(5):
            for worker in range(2 if segment < 4 else 1):
                data = encode(Packet(Kind.DATA, 3, epoch, worker, segment, 6, payload=bytes(8)))
                say(machines, data, address(worker))
        for worker in range(2):
            leave = Packet(Kind.LEAVE, 3, epoch, worker, payload=(10 * turn + worker).to_bytes(8, "big"))
            say(machines, encode(leave), address(worker))
    free = machines[1]._tables.free[: machines[1].free_buffers].tolist()
    assert sorted(free) == sorted(set(free))
    assert machines[1].free_buffers == 7
