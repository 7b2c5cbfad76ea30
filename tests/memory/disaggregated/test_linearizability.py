"""The checker against brute force over all orders, and on histories whose answer is known."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import InputError
from headway.memory.disaggregated.linearizability import Operation, check, is_linearizable


def call(kind, value, begin, end=math.inf, key=0):
    return Operation(client="c", kind=kind, key=key, value=value, begin=begin, end=end)


def by_brute_force(calls) -> bool:
    """Whether some subset of the calls that never returned, with all others, in some order, is a register's history."""
    returned = [one for one in calls if one.end < math.inf]
    pending = [one for one in calls if one.end == math.inf and one.kind == "write"]
    for count in range(len(pending) + 1):
        for extra in itertools.combinations(pending, count):
            for order in itertools.permutations((*returned, *extra)):
                if is_history_of_a_register(order):
                    return True
    return False


def is_history_of_a_register(order) -> bool:
    value = None
    for i, one in enumerate(order):
        if any(later.end < one.begin for later in order[i + 1 :]):
            return False
        if one.kind == "write":
            value = one.value
        elif one.value != value:
            return False
    return True


@st.composite
def histories(draw):
    calls = []
    for _ in range(draw(st.integers(0, 6))):
        begin = draw(st.integers(0, 8))
        end = draw(st.one_of(st.integers(begin, 12), st.just(math.inf)))
        kind = draw(st.sampled_from(["read", "write"]))
        value = draw(st.sampled_from([b"a", b"b", b"c"] + [None] * (kind == "read")))
        calls.append(call(kind, value, float(begin), float(end)))
    return calls


@given(histories())
@settings(deadline=None, max_examples=400)
def test_it_agrees_with_trying_all_orders(calls):
    assert is_linearizable(calls) == by_brute_force(calls)


def test_a_read_sees_a_write_that_had_returned():
    write = call("write", b"a", 0, 1)
    assert is_linearizable([write, call("read", b"a", 2, 3)])
    assert not is_linearizable([write, call("read", None, 2, 3)])
    assert is_linearizable([write, call("read", None, 0.5, 3)])


def test_what_one_reader_has_seen_no_later_reader_misses():
    write = call("write", b"a", 0, 10)
    new, old = call("read", b"a", 1, 2), call("read", None, 3, 4)
    assert not is_linearizable([write, new, old])


def test_a_write_of_a_dead_client_may_take_effect_late_or_never_but_not_before_it_began():
    pending = call("write", b"a", 5)
    assert is_linearizable([pending, call("read", None, 6, 7), call("read", b"a", 90, 91)])
    assert is_linearizable([pending, call("read", None, 90, 91)])
    assert not is_linearizable([pending, call("read", b"a", 1, 2)])
    assert not is_linearizable([pending, call("read", b"a", 6, 7), call("read", None, 8, 9)])


def test_a_mixture_of_two_writes_is_nobodys_value():
    writes = [call("write", b"aa", 0, 1), call("write", b"bb", 0, 1)]
    assert not is_linearizable([*writes, call("read", b"ab", 0.5, 3)])


def test_the_key_that_is_wrong_is_named_with_its_calls_alone():
    good = [call("write", b"a", 0, 1, key=1), call("read", b"a", 2, 3, key=1)]
    bad = [call("write", b"b", 0, 1, key=4), call("read", b"a", 2, 3, key=4)]
    violation = check([*good, *bad])
    assert violation is not None
    assert (violation.key, violation.operations) == (4, tuple(bad))
    assert "key 4" in violation.describe()
    assert check(good) is None


def test_a_hundred_overlapping_calls_are_checked_in_no_time():
    """Without memory, the search would try the 10! orders of the writes."""
    calls = [call("write", bytes([i]), i * 0.01, 50.0) for i in range(10)]
    calls += [call("read", bytes([i % 10]), 60.0 + i, 60.5 + i) for i in range(80)]
    assert not is_linearizable(calls)
    assert is_linearizable([*calls[:10], *[call("read", b"\7", 60.0 + i, 60.5 + i) for i in range(80)]])


def test_what_is_no_history_is_refused():
    with pytest.raises(InputError):
        is_linearizable([call("write", b"a", 3, 2)])
    with pytest.raises(InputError):
        is_linearizable([call("erase", b"a", 0, 1)])
