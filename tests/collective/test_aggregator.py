"""In-network aggregation under a network that loses, repeats, delays and corrupts: sums are right, or there are none.

Every disaster is drawn from a seed, by hypothesis, and played in virtual time.
"""

from __future__ import annotations

import heapq
import itertools
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.collective.aggregation_worker import Worker
from headway.collective.aggregator import Aggregator, reduce_contributions
from headway.collective.packets import Kind, Operation, Packet, Status, encode
from headway.errors import FieldError, MismatchError, RankFailedError, StalledError

TOKEN = b"secret"
JOB = 7


class Network:
    """Workers and an aggregator, joined by a network that a seed makes bad."""

    def __init__(self, workers: int, *, slots: int = 4, loss: float = 0.2, seed: int = 0, founders: int | None = None):
        self.random = random.Random(seed)
        self.loss = loss
        self.founders = founders or workers
        self.aggregator = Aggregator(slots=slots)
        self.workers: list[Worker] = []
        self.silent: set[int] = set()
        self.corruption = 0.0
        self.now = 0.0
        self._queue: list = []
        self._order = itertools.count()
        for _ in range(workers):
            self.add()

    def add(self) -> Worker:
        nonce = self.random.randbytes(8)
        self.workers.append(
            Worker(JOB, nonce, workers=self.founders, token=TOKEN, patience_seconds=0.01, timeout_seconds=60.0)
        )
        return self.workers[-1]

    def send(self, target, source, packet: Packet) -> None:
        data = encode(packet)
        for _ in range(2 if self.random.random() < self.loss else 1):
            if self.random.random() < self.loss:
                continue
            if self.random.random() < self.corruption:
                spoiled = bytearray(data)
                spoiled[self.random.randrange(len(spoiled))] ^= 1 << self.random.randrange(8)
                data = bytes(spoiled)
            delay = self.random.expovariate(1 / 0.004)
            heapq.heappush(self._queue, (self.now + delay, next(self._order), target, source, data))

    def settle(self, worker: int) -> None:
        """Play until what the worker has asked for is acknowledged."""
        self.play(lambda: self.workers[worker].is_settled)

    def play(self, is_over, *, idle: float | None = None, limit: int = 100_000) -> None:
        """Until it is over; up to the time `idle`, it is no mistake if nobody has anything to do."""
        for _ in range(limit):
            for number, worker in enumerate(self.workers):
                if number not in self.silent:
                    for packet in worker.poll(self.now):
                        self.send("aggregator", number, packet)
            if is_over():
                return
            wake = min(worker.wake_seconds for number, worker in enumerate(self.workers) if number not in self.silent)
            if self._queue and self._queue[0][0] <= (wake if idle is None else min(wake, idle)):
                self.now, _, target, source, data = heapq.heappop(self._queue)
                if target == "aggregator":
                    for address, packet in self.aggregator.receive(data, source):
                        self.send(address, "aggregator", packet)
                elif target not in self.silent:
                    self.workers[target].receive(data, self.now)
            elif idle is not None and wake > idle:
                self.now = idle
            else:
                assert wake < float("inf"), "nobody has anything to do, and it is not over"
                self.now = max(self.now, wake)
        raise AssertionError("it goes on for ever")

    def join(self) -> None:
        self.play(lambda: all(worker.is_member for worker in self.workers))

    def round(self, vectors, operation: Operation, *, segment: int = 4, who=None) -> None:
        """One round of some workers (all), each with its vector, in segments of so many elements."""
        who = range(len(self.workers)) if who is None else who
        for number, vector in zip(who, vectors, strict=True):
            data = memoryview(vector).cast("B")
            size = segment * vector.itemsize
            self.workers[number].begin([data[at : at + size] for at in range(0, len(data), size)], operation)
        self.play(lambda: all(self.workers[number].is_done for number in who))

    def result(self, worker: int, dtype) -> np.ndarray:
        return np.frombuffer(b"".join(part or b"" for part in self.workers[worker].payloads), dtype=dtype)


