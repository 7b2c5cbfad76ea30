"""Overlap of the gradient exchange: brute force on tiny cases, and what ByteScheduler (SOSP 2019) claims."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import InputError
from headway.simulate.overlap import Fifo, Fused, Layer, Priority, alpha_beta, play_step

# Times are whole numbers of seconds, so sums are exact.
times = st.integers(0, 4).map(float)


def layers_of(min_size=1, max_size=6, most_bytes=5):
    return st.lists(st.tuples(st.integers(0, most_bytes), times, times), min_size=min_size, max_size=max_size).map(
        lambda drawn: [
            Layer(name=f"l{i}", size_bytes=size, forward_seconds=forward, backward_seconds=backward)
            for i, (size, forward, backward) in enumerate(drawn)
        ]
    )


def produced(layers):
    """When backward has produced each gradient."""
    at, when = 0.0, [0.0] * len(layers)
    for i in reversed(range(len(layers))):
        at += layers[i].backward_seconds
        when[i] = at
    return when


def forward_end(layers, arrivals):
    now = sum(layer.backward_seconds for layer in layers)
    for layer, arrival in zip(layers, arrivals):
        now = max(now, arrival if layer.size_bytes else 0.0) + layer.forward_seconds
    return now


def in_order(layers, order, cost):
    """The end of the step if the link carries (layer, bytes) in this order, each as soon as it can."""
    when, free, arrivals = produced(layers), 0.0, [0.0] * len(layers)
    for i, size in order:
        free = max(free, when[i]) + cost(size)
        arrivals[i] = free
    return forward_end(layers, arrivals)


@settings(deadline=None, max_examples=150)
@given(layers_of(), st.integers(0, 2))
def test_first_come_first_served_is_the_recurrence(layers, start):
    cost = alpha_beta(start, 1.0)
    order = [(i, layers[i].size_bytes) for i in reversed(range(len(layers))) if layers[i].size_bytes]
    step = play_step(layers, Fifo(), cost)
    assert step.step_seconds == in_order(layers, order, cost)
    assert step.messages == len(order)
    assert step.communication_seconds == sum(cost(size) for _, size in order)
    assert step.exposed_seconds == step.step_seconds - sum(x.forward_seconds + x.backward_seconds for x in layers)


@settings(deadline=None, max_examples=100)
@given(layers_of(max_size=4, most_bytes=3).filter(lambda layers: sum(layer.size_bytes for layer in layers) <= 7))
def test_priority_with_the_smallest_parts_is_the_best_of_all_orders(layers):
    parts = [i for i, layer in enumerate(layers) for _ in range(layer.size_bytes)]
    best = min(
        in_order(layers, [(i, 1) for i in order], lambda size: size) for order in set(itertools.permutations(parts))
    )
    assert play_step(layers, Priority(partition_bytes=1, credit_bytes=1), lambda size: size).step_seconds == best


@settings(deadline=None, max_examples=200)
@given(layers_of(max_size=8, most_bytes=9), st.integers(1, 9), st.integers(1, 20))
def test_where_starting_costs_nothing_priority_is_never_slower_than_first_come_first_served(layers, part, credit):
    ideal = alpha_beta(0.0, 1.0)
    fifo = play_step(layers, Fifo(), ideal)
    priority = play_step(layers, Priority(partition_bytes=part, credit_bytes=credit), ideal)
    assert priority.step_seconds <= fifo.step_seconds
    assert priority.communication_seconds == fifo.communication_seconds


def test_where_starting_costs_much_priority_is_slower_and_fusion_faster():
    layers = [Layer(name=f"l{i}", size_bytes=8, forward_seconds=1.0, backward_seconds=1.0) for i in range(10)]
    costly = alpha_beta(2.0, 4.0)
    fifo = play_step(layers, Fifo(), costly)
    priority = play_step(layers, Priority(partition_bytes=2, credit_bytes=2), costly)
    fused = play_step(layers, Fused(threshold_bytes=1000, cycle_seconds=0.5), costly)
    # 10 starts of 2 s and 20 s of data; 40 starts; a few.
    assert fifo.communication_seconds == 40.0
    assert priority.communication_seconds == 100.0
    assert fused.messages < 6
    assert fused.step_seconds < fifo.step_seconds < priority.step_seconds


def test_priority_lets_the_first_layer_overtake_a_large_last_one():
    layers = [
        Layer(name="first", size_bytes=1, forward_seconds=10.0, backward_seconds=1.0),
        Layer(name="last", size_bytes=10, forward_seconds=1.0, backward_seconds=1.0),
    ]
    link = alpha_beta(0.0, 1.0)
    # Without: the first layer's gradient waits until 11, then the whole forward pass.
    assert play_step(layers, Fifo(), link).step_seconds == 12.0 + 11.0
    # With: it goes at 2, done at 3; the last layer's is there at 12, before its forward begins at 13.
    quick = play_step(layers, Priority(partition_bytes=1, credit_bytes=1), link)
    assert quick.arrivals_seconds == (3.0, 12.0)
    assert quick.step_seconds == 14.0
    # A credit that lets everything into the link at once is as slow as none.
    assert play_step(layers, Priority(partition_bytes=1, credit_bytes=10), link).step_seconds == 23.0


def test_a_larger_credit_hides_the_latency_of_a_long_link():
    layers = [Layer(name="l", size_bytes=8, forward_seconds=1.0, backward_seconds=1.0)]
    link = alpha_beta(0.0, 1.0)
    steps = [
        play_step(layers, Priority(partition_bytes=1, credit_bytes=credit), link, latency_seconds=3.0).step_seconds
        for credit in (1, 2, 4, 8)
    ]
    # One part at a time: each waits for the latency, 8 x 4 s; two at a time: 4 x 4 s and one part's second more. With
    # four in flight the link is never idle: 3 + 8 s. A second of backward before, and one of forward after.
    assert steps == [1 + 32 + 1, 1 + 17 + 1, 1 + 11 + 1, 1 + 11 + 1]


@settings(deadline=None, max_examples=100)
@given(layers_of(), st.integers(0, 2))
def test_fusion_with_neither_threshold_nor_cycle_is_first_come_first_served(layers, start):
    cost = alpha_beta(start, 1.0)
    fused = play_step(layers, Fused(threshold_bytes=0, cycle_seconds=0), cost)
    assert fused.step_seconds == play_step(layers, Fifo(), cost).step_seconds


def test_fusion_takes_what_is_there_when_a_cycle_begins():
    layers = [Layer(name=f"l{i}", size_bytes=2, forward_seconds=1.0, backward_seconds=1.0) for i in range(6)]
    step = play_step(layers, Fused(threshold_bytes=100, cycle_seconds=2.5), alpha_beta(1.0, 2.0))
    sent = [span for span in step.timeline.spans if span.lane == "step/link"]
    # Gradients come at 1, 2, …, 6. At 2.5 two are there (1 + 4/2 s, until 5.5); that cycle overran, so the next begins
    # at 5.5 with three more (until 9.5), and the last one goes at 9.5.
    assert [(span.start_seconds, span.detail["bytes"]) for span in sent] == [(2.5, 4), (5.5, 6), (9.5, 2)]
    assert step.arrivals_seconds == (11.5, 9.5, 9.5, 9.5, 5.5, 5.5)
    assert step.step_seconds == 11.5 + 6.0
    slower = play_step(layers, Fused(threshold_bytes=100, cycle_seconds=2.5, negotiation_seconds=0.5), alpha_beta(1, 2))
    sent = [span for span in slower.timeline.spans if span.lane == "step/link"]
    assert [(span.start_seconds, span.detail["bytes"]) for span in sent] == [(3.0, 4), (6.5, 8)]


@settings(deadline=None, max_examples=150)
@given(
    layers_of(max_size=8),
    st.one_of(
        st.just(Fifo()),
        st.builds(Fused, threshold_bytes=st.integers(0, 20), cycle_seconds=st.sampled_from([0.0, 0.5, 3.0])),
        st.builds(Priority, partition_bytes=st.integers(1, 9), credit_bytes=st.integers(1, 20)),
    ),
    st.integers(0, 2),
    st.integers(0, 2),
)
def test_nothing_overlaps_nothing_comes_too_early_and_every_byte_is_sent_once(layers, policy, start, latency):
    cost = alpha_beta(start, 1.0)
    step = play_step(layers, policy, cost, latency_seconds=latency)
    when = produced(layers)
    for lane in step.timeline.lanes():
        spans = [span for span in step.timeline.spans if span.lane == lane and span.duration_seconds]
        for before, after in itertools.pairwise(sorted(spans, key=lambda span: span.start_seconds)):
            assert before.stop_seconds <= after.start_seconds + 1e-9
    sent = [span for span in step.timeline.spans if span.lane == "step/link"]
    assert sum(int(span.detail["bytes"]) for span in sent) == sum(layer.size_bytes for layer in layers)
    for i, layer in enumerate(layers):
        if layer.size_bytes:
            assert step.arrivals_seconds[i] >= when[i] + latency + cost(layer.size_bytes)
    assert step.step_seconds == pytest.approx(forward_end(layers, step.arrivals_seconds))
    assert step.exposed_seconds >= 0


def test_what_cannot_be_is_refused():
    layer = Layer(name="l", size_bytes=1, forward_seconds=1.0, backward_seconds=1.0)
    with pytest.raises(InputError, match="one name"):
        play_step([layer, layer], Fifo(), alpha_beta(0, 1))
    with pytest.raises(InputError, match="layer 'x'"):
        play_step([Layer(name="x", size_bytes=1, forward_seconds=math.nan)], Fifo(), alpha_beta(0, 1))
    with pytest.raises(InputError, match="rate above 0"):
        alpha_beta(0, 0)
    with pytest.raises(InputError, match="1 bytes would take -1 s"):
        play_step([layer], Fifo(), lambda size: -size)
