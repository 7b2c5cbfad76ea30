"""What past jobs teach about the next one, learned while jobs end: the distribution of a job's service by who it is.

Services are counted in bins, one for every doubling. A job is counted in four groups, each finer than the last: all
jobs; those of its gang size; of its user (or queue, where users are not known) and size; and of its user, model and
size. The distribution of a group is its own counts plus `weight` times the distribution of the group above it, divided
by both together: a group with few jobs speaks mostly with the voice of the one above it (the back-off of MacKay and
Peto's hierarchical Dirichlet language model, Natural Language Engineering 1995). Above all jobs stands a prior that has
the same mass in every bin. Groups forget: when a group has counted `memory` jobs, its counts are halved.

What a policy needs of a distribution is the *expected effort* at each bound: the device-seconds that are spent, per job
that ends, by going on with it for the best quantum. It is the reciprocal of the Gittins index (Gittins, Glazebrook and
Weber 2011, chapter 2), and where the remaining service is known, it is the remaining service, as in SRSF.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headway.compiled import compiled
from headway.errors import InputError
from headway.schedule.job import Job

__all__ = ["BINS", "BOUNDS", "LEVELS", "History", "expected_effort", "group_keys", "group_rows", "learn", "mixture"]

BOUNDS: tuple[float, ...] = tuple(30.0 * 2.0**power for power in range(25))
"""Upper bounds of the bins in device-seconds: half a minute on one device to 5.0e8."""
BINS = len(BOUNDS) + 1
"""How many bins: the last one has no upper bound."""
LEVELS = 4
"""Groups that a job is in, from all jobs to the finest."""


def group_keys(job: Job) -> tuple[tuple[Any, ...], ...]:
    """The groups of a job, the coarsest first."""
    who = job.user or job.queue
    return ((), (job.devices,), (job.devices, who), (job.devices, who, job.model))


def group_rows(jobs: Sequence[Job]) -> tuple[np.ndarray, int]:
    """For each job the numbers of its groups, [jobs, LEVELS], and how many groups there are."""
    numbers: dict[tuple[Any, ...], int] = {}
    rows = np.empty((len(jobs), LEVELS), dtype=np.int64)
    for at, job in enumerate(jobs):
        for level, key in enumerate(group_keys(job)):
            rows[at, level] = numbers.setdefault(key, len(numbers))
    return rows, len(numbers)


@compiled()
def learn(counts: np.ndarray, row: np.ndarray, bounds: np.ndarray, service: float, memory: float) -> None:
    """Count a job that needed `service` in all of its groups. `counts`: [groups, bins]."""
    at = 0
    while at < len(bounds) and service > bounds[at]:
        at += 1
    for level in range(len(row)):
        own = counts[row[level]]
        own[at] += 1.0
        total = 0.0
        for column in range(len(own)):
            total += own[column]
        # The group of all jobs stands for what does not change, and forgets nothing.
        if level > 0 and total >= memory:
            for column in range(len(own)):
                own[column] *= 0.5


@compiled()
def mixture(counts: np.ndarray, row: np.ndarray, weight: float, out: np.ndarray) -> None:
    """The distribution over the bins for a job in these groups, into `out`."""
    bins = len(out)
    for column in range(bins):
        out[column] = 1.0 / bins
    for level in range(len(row)):
        own = counts[row[level]]
        total = 0.0
        for column in range(bins):
            total += own[column]
        for column in range(bins):
            out[column] = (own[column] + weight * out[column]) / (total + weight)


@compiled()
def expected_effort(share: np.ndarray, bounds: np.ndarray, out: np.ndarray) -> None:
    """For each bin, the least device-seconds per job that ends, for a job that has attained the bin's lower bound.

    `share`: mass of each bin; within one, services count as its middle (the last: three times its lower bound).
    """
    bins = len(share)
    for start in range(bins):
        attained = bounds[start - 1] if start > 0 else 0.0
        best = np.inf
        ending = 0.0
        spent = 0.0
        beyond = 0.0
        for column in range(start, bins):
            beyond += share[column]
        for stop in range(start, bins):
            lower = bounds[stop - 1] if stop > 0 else 0.0
            middle = (lower + bounds[stop]) / 2 if stop < bins - 1 else 3 * lower
            ending += share[stop]
            spent += share[stop] * (middle - attained)
            beyond -= share[stop]
            effort = spent
            if stop < bins - 1:
                effort += max(0.0, beyond) * (bounds[stop] - attained)
            if ending > 0.0:
                best = min(best, effort / ending)
        out[start] = best


class History:
    """Counts of past jobs, as they end: what the policy `headway` learns from. `weight` and `memory`: see above."""

    def __init__(self, *, weight: float = 2.0, memory: float = 256.0) -> None:
        if not weight > 0 or not memory > 1:
            raise InputError(f"weight {weight}, memory {memory}", place="history", remedy="above 0; above 1")
        self.weight = weight
        self.memory = memory
        self.bounds = np.array(BOUNDS)
        self._numbers: dict[tuple[Any, ...], int] = {}
        self._counts = np.zeros((64, BINS))

    def _rows(self, job: Job) -> np.ndarray:
        rows = np.empty(LEVELS, dtype=np.int64)
        for level, key in enumerate(group_keys(job)):
            rows[level] = self._numbers.setdefault(key, len(self._numbers))
        if len(self._numbers) > len(self._counts):
            grown = np.zeros((2 * len(self._numbers), BINS))
            grown[: len(self._counts)] = self._counts
            self._counts = grown
        return rows

    def learn(self, job: Job, service: float) -> None:
        """A job has ended that needed so many device-seconds."""
        rows = self._rows(job)
        learn(self._counts, rows, self.bounds, service, self.memory)

    def distribution(self, job: Job) -> np.ndarray:
        """The probability of each bin for a job that has just been submitted."""
        rows = self._rows(job)
        share = np.empty(BINS)
        mixture(self._counts, rows, self.weight, share)
        return share

    def efforts(self, job: Job) -> np.ndarray:
        """`expected_effort` of the job at the lower bound of every bin, in device-seconds."""
        out = np.empty(BINS)
        expected_effort(self.distribution(job), self.bounds, out)
        return out

    def table(self, jobs: Sequence[Job], rows: np.ndarray, groups: int) -> np.ndarray:
        """What it has learned so far as the counts of the groups of `group_rows(jobs)`, [groups, bins]; a copy."""
        counts = np.zeros((groups, BINS))
        for job, own in zip(jobs, rows, strict=True) if self._numbers else ():
            for row, key in zip(own, group_keys(job), strict=True):
                if key in self._numbers:
                    counts[row] = self._counts[self._numbers[key]]
        return counts

    def snapshot(self) -> Any:
        """All that it has learned, as builtins."""
        return [
            [list(key), [float(value) for value in self._counts[row]]]
            for key, row in sorted(self._numbers.items(), key=lambda item: item[1])
        ]

    def restore(self, learned: Any) -> None:
        """Take back what `snapshot` gave."""
        self._numbers = {tuple(key): row for row, (key, _) in enumerate(learned)}
        self._counts = np.zeros((max(64, 2 * len(learned)), BINS))
        for row, (_, counts) in enumerate(learned):
            self._counts[row] = counts