def draw(seed: int, count: int, length: int, operation: Operation) -> list[Any]:
    source = np.random.default_rng(seed)
    if operation is Operation.SUM_INT32:
        return [source.integers(-(10**6), 10**6, length, dtype=np.int32) for _ in range(count)]
    if operation is Operation.MAX_UINT8:
        return [source.integers(0, 255, length, dtype=np.uint8) for _ in range(count)]
    return [source.standard_normal(length).astype(np.float32) for _ in range(count)]


def expected(vectors: list[np.ndarray], operation: Operation) -> np.ndarray:
    """By another road than the aggregator's: in Python numbers, float32 from the left."""
    if operation is Operation.MAX_UINT8:
        return np.array([max(column) for column in zip(*vectors, strict=True)], dtype=np.uint8)
    if operation is Operation.SUM_INT32:
        return np.array([sum(int(x) for x in column) for column in zip(*vectors, strict=True)], dtype=np.int32)
    total = vectors[0]
    for vector in vectors[1:]:
        total = total + vector
    return total


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    workers=st.integers(1, 5),
    slots=st.integers(1, 6),
    length=st.integers(1, 90),
    loss=st.sampled_from([0.0, 0.2, 0.4]),
    operation=st.sampled_from(Operation),
)
def test_every_round_is_bit_exact_under_loss_duplication_and_reordering(seed, workers, slots, length, loss, operation):
    network = Network(workers, slots=slots, loss=loss, seed=seed)
    network.join()
    # Numbers are given in the order in which Joins come in, and float32 is added in that order.
    order = sorted(range(workers), key=lambda worker: network.workers[worker].number or 0)
    for turn in range(3):
        vectors = draw(seed + turn, workers, length, operation)
        network.round(vectors, operation)
        right = expected([vectors[worker] for worker in order], operation)
        for worker in range(workers):
            found = network.result(worker, right.dtype)
            assert found.tobytes() == right.tobytes()
            assert set(network.workers[worker].counts) == {workers}
            assert not any(network.workers[worker].partial)
    counters = network.aggregator.counters
    assert counters.corrupt == counters.strange == counters.wrong == 0
    assert counters.contributions == workers * counters.results


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31))
def test_corrupted_packets_are_counted_and_never_change_a_sum(seed):
    network = Network(3, loss=0.1, seed=seed)
    network.join()
    network.corruption = 0.2
    vectors = draw(seed, 3, 60, Operation.SUM_INT32)
    network.round(vectors, Operation.SUM_INT32)
    for worker in range(3):
        assert network.result(worker, np.int32).tolist() == expected(vectors, Operation.SUM_INT32).tolist()
    assert network.aggregator.counters.corrupt > 0


def ready(workers: int = 2, **options) -> Network:
    network = Network(workers, loss=0.0, **options)
    network.join()
    return network


def contribution(network: Network, worker: int, segment: int, payload: bytes = b"\1\0\0\0", end: int = 100) -> Packet:
    return Packet(
        Kind.DATA, JOB, worker=network.workers[worker].number or 0, segment=segment, round_end=end, payload=payload
    )


def test_a_duplicate_adds_nothing_and_gets_the_result_alone():
    network = ready()
    aggregator = network.aggregator
    assert aggregator.handle(contribution(network, 0, 0), 0) == []
    assert aggregator.handle(contribution(network, 0, 0), 0) == []
    assert aggregator.counters.duplicates == 1
    both: Any = aggregator.handle(contribution(network, 1, 0), 1)
    assert sorted(target for target, _ in both) == [0, 1]
    again = aggregator.handle(contribution(network, 0, 0), 0)
    assert [target for target, _ in again] == [0]
    assert {bytes(packet.payload) for _, packet in both + again} == {b"\2\0\0\0"}


def test_a_packet_from_two_turns_of_its_slot_ago_is_refused():
    network = ready(slots=2)
    aggregator = network.aggregator
    for segment in range(5):
        for worker in range(2):
            aggregator.handle(contribution(network, worker, segment), worker)
    before = aggregator.counters.contributions
    # Segment 4 is in the set that segment 0 was in: a bare counter would add the old packet to it.
    assert aggregator.handle(contribution(network, 0, 0, b"\x63\0\0\0"), 0) == []
    assert aggregator.counters.stale == 1
    assert aggregator.counters.contributions == before
    (answer,) = aggregator.handle(Packet(Kind.HELP, JOB, worker=network.workers[0].number or 0, segment=0), 0)
    assert answer[1].count == Status.GONE


