"""What one micro-batch costs in one stage of a plan: compute, and the communication between the ranks of the stage.

Tensor-parallel collectives stand between operators that need their result, so compute waits for them. Keys and values
on their way round a context group, ZeRO's parameters and gradients, and copies between memory tiers run beside compute;
what compute cannot hide shows, and what it does hide slows it down (`Efficiency.slowdown`).
"""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from typing import NamedTuple

from headway.hardware.cluster import Accelerator, Cluster
from headway.plan.plan import Plan, Stage
from headway.predict import communication as comm
from headway.predict.communication import Channel, Communication
from headway.predict.efficiency import DEEPSPEED_GATHER, PLAIN_HOST, Efficiency, efficiency_of
from headway.predict.latency import Latency
from headway.predict.layout import Channels, Layouts
from headway.predict.measured import MeasuredTimes
from headway.predict.memory import Alike, ParameterBytes, Sizes
from headway.predict.operators import Shards, elements_of
from headway.predict.outline import Outline
from headway.predict.parts import NO_EXCHANGE, Exchange, StageParts
from headway.predict.profile import Profile
from headway.predict.splits import Splits
from headway.predict.tiers import TierRates, wire_bytes
from headway.workload.graph import TensorKind, Workload, dtype_bytes

__all__ = ["LayerTimes", "StageTimes", "TimedStage", "hidden_behind", "repeated"]

# FSDP gathers in the dtype that computes; nothing is sent in 4 bits.
_WIRE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "float8": 1.0, "float4": 1.0}


class LayerTimes(NamedTuple):
    """For one micro-batch, seconds of all layers before each position, by kind (see `LayerTime`)."""

    forward: list[float]
    backward: list[float]
    weight: list[float]
    attention: list[float]
    host_forward: list[float]
    host_backward: list[float]


class TimedStage(NamedTuple):
    """One micro-batch in one stage, and what is asked of it again and again: seconds (see `StageParts`)."""

    parts: StageParts
    forward: float  # `parts.forward_seconds`
    backward: float  # `parts.backward_seconds`
    compute: float  # forward and backward, exchanges excluded


class _Sending(NamedTuple):
    """Collectives of the blocks of one micro-batch in one stage: (bytes, count) of each kind, forward and backward."""

    reduces: tuple[tuple[float, int], ...]
    reduces_back: tuple[tuple[float, int], ...]


