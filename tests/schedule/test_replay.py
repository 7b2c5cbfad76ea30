"""What holds for any trace under any policy: drawn traces, played with and without disturbances."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import InputError
from headway.schedule.events import Cancel, Fail, Finish, NodeDown, NodeUp, Progress, Quota
from headway.schedule.fleet import Fleet, FleetNode, uniform_fleet
from headway.schedule.job import Job, ModelProfile
from headway.schedule.pace import Overhead, Pace
from headway.schedule.placement.rules import FirstFit, make_placement
from headway.schedule.policies.catalog import POLICIES, make_policy
from headway.schedule.policies.fifo import Fifo, FirstFitFifo
from headway.schedule.policies.shortest import ShortestRemainingTimeFirst
from headway.schedule.policies.tiresias import DiscretisedLas, TwoDimensionalLas
from headway.schedule.replay import Player, play
from headway.schedule.scheduler import Scheduler

PROFILES = {
    "vgg": ModelProfile(name="vgg", skew=0.7, parameter_bytes=5e8, spread_slowdown=1.4, utilisation=0.9),
    "lstm": ModelProfile(name="lstm", skew=0.1, parameter_bytes=1e8, utilisation=0.4),
}
FLEET = uniform_fleet(3, 4, rack=2)
HISTORY = [5.0, 20.0, 40.0, 200.0, 900.0]
PLACES = ("first-fit", "best-fit", "consolidated", "consolidated-strict", "random", "skew")


@st.composite
def traces(draw, most_devices: int = 8, longest: int = 60, elastic: bool = True) -> list[Job]:
    jobs = []
    for number in range(draw(st.integers(1, 10))):
        devices = draw(st.integers(1, most_devices))
        ranged = elastic and draw(st.booleans())
        jobs.append(
            Job(
                name=f"j{number}", submit_seconds=float(draw(st.integers(0, 80))), devices=devices,
                duration_seconds=float(draw(st.integers(1, longest))), model=draw(st.sampled_from(["vgg", "lstm", ""])),
                user=draw(st.sampled_from("ab")), minimum_devices=1 if ranged else 0,
                maximum_devices=min(12, 2 * devices) if ranged else 0, weight=float(draw(st.integers(1, 3))),
            )
        )  # fmt: skip
    return jobs


def policy(name: str):
    return make_policy(
        name, history=HISTORY, thresholds=(20.0, 100.0), promote_knob=2.0, quantum_seconds=5.0, profiles=PROFILES
    )


def scheduler(name: str, place: str, *, overhead: Overhead | None = None, patience: float = math.inf) -> Scheduler:
    return Scheduler(
        FLEET, policy(name), make_placement(place, profiles=PROFILES, seed=5), pace=Pace(FLEET, PROFILES),
        overhead=overhead, patience_seconds=patience,
    )  # fmt: skip


def check(now: float, decisions, machine: Scheduler) -> None:
    """No device has two jobs unless they share it, none is held on a node that is down, and gangs are whole."""
    held: dict[tuple[str, int], list[int]] = {}
    for entry in machine.entries.values():
        if not entry.running:
            assert not entry.shares
            continue
        job = entry.job
        size = sum(len(share.devices) for share in entry.shares)
        assert job.smallest <= size <= job.largest
        assert size == entry.devices == sum(count for _, count in entry.counts)
        for share in entry.shares:
            place = machine.fleet.position[share.node]
            node = machine.fleet.nodes[place]
            assert machine.seating.up[place]
            assert not job.kinds or node.kind in job.kinds
            for device in share.devices:
                assert 0 <= device < node.devices
                held.setdefault((share.node, device), []).append(entry.number if entry.host < 0 else entry.host)
    for owners in held.values():
        assert len(owners) <= 2
        assert len(set(owners)) == 1
    free = sum(machine.seating.counts)
    up = sum(node.devices for node, is_up in zip(FLEET.nodes, machine.seating.up, strict=True) if is_up)
    assert free + len(held) == up == machine.seating.capacity
    assert machine.seating.counts == [mask.bit_count() for mask in machine.seating.free]


overheads = st.builds(
    Overhead,
    fixed_seconds=st.sampled_from([0.0, 3.0]),
    storage_bytes_per_second=st.sampled_from([0.0, 1e9]),
    first_start_seconds=st.sampled_from([0.0, 1.0]),
    checkpoint_seconds=st.sampled_from([0.0, 7.0]),
)


@pytest.mark.parametrize("name", POLICIES)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_capacity_is_respected_every_job_ends_and_its_times_add_up(name, data):
    jobs = data.draw(traces())
    machine = scheduler(
        name, data.draw(st.sampled_from(PLACES)), overhead=data.draw(overheads),
        patience=data.draw(st.sampled_from([math.inf, 200.0])),
    )  # fmt: skip
    # Far longer than any needs: who only ever stop each other would be played for ever.
    outcome = Player(jobs, machine, watch=check, keep_segments=True).until(100_000).outcome()
    assert len(outcome.finished) == len(jobs)
    for job, found in zip(jobs, outcome.jobs, strict=True):
        parts = found.run_seconds + found.wait_seconds + found.overhead_seconds
        assert found.completion_seconds == pytest.approx(parts, rel=1e-9)
        mine = [segment for segment in outcome.segments if segment.job == job.name]
        held = sum((s.end - s.begin) * sum(len(share.devices) for share in s.shares) for s in mine)
        # Device-seconds allocated = useful + overhead.
        assert held == pytest.approx(found.service_seconds + found.overhead_service_seconds, rel=1e-9, abs=1e-9)
        worked = sum((s.end - s.begin - s.overhead) * s.rate for s in mine)
        assert worked == pytest.approx(job.duration_seconds, rel=1e-9)
        assert found.start_seconds >= job.submit_seconds


def disturbances(draw) -> list[tuple[float, object]]:
    found: list[tuple[float, object]] = [(500.0, NodeUp(node=node.name)) for node in FLEET.nodes]
    found.append((500.0, Quota(queue="", devices=-1)))
    for _ in range(draw(st.integers(1, 6))):
        time = float(draw(st.integers(0, 120)))
        job = f"j{draw(st.integers(0, 9))}"
        node = f"n{draw(st.integers(0, 2))}"
        kind = draw(st.integers(0, 5))
        found.append(
            (
                time,
                (
                    NodeDown(node=node),
                    NodeUp(node=node),
                    Fail(job=job),
                    Cancel(job=job),
                    Quota(queue="", devices=draw(st.integers(0, 12))),
                    Progress(job=job, seconds=0.5),
                )[kind],
            )
        )
    return found  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_whatever_happens_capacity_is_respected_and_who_is_not_cancelled_ends(name, data):
    jobs = data.draw(traces())
    happening = disturbances(data.draw)
    machine = scheduler(name, data.draw(st.sampled_from(PLACES)), overhead=data.draw(overheads))
    outcome = Player(jobs, machine, disturbances=happening, watch=check).run()  # type: ignore[arg-type]
    cancelled = {event.job for _, event in happening if isinstance(event, Cancel)}
    assert {job.name for job in outcome.jobs if not job.finished} <= cancelled
    for found in outcome.finished:
        parts = found.run_seconds + found.wait_seconds + found.overhead_seconds
        assert found.completion_seconds == pytest.approx(parts, rel=1e-9)


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("optimus", "pollux")])
@given(jobs=traces())
@settings(max_examples=10, deadline=None)
def test_with_devices_for_all_every_job_takes_its_duration(name, jobs):
    wide = uniform_fleet(10, 8)
    outcome = play(jobs, wide, policy(name), make_placement("consolidated"), pace=Pace(wide, PROFILES))
    assert outcome.completions == pytest.approx([job.duration_seconds for job in jobs])


def scaled(jobs: list[Job], factor: float) -> list[Job]:
    return [
        msgspec.structs.replace(
            job, submit_seconds=job.submit_seconds * factor, duration_seconds=job.duration_seconds * factor
        )
        for job in jobs
    ]


# Pollux's weights and what `headway` learns are in seconds that don't scale.
@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("pollux", "headway")])
@given(jobs=traces(), factor=st.sampled_from([0.5, 4.0]))
@settings(max_examples=10, deadline=None)
def test_time_scaled_by_k_scales_completion_times_by_k(name, jobs, factor):
    once = play(jobs, FLEET, policy(name), FirstFit())
    stretched = make_policy(
        name, history=[service * factor for service in HISTORY], thresholds=(20.0 * factor, 100.0 * factor),
        promote_knob=2.0, quantum_seconds=5.0 * factor, profiles=PROFILES,
    )  # fmt: skip
    again = play(scaled(jobs, factor), FLEET, stretched, FirstFit())
    # A power of two: every number is the same but for its exponent, so nothing may differ.
    assert again.completions == [time * factor for time in once.completions]


@pytest.mark.parametrize("name", POLICIES)
@given(jobs=traces(), seed=st.randoms(use_true_random=False))
@settings(max_examples=10, deadline=None)
def test_the_order_of_rows_matters_only_among_simultaneous_ones(name, jobs, seed):
    apart = [msgspec.structs.replace(job, submit_seconds=7.0 * number) for number, job in enumerate(jobs)]
    shuffled = list(apart)
    seed.shuffle(shuffled)
    one = {job.name: job for job in play(apart, FLEET, policy(name), FirstFit()).jobs}
    two = {job.name: job for job in play(shuffled, FLEET, policy(name), FirstFit()).jobs}
    assert one == two


def test_of_simultaneous_rows_the_earlier_row_goes_first():
    jobs = [Job(name=name, submit_seconds=0, devices=2, duration_seconds=5) for name in "ab"]
    for order in (jobs, jobs[::-1]):
        for name in POLICIES:
            outcome = play(order, uniform_fleet(1, 2), policy(name), FirstFit())
            assert outcome.jobs[0].start_seconds == 0, name
            assert outcome.jobs[0].finish_seconds <= outcome.jobs[1].finish_seconds, name


@given(traces())
@settings(max_examples=40, deadline=None)
def test_one_queue_without_demotion_is_first_fit_fifo(jobs):
    queue = play(jobs, FLEET, DiscretisedLas((1e9,)), FirstFit())
    fifo = play(jobs, FLEET, FirstFitFifo(), FirstFit())
    assert queue.jobs == fifo.jobs


@pytest.mark.parametrize("name", POLICIES)
@given(jobs=traces())
@settings(max_examples=5, deadline=None)
def test_the_same_seed_gives_the_same_bytes(name, jobs):
    one, two = (Player(jobs, scheduler(name, "random"), keep_segments=True).run().to_json() for _ in range(2))
    assert one == two


@given(traces(elastic=False))
@settings(max_examples=30, deadline=None)
def test_fifo_is_what_a_few_lines_of_arithmetic_say(jobs):
    """Each starts as soon as those before it have started and enough devices are free: no machine needed."""
    ends: list[tuple[float, int]] = []
    begun, expected = 0.0, {}
    for job in sorted(jobs, key=lambda job: (job.submit_seconds, jobs.index(job))):
        begun = max(begun, job.submit_seconds)
        for time in sorted({begun, *(end for end, _ in ends if end > begun)}):
            if 12 - sum(devices for end, devices in ends if end > time) >= job.devices:
                begun = time
                break
        ends.append((begun + job.duration_seconds, job.devices))
        expected[job.name] = begun + job.duration_seconds
    outcome = play(jobs, FLEET, Fifo(), FirstFit())
    assert {job.name: job.finish_seconds for job in outcome.jobs} == expected


@given(traces(most_devices=1, elastic=False))
@settings(max_examples=30, deadline=None)
def test_srtf_on_one_device_has_the_least_average_of_all_policies(jobs):
    """Schrage 1968: on one machine nothing beats shortest remaining time first."""
    one = uniform_fleet(1, 1)
    best = play(jobs, one, ShortestRemainingTimeFirst(), FirstFit()).average_completion_seconds
    for name in ("fifo", "sjf", "2d-las", "2d-gittins", "gandiva", "themis"):
        found = play(jobs, one, policy(name), FirstFit())
        assert found.average_completion_seconds >= best * (1 - 1e-9)


# ----------------------------------------------------------------------------------------------- single facts


def test_a_preempted_job_pays_for_saving_and_restoring_when_it_resumes():
    jobs = [
        Job(name="long", submit_seconds=0, devices=4, duration_seconds=100, model="vgg"),
        Job(name="short", submit_seconds=10, devices=4, duration_seconds=5),
    ]
    overhead = Overhead(fixed_seconds=1, storage_bytes_per_second=1e9)
    outcome = play(
        jobs, uniform_fleet(1, 4), ShortestRemainingTimeFirst(), FirstFit(), overhead=overhead,
        pace=Pace(uniform_fleet(1, 4), PROFILES),
    )  # fmt: skip
    long, short = outcome.jobs
    cost = 1 + 2 * 3 * 0.5  # fixed, and three times 500 MB out and in again at 1 GB/s
    assert (short.finish_seconds, short.overhead_seconds) == (15, 0)
    assert long.finish_seconds == pytest.approx(100 + 5 + cost)
    assert (long.preemptions, long.overhead_seconds) == (1, pytest.approx(cost))
    assert long.overhead_service_seconds == pytest.approx(4 * cost)


def test_a_failure_loses_what_was_done_since_the_last_checkpoint():
    job = Job(name="a", submit_seconds=0, devices=2, duration_seconds=100)
    outcome = play(
        [job], uniform_fleet(2, 2), Fifo(), FirstFit(), overhead=Overhead(checkpoint_seconds=20),
        disturbances=[(50.0, Fail(job="a"))],
    )  # fmt: skip
    (found,) = outcome.jobs
    assert found.finish_seconds == 110  # 10 s of 50 are done again
    assert (found.failures, found.overhead_seconds, found.run_seconds) == (1, 10, 100)


@pytest.mark.parametrize(
    "happening",
    [
        (NodeDown(node="n0"), Fail(job="a")),
        (Fail(job="a"), NodeDown(node="n0")),
        (Fail(job="a"), Fail(job="a")),
        (Fail(job="a"), Progress(job="a", seconds=9.0)),
        (Fail(job="a"), Cancel(job="b"), Fail(job="b"), Cancel(job="b")),
    ],
)
def test_of_what_happens_at_one_instant_only_what_its_companions_leave_possible_is_told(happening):
    jobs = [Job(name=name, submit_seconds=0, devices=2, duration_seconds=10) for name in "ab"]
    outcome = play(
        jobs, uniform_fleet(2, 2), Fifo(), FirstFit(), overhead=Overhead(checkpoint_seconds=100),
        disturbances=[(4.0, event) for event in happening],
    )  # fmt: skip
    assert [job.failures for job in outcome.jobs] == [1, 0]
    assert outcome.jobs[0].overhead_seconds == 4  # all of it is done again


def test_a_job_that_reports_more_work_than_it_has_ends_there():
    job = Job(name="a", submit_seconds=0, devices=2, duration_seconds=10)
    outcome = play(
        [job], uniform_fleet(1, 2), Fifo(), FirstFit(), disturbances=[(4.0, Progress(job="a", seconds=20.0))]
    )  # fmt: skip
    assert outcome.completions == [4]


def test_a_job_moves_when_its_node_is_lost_and_waits_when_it_was_the_last():
    job = Job(name="a", submit_seconds=0, devices=2, duration_seconds=10)
    happening = [(4.0, NodeDown(node="n0")), (6.0, NodeDown(node="n1")), (9.0, NodeUp(node="n0"))]
    outcome = play([job], uniform_fleet(2, 2), Fifo(), FirstFit(), disturbances=happening, keep_segments=True)
    held = [(segment.shares[0].node, segment.begin, segment.end) for segment in outcome.segments]
    assert held == [("n0", 0, 4), ("n1", 4, 6), ("n0", 9, 13)]


def test_jobs_that_can_never_start_end_the_replay_without_a_finish():
    job = Job(name="a", submit_seconds=0, devices=2, duration_seconds=10)
    for name in POLICIES:
        outcome = play(
            [job], uniform_fleet(1, 2), policy(name), FirstFit(), disturbances=[(0.0, NodeDown(node="n0"))]
        )  # fmt: skip
        assert [found.finished for found in outcome.jobs] == [False]


def test_a_job_larger_than_the_fleet_is_refused_and_disturbs_nobody():
    jobs = [
        Job(name="a", submit_seconds=0, devices=2, duration_seconds=10),
        Job(name="huge", submit_seconds=1, devices=3, duration_seconds=1),
    ]
    for name in POLICIES:
        outcome = play(jobs, uniform_fleet(1, 2), policy(name), FirstFit())
        assert outcome.jobs[0].completion_seconds == 10
        assert outcome.jobs[0].preemptions == 0
        assert "asks for 3 devices, and the fleet has 2" in outcome.jobs[1].refused
        assert not outcome.jobs[1].finished


def test_a_replay_can_be_stopped_looked_at_and_continued():
    jobs = [Job(name=name, submit_seconds=0, devices=2, duration_seconds=10) for name in "abc"]
    player = Player(jobs, Scheduler(uniform_fleet(1, 4), TwoDimensionalLas(5), FirstFit()))
    half = player.until(7.0).outcome()
    assert [job.finished for job in half.jobs] == [False] * 3
    assert player.now == 7
    assert player.run() == play(jobs, uniform_fleet(1, 4), TwoDimensionalLas(5), FirstFit())


def test_names_that_repeat_and_disturbances_that_are_the_traces_are_refused():
    job = Job(name="a", submit_seconds=0, devices=1, duration_seconds=1)
    machine = Scheduler(uniform_fleet(1, 1), Fifo(), FirstFit())
    with pytest.raises(InputError, match="one name"):
        Player([job, job], machine)
    with pytest.raises(InputError, match="by the trace"):
        Player([job], machine, disturbances=[(0.0, Finish(job="a"))])


def test_jobs_with_kinds_run_on_those_alone():
    fleet = Fleet(
        name="f", nodes=(FleetNode(name="a", devices=2, kind="K80"), FleetNode(name="b", devices=2, kind="V100"))
    )
    jobs = [
        Job(name="v1", submit_seconds=0, devices=2, duration_seconds=10, kinds=("V100",)),
        Job(name="v2", submit_seconds=1, devices=2, duration_seconds=10, kinds=("V100",)),
        Job(name="any", submit_seconds=2, devices=2, duration_seconds=10),
    ]
    for name in ("first-fit-fifo", "srtf", "2d-las"):
        outcome = play(jobs, fleet, policy(name), FirstFit())
        assert [job.finish_seconds for job in outcome.jobs] == [10, 20, 12], name
