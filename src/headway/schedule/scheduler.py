"""The scheduler: a state machine that is told events and answers with decisions. No clock, no I/O, no randomness.

    >>> fleet = parse_fleet("n1g4")
    >>> scheduler = Scheduler(fleet, Fifo(), FirstFit())
    >>> scheduler.handle(0.0, Submit(job=Job(name="a", submit_seconds=0, devices=2, duration_seconds=10)))
    (Start(job='a', ...),)

Everything that happens at one instant is given in one call, finishes first. Then the policy is asked once for the order
of all jobs, and the difference to what runs is decided. `wakes_at` says when the scheduler wants to be called next if
nothing happens. `snapshot` and `restore` make all of it a value; `advance` is the same machine as a pure function.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from headway.errors import InputError
from headway.schedule.entry import Entry, EntryState
from headway.schedule.events import (
    Cancel,
    Decision,
    Demote,
    Event,
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
    Start,
    Submit,
)  # fmt: skip
from headway.schedule.fleet import Fleet
from headway.schedule.job import Job
from headway.schedule.line import Line
from headway.schedule.pace import Overhead, Pace
from headway.schedule.placement.rules import Placement
from headway.schedule.policies.ordering import Policy, View, Wish
from headway.schedule.seating import Seating, Target
from headway.value import Value

__all__ = ["Foresight", "Scheduler", "SchedulerState", "advance"]

_WHAT: dict[type, str] = {
    Finish: "finishes", Fail: "fails", Progress: "reports progress", Cancel: "is cancelled",
}  # fmt: skip


class SchedulerState(Value):
    """All that a scheduler remembers. `free` has a bit for each free device of each node, 0 for nodes that are down."""

    entries: tuple[EntryState, ...] = ()
    free: tuple[int, ...] = ()
    up: tuple[bool, ...] = ()
    quotas: dict[str, int] = {}
    now: float = 0.0
    next_number: int = 0
    turn: int = 0
    next_ask: float = 0.0
    learned: Any = None


class Scheduler:
    """One fleet, one policy, one rule of placement.

    `patience_seconds`: a job that has waited as long without a pause goes before all others, whatever the policy says,
    those that waited longest first; each start doubles it. Where nothing is stopped, nobody else starts until it fits.
    So every job starts within its patience and what it then takes until enough devices are free: nothing under
    preemptive policies (but for the others that waited as long), the longest run under others. Infinite: the policy's
    own order decides alone. None: as the policy says, which is finite for those that bound no wait by themselves.

    `ended` collects the entries of jobs that are done or cancelled; whoever reads them clears it.
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        placement: Placement,
        *,
        pace: Pace | None = None,
        overhead: Overhead | None = None,
        patience_seconds: float | None = None,
    ) -> None:
        patience = policy.patience_seconds if patience_seconds is None else patience_seconds
        if not patience > 0:
            raise InputError(f"patience of {patience} s", place="scheduler", remedy="above 0")
        self.fleet = fleet
        self.policy = policy
        self.placement = placement
        self.pace = pace or Pace(fleet)
        self.overhead = overhead or Overhead()
        self.patience_seconds = patience
        self.seating = Seating(fleet)
        self.quotas: dict[str, int] = {}
        self.now = 0.0
        self.entries: dict[int, Entry] = {}
        self.ended: list[Entry] = []
        policy.prepare(self.pace, self.overhead)
        self.line = Line(policy, patience)
        self._numbers: dict[str, int] = {}
        self._next_number = 0
        self._turn = 0
        self._next_ask = 0.0
        self._unsettled: list[Entry] = []  # those that run in a queue in which they were not chosen yet

    # ------------------------------------------------------------------------------------------------- being asked

    def entry(self, job: str) -> Entry | None:
        """What is remembered of a job that waits or runs."""
        number = self._numbers.get(job)
        return None if number is None else self.entries[number]

    def wakes_at(self) -> float | None:
        """When the scheduler has something to do if nothing happens: a threshold, a quantum, the end of a patience."""
        wakes = self.line.next_due(self.entries, self.now)
        if self.policy.quantum_seconds and (self.line.someone_waits or (self.policy.asks_always and self.entries)):
            wakes = min(wakes, self._next_ask)
        return None if wakes == math.inf else wakes

    def view(self, now: float) -> View:
        """What the policy sees at `now`."""
        entries = tuple(self.entries.values())
        return View(now, entries, self.seating.capacity, self.fleet, self.pace, self.overhead)

    def order(self, now: float) -> list[Wish]:
        """Who should have devices, in order, at `now`: those whose patience is at an end, then as the policy says."""
        wishes = self.policy.arrange(self.view(now))
        if self.patience_seconds < math.inf and any(self.is_overdue(wish.entry, now) for wish in wishes):
            overdue = [
                wish if wish.devices and wish.host < 0 else Wish(wish.entry, wish.entry.job.devices)
                for wish in wishes
                if self.is_overdue(wish.entry, now)
            ]
            overdue.sort(key=lambda wish: (wish.entry.since, wish.entry.number))
            wishes = overdue + [wish for wish in wishes if not self.is_overdue(wish.entry, now)]
        return wishes

    def is_overdue(self, entry: Entry, now: float) -> bool:
        """Whether its patience is at an end."""
        return not entry.running and now >= entry.patience_ends(self.patience_seconds)

    def refusal(self, job: Job) -> str:
        """Why no job like this is taken; empty: it is."""
        try:
            job.validate()
        except InputError as error:
            return error.message
        capacity = self.fleet.capacity(job)
        if job.devices <= capacity:
            return ""
        what = "devices of the kinds and memory that it needs" if job.kinds or job.memory_bytes else "devices"
        return f"it asks for {job.devices} devices, and the fleet has {capacity} {what}"

    def place_of(self, node: str) -> int:
        """Its place in the fleet. Raises InputError."""
        place = self.fleet.position.get(node)
        if place is None:
            raise InputError("no such node", place=f"node {node}", remedy=f"one of fleet {self.fleet.name}")
        return place

    # ------------------------------------------------------------------------------------------------- being told

    def handle(self, now: float, *events: Event) -> tuple[Decision, ...]:
        """What follows from these events, which all happen at `now` seconds, in the order in which to carry it out.

        Raises InputError for time that runs backwards, and for events about jobs and nodes that aren't there; then
        nothing has changed, whatever else the call was about.
        """
        if not now >= self.now:
            raise InputError(f"an event at {now} s after one at {self.now} s", place="scheduler", remedy="in order")
        ahead = Foresight(self)
        for event in events:
            ahead.add(event)
        self.now = now
        decisions: list[Decision] = []
        for event in events:
            self._take(now, event, decisions)
        self._cross(now, decisions)
        self._decide(now, decisions)
        return tuple(decisions)

    def _take(self, now: float, event: Event, decisions: list[Decision]) -> None:
        if isinstance(event, Submit):
            self._submit(now, event.job, decisions)
        elif isinstance(event, Finish):
            entry = self._known(event.job)
            self._release(entry, now)
            self._forget(entry)
            self.policy.ended(entry, now)
        elif isinstance(event, Cancel):
            entry = self._known(event.job)
            if entry.running:
                self._release(entry, now)
            self._forget(entry)
        elif isinstance(event, Progress):
            entry = self._known(event.job)
            entry.worked = event.seconds - entry.working(now) * entry.rate
            self.line.touched[entry.number] = entry
        elif isinstance(event, Fail):
            decisions.append(self._fail(self._known(event.job), now, "failed"))
        elif isinstance(event, NodeDown):
            self._node_down(now, self.place_of(event.node), decisions)
        elif isinstance(event, NodeUp):
            self.seating.bring_up(self.place_of(event.node))
        elif isinstance(event, Quota):
            if event.devices < 0:
                self.quotas.pop(event.queue, None)
            else:
                self.quotas[event.queue] = event.devices

    def _submit(self, now: float, job: Job, decisions: list[Decision]) -> None:
        if job.name in self._numbers:
            decisions.append(Refuse(job=job.name, reason="a job of this name waits or runs already"))
            return
        reason = self.refusal(job)
        if reason:
            decisions.append(Refuse(job=job.name, reason=reason))
            return
        self._turn += 1
        state = EntryState(number=self._next_number, job=job, submitted=now, since=now, entered=self._turn)
        entry = Entry(state)
        self.entries[entry.number] = entry
        self._numbers[job.name] = entry.number
        self._next_number += 1
        steady = self.policy.steady
        self.policy.submitted(entry, now)
        if steady != self.policy.steady:
            self._line_up()
        else:
            self.line.add(entry)

    def _line_up(self) -> None:
        """Build the line from the entries."""
        self.line = Line(self.policy, self.patience_seconds)
        for entry in self.entries.values():
            self.line.add(entry)

    def _known(self, job: str) -> Entry:
        return self.entries[self._numbers[job]]

    def _forget(self, entry: Entry) -> None:
        self.policy.left(entry)
        del self.entries[entry.number]
        del self._numbers[entry.job.name]
        self.line.remove(entry)
        self.ended.append(entry)

    def _fail(self, entry: Entry, now: float, reason: str) -> Decision:
        working, devices, rate = entry.working(now), entry.devices, entry.rate
        self._stop(entry, now)
        lost = working - self.overhead.kept(working)
        entry.lose(lost * rate, lost, devices)
        self.line.stopped(entry)
        self._set_crossing(entry)
        return Preempt(job=entry.job.name, reason=reason)

    def _node_down(self, now: float, node: int, decisions: list[Decision]) -> None:
        for entry in self._in_turn(self.line.running):
            if entry.running and any(place == node for place, _ in entry.counts):
                decisions.append(self._fail(entry, now, "node down"))
        self.seating.take_down(node)

    # ------------------------------------------------------------------------------------------------- queues

    def _set_crossing(self, entry: Entry) -> None:
        entry.crossing = math.inf
        thresholds, knob = self.policy.thresholds, self.policy.promote_knob
        if entry.running:
            if entry.queue < len(thresholds):
                entry.crossing = entry.begun + (thresholds[entry.queue] - entry.level) / entry.devices
        elif knob and entry.queue and entry.level > 0:
            entry.crossing = entry.since + max(0.0, knob * entry.level / entry.job.devices - entry.level_wait)
        self.line.expect(entry)

    def _cross(self, now: float, decisions: list[Decision]) -> None:
        if not self.policy.thresholds:
            return
        for entry in self.line.crossing(self.entries, now):
            while entry.crossing <= now:
                self._turn += 1
                entry.entered, entry.settled = self._turn, False
                if entry.running:
                    entry.queue += 1
                    decisions.append(Demote(job=entry.job.name, queue=entry.queue))
                else:
                    entry.queue, entry.level, entry.level_wait = 0, 0.0, 0.0
                    entry.promotions += 1
                    decisions.append(Promote(job=entry.job.name, queue=0))
                    self.line.stopped(entry)
                self._set_crossing(entry)
                if entry.running:
                    self._unsettled.append(entry)

    # ------------------------------------------------------------------------------------------------- deciding

    def _decide(self, now: float, decisions: list[Decision]) -> None:
        if now >= self._next_ask:
            self._next_ask = now + self.policy.quantum_seconds
        if not self.entries:
            return
        self.line.lose_patience(now)
        unsettled, self._unsettled = self._unsettled, []
        rules: Any = {
            "head_blocks": self.policy.head_blocks, "quotas": self.quotas, "overdue": self.line.overdue,
            "turn": self._turn, "least": self.line.least,
        }  # fmt: skip
        if not self.policy.steady:
            wishes = self.order(now)
            targets = self.seating.arrange(
                wishes, self.placement, preemptive=self.policy.preemptive, improve=self._improvable(now), **rules
            )
            order = {wish.entry.number: place for place, wish in enumerate(wishes)}
        elif self._nobody_stops():
            # Whoever runs keeps what it has; only those that wait need be looked at.
            targets = self.seating.fill(
                self.line.waiting(), self.placement, [Wish(entry, 0) for entry in self.line.running.values()], **rules
            )
            for entry in unsettled:
                entry.settled = entry.settled or entry.running
            for number, target in targets.items():
                entry = self.entries[number]
                decisions.append(self._seat(entry, target, "start", now))
                entry.settled = True
            return
        else:
            runners = self.line.runners(now)
            running = [Wish(self.line.running[number], self.line.running[number].devices) for _, number in runners]
            targets = self.seating.arrange(
                self.line.everybody(runners), self.placement, preemptive=True, running=running, **rules
            )
            late = {wish.entry.number: (0, (wish.entry.since,)) for wish in self.line.overdue_wishes()}
            order = {
                number: (*(late.get(number) or (1, self.policy.key(self.entries[number], now))), number)
                for number in targets
            }
        self._carry_out(now, sorted(targets, key=order.__getitem__), targets, decisions)

    def _nobody_stops(self) -> bool:
        """Whether a steady policy can only start jobs: it stops nobody, or there is room for all wherever they go."""
        if not self.policy.preemptive:
            return True
        if self.quotas:
            return False
        if not self.line.someone_waits:
            return True
        alike = len(set(self.fleet.classes)) == 1
        return alike and self.placement.always_fits and self.line.wanted <= self.seating.capacity

    def _in_turn(self, entries: Iterable[int]) -> list[Entry]:
        """Entries of these numbers in the order of submission."""
        return [self.entries[number] for number in sorted(entries)]

    def _improvable(self, now: float):
        """Whether moving a running job pays: it is spread, and the move lasts less than what it has worked since its
        last, so that moving costs at most half of any job's time (Gandiva, OSDI 2018, section 4, moves by trial)."""
        if not self.policy.migrates:
            return None

        def improvable(entry: Entry, counts: Sequence[tuple[int, int]]) -> bool:
            rate = self.pace.rate(entry.job, [node for node, _ in counts], [count for _, count in counts])
            cost = self.overhead.start(entry.job, self.pace.profile(entry.job), resumed=True)
            return rate > entry.rate and entry.working(now) >= cost

        return improvable

    def _carry_out(
        self, now: float, order: Sequence[int], targets: dict[int, Target], decisions: list[Decision]
    ) -> None:
        moved: dict[int, str] = {}
        running = self._in_turn(self.line.running)
        for entry in running:
            target = targets.get(entry.number)
            if entry.running and target is not None and (target.counts, target.host) != (entry.counts, entry.host):
                resized = sum(count for _, count in target.counts) != entry.devices
                moved[entry.number] = "resize" if resized else "migrate"
        for entry in running:
            if entry.running and entry.host in moved and entry.number in targets:
                moved.setdefault(entry.number, "migrate")  # it can't stay without the job whose devices it shares
        for entry in running:
            if entry.running and entry.number not in targets:
                entry.preemptions += 1
                self._stop(entry, now)
                decisions.append(Preempt(job=entry.job.name))
            elif entry.number in moved:
                self._release(entry, now)
        seated = [(self.entries[number], targets[number]) for number in order if not self.entries[number].running]
        seated.sort(key=lambda item: item[1].host >= 0)  # those that share the devices of another come after it
        for entry, target in seated:
            decisions.append(self._seat(entry, target, moved.get(entry.number, "start"), now))
        for number in targets:
            self.entries[number].settled = True

    def _stop(self, entry: Entry, now: float) -> None:
        entry.settled = False
        self._release(entry, now)
        self.line.stopped(entry)
        self._set_crossing(entry)

    def _seat(self, entry: Entry, target: Target, kind: str, now: float) -> Decision:
        self._turn += 1
        job = entry.job
        overhead = self.overhead.start(job, self.pace.profile(job), resumed=entry.starts > 0)
        entry.starts += 1
        entry.host = target.host
        if target.host >= 0:
            host = self.entries[target.host]
            entry.shares = host.shares
            device = self.fleet.nodes[host.counts[0][0]].kind
            rate = self.pace.shared_rate(job, host.job, device) * self._rate(job, host.counts)
            entry.seat(now, overhead, rate, host.counts)
            self._change_rate(
                host, now, self.pace.shared_rate(host.job, job, device) * self._rate(host.job, host.counts)
            )
        else:
            entry.shares = self.seating.take(target.counts)
            entry.seat(now, overhead, self._rate(job, target.counts), target.counts)
        self.line.started(entry)
        self._set_crossing(entry)
        if kind == "start":
            shared = self.entries[target.host].job.name if target.host >= 0 else ""
            return Start(
                job=job.name, shares=entry.shares, overhead_seconds=overhead, rate=entry.rate, shared_with=shared
            )
        entry.migrations += 1
        decision = Resize if kind == "resize" else Migrate
        return decision(job=job.name, shares=entry.shares, overhead_seconds=overhead, rate=entry.rate)

    def _rate(self, job: Job, counts: Sequence[tuple[int, int]]) -> float:
        return self.pace.rate(job, [node for node, _ in counts], [count for _, count in counts])

    def _change_rate(self, entry: Entry, now: float, rate: float) -> None:
        counts, shares, host, begun = entry.counts, entry.shares, entry.host, entry.begun
        entry.leave(now)
        entry.shares, entry.host = shares, host
        entry.seat(now, max(0.0, begun - now), rate, counts)
        self.line.touched[entry.number] = entry
        self._set_crossing(entry)

    def _release(self, entry: Entry, now: float) -> None:
        """Close its segment and free its devices, unless it shares them: then they are the other's alone."""
        shares, host, counts = entry.shares, entry.host, entry.counts
        partner = self.entries.get(host) if host >= 0 else None
        if host < 0:
            partner = next((other for other in self.line.running.values() if other.host == entry.number), None)
        entry.leave(now)
        if partner is None:
            self.seating.give_back(shares)
        else:
            partner.host = -1
            self._change_rate(partner, now, self._rate(partner.job, counts))

    # ------------------------------------------------------------------------------------------------- as a value

    def snapshot(self) -> SchedulerState:
        """All that it remembers; `ended` is not part of it."""
        return SchedulerState(
            entries=tuple(entry.state() for entry in self.entries.values()),
            free=tuple(self.seating.free), up=tuple(self.seating.up), quotas=dict(self.quotas), now=self.now,
            next_number=self._next_number, turn=self._turn, next_ask=self._next_ask, learned=self.policy.snapshot(),
        )  # fmt: skip

    def restore(self, state: SchedulerState) -> None:
        """Take back what `snapshot` gave, of a scheduler made in the same way."""
        self.entries = {entry.number: Entry(entry) for entry in state.entries}
        self._numbers = {entry.job.name: entry.number for entry in state.entries}
        if state.free:
            self.seating.restore(state.free, state.up)
        self.quotas = dict(state.quotas)
        self.now = state.now
        self._next_number, self._turn, self._next_ask = state.next_number, state.turn, state.next_ask
        self.ended = []
        if state.learned is not None:
            self.policy.restore(state.learned)
        self._line_up()
        self._unsettled = []  # every call ends with a decision, which settles them


