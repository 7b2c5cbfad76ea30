"""The simulated switch: the real protocol, in the time that arithmetic gives, and no wrong sum whatever is lost."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import InputError
from headway.simulate.switch import SwitchModel, compare_switch, predict_switch, simulate_switch, star

models = st.builds(
    SwitchModel,
    workers=st.integers(1, 6),
    link_bytes_per_second=st.sampled_from([1e8, 1.25e9, 1e10]),
    latency_seconds=st.sampled_from([0.0, 1e-6, 5e-5]),
    slots=st.integers(1, 40),
    payload_bytes=st.sampled_from([64, 1408, 9000]),
    packet_seconds=st.sampled_from([0.0, 1e-7, 3e-6]),
    patience_seconds=st.just(1.0),
)


@settings(deadline=None, max_examples=60)
@given(models, st.integers(1, 150))
def test_without_losses_the_packets_take_the_time_of_the_closed_form(model, segments):
    run = simulate_switch(model, segments * model.payload_bytes)
    assert run.is_exact
    assert run.asked == run.lost == 0
    assert run.sent == 2 * segments * model.workers
    predicted = predict_switch(model, segments * model.payload_bytes)
    if model.packet_seconds:
        # Contributions wait for each other at the switch: the form leaves out how they line up, within a round trip.
        assert predicted * 0.99 - model.round_trip_seconds <= run.seconds <= predicted * 1.01 + model.round_trip_seconds
    else:
        assert run.seconds == pytest.approx(predicted, rel=1e-9)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    workers=st.integers(1, 4),
    slots=st.integers(1, 12),
    loss=st.sampled_from([0.02, 0.2]),
    segments=st.integers(1, 60),
)
def test_with_losses_sums_stay_exact_and_only_time_is_lost(seed, workers, slots, loss, segments):
    model = SwitchModel(workers=workers, slots=slots, loss=loss)
    run = simulate_switch(model, segments * model.payload_bytes, seed=seed)
    assert run.is_exact
    assert run.seconds >= predict_switch(model, segments * model.payload_bytes) * (1 - 1e-9)
    assert run.asked >= run.resent
    assert run == simulate_switch(model, segments * model.payload_bytes, seed=seed)


def test_the_links_are_busy_with_as_many_slots_as_bandwidth_times_delay_and_no_sooner():
    wide = SwitchModel(workers=4, slots=10**6)
    size = 2000 * wide.payload_bytes
    best = predict_switch(wide, size)
    enough = SwitchModel(workers=4, slots=wide.slots_needed)
    half = SwitchModel(workers=4, slots=wide.slots_needed // 2)
    assert predict_switch(enough, size) == best
    assert predict_switch(half, size) > 1.8 * best
    bare = 2000 * wide.packet_bytes / wide.link_bytes_per_second
    assert best == pytest.approx(bare, rel=0.02)


def test_time_in_the_switch_does_not_grow_with_the_workers_and_that_of_the_others_does():
    compared = compare_switch(SwitchModel(workers=2), 1e6, (2, 8, 32))
    assert [one.switch_seconds for one in compared] == pytest.approx([compared[0].switch_seconds] * 3)
    for name in ("ring", "parameter-server"):
        times = [one.other_seconds[name] for one in compared]
        assert times == sorted(times)
        assert times[-1] > times[0]
    # A server's link carries the vectors of all others; the ring carries each nearly twice.
    assert compared[-1].other_seconds["parameter-server"] >= 31 * 1e6 / 1.25e9
    assert compared[-1].other_seconds["ring"] >= 2 * 31 / 32 * 1e6 / 1.25e9
    assert compared[-1].fastest == "switch"


def test_a_switch_with_too_few_slots_loses_to_a_ring():
    for slots, winner in ((2, "ring"), (64, "switch")):
        (one,) = compare_switch(SwitchModel(workers=8, slots=slots), 64e6, (8,), algorithms=("ring",))
        assert one.fastest == winner


def test_the_star_has_the_model_s_links():
    cluster = star(SwitchModel(workers=3, link_bytes_per_second=7.0, latency_seconds=2.0))
    assert len(cluster) == 3
    assert {(link.bytes_per_second, link.latency_seconds) for link in cluster.links} == {(7.0, 2.0)}


def test_what_makes_no_sense_is_refused():
    for mistake in (
        {"workers": 0}, {"slots": 0}, {"loss": 1.0}, {"link_bytes_per_second": 0.0}, {"latency_seconds": math.inf},
        {"payload_bytes": 1}, {"packet_seconds": -1.0}, {"patience_seconds": 0.0},
    ):  # fmt: skip
        with pytest.raises(InputError, match=next(iter(mistake))):
            SwitchModel(**{"workers": 2, **mistake}).validate()
    with pytest.raises(InputError, match="vector"):
        predict_switch(SwitchModel(workers=2), 0)
    with pytest.raises(InputError, match="packets"):
        compare_switch(SwitchModel(workers=2, loss=0.1), 1e9, (2,))
    with pytest.raises(InputError, match="1 workers"):
        compare_switch(SwitchModel(workers=2), 1e3, (1,))
