"""Tiresias (Gu et al., NSDI 2019): queues by attained service, and the Gittins index where sizes are known in the mean.

Queue i holds the jobs that have attained at least the threshold i-1 and less than the threshold i, in device-seconds.
A job enters the first queue, moves on exactly when it reaches a threshold, and goes back to the first when it has
waited `promote_knob` times as long as it has executed since it came there (section 3.2.3). Inside a queue: those that
run, in the order in which they entered, then those that wait, likewise; so jobs of one queue never stop each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from headway.errors import InputError
from headway.schedule.entry import Entry
from headway.schedule.policies.gittins import GittinsIndex
from headway.schedule.policies.ordering import PATIENCE_SECONDS, Policy

__all__ = ["THRESHOLDS", "DiscretisedGittins", "DiscretisedLas", "Las", "TwoDimensionalGittins", "TwoDimensionalLas"]

# Of Tiresias's public simulator: its first two thresholds, for its three queues.
THRESHOLDS = (3250.0, 7200.0)


class Las(Policy):
    """Least attained service first, service being seconds of execution (Nuyens and Wierman, 2008), asked every quantum.

    Starvation: none while finitely many jobs come: the attained service of all others grows.
    """

    name = "las"
    steady = True

    def __init__(self, quantum_seconds: float = 60.0) -> None:
        self.quantum_seconds = quantum_seconds

    def key(self, entry: Entry, now: float) -> tuple:
        """Executed seconds."""
        return (entry.executed(now),)


class TwoDimensionalLas(Las):
    """2D-LAS, continuous (Tiresias, section 3.2.1): least attained seconds x devices first, asked every quantum."""

    name = "2d-las-continuous"

    def key(self, entry: Entry, now: float) -> tuple:
        """Attained device-seconds."""
        return (entry.attained(now),)


class DiscretisedLas(Policy):
    """Discretised 2D-LAS (section 3.2.3): queues by attained service, FIFO inside a queue.

    Starvation: with a `promote_knob`, a job that has run once waits at most that many times what it has executed before
    it stands in the first queue again. There, those before it leave after at most the first threshold of service; but a
    gang that does not fit beside them is overtaken, and only the scheduler's patience bounds that.
    """

    name = "2d-las"
    steady = True
    patience_seconds = PATIENCE_SECONDS

    def __init__(self, thresholds: Sequence[float] = THRESHOLDS, *, promote_knob: float = 0.0) -> None:
        if not all(threshold > 0 for threshold in thresholds) or any(a >= b for a, b in pairwise(thresholds)):
            raise InputError(
                f"thresholds {', '.join(map(str, thresholds))}", place=self.name, remedy="above 0, each above the last"
            )
        if not promote_knob >= 0:
            raise InputError(f"promote_knob {promote_knob}", place=self.name, remedy="0 (never) or more")
        self.thresholds = tuple(thresholds)
        self.promote_knob = promote_knob

    def key(self, entry: Entry, now: float) -> tuple:
        """Queue, those that run first, order of entering."""
        return (entry.queue, not entry.settled, entry.entered)


class DiscretisedGittins(DiscretisedLas):
    """Discretised 2D-Gittins (section 3.2.2): queues as in 2D-LAS, ordered by the index of their beginning.

    The index of a queue is that of a job which has attained its lower bound, with the quantum up to its upper one (the
    last queue: the best quantum). Within a queue as 2D-LAS. Starvation: as 2D-LAS.
    """

    name = "2d-gittins"

    def __init__(
        self, history: Sequence[float] | GittinsIndex, thresholds: Sequence[float] = THRESHOLDS, *, promote_knob=0.0
    ) -> None:
        super().__init__(thresholds, promote_knob=promote_knob)
        self.index = history if isinstance(history, GittinsIndex) else GittinsIndex(history)
        bounds = (0.0, *self.thresholds)
        inner = [self.index.index(lower, upper - lower) for lower, upper in pairwise(bounds)]
        self.ranks = (*inner, self.index.index(bounds[-1]))

    def key(self, entry: Entry, now: float) -> tuple:
        """Index of the queue, the highest first; then as 2D-LAS."""
        return (-self.ranks[entry.queue], entry.queue, not entry.settled, entry.entered)


class TwoDimensionalGittins(Policy):
    """2D-Gittins, continuous (section 3.2.2): highest index first, asked every quantum.

    `delta`: Tiresias's fixed quantum of the index in device-seconds; None: the best one. Starvation: of jobs that have
    attained more than the history knows, but for the patience.
    """

    name = "2d-gittins-continuous"
    steady = True
    patience_seconds = PATIENCE_SECONDS

    def __init__(
        self, history: Sequence[float] | GittinsIndex, *, quantum_seconds: float = 60.0, delta: float | None = None
    ) -> None:
        self.index = history if isinstance(history, GittinsIndex) else GittinsIndex(history)
        self.quantum_seconds = quantum_seconds
        self.delta = delta

    def key(self, entry: Entry, now: float) -> tuple:
        """Index, the highest first."""
        return (-self.index.index(entry.attained(now), self.delta),)
