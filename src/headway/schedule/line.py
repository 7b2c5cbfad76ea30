"""Who waits and who runs, kept in such an order that a decision costs what it changes, not what is there.

Those that wait stay sorted where the policy is `steady`; when a threshold or the end of a patience is due is known from
heaps. Nothing of it is state: all of it follows from the entries, and is built again when a scheduler is restored.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator
from itertools import groupby

from headway.schedule.entry import Entry
from headway.schedule.policies.ordering import Policy, Wish

__all__ = ["Line"]


class Line:
    """The entries of one scheduler by what they do. Times in seconds.

    `running`: number to entry. `overdue`: numbers of those whose patience is at an end. `wanted`: devices that all ask
    for together. `touched`: those whose speed or place has changed; whoever reads it clears it.
    """

    def __init__(self, policy: Policy, patience_seconds: float) -> None:
        self.policy = policy
        self.patience_seconds = patience_seconds
        self.running: dict[int, Entry] = {}
        self.overdue: set[int] = set()
        self.touched: dict[int, Entry] = {}
        self.wanted = 0
        self._waiting: dict[int, Entry] = {}
        self._sizes: dict[int, int] = {}
        self._keys: dict[int, tuple[tuple, int]] = {}
        self._sorted: list[tuple[tuple, int]] = []
        self._grouped: dict[Hashable, list[int]] = {}  # numbers of those that wait, sorted, of a grouped policy
        self._group_of: dict[int, Hashable] = {}
        self._regroupings = policy.regroupings
        self._crossings: list[tuple[float, int]] = []
        self._patiences: list[tuple[float, int]] = []

    @property
    def someone_waits(self) -> bool:
        """Whether anybody does."""
        return bool(self._waiting)

    @property
    def least(self) -> int:
        """The fewest devices that any job there can run on; 0: nobody is there."""
        return min(self._sizes, default=0)

    def add(self, entry: Entry) -> None:
        """A job that is new here, waiting or running."""
        self.wanted += entry.job.devices
        devices = entry.job.smallest
        self._sizes[devices] = self._sizes.get(devices, 0) + 1
        if entry.running:
            self.started(entry)
        else:
            self.stopped(entry)
        self.expect(entry)

    def remove(self, entry: Entry) -> None:
        """A job that is done or cancelled."""
        self._leave(entry.number)
        self.running.pop(entry.number, None)
        self.touched.pop(entry.number, None)
        self.wanted -= entry.job.devices
        devices = entry.job.smallest
        self._sizes[devices] -= 1
        if not self._sizes[devices]:
            del self._sizes[devices]

    def started(self, entry: Entry) -> None:
        """It has its devices now, or others than before."""
        self._leave(entry.number)
        self.running[entry.number] = entry
        self.touched[entry.number] = entry

    def stopped(self, entry: Entry) -> None:
        """It waits from `entry.since` on, or has changed while it waits."""
        number = entry.number
        self._leave(number)
        self.running.pop(number, None)
        self._waiting[number] = entry
        if self.patience_seconds < math.inf:
            heapq.heappush(self._patiences, (entry.patience_ends(self.patience_seconds), number))
        if self.policy.grouped:
            self._join(entry)
        elif self.policy.steady:
            key = self._keys[number] = (self.policy.key(entry, entry.since), number)
            insort(self._sorted, key)

    def _join(self, entry: Entry) -> None:
        group = self._group_of[entry.number] = self.policy.group(entry)
        insort(self._grouped.setdefault(group, []), entry.number)

    def _leave(self, number: int) -> None:
        self._waiting.pop(number, None)
        self.overdue.discard(number)
        if number in self._group_of:
            group = self._group_of.pop(number)
            numbers = self._grouped[group]
            del numbers[bisect_left(numbers, number)]
            if not numbers:
                del self._grouped[group]
        key = self._keys.pop(number, None)
        if key is not None:
            del self._sorted[bisect_left(self._sorted, key)]

    def expect(self, entry: Entry) -> None:
        """It leaves its queue at `entry.crossing`."""
        if entry.crossing < math.inf:
            heapq.heappush(self._crossings, (entry.crossing, entry.number))

    # ------------------------------------------------------------------------------------------------- what is due

    def next_due(self, entries: dict[int, Entry], now: float) -> float:
        """When the next threshold is reached or the next patience ends; infinite: never."""
        while self._crossings and not self._crosses(self._crossings[0], entries):
            heapq.heappop(self._crossings)
        while self._patiences and (not self._loses_patience(self._patiences[0]) or self._patiences[0][0] <= now):
            _, number = heapq.heappop(self._patiences)
            self._note_overdue(number, now)
        crossing = self._crossings[0][0] if self._crossings else math.inf
        return min(crossing, self._patiences[0][0] if self._patiences else math.inf)

    def crossing(self, entries: dict[int, Entry], now: float) -> list[Entry]:
        """Those that leave their queue by `now`, in the order of submission."""
        found = {}
        while self._crossings and self._crossings[0][0] <= now:
            item = heapq.heappop(self._crossings)
            if self._crosses(item, entries):
                found[item[1]] = entries[item[1]]
        return [found[number] for number in sorted(found)]

    def lose_patience(self, now: float) -> None:
        """Bring `overdue` up to `now`."""
        while self._patiences and self._patiences[0][0] <= now:
            _, number = heapq.heappop(self._patiences)
            self._note_overdue(number, now)

    def _crosses(self, item: tuple[float, int], entries: dict[int, Entry]) -> bool:
        entry = entries.get(item[1])
        return entry is not None and entry.crossing == item[0]

    def _loses_patience(self, item: tuple[float, int]) -> bool:
        entry = self._waiting.get(item[1])
        return entry is not None and entry.patience_ends(self.patience_seconds) == item[0]

    def _note_overdue(self, number: int, now: float) -> None:
        entry = self._waiting.get(number)
        if entry is not None and now >= entry.patience_ends(self.patience_seconds):
            self.overdue.add(number)

    # ------------------------------------------------------------------------------------------------- in order

    def overdue_wishes(self) -> list[Wish]:
        """Of those whose patience is at an end, those that waited longest first."""
        late = sorted((self._waiting[number] for number in self.overdue), key=lambda entry: (entry.since, entry.number))
        return [Wish(entry, entry.job.devices) for entry in late]

    def waiting(self) -> Iterator[Wish]:
        """Those that wait, in the order of a steady policy; nobody may start or stop meanwhile."""
        if self.overdue:
            yield from self.overdue_wishes()
        for number in self._by_group() if self.policy.grouped else (number for _, number in self._sorted):
            if number not in self.overdue:
                entry = self._waiting[number]
                yield Wish(entry, entry.job.devices)

    def _by_group(self) -> Iterator[int]:
        """Numbers of those that wait: groups by their keys now, ties by number."""
        if self._regroupings != self.policy.regroupings:
            self._regroupings = self.policy.regroupings
            self._grouped, self._group_of = {}, {}
            for number in sorted(self._waiting):
                self._join(self._waiting[number])
        ranked = sorted(((self.policy.group_key(group), at) for at, group in enumerate(self._grouped)))
        groups = list(self._grouped.values())
        for _, alike in groupby(ranked, key=lambda item: item[0]):
            numbers = [groups[at] for _, at in alike]
            yield from numbers[0] if len(numbers) == 1 else heapq.merge(*numbers)

    def runners(self, now: float) -> list[tuple[tuple, int]]:
        """(key, number) of those that run, sorted as a steady policy orders them."""
        key = self.policy.key
        return sorted((key(entry, now), number) for number, entry in self.running.items())

    def everybody(self, runners: list[tuple[tuple, int]]) -> Iterator[Wish]:
        """Those that wait and those that run (as `runners` gave them), in the order of a steady policy."""
        assert not self.policy.grouped, "those that wait in groups are never merged with those that run"
        if self.overdue:
            yield from self.overdue_wishes()
        at, count = 0, len(runners)
        for item in self._sorted:
            if item[1] in self.overdue:
                continue
            while at < count and runners[at] < item:
                entry = self.running[runners[at][1]]
                at += 1
                yield Wish(entry, entry.job.devices)
            entry = self._waiting[item[1]]
            yield Wish(entry, entry.job.devices)
        for _, number in runners[at:]:
            entry = self.running[number]
            yield Wish(entry, entry.job.devices)