def test_who_runs_ahead_of_the_window_is_not_let_in():
    network = ready(slots=2)
    assert network.aggregator.handle(contribution(network, 0, 2), 0) == []
    assert network.aggregator.counters.early == 1


def test_strangers_other_lengths_and_other_epochs_are_refused():
    network = ready()
    aggregator = network.aggregator
    aggregator.handle(contribution(network, 0, 0), 0)
    assert aggregator.handle(contribution(network, 1, 0), "elsewhere") == []
    assert aggregator.handle(contribution(network, 1, 0)._replace(worker=9), 1) == []
    assert aggregator.handle(contribution(network, 1, 0)._replace(job=8), 1) == []
    assert aggregator.counters.strange == 3
    assert aggregator.handle(contribution(network, 1, 1, bytes(3)), 1) == []
    assert aggregator.handle(contribution(network, 1, 1, b""), 1) == []
    assert aggregator.counters.wrong == 2
    aggregator.handle(contribution(network, 1, 0)._replace(epoch=5), 1)
    assert aggregator.counters.stale == 1
    results = aggregator.handle(contribution(network, 1, 0), 1)
    assert bytes(results[0][1].payload) == b"\2\0\0\0"


def test_another_token_does_not_join():
    network = ready(1)
    payload = bytes(8) + (1).to_bytes(4, "big") + b"guess"
    assert network.aggregator.handle(Packet(Kind.JOIN, JOB, payload=payload), "thief") == []
    assert network.aggregator.counters.strange == 1


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_no_packet_makes_the_aggregator_fail(data):
    network = ready()
    for _ in range(data.draw(st.integers(1, 12))):
        packet = Packet(
            kind=data.draw(st.sampled_from(Kind)),
            job=data.draw(st.sampled_from([JOB, 3])),
            epoch=data.draw(st.integers(0, 2)),
            worker=data.draw(st.integers(0, 3)),
            segment=data.draw(st.integers(0, 12)),
            round_end=data.draw(st.integers(0, 12)),
            count=data.draw(st.integers(0, 5)),
            operation=data.draw(st.sampled_from(Operation)),
            payload=data.draw(st.binary(max_size=24)),
        )
        network.aggregator.receive(encode(packet), data.draw(st.sampled_from([0, 1, "x"])))


def test_an_overflow_is_flagged_and_stays_at_the_end_of_the_range():
    network = ready(3)
    big = np.array([2**31 - 1, -(2**31), 5], dtype=np.int32)
    # Two of them leave the range, the third brings the last element's neighbour back into it: order does not matter.
    vectors = [big, big, np.array([0, 2**31 - 1, -7], dtype=np.int32)]
    network.round(vectors, Operation.SUM_INT32)
    assert network.result(0, np.int32).tolist() == [2**31 - 1, -(2**31), 3]
    assert network.workers[0].overflow
    there_and_back = [np.array([x], dtype=np.int32) for x in (2**31 - 1, 2**31 - 1, -(2**31 - 1))]
    network.round(there_and_back, Operation.SUM_INT32)
    assert network.result(0, np.int32).tolist() == [2**31 - 1]
    assert not network.workers[0].overflow


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31))
def test_a_threshold_below_the_number_of_workers_makes_partial_results_that_all_share(seed):
    network = Network(3, seed=seed)
    network.join()
    network.workers[0].set_threshold(2)
    network.settle(0)
    vectors = draw(seed, 3, 40, Operation.SUM_INT32)
    network.silent.add(2)
    network.round(vectors[:2], Operation.SUM_INT32, who=[0, 1])
    assert network.result(0, np.int32).tolist() == expected(vectors[:2], Operation.SUM_INT32).tolist()
    assert all(network.workers[0].partial)
    assert set(network.workers[0].counts) == {2}
    # The straggler wakes up: what is still there it gets, and it is told that its part is not in it.
    network.silent.clear()
    straggler = network.workers[2]
    data = memoryview(vectors[2]).cast("B")
    straggler.begin([data[at : at + 16] for at in range(0, len(data), 16)], Operation.SUM_INT32)
    stalled = None
    try:
        network.play(lambda: straggler.is_done)
    except StalledError as error:
        stalled = error
    if stalled is not None:
        assert "is gone" in stalled.message
    else:
        assert network.result(2, np.int32).tolist() == network.result(0, np.int32).tolist()
        assert all(straggler.partial)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31), loss=st.sampled_from([0.0, 0.2]))
