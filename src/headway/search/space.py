"""The space of plans: which devices, which degrees, which micro-batches and schedules are possible at all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from headway.hardware.cluster import Cluster
from headway.plan.plan import Precision, Schedule, Tier
from headway.predict.tiers import TierRates
from headway.search.ranking import Constraints
from headway.workload.graph import Graph, Workload

__all__ = ["Group", "Mesh", "Placement", "Space", "Split", "States"]

# All divisors are tried as micro-batches while there are this many; beyond, the powers of two among them.
_FEW_DIVISORS = 12
# Numbers of devices that fill whole nodes are all tried up to so many nodes; beyond, the divisors and powers of two.
_FEW_NODES = 16
_VIRTUAL_STAGES = (2, 4, 8)
_Places = tuple[Tier, Tier, Tier, float, bool]
# Shares of an optimizer off the device that stay there all the same.
_KEPT = (0.0, 0.25, 0.5, 0.75)
# Ring attention pays where sequences are long: a rank is left at least so many tokens of each sample.
_LEAST_TOKENS = 1024


@dataclass(frozen=True, eq=False)
class Placement:
    """Devices in the order in which the mesh takes them; compared by identity, because there may be thousands."""

    devices: tuple[str, ...]
    kinds: tuple[str, ...]  # the accelerator of each device
    dollars_per_hour: float  # of all of them; 0: a price is not known

    def rank_kinds(self, pipeline: int) -> tuple[tuple[str, ...], ...]:
        """The kinds of device on each of `pipeline` pipeline ranks, each kind once."""
        if len(set(self.kinds)) == 1:
            return (self.kinds[:1],) * pipeline
        width = len(self.kinds) // pipeline
        return tuple(
            tuple(sorted(set(self.kinds[start : start + width]))) for start in range(0, len(self.kinds), width)
        )


class Split(NamedTuple):
    """How tensor parallelism of one degree divides the model: the blocks that the degree divides, and their modules."""

    degree: int
    blocks: frozenset[int]
    sharding: dict[str, Literal["column", "row"]]


class Mesh(NamedTuple):
    """Degrees on a placement; the product of all but `expert` is the number of its devices."""

    placement: Placement
    data: int
    tensor: int
    pipeline: int
    context: int = 1
    expert: int = 1

    @property
    def replicas(self) -> int:
        """Ranks that hold the same parameters (but for experts), sum gradients and divide states."""
        return self.data * self.context


class States(NamedTuple):
    """How replicas divide the states among them, and where those rest (see `Plan`).

    With `activations_on` off the device a plan swaps as many layers as make it fit, where others recompute them.
    """

    zero_stage: Literal[0, 1, 2, 3]
    parameters_on: Tier = "device"
    optimizer_on: Tier = "device"
    activations_on: Tier = "device"
    optimizer_kept: float = 0.0
    delayed_update: bool = False

    @property
    def is_here(self) -> bool:
        """Whether everything rests on the device."""
        return self.parameters_on == self.optimizer_on == self.activations_on == "device"


class Group(NamedTuple):
    """Plans of one mesh that differ only in their states (ZeRO stage, tiers) and in what they recompute."""

    schedule: Schedule
    virtual_stages: int
    micro_batch: int
    micro_batches: int


class Space:
    """All plans of one workload on one cluster within constraints, enumerated level by level.

    `devices`: how many to use; None: any number that divides the cluster's, is a power of two, or fills whole nodes.
    """

    def __init__(self, workload: Workload, cluster: Cluster, constraints: Constraints, devices: int | None) -> None:
        self.workload = workload
        self.cluster = cluster
        self.constraints = constraints
        self.counts = self._counts(devices)

    @cached_property
    def layers(self) -> int:
        return len(self.workload.graph.layers)

    def _counts(self, devices: int | None) -> tuple[int, ...]:
        total = len(self.cluster)
        if devices is not None:
            return (devices,)
        counts = {*_divisors(total), *_powers_of_two(total)}
        node = max(len(positions) for positions in self.cluster.nodes.values())
        if len(self.cluster.nodes) <= _FEW_NODES:
            counts |= set(range(node, total + 1, node))
        if not self.cluster.is_homogeneous:
            fast = [device.accelerator for device in self._fastest_first()]
            counts |= {at for at in range(1, total) if fast[at - 1] != fast[at]}
        # Degrees that are asked for must not fail because their product is no such number.
        fixed = math.prod(getattr(self.constraints, name) or 1 for name in ("data", "tensor", "pipeline", "context"))
        counts |= {fixed * factor for factor in _powers_of_two(max(1, total // fixed))}
        return tuple(sorted((count for count in counts if count <= total), reverse=True))

    def _by_node(self) -> list:
        return [self.cluster.devices[at] for positions in self.cluster.nodes.values() for at in positions]

    def _fastest_first(self) -> list:
        kinds = self.cluster.accelerators
        rate = {name: kind.flop_rate(self.precision) * kind.efficiency for name, kind in kinds.items()}
        # Stable: devices of one kind stay together by node.
        return sorted(self._by_node(), key=lambda device: (-rate[device.accelerator], device.accelerator))

    @property
    def precision(self) -> Precision:
        return self.constraints.precision or self.workload.precision  # type: ignore[return-value]

    def placements(self, count: int) -> tuple[Placement, ...]:
        """Ways to choose and order `count` devices: node after node; with several kinds also one kind after another."""
        orders = [self._by_node()[:count]]
        if not self.cluster.is_homogeneous:
            fast = self._fastest_first()
            # The slow ones first: the first stages of a pipeline need the most memory, the last ones often compute
            # most (the vocabulary). The predictor decides.
            orders += [fast[:count], fast[:count][::-1], fast[::-1][:count]]
        chosen: dict[tuple[str, ...], Placement] = {}
        for order in orders:
            names = tuple(device.name for device in order)
            prices = [self.cluster.accelerators[device.accelerator].dollars_per_hour for device in order]
            chosen.setdefault(
                names,
                Placement(
                    devices=names,
                    kinds=tuple(device.accelerator for device in order),
                    dollars_per_hour=sum(prices) if all(prices) else 0.0,
                ),
            )
        return tuple(chosen.values())

    def meshes(self, placement: Placement) -> Iterator[tuple[Mesh, str]]:
        """Every way to factor the devices into degrees, each with the reason why it is impossible, or ""."""
        constraints = self.constraints
        count = len(placement.devices)
        for tensor in _divisors(count):
            if constraints.tensor not in (None, tensor):
                continue
            for pipeline in _divisors(count // tensor):
                if constraints.pipeline not in (None, pipeline):
                    continue
                for context in self.contexts(count // tensor // pipeline):
                    data = count // tensor // pipeline // context
                    if constraints.data not in (None, data):
                        continue
                    for expert in self.expert_degrees(data * context):
                        mesh = Mesh(placement, data, tensor, pipeline, context, expert)
                        yield mesh, self._obstacle(mesh)

    def contexts(self, count: int) -> tuple[int, ...]:
        """Context degrees that divide `count`."""
        fixed = self.constraints.context
        if fixed is not None or self.constraints.runnable:
            return (fixed or 1,) if count % (fixed or 1) == 0 else ()
        tokens = self.workload.graph.tokens_per_sample
        if not any(layer.attention is not None for layer in self.workload.graph.layers):
            return (1,)
        # Twice as many parts as ranks: causal attention is balanced by giving each rank an early and a late part.
        return tuple(
            degree
            for degree in _divisors(count)
            if degree == 1 or (tokens % (2 * degree) == 0 and tokens // degree >= _LEAST_TOKENS)
        )

    def expert_degrees(self, count: int) -> tuple[int, ...]:
        """Expert degrees that divide both `count` and the experts of every mixture."""
        fixed = self.constraints.expert
        if fixed is not None or self.constraints.runnable:
            return (fixed or 1,) if count % (fixed or 1) == 0 else ()
        return tuple(degree for degree in _divisors(self._experts) if count % degree == 0)

    @cached_property
    def _experts(self) -> int:
        counts = {layer.experts.count for layer in self.workload.graph.layers if layer.experts is not None}
        return math.gcd(*counts) if counts else 1

    def sequence_parallel(self, tensor: int) -> bool:
        """Whether activations outside of the blocks are divided by tokens: it costs no more, and frees memory."""
        fixed = self.constraints.sequence_parallel
        if fixed is not None or self.constraints.runnable or tensor == 1:
            return bool(fixed) and tensor > 1
        return self.workload.graph.tokens_per_sample % tensor == 0 and self.workload.graph.tokens_per_sample > 0

    def _obstacle(self, mesh: Mesh) -> str:
        if mesh.tensor > 1 and not self.split(mesh.tensor).blocks:
            return self._indivisible(mesh.tensor)
        if mesh.pipeline > self.layers:
            return f"pipeline {mesh.pipeline} is more than the {self.layers} layers there are"
        batch = self.workload.global_batch
        if batch % mesh.data:
            return f"data {mesh.data} does not divide the global batch of {batch}"
        if self.constraints.zero_stage and mesh.replicas == 1:
            return f"ZeRO-{self.constraints.zero_stage} needs more than one replica"
        if not self.groups(mesh):
            fixed = self.constraints
            if fixed.schedule is not None and (fixed.schedule != "none") != (mesh.pipeline > 1):
                return f"schedule {fixed.schedule!r} with pipeline {mesh.pipeline}"
            if fixed.micro_batch is not None and batch // mesh.data % fixed.micro_batch:
                return f"micro-batches of {fixed.micro_batch} do not divide {batch // mesh.data} samples of a replica"
            return f"no micro-batches fit schedule {fixed.schedule!r} with pipeline {mesh.pipeline}"
        return ""

    def _indivisible(self, tensor: int) -> str:
        graph = self.workload.graph
        if not graph.blocks:
            return "no part of this model was proven to work on divided tensors"
        what = sorted({(block.divisor, _noun(graph, position)) for position, block in enumerate(graph.blocks)})
        return f"tensor {tensor} does not divide " + " or ".join(f"{size} {noun}" for size, noun in what)

    def split(self, degree: int) -> Split:
        """The blocks that `degree` divides; those that it does not stay whole on every rank."""
        found = self._splits.get(degree)
        if found is None:
            blocks = [
                position
                for position, block in enumerate(self.workload.graph.blocks)
                if degree > 1 and block.divisor % degree == 0
            ]
            sharding: dict[str, Literal["column", "row"]] = {}
            for position in blocks:
                block = self.workload.graph.blocks[position]
                sharding.update((name, "column") for name in block.columns)
                sharding.update((name, "row") for name in block.rows)
            found = self._splits[degree] = Split(degree, frozenset(blocks), sharding)
        return found

    @cached_property
    def _splits(self) -> dict[int, Split]:
        return {}

    def groups(self, mesh: Mesh) -> tuple[Group, ...]:
        """Schedules and micro-batches of a mesh."""
        key = (mesh.data, mesh.pipeline)
        found = self._groups.get(key)
        if found is None:
            found = self._groups[key] = tuple(self._enumerate_groups(*key))
        return found

    @cached_property
    def _groups(self) -> dict[tuple[int, int], tuple[Group, ...]]:
        return {}

    def _enumerate_groups(self, data: int, pipeline: int) -> Iterator[Group]:
        constraints = self.constraints
        samples = self.workload.global_batch // data
        for micro_batch in self.micro_batches(samples):
            count = samples // micro_batch
            if pipeline == 1:
                if constraints.schedule in (None, "none"):
                    yield Group("none", 1, micro_batch, count)
                continue
            if constraints.schedule in (None, "gpipe"):
                yield Group("gpipe", 1, micro_batch, count)
            if count < pipeline:
                continue
            if constraints.schedule in (None, "1f1b"):
                yield Group("1f1b", 1, micro_batch, count)
            if constraints.schedule == "zero_bubble" or (constraints.schedule is None and not constraints.runnable):
                yield Group("zero_bubble", 1, micro_batch, count)
            if constraints.schedule in (None, "interleaved") and count % pipeline == 0:
                for virtual in _VIRTUAL_STAGES:
                    if pipeline * virtual <= self.layers:
                        yield Group("interleaved", virtual, micro_batch, count)

    def micro_batches(self, samples: int) -> tuple[int, ...]:
        """Sizes of a micro-batch that divide the `samples` of a replica."""
        fixed = self.constraints.micro_batch
        if fixed is not None:
            return (fixed,) if samples % fixed == 0 else ()
        divisors = _divisors(samples)
        if len(divisors) > _FEW_DIVISORS:
            divisors = tuple(size for size in divisors if size & (size - 1) == 0 or size == samples)
        return divisors

    def states(self, mesh: Mesh) -> tuple[States, ...]:
        """ZeRO stages that make sense on a mesh, and where the states may rest."""
        fixed = self.constraints.zero_stage
        stages: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3) if mesh.replicas > 1 else (0,)
        if fixed is not None:
            stages = (fixed,)
        found = (States(stage, *places) for places in self._resting for stage in stages)
        if not self.constraints.runnable:
            return tuple(found)
        # Our runtime slices parameters that rest elsewhere over the replicas, as ZeRO 3 does.
        return tuple(one for one in found if one.parameters_on == "device" or one.zero_stage == 3 or mesh.replicas == 1)

    @cached_property
    def _resting(self) -> tuple[_Places, ...]:
        """Where states may rest: tiers of parameters, optimizer and activations, what is kept, and whether delayed.

        Parameters are needed twice in a step and the optimizer's states once, so parameters never rest further away.
        Swapped activations are weighed alone, and on the host beside states that rest elsewhere.
        """
        here: Tier = "device"
        wanted = self.constraints
        found: list[_Places] = [(here, here, here, 0.0, False)]
        if wanted.offload == "none":
            return tuple(found)
        tiers = TierRates(self.cluster).available
        # Parameters, then the optimizer; alone the optimizer may stay in part.
        pairs: list[tuple[Tier, Tier]] = [(here, tier) for tier in tiers]
        if wanted.offload == "any":
            pairs += itertools.combinations_with_replacement(tiers, 2)
        swaps: list[Tier] = [here]
        if wanted.offload == "any" and wanted.recompute in ("any", "none"):
            swaps.append("host")
            found.extend((here, here, tier, 0.0, False) for tier in tiers)
        for delayed in (False, True) if wanted.delayed_update else (False,):
            found.extend((here, tier, here, kept, delayed) for tier in tiers for kept in _KEPT if kept)
            found.extend((near, far, swap, 0.0, delayed) for swap in swaps for near, far in pairs)
        return tuple(found)


def _noun(graph: Graph, position: int) -> str:
    block = graph.blocks[position]
    sizes = {
        graph.parameter_by_name[name].shape[dim]
        for name, dim in block.parameters.items()
        if name in graph.parameter_by_name
    }
    # Features are split one by one; where fewer pieces than features are allowed, whole heads must stay together.
    return "features" if block.divisor in sizes else "heads"


def _divisors(number: int) -> tuple[int, ...]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return tuple(sorted({*small, *(number // size for size in small)}))


def _powers_of_two(most: int) -> tuple[int, ...]:
    return tuple(2**exponent for exponent in range(most.bit_length()))
