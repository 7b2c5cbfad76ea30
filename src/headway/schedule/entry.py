"""What the scheduler remembers of one job.

Everything that grows while a job runs is kept as its value at the beginning of the current segment of running, and
computed from that when asked. So nothing is added up in small steps, a state is the same however often somebody looked
at it in between, and a faster implementation can arrive at the same bits.
"""

from __future__ import annotations

import math
from typing import Any

from headway.schedule.events import Share
from headway.schedule.job import Job
from headway.value import Value

__all__ = ["Entry", "EntryState"]


class EntryState(Value):
    """An `Entry` as a value; fields as there, but that a `crossing` that never comes is -1: JSON has no infinity."""

    number: int
    job: Job
    submitted: float
    running: bool = False
    counts: tuple[tuple[int, int], ...] = ()
    shares: tuple[Share, ...] = ()
    host: int = -1
    devices: int = 0
    since: float = 0.0
    begun: float = 0.0
    rate: float = 1.0
    worked: float = 0.0
    service: float = 0.0
    ran: float = 0.0
    waited: float = 0.0
    overhead: float = 0.0
    overhead_service: float = 0.0
    level: float = 0.0
    level_wait: float = 0.0
    queue: int = 0
    entered: int = 0
    settled: bool = False
    crossing: float = -1.0
    started: float = -1.0
    starts: int = 0
    preemptions: int = 0
    migrations: int = 0
    promotions: int = 0
    failures: int = 0


class Entry:
    """One job that has been taken and is not done. Times in seconds, services in device-seconds.

    - `number`: place in the order of submission, which breaks all ties; `submitted`: when it came.
    - `counts`: (place of the node in the fleet, devices of it), while it runs; `shares`: which devices they are.
      `host`: the number of the job whose devices it shares, -1: they are its own.
    - `since`: when it began to wait, or was given its devices; `begun`: when it works, after the overhead; `rate`: how
      fast, relative to the run that its duration is of.
    - At the beginning of the segment: `worked` seconds of its duration, attained `service`, `ran` and `waited` seconds,
      `overhead` seconds and the `overhead_service` of the devices that it held meanwhile.
    - `level`: the service that counts for its queue (since its last promotion), `level_wait`: how long it has waited
      since then, both at the beginning of the segment. `entered`: the turn in which it came into its `queue`;
      `settled`: it has been chosen to run while in this queue, and has run since. `crossing`: when it leaves the queue
      if nothing happens.
    - `started`: when it first got devices, -1: not yet.
    """

    __slots__ = EntryState.__struct_fields__

    number: int
    job: Job
    submitted: float
    running: bool
    counts: tuple[tuple[int, int], ...]
    shares: tuple[Share, ...]
    host: int
    devices: int
    since: float
    begun: float
    rate: float
    worked: float
    service: float
    ran: float
    waited: float
    overhead: float
    overhead_service: float
    level: float
    level_wait: float
    queue: int
    entered: int
    settled: bool
    crossing: float
    started: float
    starts: int
    preemptions: int
    migrations: int
    promotions: int
    failures: int

    def __init__(self, state: EntryState) -> None:
        for field in self.__slots__:
            setattr(self, field, getattr(state, field))
        self.crossing = state.crossing if state.crossing >= 0 else math.inf

    def state(self) -> EntryState:
        """This entry as a value."""
        fields: dict[str, Any] = {field: getattr(self, field) for field in self.__slots__}
        fields["crossing"] = self.crossing if self.crossing < math.inf else -1.0
        return EntryState(**fields)

    def working(self, now: float) -> float:
        """Seconds that it has worked in this segment."""
        return now - self.begun if self.running and now > self.begun else 0.0

    def progress(self, now: float) -> float:
        """Seconds of its duration that are done."""
        return self.worked + self.working(now) * self.rate

    def remaining(self, now: float) -> float:
        """Seconds of its duration that are left: only for policies that may know it."""
        return self.job.duration_seconds - self.progress(now)

    def attained(self, now: float) -> float:
        """Device-seconds of work that it has had."""
        return self.service + self.working(now) * self.devices

    def executed(self, now: float) -> float:
        """Seconds of work that it has had, on however many devices."""
        return self.ran + self.working(now)

    def attained_in_level(self, now: float) -> float:
        """The service that counts for its queue."""
        return self.level + self.working(now) * self.devices

    def waiting(self, now: float) -> float:
        """Seconds that it has waited in all."""
        return self.waited + (0.0 if self.running else now - self.since)

    def finish(self) -> float:
        """When a running job will have done all of its work, if nothing happens: what a simulator asks."""
        return self.begun + (self.job.duration_seconds - self.worked) / self.rate

    def patience_ends(self, patience: float) -> float:
        """When a job that waits goes before all others, with so many seconds of patience, doubled by each start.

        Doubled, since jobs that stop each other whenever their patience ends would otherwise do nothing but stop and
        resume where there are enough of them.
        """
        return self.since + patience * (1 << min(self.starts, 30))

    def seat(self, now: float, overhead: float, rate: float, counts: tuple[tuple[int, int], ...]) -> None:
        """Open a segment of running at `now`: work begins after `overhead` seconds."""
        if not self.running:
            self.waited += now - self.since
            self.level_wait += now - self.since if self.level > 0 else 0.0
        if self.started < 0:
            self.started = now
        self.running = True
        self.counts = counts
        self.devices = sum(count for _, count in counts)
        self.since = now
        self.begun = now + overhead
        self.rate = rate

    def leave(self, now: float) -> None:
        """Close the segment of running; it waits from `now` on."""
        working = self.working(now)
        held = now - self.since
        self.worked += working * self.rate
        self.service += working * self.devices
        self.level += working * self.devices
        self.ran += working
        # The difference of the sums, not the sum of the differences: run + wait + overhead is exactly what passed.
        self.overhead += held - working
        self.overhead_service += (held - working) * self.devices
        self.running = False
        self.counts, self.shares, self.host = (), (), -1
        self.devices = 0
        self.since = now
        self.crossing = math.inf

    def lose(self, worked: float, working: float, devices: int) -> None:
        """After a failure: of `working` seconds in the segment just closed on so many devices, only those kept count.

        `worked`: seconds of the duration that are taken back.
        """
        self.worked -= worked
        self.ran -= working
        self.service -= working * devices
        self.level = max(0.0, self.level - working * devices)
        self.overhead += working
        self.overhead_service += working * devices
        self.failures += 1
