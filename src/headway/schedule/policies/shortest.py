"""The smallest or the shortest first: in devices, in time, in what is left of either."""

from __future__ import annotations

from headway.schedule.entry import Entry
from headway.schedule.policies.ordering import PATIENCE_SECONDS, Policy

__all__ = ["ShortestJobFirst", "ShortestRemainingServiceFirst", "ShortestRemainingTimeFirst", "SmallestFirst"]


class SmallestFirst(Policy):
    """Fewest devices first, of those that fit; nothing is stopped. Starvation: of large gangs, but for the patience."""

    name = "sf"
    steady = True
    patience_seconds = PATIENCE_SECONDS
    preemptive = False

    def key(self, entry: Entry, now: float) -> tuple:
        """Devices."""
        return (entry.job.devices,)


class ShortestJobFirst(Policy):
    """Shortest duration first, of those that fit; nothing is stopped. It knows the durations. Starvation: of long jobs,
    but for the patience."""

    name = "sjf"
    steady = True
    patience_seconds = PATIENCE_SECONDS
    preemptive = False
    clairvoyant = True

    def key(self, entry: Entry, now: float) -> tuple:
        """Duration."""
        return (entry.job.duration_seconds,)


class ShortestRemainingTimeFirst(Policy):
    """SRTF: least remaining time first. It knows the durations. Starvation: of long jobs, but for the patience."""

    name = "srtf"
    steady = True
    patience_seconds = PATIENCE_SECONDS
    clairvoyant = True

    def key(self, entry: Entry, now: float) -> tuple:
        """Remaining seconds."""
        return (entry.remaining(now),)


class ShortestRemainingServiceFirst(Policy):
    """SRSF: least remaining time x devices first (Tiresias, section 3.1): the bound on what can be had without knowing.

    It knows the durations. Starvation: of long and large jobs, but for the patience.
    """

    name = "srsf"
    steady = True
    patience_seconds = PATIENCE_SECONDS
    clairvoyant = True

    def key(self, entry: Entry, now: float) -> tuple:
        """Remaining device-seconds."""
        return (entry.remaining(now) * entry.job.devices,)
