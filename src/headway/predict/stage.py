"""What one micro-batch costs in one stage of a plan: compute, and the communication between the ranks of the stage.

Tensor-parallel collectives stand between operators that need their result, so compute waits for them. Keys and values
on their way round a context group, ZeRO's parameters and gradients, and copies between memory tiers run beside compute;
what compute cannot hide shows, and what it does hide slows it down (`Efficiency.slowdown`).
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from headway.hardware.cluster import Accelerator, Cluster
from headway.plan.plan import Plan, Stage
from headway.predict import communication as comm
from headway.predict.communication import Channel, Communication
from headway.predict.efficiency import DEEPSPEED_GATHER, PLAIN_HOST, Efficiency, efficiency_of
from headway.predict.latency import Latency
from headway.predict.measured import MeasuredTimes
from headway.predict.memory import ParameterBytes, Sizes
from headway.predict.operators import Shards, elements_of
from headway.predict.parts import Exchange, StageParts
from headway.predict.profile import Profile
from headway.predict.programs import Programs
from headway.predict.splits import Splits
from headway.predict.tiers import TierRates, wire_bytes
from headway.workload.graph import TensorKind, Workload, dtype_bytes

__all__ = ["Channels", "LayerTimes", "Layout", "StageTimes", "hidden_behind", "repeated"]

# FSDP gathers in the dtype that computes; nothing is sent in 4 bits.
_WIRE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8": 1.0, "float4": 1.0}


class Channels(NamedTuple):
    """What the groups of one pipeline rank have to communicate with. `replicas`: data x context."""

    tensor: Channel
    replicas: Channel
    context: Channel
    expert: Channel
    expert_replicas: Channel


class Layout(NamedTuple):
    """Where a plan's ranks are: the kinds of device and the channels of each pipeline rank, and between them.

    `along[r]`: from pipeline rank r to the next. `world`: of all ranks together.
    """

    kinds: tuple[tuple[Accelerator, ...], ...]
    channels: tuple[Channels, ...]
    along: tuple[Channel, ...]
    world: Channel


class LayerTimes(NamedTuple):
    """For one micro-batch, seconds of all layers before each position, by kind (see `LayerTime`)."""

    forward: list[float]
    backward: list[float]
    weight: list[float]
    attention: list[float]
    host_forward: list[float]
    host_backward: list[float]


class _Sending(NamedTuple):
    """Collectives of one micro-batch in one stage: (bytes, count) of each kind, forward and backward."""

    reduces: tuple[tuple[float, int], ...]
    reduces_back: tuple[tuple[float, int], ...]
    keys_values: float
    dispatched: tuple[float, ...]


class _Work(NamedTuple):
    forward: float
    backward: float  # without recomputation
    weight: float
    recompute: float
    attention: float
    host_forward: float
    host_backward: float


class StageTimes:
    """Times of stages of one workload on one cluster; what plans share is computed once."""

    def __init__(
        self,
        workload: Workload,
        cluster: Cluster,
        profile: Profile | None,
        sizes: Sizes,
        communication: Communication,
        measured: MeasuredTimes | None = None,
        splits: Splits | None = None,
    ) -> None:
        self.workload = workload
        self.graph = workload.graph
        self.recipe = workload.recipe
        self.cluster = cluster
        self.profile = profile
        self.sizes = sizes
        self.communication = communication
        self.programs = Programs(communication)
        self.measured = measured
        self.splits = splits or Splits(workload.graph)
        self.tiers = TierRates(cluster)
        self._position = {device.name: position for position, device in enumerate(cluster.devices)}
        self._latencies: dict[tuple[str, bool], Latency] = {}
        self._times: dict[tuple, LayerTimes] = {}
        self._work: dict[tuple, _Work] = {}
        self._sending: dict[tuple, _Sending] = {}
        self._parts: dict[tuple, StageParts] = {}
        self._layouts: dict[tuple, Layout] = {}

    def forget(self) -> None:
        """Drop every time, and keep what is known of channels and sizes: the constants have changed."""
        for known in (self._latencies, self._times, self._work, self._parts):
            known.clear()
        for key, layout in self._layouts.items():
            kinds = tuple(tuple(self.cluster.accelerators[kind.name] for kind in kinds) for kinds in layout.kinds)
            self._layouts[key] = layout._replace(kinds=kinds)

    # -------------------------------------------------------------------------------------------------- who is there

    def shards_of(self, plan: Plan, rank: int = 0) -> Shards:
        """How tensor parallelism divides the model on a pipeline rank (`Splits.of`)."""
        return self.splits.of(plan, rank)

    def layout_of(self, plan: Plan) -> Layout:
        """The devices and links of a plan."""
        degrees = None if plan.is_uniform else tuple(plan.degrees(rank) for rank in range(plan.pipeline))
        key: tuple = (plan.devices, plan.pipeline, plan.data, plan.tensor, plan.context, plan.expert, degrees)
        named = bool(plan.collectives) and plan.exchange == "headway"  # no other exchange carries them out
        if named:
            key = (*key, *sorted(plan.collectives.items()))
        found = self._layouts.get(key)
        if found is None:
            channels = self._channels_of(plan)
            if named:
                channels = tuple(self._by_programs(plan, rank, row) for rank, row in enumerate(channels))
            world = self.communication.group(plan.devices)
            found = self._layouts[key] = Layout(self.kinds_of(plan), channels, self._along(plan), world)
        return found

    def kinds_of(self, plan: Plan) -> tuple[tuple[Accelerator, ...], ...]:
        """The kinds of device of each pipeline rank."""
        names = [self.cluster.devices[self._position[name]].accelerator for name in plan.devices]
        spans = ((plan.first_rank(rank), plan.width(rank)) for rank in range(plan.pipeline))
        return tuple(
            tuple(self.cluster.accelerators[kind] for kind in dict.fromkeys(names[start : start + width]))
            for start, width in spans
        )

    def channels_of(self, plan: Plan) -> tuple[Channels, ...]:
        """The channels of each pipeline rank."""
        return self.layout_of(plan).channels

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
        for position in range(len(plan.stages) - 1):
            rank, following = position % p, (position + 1) % p
            kind = self.graph.layers[plan.stages[position].stop - 1].output
            if plan.is_uniform:
                size = self._crossing_bytes(kind, plan.micro_batch, plan) / plan.context
                if plan.sequence_parallel or self.recipe.framework.startswith("megatron"):
                    # Each tensor-parallel rank sends its part; the receivers gather them over their own links.
                    size /= plan.tensor
                seconds = comm.send_seconds(size, along[rank])
            else:
                seconds = self._reshard_seconds(plan, kind, rank, following)
            sends[rank] = max(sends[rank], seconds)
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

    def latency(self, kind: Accelerator, crowded: bool) -> Latency:
        """Times of operators on one kind of device."""
        key = (kind.name, crowded)
        found = self._latencies.get(key)
        if found is None:
            slower = (self.cluster.contention, self.cluster.memory_contention) if crowded else (1.0, 1.0)
            found = self._latencies[key] = Latency(
                self.graph, kind, self.profile, *slower, crowded, efficiency=self.efficiency(kind), recipe=self.recipe,
                measured=self.measured,
            )  # fmt: skip
        return found

    def efficiency(self, kind: Accelerator) -> Efficiency | None:
        """The constants of a catalogued GPU; None on a machine that was probed, whose figures were measured."""
        return None if self.cluster.fingerprint else efficiency_of(kind)

    def slowdown(self, kind: Accelerator) -> float:
        """Seconds that compute loses for each second of communication beside it."""
        efficiency = self.efficiency(kind)
        return efficiency.slowdown if efficiency is not None else 0.0

    def overlaps(self, plan: Plan, kinds: tuple[Accelerator, ...]) -> bool:
        """Whether communication runs beside compute. On a CPU it runs on the very cores that compute."""
        return plan.overlap and all(kind.torch_device != "cpu" for kind in kinds)

    # ------------------------------------------------------------------------------------------------------- compute

    def layer_times(
        self, kind: Accelerator, crowded: bool, samples: float, shards: Shards, precision: str
    ) -> LayerTimes:
        """Seconds of one micro-batch in all layers before each position."""
        key = (kind.name, crowded, samples, shards, precision)
        found = self._times.get(key)
        if found is None:
            latency = self.latency(kind, crowded)
            found = LayerTimes([0.0], [0.0], [0.0], [0.0], [0.0], [0.0])
            for position in range(len(self.graph.layers)):
                for column, seconds in zip(found, latency.layer_time(position, samples, shards, precision)):
                    column.append(column[-1] + seconds)
            self._times[key] = found
        return found

    def _work_of(
        self,
        stage: Stage,
        kinds: tuple[Accelerator, ...],
        crowded: bool,
        samples: float,
        shards: Shards,
        precision: str,
    ) -> _Work:
        key = (stage.start, stage.stop, stage.recompute, stage.recompute_attention,
               tuple(kind.name for kind in kinds), crowded, samples, shards, precision)  # fmt: skip
        found = self._work.get(key)
        if found is None:
            # Replicas and tensor-parallel ranks wait for each other: the slowest kind of device rules.
            found = max(
                (self._work_on(kind, stage, crowded, samples, shards, precision) for kind in kinds),
                key=lambda work: work.forward + work.backward + work.recompute,
            )
            self._work[key] = found
        return found

    def _work_on(
        self, kind: Accelerator, stage: Stage, crowded: bool, samples: float, shards: Shards, precision: str
    ) -> _Work:
        times = self.layer_times(kind, crowded, samples, shards, precision)

        def within(column: list[float], layers=((stage.start, stage.stop),)) -> float:
            return sum(column[stop] - column[start] for start, stop in layers)

        again = [(at, at + 1) for at in stage.recompute]
        attention = [(at, at + 1) for at in stage.recompute_attention]
        return _Work(
            forward=within(times.forward),
            backward=within(times.backward),
            weight=within(times.weight),
            recompute=within(times.forward, again) + within(times.attention, attention),
            attention=within(times.attention),
            host_forward=within(times.host_forward),
            host_backward=within(times.host_backward) + within(times.host_forward, again),
        )

    # ------------------------------------------------------------------------------------------------- communication

    def _sending_of(self, stage: Stage, samples: float, shards: Shards, precision: str) -> _Sending:
        key = (stage.start, stage.stop, stage.recompute, samples, shards, precision)
        found = self._sending.get(key)
        if found is None:
            share = 0.5 if precision != "float32" else 1.0
            there: Counter[float] = Counter()
            back: Counter[float] = Counter()
            recompute = set(stage.recompute)
            for position in shards.blocks:
                block = self.graph.blocks[position]
                if stage.start <= block.layer < stage.stop:
                    into = elements_of(block.input, samples) * dtype_bytes(block.input.dtype) * share
                    out = elements_of(block.output, samples) * dtype_bytes(block.output.dtype) * share
                    there[out] += 1
                    back[into] += 1
                    if block.layer in recompute:
                        back[out] += 1
            layers = self.graph.layers[stage.start : stage.stop]
            found = self._sending[key] = _Sending(
                tuple((size, count) for size, count in there.items() if size),
                tuple((size, count) for size, count in back.items() if size),
                sum(layer.attention.keys_values.at(samples) * share for layer in layers if layer.attention is not None),
                tuple(layer.experts.dispatched.at(samples) * share for layer in layers if layer.experts is not None),
            )
        return found

    def parts(self, plan: Plan, position: int, kinds: tuple[Accelerator, ...], channels: Channels) -> StageParts:
        """One micro-batch in the stage at `position`, on devices of these kinds (sends left out)."""
        rank = position % plan.pipeline
        samples = plan.samples_of(rank) if not plan.is_uniform else float(plan.micro_batch)
        shards = self.shards_of(plan, rank)
        stage = self.sizes.canonical(plan.stages[position], shards)
        tiers = (plan.parameters_on, plan.activations_on, plan.optimizer_on)
        key = (stage, tuple(kind.name for kind in kinds), samples, plan.context, plan.expert, shards, plan.precision,
               channels, plan.zero_stage, plan.micro_batches, plan.pipeline > 1, plan.overlap, tiers,
               len(plan.devices) > 1)  # fmt: skip
        found = self._parts.get(key)
        if found is None:
            found = self._parts[key] = self._parts_of(plan, stage, kinds, channels, samples, shards)
        return found

    def _parts_of(
        self, plan: Plan, stage: Stage, kinds: tuple[Accelerator, ...], channels: Channels, samples: float,
        shards: Shards,
    ) -> StageParts:  # fmt: skip
        crowded = len(plan.devices) > 1
        share = samples / plan.context
        slowdown = self.slowdown(kinds[0])
        work = self._work_of(stage, kinds, crowded, share, shards, plan.precision)
        tensor = self._tensor(plan, stage, share, shards, channels.tensor, work, slowdown)
        expert = self._expert(stage, share, shards, plan.precision, channels.expert)
        # While the host falls behind, the device waits, and communication fills part of that.
        host_there, host_back = self._host_seconds(plan, stage, share, shards, kinds, work, channels)
        forward, tensor_there, expert_there = _waiting(
            work.forward, host_there, tensor.exposed_forward, expert.exposed_forward
        )
        back = work.backward + work.recompute
        whole, tensor_back, expert_back = _waiting(back, host_back, tensor.exposed_backward, expert.exposed_backward)
        stretch = whole / back if back else 1.0
        tensor = tensor._replace(exposed_forward=tensor_there, exposed_backward=tensor_back)
        expert = expert._replace(exposed_forward=expert_there, exposed_backward=expert_back)
        covers = (forward, whole)
        gather, scatter = self._zero(plan, stage, shards, kinds, channels, covers)
        return StageParts(
            forward=forward,
            backward_input=(work.backward - work.weight) * stretch,
            backward_weight=work.weight * stretch,
            recompute=work.recompute * stretch,
            accumulate=self._adding_seconds(plan, stage, kinds, shards),
            tensor=tensor,
            context=self._context(plan, stage, samples, shards, channels.context, work, slowdown, kinds),
            expert=expert,
            gather=gather,
            scatter=scatter,
            transfer=self._transfer(plan, stage, share, shards, kinds, covers, slowdown),
        )

    def _host_seconds(
        self, plan: Plan, stage: Stage, samples: float, shards: Shards, kinds: tuple[Accelerator, ...], work: _Work,
        channels: Channels,
    ) -> tuple[float, float]:  # fmt: skip
        """What the host needs to start forward and backward, collectives between operators included."""
        efficiency = self.efficiency(kinds[0])
        if efficiency is None:
            return work.host_forward, work.host_backward
        share = 1.0 if self.recipe.framework.startswith("megatron") else PLAIN_HOST
        there = share * (work.host_forward + efficiency.host_micro_batch_seconds)
        back = share * work.host_backward
        if channels.tensor.size == 1:
            return there, back
        sending = self._sending_of(stage, samples, shards, plan.precision)
        each = share * efficiency.host_collective_seconds * channels.tensor.size
        there += each * sum(count for _, count in sending.reduces)
        back += each * sum(count for _, count in sending.reduces_back)
        return there, back

    def _tensor(
        self, plan: Plan, stage: Stage, share: float, shards: Shards, channel: Channel, work: _Work, slowdown: float
    ) -> Exchange:
        if channel.size == 1:
            return Exchange()
        sending = self._sending_of(stage, share, shards, plan.precision)
        there, back = (
            sum(count * self._block_seconds(plan, size, channel) for size, count in reduces)
            for reduces in (sending.reduces, sending.reduces_back)
        )
        if self.recipe.framework != "megatron" or not (plan.sequence_parallel and plan.overlap):
            return Exchange(there, back, there, back)
        # Megatron with sequence parallelism cuts products in as many pieces as there are ranks, and passes each piece
        # on while it computes the next one: only the first is waited for.
        first = 1 / channel.size
        return Exchange(
            there,
            back,
            first * there + hidden_behind(there * (1 - first), work.forward, slowdown),
            first * back + hidden_behind(back * (1 - first), work.backward + work.recompute, slowdown),
        )

    def _block_seconds(self, plan: Plan, size_bytes: float, channel: Channel) -> float:
        """The collectives of one block in one direction."""
        if not plan.sequence_parallel:
            return comm.all_reduce_seconds(size_bytes, channel)
        # Gathered before a block and reduced and scattered behind it; in backward the other way round. What is gathered
        # for products in 8 or 4 bits is sent in 8.
        gathered = size_bytes / 2 if plan.precision in ("float8", "float4") else size_bytes
        return comm.all_gather_seconds(gathered, channel) + comm.reduce_scatter_seconds(size_bytes, channel)

    def _expert(self, stage: Stage, share: float, shards: Shards, precision: str, channel: Channel) -> Exchange:
        if channel.size == 1:
            return Exchange()
        sizes = self._sending_of(stage, share, shards, precision).dispatched
        # Tokens go to their experts and their results come back; gradients take the same ways.
        seconds = 2 * sum(comm.all_to_all_seconds(size / shards.degree, channel) for size in sizes)
        return Exchange(seconds, seconds, seconds, seconds)

    def _context(
        self, plan: Plan, stage: Stage, samples: float, shards: Shards, channel: Channel, work: _Work, slowdown: float,
        kinds: tuple[Accelerator, ...],
    ) -> Exchange:  # fmt: skip
        """Ring attention: keys and values of all other ranks pass by, while scores with those at hand are computed."""
        if channel.size == 1:
            return Exchange()
        size = self._sending_of(stage, samples, shards, plan.precision).keys_values / shards.degree
        layers = sum(layer.attention is not None for layer in self.graph.layers[stage.start : stage.stop])
        seconds = repeated(comm.all_gather_seconds, size, layers, channel)
        there, back = seconds, 2 * seconds
        if not self.overlaps(plan, kinds):
            return Exchange(there, back, there, back)
        return Exchange(
            there,
            back,
            hidden_behind(there, work.attention, slowdown),
            # Backward through the scores is twice the work of forward.
            hidden_behind(back, 2 * work.attention, slowdown),
        )

    def _zero(
        self, plan: Plan, stage: Stage, shards: Shards, kinds: tuple[Accelerator, ...], channels: Channels,
        covers: tuple[float, float],
    ) -> tuple[Exchange, Exchange]:  # fmt: skip
        """`fully_shard`'s collectives in one micro-batch: parameters gathered, gradients reduced and scattered.

        Stage 2 gathers the parameters before forward and keeps them until backward; stage 3 gathers them again for
        backward. Each layer is one collective. Where communication runs beside compute, the next layer is gathered
        while this one computes, so only the first gather, the last scatter and what compute cannot cover show.
        """
        channel = channels.replicas
        if plan.zero_stage < 2 or channel.size == 1:
            return Exchange(), Exchange()
        units = sum(self.sizes.units[stage.start : stage.stop])
        size = self.sizes.parameters(stage.start, stage.stop, shards, plan.expert)
        gathered, scattered = self.gathered_bytes(plan, size), self.gradient_bytes(size)
        if self.recipe.framework == "megatron-deepspeed":
            channel = channel._replace(bytes_per_second=channel.bytes_per_second * DEEPSPEED_GATHER, known=None)
        gather = repeated(comm.all_gather_seconds, gathered, units, channel)
        scatter = repeated(comm.reduce_scatter_seconds, scattered, units, channel)
        # Out of the gathered buffer into the parameters, and from the gradients into the buffer to scatter: each byte
        # is read and written.
        latency = self.latency(kinds[0], len(plan.devices) > 1)
        gather += latency.streaming_seconds(2 * gathered)
        scatter += latency.streaming_seconds(2 * scattered)
        m = plan.micro_batches
        if plan.pipeline > 1:
            # A pipeline accumulates gradients unsharded and scatters once, after the last micro-batch; stage 2 keeps
            # the parameters gathered from the first on. Both are spread over the micro-batches here.
            scatter /= m
        there = gather if plan.zero_stage == 3 or plan.pipeline == 1 else gather / m
        again = gather if plan.zero_stage == 3 else 0.0
        back = again + scatter
        if not self.overlaps(plan, kinds) or not back:
            return Exchange(there, again, there, again), Exchange(0.0, scatter, 0.0, scatter)
        slowdown = self.slowdown(kinds[0])
        forward, backward = covers
        shown_there = there / units + hidden_behind(there * (1 - 1 / units), forward, slowdown)
        shown_back = back / units + hidden_behind(back * (1 - 1 / units), backward, slowdown)
        return (
            Exchange(there, again, shown_there, shown_back * again / back),
            Exchange(0.0, scatter, 0.0, shown_back * scatter / back),
        )

    def gathered_bytes(self, plan: Plan, size: ParameterBytes) -> float:
        """Bytes of parameters on the wire when they are gathered from the replicas."""
        if self.recipe.framework in ("fsdp", "torchtitan"):
            return size.elements * _WIRE_BYTES[plan.precision]
        if self.recipe.framework == "headway":
            return size.bytes
        return size.elements * self.recipe.parameter_bytes

    def gradient_bytes(self, size: ParameterBytes) -> float:
        """Bytes of gradients on the wire, and as they add up."""
        if self.recipe.framework == "headway":
            return size.trainable_bytes
        return size.trainable_elements * self.recipe.gradient_bytes

    def _adding_seconds(self, plan: Plan, stage: Stage, kinds: tuple[Accelerator, ...], shards: Shards) -> float:
        """Seconds for each micro-batch to add its gradients to those before, and to copy the sum into buckets once."""
        size = self.gradient_bytes(self.sizes.parameters(stage.start, stage.stop, shards, plan.expert))
        m = plan.micro_batches
        if self.recipe.framework == "megatron":
            return 0.0  # its products add to the gradients as they write them
        # Adding reads two tensors and writes one; autograd hands the first micro-batch's gradients over as they are.
        moved = 3 * size * (m - 1) / m if plan.zero_stage < 2 or plan.pipeline > 1 else 0.0
        if plan.data * plan.context > 1 and plan.zero_stage < 2:
            moved += 2 * size / m
        return max(self.latency(kind, len(plan.devices) > 1).streaming_seconds(moved) for kind in kinds)

    # --------------------------------------------------------------------------------------------------- memory tiers

    def _transfer(
        self, plan: Plan, stage: Stage, share: float, shards: Shards, kinds: tuple[Accelerator, ...],
        covers: tuple[float, float], slowdown: float,
    ) -> Exchange:  # fmt: skip
        """Parameters fetched before each pass, activations sent away in forward and fetched in backward."""
        there = back = 0.0
        device = plan.devices[0]
        if plan.parameters_on != "device":
            size = self.gathered_bytes(plan, self.sizes.parameters(stage.start, stage.stop, shards, plan.expert))
            if plan.zero_stage == 3:
                size /= plan.data * plan.context
            if plan.optimizer_on != "device" and self.recipe.framework == "headway":
                size *= wire_bytes(plan.precision) / 4.0  # in 16 bits alone
            there = back = size / self.tiers.copy_rate(plan.parameters_on, device)
        if plan.activations_on != "device":
            low = 0.5 if plan.precision != "float32" else 1.0
            kept = 0.0
            for at in plan.swapped_layers(stage):
                layer = self.graph.layers[at]
                if at in stage.recompute:
                    kept += elements_of(layer.output, share) * dtype_bytes(layer.output.dtype) * low
                else:
                    divided = layer.saved_sharded.at(share)
                    kept += (layer.saved.at(share) - divided + divided / shards.degree) * low
            seconds = kept / self.tiers.copy_rate(plan.activations_on, device)
            there, back = there + seconds, back + seconds
        if not self.overlaps(plan, kinds):
            return Exchange(there, back, there, back)
        layers = stage.stop - stage.start
        # One layer's copy goes ahead of the first, the others beside compute.
        return Exchange(
            there,
            back,
            there / layers + hidden_behind(there * (1 - 1 / layers), covers[0], 0.0) if there else 0.0,
            back / layers + hidden_behind(back * (1 - 1 / layers), covers[1], 0.0) if back else 0.0,
        )


def hidden_behind(seconds: float, cover: float, slowdown: float) -> float:
    """By how much communication beside `cover` seconds of compute makes it longer.

    What is hidden slows compute down by `slowdown` seconds for each second; the rest shows. More communication never
    takes less time.
    """
    hidden = min(seconds, cover)
    return seconds - hidden + slowdown * hidden


def repeated(seconds, size_bytes: float, times: int, channel: Channel) -> float:
    """`times` collectives that move `size_bytes` between them: their cost is affine in bytes but for NCCL's choice."""
    return times * seconds(size_bytes / times, channel) if times else 0.0


def _waiting(compute: float, host: float, *exchanged: float) -> tuple[float, ...]:
    """Compute as the longer of the device's work and the host's; communication fills what the device waits."""
    waits = max(0.0, host - compute)
    total = sum(exchanged)
    left = max(0.0, total - waits)
    share = left / total if total else 0.0
    return max(compute, host), *(seconds * share for seconds in exchanged)
