"""What `headway` learns, and how it orders by it, against sums over all cases."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import InputError
from headway.schedule import fast
from headway.schedule.events import Resize
from headway.schedule.fleet import parse_fleet
from headway.schedule.job import Job
from headway.schedule.pace import Overhead
from headway.schedule.placement.rules import make_placement
from headway.schedule.policies.catalog import make_policy
from headway.schedule.policies.headway import HeadwayPolicy
from headway.schedule.policies.history import BINS, BOUNDS, History, expected_effort
from headway.schedule.replay import play
from headway.schedule.scheduler import Scheduler, advance
from headway.schedule.summary import summarise
from headway.schedule.traces.synthetic import shuffle, synthesize


def job(name="a", **fields) -> Job:
    return Job(**{"name": name, "submit_seconds": 0.0, "devices": 1, "duration_seconds": 100.0, **fields})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.just(0.0), st.floats(0.01, 1)), min_size=6, max_size=6).filter(lambda them: them[-1] > 0))
def test_expected_effort_is_the_best_quantum_over_all_cases(weights):
    bounds = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    share = np.array(weights) / sum(weights)
    middles = [0.5, 1.5, 3.0, 6.0, 12.0, 48.0]
    out = np.empty(6)
    expected_effort(share, bounds, out)
    for start in range(6):
        attained = 0.0 if start == 0 else bounds[start - 1]
        best = math.inf
        for quantum_end in [*bounds[start:], math.inf]:
            cases = list(zip(middles[start:], share[start:], strict=True))
            ends = sum(mass for service, mass in cases if service <= quantum_end)
            spent = sum(mass * (min(service, quantum_end) - attained) for service, mass in cases)
            if ends > 0:
                best = min(best, spent / ends)
        assert out[start] == pytest.approx(best, rel=1e-9)


def test_a_group_with_few_jobs_speaks_with_the_voice_of_the_one_above_it():
    history = History(weight=2.0)
    for at in range(50):
        history.learn(job(f"s{at}", user="short"), 100.0)
        history.learn(job(f"l{at}", user="long"), 1e6)
    assert history.efforts(job(user="short"))[0] < 0.01 * history.efforts(job(user="long"))[0]
    nobody = history.distribution(job(user="new"))
    assert nobody == pytest.approx(history.distribution(job(user="other")), abs=1e-12)
    assert nobody.sum() == pytest.approx(1)
    # A single long job of a user with many short ones hardly moves what is expected first.
    before = history.efforts(job(user="short"))[0]
    history.learn(job("x", user="short"), 1e6)
    assert history.efforts(job(user="short"))[0] < 1.5 * before


def test_groups_forget_so_that_a_user_who_changes_is_followed():
    quick, slow = History(memory=16.0), History(memory=1e9)
    for history in (quick, slow):
        for at in range(400):
            history.learn(job(f"s{at}", user="ann"), 100.0)
        for at in range(40):
            history.learn(job(f"l{at}", user="ann"), 1e6)
    last = int(np.searchsorted(BOUNDS, 1e6))
    assert quick.distribution(job(user="ann"))[last] > 0.9
    assert slow.distribution(job(user="ann"))[last] < 0.2


def test_with_nothing_learned_long_service_lowers_the_rank():
    efforts = History().efforts(job())
    assert len(efforts) == BINS
    # The first bin begins at nothing, so that it alone is longer than what has been attained.
    assert all(later > earlier for earlier, later in itertools.pairwise(efforts[1:]))


def test_a_job_of_a_user_with_short_jobs_goes_first():
    fleet = parse_fleet("n1g1")
    past = [job(f"p{at}", user=user, submit_seconds=float(at), duration_seconds=lasts)
            for at, (user, lasts) in enumerate([("quick", 40.0), ("slow", 4000.0)] * 5)]  # fmt: skip
    late = 1e6
    pair = [
        job("slow", user="slow", submit_seconds=late, duration_seconds=4000.0),
        job("quick", user="quick", submit_seconds=late, duration_seconds=40.0),
    ]
    outcome = play([*past, *pair], fleet, HeadwayPolicy(), make_placement("first-fit"))
    finish = {each.name: each.finish_seconds - late for each in outcome.jobs[-2:]}
    assert finish == {"quick": 40.0, "slow": 4040.0}


def test_stopping_a_job_is_weighed_against_what_it_costs():
    jobs = [
        job("long", duration_seconds=2000.0),
        job("new", submit_seconds=100.0, duration_seconds=2000.0),
    ]

    def preemptions(fixed: float) -> int:
        outcome = play(
            jobs, parse_fleet("n1g1"), HeadwayPolicy(), make_placement("first-fit"),
            overhead=Overhead(fixed_seconds=fixed),
        )  # fmt: skip
        return sum(each.preemptions for each in outcome.jobs)

    assert preemptions(0.0) > 0
    assert preemptions(1e5) == 0


def test_elastic_jobs_that_have_had_much_make_room_and_grow_back():
    jobs = [
        job("elastic", devices=4, duration_seconds=5000.0, minimum_devices=1, maximum_devices=4),
        job("gang", submit_seconds=3000.0, devices=3, duration_seconds=500.0),
    ]
    seen = []

    def watch(now, decisions, scheduler):
        seen.extend((now, decision) for decision in decisions if isinstance(decision, Resize))

    outcome = play(jobs, parse_fleet("n1g4"), HeadwayPolicy(), make_placement("first-fit"), watch=watch)
    assert [sum(len(share.devices) for share in decision.shares) for _, decision in seen] == [1, 4]
    assert seen[0][0] == 3000.0
    assert all(each.finished for each in outcome.jobs)
    assert {each.name: each.preemptions for each in outcome.jobs} == {"elastic": 0, "gang": 0}


def test_what_it_learned_survives_a_snapshot():
    fleet = parse_fleet("n1g2")
    trace = synthesize(40, devices=2, load=1.5, seed=3)
    learned = HeadwayPolicy()
    play(trace.jobs, fleet, learned, make_placement("first-fit"))
    scheduler = Scheduler(fleet, learned, make_placement("first-fit"))
    state, _ = advance(scheduler, scheduler.snapshot(), 0.0)
    again = Scheduler(fleet, HeadwayPolicy(), make_placement("first-fit"))
    again.restore(type(state).from_json(state.to_json()))
    assert isinstance(again.policy, HeadwayPolicy)
    for each in trace.jobs[:10]:
        np.testing.assert_array_equal(again.policy.history.efforts(each), learned.history.efforts(each))


def test_numbers_without_sense_are_refused():
    with pytest.raises(InputError, match="weight"):
        History(weight=0.0)
    with pytest.raises(InputError, match="shrink_after"):
        HeadwayPolicy(shrink_after=-1.0)


def test_history_pays_where_users_repeat_themselves_and_costs_little_where_it_misleads():
    """The claim of the documentation in small: bench/policies.py has the figures on whole traces."""
    fleet = parse_fleet("n8g8")
    trace = synthesize(6000, devices=64, load=0.95, seed=1, recurrence=0.8)

    def mean(policy: str, jobs=trace) -> float:
        replay = fast.run(jobs, fleet, make_policy(policy), make_placement("consolidated"), engine="fast")
        return summarise(replay).completion_mean

    ours, las, bound = mean("headway"), mean("2d-las"), mean("srsf")
    assert bound <= ours < las
    assert mean("headway", shuffle(trace, 1)) < las
