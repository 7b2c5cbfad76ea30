"""An ordering of jobs: what a policy is, and what it is asked.

A policy answers one question: of these jobs, in which order should they be given devices? Most answer with a key. Ties
are broken by the order of submission: by time, then by the order of the rows. What else a policy may say: whether
running jobs may be stopped for others (`preemptive`), whether nobody overtakes a job that does not fit (`head_blocks`),
how often it wants to be asked again (`quantum_seconds`), and queues by attained service (see tiresias.py).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from headway.schedule.entry import Entry
from headway.schedule.fleet import Fleet
from headway.schedule.pace import Overhead, Pace

__all__ = ["PATIENCE_SECONDS", "Policy", "View", "Wish", "in_order"]

PATIENCE_SECONDS = 7 * 86400.0
"""How long a job waits at most, by default, under a policy that bounds no wait by itself: a week."""


class View(NamedTuple):
    """What a policy sees when it is asked: `capacity` counts the devices of nodes that are up, `entries` are all jobs
    that wait or run, in the order of submission."""

    now: float
    entries: Sequence[Entry]
    capacity: int
    fleet: Fleet
    pace: Pace
    overhead: Overhead

    def repays(self, entry: Entry) -> bool:
        """Whether a running job has worked, since it started, for at least as long as resuming it would take.

        Who stops jobs by the clock before that may get nothing done at all: they would do nothing but resume.
        """
        cost = self.overhead.start(entry.job, self.pace.profile(entry.job), resumed=True)
        return entry.working(self.now) >= cost


class Wish(NamedTuple):
    """A job in the order, with how many devices it should have (0: none, stopped), of which kinds (none: as the job
    says), and, if it should share its devices, the number of the job that it shares them with."""

    entry: Entry
    devices: int
    kinds: tuple[str, ...] = ()
    host: int = -1


class Policy:
    """An ordering. Subclasses give `key`, or `arrange` if they decide more than an order.

    - `preemptive`: running jobs stop for those before them in the order; else they keep what they have.
    - `head_blocks`: nobody who comes later in the order starts while one does not fit.
    - `quantum_seconds`: while somebody waits, the order is asked for this often; 0: at events only. `asks_always`: also
      while nobody waits.
    - `thresholds`: bounds of the queues in device-seconds of attained service; `promote_knob`: a job that has waited
      this many times its attained service (in seconds per second it executed) goes back to the first queue; 0: never.
    - `migrates`: running jobs are moved onto fewer nodes when that speeds them up.
    - `steady`: the key of a job that waits stays what it is until something happens to the job itself, and devices are
      wished for as asked for: then the scheduler keeps those that wait sorted, and need not ask `arrange`.
    - `grouped`: of a steady policy whose keys change as it learns: those that wait in one `group` have one key, which
      `group_key` tells anew at each decision. `regroupings` counts how often jobs may have come to other groups.
    - `patience_seconds`: how long a job waits at most without a pause before it goes first, unless the scheduler is
      told otherwise; infinite where the order itself bounds every wait.
    - `clairvoyant`: it looks at how long jobs last, which nobody knows.
    """

    name = ""
    preemptive = True
    head_blocks = False
    quantum_seconds = 0.0
    asks_always = False
    thresholds: tuple[float, ...] = ()
    promote_knob = 0.0
    migrates = False
    steady = False
    grouped = False
    regroupings = 0
    patience_seconds = math.inf
    clairvoyant = False

    def key(self, entry: Entry, now: float) -> tuple:
        """The smaller, the earlier. It need not break ties: `arrange` ends them with the order of submission."""
        raise NotImplementedError

    def group(self, entry: Entry) -> Hashable:
        """Of a `grouped` policy: with whom a waiting job has one key, until `regroupings` changes."""
        raise NotImplementedError

    def group_key(self, group: Hashable) -> tuple:
        """The `key` of those in that group, now."""
        raise NotImplementedError

    def arrange(self, view: View) -> list[Wish]:
        """All jobs in order, each with what it should have."""
        now, key = view.now, self.key
        ranked = sorted(view.entries, key=lambda entry: (key(entry, now), entry.number))
        return [Wish(entry, entry.job.devices) for entry in ranked]

    def prepare(self, pace: Pace, overhead: Overhead) -> None:
        """What its scheduler knows of speeds and of the cost of stopping: for policies that weigh them."""

    def submitted(self, entry: Entry, now: float) -> None:
        """A job has come: for policies that learn."""

    def left(self, entry: Entry) -> None:
        """A job has ended or was cancelled: for policies that keep something of each. `ended` follows, if it has."""

    def ended(self, entry: Entry, now: float) -> None:
        """A job has done all of its work, its segment closed: for policies that learn."""

    def snapshot(self) -> Any:
        """What it has learned and when it last asked, as builtins; None: nothing."""
        return None

    def restore(self, learned: Any) -> None:
        """Take back what `snapshot` gave."""


def in_order(entries: Iterable[Entry]) -> list[Wish]:
    """Each with the devices that it asks for, in the order given."""
    return [Wish(entry, entry.job.devices) for entry in entries]