class Foresight:
    """Who will be there, and who will run, after events of one instant that are not carried out yet."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._runs: dict[str, bool] = {}  # of the jobs that an event so far is about
        self._gone: set[str] = set()

    def _is_there(self, job: str) -> bool:
        return job not in self._gone and (job in self._runs or self._scheduler.entry(job) is not None)

    def missed(self, event: Event) -> InputError | None:
        """What is wrong with an event whose job is not there (any more), or does not run; None: it can happen."""
        if not isinstance(event, Finish | Fail | Progress | Cancel):
            return None
        what, place = _WHAT[type(event)], f"job {event.job}"
        if not self._is_there(event.job):
            return InputError(f"{what}, and neither waits nor runs", place=place, remedy="submit it first")
        entry = self._scheduler.entry(event.job)
        if not isinstance(event, Cancel) and not self._runs.get(event.job, entry is not None and entry.running):
            return InputError(f"{what}, and does not run", place=place, remedy="only running jobs do that")
        return None

    def add(self, event: Event) -> None:
        """The event follows those before it. Raises InputError if it can't."""
        missed = self.missed(event)
        if missed is not None:
            raise missed
        if isinstance(event, Submit):
            name = event.job.name
            if not self._is_there(name) and not self._scheduler.refusal(event.job):
                self._runs[name] = False
                self._gone.discard(name)
        elif isinstance(event, Progress):
            if not event.seconds >= 0:
                raise InputError(f"reports {event.seconds} s done", place=f"job {event.job}", remedy="0 or more")
        elif isinstance(event, Fail):
            self._runs[event.job] = False
        elif isinstance(event, Finish | Cancel):
            self._gone.add(event.job)
            self._runs.pop(event.job, None)
        elif isinstance(event, NodeDown | NodeUp):
            node = self._scheduler.place_of(event.node)
            if isinstance(event, NodeDown):
                for entry in self._scheduler.line.running.values():
                    if any(place == node for place, _ in entry.counts):
                        self._runs[entry.job.name] = False


def advance(
    scheduler: Scheduler, state: SchedulerState, now: float, *events: Event
) -> tuple[SchedulerState, tuple[Decision, ...]]:
    """The machine as a pure function: from a state and events to the next state and decisions.

    `scheduler` says by which rules; what it remembers is overwritten.
    """
    scheduler.restore(state)
    decisions = scheduler.handle(now, *events)
    return scheduler.snapshot(), decisions
