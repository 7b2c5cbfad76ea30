"""The compiled twin gives the bits of the pure machine: on drawn and published traces, under every rule it knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import InputError
from headway.schedule import fast
from headway.schedule.fleet import Fleet, FleetNode, parse_fleet
from headway.schedule.job import Job, ModelProfile
from headway.schedule.pace import Overhead, Pace
from headway.schedule.placement.cost import ModelStep, PlacementCost
from headway.schedule.placement.rules import make_placement
from headway.schedule.policies.catalog import make_policy
from headway.schedule.policies.headway import HeadwayPolicy
from headway.schedule.policies.history import History
from headway.schedule.traces.read import Trace, read_trace
from headway.schedule.traces.synthetic import synthesize

DATA = Path(__file__).parents[4] / "shared" / "data" / "scheduling"
POLICIES = (
    "fifo", "first-fit-fifo", "yarn", "sf", "sjf", "srtf", "srsf", "las", "2d-las-continuous", "2d-las", "2d-gittins",
    "headway", "gandiva",
)  # fmt: skip
PLACEMENTS = ("first-fit", "best-fit", "consolidated", "consolidated-strict", "random", "skew")
PROFILES = {
    "skewed": ModelProfile(name="skewed", skew=0.7, parameter_bytes=5e8, spread_slowdown=1.375),
    "even": ModelProfile(name="even", skew=0.05, parameter_bytes=1e8, spread_slowdown=1.01),
}
COLUMNS = (
    "started", "finish", "ran", "waited", "overhead", "useful", "overhead_service", "preemptions", "migrations",
)  # fmt: skip


# Tensors that parameter servers share out unevenly, so that the order of the nodes matters too.
STEPS = {
    "skewed": ModelStep((70, 5, 5, 13, 3, 4), {"": 40.0}),
    "even": ModelStep(tuple(range(1, 30)), {"": 900.0}),
}  # fmt: skip


def predicted(fleet: Fleet, *, narrow: bool = False) -> PlacementCost:
    """Costs of the two models; `narrow`: every other rack has an uplink that binds."""
    racks = sorted({node.rack for node in fleet.nodes})
    uplinks = dict.fromkeys(racks[::2], 7.0) if narrow else {}
    return PlacementCost(fleet, STEPS, ports=[10.0] * len(fleet.nodes), uplinks=uplinks)


def trace_of(jobs) -> Trace:
    return Trace(name="drawn", format="headway", jobs=tuple(jobs))


def both(trace, fleet, policy, placement, *, seed=0, **rules):
    played = []
    for engine in ("fast", "pure"):
        placed = make_placement(placement, profiles=PROFILES, seed=seed)
        played.append(fast.run(trace, fleet, policy(), placed, engine=engine, **rules))
    return played


def assert_same_bits(one, other):
    for column in COLUMNS:
        np.testing.assert_array_equal(getattr(one, column), getattr(other, column), err_msg=column)
    assert one.decisions == other.decisions


JOBS = st.lists(
    st.tuples(
        # Few values, so that much happens at one instant and ties are frequent.
        st.one_of(st.integers(0, 40).map(float), st.floats(0, 60)),
        st.integers(1, 10),
        st.one_of(st.integers(1, 30).map(float), st.floats(0.01, 200)),
        st.sampled_from(["skewed", "even", "unknown"]),
        st.sampled_from(["ann", "ben"]),
    ),
    min_size=1,
    max_size=24,
)


@settings(max_examples=250, deadline=None)
@given(
    rows=JOBS,
    policy=st.sampled_from(POLICIES),
    placement=st.sampled_from(PLACEMENTS),
    fleet=st.sampled_from(["n3g4", "n5g2", "n1g10", "n6g2r2"]),
    thresholds=st.sampled_from([(20.0,), (5.0, 40.0), (0.3, 7.0, 11.0, 90.0)]),
    knob=st.sampled_from([0.0, 0.5, 3.0]),
    quantum=st.sampled_from([1.0, 7.5]),
    fixed=st.sampled_from([0.0, 2.5]),
    first=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 5),
    patience=st.sampled_from([None, 4.0, 33.3, float("inf")]),
    costs=st.sampled_from(["published", "ports", "uplinks"]),
)
def test_any_trace_gives_the_bits_of_the_pure_machine(
    rows, policy, placement, fleet, thresholds, knob, quantum, fixed, first, seed, patience, costs
):
    if policy == "gandiva":
        patience = None  # with a finite one the pure machine plays it
    machines = parse_fleet(fleet)
    trace = trace_of(
        Job(name=f"j{at}", submit_seconds=submit, devices=devices, duration_seconds=lasts, model=model, user=user)
        for at, (submit, devices, lasts, model, user) in enumerate(rows)
    )

    profiles = {} if policy == "gandiva" else PROFILES

    def make():
        return make_policy(
            policy, history=[3.0, 12.0, 50.0, 51.0, 400.0], thresholds=thresholds, promote_knob=knob,
            quantum_seconds=quantum,
        )  # fmt: skip

    one, other = both(
        trace, machines, make, placement, seed=seed,
        pace=Pace(
            machines, profiles,
            costs=None if costs == "published" or policy == "gandiva"
            else predicted(machines, narrow=costs == "uplinks"),
        ),
        overhead=Overhead(fixed_seconds=fixed, storage_bytes_per_second=1e9, first_start_seconds=first),
        patience_seconds=patience,
    )  # fmt: skip
    assert_same_bits(one, other)


@pytest.mark.parametrize("patience", [None, 36_000.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_crowded_month_gives_the_bits_of_the_pure_machine(policy, patience):
    if policy == "gandiva" and patience is not None:
        pytest.skip("with a patience of its own the pure machine plays it")
    fleet = parse_fleet("n5g8r2")
    trace = synthesize(120, devices=40, load=3.0, seed=11, models=("skewed", "even"))

    def make():
        return make_policy(policy, history=[60.0, 4000.0, 1e6], quantum_seconds=20000.0)

    pace = Pace(fleet, {} if policy == "gandiva" else PROFILES)
    one, other = both(
        trace, fleet, make, "skew", pace=pace, overhead=Overhead(fixed_seconds=20.0), patience_seconds=patience
    )
    assert other.waited.max() > 0
    assert_same_bits(one, other)


@pytest.mark.parametrize("policy", ["first-fit-fifo", "srsf", "2d-las", "headway"])
@pytest.mark.parametrize("path", ["tiresias/60_job.csv", "muri/trace4.csv", "gavel/physical_max_min_fairness.trace"])
def test_published_traces_give_the_bits_of_the_pure_machine(path, policy):
    if not (DATA / path).exists():
        pytest.skip(f"no {path} in ../shared/data")
    trace = read_trace(DATA / path, bad="flag", limit=150)
    largest = max(job.devices for job in trace.jobs)
    fleet = parse_fleet(f"n{max(2, largest // 4)}g4")
    one, other = both(trace, fleet, lambda: make_policy(policy), "consolidated", overhead=Overhead(fixed_seconds=30.0))
    assert_same_bits(one, other)


def test_nodes_of_unequal_size_are_known_to_the_twin():
    fleet = Fleet(name="odd", nodes=tuple(FleetNode(name=f"n{at}", devices=at) for at in (1, 4, 2, 7)))
    trace = synthesize(60, devices=14, load=1.5, seed=2)
    for placement in PLACEMENTS:
        one, other = both(trace, fleet, lambda: make_policy("srtf"), placement)
        assert_same_bits(one, other)


def test_rows_out_of_order_come_back_in_their_own_order():
    jobs = [
        Job(name="late", submit_seconds=5.0, devices=1, duration_seconds=2.0),
        Job(name="early", submit_seconds=0.0, devices=1, duration_seconds=9.0),
    ]
    one, other = both(trace_of(jobs), parse_fleet("n1g1"), lambda: make_policy("fifo"), "first-fit")
    assert list(one.finish) == [11.0, 9.0]
    assert_same_bits(one, other)


def test_segments_are_those_of_the_pure_machine():
    fleet = parse_fleet("n3g4")
    trace = synthesize(40, devices=12, load=2.0, seed=4)
    one, other = both(trace, fleet, lambda: make_policy("2d-las"), "best-fit", keep_segments=True)
    assert one.preemptions.sum() > 0

    def rows(replay):
        return sorted(map(tuple, replay.segments.tolist()))

    assert rows(one) == rows(other)
    held = one.segments[:, 4] * (one.segments[:, 2] - one.segments[:, 1])
    assert held.sum() == pytest.approx((one.useful + one.overhead_service).sum())


def test_a_policy_that_has_learned_elsewhere_begins_with_that():
    fleet, trace = parse_fleet("n2g4"), synthesize(60, devices=8, load=1.8, seed=6)
    past = synthesize(200, devices=8, load=1, seed=7)

    def make():
        history = History()
        for job in past.jobs:
            history.learn(job, job.service)
        return HeadwayPolicy(history)

    one, other = both(trace, fleet, make, "consolidated")
    assert_same_bits(one, other)
    fresh = fast.run(trace, fleet, HeadwayPolicy(), make_placement("consolidated"), engine="fast")
    assert not np.array_equal(fresh.finish, one.finish)


def test_what_the_twin_does_not_know_goes_to_the_pure_machine_or_is_refused():
    fleet, placement = parse_fleet("n2g4"), make_placement("first-fit")
    plain = Job(name="a", submit_seconds=0.0, devices=1, duration_seconds=5.0)
    elastic = Job(name="b", submit_seconds=0.0, devices=4, duration_seconds=5.0, minimum_devices=1, maximum_devices=8)
    tied = Job(name="c", submit_seconds=0.0, devices=1, duration_seconds=5.0, kinds=("v100",))
    large = Job(name="d", submit_seconds=0.0, devices=9, duration_seconds=5.0)
    nodes = (FleetNode(name="x", devices=4, kind="v100"), FleetNode(name="y", devices=4, kind="k80"))
    mixed = Fleet(name="m", nodes=nodes)
    srtf, ours = make_policy("srtf"), make_policy("headway")
    assert fast.why_not([plain], fleet, srtf, placement) == ""
    for reason in (
        fast.why_not([plain], fleet, make_policy("themis"), placement),
        fast.why_not([plain, elastic], fleet, ours, placement),
        fast.why_not([tied], fleet, srtf, placement),
        fast.why_not([large], fleet, srtf, placement),
        fast.why_not([plain], fleet, make_policy("gandiva"), placement, patience_seconds=10.0),
        fast.why_not([plain], mixed, srtf, placement),
    ):
        assert reason
    with pytest.raises(InputError, match="larger than the fleet"):
        fast.run(trace_of([large]), fleet, srtf, placement, engine="fast")
    played = fast.run(trace_of([plain, large]), fleet, srtf, placement)
    assert (played.engine, played.refused) == ("pure", ("d",))
    assert np.isnan(played.finish[1])
    with pytest.raises(InputError, match="no engine"):
        fast.run(trace_of([plain]), fleet, srtf, placement, engine="warp")


def test_every_device_second_is_work_or_overhead_and_no_node_holds_more_than_it_has():
    fleet = parse_fleet("n4g4")
    trace = synthesize(300, devices=16, load=1.4, seed=8, models=("skewed", "even"))
    played = fast.run(
        trace, fleet, make_policy("2d-las"), make_placement("skew", profiles=PROFILES), engine="fast",
        pace=Pace(fleet, PROFILES), overhead=Overhead(fixed_seconds=40.0), keep_segments=True,
    )  # fmt: skip
    total = played.ran + played.waited + played.overhead
    np.testing.assert_allclose(total, played.completion, rtol=1e-9)
    for node in range(4):
        rows = played.segments[played.segments[:, 3] == node]
        changes = sorted([(row[1], row[4]) for row in rows] + [(row[2], -row[4]) for row in rows])
        held = 0.0
        for _, change in changes:
            held += change
            assert 0 <= held <= 4