def test_who_leaves_is_not_waited_for_and_who_joins_takes_part_from_the_next_round_on(seed, loss):
    network = Network(3, seed=seed, loss=loss)
    network.join()
    vectors = draw(seed, 3, 50, Operation.SUM_INT32)
    network.round(vectors, Operation.SUM_INT32)
    # One leaves while the others have begun a round.
    for worker in (0, 1):
        data = memoryview(vectors[worker]).cast("B")
        network.workers[worker].begin([data[at : at + 16] for at in range(0, len(data), 16)], Operation.SUM_INT32)
    for worker in (0, 1):
        for packet in network.workers[worker].poll(network.now):
            network.send("aggregator", worker, packet)
    network.workers[2].leave()
    network.settle(2)
    network.silent.add(2)
    newcomer = network.add()
    network.play(lambda: newcomer.is_member)
    taking_part = vectors[:2]
    if newcomer.next_segment < network.workers[0].next_segment:
        # It came in before the others' first packets did: then they wait for it in this round already.
        data = memoryview(vectors[2]).cast("B")
        newcomer.begin([data[at : at + 16] for at in range(0, len(data), 16)], Operation.SUM_INT32)
        taking_part = vectors
    network.play(lambda: all(network.workers[worker].is_done for worker in (0, 1, 3)))
    assert network.result(0, np.int32).tolist() == expected(taking_part, Operation.SUM_INT32).tolist()
    assert network.result(1, np.int32).tolist() == network.result(0, np.int32).tolist()
    assert newcomer.next_segment == network.workers[0].next_segment
    network.round(vectors, Operation.SUM_INT32, who=[0, 1, 3])
    for worker in (0, 1, 3):
        assert network.result(worker, np.int32).tolist() == expected(vectors, Operation.SUM_INT32).tolist()
        assert set(network.workers[worker].counts) == {3}


def test_a_worker_that_died_is_named_to_those_that_wait():
    network = ready(3)
    network.silent.add(1)
    number = network.workers[1].number
    with pytest.raises(StalledError, match=f"worker {number} is late"):
        network.round(draw(0, 2, 20, Operation.SUM_INT32), Operation.SUM_INT32, who=[0, 2])


def test_a_dead_worker_that_is_removed_is_no_longer_waited_for():
    network = ready(3)
    network.silent.add(1)
    vectors = draw(0, 2, 8, Operation.SUM_INT32)
    for worker, vector in zip((0, 2), vectors, strict=True):
        network.workers[worker].begin([memoryview(vector).cast("B")], Operation.SUM_INT32)
        for packet in network.workers[worker].poll(network.now):
            network.aggregator.handle(packet, worker)
    outgoing: Any = network.aggregator.remove(JOB, network.workers[1].number or 0)
    for target, packet in outgoing:
        network.workers[target].handle(packet, network.now)
    assert network.result(0, np.int32).tolist() == expected(vectors, Operation.SUM_INT32).tolist()


def test_a_forced_segment_is_sent_as_it_is():
    network = ready()
    network.aggregator.handle(contribution(network, 0, 0, b"\5\0\0\0"), 0)
    network.workers[1].force(0)
    (request,) = network.workers[1].poll(network.now)
    outgoing = network.aggregator.handle(request, 1)
    results = [packet for _, packet in outgoing if packet.kind is Kind.RESULT]
    assert len(results) == 2
    assert all(packet.partial and packet.count == 1 and bytes(packet.payload) == b"\5\0\0\0" for packet in results)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**31))
def test_reset_ends_what_is_going_on_and_begins_anew_for_all(seed):
    network = Network(2, seed=seed)
    network.join()
    vectors = draw(seed, 2, 30, Operation.SUM_INT32)
    network.workers[0].begin([memoryview(vectors[0]).cast("B")], Operation.SUM_INT32)
    for packet in network.workers[0].poll(network.now):
        network.send("aggregator", 0, packet)
    network.workers[1].halt()
    network.settle(1)
    network.workers[1].reset()
    network.play(lambda: all(worker.epoch == 1 and not worker.halted for worker in network.workers))
    assert all(worker.is_done and worker.next_segment == 0 for worker in network.workers)
    network.round(vectors, Operation.SUM_INT32)
    assert network.result(0, np.int32).tolist() == expected(vectors, Operation.SUM_INT32).tolist()


