"""Where a gang goes: one small class for each rule.

A rule sees how many devices are free on each node, and says how many of which it takes, or that it would rather wait.
Which devices of a node they are doesn't matter to any rule; the scheduler takes the lowest numbers.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from headway.errors import InputError
from headway.schedule.fleet import Fleet
from headway.schedule.job import Job, ModelProfile

__all__ = [
    "PLACEMENTS",
    "SKEW_THRESHOLD",
    "BestFit",
    "Consolidated",
    "FirstFit",
    "Placement",
    "Random",
    "SkewBased",
    "make_placement",
]

Counts = tuple[tuple[int, int], ...]  # (place of the node in the fleet, devices of it)

# Between GoogleNet, 14.6 %, which need not be consolidated, and AlexNet, 61.0 %, which must (Tiresias, section 3.3).
SKEW_THRESHOLD = 0.3


class Placement:
    """A rule of placement. `always_fits`: it takes any devices that are enough in number, and so never waits."""

    name = ""
    always_fits = True

    def place(self, job: Job, devices: int, free: Sequence[int], fleet: Fleet, turn: int) -> Counts | None:
        """(node, devices of it) for a gang, or None to wait for a better place.

        `free[i]` devices are free on `fleet.nodes[i]`, 0 on nodes that are down. `turn` differs between any two
        placements of a run, and is the same when the run is repeated.
        """
        raise NotImplementedError

    def alike(self, job: Job) -> Hashable:
        """Jobs for which this is equal find the same place if they have as many devices; None: unknown.

        Where one found none, the others of its pass are spared the search, unless something was given back meanwhile.
        """
        return None


class FirstFit(Placement):
    """The first free devices in the order of the nodes, however scattered."""

    name = "first-fit"

    def place(self, job: Job, devices: int, free: Sequence[int], fleet: Fleet, turn: int) -> Counts | None:
        """As in `Placement`."""
        return _take(devices, fleet.eligible(job), free)


class BestFit(Placement):
    """The node that it fills best; if none holds all of it, the fullest nodes first, so that empty ones stay empty."""

    name = "best-fit"

    def place(self, job: Job, devices: int, free: Sequence[int], fleet: Fleet, turn: int) -> Counts | None:
        """As in `Placement`."""
        nodes = fleet.eligible(job)
        found = _snuggest(devices, nodes, free)
        if found >= 0:
            return ((found, devices),)
        return _take(devices, sorted((node for node in nodes if free[node]), key=lambda node: (free[node], node)), free)


class Consolidated(Placement):
    """As few nodes as possible now, in one rack if one has room, each filled as well as possible.

    `strict`: as few nodes as possible at all, or it waits: YARN's capacity scheduler as Tiresias describes it
    (section 6.1).
    """

    name = "consolidated"

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self.always_fits = not strict

    def alike(self, job: Job) -> Hashable:
        """What nodes it can use."""
        return (job.kinds, job.memory_bytes)

    def place(self, job: Job, devices: int, free: Sequence[int], fleet: Fleet, turn: int) -> Counts | None:
        """As in `Placement`."""
        nodes = fleet.eligible(job)
        found = _snuggest(devices, nodes, free)
        if found >= 0:
            return ((found, devices),)
        if self.strict and fleet.fewest_nodes(job, devices) == 1:
            return None
        counts = _together(devices, nodes, free, fleet)
        if self.strict and counts is not None and len(counts) > fleet.fewest_nodes(job, devices):
            return None
        return counts


class Random(Placement):
    """Devices drawn from all free ones, by a counter-based generator: the same seed, the same places."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def place(self, job: Job, devices: int, free: Sequence[int], fleet: Fleet, turn: int) -> Counts | None:
        """As in `Placement`."""
        nodes = fleet.eligible(job)
        left = [free[node] for node in nodes]
        total = sum(left)
        if total < devices:
            return None
        state = _mixed(self.seed * 0x9E3779B97F4A7C15 + turn)
        taken = [0] * len(nodes)
        for _ in range(devices):
            state = _mixed(state + 0x9E3779B97F4A7C15)
            drawn = state % total
            for place, count in enumerate(left):
                if drawn < count:
                    left[place] -= 1
                    taken[place] += 1
                    break
                drawn -= count
            total -= 1
        return tuple((node, count) for node, count in zip(nodes, taken, strict=True) if count)


