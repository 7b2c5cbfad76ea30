"""Policies that share fairly, round by round: Themis's finish-time fairness and max-min fairness of device time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headway.schedule.entry import Entry
from headway.schedule.policies.ordering import Policy, View, Wish

__all__ = ["MaxMin", "RoundPolicy", "Themis", "fair_shares"]


class Themis(Policy):
    """Finish-time fairness (Mahajan et al., NSDI 2020, section 3): who is treated worst goes first, lease by lease.

    The fairness of a job is when it will finish here over when it would with its 1/N of the fleet to itself; N is the
    same for all that share it, so the order is that of (waited and run so far + remaining) / duration. The order stands
    for the auction, in which truthful bids win the same devices; jobs must say how long they will still take. Each
    lease lasts `quantum_seconds`. Starvation: none: the ratio of a job that waits grows without bound.
    """

    name = "themis"
    clairvoyant = True

    def __init__(self, quantum_seconds: float = 600.0) -> None:
        self.quantum_seconds = quantum_seconds
        self._lease_ends: dict[int, float] = {}

    def unfairness(self, entry: Entry, now: float) -> float:
        """Time from submission to finish, if it ran from now on, over its duration."""
        return (now - entry.submitted + entry.remaining(now)) / entry.job.duration_seconds

    def key(self, entry: Entry, now: float) -> tuple:
        """Leases that have not ended first, then the most unfairly treated."""
        leased = entry.running and now < self._lease_ends.get(entry.number, entry.since + self.quantum_seconds)
        return (not leased, -self.unfairness(entry, now))

    def arrange(self, view: View) -> list[Wish]:
        """By `key`; a lease that ends and is won again lasts another quantum."""
        ranked = super().arrange(view)
        ends = {}
        for entry in view.entries:
            if entry.running:
                end = self._lease_ends.get(entry.number, entry.since + self.quantum_seconds)
                ends[entry.number] = view.now + self.quantum_seconds if end <= view.now else end
        self._lease_ends = ends
        return ranked

    def snapshot(self) -> Any:
        """When leases end."""
        return {str(number): end for number, end in self._lease_ends.items()}

    def restore(self, learned: Any) -> None:
        """Take it back."""
        self._lease_ends = {int(number): end for number, end in learned.items()}


class RoundPolicy(Policy):
    """Shares of time carried out in rounds (Gavel, Narayanan et al., OSDI 2020, section 5).

    `shares` says which part of the time each job should run on each kind. Who has had least of its part goes first; one
    round lasts `quantum_seconds`, and within a round nobody who runs is stopped. Starvation: none while every share is
    above 0: what a job lacks of its part grows while it waits.
    """

    def __init__(self, quantum_seconds: float = 360.0) -> None:
        self.quantum_seconds = quantum_seconds
        self._had: dict[tuple[int, str], float] = {}
        self._joined: dict[int, float] = {}
        self._asked = 0.0
        self._round_ends = 0.0

    def shares(self, view: View) -> dict[int, dict[str, float]]:
        """Number of a job to kind of device to the part of the time that it should run there, at most 1 in all."""
        raise NotImplementedError

    def arrange(self, view: View) -> list[Wish]:
        """Within a round those that run stay first, as do at its end those that hardly began; then who lacks most."""
        now = view.now
        self._account(view, now)
        begins = now >= self._round_ends
        if begins:
            self._round_ends = now + self.quantum_seconds
        lacking: list[tuple[tuple, Entry, str]] = []
        by_number = {entry.number: entry for entry in view.entries}
        for number, parts in self.shares(view).items():
            entry = by_number[number]
            present = max(now - self._joined[number], self.quantum_seconds)
            for kind, part in parts.items():
                if part > 1e-9:
                    had = self._had.get((number, kind), 0.0)
                    stays = entry.running and _kind(entry, view) == kind and not (begins and view.repays(entry))
                    lacking.append(((not stays, had / (part * present), -part, number), entry, kind))
        lacking.sort(key=lambda item: item[0])
        wishes, seen, left = [], set(), dict(view.fleet.devices_by_kind)
        for _, entry, kind in lacking:
            if entry.number not in seen and left.get(kind, 0) >= entry.job.devices:
                left[kind] -= entry.job.devices
                seen.add(entry.number)
                wishes.append(Wish(entry, entry.job.devices, (kind,) if len(left) > 1 else ()))
        wishes.extend(Wish(entry, entry.job.devices) for entry in view.entries if entry.number not in seen)
        return wishes

    def _account(self, view: View, now: float) -> None:
        present = {entry.number for entry in view.entries}
        self._had = {key: had for key, had in self._had.items() if key[0] in present}
        self._joined = {number: joined for number, joined in self._joined.items() if number in present}
        for entry in view.entries:
            if entry.running:
                key = (entry.number, _kind(entry, view))
                self._had[key] = self._had.get(key, 0.0) + now - max(self._asked, entry.since)
            self._joined.setdefault(entry.number, now)
        self._asked = now

    def snapshot(self) -> Any:
        """What each has had, since when."""
        return {
            "had": [[number, kind, had] for (number, kind), had in self._had.items()],
            "joined": [[number, joined] for number, joined in self._joined.items()],
            "asked": self._asked,
            "round_ends": self._round_ends,
        }

    def restore(self, learned: Any) -> None:
        """Take it back."""
        self._had = {(number, kind): had for number, kind, had in learned["had"]}
        self._joined = dict(map(tuple, learned["joined"]))
        self._asked, self._round_ends = learned["asked"], learned["round_ends"]


class MaxMin(RoundPolicy):
    """Weighted max-min fairness of device time, blind to kinds: the agnostic policy that Gavel compares with."""

    name = "max-min"

    def shares(self, view: View) -> dict[int, dict[str, float]]:
        """Of devices x time, filled up like water; a job's part is the same on all kinds that it may use."""
        entries = view.entries
        level = fair_shares(
            [entry.job.devices for entry in entries], [entry.job.weight for entry in entries], view.capacity
        )
        kinds = view.fleet.devices_by_kind
        found = {}
        for entry, part in zip(entries, level, strict=True):
            usable = [kind for kind in kinds if not entry.job.kinds or kind in entry.job.kinds]
            found[entry.number] = dict.fromkeys(usable, part / max(1, len(usable)))
        return found


def fair_shares(devices: Sequence[int], weights: Sequence[float], capacity: int) -> list[float]:
    """The part of the time that each gang may run so that devices x time are max-min fair by weight; at most 1 each."""
    parts = [0.0] * len(devices)
    left = float(capacity)
    # By the device time that would satisfy a job for its weight, the smallest first: those are satisfied first.
    order = sorted(range(len(devices)), key=lambda job: devices[job] / weights[job])
    weight = sum(weights)
    for job in order:
        given = min(float(devices[job]), max(0.0, left) * weights[job] / weight if weight > 0 else 0.0)
        parts[job] = given / devices[job]
        left -= given
        weight -= weights[job]
    return parts


def _kind(entry: Entry, view: View) -> str:
    return view.fleet.nodes[entry.counts[0][0]].kind