def test_halt_suspends_all_workers():
    network = ready()
    network.workers[0].halt()
    network.play(lambda: all(worker.halted for worker in network.workers))
    network.workers[0].begin([b"\1\0\0\0"], Operation.SUM_INT32)
    assert all(packet.kind is Kind.HELP for packet in network.workers[0].poll(network.now + 1.0))


def test_a_late_duplicate_of_a_join_does_not_bring_back_who_has_left():
    network = ready(3)
    join = Packet(Kind.JOIN, JOB, payload=network.workers[2].nonce + (3).to_bytes(4, "big") + TOKEN)
    network.workers[2].leave()
    network.settle(2)
    assert len(network.aggregator.members(JOB)) == 2
    (answer,) = network.aggregator.handle(join, 2)
    assert answer[1].count == Status.REFUSED
    assert len(network.aggregator.members(JOB)) == 2
    # Nor does it found the job anew, when all have left.
    for worker in (0, 1):
        network.workers[worker].leave()
        network.settle(worker)
    network.aggregator.handle(join, 2)
    assert network.aggregator.members(JOB) == ()


def test_a_leave_that_overtakes_its_join_is_the_last_word():
    aggregator = Aggregator()
    worker = Worker(JOB, b"12345678", workers=1)
    (join,) = worker.poll(0.0)
    worker.leave()
    (leave,) = worker.poll(0.0)
    ((_, answer),) = aggregator.handle(leave, 0)
    assert worker.handle(answer, 0.0)
    assert worker.is_settled
    assert worker.poll(100.0) == []
    aggregator.handle(join, 0)
    assert aggregator.members(JOB) == ()


def test_data_of_a_job_that_has_ended_is_refused_by_the_next_of_its_number():
    aggregator = Aggregator()
    stale = None
    for life in range(2):
        worker = Worker(JOB, bytes(7) + bytes((life,)), workers=1)
        (join,) = worker.poll(0.0)
        worker.handle(aggregator.handle(join, "here")[0][1], 0.0)
        if stale is not None:
            aggregator.handle(stale, "here")
            assert aggregator.counters.contributions == 0
            assert aggregator.counters.stale == 1
        worker.begin([b"\1\0\0\0"], Operation.SUM_INT32)
        (stale,) = worker.poll(0.0)
        worker.leave()
        aggregator.handle(worker.poll(0.0)[0], "here")
        assert aggregator.members(JOB) == ()


def test_a_request_that_comes_late_is_not_obeyed_again():
    network = ready(2)
    worker = network.workers[0]
    worker.set_threshold(1)
    (first,) = worker.poll(network.now)
    worker.handle(network.aggregator.handle(first, 0)[0][1], network.now)
    worker.set_threshold(0)
    network.settle(0)
    network.aggregator.handle(first, 0)
    # All are waited for, still: the old request has set nothing.
    assert network.aggregator.handle(contribution(network, 0, 0), 0) == []


def test_workers_at_odds_are_all_told_who_differs():
    network = ready(3)
    number = network.workers[1].number
    for worker, payload in ((0, b"\1\0\0\0"), (1, bytes(8)), (2, b"\1\0\0\0")):
        network.workers[worker].begin([payload], Operation.SUM_INT32)
    packets = {worker: network.workers[worker].poll(network.now)[0] for worker in range(3)}
    assert network.aggregator.handle(packets[0], 0) == []
    told: dict[Any, Packet] = dict(network.aggregator.handle(packets[1], 1))
    assert sorted(told) == [0, 1]
    for worker, packet in told.items():
        with pytest.raises(MismatchError, match=f"worker {number} sent another length"):
            network.workers[worker].handle(packet, network.now)
    # The third comes later, and learns it when it asks.
    assert network.aggregator.handle(packets[2], 2) == []
    ((_, answer),) = network.aggregator.handle(packets[2]._replace(kind=Kind.HELP, payload=b""), 2)
    with pytest.raises(MismatchError):
        network.workers[2].handle(answer, network.now)


