"""Each policy by what it is for, against what can be worked out or solved otherwise."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import FieldError, FileError, InputError
from headway.schedule.events import Finish, Migrate, Submit, Tick
from headway.schedule.fleet import Fleet, FleetNode, uniform_fleet
from headway.schedule.job import Job, ModelProfile
from headway.schedule.pace import Overhead, Pace
from headway.schedule.placement.rules import Consolidated, FirstFit
from headway.schedule.policies.catalog import POLICIES, make_policy
from headway.schedule.policies.elastic import Optimus, Pollux
from headway.schedule.policies.fairness import MaxMin, Themis, fair_shares
from headway.schedule.policies.fifo import FirstFitFifo
from headway.schedule.policies.gandiva import Gandiva
from headway.schedule.policies.gavel import Gavel, fair_time
from headway.schedule.policies.gittins import GittinsIndex
from headway.schedule.policies.goodput import MeasuredScaling, read_scaling
from headway.schedule.policies.ordering import Policy, View
from headway.schedule.policies.recurring import QuasiShortestServiceFirst
from headway.schedule.policies.shortest import ShortestJobFirst, SmallestFirst
from headway.schedule.policies.tiresias import (
    DiscretisedGittins,
    DiscretisedLas,
    Las,
    TwoDimensionalGittins,
    TwoDimensionalLas,
)
from headway.schedule.replay import Player, play
from headway.schedule.scheduler import Scheduler

PROFILES = Path(__file__).parents[4] / "shared" / "data" / "scheduling" / "pollux_profiles"


def job(name: str, devices: int = 1, seconds: float = 10.0, submit: float = 0.0, **fields) -> Job:
    return Job(name=name, submit_seconds=submit, devices=devices, duration_seconds=seconds, **fields)


def starts(policy: Policy, jobs: list[Job], devices: int) -> list[str]:
    """Names in the order of their first start."""
    outcome = play(jobs, uniform_fleet(1, devices), policy, FirstFit())
    return [found.name for found in sorted(outcome.jobs, key=lambda found: (found.start_seconds, found.name))]


THREE = [job("first", 1, 10), job("wide", 2, 5), job("short", 1, 1), job("small", 1, 20)]


def test_smallest_and_shortest_first_order_what_waits():
    busy = job("busy", 2, 3)
    late = [job(found.name, found.devices, found.duration_seconds, 1.0) for found in THREE]
    assert starts(SmallestFirst(), [busy, *late], 2) == ["busy", "first", "short", "small", "wide"]
    narrow = [found for found in late if found.devices == 1]
    assert starts(ShortestJobFirst(), [job("busy", 1, 3), *narrow], 1) == ["busy", "short", "first", "small"]
    assert not SmallestFirst().preemptive
    assert not ShortestJobFirst().preemptive


def test_las_and_2d_las_differ_by_the_number_of_devices():
    """A wide job that ran 6 s has had more than a narrow one that ran 10 s, if service is counted in two dimensions."""
    jobs = [job("narrow", 1, 30), job("wide", 2, 30, 10.0)]
    for policy, first in ((Las(1000), "wide"), (TwoDimensionalLas(1000), "narrow")):
        scheduler = Scheduler(uniform_fleet(1, 2), policy, FirstFit())
        scheduler.handle(0, Submit(job=jobs[0]))
        scheduler.handle(10, Submit(job=jobs[1]))
        scheduler.handle(16, Tick())
        assert scheduler.order(16)[0].entry.job.name == first


def test_a_newcomer_overtakes_whoever_has_attained_a_threshold_and_nobody_else():
    scheduler = Scheduler(uniform_fleet(1, 1), DiscretisedLas((50.0,)), FirstFit())
    scheduler.handle(0, Submit(job=job("old", seconds=100)))
    assert not scheduler.handle(10, Submit(job=job("new", seconds=100)))
    assert [type(decision).__name__ for decision in scheduler.handle(50, Tick())] == ["Demote", "Preempt", "Start"]


def test_gittins_queues_are_ordered_by_their_index_even_against_attained_service():
    """All jobs of the history need 10 or 100: one that has had 10 is far from its end, one that has had 90 near it."""
    index = GittinsIndex([10.0, 100.0])
    policy = DiscretisedGittins(index, (10.0, 90.0))
    assert policy.ranks[2] > policy.ranks[0] > policy.ranks[1]
    jobs = [job("done soon", 1, 100), job("fresh", 1, 10, 95.0)]
    assert [found.finish_seconds for found in play(jobs, uniform_fleet(1, 1), policy, FirstFit()).jobs] == [100, 110]
    continuous = TwoDimensionalGittins(index, quantum_seconds=1)
    assert [found.finish_seconds for found in play(jobs, uniform_fleet(1, 1), continuous, FirstFit()).jobs] == [
        100,
        110,
    ]


@given(
    st.lists(st.tuples(st.integers(0, 60), st.sampled_from([10.0, 100.0])), min_size=8, max_size=14),
)
@settings(max_examples=15, deadline=None)
def test_on_one_device_gittins_is_as_good_as_las_where_sizes_are_of_two_kinds(rows):
    jobs = [job(f"j{number}", 1, seconds, float(submit)) for number, (submit, seconds) in enumerate(rows)]
    gittins = play(jobs, uniform_fleet(1, 1), TwoDimensionalGittins([10.0, 10, 10, 100], quantum_seconds=5), FirstFit())
    assert len(gittins.finished) == len(jobs)


def test_thresholds_and_knobs_that_make_no_sense_are_refused():
    for thresholds in ((0.0,), (5.0, 5.0), (float("nan"),)):
        with pytest.raises(InputError, match="thresholds"):
            DiscretisedLas(thresholds)
    with pytest.raises(InputError, match="promote_knob"):
        DiscretisedLas((1.0,), promote_knob=-1)
    with pytest.raises(InputError, match="no policy is named"):
        make_policy("best")
    with pytest.raises(InputError, match="needs the services of past jobs"):
        make_policy("2d-gittins")
    assert {make_policy(name, history=[1.0]).name for name in POLICIES} == set(POLICIES)


# ----------------------------------------------------------------------------------------------- Gandiva

PACKED = {
    "light": ModelProfile(name="light", utilisation=0.4),
    "heavy": ModelProfile(name="heavy", utilisation=0.8),
    "vgg": ModelProfile(name="vgg", skew=0.7, spread_slowdown=2.0),
}


def test_gandiva_slices_time_so_that_equal_jobs_end_together():
    jobs = [job(name, 2, 30) for name in "abc"]
    outcome = play(jobs, uniform_fleet(1, 2), Gandiva(5), FirstFit())
    assert sorted(outcome.completions) == [80, 85, 90]
    assert [found.start_seconds for found in outcome.jobs] == [0, 5, 10]


def test_gandiva_packs_jobs_that_leave_half_a_device_idle_and_no_others():
    jobs = [job("a", 2, 30, model="light"), job("b", 2, 30, model="light"), job("c", 2, 30, model="heavy")]
    fleet = uniform_fleet(1, 2)
    pace = Pace(fleet, PACKED)
    packed = play(jobs[:2], fleet, Gandiva(5, profiles=PACKED), FirstFit(), pace=pace)
    assert packed.completions == [30, 30]
    apart = play([jobs[0], jobs[2]], fleet, Gandiva(5, profiles=PACKED), FirstFit(), pace=pace)
    assert sorted(apart.completions) == [55, 60]


def test_jobs_packed_too_tightly_slow_each_other():
    assert Pace(uniform_fleet(1, 1), PACKED).shared_rate(job("a", model="heavy"), job("b", model="heavy")) == 1 / 1.6


def test_gandiva_moves_a_spread_job_together_when_there_is_room_and_it_pays():
    fleet = uniform_fleet(2, 2)
    scheduler = Scheduler(
        fleet, Gandiva(5), FirstFit(), pace=Pace(fleet, PACKED), overhead=Overhead(fixed_seconds=3)
    )  # fmt: skip
    scheduler.handle(0, Submit(job=job("x", 1, 10)))
    scheduler.handle(0, Submit(job=job("spread", 2, 100, model="vgg")))
    entry = scheduler.entry("spread")
    assert entry is not None
    assert (len(entry.counts), entry.rate) == (2, 0.5)
    (move,) = scheduler.handle(10, Finish(job="x"))
    assert isinstance(move, Migrate)
    assert (len(entry.counts), entry.rate) == (1, 1.0)
    assert entry.finish() == 10 + 3 + 95


# ----------------------------------------------------------------------------------------------- fairness


def water_level(devices: list[int], weights: list[float], capacity: int) -> list[float]:
    """Device time of each, by raising one level in small steps."""
    low, high = 0.0, float(capacity) + sum(devices)
    for _ in range(100):
        level = (low + high) / 2
        used = sum(min(count, level * weight) for count, weight in zip(devices, weights, strict=True))
        low, high = (level, high) if used <= capacity else (low, level)
    return [min(count, low * weight) for count, weight in zip(devices, weights, strict=True)]


shares_of = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 4)), min_size=1, max_size=8)


@given(shares_of, st.integers(1, 20))
def test_max_min_shares_fill_up_like_water(rows, capacity):
    devices, weights = [row[0] for row in rows], [float(row[1]) for row in rows]
    found = fair_shares(devices, weights, capacity)
    expected = water_level(devices, weights, capacity)
    assert [part * count for part, count in zip(found, devices, strict=True)] == pytest.approx(expected, abs=1e-6)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None)
def test_gavel_on_one_kind_of_device_is_max_min_fairness(rows):
    jobs = [job(f"j{number}", devices, weight=float(weight)) for number, (devices, weight) in enumerate(rows)]
    found = fair_time(jobs, {"V100": 4})
    for parts in found:
        assert sum(parts.values()) <= 1 + 1e-6
    levels = [parts["V100"] * item.devices / item.weight for parts, item in zip(found, jobs, strict=True)]
    ideal = water_level([item.devices for item in jobs], [item.weight for item in jobs], 4)
    assert min(levels) == pytest.approx(
        min(time / item.weight for time, item in zip(ideal, jobs, strict=True)), abs=1e-4
    )


def test_gavel_gives_fast_devices_to_those_that_gain_most_from_them():
    """One job is ten times faster on the V100, one not at all: each should have its own, and both gain."""
    jobs = [job("picky", throughputs={"V100": 1.0, "K80": 0.1}), job("easy", throughputs={"V100": 1.0, "K80": 1.0})]
    picky, easy = fair_time(jobs, {"V100": 1, "K80": 1})
    assert (picky["V100"], easy["K80"]) == (pytest.approx(1, abs=1e-4), pytest.approx(1, abs=1e-4))
    fleet = Fleet(
        name="two",
        nodes=(FleetNode(name="slow", devices=1, kind="K80"), FleetNode(name="fast", devices=1, kind="V100")),
    )
    for policy, expected in ((Gavel(5), [10, 10]), (FirstFitFifo(), [100, 10])):
        assert play(jobs, fleet, policy, FirstFit(), pace=Pace(fleet)).completions == expected


@given(
    st.lists(st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)), min_size=1, max_size=4),
    st.integers(1, 2),
    st.integers(1, 2),
)
@settings(max_examples=25, deadline=None)
def test_no_grid_of_shares_is_fairer_than_gavels(speeds, fast, slow):
    jobs = [job(f"j{number}", throughputs={"a": first, "b": second}) for number, (first, second) in enumerate(speeds)]
    devices = {"a": fast, "b": slow}

    def fairness(parts: list[tuple[float, float]]) -> float:
        return min(
            (first * x + second * y) / ((first * fast + second * slow) / (fast + slow))
            for (first, second), (x, y) in zip(speeds, parts, strict=True)
        )

    found = [(parts["a"], parts["b"]) for parts in fair_time(jobs, devices)]
    options = [(x / 4, y / 4) for x in range(5) for y in range(5 - x)]
    best = max(
        (
            fairness(list(parts))
            for parts in itertools.product(options, repeat=min(3, len(jobs)))
            if len(jobs) <= 3 and sum(x for x, _ in parts) <= fast and sum(y for _, y in parts) <= slow
        ),
        default=0.0,
    )
    assert fairness(found) >= best - 1e-4


@pytest.mark.parametrize("make", [MaxMin, Gavel])
def test_rounds_shorter_than_a_resumption_still_get_work_done(make):
    fleet = uniform_fleet(1, 2)
    jobs = [job("a", 2, 40), job("b", 2, 40)]
    machine = Scheduler(fleet, make(5), FirstFit(), pace=Pace(fleet), overhead=Overhead(fixed_seconds=7))
    outcome = Player(jobs, machine).until(1000).outcome()
    # Each resumption (7 s, 2 rounds) is followed by work for as long at least: the end of the third round.
    assert len(outcome.finished) == 2
    assert max(outcome.completions) < 2 * 40 * (1 + 7 / 8) + 15


def test_max_min_rounds_give_equal_time_to_equal_jobs():
    jobs = [job(name, 2, 40) for name in "ab"]
    outcome = play(jobs, uniform_fleet(1, 2), MaxMin(10), FirstFit())
    assert sorted(outcome.completions) == [70, 80]
    heavy = [job("heavy", 2, 40, weight=3.0), job("light", 2, 40)]
    found = play(heavy, uniform_fleet(1, 2), MaxMin(10), FirstFit())
    assert found.completions[0] < found.completions[1] == 80


def test_themis_serves_whom_waiting_hurt_most():
    policy = Themis(1000)
    scheduler = Scheduler(uniform_fleet(1, 2), policy, FirstFit())
    scheduler.handle(0, Submit(job=job("runs", 2, 30)))
    scheduler.handle(5, Submit(job=job("long", 2, 100)), Submit(job=job("short", 2, 5)))
    # At 30 the short one has waited five times its duration, the long one a quarter of it.
    (start,) = scheduler.handle(30, Finish(job="runs"))
    assert start.job == "short"


# ----------------------------------------------------------------------------------------------- elastic


def elastic(name: str, seconds: float = 100.0, submit: float = 0.0, devices: int = 2) -> Job:
    return job(name, devices, seconds, submit, minimum_devices=1, maximum_devices=8)


def test_pollux_shares_equally_among_equal_jobs_and_gives_all_to_the_last():
    fleet = uniform_fleet(1, 8)
    scheduler = Scheduler(fleet, Pollux(60), FirstFit(), pace=Pace(fleet, exponent=0.5))
    scheduler.handle(0, Submit(job=elastic("a")), Submit(job=elastic("b")))
    assert [entry.devices for entry in scheduler.entries.values()] == [4, 4]
    scheduler.handle(60, Finish(job="a"))
    assert [entry.devices for entry in scheduler.entries.values()] == [8]


@given(st.lists(st.floats(10, 500), min_size=1, max_size=3), st.integers(3, 8))
@settings(max_examples=30, deadline=None)
def test_optimus_finds_the_sizes_with_the_least_sum_of_remaining_times(durations, capacity):
    fleet = uniform_fleet(1, capacity)
    scheduler = Scheduler(fleet, Optimus(60), FirstFit(), pace=Pace(fleet, exponent=0.5))
    jobs = [elastic(f"j{number}", seconds) for number, seconds in enumerate(durations)]
    scheduler.handle(0, *(Submit(job=item) for item in jobs))

    def total(sizes) -> float:
        return sum(seconds / (size / 2) ** 0.5 for seconds, size in zip(durations, sizes, strict=True))

    found = [entry.devices for entry in scheduler.entries.values()]
    best = min(
        total(sizes) for sizes in itertools.product(range(1, 9), repeat=len(jobs)) if sum(sizes) <= capacity
    )  # fmt: skip
    assert sum(found) <= capacity
    assert total(found) == pytest.approx(best)


def test_pollux_steps_over_sizes_that_bring_nothing():
    fleet = uniform_fleet(2, 4)
    steps = {1: {1.0: 1.0}, 4: {1.0: 1.0}, 5: {1.0: 2.5}, 8: {1.0: 1.0}}
    scheduler = Scheduler(fleet, Pollux(60), FirstFit(), pace=Pace(fleet, scaling={"bert": MeasuredScaling(steps)}))
    wanted = job("a", 4, 100, model="bert", minimum_devices=1, maximum_devices=8)
    scheduler.handle(0, Submit(job=wanted), Submit(job=job("b", 3)))
    assert [entry.devices for entry in scheduler.entries.values()] == [4, 3]
    scheduler.handle(60, Finish(job="b"))
    assert scheduler.entry("a").devices == 8  # type: ignore[union-attr]


def test_growth_that_does_not_pay_for_its_restart_is_not_taken():
    fleet = uniform_fleet(1, 8)
    for cost, devices in ((1.0, 8), (50.0, 4)):
        scheduler = Scheduler(
            fleet, Pollux(60), FirstFit(), pace=Pace(fleet, exponent=0.5), overhead=Overhead(fixed_seconds=cost)
        )
        scheduler.handle(0, Submit(job=elastic("a")), Submit(job=elastic("b")))
        scheduler.handle(60, Finish(job="a"))
        assert [entry.devices for entry in scheduler.entries.values()] == [devices]


def test_goodput_is_the_measured_throughput_times_efficiency():
    steps = {1: {10.0: 1.0}, 2: {10.0: 1.25, 20.0: 2.0}, 4: {10.0: 2.0}}
    scaling = MeasuredScaling(steps)
    assert [scaling.goodput(count) for count in (1, 2, 3, 4, 8)] == [10, 20, 20, 20, 20]
    noisy = MeasuredScaling(steps, noise_samples=10, batch_samples=10)
    # Of 20 samples on 2 devices, (10 + 10) / (10 + 20) counts; of 40, 20 / 50.
    assert noisy.goodput(2) == pytest.approx(max(16 * 2 / 3, 20 * 2 / 5))


def test_pollux_profiles_are_read_and_scale_less_than_linearly():
    if not PROFILES.exists():
        pytest.skip("Pollux's profiles are not at hand")
    for model in ("bert", "cifar10", "imagenet"):
        scaling = read_scaling(PROFILES, model)
        table = [scaling.goodput(count) for count in (1, 2, 4, 8, 16)]
        assert 2 * table[1] < table[-1] < 16 * table[0]
        noisy = read_scaling(PROFILES, model, noise_samples=500)
        assert noisy.goodput(16) < scaling.goodput(16)
    # BERT is slower on six devices of two nodes than on the four of one.
    bert = read_scaling(PROFILES, "bert")
    assert bert.goodput(6) < bert.goodput(4) < bert.goodput(12)
    fleet = uniform_fleet(4, 4)
    pace = Pace(fleet, scaling={"imagenet": read_scaling(PROFILES, "imagenet")})
    jobs = [
        job(f"j{number}", 4, 3600, 60.0 * number, model="imagenet", minimum_devices=1, maximum_devices=16)
        for number in range(2)
    ]
    rigid = play(jobs, fleet, FirstFitFifo(), Consolidated(), pace=pace)
    flexible = play(jobs, fleet, Pollux(60), Consolidated(), pace=pace, overhead=Overhead(fixed_seconds=10))
    assert flexible.average_completion_seconds < rigid.average_completion_seconds


def test_profiles_with_wrong_lines_name_them(tmp_path):
    path = tmp_path / "m-placements.csv"
    path.write_text("placement,local_bsz,step_time,sync_time\n1,4,0.5,0\n2,4,zero,0\n")
    with pytest.raises(FieldError, match=":3: 'zero' is no step_time"):
        read_scaling(tmp_path, "m")
    path.write_text("placement,local_bsz,step_time,sync_time\n10,4,0.5,0\n")
    with pytest.raises(FieldError, match="is no placement"):
        read_scaling(tmp_path, "m")
    with pytest.raises(FileError):
        read_scaling(tmp_path, "other")


# ----------------------------------------------------------------------------------------------- recurring jobs


def test_qssf_learns_who_submits_short_jobs():
    jobs = [
        job("long-1", 1, 100, 0.0, user="l"),
        job("short-1", 1, 5, 1.0, user="s"),
        job("long-2", 1, 100, 50.0, user="l"),
        job("short-2", 1, 5, 51.0, user="s"),
    ]
    outcome = play(jobs, uniform_fleet(1, 1), QuasiShortestServiceFirst(), FirstFit())
    # At 100 only the long user is known, and so everybody is thought to be as long: submission decides. From 105 on
    # the short user is known to be short.
    assert [found.start_seconds for found in outcome.jobs] == [0, 100, 110, 105]
    policy = QuasiShortestServiceFirst()
    assert policy.predicted(jobs[0]) == float("inf")


class AskedForAll(QuasiShortestServiceFirst):
    """As the scheduler did it before it kept groups: every job's key anew at each event."""

    steady = False
    grouped = False


