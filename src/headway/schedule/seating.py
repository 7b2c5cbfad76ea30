"""From an order of jobs to who holds which devices: the part of the scheduler that knows the nodes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import msgspec

from headway.schedule.entry import Entry
from headway.schedule.events import Share
from headway.schedule.fleet import Fleet
from headway.schedule.job import Job
from headway.schedule.placement.rules import Counts, Placement
from headway.schedule.policies.ordering import Wish

__all__ = ["Seating", "Target"]

Improvable = Callable[[Entry, Counts], bool]


class Target(NamedTuple):
    """What a job is to hold: (node, devices of it), and the number of the job whose devices it shares, or -1."""

    counts: Counts
    host: int = -1


class Seating:
    """Which devices are free, on which nodes that are up. `free[i]` has a bit for each free device of node i."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.free = [(1 << node.devices) - 1 for node in fleet.nodes]
        self.up = [True] * len(fleet.nodes)
        self.counts = [node.devices for node in fleet.nodes]
        self.capacity = fleet.devices

    # ------------------------------------------------------------------------------------------------- devices

    def take(self, counts: Counts) -> tuple[Share, ...]:
        """So many devices of these nodes, those with the lowest numbers."""
        shares = []
        for node, count in counts:
            mask, numbers = self.free[node], []
            while len(numbers) < count:
                lowest = mask & -mask
                assert lowest, "more devices than are free"
                numbers.append(lowest.bit_length() - 1)
                mask ^= lowest
            self.free[node] = mask
            self.counts[node] -= count
            shares.append(Share(node=self.fleet.nodes[node].name, devices=tuple(numbers)))
        return tuple(shares)

    def give_back(self, shares: Sequence[Share]) -> None:
        """These devices are free again."""
        for share in shares:
            node = self.fleet.position[share.node]
            for device in share.devices:
                assert not self.free[node] >> device & 1, "a device was given back twice"
                self.free[node] |= 1 << device
            self.counts[node] += len(share.devices)

    def take_down(self, node: int) -> None:
        """Nothing of this node can be had; its jobs have left it already."""
        if self.up[node]:
            self.up[node] = False
            self.capacity -= self.fleet.nodes[node].devices
            self.free[node] = self.counts[node] = 0

    def bring_up(self, node: int) -> None:
        """The node is back, all of it free."""
        if not self.up[node]:
            self.up[node] = True
            devices = self.fleet.nodes[node].devices
            self.capacity += devices
            self.free[node], self.counts[node] = (1 << devices) - 1, devices

    def restore(self, free: Sequence[int], up: Sequence[bool]) -> None:
        """As it was when these were read."""
        self.free, self.up = list(free), list(up)
        self.counts = [mask.bit_count() for mask in free]
        self.capacity = sum(node.devices for node, is_up in zip(self.fleet.nodes, up, strict=True) if is_up)

    # ------------------------------------------------------------------------------------------------- arranging

    def arrange(
        self,
        wishes: Iterable[Wish],
        placement: Placement,
        *,
        preemptive: bool,
        head_blocks: bool,
        quotas: Mapping[str, int],
        overdue: Collection[int] = (),
        turn: int = 0,
        least: int = 0,
        running: Sequence[Wish] | None = None,
        improve: Improvable | None = None,
    ) -> dict[int, Target]:
        """Number of each job that is to run, to what it holds. Nothing is changed here.

        Preemptive: first it is counted, in order, for whom there are devices enough; the rest give theirs back. Those
        chosen that run already stay where they are; the others are placed in order, and one that fits nowhere (its
        place must be good) moves those after it in the order out of the way. What is left over then goes to the rest.
        Not preemptive: who runs stays; the rest are placed in order.

        `least`: nobody can use fewer devices. `running`: those of the wishes that run, in order; then the wishes are
        looked at only as far as need be, and nobody shares.
        """
        arranging = _Arranging(self, placement, quotas, turn, least)
        if running is not None:
            arranging.preempting(wishes, running, head_blocks)
            return arranging.targets
        wishes = list(wishes)
        alone = [wish for wish in wishes if wish.host < 0]
        running = [wish for wish in alone if wish.entry.running]
        if preemptive:
            arranging.preempting(alone, running, head_blocks)
        else:
            for wish in running:
                arranging.targets[wish.entry.number] = Target(wish.entry.counts, wish.entry.host)
            arranging.filling(alone, running, head_blocks, overdue)
        for wish in wishes:
            if wish.host >= 0 and wish.devices and wish.host in arranging.targets:
                arranging.share(wish)
        if improve is not None:
            arranging.improve(alone, improve)
        return arranging.targets

    def fill(
        self,
        waiting: Iterable[Wish],
        placement: Placement,
        running: Sequence[Wish],
        *,
        head_blocks: bool,
        quotas: Mapping[str, int],
        overdue: Collection[int] = (),
        turn: int = 0,
        least: int = 0,
    ) -> dict[int, Target]:
        """As `arrange`, of those that start, where nobody who runs is stopped or moved."""
        arranging = _Arranging(self, placement, quotas, turn, least)
        arranging.filling(waiting, running, head_blocks, overdue)
        return arranging.targets


