"""First in, first out: blocking, among those that fit, and as YARN does it."""

from __future__ import annotations

from headway.schedule.entry import Entry
from headway.schedule.policies.ordering import PATIENCE_SECONDS, Policy

__all__ = ["Fifo", "FirstFitFifo", "YarnCapacity"]


class Fifo(Policy):
    """First in, first out; the head of the queue blocks. Nothing is stopped.

    Starvation: none. A job starts after at most the sum of the durations of those before it.
    """

    name = "fifo"
    steady = True
    preemptive = False
    head_blocks = True

    def key(self, entry: Entry, now: float) -> tuple:
        """Nothing but the order of submission."""
        return ()


class FirstFitFifo(Fifo):
    """First in, first out among those that fit. Starvation: a large gang may be overtaken for as long as small jobs
    keep coming; the scheduler's patience bounds it."""

    name = "first-fit-fifo"
    patience_seconds = PATIENCE_SECONDS
    head_blocks = False


class YarnCapacity(Fifo):
    """YARN's capacity scheduler as Tiresias measured it (section 6.1): FIFO, non-preemptive, and to be used with strict
    consolidation: a job waits for as few nodes as possible. Starvation: as FIFO."""

    name = "yarn"
