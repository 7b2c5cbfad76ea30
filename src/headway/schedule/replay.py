"""A trace through the scheduler, event by event: the scheduler is the one that a cluster manager would run.

    >>> outcome = play(jobs, parse_fleet("n4g4"), DiscretisedLas((3250.0,)), Consolidated())
    >>> outcome.average_completion_seconds

The player is the world: it knows how long jobs last, tells the scheduler when they come and end, and wakes it when it
asks. Time jumps from event to event; all that happens at one instant is told in one call: finishes first, in the order
of submission, then the disturbances given, then submissions, in the order of the rows.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence

from headway.errors import InputError
from headway.schedule.entry import Entry
from headway.schedule.events import Decision, Event, Finish, Preempt, Refuse, Share, Submit, Tick
from headway.schedule.fleet import Fleet
from headway.schedule.job import Job
from headway.schedule.pace import Overhead, Pace
from headway.schedule.placement.rules import Placement
from headway.schedule.policies.ordering import Policy
from headway.schedule.scheduler import Foresight, Scheduler
from headway.value import Value

__all__ = ["JobOutcome", "Outcome", "Player", "Segment", "play"]

Watcher = Callable[[float, tuple[Decision, ...], Scheduler], None]


class Segment(Value):
    """That a job held these devices from `begin` to `end`, the first `overhead` seconds of it without working."""

    job: str
    begin: float
    end: float
    overhead: float
    shares: tuple[Share, ...]
    rate: float = 1.0
    shared_with: str = ""


class JobOutcome(Value):
    """What became of one job. Times in seconds since the beginning of the trace; -1 where it never came to that.

    `run_seconds` + `wait_seconds` + `overhead_seconds` is its completion time, and `service_seconds` +
    `overhead_service_seconds` (device-seconds) what its devices were held for. `refused`: why, if it was.
    """

    name: str
    devices: int
    duration_seconds: float
    submit_seconds: float
    start_seconds: float = -1.0
    finish_seconds: float = -1.0
    run_seconds: float = 0.0
    wait_seconds: float = 0.0
    overhead_seconds: float = 0.0
    service_seconds: float = 0.0
    overhead_service_seconds: float = 0.0
    preemptions: int = 0
    migrations: int = 0
    promotions: int = 0
    failures: int = 0
    refused: str = ""

    @property
    def finished(self) -> bool:
        """Whether it did all of its work."""
        return self.finish_seconds >= 0

    @property
    def completion_seconds(self) -> float:
        """From submission to finish: the job completion time, JCT."""
        return self.finish_seconds - self.submit_seconds

    @property
    def queueing_seconds(self) -> float:
        """From submission to the first devices."""
        return self.start_seconds - self.submit_seconds


class Outcome(Value):
    """What became of a trace: `jobs` in the order in which they were given; `segments` in the order in which they
    ended, if asked for. `events` counts the calls of the scheduler, `decisions` what it decided."""

    policy: str
    placement: str
    devices: int
    jobs: tuple[JobOutcome, ...]
    segments: tuple[Segment, ...] = ()
    events: int = 0
    decisions: int = 0

    @property
    def finished(self) -> tuple[JobOutcome, ...]:
        """Those that did all of their work."""
        return tuple(job for job in self.jobs if job.finished)

    @property
    def completions(self) -> list[float]:
        """Completion times of the finished, in their order."""
        return [job.completion_seconds for job in self.finished]

    @property
    def average_completion_seconds(self) -> float:
        """Mean completion time of the finished."""
        found = self.completions
        return math.fsum(found) / len(found) if found else math.nan

    @property
    def makespan_seconds(self) -> float:
        """When the last one finished, counted from the beginning of the trace."""
        return max((job.finish_seconds for job in self.finished), default=0.0)


class Player:
    """One trace on its way through one scheduler: `step` by step, `until` some time, or to the end by `run`.

    `jobs` in any order; equal times in the order of the rows. `disturbances`: (seconds, event) of what else happens to
    the fleet: nodes that go and come back, failures, cancellations, quotas; an event that its job can't meet with then
    (it is not there any more, or does not run), after what else happens at that instant, is left out. `watch` is called
    after each call of the scheduler. Raises InputError for two jobs of one name, and for a disturbance that only the
    player may tell.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        scheduler: Scheduler,
        *,
        disturbances: Iterable[tuple[float, Event]] = (),
        watch: Watcher | None = None,
        keep_segments: bool = False,
    ) -> None:
        self.scheduler = scheduler
        self.now = 0.0
        self._jobs = list(jobs)
        if len({job.name for job in jobs}) < len(self._jobs):
            raise InputError("two jobs have one name", place="trace", remedy="name each differently")
        self._row_of = {job.name: row for row, job in enumerate(self._jobs)}
        self._arrivals = sorted(range(len(self._jobs)), key=lambda row: (self._jobs[row].submit_seconds, row))
        self._next = 0
        self._disturbances = sorted(disturbances, key=lambda item: item[0])
        for _, event in self._disturbances:
            if isinstance(event, Submit | Finish):
                raise InputError("jobs come and end by the trace", place="disturbances", remedy="put it into the trace")
        self._disturbance = 0
        self._ends: list[tuple[float, int, str]] = []  # heap of (time, number, name); stale ones are skipped
        self._end_of: dict[str, float] = {}
        self._watch = watch
        self._keep = keep_segments
        self._open: dict[str, Segment] = {}
        self._segments: list[Segment] = []
        self._outcomes: dict[str, JobOutcome] = {}
        self._events = self._decisions = 0
        self._idle = 0  # times in a row that the scheduler was woken for nothing, with nobody running or coming

    def next_time(self) -> float | None:
        """When something happens next; None: never again."""
        while self._ends and self._end_of.get(self._ends[0][2]) != self._ends[0][0]:
            heapq.heappop(self._ends)
        times = []
        if self._ends:
            times.append(self._ends[0][0])
        if self._next < len(self._arrivals):
            times.append(self._jobs[self._arrivals[self._next]].submit_seconds)
        if self._disturbance < len(self._disturbances):
            times.append(self._disturbances[self._disturbance][0])
        wakes = self.scheduler.wakes_at()
        # A scheduler that asks its policy every quantum would go on forever over jobs that can never start (a node that
        # stays down, a quota). Each of them may change the order twice more: by its promotion and by its patience.
        if wakes is not None and (times or self._idle <= 2 * len(self.scheduler.entries) + 2):
            times.append(max(wakes, self.now))
        return min(times) if times else None

    def step(self) -> bool:
        """All that happens at the next instant; False if nothing ever will."""
        now = self.next_time()
        if now is None:
            return False
        self.now = now
        due = self._due(now)
        decisions = self.scheduler.handle(now, *(due or (Tick(),)))
        self._idle = 0 if due or decisions else self._idle + 1
        self._events += 1
        self._decisions += len(decisions)
        self._follow(now, decisions)
        if self._watch is not None:
            self._watch(now, decisions, self.scheduler)
        return True

    def until(self, seconds: float) -> Player:
        """Play all that happens up to and at that time."""
        while (now := self.next_time()) is not None and now <= seconds:
            self.step()
        self.now = max(self.now, seconds)
        return self

    def run(self) -> Outcome:
        """Play to the end, and say what became of it."""
        while self.step():
            pass
        return self.outcome()

    def _due(self, now: float) -> list[Event]:
        events: list[Event] = []
        finishing = []
        while self._ends and self._ends[0][0] <= now:
            time, number, name = heapq.heappop(self._ends)
            if self._end_of.get(name) == time:
                del self._end_of[name]
                finishing.append((number, name))
        events.extend(Finish(job=name) for _, name in sorted(finishing))
        ahead = Foresight(self.scheduler)
        for event in events:
            ahead.add(event)
        while self._disturbance < len(self._disturbances) and self._disturbances[self._disturbance][0] <= now:
            event = self._disturbances[self._disturbance][1]
            self._disturbance += 1
            if ahead.missed(event) is None:
                ahead.add(event)
                events.append(event)
        while self._next < len(self._arrivals):
            job = self._jobs[self._arrivals[self._next]]
            if job.submit_seconds > now:
                break
            self._next += 1
            events.append(Submit(job=job))
        return events

    def _follow(self, now: float, decisions: tuple[Decision, ...]) -> None:
        scheduler = self.scheduler
        for decision in decisions:
            if isinstance(decision, Refuse):
                job = self._jobs[self._row_of[decision.job]]
                self._outcomes[decision.job] = JobOutcome(
                    name=job.name, devices=job.devices, duration_seconds=job.duration_seconds,
                    submit_seconds=job.submit_seconds, refused=decision.reason,
                )  # fmt: skip
            elif isinstance(decision, Preempt):
                self._end_of.pop(decision.job, None)
        for entry in scheduler.line.touched.values():
            if entry.running:
                end = max(now, entry.finish())  # it may have reported more work than it has
                if self._end_of.get(entry.job.name) != end:
                    self._end_of[entry.job.name] = end
                    heapq.heappush(self._ends, (end, entry.number, entry.job.name))
        scheduler.line.touched.clear()
        if self._keep:
            self._segment(now)
        for entry in scheduler.ended:
            self._end_of.pop(entry.job.name, None)
            # What is done may miss the whole by the rounding of one product; a cancelled job misses it by more.
            done = entry.worked >= entry.job.duration_seconds * (1 - 1e-9)
            self._outcomes[entry.job.name] = _outcome(entry, now if done else -1.0)
        scheduler.ended.clear()

    def _segment(self, now: float) -> None:
        running = {entry.job.name: entry for entry in self.scheduler.line.running.values()}
        for name, segment in list(self._open.items()):
            entry = running.get(name)
            if entry is None or entry.since > segment.begin:
                overhead = min(segment.overhead, now - segment.begin)
                if now > segment.begin:
                    closed = Segment(
                        job=name, begin=segment.begin, end=now, overhead=overhead, shares=segment.shares,
                        rate=segment.rate, shared_with=segment.shared_with,
                    )  # fmt: skip
                    self._segments.append(closed)
                del self._open[name]
        for name, entry in running.items():
            if name not in self._open:
                host = self.scheduler.entries[entry.host].job.name if entry.host >= 0 else ""
                self._open[name] = Segment(
                    job=name, begin=entry.since, end=entry.since, overhead=entry.begun - entry.since,
                    shares=entry.shares, rate=entry.rate, shared_with=host,
                )  # fmt: skip

    def outcome(self) -> Outcome:
        """What has become of the trace so far; jobs that are not done have no finish."""
        for entry in self.scheduler.entries.values():
            self._outcomes[entry.job.name] = _outcome(entry, -1.0)
        missing = [job for job in self._jobs if job.name not in self._outcomes]
        for job in missing:
            self._outcomes[job.name] = JobOutcome(
                name=job.name, devices=job.devices, duration_seconds=job.duration_seconds,
                submit_seconds=job.submit_seconds,
            )  # fmt: skip
        return Outcome(
            policy=self.scheduler.policy.name, placement=self.scheduler.placement.name,
            devices=self.scheduler.fleet.devices, jobs=tuple(self._outcomes[job.name] for job in self._jobs),
            segments=tuple(self._segments), events=self._events, decisions=self._decisions,
        )  # fmt: skip


