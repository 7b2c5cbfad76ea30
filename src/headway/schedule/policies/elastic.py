"""Policies that decide how many devices a job gets: Optimus and Pollux.

A job that is not elastic has a range of one number. Sizes are decided every quantum; in between, who runs keeps what it
has, and newcomers get their smallest size if it is free.
"""

from __future__ import annotations

import heapq
from typing import Any

from headway.schedule.entry import Entry
from headway.schedule.policies.ordering import PATIENCE_SECONDS, Policy, View, Wish

__all__ = ["ElasticPolicy", "Optimus", "Pollux"]


class ElasticPolicy(Policy):
    """Gives each job its smallest size, in `key` order, then more devices to whom each of them brings most.

    `worth(view, entry, devices)` says what a size is worth; a step is taken only if it is worth more. That is optimal
    where the worth is concave in the devices. Growth that brings less in a quantum than its restart costs is not taken.
    """

    asks_always = True

    def __init__(self, quantum_seconds: float) -> None:
        self.quantum_seconds = quantum_seconds
        self._next_round = 0.0

    def worth(self, view: View, entry: Entry, devices: int) -> float:
        """What it is worth that the job has so many devices, in the units of the policy."""
        raise NotImplementedError

    def arrange(self, view: View) -> list[Wish]:
        """Sizes for all; those that get none come last, with their smallest."""
        begins = view.now >= self._next_round
        if begins:
            self._next_round = view.now + self.quantum_seconds
        now = view.now
        ranked = sorted(view.entries, key=lambda entry: (self.key(entry, now), entry.number))
        if not begins:
            ranked.sort(key=lambda entry: not entry.running)
        sizes: dict[int, int] = {}
        left = view.capacity
        for entry in ranked:
            size = entry.job.smallest if begins or not entry.running else entry.devices
            if size <= left:
                sizes[entry.number] = size
                left -= size
        # In between only what nobody else wants is given away, to those that just come.
        grow = [entry for entry in ranked if entry.number in sizes and (begins or not entry.running)]
        self._grow(view, grow, sizes, left)
        if begins:
            self._spare_restarts(view, ranked, sizes)
        return [Wish(entry, sizes.get(entry.number, entry.job.smallest)) for entry in ranked]

    def _grow(self, view: View, entries: list[Entry], sizes: dict[int, int], left: int) -> None:
        """Give away what is left, where each device brings most.

        A step may be of several devices: goodput falls where a job leaves its first node, and rises again beyond.
        """

        def best_step(entry: Entry) -> tuple[float, int]:
            size = sizes[entry.number]
            here = self.worth(view, entry, size)
            steps = range(1, min(entry.job.largest - size, left) + 1)
            return max(((self.worth(view, entry, size + step) - here) / step, -step) for step in steps)

        heap = []
        for entry in entries:
            if left and sizes[entry.number] < entry.job.largest:
                gain, step = best_step(entry)
                heap.append((-gain, entry.number, -step, entry))
        heapq.heapify(heap)
        while left and heap:
            loss, number, step, entry = heapq.heappop(heap)
            if loss >= 0:
                return
            if step > left:  # it was meant when more was left
                gain, step = best_step(entry)
                heapq.heappush(heap, (-gain, number, -step, entry))
                continue
            sizes[number] += step
            left -= step
            if left and sizes[number] < entry.job.largest:
                gain, step = best_step(entry)
                heapq.heappush(heap, (-gain, number, -step, entry))

    def _spare_restarts(self, view: View, ranked: list[Entry], sizes: dict[int, int]) -> None:
        """Growth that brings less in a quantum than the restart costs is not taken."""
        for entry in ranked:
            if entry.running and sizes.get(entry.number, 0) > entry.devices:
                cost = view.overhead.start(entry.job, view.pace.profile(entry.job), resumed=True)
                grown = view.pace.speedup(entry.job, sizes[entry.number])
                brings = (grown - view.pace.speedup(entry.job, entry.devices)) * self.quantum_seconds
                if brings <= cost * grown:
                    sizes[entry.number] = entry.devices

    def snapshot(self) -> Any:
        """When the next round begins."""
        return self._next_round

    def restore(self, learned: Any) -> None:
        """Take it back."""
        self._next_round = learned


class Optimus(ElasticPolicy):
    """Optimus (Peng et al., EuroSys 2018, section 4.1): a device goes to whom it saves most remaining time.

    Jobs must say how much work they have left, which Optimus fits to their loss; here it is known. Order: least
    remaining service first. Starvation: as SRSF.
    """

    name = "optimus"
    patience_seconds = PATIENCE_SECONDS
    clairvoyant = True

    def __init__(self, quantum_seconds: float = 600.0) -> None:
        super().__init__(quantum_seconds)

    def key(self, entry: Entry, now: float) -> tuple:
        """Remaining device-seconds at the smallest size."""
        return (entry.remaining(now) * entry.job.smallest,)

    def worth(self, view: View, entry: Entry, devices: int) -> float:
        """Minus the remaining time."""
        return -entry.remaining(view.now) / view.pace.speedup(entry.job, devices)


class Pollux(ElasticPolicy):
    """Pollux (Qiao et al., OSDI 2021, section 4.2): maximise the fairness-weighted mean of goodputs.

    Its fitness is the power mean, with exponent -1, of each job's speedup over its fair share; jobs that have had more
    than `decay_service` device-seconds weigh less, by the exponent `weight_decay`. Pollux searches by a genetic
    algorithm; for goodputs that are concave in the devices, giving them to whom each brings most finds the same
    optimum. Order: by weight, then least attained service. Starvation: none: weights fall as jobs run.
    """

    name = "pollux"

    def __init__(
        self, quantum_seconds: float = 60.0, *, decay_service: float = 4 * 3600.0, weight_decay: float = 0.5
    ) -> None:
        super().__init__(quantum_seconds)
        self.decay_service = decay_service
        self.weight_decay = weight_decay

    def key(self, entry: Entry, now: float) -> tuple:
        """Weight, the highest first; then attained service."""
        return (-self.weight(entry, now), entry.attained(now))

    def weight(self, entry: Entry, now: float) -> float:
        """1 until `decay_service`, then falling."""
        attained = max(entry.attained(now), self.decay_service)
        return entry.job.weight * (self.decay_service / attained) ** self.weight_decay

    def worth(self, view: View, entry: Entry, devices: int) -> float:
        """Its term of the power mean: minus weight over speedup."""
        return -self.weight(entry, view.now) / view.pace.speedup(entry.job, devices)