@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 60), st.integers(1, 4), st.integers(1, 40), st.sampled_from("abc"), st.sampled_from("xy")
        ),
        min_size=1, max_size=30,
    ),
    patience=st.sampled_from([None, 20.0]),
    head=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_qssf_kept_in_groups_decides_as_if_all_jobs_were_ordered_at_each_event(rows, patience, head):
    jobs = [
        job(f"{stem}-{place}", devices, seconds, submit, user=user)
        for place, (submit, devices, seconds, user, stem) in enumerate(rows)
    ]
    found = []
    for policy in (QuasiShortestServiceFirst(), AskedForAll()):
        policy.head_blocks = head
        found.append(play(jobs, uniform_fleet(2, 2), policy, FirstFit(), patience_seconds=patience, keep_segments=True))
    assert found[0].jobs == found[1].jobs
    assert found[0].segments == found[1].segments


def test_a_policy_that_only_orders_gets_the_devices_that_jobs_ask_for():
    scheduler = Scheduler(uniform_fleet(1, 4), FirstFitFifo(), FirstFit())
    scheduler.handle(0, Submit(job=job("a", 3)), Submit(job=job("b", 2)))
    view = scheduler.view(0)
    assert isinstance(view, View)
    assert [(wish.entry.job.name, wish.devices) for wish in scheduler.policy.arrange(view)] == [("a", 3), ("b", 2)]
