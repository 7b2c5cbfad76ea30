"""Priority scheduling: Peng et al., "A Generic Communication Scheduler for Distributed DNN Training", SOSP 2019."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.collective.priority import PriorityScheduler, SubTensor, partition
from headway.errors import FieldError

sizes = st.one_of(st.integers(1, 50), st.just(math.inf))


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 60), sizes, st.integers(1, 8))
def test_parts_cover_a_tensor_once_in_whole_elements(elements, partition_bytes, element_bytes):
    parts = partition("t", elements * element_bytes, partition_bytes, element_bytes=element_bytes)
    at = 0
    for number, part in enumerate(parts):
        assert (part.part, part.parts, part.offset_bytes) == (number, len(parts), at)
        assert part.size_bytes % element_bytes == 0
        assert part.size_bytes <= max(partition_bytes, element_bytes)
        at += part.size_bytes
    assert at == elements * element_bytes
    # As few as can be, and none is empty but an empty tensor's.
    most = max(partition_bytes // element_bytes, 1) if math.isfinite(partition_bytes) else elements
    assert len(parts) == max(1, math.ceil(elements / most) if elements else 1)


def drive(moves, partition_bytes, credit_bytes):
    """Plays `moves` and checks every answer against the rule, applied to a plain list of what waits."""
    scheduler = PriorityScheduler(partition_bytes, credit_bytes)
    waiting: list[tuple[tuple[int, int, int], SubTensor]] = []
    flying: list[SubTensor] = []
    order, left = [], {}
    arrivals = 0

    def start():
        for part in scheduler.next():
            expected = min(waiting)[1]
            assert part == expected, "the most urgent part that waits goes first"
            assert not flying or sum(p.size_bytes for p in flying) + part.size_bytes <= credit_bytes
            waiting.remove(min(waiting))
            flying.append(part)
            order.append(part)
        if waiting:  # what waits has a reason to
            head = min(waiting)[1]
            assert flying
            assert sum(p.size_bytes for p in flying) + head.size_bytes > credit_bytes
        assert scheduler.in_flight_bytes == sum(p.size_bytes for p in flying)

    def finish(which):
        part = flying.pop(which % len(flying))
        left[part.tensor] -= 1
        assert scheduler.finished(part) == (left[part.tensor] == 0)

    for kind, number, size, priority in moves:
        if kind:
            name = f"t{arrivals}"
            parts = scheduler.ready(name, size, priority)
            left[name] = len(parts)
            waiting.extend(((priority, arrivals, part.part), part) for part in parts)
            arrivals += 1
        elif flying:
            finish(number)
        start()
    while flying:
        finish(0)
        start()
    assert not waiting
    assert scheduler.is_idle
    assert all(count == 0 for count in left.values())
    return order


moves = st.lists(
    st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 40), st.integers(0, 3)), min_size=1, max_size=25
)


@settings(deadline=None, max_examples=200)
@given(moves, sizes, sizes)
def test_the_most_urgent_part_always_goes_first_within_the_credit_and_everything_is_finished(
    calls, partition_bytes, credit_bytes
):
    order = drive(calls, partition_bytes, credit_bytes)
    assert order == drive(calls, partition_bytes, credit_bytes)
    assert len(set(order)) == len(order)


def test_an_urgent_tensor_overtakes_a_large_one_between_two_of_its_parts():
    scheduler = PriorityScheduler(partition_bytes=10, credit_bytes=10)
    scheduler.ready("last layer", 40, priority=9)
    (first,) = scheduler.next()
    scheduler.ready("first layer", 10, priority=0)
    assert scheduler.next() == ()
    scheduler.finished(first)
    (urgent,) = scheduler.next()
    assert urgent.tensor == "first layer"
    assert scheduler.finished(urgent)
    assert [part.tensor for part in scheduler.next()] == ["last layer"]


def test_without_limits_tensors_go_whole_and_at_once():
    scheduler = PriorityScheduler(partition_bytes=math.inf, credit_bytes=math.inf)
    scheduler.ready("a", 7, priority=1)
    scheduler.ready("b", 5, priority=0)
    assert [(part.tensor, part.size_bytes) for part in scheduler.next()] == [("b", 5), ("a", 7)]


def test_a_part_beyond_the_credit_goes_alone_and_nobody_overtakes_it():
    scheduler = PriorityScheduler(partition_bytes=100, credit_bytes=10)
    scheduler.ready("small", 4, priority=0)
    (small,) = scheduler.next()
    scheduler.ready("large", 100, priority=1)
    scheduler.ready("tiny", 1, priority=2)
    assert scheduler.next() == ()
    scheduler.finished(small)
    assert [part.tensor for part in scheduler.next()] == ["large"]


def test_misuse_is_refused():
    with pytest.raises(FieldError, match="credit_bytes is 0"):
        PriorityScheduler(credit_bytes=0)
    with pytest.raises(FieldError, match="partition_bytes is nan"):
        PriorityScheduler(partition_bytes=math.nan)
    with pytest.raises(FieldError, match="parts of 0 bytes"):
        partition("t", 4, 0)
    with pytest.raises(FieldError, match="7 bytes in elements of 4"):
        partition("t", 7, element_bytes=4)
    scheduler = PriorityScheduler()
    scheduler.ready("a", 4, priority=0)
    with pytest.raises(FieldError, match="again before it was finished"):
        scheduler.ready("a", 4, priority=0)
    (part,) = scheduler.next()
    assert scheduler.finished(part)
    with pytest.raises(FieldError, match="without being in flight"):
        scheduler.finished(part)
