"""Gandiva (Xiao et al., OSDI 2018): time slicing, packing of jobs that leave a device half idle, and migration."""

from __future__ import annotations

from collections.abc import Mapping

from headway.schedule.entry import Entry
from headway.schedule.job import Job, ModelProfile
from headway.schedule.policies.ordering import Policy, View, Wish

__all__ = ["Gandiva"]


class Gandiva(Policy):
    """Round robin by device time, with packing and migration (sections 3 and 4).

    - time slicing: while jobs wait, those that have held devices longest in the current round give way each quantum:
      the order is by slices had, then by submission;
    - packing: a job that would wait shares the devices of one of the same size, where both are known to leave enough
      idle: utilisations that add up to at most 1, so that neither slows the other;
    - migration: a job that runs spread is moved together when there is room and the move is paid for (`migrates`).

    Gandiva minds efficiency, not completion times, and so is agnostic of sizes. Starvation: none: a job that has had
    fewer slices goes first, and a newcomer begins with as many as the one that had fewest.
    """

    name = "gandiva"
    migrates = True

    def __init__(self, quantum_seconds: float = 60.0, *, profiles: Mapping[str, ModelProfile] | None = None) -> None:
        self.quantum_seconds = quantum_seconds
        self.profiles = dict(profiles or {})
        self._slices: dict[int, float] = {}  # seconds of execution with which a job joined the round

    def submitted(self, entry: Entry, now: float) -> None:
        """A newcomer joins the round where the one is that had fewest slices, else it would shut all others out."""
        self._slices[entry.number] = -1.0

    def ended(self, entry: Entry, now: float) -> None:
        """It leaves the round."""
        self._slices.pop(entry.number, None)

    def _had(self, entry: Entry, now: float) -> float:
        return entry.executed(now) + self._slices.get(entry.number, 0.0)

    def arrange(self, view: View) -> list[Wish]:
        """By whole slices had, those that run first; then whoever can be packed onto one of those."""
        known = {entry.number for entry in view.entries}
        self._slices = {number: joined for number, joined in self._slices.items() if number in known}
        old = [entry for entry in view.entries if self._slices.get(entry.number, 0.0) >= 0]
        fewest = min((self._had(entry, view.now) for entry in old), default=0.0)
        for number, joined in self._slices.items():
            if joined < 0:
                self._slices[number] = fewest

        def rank(entry: Entry) -> tuple:
            slices = self._had(entry, view.now) // self.quantum_seconds
            return (slices, not (entry.running and entry.host < 0), entry.number)

        ranked = sorted(view.entries, key=rank)
        left, wishes, hosts = view.capacity, [], []
        waiting = []
        for entry in ranked:
            if entry.job.devices <= left and not (entry.running and entry.host >= 0):
                left -= entry.job.devices
                wishes.append(Wish(entry, entry.job.devices))
                hosts.append(entry)
            else:
                waiting.append(entry)
        # Those that share already keep their partner, so that nobody moves for nothing.
        taken: set[int] = set()
        numbers = {host.number for host in hosts}
        for entry in sorted(waiting, key=lambda entry: entry.host < 0):
            if entry.running and entry.host in numbers and entry.host not in taken:
                taken.add(entry.host)
                wishes.append(Wish(entry, entry.job.devices, host=entry.host))
                continue
            host = None
            if entry.job.model in self.profiles:
                host = next(
                    (host for host in hosts if host.number not in taken and self._fits(entry.job, host.job)), None
                )
            if host is None:
                wishes.append(Wish(entry, entry.job.devices))
            else:
                taken.add(host.number)
                wishes.append(Wish(entry, entry.job.devices, host=host.number))
        return wishes

    def _fits(self, job: Job, host: Job) -> bool:
        if job.devices != host.devices or job.kinds != host.kinds:
            return False
        first, second = self.profiles.get(job.model), self.profiles.get(host.model)
        return first is not None and second is not None and first.utilisation + second.utilisation <= 1

    def snapshot(self) -> dict[str, float]:
        """With how much execution each job joined."""
        return {str(number): joined for number, joined in self._slices.items()}

    def restore(self, learned: dict[str, float]) -> None:
        """Take it back."""
        self._slices = {int(number): joined for number, joined in learned.items()}
