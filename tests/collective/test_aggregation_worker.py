"""A worker's side of in-network aggregation: what it asks for, when, and what it does not fall for."""

from __future__ import annotations

import pytest

from headway.collective.aggregation_worker import Worker
from headway.collective.aggregator import Aggregator
from headway.collective.packets import Kind, Operation, Packet, Status
from headway.errors import FieldError, RankFailedError, StalledError

ONE = b"\1\0\0\0"


def member(workers: int = 2, *, slots: int = 4, patience: float = 0.01, timeout: float = 5.0) -> Worker:
    """A worker that has joined, with number 0."""
    worker = Worker(1, b"01234567", workers=workers, patience_seconds=patience, timeout_seconds=timeout)
    worker.poll(0.0)
    payload = bytes((Kind.JOIN,)) + workers.to_bytes(4, "big")
    assert worker.handle(Packet(Kind.ACK, 1, round_end=slots, payload=payload), 0.0)
    assert worker.is_member
    return worker


def result(segment: int, payload: bytes = ONE) -> Packet:
    return Packet(Kind.RESULT, 1, segment=segment, round_end=99, count=2, payload=payload)


def answer(segment: int, status: Status, *, to: Kind = Kind.HELP) -> Packet:
    return Packet(Kind.ACK, 1, segment=segment, count=int(status), payload=bytes((to,)))


def test_a_segment_whose_result_came_is_not_sent_again_though_that_was_asked_for():
    worker = member(slots=1)
    buffers = [bytearray(ONE), bytearray(ONE)]

    def deliver(position: int, packet: Packet) -> None:
        buffers[position][:] = packet.payload

    worker.begin([memoryview(buffer) for buffer in buffers], Operation.SUM_INT32, deliver=deliver)
    worker.poll(0.0)
    (question,) = worker.poll(1.0)
    assert question.kind is Kind.HELP
    # Both answers were on the way: the first to the question, the second to what came late.
    worker.handle(answer(0, Status.RESEND), 1.1)
    worker.handle(result(0, b"\7\0\0\0"), 1.1)
    assert [packet.segment for packet in worker.poll(1.1)] == [1]
    assert worker.resent == 0
    worker.handle(result(1), 1.2)
    # Nor is it asked for ever again, until its slot is gone.
    assert worker.poll(2.0) == []
    assert worker.is_done
    assert buffers[0] == b"\7\0\0\0"


def test_while_nothing_comes_in_only_the_first_segment_is_asked_for():
    worker = member(slots=16)
    worker.begin([ONE] * 16, Operation.SUM_INT32)
    assert len(worker.poll(0.0)) == 16
    asked = [packet for step in range(1, 400) for packet in worker.poll(step * 0.01)]
    assert {(packet.kind, packet.segment) for packet in asked} == {(Kind.HELP, 0)}
    assert len(asked) < 15
    worker.handle(answer(0, Status.WAITING), 3.9)
    # Then there is an answer to what was sent after all others: they may be lost, and are asked for, each.
    worker.handle(result(0), 4.0)
    now, found = 4.0, set()
    while now < 4.5:
        now = max(now + 0.001, worker.wake_seconds)
        found |= {packet.segment for packet in worker.poll(now)}
    assert found == set(range(1, 16))


def test_what_was_sent_before_something_that_was_answered_is_asked_for_when_it_is_due():
    worker = member(slots=8)
    worker.begin([ONE] * 9, Operation.SUM_INT32)
    assert len(worker.poll(0.0)) == 8
    worker.handle(result(0), 0.002)
    assert [packet.segment for packet in worker.poll(0.002)] == [8]
    assert worker.poll(0.004) == []
    worker.handle(result(8), 0.005)
    assert worker.poll(0.009) == []
    assert worker.wake_seconds == 0.01
    assert [packet.segment for packet in worker.poll(0.01)] == [1, 2, 3, 4, 5, 6, 7]