def test_who_was_removed_is_told_when_it_asks():
    network = ready(2)
    worker = network.workers[1]
    network.aggregator.remove(JOB, worker.number or 0)
    worker.begin([b"\1\0\0\0"], Operation.SUM_INT32)
    with pytest.raises(RankFailedError, match="does not know this worker"):
        network.play(lambda: worker.is_done)


def test_founders_must_agree_on_their_number_and_who_comes_later_learns_it():
    aggregator = Aggregator()
    one, odd, other, late = (Worker(JOB, bytes((n,)) * 8, workers=w) for n, w in enumerate((2, 3, 2, 9)))
    for number, worker in enumerate((one, odd, other, late)):
        (join,) = worker.poll(0.0)
        answers: dict[Any, Packet] = dict(aggregator.handle(join, number))
        if worker is odd:
            with pytest.raises(RankFailedError, match="another number of workers"):
                worker.handle(answers[number], 0.0)
        else:
            worker.handle(answers[number], 0.0)
    assert late.is_member
    assert late.workers == 2


def test_who_joins_between_rounds_that_belong_together_takes_part_after_both():
    network = ready(2)
    for worker in network.workers:
        worker.begin([b"\3"], Operation.MAX_UINT8, following=2)
    network.play(lambda: all(worker.is_done for worker in network.workers))
    newcomer = network.add()
    network.play(lambda: newcomer.is_member)
    for worker in network.workers[:2]:
        worker.begin([b"\1\0\0\0"] * 2, Operation.SUM_INT32)
    network.play(lambda: all(worker.is_done for worker in network.workers))
    assert network.result(0, np.int32).tolist() == [2, 2]
    assert newcomer.next_segment == network.workers[0].next_segment


def test_a_newcomer_that_runs_ahead_takes_no_set_that_the_others_have_not_come_to():
    network = ready(2, slots=2)
    for worker in network.workers[:2]:
        worker.begin([b"\1\0\0\0"] * 9, Operation.SUM_INT32)
    network.aggregator.handle(network.workers[0].poll(network.now)[0], 0)
    newcomer = network.add()
    network.play(lambda: newcomer.is_member and all(worker._sent >= 2 for worker in network.workers[:2]))
    newcomer.begin([b"\1\0\0\0"] * 3, Operation.SUM_INT32)
    for worker in network.workers[:2]:
        network.play(lambda worker=worker: worker.is_done)
        assert set(worker.counts) == {2}
        worker.begin([b"\1\0\0\0"] * 3, Operation.SUM_INT32)
    network.play(lambda: all(worker.is_done for worker in network.workers))
    assert set(newcomer.counts) == {3}


def test_a_newcomer_is_not_stuck_when_all_others_leave_in_the_middle_of_a_round():
    network = ready(1, slots=2)
    network.workers[0].begin([b"\1\0\0\0"] * 9, Operation.SUM_INT32)
    network.aggregator.handle(network.workers[0].poll(network.now)[0], 0)
    newcomer = network.add()
    network.play(lambda: newcomer.is_member)
    assert newcomer.next_segment == 9
    network.aggregator.remove(JOB, network.workers[0].number or 0)
    network.silent.add(0)
    newcomer.begin([b"\1\0\0\0"] * 5, Operation.SUM_INT32)
    network.play(lambda: newcomer.is_done)
    assert newcomer.counts == [1] * 5


def test_a_worker_that_clipped_its_values_is_flagged_in_the_result():
    network = ready(2)
    for number, worker in enumerate(network.workers):
        worker.begin([b"\1\0\0\0"] * 2, Operation.SUM_INT32, clipped=[False, number == 1])
    network.play(lambda: all(worker.is_done for worker in network.workers))
    assert all(worker.overflow for worker in network.workers)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), slots=st.integers(1, 5))