def _tied(wish: Wish) -> Job:
    """The job, able to use only the kinds of the wish."""
    job = wish.entry.job
    return msgspec.structs.replace(job, kinds=wish.kinds) if wish.kinds else job


class _Arranging:
    """One arranging: what would be free, and who would hold what."""

    def __init__(
        self, seating: Seating, placement: Placement, quotas: Mapping[str, int], turn: int, least: int
    ) -> None:
        self.least = least
        self.hopeless: set[Hashable] = set()  # sizes of jobs for which there is no good place
        self.seating = seating
        self.fleet = seating.fleet
        self.placement = placement
        self.free = list(seating.counts)
        self.targets: dict[int, Target] = {}
        self.allowance = dict(quotas)
        self.turn = turn

    def _within_quota(self, wish: Wish) -> bool:
        left = self.allowance.get(wish.entry.job.queue)
        return left is None or wish.devices <= left

    def _charge(self, wish: Wish, devices: int) -> None:
        if wish.entry.job.queue in self.allowance:
            self.allowance[wish.entry.job.queue] -= devices

    def _place(self, wish: Wish, free: Sequence[int]) -> Counts | None:
        self.turn += 1
        counts = self.placement.place(_tied(wish), wish.devices, free, self.fleet, self.turn)
        if counts is not None:
            assert sum(count for _, count in counts) == wish.devices, "a placement of another size"
        return counts

    def _give(self, wish: Wish, counts: Counts) -> None:
        for node, count in counts:
            self.free[node] -= count
            assert self.free[node] >= 0, "a placement on devices that are not free"
        self.targets[wish.entry.number] = Target(counts)

    def _stays(self, wish: Wish) -> bool:
        """Whether it runs as wished, so that nothing need be done about it."""
        entry = wish.entry
        return (
            entry.running
            and entry.host < 0
            and entry.devices == wish.devices
            and (not wish.kinds or all(self.fleet.nodes[node].kind in wish.kinds for node, _ in entry.counts))
        )

    # ------------------------------------------------------------------------------------------ nothing is stopped

    def filling(
        self, wishes: Iterable[Wish], running: Iterable[Wish], head_blocks: bool, overdue: Collection[int]
    ) -> None:
        if self.allowance:
            for wish in running:
                self._charge(wish, wish.entry.devices)
        left = sum(self.free)
        for wish in wishes:
            if left < self.least or not left:
                return
            if wish.entry.running or not wish.devices:
                continue
            if not self._within_quota(wish):
                continue
            counts = self._try(wish) if wish.devices <= left else None
            if counts is not None:
                self._give(wish, counts)
                self._charge(wish, wish.devices)
                left -= wish.devices
            elif head_blocks or wish.entry.number in overdue:
                return

    def _try(self, wish: Wish) -> Counts | None:
        """A place among what is free, which has only become less since somebody alike found none."""
        alike = self.placement.alike(_tied(wish))
        if alike is None:
            return self._place(wish, self.free)
        if (alike, wish.devices) in self.hopeless:
            return None
        counts = self._place(wish, self.free)
        if counts is None:
            self.hopeless.add((alike, wish.devices))
        return counts

    # ------------------------------------------------------------------------------------------ stopping for others

    def preempting(self, wishes: Iterable[Wish], running: Sequence[Wish], head_blocks: bool) -> None:
        line = iter(wishes)
        chosen, passed = self._count(line, head_blocks)
        for wish in running:
            if wish.entry.host < 0:
                for node, count in wish.entry.counts:
                    self.free[node] += count
        stay: dict[int, Wish] = {}
        for wish in chosen:
            if self._stays(wish):
                stay[wish.entry.number] = wish
                self._give(wish, wish.entry.counts)
        failed = False
        order = {wish.entry.number: place for place, wish in enumerate(chosen)}
        for place, wish in enumerate(chosen):
            if wish.entry.number in self.targets:
                continue
            counts = self._shrunk(wish) or self._place(wish, self.free) or self._make_room(wish, place, order, stay)
            if counts is None:
                failed = True
            else:
                self._give(wish, counts)
        if failed and not head_blocks:
            self._fill([wish for wish in running if wish.entry.number not in order], chain(passed, line))

    def _count(self, wishes: Iterator[Wish], head_blocks: bool) -> tuple[list[Wish], list[Wish]]:
        """For whom there are devices enough, and who was passed over until there were none left."""
        fleet, up = self.fleet, self.seating.up
        left = [0] * (max(fleet.classes) + 1)
        for node, cls in enumerate(fleet.classes):
            left[cls] += fleet.nodes[node].devices if up[node] else 0
        total = sum(left)
        chosen, passed = [], []
        for wish in wishes:
            if not wish.devices:
                continue
            if not self._within_quota(wish) or not self._reserve(wish, left):
                passed.append(wish)
                if head_blocks:
                    break
                continue
            self._charge(wish, wish.devices)
            chosen.append(wish)
            total -= wish.devices
            if total < self.least or not total:
                break
        return chosen, passed

    def _reserve(self, wish: Wish, left: list[int]) -> bool:
        """Take the devices of a wish out of what is left in each class of nodes, if there are enough."""
        if len(left) == 1 and not wish.kinds:
            if left[0] < wish.devices:
                return False
            left[0] -= wish.devices
            return True
        fleet = self.fleet
        if self._stays(wish):
            held = [0] * len(left)
            for node, count in wish.entry.counts:
                held[fleet.classes[node]] += count
            if all(have >= need for have, need in zip(left, held, strict=True)):
                for cls, need in enumerate(held):
                    left[cls] -= need
                return True
        classes = sorted({fleet.classes[node] for node in fleet.eligible(_tied(wish))})
        if sum(left[cls] for cls in classes) < wish.devices:
            return False
        missing = wish.devices
        for cls in classes:
            taken = min(missing, left[cls])
            left[cls] -= taken
            missing -= taken
        return True

    def _shrunk(self, wish: Wish) -> Counts | None:
        """Fewer of the devices that it has, where it should have fewer: taken from where it has the fewest."""
        entry = wish.entry
        if not entry.running or entry.host >= 0 or entry.devices <= wish.devices or wish.kinds:
            return None
        spare, kept = entry.devices - wish.devices, []
        for node, count in sorted(entry.counts, key=lambda item: (item[1], -item[0])):
            gone = min(spare, count)
            spare -= gone
            if count > gone:
                kept.append((node, count - gone))
        kept.sort()
        return tuple(kept) if all(self.free[node] >= count for node, count in kept) else None

    def _make_room(self, wish: Wish, place: int, order: Mapping[int, int], stay: dict[int, Wish]) -> Counts | None:
        """A place among the devices of those that come later, who must then look for others."""
        later = sorted((number for number in stay if order[number] > place), key=order.__getitem__, reverse=True)
        if not later:
            return None
        loose = list(self.free)
        for number in later:
            for node, count in stay[number].entry.counts:
                loose[node] += count
        counts = self._place(wish, loose)
        if counts is None:
            return None
        for node, count in counts:
            for number in later:
                if self.free[node] >= count:
                    break
                if number in stay and any(held == node for held, _ in stay[number].entry.counts):
                    for held, devices in stay.pop(number).entry.counts:
                        self.free[held] += devices
                    del self.targets[number]
        return counts

    def _fill(self, running: Iterable[Wish], rest: Iterable[Wish]) -> None:
        """What those left free who found no good place: first for those that hold it, then for those that wait."""
        for wish in running:
            if wish.devices and self._stays(wish) and self._within_quota(wish):
                counts = wish.entry.counts
                if all(self.free[node] >= count for node, count in counts):
                    self._give(wish, counts)
                    self._charge(wish, wish.devices)
        left = sum(self.free)
        for wish in rest:
            if left < self.least or not left:
                return
            if wish.entry.running or not 0 < wish.devices <= left or not self._within_quota(wish):
                continue
            counts = self._try(wish)
            if counts is not None:
                self._give(wish, counts)
                self._charge(wish, wish.devices)
                left -= wish.devices

    # ------------------------------------------------------------------------------------------ sharing and moving

    def share(self, wish: Wish) -> None:
        host = self.targets[wish.host]
        if host.host < 0 and self._within_quota(wish):
            self.targets[wish.entry.number] = Target(host.counts, wish.host)
            self._charge(wish, wish.devices)

    def improve(self, wishes: Sequence[Wish], improvable: Improvable) -> None:
        """Move those that run spread to where they are together, if that pays."""
        shared = {target.host for target in self.targets.values() if target.host >= 0}
        for wish in wishes:
            entry = wish.entry
            target = self.targets.get(entry.number)
            if target is None or not self._stays(wish) or target.counts != entry.counts or entry.number in shared:
                continue
            if len(entry.counts) <= self.fleet.fewest_nodes(entry.job, entry.devices):
                continue
            loose = list(self.free)
            for node, count in entry.counts:
                loose[node] += count
            counts = self._place(wish, loose)
            if counts is not None and len(counts) < len(entry.counts) and improvable(entry, counts):
                self.free = loose
                self._give(wish, counts)
