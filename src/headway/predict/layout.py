"""Where a plan's ranks are: kinds of device, the channels of their groups, and what sending between stages costs."""

from __future__ import annotations

from typing import NamedTuple

from headway.hardware.cluster import Accelerator, Cluster
from headway.plan.plan import Plan
from headway.predict import communication as comm
from headway.predict.communication import Channel, Communication
from headway.predict.operators import elements_of
from headway.predict.programs import Programs
from headway.workload.graph import TensorKind, Workload, dtype_bytes

__all__ = ["Channels", "Layout", "Layouts"]


class Channels(NamedTuple):
    """What the groups of one pipeline rank have to communicate with. `replicas`: data x context."""

    tensor: Channel
    replicas: Channel
    context: Channel
    expert: Channel
    expert_replicas: Channel


class Layout(NamedTuple):
    """Where a plan's ranks are: the kinds of device and the channels of each pipeline rank, and between them.

    `along[r]`: from pipeline rank r to the next. `world`: of all ranks together. `rows`: a number for the kinds and
    channels of each pipeline rank, equal ones alike.
    """

    kinds: tuple[tuple[Accelerator, ...], ...]
    channels: tuple[Channels, ...]
    along: tuple[Channel, ...]
    world: Channel
    rows: tuple[int, ...]


