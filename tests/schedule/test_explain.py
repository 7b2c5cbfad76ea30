"""Why a job waits: each reason, and that what is said to change it does."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from headway.errors import InputError
from headway.schedule.events import Finish, NodeDown, Quota, Submit, Tick
from headway.schedule.explain import why
from headway.schedule.fleet import Fleet, FleetNode, uniform_fleet
from headway.schedule.job import Job
from headway.schedule.placement.rules import Consolidated, FirstFit
from headway.schedule.policies.catalog import POLICIES, make_policy
from headway.schedule.policies.fifo import Fifo, FirstFitFifo
from headway.schedule.policies.ordering import Policy
from headway.schedule.policies.shortest import ShortestRemainingServiceFirst
from headway.schedule.policies.tiresias import DiscretisedLas
from headway.schedule.scheduler import Scheduler


def submit(name: str, devices: int = 1, seconds: float = 10.0, **fields) -> Submit:
    return Submit(job=Job(name=name, submit_seconds=0.0, devices=devices, duration_seconds=seconds, **fields))


def machine(policy: Policy, nodes: int = 1, devices: int = 4, **options) -> Scheduler:
    placement = options.pop("placement", FirstFit())
    return Scheduler(uniform_fleet(nodes, devices), policy, placement, **options)


def test_a_running_job_says_when_it_is_demoted():
    scheduler = machine(DiscretisedLas((40.0,)))
    scheduler.handle(0, submit("a", 4))
    found = why(scheduler, "a", 3.0)
    assert (found.state, found.reason, found.attained) == ("running", "runs", 12)
    assert found.changes == ("it moves to queue 1 at 10 s",)


def test_too_few_devices_names_those_who_hold_them_and_how_many_are_missing():
    scheduler = machine(FirstFitFifo())
    scheduler.handle(0, submit("a", 2), submit("b", 1), submit("c", 3))
    found = why(scheduler, "c", 2.0)
    assert (found.reason, found.free_devices, found.missing_devices, found.waited_seconds) == ("devices", 1, 2, 2)
    assert [(blocker.job, blocker.devices) for blocker in found.blockers] == [("b", 1), ("a", 2)]
    assert "asking for 1 devices: so many are left for it" in found.changes
    assert "c waits: too few devices are left" in found.text()
    # And so it is: with one device it would have started.
    assert [decision.job for decision in scheduler.handle(2, submit("d", 1))] == ["d"]


def test_behind_the_head_of_the_line_the_head_is_named():
    scheduler = machine(Fifo())
    scheduler.handle(0, submit("a", 2), submit("large", 4), submit("small", 1))
    found = why(scheduler, "small")
    assert (found.reason, [blocker.job for blocker in found.blockers]) == ("head of line", ["large"])
    assert "nobody may overtake" in found.text()


def test_scattered_devices_are_said_to_be_so():
    scheduler = machine(FirstFitFifo(), nodes=2, devices=2, placement=Consolidated(strict=True))
    scheduler.handle(0, submit("a"), submit("b"), submit("c"))
    scheduler.handle(1, Finish(job="a"), submit("gang", 2))
    found = why(scheduler, "gang")
    assert (found.reason, found.free_devices, found.missing_devices) == ("scattered", 2, 0)
    assert found.changes[0] == "2 devices free together on 1 node"
    assert [blocker.job for blocker in found.blockers] == ["b"]
    assert [decision.job for decision in scheduler.handle(2, Finish(job="b"))] == ["gang"]


def test_a_quota_is_the_reason_and_raising_it_the_remedy():
    scheduler = machine(FirstFitFifo())
    scheduler.handle(0, Quota(queue="q", devices=1), submit("a", queue="q"), submit("b", 2, queue="q"))
    found = why(scheduler, "b")
    assert (found.reason, found.missing_devices, found.free_devices) == ("quota", 2, 3)
    assert [decision.job for decision in scheduler.handle(1, Quota(queue="q", devices=1 + 2))] == ["b"]


def test_lost_nodes_and_other_kinds_are_named():
    old, new = FleetNode(name="old", devices=2, kind="K80"), FleetNode(name="new", devices=2, kind="V100")
    scheduler = Scheduler(Fleet(name="f", nodes=(old, new)), FirstFitFifo(), FirstFit())
    scheduler.handle(0, submit("a", 2, kinds=("V100",)), submit("b", 2, kinds=("V100",)))
    found = why(scheduler, "b")
    assert "being able to use other kinds than V100: 2 devices are free" in found.changes
    scheduler.handle(1, NodeDown(node="new"))
    found = why(scheduler, "b")
    assert (found.reason, found.missing_devices) == ("nodes down", 2)


def test_under_2d_las_it_says_when_those_before_leave_their_queue_and_when_it_is_promoted():
    scheduler = machine(DiscretisedLas((40.0,), promote_knob=3.0), patience_seconds=500)
    scheduler.handle(0, submit("a", 4, 100), submit("b", 4, 100))
    found = why(scheduler, "b", 4.0)
    assert found.blockers[0].until == 10
    assert "at 10 s the first of those before it leaves its queue" in found.changes
    assert "at 500 s its patience ends, and it goes before all others" in found.changes
    scheduler.handle(10, Tick())
    assert "at 40 s it goes back to the first queue" in why(scheduler, "a", 12.0).changes


def test_who_is_not_there_cannot_be_asked_about():
    with pytest.raises(InputError, match="neither waits nor runs"):
        why(machine(Fifo()), "ghost")


@pytest.mark.parametrize("name", POLICIES)
@given(
    asked=st.lists(st.tuples(st.integers(1, 8), st.sampled_from([5.0, 30.0, 200.0])), min_size=2, max_size=9),
    passed=st.integers(0, 40),
)
@settings(max_examples=10, deadline=None)
def test_any_job_can_be_asked_about_at_any_time_and_asking_changes_nothing(name, asked, passed):
    policy = make_policy(name, history=[5.0, 50.0], thresholds=(20.0, 60.0), quantum_seconds=7.0)
    scheduler = machine(policy, nodes=2)
    for number, (devices, seconds) in enumerate(asked):
        scheduler.handle(number, submit(f"j{number}", devices, seconds))
    now = scheduler.now + passed / 10
    before = scheduler.snapshot()
    for number in range(len(asked)):
        entry = scheduler.entry(f"j{number}")
        assert entry is not None
        found = why(scheduler, f"j{number}", now)
        assert found.job in found.text()
        assert (found.state == "running") == entry.running
        if found.reason == "devices":
            assert found.missing_devices > 0
            assert found.blockers
    assert scheduler.snapshot() == before


@given(asked=st.lists(st.tuples(st.integers(1, 8), st.sampled_from([5.0, 30.0, 200.0])), min_size=2, max_size=9))
@settings(max_examples=60, deadline=None)
def test_missing_devices_under_srsf_are_what_those_before_it_keep(asked):
    """With so many devices fewer, a job as short as it is would have started beside those before it."""
    scheduler = machine(ShortestRemainingServiceFirst(), nodes=2)
    scheduler.handle(0, *(submit(f"j{number}", *job) for number, job in enumerate(asked)))
    waiting = [entry for entry in scheduler.entries.values() if not entry.running]
    assume(waiting)
    for entry in waiting:
        found = why(scheduler, entry.job.name)
        if found.reason != "devices":
            continue
        before = sum(
            other.devices
            for other in scheduler.entries.values()
            if other.running and (other.job.service, other.number) < (entry.job.service, entry.number)
        )
        assert found.missing_devices == before + entry.job.devices - 8
