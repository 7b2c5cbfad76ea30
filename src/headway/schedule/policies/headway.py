"""`headway`, a policy of our own: the job first that is expected to end for the least effort, by what has been learned.

It knows what Tiresias knows: who submitted a job, its model and gang size, how much service it has attained, and the
services of jobs that have ended. From these it learns, while it runs, the distribution of a job's service
(`history.py`), and orders jobs by their expected effort: the least device-seconds, over all quanta, that are spent for
each job that ends (the reciprocal of the Gittins index of the job's own distribution). What differs from 2D-Gittins:

- each job has its own distribution, of jobs like it, where Tiresias has one for all;
- queues end at every doubling of service, since a distribution is known at each of them;
- preemption is weighed: stopping a running job costs what resuming it will cost, so it counts for that much less
  effort while it runs, and for that much more while it waits after having run;
- jobs that say in which range of devices they can run are shrunk to the least while others wait, once they have
  attained `shrink_after` device-seconds.

The first job of the order is never kept waiting by others: they are stopped for it. So there is nothing for a
reservation to protect, except from fragmentation, which the scheduler clears away for those that are chosen.

Starvation: a job's effort depends on itself alone, so that long jobs wait for as long as shorter ones fill the fleet;
the scheduler's patience bounds it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from headway.errors import InputError
from headway.schedule.entry import Entry
from headway.schedule.pace import Overhead, Pace
from headway.schedule.policies.history import BOUNDS, History
from headway.schedule.policies.ordering import PATIENCE_SECONDS, Policy, View, Wish

__all__ = ["HeadwayPolicy"]


class HeadwayPolicy(Policy):
    """Least expected effort first; see the module.

    `history`: begin with what it has learned elsewhere; None: with nothing. `shrink_after`: device-seconds after which
    elastic jobs may be shrunk; infinite: never.
    """

    name = "headway"
    steady = True  # until an elastic job comes
    patience_seconds = PATIENCE_SECONDS
    thresholds = BOUNDS

    def __init__(self, history: History | None = None, *, shrink_after: float = 3600.0) -> None:
        if not shrink_after >= 0:
            raise InputError(f"shrink_after is {shrink_after}", place="headway", remedy="0 or more device-seconds")
        self.history = history or History()
        self.shrink_after = shrink_after
        self._efforts: dict[int, np.ndarray] = {}
        self._pace: Pace | None = None
        self._overhead = Overhead()

    def prepare(self, pace: Pace, overhead: Overhead) -> None:
        """What stopping costs."""
        self._pace, self._overhead = pace, overhead

    def key(self, entry: Entry, now: float) -> tuple:
        """Expected effort, preemption weighed."""
        return (self.weighed(entry),)

    def effort(self, entry: Entry) -> float:
        """Expected device-seconds per end, of a job that has attained the lower bound of its queue."""
        efforts = self._efforts.get(entry.number)
        if efforts is None:
            efforts = self._efforts[entry.number] = self.history.efforts(entry.job)
        return float(efforts[entry.queue])

    def weighed(self, entry: Entry) -> float:
        """The effort, less what stopping it would cost if it runs, more what starting it costs if it waits."""
        job = entry.job
        profile = self._pace.profile(job) if self._pace else None
        if entry.running:
            return self.effort(entry) - self._overhead.start(job, profile, resumed=True) * job.devices
        return self.effort(entry) + self._overhead.start(job, profile, resumed=entry.starts > 0) * job.devices

    def arrange(self, view: View) -> list[Wish]:
        """Least effort first; ties by submission. Elastic jobs have fewer devices while not everybody has some."""
        wishes = super().arrange(view)
        if self.steady or sum(wish.devices for wish in wishes) <= view.capacity:
            return wishes
        return [Wish(wish.entry, self._size(wish.entry, view.now)) for wish in wishes]

    def _size(self, entry: Entry, now: float) -> int:
        job = entry.job
        return job.smallest if entry.attained(now) >= self.shrink_after else job.devices

    def submitted(self, entry: Entry, now: float) -> None:
        """What is known of such jobs now is what counts for it."""
        if 0 < entry.job.minimum_devices < entry.job.devices:
            self.steady = False
        self._efforts[entry.number] = self.history.efforts(entry.job)

    def left(self, entry: Entry) -> None:
        """What was known when it came counts for nobody else."""
        self._efforts.pop(entry.number, None)

    def ended(self, entry: Entry, now: float) -> None:
        """Learn its service."""
        self.history.learn(entry.job, entry.service)

    def snapshot(self) -> Any:
        """The history, and the efforts of the jobs that are there."""
        efforts = [[number, [float(value) for value in each]] for number, each in sorted(self._efforts.items())]
        return {"history": self.history.snapshot(), "efforts": efforts, "steady": self.steady}

    def restore(self, learned: Any) -> None:
        """Take back what `snapshot` gave."""
        self.history.restore(learned["history"])
        self.steady = learned["steady"]
        self._efforts = {number: np.array(each) for number, each in learned["efforts"]}
