"""What holds for every attempt at a step: who is alike, what each has to do, how fast devices and links are over time.

Faults are put into paces here: how fast a team computes and an axis communicates from which moment on. A link that
changes is judged by the predictor, asked again about the cluster as it is from then on.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from headway.errors import DisconnectedError
from headway.hardware.cluster import Cluster
from headway.plan.plan import Plan
from headway.predict.parts import Parts
from headway.predict.step import Predictor
from headway.simulate.faults import DeviceLost, DeviceSlowed, Fault, LinkChanged
from headway.simulate.streams import Pace
from headway.simulate.symmetry import Team, kinds_of
from headway.simulate.work import Work, work_of

__all__ = ["Links", "Setting"]


class Links(NamedTuple):
    """How fast the axes of each pipeline rank communicate, by (axis, pipeline rank); and what cannot be mended."""

    paces: dict[tuple[str, int], list[tuple[float, float]]]
    cut: tuple[LinkChanged, ...]  # no way round it


class Setting:
    """What does not change from one attempt to the next."""

    def __init__(
        self, predictor: Predictor, plan: Plan, slower: dict[int, float], jitter: float, faults: tuple[Fault, ...],
        seed: int,
    ) -> None:  # fmt: skip
        self.predictor = predictor
        self.plan = plan
        self.slower = slower
        self.jitter = jitter
        self.faults = faults
        self.seed = seed
        self.parts: Parts = predictor.parts(plan)
        self.rank_of = {name: rank for rank, name in enumerate(plan.devices)}
        cluster = predictor.cluster
        self.device_of = {device.name: device for device in cluster.devices}
        self.kinds = kinds_of(plan, self._own)
        works: dict[tuple, Work] = {}
        self.works = [self._work_of(kind.one, works) for kind in self.kinds]  # by kind
        # Times that were measured do not follow links that change: what a change does is asked of the formulas.
        usual = self.parts
        if predictor.measured is not None and any(isinstance(fault, LinkChanged) for fault in faults):
            usual = Predictor(predictor.workload, cluster, predictor.profile).parts(plan)
        self.usual = _axis_seconds(usual, plan)
        self.links = self._follow_links()

    # -- what sets ranks apart

    def _own(self, team: Team) -> Hashable:
        """What distinguishes a team from others of its pipeline rank."""
        names = [self.plan.devices[rank] for rank in team.ranks]
        hit = tuple(
            (position, fault.device)
            for position, fault in enumerate(self.faults)
            if not isinstance(fault, LinkChanged) and fault.device in names
        )
        slow = tuple((at, self.slower[rank]) for at, rank in enumerate(team.ranks) if rank in self.slower)
        kinds = frozenset(self.device_of[name].accelerator for name in names)
        return (self.micro_batches(team), slow, hit, kinds, team.first if self.jitter else 0)

    def micro_batches(self, team: Team) -> int:
        """How many micro-batches a team works through: its share, where replicas have different ones."""
        if self.plan.shares:
            return max(self.plan.shares[team.first : team.stop], default=self.plan.micro_batches)
        return self.plan.micro_batches

    def _work_of(self, team: Team, known: dict[tuple, Work]) -> Work:
        cluster = self.predictor.cluster
        names = dict.fromkeys(self.device_of[self.plan.devices[rank]].accelerator for rank in team.ranks)
        key = (team.pipeline, *names)
        if key not in known:
            kinds = tuple(cluster.accelerators[name] for name in names)
            known[key] = work_of(self.predictor, self.plan, team.pipeline, kinds)
        return known[key]

    def pace_of(self, ranks: Sequence[int], gone: set[int]) -> Pace:
        """How fast these ranks compute when each waits for the slowest of them, `gone` faults left out."""
        names = {self.plan.devices[rank] for rank in ranks}
        base = {self.plan.devices[rank]: self.slower.get(rank, 1.0) for rank in ranks}
        slowed = [fault for fault in self.faults if isinstance(fault, DeviceSlowed) and fault.device in names]
        lost = [
            fault.seconds
            for position, fault in enumerate(self.faults)
            if isinstance(fault, DeviceLost) and fault.device in names and position not in gone
        ]
        times = {0.0, *(fault.seconds for fault in slowed), *lost}
        times |= {fault.seconds + fault.lasts_seconds for fault in slowed if fault.lasts_seconds}
        changes = []
        for time in sorted(times):
            factors = dict(base)
            for fault in slowed:
                if fault.seconds <= time and not (fault.lasts_seconds and time >= fault.seconds + fault.lasts_seconds):
                    factors[fault.device] *= fault.factor
            changes.append((time, 0.0 if any(when <= time for when in lost) else 1 / max(factors.values())))
        return Pace(changes if any(speed != 1.0 for _, speed in changes) else ())

    # -- links

    def _follow_links(self) -> Links:
        """What changed links do to each axis: the predictor is asked again about the cluster as it is from then on."""
        changed = [fault for fault in self.faults if isinstance(fault, LinkChanged)]
        if not changed:
            return Links({}, ())
        times = {fault.seconds for fault in changed}
        times |= {fault.seconds + fault.lasts_seconds for fault in changed if fault.lasts_seconds}
        usual = self.usual
        paces: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in usual}
        cut: list[LinkChanged] = []
        for time in sorted(times):
            active = [
                fault
                for fault in changed
                if fault.seconds <= time and not (fault.lasts_seconds and time >= fault.seconds + fault.lasts_seconds)
            ]
            try:
                predictor = Predictor(
                    self.predictor.workload, _altered(self.predictor.cluster, active), self.predictor.profile
                )
                now = _axis_seconds(predictor.parts(self.plan), self.plan)
            except DisconnectedError:
                now = dict.fromkeys(usual, math.inf)
                cut += [fault for fault in active if not fault.scale and fault not in cut]
            for key, seconds in usual.items():
                paces[key].append((time, seconds / now[key] if seconds else 1.0))
        return Links(paces, tuple(cut))


def _axis_seconds(parts: Parts, plan: Plan) -> dict[tuple[str, int], float]:
    """How long each axis of each pipeline rank communicates, by itself."""
    found: dict[tuple[str, int], float] = {}
    for rank in range(plan.pipeline):
        held = [parts.stages[at] for at in plan.stages_of(rank)]
        inside = sum(
            each.forward + each.backward for stage in held for each in (stage.tensor, stage.context, stage.expert)
        )
        data = sum(each.forward + each.backward for stage in held for each in (stage.gather, stage.scatter))
        own = parts.ranks[rank]
        found["inside", rank] = inside
        found["data", rank] = data + own.exchanged + own.after
        found["send", rank] = parts.sends[rank]
    found["loss", 0] = parts.loss
    return found


def _altered(cluster: Cluster, faults: Sequence[LinkChanged]) -> Cluster:
    """The cluster while these faults last."""
    scale: dict[tuple[str, str], float] = {}
    for fault in faults:
        there, back = (fault.source, fault.target), (fault.target, fault.source)
        for pair in (there, back) if fault.both_ways else (there,):
            scale[pair] = scale.get(pair, 1.0) * fault.scale
    links = []
    for link in cluster.links:
        share = scale.get((link.source, link.target), 1.0)
        if share:
            fields = {name: getattr(link, name) for name in link.__struct_fields__}
            links.append(type(link)(**{**fields, "bytes_per_second": link.bytes_per_second * share}))
    fields = {name: getattr(cluster, name) for name in cluster.__struct_fields__}
    return Cluster(**{**fields, "links": tuple(links)})