def test_whatever_happens_each_result_has_each_of_its_workers_once_and_is_the_same_for_all(seed, slots):
    """Joins, leaves, kills, thresholds and forced results, at random; a contribution is a bit of its own."""
    network = Network(3, slots=slots, loss=0.15, seed=seed)
    network.join()
    draws = random.Random(seed)
    seen: dict[int, tuple[int, int, bool]] = {}

    def begin(worker: Worker) -> None:
        def deliver(position: int, packet: Packet) -> None:
            (value,) = np.frombuffer(packet.payload, np.int32)
            assert int(value).bit_count() == packet.count
            assert packet.partial or value >> (worker.number or 0) & 1
            assert not packet.overflow
            found = seen.setdefault(packet.segment, (int(value), packet.count, packet.partial))
            assert found == (value, packet.count, packet.partial)

        bit = (1 << (worker.number or 0)).to_bytes(4, "little")
        # Rounds end at multiples of 7, so that who has joined in the middle of one is in step.
        worker.begin([bit] * (7 - worker.next_segment % 7), Operation.SUM_INT32, deliver=deliver)

    def alive() -> list[int]:
        return [n for n in range(len(network.workers)) if n not in network.silent]

    with_threshold = draws.random() < 0.4

    def live() -> None:
        for _ in range(25):
            for n in alive():
                if network.workers[n].is_done and network.workers[n].is_member and draws.random() < 0.8:
                    begin(network.workers[n])
            stop = network.now + draws.expovariate(1 / 0.03)
            network.play(lambda stop=stop: network.now >= stop, idle=stop)
            event = draws.random()
            n = draws.choice(alive())
            worker = network.workers[n]
            if event < 0.1 and len(network.workers) < 12:
                network.add()
            elif event < 0.2 and worker.is_member and sum(network.workers[n].is_member for n in alive()) > 1:
                network.silent.add(n)
                network.aggregator.remove(JOB, worker.number or 0)
            elif event < 0.3 and with_threshold and worker.is_settled and worker.is_member:
                worker.set_threshold(draws.randrange(4))
            elif event < 0.4 and with_threshold and worker.is_settled and worker.is_member:
                worker.force(max(0, worker.next_segment - 1))
        # In the end all come to the end: nobody is stuck.
        network.play(lambda: all(network.workers[n].is_member for n in alive()))
        end = max(network.workers[n].next_segment for n in alive()) or 7
        while any(network.workers[n].next_segment < end or not network.workers[n].is_done for n in alive()):
            for n in alive():
                if network.workers[n].is_done and network.workers[n].next_segment < end:
                    begin(network.workers[n])
            network.play(
                lambda: (
                    any(network.workers[n].is_done and network.workers[n].next_segment < end for n in alive())
                    or all(network.workers[n].is_done for n in alive())
                )
            )

    try:
        live()
    except StalledError as error:
        # Only those can be left behind whom the others need not wait for.
        if not (with_threshold and "is gone" in error.message):
            raise
    else:
        assert seen


def test_an_aggregator_that_is_full_refuses():
    aggregator = Aggregator(jobs=1)
    first, second = (Worker(job, bytes(8), workers=1) for job in (1, 2))
    for worker in (first, second):
        (packet,) = worker.poll(0.0)
        ((_, answer),) = aggregator.handle(packet, worker.job)
        if worker is first:
            worker.handle(answer, 0.0)
            assert worker.is_member
        else:
            with pytest.raises(RankFailedError, match="does not take this worker"):
                worker.handle(answer, 0.0)


def test_nobody_answers():
    worker = Worker(1, bytes(8), workers=2, timeout_seconds=1.0)
    worker.poll(0.0)
    with pytest.raises(StalledError, match="nobody has answered"):
        worker.poll(2.0)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(FieldError):
        Aggregator(slots=0)
    with pytest.raises(FieldError):
        Worker(1, b"short", workers=2)
    worker = Worker(1, bytes(8), workers=1)
    worker.begin([b"\0\0\0\0"], Operation.SUM_INT32)
    with pytest.raises(FieldError, match="going on"):
        worker.begin([b"\0\0\0\0"], Operation.SUM_INT32)


def test_float32_is_added_from_the_left():
    parts = [np.array([value], dtype=np.float32).tobytes() for value in (1e8, -1e8, 1.0)]
    assert reduce_contributions(Operation.SUM_FLOAT32, parts)[0].tolist() == [1.0]
    assert reduce_contributions(Operation.SUM_FLOAT32, [parts[0], parts[2], parts[1]])[0].tolist() == [0.0]
