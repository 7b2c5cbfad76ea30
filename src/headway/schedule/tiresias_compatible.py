"""How Tiresias's public simulator decides and counts, to be compared with the exact machine.

Written from its behaviour (SymbioticLab/Tiresias, `simulator/`, placement `count`: devices are only counted). Time is
in whole seconds. It differs from scheduler.py in three ways, each of which moves its figures:

- demotion is late: it wakes for the next threshold in ceil((limit - executed seconds) / devices), having taken
  executed seconds for device-seconds. A job that runs for the first time is demoted in time; one that has executed e
  seconds before, e x (devices - 1) / devices seconds late, unless something else happens meanwhile;
- ties between equal remaining times go to whoever stood first in the list, which is sorted in place again and again,
  and not to the earlier job;
- of several demotions in one instant, a job moves one queue at most.

`headway simulate cluster --engine tiresias` plays a trace so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from headway.errors import InputError
from headway.schedule.job import Job
from headway.schedule.policies.fifo import Fifo, FirstFitFifo
from headway.schedule.policies.ordering import Policy
from headway.schedule.policies.shortest import ShortestRemainingServiceFirst, ShortestRemainingTimeFirst
from headway.schedule.policies.tiresias import DiscretisedLas
from headway.schedule.replay import JobOutcome, Outcome

__all__ = ["SCHEDULES", "play_compatible", "play_policy"]

SCHEDULES = ("fifo", "fjf", "shortest", "shortest-gpu", "dlas-gpu")
# What theirs calls a policy of ours.
_SCHEDULE_OF: dict[type[Policy], str] = {
    Fifo: "fifo",
    FirstFitFifo: "fjf",
    ShortestRemainingTimeFirst: "shortest",
    ShortestRemainingServiceFirst: "shortest-gpu",
    DiscretisedLas: "dlas-gpu",
}


class _Listed:
    """A job in their lists."""

    def __init__(self, number: int, job: Job) -> None:
        self.number = number
        self.job = job
        self.submit = int(job.submit_seconds)
        self.duration = int(job.duration_seconds)
        self.running = False
        self.checked = self.submit
        self.total = 0  # seconds executed
        self.executed = 0  # the same since the last promotion, in seconds, not device-seconds
        self.pending = 0  # seconds waited since then, once it has run
        self.waited = 0
        self.queue = 0
        self.start = self.finish = -1
        self.preemptions = self.promotions = 0
        self.rank = 0

    def end(self, now: int) -> int:
        return now + self.duration - self.total


def play_compatible(
    jobs: Sequence[Job],
    devices: int,
    schedule: str,
    *,
    limits: Sequence[int] = (3250, 7200),
    promote_knob: float = 0.0,
) -> Outcome:
    """Play `jobs` on so many devices, as theirs would under one of `SCHEDULES`.

    `limits` are the thresholds of its queues. A job that never finishes has no finish in the outcome, as theirs is
    silent about it. Raises InputError for an unknown schedule, and for jobs that don't fit, or last less than a second.
    """
    if schedule not in SCHEDULES:
        raise InputError(
            f"no schedule is named {schedule!r}", place="schedule", remedy=f"one of {', '.join(SCHEDULES)}"
        )
    for job in jobs:
        if job.devices > devices:
            raise InputError(f"asks for {job.devices} of {devices} devices", place=f"job {job.name}")
        if job.duration_seconds < 1:
            raise InputError("lasts less than a second", place=f"job {job.name}", remedy="it counts whole seconds")
    listed = [_Listed(number, job) for number, job in enumerate(jobs)]
    arrivals = sorted(listed, key=lambda item: item.submit)
    if schedule in ("fifo", "fjf"):
        _without_stopping(arrivals, devices, blocks=schedule == "fifo")
    elif schedule == "dlas-gpu":
        _Queues(arrivals, devices, limits, promote_knob).play()
    else:
        _shortest(arrivals, devices, by_service=schedule == "shortest-gpu")
    return Outcome(policy=schedule, placement="count", devices=devices, jobs=tuple(_outcome(item) for item in listed))


def play_policy(jobs: Sequence[Job], devices: int, policy: Policy) -> Outcome:
    """`play_compatible` with what theirs calls this policy of ours. Raises InputError also for one that it lacks."""
    schedule = _SCHEDULE_OF.get(type(policy))
    if schedule is None:
        known = ", ".join(each.name for each in _SCHEDULE_OF)
        raise InputError(
            f"Tiresias's simulator has no {policy.name}", place="engine tiresias", remedy=f"one of {known}"
        )
    if schedule != "dlas-gpu":
        return play_compatible(jobs, devices, schedule)
    limits = [int(threshold) for threshold in policy.thresholds]
    return play_compatible(jobs, devices, schedule, limits=limits, promote_knob=policy.promote_knob)


def _outcome(item: _Listed) -> JobOutcome:
    finish = item.finish
    return JobOutcome(
        name=item.job.name, devices=item.job.devices, duration_seconds=item.duration, submit_seconds=item.submit,
        start_seconds=item.start, finish_seconds=finish, run_seconds=item.total,
        wait_seconds=max(0, finish - item.submit - item.total), service_seconds=item.total * item.job.devices,
        preemptions=item.preemptions, promotions=item.promotions,
    )  # fmt: skip


def _without_stopping(arrivals: list[_Listed], devices: int, *, blocks: bool) -> None:
    coming, pending, running, free = list(arrivals), [], [], devices
    while coming or pending or running:
        now = min([item.end(item.start) for item in running] + [item.submit for item in coming[:1]])
        for item in [item for item in running if item.end(item.start) == now]:
            running.remove(item)
            item.finish, item.total = now, item.duration
            free += item.job.devices
        while coming and coming[0].submit == now:
            pending.append(coming.pop(0))
        for item in list(pending):
            if item.job.devices <= free:
                free -= item.job.devices
                item.start = now
                pending.remove(item)
                running.append(item)
            elif blocks:
                break


def _choose(ranked: Sequence[_Listed], devices: int, now: int) -> None:
    """Who runs next, by counting in order; the cluster is emptied in between."""
    for item in ranked:
        runs = item.job.devices <= devices
        devices -= item.job.devices if runs else 0
        if runs and item.start < 0:
            item.start = now
        item.preemptions += item.running and not runs
        item.running = runs


def _shortest(arrivals: list[_Listed], devices: int, *, by_service: bool) -> None:
    coming: list[_Listed] = list(arrivals)
    runnable: list[_Listed] = []
    now = 0
    while coming or runnable:
        ends = [item.end(now) for item in runnable if item.running]
        then = min(ends + [item.submit for item in coming[:1]])
        ending = [item for item in runnable if item.running and item.end(now) == then]
        for item in runnable:
            if item.running:
                item.total += then - now
        now = then
        for item in ending:
            item.finish = now
            runnable.remove(item)
        while coming and coming[0].submit == now:
            runnable.append(coming.pop(0))
        for item in runnable:
            item.rank = (item.duration - item.total) * (item.job.devices if by_service else 1)
        runnable.sort(key=lambda item: item.rank)  # stable: ties stay as they stood
        _choose(runnable, devices, now)


class _Queues:
    """Their `dlas-gpu`."""

    def __init__(self, arrivals: list[_Listed], devices: int, limits: Sequence[int], knob: float) -> None:
        self.coming = list(arrivals)
        self.devices = devices
        self.limits = list(limits)
        self.knob = knob
        self.runnable: list[_Listed] = []
        self.queues: list[list[_Listed]] = [[] for _ in range(len(limits) + 1)]
        self.jump: float = math.inf

    def play(self) -> None:
        now = 0
        while self.coming or self.runnable:
            ends = [item.end(now) for item in self.runnable if item.running]
            then = min(ends + [item.submit for item in self.coming[:1]], default=None)
            if then is None:
                return  # they stop here, with the rest unfinished
            if self.jump < then:
                now = self._look(int(self.jump), [], arriving=False)
                continue
            ending = [item for item in self.runnable if item.running and item.end(now) == then]
            now = self._look(then, ending, arriving=True)

    def _look(self, now: int, ending: Sequence[_Listed], *, arriving: bool) -> int:
        for item in ending:
            item.finish, item.total = now, item.duration
            self.runnable.remove(item)
            self.queues[item.queue].remove(item)
        while arriving and self.coming and self.coming[0].submit == now:
            item = self.coming.pop(0)
            self.runnable.append(item)
            self.queues[0].append(item)
        for item in self.runnable:
            passed, item.checked = now - item.checked, now
            if item.running:
                item.total += passed
                item.executed += passed
                full = item.queue < len(self.limits) and item.executed * item.job.devices >= self.limits[item.queue]
                if full:
                    self._move(item, item.queue + 1)
            elif item.executed > 0:
                item.pending += passed
                if self.knob > 0 and item.queue > 0 and item.pending >= int(item.executed * self.knob):
                    item.executed = item.pending = 0
                    item.promotions += 1
                    self._move(item, 0)
        _choose([item for queue in self.queues for item in queue], self.devices, now)
        for place, queue in enumerate(self.queues):
            self.queues[place] = [item for item in queue if item.running] + [item for item in queue if not item.running]
        self.jump = min((self._next_jump(item, now) for item in self.runnable), default=math.inf)
        return now

    def _move(self, item: _Listed, queue: int) -> None:
        self.queues[queue].append(item)
        self.queues[item.queue].remove(item)
        item.queue = queue

    def _next_jump(self, item: _Listed, now: int) -> float:
        if item.running:
            if item.queue >= len(self.limits):
                return math.inf
            return now + max(0, math.ceil((self.limits[item.queue] - item.executed) / item.job.devices))
        if self.knob > 0 and item.queue > 0 and item.executed > 0:
            left = int(item.executed * self.knob - item.pending)
            return now + left if left > 0 else math.inf
        return math.inf
