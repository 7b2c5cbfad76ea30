"""QSSF: shortest predicted service first, for jobs that recur (Hu et al., "Helios", SC 2021, section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

from headway.schedule.entry import Entry
from headway.schedule.job import Job
from headway.schedule.policies.ordering import PATIENCE_SECONDS, Policy

__all__ = ["QuasiShortestServiceFirst"]


class QuasiShortestServiceFirst(Policy):
    """Smallest predicted service first, of those that fit; nothing is stopped.

    The prediction is a decayed mean of what earlier jobs lasted: of the same user, name stem, model and size; where
    there were none, of the same user and size, then of the user, then of all. It is learned as jobs end. Helios adds a
    gradient-boosted model of more columns than our traces have; its rolling estimate is what stands here. Starvation:
    of jobs predicted long, but for the patience.
    """

    name = "qssf"
    patience_seconds = PATIENCE_SECONDS
    preemptive = False
    steady = True
    grouped = True

    def __init__(self, *, decay: float = 0.8) -> None:
        self.decay = decay
        self._means: dict[str, float] = {}

    def key(self, entry: Entry, now: float) -> tuple:
        """Predicted device-seconds."""
        return (self.predicted(entry.job) * entry.job.devices,)

    def predicted(self, job: Job) -> float:
        """Seconds that the job is expected to last; infinite while nothing is known of anybody."""
        return self._means.get(self._known(job), math.inf)

    def group(self, entry: Entry) -> tuple[str, int]:
        """From whom it is predicted, and devices."""
        return self._known(entry.job), entry.job.devices

    def group_key(self, group: Hashable) -> tuple:
        """Predicted device-seconds."""
        assert isinstance(group, tuple)
        return (self._means.get(group[0], math.inf) * group[1],)

    def _known(self, job: Job) -> str:
        """The nearest of its groups of which something is known; empty: none."""
        return next((group for group in _groups(job) if group in self._means), "")

    def ended(self, entry: Entry, now: float) -> None:
        """Learn from how long it ran."""
        for group in _groups(entry.job):
            self.regroupings += group not in self._means
            old = self._means.get(group, entry.ran)
            self._means[group] = self.decay * old + (1 - self.decay) * entry.ran

    def snapshot(self) -> Any:
        """The means."""
        return dict(self._means)

    def restore(self, learned: Any) -> None:
        """Take them back."""
        self._means = dict(learned)
        self.regroupings += 1


def _groups(job: Job) -> tuple[str, ...]:
    stem = job.name.rstrip("0123456789-_.")
    return (
        f"{job.user}/{stem}/{job.model}/{job.devices}",
        f"{job.user}/*/*/{job.devices}",
        f"{job.user}/*/*/*",
        "*",
    )
