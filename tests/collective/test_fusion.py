"""Tensor fusion and the response cache: Sergeev and Del Balso 2018, and what Horovod's controller and cache do."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.collective.fusion import Request, ResponseCache, fuse
from headway.errors import FieldError


def tensor(name: str, size: int, dtype: str = "float32", operation: str = "all_reduce") -> Request:
    return Request(name=name, shape=(size,), dtype=dtype, element_bytes=1, operation=operation)


@st.composite
def requests(draw):
    kinds = st.tuples(st.integers(0, 40), st.sampled_from(["float32", "float16"]), st.sampled_from(["cpu", "cuda:0"]))
    operations = st.sampled_from(["all_reduce", "all_reduce", "all_reduce", "all_gather"])
    drawn = draw(st.lists(st.tuples(kinds, operations), max_size=24))
    return [
        Request(name=f"t{i}", shape=(size,), dtype=dtype, element_bytes=1, device=device, operation=operation)
        for i, ((size, dtype, device), operation) in enumerate(drawn)
    ]


def names(batches):
    return [batch.names for batch in batches]


def quadratic(waiting, threshold):
    """The rule of `fuse` again, on lists and with nothing clever: who joins is decided tensor by tensor."""
    batches = []
    waiting = list(waiting)
    while waiting:
        first = waiting[0]
        taken, passed = [first], []
        for other in waiting[1:]:
            if first.operation != "all_reduce":
                break
            fused = sum(r.size_bytes for r in taken)
            if other.kind == first.kind and fused + other.size_bytes <= threshold:
                taken.append(other)
            elif fused + sum(r.size_bytes for r in passed) + other.size_bytes <= threshold:
                passed.append(other)
            else:
                break
        batches.append(tuple(r.name for r in taken))
        waiting = [r for r in waiting if r not in taken]
    return batches


@settings(deadline=None, max_examples=200)
@given(requests(), st.integers(0, 100))
def test_nothing_is_lost_nothing_comes_twice_and_a_batch_is_of_one_kind_within_the_threshold(waiting, threshold):
    batches = fuse(waiting, threshold)
    assert sorted(name for batch in batches for name in batch.names) == sorted(r.name for r in waiting)
    for batch in batches:
        assert len(batch.requests) == 1 or batch.size_bytes <= threshold
        assert len({request.kind for request in batch.requests}) == 1
        assert len(batch.requests) == 1 or batch.requests[0].operation == "all_reduce"
        ends = [at + request.size_bytes for at, request in zip(batch.offsets_bytes, batch.requests)]
        assert batch.offsets_bytes == (0, *ends[:-1])
        assert ends[-1] == batch.size_bytes


@settings(deadline=None, max_examples=200)
@given(requests(), st.integers(0, 100))
def test_the_batches_are_those_of_the_rule_carried_out_without_cleverness(waiting, threshold):
    assert names(fuse(waiting, threshold)) == quadratic(waiting, threshold)


@settings(deadline=None, max_examples=100)
@given(requests(), st.integers(0, 100))
def test_each_batch_opens_with_the_first_tensor_that_is_left_so_no_tensor_is_passed_over_twice_unseen(waiting, most):
    left = [request.name for request in waiting]
    for batch in fuse(waiting, most):
        assert batch.names[0] == left[0]
        assert [name for name in left if name in batch.names] == list(batch.names)
        left = [name for name in left if name not in batch.names]


@settings(deadline=None, max_examples=100)
@given(requests(), st.integers(0, 100))
def test_without_looking_ahead_the_batches_one_after_the_other_are_the_tensors_in_their_order(waiting, threshold):
    plain = fuse(waiting, threshold, look_ahead=False)
    assert [name for batch in plain for name in batch.names] == [request.name for request in waiting]


def test_two_precisions_in_turns_are_two_batches_instead_of_many():
    waiting = [tensor(f"t{i}", 4, "float16" if i % 2 else "float32") for i in range(8)]
    assert names(fuse(waiting, 64)) == [("t0", "t2", "t4", "t6"), ("t1", "t3", "t5", "t7")]
    assert len(fuse(waiting, 64, look_ahead=False)) == 8


def test_looking_ahead_ends_when_what_is_fused_and_skipped_would_not_fit_together():
    waiting = [tensor("a", 4), tensor("b", 10, "float16"), tensor("c", 4), tensor("d", 3, "float16"), tensor("e", 1)]
    # a + c = 8 with b skipped makes 18; d would make 21 > 20: the batch ends before e, which would have fitted.
    assert names(fuse(waiting, 20)) == [("a", "c"), ("b", "d"), ("e",)]
    assert names(fuse(waiting, 22)) == [("a", "c", "e"), ("b", "d")]


def test_a_skipped_tensor_comes_first_next_time():
    waiting = [tensor("a", 6), tensor("large", 7), tensor("b", 2), tensor("c", 5)]
    # "large" does not fit beside "a", and 6 + 7 > 12 ends the batch at once.
    assert names(fuse(waiting, 12)) == [("a",), ("large", "b"), ("c",)]
    other = [tensor("a", 3), tensor("half", 4, "float16"), tensor("b", 3), tensor("c", 3, "float16"), tensor("d", 1)]
    assert names(fuse(other, 13)) == [("a", "b", "d"), ("half", "c")]


def test_a_threshold_of_zero_means_no_fusion_and_a_tensor_above_it_goes_alone():
    waiting = [tensor("a", 1), tensor("b", 1), tensor("c", 50)]
    assert names(fuse(waiting, 0)) == [("a",), ("b",), ("c",)]
    assert names(fuse(waiting, 10)) == [("a", "b"), ("c",)]


def test_a_negative_threshold_and_a_name_asked_for_twice_are_refused():
    with pytest.raises(FieldError, match="threshold"):
        fuse([tensor("a", 1)], -1)
    with pytest.raises(FieldError, match="threshold"):
        fuse([tensor("a", 1)], float("nan"))
    with pytest.raises(FieldError, match="'a' is asked for twice"):
        fuse([tensor("a", 1), tensor("a", 2)])


class Model:
    """A least-recently-used table by the book: a list, searched from end to end."""

    def __init__(self, capacity):
        self.capacity = capacity
        self.entries = []  # [name, request], the least recently used first

    def put(self, request):
        if not self.capacity:
            return
        self.entries = [entry for entry in self.entries if entry.name != request.name]
        self.entries = [*self.entries, request][-self.capacity :]

    def touch(self, name):
        self.put(next(entry for entry in self.entries if entry.name == name))


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 4), st.lists(st.tuples(st.sampled_from("pttf"), st.integers(0, 6), st.integers(1, 2)), max_size=40)
)
def test_the_cache_forgets_the_least_recently_used_and_a_bit_keeps_its_tensor(capacity, calls):
    cache, model = ResponseCache(capacity), Model(capacity)
    bits: dict[str, int] = {}
    for call, number, size in calls:
        request = tensor(f"t{number}", size)
        known = next((entry for entry in model.entries if entry.name == request.name), None)
        if call == "p":
            bit = cache.put(request)
            model.put(request)
            if capacity:
                assert 0 <= bit < capacity
                assert bits.get(request.name, bit) == bit
                bits[request.name] = bit
            else:
                assert bit == -1
        elif known is not None and call == "t":
            assert cache.touch(bits[request.name]) == known
            model.touch(request.name)
        elif known is not None:
            cache.forget(bits[request.name])
            model.entries.remove(known)
        bits = {entry.name: bits[entry.name] for entry in model.entries}
        assert len(set(bits.values())) == len(bits) == len(cache)
        for number_ in range(7):
            for size_ in (1, 2):
                asked = tensor(f"t{number_}", size_)
                held = next((entry for entry in model.entries if entry.name == asked.name), None)
                assert (asked.name in cache) == (held is not None)
                assert cache.position(asked) == (bits[asked.name] if held == asked else None)
                assert cache.stale(asked) == (bits[asked.name] if held not in (None, asked) else None)


@settings(deadline=None, max_examples=150)
@given(st.data(), st.integers(1, 9), st.integers(1, 5))
def test_one_and_over_the_ranks_says_what_is_ready_everywhere_and_what_is_wrong_anywhere(data, capacity, ranks):
    positions = st.frozensets(st.integers(0, capacity - 1))
    hits = data.draw(st.lists(positions, min_size=ranks, max_size=ranks))
    lost = data.draw(st.lists(positions, min_size=ranks, max_size=ranks))
    uncached = data.draw(st.lists(st.booleans(), min_size=ranks, max_size=ranks))
    stopping = data.draw(st.lists(st.booleans(), min_size=ranks, max_size=ranks))
    cache = ResponseCache(capacity)
    vectors = [cache.vector(hits[i], invalid=lost[i], uncached=uncached[i], stopping=stopping[i]) for i in range(ranks)]
    assert all(0 <= vector < 1 << cache.bits for vector in vectors)
    agreed = cache.read(functools.reduce(int.__and__, vectors))
    assert set(agreed.invalid) == frozenset.union(*lost)
    assert set(agreed.hits) == frozenset.intersection(*hits) - frozenset.union(*lost)
    assert list(agreed.hits) == sorted(agreed.hits)
    assert agreed.uncached == any(uncached)
    assert agreed.stopping == any(stopping)


def test_a_repeated_step_is_negotiated_with_bits_alone():
    step = [tensor(f"layer{i}", i + 1) for i in range(20)]
    ranks = [ResponseCache(64) for _ in range(3)]
    for cache in ranks:
        for request in step:
            cache.put(request)
    # In the second step the ranks' tensors get ready in different orders: 5 are late on the last rank.
    ready = [step, step[::-1], step[5:]]
    vectors = []
    for cache, mine in zip(ranks, ready):
        hits = [cache.position(request) for request in mine]
        assert None not in hits
        vectors.append(cache.vector([bit for bit in hits if bit is not None]))
    orders = []
    for cache in ranks:
        agreed = cache.read(functools.reduce(int.__and__, vectors))
        assert not agreed.uncached
        orders.append(names(fuse([cache.touch(bit) for bit in agreed.hits], 100)))
    assert orders[0] == orders[1] == orders[2]
    assert sorted(name for batch in orders[0] for name in batch) == sorted(request.name for request in step[5:])


def test_wrong_positions_vectors_and_capacities_are_refused():
    cache = ResponseCache(2)
    with pytest.raises(FieldError, match="no tensor has bit 1"):
        cache.touch(1)
    with pytest.raises(FieldError, match="same capacity"):
        cache.read(ResponseCache(3).vector([]))
    with pytest.raises(FieldError, match="cache of -1"):
        ResponseCache(-1)