class SkewBased(Placement):
    """Tiresias (Gu et al., NSDI 2019, section 3.3): consolidate only the jobs whose tensors are skewed.

    A job whose model's largest tensor is above `threshold` of all waits until it can be on as few nodes as possible;
    any other takes what is free on the fullest nodes, and leaves the empty ones to those that need them. A job of which
    nothing is known counts as not skewed.
    """

    name = "skew"
    always_fits = False

    def __init__(self, profiles: Mapping[str, ModelProfile] | None = None, *, threshold: float = SKEW_THRESHOLD):
        self.profiles = dict(profiles or {})
        self.threshold = threshold
        self._skewed = Consolidated(strict=True)
        self._other = BestFit()

    def consolidates(self, job: Job) -> bool:
        """Whether the job must be on as few nodes as possible."""
        profile = self.profiles.get(job.model)
        return profile is not None and profile.skew > self.threshold

    def alike(self, job: Job) -> Hashable:
        """What nodes it can use, and whether it must be consolidated."""
        return (job.kinds, job.memory_bytes, self.consolidates(job))

    def place(self, job: Job, devices: int, free: Sequence[int], fleet: Fleet, turn: int) -> Counts | None:
        """As in `Placement`."""
        rule = self._skewed if self.consolidates(job) else self._other
        return rule.place(job, devices, free, fleet, turn)


PLACEMENTS = ("first-fit", "best-fit", "consolidated", "consolidated-strict", "random", "skew", "program")


def make_placement(
    name: str, *, profiles: Mapping[str, ModelProfile] | None = None, seed: int = 0, threshold: float = SKEW_THRESHOLD
) -> Placement:
    """The rule of that name (see `PLACEMENTS`). Raises InputError for another."""
    if name == "program":
        from headway.schedule.placement.program import ProgramPlacement  # imported late: it wants an optional solver

        return ProgramPlacement(profiles=profiles)
    made = {
        "first-fit": FirstFit,
        "best-fit": BestFit,
        "consolidated": Consolidated,
        "consolidated-strict": lambda: Consolidated(strict=True),
        "random": lambda: Random(seed),
        "skew": lambda: SkewBased(profiles, threshold=threshold),
    }.get(name)
    if made is None:
        raise InputError(
            f"no placement is named {name!r}", place="placement", remedy=f"one of: {', '.join(PLACEMENTS)}"
        )
    return made()


def _take(devices: int, nodes: Sequence[int], free: Sequence[int]) -> Counts | None:
    counts = []
    for node in nodes:
        if free[node] >= devices:
            counts.append((node, devices))
            return tuple(counts)
        if free[node]:
            counts.append((node, free[node]))
            devices -= free[node]
    return None


def _snuggest(devices: int, nodes: Sequence[int], free: Sequence[int]) -> int:
    """The first of the nodes with the fewest free devices that are enough; -1 if there is none."""
    found, fewest = -1, 0
    for node in nodes:
        count = free[node]
        if count >= devices and (found < 0 or count < fewest):
            if count == devices:
                return node
            found, fewest = node, count
    return found


def _together(devices: int, nodes: Sequence[int], free: Sequence[int], fleet: Fleet) -> Counts | None:
    """On the fewest nodes, within one rack if that takes no more of them."""
    everywhere = _fewest(devices, nodes, free)
    if everywhere is None or len({fleet.nodes[node].rack for node, _ in everywhere}) == 1:
        return everywhere
    racks: dict[str, list[int]] = {}
    for node in nodes:
        racks.setdefault(fleet.nodes[node].rack, []).append(node)
    for rack in racks.values():
        within = _fewest(devices, rack, free)
        if within is not None and len(within) <= len(everywhere):
            return within
    return everywhere


def _fewest(devices: int, nodes: Sequence[int], free: Sequence[int]) -> Counts | None:
    """The emptiest nodes first; what remains goes where it fits best."""
    counts = []
    order = sorted((node for node in nodes if free[node]), key=lambda node: (-free[node], node))
    for position, node in enumerate(order):
        if free[node] >= devices:
            last = _snuggest(devices, sorted(order[position:]), free)
            return (*counts, (last, devices))
        counts.append((node, free[node]))
        devices -= free[node]
    return None


def _mixed(word: int) -> int:
    """SplitMix64's finaliser (Steele et al., OOPSLA 2014)."""
    word &= 0xFFFFFFFFFFFFFFFF
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return word ^ (word >> 31)