class Layouts:
    """The layouts of plans for one workload on one cluster; what plans share is found once."""

    def __init__(self, workload: Workload, cluster: Cluster, communication: Communication) -> None:
        self.graph, self.recipe = workload.graph, workload.recipe
        self.cluster = cluster
        self.communication = communication
        self.programs = Programs(communication)
        self._known: dict[tuple, Layout] = {}
        self._rows: dict[tuple[tuple[str, ...], Channels], int] = {}
        outputs: dict[TensorKind, int] = {}
        self._outputs = [outputs.setdefault(layer.output, len(outputs)) for layer in self.graph.layers]

    def forget(self) -> None:
        """Take the cluster's devices as they are now: their constants have changed, and no link."""
        for key, layout in self._known.items():
            kinds = tuple(tuple(self.cluster.accelerators[kind.name] for kind in kinds) for kinds in layout.kinds)
            self._known[key] = layout._replace(kinds=kinds)

    def of(self, plan: Plan) -> Layout:
        """The devices and links of a plan."""
        degrees = None if plan.is_uniform else tuple(plan.degrees(rank) for rank in range(plan.pipeline))
        order = self.communication.orders.of(plan.devices)
        key: tuple = (order.number, plan.pipeline, plan.data, plan.tensor, plan.context, plan.expert, degrees)
        named = bool(plan.collectives) and plan.exchange == "headway"  # no other exchange carries them out
        if named:
            key = (*key, *sorted(plan.collectives.items()))
        found = self._known.get(key)
        if found is None:
            channels = self._channels_of(plan)
            if named:
                channels = tuple(self._by_programs(plan, rank, row) for rank, row in enumerate(channels))
            world = self.communication.group(plan.devices)
            kinds = self.kinds_of(plan)
            rows = tuple(map(self.row_of, kinds, channels))
            found = self._known[key] = Layout(kinds, channels, self._along(plan), world, rows)
        return found

    def row_of(self, kinds: tuple[Accelerator, ...], channels: Channels) -> int:
        """The number of a pipeline rank's kinds of device and channels: equal ones have equal numbers."""
        return self._rows.setdefault((tuple(kind.name for kind in kinds), channels), len(self._rows))

    def kinds_of(self, plan: Plan) -> tuple[tuple[Accelerator, ...], ...]:
        """The kinds of device of each pipeline rank."""
        order = self.communication.orders.of(plan.devices)
        if order.kind:
            return ((self.cluster.accelerators[order.kind],),) * plan.pipeline
        names = order.kinds
        spans = ((plan.first_rank(rank), plan.width(rank)) for rank in range(plan.pipeline))
        return tuple(
            tuple(self.cluster.accelerators[kind] for kind in dict.fromkeys(names[start : start + width]))
            for start, width in spans
        )

    def channels_of(self, plan: Plan) -> tuple[Channels, ...]:
        """The channels of each pipeline rank."""
        return self.of(plan).channels

    def _by_programs(self, plan: Plan, rank: int, row: Channels) -> Channels:
        """The channels of a pipeline rank under the algorithms that the plan names."""
        return row._replace(
            tensor=self.programs.channel(plan, "tensor", rank, row.tensor),
            replicas=self.programs.channel(plan, "data", rank, row.replicas),
            context=self.programs.channel(plan, "context", rank, row.context),
            expert=self.programs.channel(plan, "expert", rank, row.expert),
        )

    def _channels_of(self, plan: Plan) -> tuple[Channels, ...]:
        axes = ("tensor", "data", "context", "expert", "expert_data")
        parallel = {"context": plan.context, "expert": plan.expert}
        if plan.is_uniform:
            shape = (plan.devices, plan.pipeline, plan.data, plan.tensor)
            columns = [self.communication.channels(*shape, axis, **parallel) for axis in axes]
            return tuple(Channels(*row) for row in zip(*columns, strict=True))
        rows = []
        for rank in range(plan.pipeline):
            start, width = plan.first_rank(rank), plan.width(rank)
            shape = (plan.devices[start : start + width], 1, *plan.degrees(rank))
            rows.append(Channels(*(self.communication.channels(*shape, axis, **parallel)[0] for axis in axes)))
        return tuple(rows)

    def _along(self, plan: Plan) -> tuple[Channel, ...]:
        if plan.pipeline == 1:
            return ()
        if plan.is_uniform:
            shape = (plan.devices, plan.pipeline, plan.data, plan.tensor)
            return self.communication.channels(*shape, "pipeline", context=plan.context)
        return tuple(self.crossing_of(plan, rank) for rank in range(plan.pipeline))

    def sends_of(self, plan: Plan, along: tuple[Channel, ...]) -> tuple[float, ...]:
        """For each pipeline rank seconds to hand one micro-batch on to the next (the last: back to the first)."""
        p = plan.pipeline
        sends = [0.0] * p
        if p == 1:
            return tuple(sends)
        known: dict[tuple[int, int], float] = {}  # by what crosses, and over what
        is_divided = plan.sequence_parallel or self.recipe.framework.startswith("megatron")
        for position in range(len(plan.stages) - 1):
            rank = position % p
            last = plan.stages[position].stop - 1
            if plan.is_uniform:
                key = (self._outputs[last], id(along[rank]))
                seconds = known.get(key)
                if seconds is None:
                    size = self._crossing_bytes(self.graph.layers[last].output, plan.micro_batch, plan) / plan.context
                    if is_divided:
                        # Each tensor-parallel rank sends its part; the receivers gather them over their own links.
                        size /= plan.tensor
                    seconds = known[key] = comm.send_seconds(size, along[rank])
            else:
                seconds = self._reshard_seconds(plan, self.graph.layers[last].output, rank, (position + 1) % p)
            if seconds > sends[rank]:
                sends[rank] = seconds
        return tuple(sends)

    def _crossing_bytes(self, kind: TensorKind, samples: float, plan: Plan) -> float:
        element = dtype_bytes(kind.dtype)
        if self.recipe.framework != "headway" and plan.precision != "float32" and kind.dtype == "float32":
            element = 2  # frameworks that keep parameters in 16 bits send 16 bits
        return elements_of(kind, samples) * element

    def _reshard_seconds(self, plan: Plan, kind: TensorKind, rank: int, following: int) -> float:
        """A micro-batch of all replicas, from one division of its samples to another."""
        channel = self.crossing_of(plan, rank)
        # As many messages as the wider side has ranks; what one of its ranks sends or receives is its samples.
        data = max(plan.degrees(rank)[0], plan.degrees(following)[0])
        size = self._crossing_bytes(kind, plan.micro_batch * plan.data / data, plan) / plan.context
        seconds = comm.send_seconds(size, channel)
        if plan.degrees(rank)[1] != plan.degrees(following)[1]:
            tensor = self.channels_of(plan)[following].tensor
            seconds += comm.all_gather_seconds(size, tensor)
        return seconds

    def crossing_of(self, plan: Plan, rank: int) -> Channel:
        """The channel from a pipeline rank to the next, whatever their widths."""
        one, two = (
            plan.devices[plan.first_rank(at) : plan.first_rank(at) + plan.width(at)]
            for at in (rank, (rank + 1) % plan.pipeline)
        )
        return self.communication.crossing(one, two)
