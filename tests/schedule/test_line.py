"""The sorted line decides as the whole order would, refuses before it changes, lets nobody wait forever."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import InputError
from headway.schedule.events import Cancel, Fail, Finish, NodeDown, Submit
from headway.schedule.fleet import uniform_fleet
from headway.schedule.job import Job
from headway.schedule.pace import Overhead
from headway.schedule.placement import make_placement
from headway.schedule.policies import POLICIES, make_policy
from headway.schedule.replay import play
from headway.schedule.scheduler import Scheduler

STEADY = (
    "fifo", "first-fit-fifo", "yarn", "sf", "sjf", "srtf", "srsf", "las", "2d-las-continuous", "2d-las", "2d-gittins",
    "2d-gittins-continuous", "headway",
)  # fmt: skip
BOUNDED = ("fifo", "yarn", "las", "2d-las-continuous", "gandiva", "themis", "max-min", "gavel", "pollux")


def made(name: str):
    return make_policy(name, history=[3.0, 12.0, 50.0, 400.0], thresholds=(5.0, 40.0), promote_knob=0.5)


@settings(max_examples=120, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 6), st.integers(1, 60), st.sampled_from(["ann", "ben"])),
        min_size=1,
        max_size=14,
    ),
    policy=st.sampled_from(STEADY),
    placement=st.sampled_from(["first-fit", "consolidated", "consolidated-strict", "random"]),
    patience=st.sampled_from([math.inf, 25.0]),
)
def test_the_sorted_line_decides_as_the_whole_order_does(rows, policy, placement, patience):
    jobs = [
        Job(name=f"j{at}", submit_seconds=submit, devices=devices, duration_seconds=lasts, user=user)
        for at, (submit, devices, lasts, user) in enumerate(rows)
    ]
    found = []
    for steady in (True, False):
        rule = made(policy)
        assert rule.steady
        rule.steady = steady
        found.append(
            play(
                jobs,
                uniform_fleet(3, 2),
                rule,
                make_placement(placement),
                overhead=Overhead(fixed_seconds=1.0),
                patience_seconds=patience,
                keep_segments=True,
            )
        )
    assert found[0] == found[1]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_that_bounds_no_wait_has_a_finite_patience(policy):
    assert (made(policy).patience_seconds < math.inf) == (policy not in BOUNDED)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in BOUNDED])
def test_a_large_gang_starts_within_its_patience_and_the_longest_run(policy):
    """Small short jobs fill the fleet without end; a gang that needs all of it comes first and is long."""
    jobs = [Job(name="first", submit_seconds=0.0, devices=1, duration_seconds=15.0)]
    jobs.append(Job(name="gang", submit_seconds=1.0, devices=2, duration_seconds=500.0))
    jobs += [Job(name=f"s{at}", submit_seconds=5.0 * at, devices=1, duration_seconds=10.0) for at in range(1, 80)]
    outcome = play(jobs, uniform_fleet(1, 2), made(policy), make_placement("first-fit"), patience_seconds=60.0)
    # Other small jobs may have waited as long when its turn comes.
    assert outcome.jobs[1].queueing_seconds <= 60 + 2 * 15


@pytest.mark.parametrize(
    "wrong", [Finish(job="no"), Fail(job="no"), Cancel(job="no"), Finish(job="waits"), NodeDown(node="no")]
)
def test_a_call_with_an_impossible_event_changes_nothing(wrong):
    scheduler = Scheduler(uniform_fleet(1, 2), made("fifo"), make_placement("first-fit"))

    def job(name: str, devices: int) -> Job:
        return Job(name=name, submit_seconds=0.0, devices=devices, duration_seconds=9.0)

    scheduler.handle(0.0, Submit(job=job("runs", 2)), Submit(job=job("waits", 1)))
    before = scheduler.snapshot()
    with pytest.raises(InputError):
        scheduler.handle(5.0, Finish(job="runs"), Submit(job=job("new", 1)), wrong)
    assert scheduler.snapshot() == before
    # One that comes and goes in one call is known in between; one that ended is not.
    scheduler.handle(5.0, Submit(job=job("new", 1)), Cancel(job="new"), Finish(job="runs"))
    with pytest.raises(InputError, match="neither waits nor runs"):
        scheduler.handle(6.0, Finish(job="waits"), Cancel(job="waits"))