class _BlockCounts(NamedTuple):
    """How many blocks, in all layers before each position, return a tensor of this kind, or are given one."""

    kind: TensorKind
    returned: list[int]
    given: list[int]


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
        self.layouts = Layouts(workload, cluster, communication)
        self.measured = measured
        self.splits = splits or Splits(workload.graph)
        self.tiers = TierRates(cluster)
        self._latencies: dict[tuple[str, bool], Latency] = {}
        self._efficiencies: dict[str, Efficiency | None] = {}
        self._times: dict[tuple, LayerTimes] = {}
        self._work: dict[tuple, _Work] = {}
        self._blocks: dict[frozenset[int], list[_BlockCounts]] = {}
        self._sending: dict[tuple, _Sending] = {}
        # By what holds for a whole plan; then by class of stage and row.
        self._timed: dict[tuple, dict[tuple[int, int], TimedStage]] = {}

    def forget(self) -> None:
        """Drop every time, and keep what is known of channels and sizes: the constants have changed."""
        for known in (self._latencies, self._efficiencies, self._times, self._work, self._timed):
            known.clear()
        self.layouts.forget()

    # -------------------------------------------------------------------------------------------------- who is there

    def shards_of(self, plan: Plan, rank: int = 0) -> Shards:
        """How tensor parallelism divides the model on a pipeline rank (`Splits.of`)."""
        return self.splits.of(plan, rank)

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
        if kind.name not in self._efficiencies:
            self._efficiencies[kind.name] = None if self.cluster.fingerprint else efficiency_of(kind)
        return self._efficiencies[kind.name]

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
            columns = self.latency(kind, crowded).layer_times(samples, shards, precision)
            found = self._times[key] = LayerTimes(*(list(accumulate(column, initial=0.0)) for column in columns))
        return found

    def _work_of(
        self,
        alike: Alike,
        kinds: tuple[Accelerator, ...],
        crowded: bool,
        samples: float,
        shards: Shards,
        precision: str,
    ) -> _Work:
        key = (alike.number, tuple(kind.name for kind in kinds), crowded, samples, precision)
        found = self._work.get(key)
        if found is None:
            # Replicas and tensor-parallel ranks wait for each other: the slowest kind of device rules.
            found = self._work[key] = max(
                (self._work_on(kind, alike.stage, crowded, samples, shards, precision) for kind in kinds),
                key=lambda work: work.forward + work.backward + work.recompute,
            )
        return found

    def _work_on(
        self, kind: Accelerator, stage: Stage, crowded: bool, samples: float, shards: Shards, precision: str
    ) -> _Work:
        times = self.layer_times(kind, crowded, samples, shards, precision)

        def within(column: list[float]) -> float:
            return column[stage.stop] - column[stage.start]

        def of_layers(column: list[float], layers: tuple[int, ...]) -> float:
            return sum([column[at + 1] - column[at] for at in layers])

        return _Work(
            forward=within(times.forward),
            backward=within(times.backward),
            weight=within(times.weight),
            recompute=of_layers(times.forward, stage.recompute) + of_layers(times.attention, stage.recompute_attention),
            attention=within(times.attention),
            host_forward=within(times.host_forward),
            host_backward=within(times.host_backward) + of_layers(times.host_forward, stage.recompute),
        )

    # ------------------------------------------------------------------------------------------------- communication

    def _blocks_of(self, shards: Shards) -> list[_BlockCounts]:
        found = self._blocks.get(shards.blocks)
        if found is None:
            ends: dict[TensorKind, tuple[Counter[int], Counter[int]]] = {}  # by layer
            for position in shards.blocks:
                block = self.graph.blocks[position]
                for which, kind in enumerate((block.output, block.input)):
                    ends.setdefault(kind, (Counter(), Counter()))[which][block.layer] += 1
            layers = range(len(self.graph.layers))
            found = self._blocks[shards.blocks] = [
                _BlockCounts(kind, *(list(accumulate((one[at] for at in layers), initial=0)) for one in both))
                for kind, both in ends.items()
            ]
        return found

    def _sending_of(self, alike: Alike, samples: float, shards: Shards, precision: str) -> _Sending:
        key = (alike.number, samples, precision)
        found = self._sending.get(key)
        if found is None:
            stage = alike.stage
            there: Counter[float] = Counter()
            back: Counter[float] = Counter()
            for kind, returned, given in self._blocks_of(shards):
                size = elements_of(kind, samples) * dtype_bytes(kind.dtype) * _low_share(precision)
                there[size] += returned[stage.stop] - returned[stage.start]
                back[size] += given[stage.stop] - given[stage.start]
                back[size] += sum([returned[at + 1] - returned[at] for at in stage.recompute])
            found = self._sending[key] = _Sending(
                *(tuple((size, count) for size, count in sent.items() if size and count) for sent in (there, back))
            )
        return found

    def parts(self, plan: Plan, position: int, kinds: tuple[Accelerator, ...], channels: Channels) -> StageParts:
        """One micro-batch in the stage at `position`, on devices of these kinds (sends left out)."""
        rank = position % plan.pipeline
        samples = plan.samples_of(rank) if not plan.is_uniform else float(plan.micro_batch)
        shards = self.shards_of(plan, rank)
        (alike,) = self.sizes.alike((plan.stages[position],), shards)
        key = (alike.number, self.layouts.row_of(kinds, channels))
        table = self._table_of(plan, samples)
        found = table.get(key)
        if found is None:
            found = table[key] = self._time(plan, alike, kinds, channels, samples, shards)
        return found.parts

    def timed(
        self,
        plan: Plan,
        outline: Outline,
        kinds: tuple[tuple[Accelerator, ...], ...],
        channels: tuple[Channels, ...],
        rows: tuple[int, ...],
    ) -> list[TimedStage]:
        """One micro-batch in each stage of a plan; for each pipeline rank kinds, channels, and their `row_of`."""
        p = plan.pipeline
        if plan.is_uniform:
            tables = [self._table_of(plan, outline.samples[0])] * p
        else:
            tables = [self._table_of(plan, samples) for samples in outline.samples]
        found = []
        for position, alike in enumerate(outline.stages):
            rank = position % p
            key = (alike.number, rows[rank])
            one = tables[rank].get(key)
            if one is None:
                one = tables[rank][key] = self._time(
                    plan, alike, kinds[rank], channels[rank], outline.samples[rank], outline.shards[rank]
                )
            found.append(one)
        return found

    def _table_of(self, plan: Plan, samples: float) -> dict[tuple[int, int], TimedStage]:
        """Stages by class and row, under what else holds for a plan."""
        tiers = (plan.parameters_on, plan.activations_on, plan.optimizer_on, plan.devices[0]) if plan.tiers else ()
        key = (samples, plan.context, plan.expert, plan.precision, plan.zero_stage, plan.micro_batches,
               plan.pipeline > 1, plan.overlap, tiers, len(plan.devices) > 1)  # fmt: skip
        return self._timed.setdefault(key, {})

    def _time(
        self, plan: Plan, alike: Alike, kinds: tuple[Accelerator, ...], channels: Channels, samples: float,
        shards: Shards,
    ) -> TimedStage:  # fmt: skip
        parts = self._parts_of(plan, alike, kinds, channels, samples, shards)
        return TimedStage(parts, parts.forward_seconds, parts.backward_seconds, parts.forward + parts.backward)

    def _parts_of(
        self, plan: Plan, alike: Alike, kinds: tuple[Accelerator, ...], channels: Channels, samples: float,
        shards: Shards,
    ) -> StageParts:  # fmt: skip
        stage = alike.stage
        crowded = len(plan.devices) > 1
        share = samples / plan.context
        slowdown = self.slowdown(kinds[0])
        work = self._work_of(alike, kinds, crowded, share, shards, plan.precision)
        tensor = self._tensor(plan, alike, share, shards, channels.tensor, work, slowdown)
        expert = self._expert(stage, share, shards, plan.precision, channels.expert)
        # While the host falls behind, the device waits, and communication fills part of that.
        host_there, host_back = self._host_seconds(plan, alike, share, shards, kinds, work, channels)
        forward, tensor_there, expert_there = _waiting(
            work.forward, host_there, tensor.exposed_forward, expert.exposed_forward
        )
        back = work.backward + work.recompute
        whole, tensor_back, expert_back = _waiting(back, host_back, tensor.exposed_backward, expert.exposed_backward)
        stretch = whole / back if back else 1.0
        if tensor is not NO_EXCHANGE:
            tensor = tensor._replace(exposed_forward=tensor_there, exposed_backward=tensor_back)
        if expert is not NO_EXCHANGE:
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
        self, plan: Plan, alike: Alike, samples: float, shards: Shards, kinds: tuple[Accelerator, ...], work: _Work,
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
        sending = self._sending_of(alike, samples, shards, plan.precision)
        each = share * efficiency.host_collective_seconds * channels.tensor.size
        there += each * sum(count for _, count in sending.reduces)
        back += each * sum(count for _, count in sending.reduces_back)
        return there, back

    def _tensor(
        self, plan: Plan, alike: Alike, share: float, shards: Shards, channel: Channel, work: _Work, slowdown: float
    ) -> Exchange:
        if channel.size == 1:
            return NO_EXCHANGE
        sending = self._sending_of(alike, share, shards, plan.precision)
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
            return NO_EXCHANGE
        layers = self.graph.layers[stage.start : stage.stop]
        sizes = Counter(
            layer.experts.dispatched.at(share) * _low_share(precision) for layer in layers if layer.experts is not None
        )
        # Tokens go to their experts and their results come back; gradients take the same ways.
        seconds = 2 * sum(
            count * comm.all_to_all_seconds(size / shards.degree, channel) for size, count in sizes.items()
        )
        return Exchange(seconds, seconds, seconds, seconds)

    def _context(
        self, plan: Plan, stage: Stage, samples: float, shards: Shards, channel: Channel, work: _Work, slowdown: float,
        kinds: tuple[Accelerator, ...],
    ) -> Exchange:  # fmt: skip
        """Ring attention: keys and values of all other ranks pass by, while scores with those at hand are computed."""
        if channel.size == 1:
            return NO_EXCHANGE
        layers = [one.attention for one in self.graph.layers[stage.start : stage.stop] if one.attention is not None]
        size = sum(one.keys_values.at(samples) * _low_share(plan.precision) for one in layers) / shards.degree
        seconds = repeated(comm.all_gather_seconds, size, len(layers), channel)
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
            return NO_EXCHANGE, NO_EXCHANGE
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
        if not plan.tiers:
            return NO_EXCHANGE
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


def _low_share(precision: str) -> float:
    """What is left of a tensor's float32 bytes on the wire."""
    return 0.5 if precision != "float32" else 1.0


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