def _outcome(entry: Entry, finish: float) -> JobOutcome:
    return JobOutcome(
        name=entry.job.name, devices=entry.job.devices, duration_seconds=entry.job.duration_seconds,
        submit_seconds=entry.submitted, start_seconds=entry.started, finish_seconds=finish,
        run_seconds=entry.ran, wait_seconds=entry.waited, overhead_seconds=entry.overhead,
        service_seconds=entry.service, overhead_service_seconds=entry.overhead_service,
        preemptions=entry.preemptions, migrations=entry.migrations, promotions=entry.promotions,
        failures=entry.failures,
    )  # fmt: skip


def play(
    jobs: Sequence[Job],
    fleet: Fleet,
    policy: Policy,
    placement: Placement,
    *,
    pace: Pace | None = None,
    overhead: Overhead | None = None,
    patience_seconds: float | None = None,
    disturbances: Iterable[tuple[float, Event]] = (),
    watch: Watcher | None = None,
    keep_segments: bool = False,
) -> Outcome:
    """Play `jobs` on an empty `fleet` to the end; arguments as those of `Scheduler` and `Player`. Raises InputError."""
    scheduler = Scheduler(fleet, policy, placement, pace=pace, overhead=overhead, patience_seconds=patience_seconds)
    return Player(jobs, scheduler, disturbances=disturbances, watch=watch, keep_segments=keep_segments).run()
