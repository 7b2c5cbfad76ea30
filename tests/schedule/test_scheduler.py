"""The state machine: each event and each decision, as a value, and at any time."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import InputError
from headway.schedule.entry import Entry, EntryState
from headway.schedule.events import (
    Cancel,
    Crossing,
    Demote,
    Fail,
    Finish,
    Migrate,
    NodeDown,
    NodeUp,
    Preempt,
    Progress,
    Promote,
    Quota,
    Refuse,
    Resize,
    Share,
    Start,
    Submit,
    Tick,
)
from headway.schedule.fleet import Fleet, FleetNode, uniform_fleet
from headway.schedule.job import Job, ModelProfile
from headway.schedule.pace import Overhead, Pace
from headway.schedule.placement.rules import Consolidated, FirstFit, make_placement
from headway.schedule.policies.catalog import POLICIES, make_policy
from headway.schedule.policies.fifo import Fifo, FirstFitFifo
from headway.schedule.policies.ordering import Policy, View, Wish
from headway.schedule.policies.shortest import ShortestRemainingServiceFirst
from headway.schedule.policies.tiresias import DiscretisedLas
from headway.schedule.replay import Player
from headway.schedule.scheduler import Scheduler, SchedulerState, advance
from headway.schedule.seating import Seating, Target


def submit(name: str, devices: int = 1, seconds: float = 10.0, **fields) -> Submit:
    return Submit(job=Job(name=name, submit_seconds=0.0, devices=devices, duration_seconds=seconds, **fields))


def machine(policy: Policy | None = None, nodes: int = 1, devices: int = 4, **options) -> Scheduler:
    placement = options.pop("placement", FirstFit())
    return Scheduler(uniform_fleet(nodes, devices), policy or Fifo(), placement, **options)


def names(decisions, kind) -> list[str]:
    return [decision.job for decision in decisions if isinstance(decision, kind)]


def test_a_start_says_which_devices():
    scheduler = machine(nodes=2, devices=2)
    assert scheduler.handle(0, submit("a", 1)) == (Start(job="a", shares=(Share(node="n0", devices=(0,)),)),)
    (start,) = scheduler.handle(1, submit("b", 2))
    assert start.shares == (Share(node="n0", devices=(1,)), Share(node="n1", devices=(0,)))
    assert scheduler.handle(2, Finish(job="a"), submit("c")) == (
        Start(job="c", shares=(Share(node="n0", devices=(0,)),)),
    )


def test_everything_of_one_instant_is_decided_at_once():
    scheduler = machine(ShortestRemainingServiceFirst(), devices=2)
    scheduler.handle(0, submit("a", 2, 10), submit("b", 2, 50))
    # Told one by one, b would start when a ends, only to be stopped for c.
    assert scheduler.handle(10, Finish(job="a"), submit("c", 2, 5)) == (
        Start(job="c", shares=(Share(node="n0", devices=(0, 1)),)),
    )


def test_a_shorter_job_preempts_and_the_longer_one_resumes():
    scheduler = machine(ShortestRemainingServiceFirst(), devices=2)
    scheduler.handle(0, submit("long", 2, 50))
    decisions = scheduler.handle(10, submit("short", 2, 5))
    assert (names(decisions, Preempt), names(decisions, Start)) == (["long"], ["short"])
    entry = scheduler.entry("long")
    assert entry is not None
    assert (entry.progress(12), entry.attained(12), entry.waiting(12)) == (10, 20, 2)
    assert names(scheduler.handle(15, Finish(job="short")), Start) == ["long"]


def test_a_job_that_fits_nowhere_is_refused_and_so_are_doubles_and_nonsense():
    scheduler = machine()
    assert isinstance(scheduler.handle(0, submit("big", 5))[0], Refuse)
    scheduler.handle(0, submit("a"))
    (again,) = scheduler.handle(0, submit("a"))
    assert isinstance(again, Refuse)
    assert "of this name" in again.reason
    (endless,) = scheduler.handle(0, submit("b", seconds=math.inf))
    assert isinstance(endless, Refuse)
    assert endless.reason == "never ends"
    assert set(scheduler.entries) == {0}


def test_a_quota_bounds_what_a_queue_holds_until_it_changes():
    scheduler = machine(FirstFitFifo())
    scheduler.handle(0, Quota(queue="q", devices=2))
    decisions = scheduler.handle(0, *(submit(name, queue="q") for name in "abc"), submit("d", 2))
    assert names(decisions, Start) == ["a", "b", "d"]
    assert names(scheduler.handle(1, Cancel(job="d"), Quota(queue="q", devices=-1)), Start) == ["c"]


def test_a_smaller_quota_stops_jobs_under_a_preemptive_policy():
    scheduler = machine(ShortestRemainingServiceFirst())
    scheduler.handle(0, submit("a", queue="q", seconds=5), submit("b", queue="q", seconds=9))
    assert names(scheduler.handle(1, Quota(queue="q", devices=1)), Preempt) == ["b"]


def test_those_that_share_devices_count_against_their_quota_too():
    light = {"light": ModelProfile(name="light", utilisation=0.4)}
    scheduler = machine(make_policy("gandiva", profiles=light), devices=2, pace=Pace(uniform_fleet(1, 2), light))
    scheduler.handle(0, Quota(queue="q", devices=1))
    scheduler.handle(0, *(submit(name, model="light") for name in "xy"))
    decisions = scheduler.handle(1, *(submit(name, queue="q", model="light") for name in "ab"))
    assert names(decisions, Start) == ["a"]


def test_a_placement_heeds_the_job_that_is_there_not_one_that_had_its_number():
    nodes = tuple(FleetNode(name=f"n{memory}", devices=1, kind="v", memory_bytes=memory) for memory in (1.0, 2.0))
    seating = Seating(Fleet(name="two", nodes=nodes))

    def place(memory: float) -> Target:
        job = Job(name="a", submit_seconds=0.0, devices=1, duration_seconds=1.0, memory_bytes=memory)
        wish = Wish(Entry(EntryState(number=0, job=job, submitted=0.0)), 1, ("v",))
        return seating.arrange([wish], FirstFit(), preemptive=True, head_blocks=False, quotas={})[0]

    assert [place(memory).counts for memory in (1.0, 2.0)] == [((0, 1),), ((1, 1),)]


@pytest.mark.parametrize(("name", "kept"), [("headway", "efforts"), ("gandiva", "")])
def test_a_policy_forgets_jobs_that_were_cancelled_waiting_or_running(name, kept):
    scheduler = machine(make_policy(name), devices=1)
    scheduler.handle(0, submit("a"), submit("b"))
    scheduler.handle(1, Cancel(job="a"), Cancel(job="b"))
    learned = scheduler.policy.snapshot()
    assert not (learned[kept] if kept else learned)


def test_cancelled_jobs_give_their_devices_back_and_are_reported_as_ended():
    scheduler = machine(devices=2)
    scheduler.handle(0, submit("a", 2), submit("b", 2), submit("c", 2))
    scheduler.handle(1, Cancel(job="b"))
    assert names(scheduler.handle(2, Cancel(job="a")), Start) == ["c"]
    assert [entry.job.name for entry in scheduler.ended] == ["b", "a"]


def test_progress_corrects_what_the_pace_predicted():
    scheduler = machine(ShortestRemainingServiceFirst(), devices=1)
    scheduler.handle(0, submit("a", seconds=10))
    scheduler.handle(4, Progress(job="a", seconds=1.0))
    entry = scheduler.entry("a")
    assert entry is not None
    assert (entry.remaining(4), entry.finish()) == (9, 13)
    # Now an arrival of 6 s is the shorter one; without the report it would not have been.
    assert names(scheduler.handle(5, submit("b", seconds=6)), Preempt) == ["a"]


def test_a_lost_node_takes_its_jobs_and_devices_until_it_is_back():
    scheduler = machine(nodes=2, devices=2)
    scheduler.handle(0, submit("a", 2), submit("b", 2))
    (stopped,) = scheduler.handle(3, NodeDown(node="n0"))
    assert stopped == Preempt(job="a", reason="node down")
    assert scheduler.seating.capacity == 2
    assert scheduler.handle(4, NodeDown(node="n0")) == ()
    (back,) = scheduler.handle(5, NodeUp(node="n0"))
    assert back == Start(job="a", shares=(Share(node="n0", devices=(0, 1)),))


def test_a_failed_job_waits_from_its_last_checkpoint():
    scheduler = machine(overhead=Overhead(checkpoint_seconds=10, fixed_seconds=2))
    scheduler.handle(0, submit("a", seconds=100))
    stopped, started = scheduler.handle(25, Fail(job="a"))
    assert stopped == Preempt(job="a", reason="failed")
    assert isinstance(started, Start)
    assert started.overhead_seconds == 2
    entry = scheduler.entry("a")
    assert entry is not None
    assert (entry.progress(27), entry.finish()) == (20, 107)


def test_thresholds_are_crossed_exactly_and_announced():
    scheduler = machine(DiscretisedLas((40.0, 100.0)), devices=4)
    scheduler.handle(0, submit("a", 4, 100))
    assert scheduler.wakes_at() == 10
    scheduler.handle(6, submit("b", 4, 100))
    decisions = scheduler.handle(10, Crossing(job="a"))
    assert decisions[0] == Demote(job="a", queue=1)
    assert (names(decisions, Preempt), names(decisions, Start)) == (["a"], ["b"])
    assert scheduler.wakes_at() == 20


def test_who_has_waited_long_for_what_it_had_goes_back_to_the_first_queue():
    scheduler = machine(DiscretisedLas((40.0,), promote_knob=2.0), devices=4)
    scheduler.handle(0, submit("a", 4, 100), submit("b", 4, 9))
    scheduler.handle(10, Tick())
    scheduler.handle(19, Finish(job="b"), submit("c", 4, 9))
    assert scheduler.wakes_at() == 29  # c's threshold; a has waited 9 of the 20 s that are twice what it executed
    scheduler.handle(28, Finish(job="c"), submit("d", 4, 9))
    assert scheduler.wakes_at() == 30
    decisions = scheduler.handle(30, Tick())
    # Back in the first queue, behind d, which runs there.
    assert decisions == (Promote(job="a", queue=0),)
    entry = scheduler.entry("a")
    assert entry is not None
    assert (entry.queue, entry.attained(30), entry.attained_in_level(30)) == (0, 40, 0)
    assert names(scheduler.handle(37, Finish(job="d"), submit("e", 4)), Start) == ["a"]


def test_waits_before_and_after_a_run_count_together_for_the_promotion():
    scheduler = machine(DiscretisedLas((40.0,), promote_knob=2.0), devices=4)
    scheduler.handle(0, submit("a", 4, 100), submit("b", 4, 9))
    scheduler.handle(10, Tick())
    scheduler.handle(19, Finish(job="b"))
    scheduler.handle(20, submit("c", 4, 9))
    scheduler.handle(29, Finish(job="c"), submit("d", 4, 9))
    # a has executed 11 s, waited 9 s before the last of them and waits since 20: 22 s are full at 33.
    assert scheduler.wakes_at() == 33
    assert names(scheduler.handle(33, Tick()), Promote) == ["a"]


def test_who_was_stopped_stands_in_its_queue_where_it_entered_it():
    scheduler = machine(DiscretisedLas((4.0,)), devices=4)
    scheduler.handle(0, submit("wide", 4, 100))
    scheduler.handle(1, Tick(), submit("narrow", 1, 100))  # wide enters the second queue, and gives way
    scheduler.handle(4, submit("short", 1, 10))
    scheduler.handle(5, Tick())  # narrow enters the second queue; beside short, wide does not fit, and so it runs on
    decisions = scheduler.handle(6, submit("new", 3, 10))
    assert (names(decisions, Preempt), names(decisions, Start)) == (["narrow"], ["new"])
    assert names(scheduler.handle(6.5, Cancel(job="new"), Cancel(job="short")), Start) == ["wide"]


def test_patience_bounds_the_wait_of_a_gang_that_small_jobs_overtake():
    def wait(patience: float) -> float:
        scheduler = machine(FirstFitFifo(), devices=2, patience_seconds=patience)
        small = [
            Job(name=f"s{number}", submit_seconds=5.0 * number, devices=1, duration_seconds=10) for number in range(40)
        ]
        gang = Job(name="gang", submit_seconds=1, devices=2, duration_seconds=10)
        outcome = Player([*small, gang], scheduler).run()
        return outcome.jobs[-1].queueing_seconds

    assert wait(math.inf) > 150
    assert wait(20.0) <= 20 + 10  # its patience, and the longest run


def test_patience_puts_a_job_before_all_others_under_a_preemptive_policy():
    scheduler = machine(ShortestRemainingServiceFirst(), devices=2, patience_seconds=7)
    scheduler.handle(0, submit("short", 2, 100), submit("long", 2, 1000))
    assert scheduler.wakes_at() == 7
    decisions = scheduler.handle(7, Tick())
    assert (names(decisions, Preempt), names(decisions, Start)) == (["short"], ["long"])


class Sized(Policy):
    """Gives jobs the sizes that a test says."""

    name = "sized"

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}

    def arrange(self, view: View) -> list[Wish]:
        return [Wish(entry, self.sizes.get(entry.job.name, entry.job.devices)) for entry in view.entries]


def test_elastic_jobs_are_resized_and_run_at_another_pace():
    policy = Sized()
    scheduler = machine(policy, devices=8, pace=Pace(uniform_fleet(1, 8), exponent=0.5))
    scheduler.handle(0, submit("a", 4, 100, minimum_devices=1, maximum_devices=8))
    policy.sizes["a"] = 1
    (resize,) = scheduler.handle(10, Tick())
    assert isinstance(resize, Resize)
    assert (resize.shares, resize.rate) == ((Share(node="n0", devices=(0,)),), 0.5)
    entry = scheduler.entry("a")
    assert entry is not None
    assert (entry.finish(), entry.attained(12)) == (10 + 90 / 0.5, 42)


def test_a_skewed_gang_moves_those_after_it_out_of_its_way():
    """Enough devices are free, but on two nodes: the later, single ones migrate, and the gang has a node."""
    profiles = {"vgg": ModelProfile(name="vgg", skew=0.7)}
    policy = Sized()
    scheduler = machine(policy, nodes=2, devices=2, placement=make_placement("skew", profiles=profiles))
    scheduler.handle(0, submit("a"), submit("b"), submit("c"))
    scheduler.handle(1, Finish(job="a"), submit("gang", 2, model="vgg"))
    entry = scheduler.entry("gang")
    assert entry is not None
    assert not entry.running  # those before it stay where they are
    scheduler = machine(ShortestRemainingServiceFirst(), nodes=2, devices=2, placement=scheduler.placement)
    scheduler.handle(0, submit("a", 1, 1), submit("b", 1, 90), submit("c", 1, 91))
    decisions = scheduler.handle(1, Finish(job="a"), submit("gang", 2, 5, model="vgg"))
    assert names(decisions, Migrate) == ["b"]
    assert names(decisions, Start) == ["gang"]
    assert scheduler.entry("gang").shares == (Share(node="n0", devices=(0, 1)),)  # type: ignore[union-attr]


def test_devices_that_a_gang_cannot_use_where_they_are_go_to_those_after_it():
    profiles = {"vgg": ModelProfile(name="vgg", skew=0.7)}
    placement = make_placement("skew", profiles=profiles)
    scheduler = machine(ShortestRemainingServiceFirst(), nodes=2, devices=2, placement=placement)
    scheduler.handle(0, submit("a", 1, 1), submit("b", 1, 20), submit("c", 1, 21))
    late = (submit("gang", 2, 50, model="vgg"), submit("late", 1, 500))
    assert names(scheduler.handle(1, Finish(job="a"), *late), Start) == ["late"]


def test_time_does_not_run_backwards_and_unknown_things_are_refused():
    scheduler = machine()
    scheduler.handle(5, submit("a"))
    with pytest.raises(InputError, match="after one at 5"):
        scheduler.handle(4, Tick())
    for event in (Finish(job="x"), Cancel(job="x"), Fail(job="x"), Progress(job="x", seconds=1), NodeDown(node="x")):
        with pytest.raises(InputError, match="x"):
            scheduler.handle(6, event)
    scheduler.handle(6, submit("w", 4))
    with pytest.raises(InputError, match="does not run"):
        scheduler.handle(7, Finish(job="w"))
    with pytest.raises(InputError, match="patience"):
        machine(patience_seconds=0)


events = st.lists(
    st.tuples(
        st.integers(0, 9),
        st.one_of(
            st.builds(
                submit, st.sampled_from("abcdefgh"), st.integers(1, 6), st.sampled_from([3.0, 20.0, 70.0]),
                model=st.sampled_from(["lstm", ""]), minimum_devices=st.sampled_from([0, 1]),
            ),
            st.builds(Cancel, job=st.sampled_from("abcdefgh")),
            st.builds(Fail, job=st.sampled_from("abcdefgh")),
            st.builds(Finish, job=st.sampled_from("abcdefgh")),
            st.builds(NodeDown, node=st.sampled_from(["n0", "n1"])),
            st.builds(NodeUp, node=st.sampled_from(["n0", "n1"])),
            st.builds(Quota, queue=st.just(""), devices=st.integers(-1, 8)),
            st.just(Tick()),
        ),
    ),
    max_size=12,
)  # fmt: skip


def possible(scheduler: Scheduler, event) -> bool:
    name = getattr(event, "job", None)
    if name is None or isinstance(event, Submit):
        return True
    entry = scheduler.entry(name)
    return entry is not None and (entry.running or isinstance(event, Cancel))


@pytest.mark.parametrize("name", POLICIES)
@given(told=events)
@settings(max_examples=15, deadline=None)
def test_a_scheduler_restored_from_its_state_decides_as_the_one_that_went_on(name, told):
    """The state is written as JSON and read back before each event, as a replicated log would make of it."""
    profiles = {"lstm": ModelProfile(name="lstm", utilisation=0.4)}

    def make() -> Scheduler:
        policy = make_policy(
            name, history=[5.0, 50.0], thresholds=(20.0, 60.0), promote_knob=1.0, quantum_seconds=4.0, profiles=profiles
        )
        return Scheduler(
            uniform_fleet(2, 4), policy, Consolidated(), overhead=Overhead(fixed_seconds=1), patience_seconds=90,
            pace=Pace(uniform_fleet(2, 4), profiles),
        )  # fmt: skip

    going, state, now = make(), make().snapshot(), 0.0
    for passed, event in told:
        now += passed
        if not possible(going, event):
            continue
        expected = going.handle(now, event)
        text = SchedulerState.from_json(state.to_json())
        state, decisions = advance(make(), text, now, event)
        assert decisions == expected
        assert state == going.snapshot()