def test_a_job_that_is_not_complete_is_not_waited_for_beyond_the_time_out():
    worker = Worker(1, bytes(8), workers=2, timeout_seconds=1.0)
    waiting = Packet(Kind.ACK, 1, count=int(Status.WAITING), payload=bytes((Kind.JOIN, 0, 0, 0, 2)))
    for step in range(51):
        worker.poll(step * 0.02)
        worker.handle(waiting, step * 0.02)
    with pytest.raises(StalledError, match="not all workers have joined"):
        worker.poll(1.1)


def test_answers_to_others_and_of_other_epochs_change_nothing():
    worker = member()
    worker.begin([ONE] * 2, Operation.SUM_INT32)
    worker.poll(0.0)
    for packet in (
        result(0)._replace(worker=1),
        result(0)._replace(epoch=1),
        result(0)._replace(job=2),
        result(5),
        result(0, ONE * 2),
        result(0)._replace(operation=Operation.SUM_FLOAT32),
        answer(0, Status.GONE)._replace(worker=1),
        answer(3, Status.GONE),
        Packet(Kind.ACK, 1, payload=b""),
        Packet(Kind.DATA, 1, payload=ONE),
        Packet(Kind.HALT, 1, epoch=3),
    ):
        assert not worker.handle(packet, 0.1)
    assert not worker.halted
    assert worker.counts == [0, 0]


def test_a_request_is_repeated_until_it_is_acknowledged_and_gives_up_at_the_time_out():
    worker = member(timeout=1.0)
    worker.set_threshold(1)
    assert [packet.kind for packet in worker.poll(0.0)] == [Kind.SETH]
    assert worker.poll(0.001) == []
    (again,) = worker.poll(0.5)
    assert again.kind is Kind.SETH
    with pytest.raises(FieldError, match="SETH is under way"):
        worker.halt()
    # An acknowledgement of an earlier one is none of this.
    worker.handle(answer(0, Status.DONE, to=Kind.SETH)._replace(round_end=again.round_end - 1), 0.6)
    assert not worker.is_settled
    with pytest.raises(StalledError, match="nobody has answered SETH"):
        worker.poll(1.5)
    assert worker.is_settled


def test_a_halt_without_anybody_who_could_end_it_is_no_endless_wait():
    worker = member(timeout=2.0)
    worker.handle(Packet(Kind.HALT, 1), 1.0)
    assert [packet.kind for packet in worker.poll(1.5)] == [Kind.HELP]
    worker.handle(Packet(Kind.HALT, 1), 2.5)  # an answer: still suspended, but there
    worker.poll(4.0)
    with pytest.raises(StalledError, match="halted"):
        worker.poll(5.0)


def test_a_refusal_and_being_unknown_are_failures_of_this_worker():
    joining = Worker(1, bytes(8), workers=2)
    joining.poll(0.0)
    with pytest.raises(RankFailedError, match="does not take this worker"):
        joining.handle(answer(0, Status.REFUSED, to=Kind.JOIN), 0.0)
    worker = member()
    worker.begin([ONE], Operation.SUM_INT32)
    worker.poll(0.0)
    with pytest.raises(RankFailedError, match="does not know"):
        worker.handle(answer(0, Status.UNKNOWN), 0.0)


def test_who_leaves_after_a_stall_still_says_so():
    worker = member(timeout=1.0)
    worker.begin([ONE], Operation.SUM_INT32)
    worker.poll(0.0)
    with pytest.raises(StalledError):
        worker.poll(2.0)
    worker.leave()
    assert [packet.kind for packet in worker.poll(2.0)] == [Kind.LEAVE]


def test_what_makes_no_sense_is_refused():
    for mistake in ({"workers": 0}, {"patience_seconds": 0.0}, {"timeout_seconds": -1.0}, {"window": 0}):
        with pytest.raises(FieldError):
            Worker(1, bytes(8), **{"workers": 2, **mistake})
    with pytest.raises(FieldError):
        member().set_threshold(-1)
    assert Aggregator(first_epoch=5).members(3) == ()
    with pytest.raises(FieldError):
        Aggregator(first_epoch=-1)
