"""What one training step costs: time and memory of a plan, composed from operators, collectives and the schedule.

`predict` for one plan; a `Predictor` for many plans of one workload on one cluster, which it answers from memoised
parts. Every formula is said once, where it is used; docs/predict.md tells them in order.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from headway.errors import DoesNotFitError
from headway.hardware.cluster import Accelerator, Cluster
from headway.plan.plan import Plan, Stage
from headway.predict import communication as comm
from headway.predict.communication import Channel, Communication
from headway.predict.latency import Latency
from headway.predict.memory import Sizes
from headway.predict.operators import WHOLE, Shards
from headway.predict.pipeline import Cell, closed_form, in_flight, play
from headway.predict.prediction import Memory, Prediction, StepTime
from headway.predict.profile import Profile
from headway.timeline import Span, Timeline
from headway.units import format_bytes
from headway.workload.graph import Workload

__all__ = ["Predictor", "check_fit", "predict"]

# Up to this many cells a schedule is played exactly; beyond, the closed form stands in for it.
_PLAYED_CELLS = 512


class _StageTime(NamedTuple):
    """One micro-batch in one stage: compute alone, and the tensor-parallel all-reduces (bytes, count) on top."""

    forward: float
    backward: float
    forward_reduces: tuple[tuple[float, int], ...]
    backward_reduces: tuple[tuple[float, int], ...]


class _RankTime(NamedTuple):
    """What a pipeline rank does besides its micro-batches, in seconds. `gradients` is what backward does not hide."""

    gradients: float
    update: float
    after: float  # parameters sent round after the update
    exchanged: float  # all gradient communication, hidden or not


class _Parts(NamedTuple):
    """Everything that time and timeline are made of."""

    forward: tuple[float, ...]  # per stage, communication included
    backward: tuple[float, ...]
    forward_compute: tuple[float, ...]
    backward_compute: tuple[float, ...]
    sends: tuple[float, ...]  # per pipeline rank
    ranks: tuple[_RankTime, ...]
    finish: tuple[float, ...]  # per pipeline rank: its last cell ends
    loss: float  # the all-reduce of the loss


class Predictor:
    """Predicts plans for one workload on one cluster; parts that plans share are computed once.

    With a `profile`, operators that it knows take the time measured there; without, all follow the roofline.
    """

    def __init__(self, workload: Workload, cluster: Cluster, profile: Profile | None = None) -> None:
        self.workload = workload
        self.cluster = cluster
        self.profile = profile
        self.communication = Communication(cluster)
        self.sizes = Sizes(workload.graph)
        self._position = {device.name: position for position, device in enumerate(cluster.devices)}
        self._latencies: dict[tuple[str, bool], Latency] = {}
        self._stages: dict[tuple, _StageTime] = {}
        self._kinds: dict[tuple, tuple[tuple[Accelerator, ...], ...]] = {}
        self._shards: dict[tuple[int, frozenset[str]], Shards] = {}
        self._plays: dict[tuple, tuple[float, ...]] = {}
        self._flop_rates: dict[tuple, tuple[float, float, float]] = {}
        self._prefixes: dict[tuple, tuple[list[float], list[float]]] = {}
        self._buckets: dict[tuple, tuple[float, float]] = {}

    def predict(self, plan: Plan) -> Prediction:
        """Time and memory of one step of `plan`. The plan is taken as valid (see `Plan.validate`)."""
        parts = self._parts(plan)
        time, bound = self._step_time(plan, parts)
        memory = self._memory(plan)
        graph = self.workload.graph
        samples = plan.global_batch
        flop = graph.forward_flop.at(samples) + graph.backward_flop.at(samples)
        peak, watts, dollars = self._totals(plan)
        step = time.step_seconds
        return Prediction(
            time=time,
            memory=memory,
            samples_per_second=samples / step,
            tokens_per_second=samples * graph.tokens_per_sample / step,
            mfu=flop / (step * peak),
            energy_joules=watts * step,
            dollars=dollars / 3600 * step,
            bound=bound,
        )

    # ------------------------------------------------------------------------------------------------------- time

    def _shards_of(self, plan: Plan) -> Shards:
        if plan.tensor == 1:
            return WHOLE
        key = (plan.tensor, frozenset(plan.tensor_sharding))
        found = self._shards.get(key)
        if found is None:
            chosen = key[1]
            blocks = frozenset(
                position
                for position, block in enumerate(self.workload.graph.blocks)
                if chosen.issuperset(block.columns) and chosen.issuperset(block.rows)
            )
            found = self._shards[key] = Shards(plan.tensor, blocks)
        return found

    def _kinds_of(self, plan: Plan) -> tuple[tuple[Accelerator, ...], ...]:
        """The kinds of device of each pipeline rank."""
        key = (plan.devices, plan.pipeline)
        found = self._kinds.get(key)
        if found is None:
            width = len(plan.devices) // plan.pipeline
            names = [self.cluster.devices[self._position[name]].accelerator for name in plan.devices]
            found = self._kinds[key] = tuple(
                tuple(self.cluster.accelerators[kind] for kind in dict.fromkeys(names[start : start + width]))
                for start in range(0, len(names), width)
            )
        return found

    def _latency(self, kind: Accelerator, crowded: bool) -> Latency:
        key = (kind.name, crowded)
        found = self._latencies.get(key)
        if found is None:
            slower = (self.cluster.contention, self.cluster.memory_contention) if crowded else (1.0, 1.0)
            found = self._latencies[key] = Latency(self.workload.graph, kind, self.profile, *slower, crowded)
        return found

    def _prefix(
        self, kind: Accelerator, crowded: bool, samples: int, shards: Shards, precision: str
    ) -> tuple[list[float], list[float]]:
        """Forward and backward seconds of all layers before each position."""
        key = (kind.name, crowded, samples, shards, precision)
        found = self._prefixes.get(key)
        if found is None:
            latency = self._latency(kind, crowded)
            forward, backward = [0.0], [0.0]
            for position in range(len(self.workload.graph.layers)):
                time = latency.layer_time(position, samples, shards, precision)
                forward.append(forward[-1] + time.forward_seconds)
                backward.append(backward[-1] + time.backward_seconds)
            found = self._prefixes[key] = (forward, backward)
        return found

    def layer_seconds(
        self, accelerator: str, samples: int, shards: Shards = WHOLE, precision: str = "float32", *, crowded: bool
    ) -> tuple[list[float], list[float]]:
        """Seconds of one micro-batch of `samples` in all layers before each position: forward, backward.

        Without communication and recomputation, on the cluster's accelerator of that name; `crowded`: while other
        devices compute too. Layers j to i (exclusive) take `found[i] - found[j]`.
        """
        return self._prefix(self.cluster.accelerators[accelerator], crowded, samples, shards, precision)

    def _stage_time(
        self, stage: Stage, kinds: tuple[Accelerator, ...], crowded: bool, samples: int, shards: Shards, precision: str
    ) -> _StageTime:
        key = (stage.start, stage.stop, stage.recompute, tuple(kind.name for kind in kinds), crowded, samples, shards,
               precision)  # fmt: skip
        found = self._stages.get(key)
        if found is not None:
            return found
        slowest = (0.0, 0.0)
        for kind in kinds:
            forward, backward = self._prefix(kind, crowded, samples, shards, precision)
            there = forward[stage.stop] - forward[stage.start]
            again = sum(forward[at + 1] - forward[at] for at in stage.recompute)
            back = backward[stage.stop] - backward[stage.start] + again
            # Replicas and tensor-parallel ranks wait for each other: the slowest kind of device rules.
            slowest = max(slowest, (there, back), key=sum)
        there_reduces: Counter[float] = Counter()
        back_reduces: Counter[float] = Counter()
        recompute = set(stage.recompute)
        for position in shards.blocks:
            block = self.workload.graph.blocks[position]
            if stage.start <= block.layer < stage.stop:
                share = 0.5 if precision != "float32" else 1.0
                there_reduces[block.output.bytes(samples) * share] += 1
                back_reduces[block.input.bytes(samples) * share] += 1
                if block.layer in recompute:
                    back_reduces[block.output.bytes(samples) * share] += 1
        found = _StageTime(*slowest, tuple(there_reduces.items()), tuple(back_reduces.items()))
        self._stages[key] = found
        return found

    def _parts(self, plan: Plan, *, exactly: bool = False) -> _Parts:
        shards = self._shards_of(plan)
        kinds = self._kinds_of(plan)
        crowded = plan.world_size > 1
        shape = (plan.devices, plan.pipeline, plan.data, plan.tensor)
        tensor = self.communication.channels(*shape, "tensor")
        data = self.communication.channels(*shape, "data")
        along = self.communication.channels(*shape, "pipeline")
        p, m = plan.pipeline, plan.micro_batches
        forward, backward, forward_compute, backward_compute = [], [], [], []
        for position, stage in enumerate(plan.stages):
            rank = position % p
            time = self._stage_time(stage, kinds[rank], crowded, plan.micro_batch, shards, plan.precision)
            channel = tensor[rank]
            there = sum(count * comm.all_reduce_seconds(size, channel) for size, count in time.forward_reduces)
            back = sum(count * comm.all_reduce_seconds(size, channel) for size, count in time.backward_reduces)
            gather, scatter = self._zero_seconds(plan, stage, time, data[rank], shards, kinds[rank])
            adding = self._adding_seconds(plan, stage, kinds[rank], shards)
            forward.append(time.forward + there + gather)
            backward.append(time.backward + adding + back + scatter)
            forward_compute.append(time.forward)
            backward_compute.append(time.backward + adding)
        sends = [0.0] * p
        if p > 1:
            graph = self.workload.graph
            for position in range(len(plan.stages) - 1):
                size = graph.layers[plan.stages[position].stop - 1].output.bytes(plan.micro_batch)
                rank = position % p
                sends[rank] = max(sends[rank], comm.send_seconds(size, along[rank]))
        ranks = tuple(self._rank_time(plan, rank, shards, kinds[rank], data[rank], along) for rank in range(p))
        finish = self._finish(plan, m, tuple(forward), tuple(backward), tuple(sends), exactly)
        loss = comm.all_reduce_seconds(8, self.communication.group(plan.devices)) if plan.world_size > 1 else 0.0
        return _Parts(
            tuple(forward), tuple(backward), tuple(forward_compute), tuple(backward_compute), tuple(sends), ranks,
            finish, loss,
        )  # fmt: skip

    def _finish(
        self, plan: Plan, m: int, forward: tuple[float, ...], backward: tuple[float, ...], sends: tuple[float, ...],
        exactly: bool,
    ) -> tuple[float, ...]:  # fmt: skip
        p = plan.pipeline
        if p == 1:
            return (m * (forward[0] + backward[0]),)
        key = (plan.schedule, p, m, forward, backward, sends)
        found = self._plays.get(key)
        if found is None:
            if exactly or 2 * m * len(forward) <= _PLAYED_CELLS:
                found = play(plan.schedule, p, m, forward, backward, sends).finish
            else:
                found = closed_form(plan.schedule, p, m, forward, backward, sends)
            self._plays[key] = found
        return found

    def _zero_seconds(
        self, plan: Plan, stage: Stage, time: _StageTime, channel: Channel, shards: Shards,
        kinds: tuple[Accelerator, ...],
    ) -> tuple[float, float]:  # fmt: skip
        """Exposed seconds of `fully_shard`'s collectives in one micro-batch: forward, backward.

        Stage 2 gathers the parameters before forward and keeps them until backward; stage 3 gathers them again for
        backward. Each layer is one collective. Where communication runs beside compute, the next layer is gathered
        while this one computes, so only the first gather, the last scatter and what compute cannot cover show.
        """
        if plan.zero_stage < 2 or plan.data == 1:
            return 0.0, 0.0
        units = sum(self.sizes.units[stage.start : stage.stop])
        size = self.sizes.parameters(stage.start, stage.stop, shards)
        gather = _repeated(comm.all_gather_seconds, size.bytes, units, channel)
        scatter = _repeated(comm.reduce_scatter_seconds, size.trainable_bytes, units, channel)
        # Out of the gathered buffer into the parameters, and from the gradients into the buffer to scatter: each byte
        # is read and written.
        latency = self._latency(kinds[0], plan.world_size > 1)
        gather += latency.streaming_seconds(2 * size.bytes)
        scatter += latency.streaming_seconds(2 * size.trainable_bytes)
        m = plan.micro_batches
        if plan.pipeline > 1:
            # A pipeline accumulates gradients unsharded and scatters once, after the last micro-batch; stage 2 keeps
            # the parameters gathered from the first on. Both are spread over the micro-batches here.
            scatter /= m
        there = gather if plan.zero_stage == 3 or plan.pipeline == 1 else gather / m
        back = (gather if plan.zero_stage == 3 else 0.0) + scatter
        if not self._overlaps(plan, kinds):
            return there, back
        return (
            there / units + max(0.0, there * (1 - 1 / units) - time.forward),
            back / units + max(0.0, back * (1 - 1 / units) - time.backward),
        )

    def _adding_seconds(self, plan: Plan, stage: Stage, kinds: tuple[Accelerator, ...], shards: Shards) -> float:
        """Seconds for each micro-batch to add its gradients to those before, and to copy the sum into buckets once."""
        size = self.sizes.parameters(stage.start, stage.stop, shards).trainable_bytes
        m = plan.micro_batches
        # Adding reads two tensors and writes one; autograd hands the first micro-batch's gradients over as they are.
        moved = 3 * size * (m - 1) / m if plan.zero_stage < 2 or plan.pipeline > 1 else 0.0
        if plan.data > 1 and plan.zero_stage < 2:
            moved += 2 * size / m
        return max(self._latency(kind, plan.world_size > 1).streaming_seconds(moved) for kind in kinds)

    def _overlaps(self, plan: Plan, kinds: tuple[Accelerator, ...]) -> bool:
        """Whether communication runs beside compute. On a CPU it runs on the very cores that compute."""
        return plan.overlap and all(kind.torch_device != "cpu" for kind in kinds)

    def _rank_time(
        self, plan: Plan, rank: int, shards: Shards, kinds: tuple[Accelerator, ...], channel: Channel,
        along: tuple[Channel, ...],
    ) -> _RankTime:  # fmt: skip
        held = [plan.stages[position] for position in plan.stages_of(rank)]
        sizes = [self.sizes.parameters(stage.start, stage.stop, shards) for stage in held]
        elements = sum(size.trainable_elements for size in sizes)
        gradient_bytes = sum(size.trainable_bytes for size in sizes)
        tensors = sum(size.tensors for size in sizes)
        crowded = plan.world_size > 1
        exposed = exchanged = after = 0.0
        if plan.data > 1 and plan.zero_stage < 2:
            exposed, exchanged = self._bucket_seconds(plan, held, gradient_bytes, shards, kinds, channel)
        if plan.data > 1 and plan.zero_stage == 1:
            fullest = [0, 0]
            for stage in held:
                part = max(self.sizes.zero1(stage.start, stage.stop, shards, plan.data))
                fullest = [fullest[0] + part[0], fullest[1] + part[1]]
            # Every rank sends what it has updated to the others, in one piece.
            after = _repeated(comm.broadcast_seconds, gradient_bytes, plan.data, channel)
            elements, tensors = fullest
        elif plan.data > 1 and plan.zero_stage >= 2:
            elements = sum(self.sizes.sharded(stage.start, stage.stop, shards, plan.data)[0] for stage in held)
        exposed += self._tied_seconds(plan, rank, shards, along)
        traffic = self.workload.optimizer.traffic_bytes_per_element
        update = max(self._latency(kind, crowded).update_seconds(elements, tensors, traffic) for kind in kinds)
        return _RankTime(exposed, update, after, exchanged)

    def _tied_seconds(self, plan: Plan, rank: int, shards: Shards, along: tuple[Channel, ...]) -> float:
        """Summing the gradients of a parameter that several pipeline ranks hold (tied embeddings)."""
        if plan.pipeline == 1:
            return 0.0
        total = 0.0
        for parameter, layers in self.sizes.shared:
            holders = {
                position % plan.pipeline
                for position, stage in enumerate(plan.stages)
                if any(stage.start <= layer < stage.stop for layer in layers)
            }
            if len(holders) > 1 and rank in holders:
                channel = along[rank]._replace(size=len(holders))
                total += comm.all_reduce_seconds(self.sizes.local_bytes(parameter, shards), channel)
        return total

    def _bucket_seconds(
        self, plan: Plan, held: list[Stage], gradient_bytes: float, shards: Shards, kinds: tuple[Accelerator, ...],
        channel: Channel,
    ) -> tuple[float, float]:  # fmt: skip
        """(exposed, all) seconds of reducing gradients in buckets while the last micro-batch goes backward.

        A bucket can leave when the layer that completes it has gone backward, and when the bucket before it is
        through (Li et al., PyTorch Distributed, VLDB 2020, section 3.2).
        """
        overlaps = self._overlaps(plan, kinds)
        key = (tuple(held), gradient_bytes, shards, tuple(kind.name for kind in kinds), channel, plan.bucket_bytes,
               overlaps, plan.micro_batch, plan.precision, plan.world_size > 1)  # fmt: skip
        found = self._buckets.get(key)
        if found is not None:
            return found
        # Without overlap the runtime makes one bucket of everything.
        limit = float(plan.bucket_bytes) if plan.overlap else max(gradient_bytes, 1.0)
        whole = _repeated(comm.all_reduce_seconds, gradient_bytes, math.ceil(gradient_bytes / limit), channel)
        if not overlaps:
            found = self._buckets[key] = (whole, whole)
            return found
        now = sent = filled = 0.0
        for stage in reversed(held):
            kind = kinds[0]
            _, backward = self._prefix(kind, plan.world_size > 1, plan.micro_batch, shards, plan.precision)
            forward, _ = self._prefix(kind, plan.world_size > 1, plan.micro_batch, shards, plan.precision)
            again = set(stage.recompute)
            for at in range(stage.stop - 1, stage.start - 1, -1):
                now += backward[at + 1] - backward[at] + (forward[at + 1] - forward[at] if at in again else 0.0)
                filled += self.sizes.parameters(at, at + 1, shards).trainable_bytes
                while filled >= limit:
                    sent = max(sent, now) + comm.all_reduce_seconds(limit, channel)
                    filled -= limit
        if filled > 0:
            sent = max(sent, now) + comm.all_reduce_seconds(filled, channel)
        found = self._buckets[key] = (max(0.0, sent - now), whole)
        return found

    def _step_time(self, plan: Plan, parts: _Parts) -> tuple[StepTime, str]:
        m, p = plan.micro_batches, plan.pipeline
        ends = [
            finish + rank.gradients + rank.update + rank.after
            for finish, rank in zip(parts.finish, parts.ranks, strict=True)
        ]
        step = max(ends) + parts.loss
        busy = []
        for rank in range(p):
            mine = plan.stages_of(rank)
            compute = m * sum(parts.forward_compute[at] + parts.backward_compute[at] for at in mine)
            inside = m * sum(parts.forward[at] + parts.backward[at] for at in mine) - compute
            busy.append((compute, inside))
        # The rank that bounds the step is the one that waits least.
        rank = max(
            range(p),
            key=lambda at: sum(busy[at]) + parts.ranks[at].gradients + parts.ranks[at].update + parts.ranks[at].after,
        )
        compute, inside = busy[rank]
        own = parts.ranks[rank]
        sent = 0.0
        if p > 1:
            without = self._finish(plan, m, parts.forward, parts.backward, (0.0,) * p, False)
            with_sends = self._finish(plan, m, parts.forward, parts.backward, parts.sends, False)
            sent = max(0.0, max(with_sends) - max(without))
        communication = inside + own.gradients + own.after + parts.loss
        # Waiting for other stages includes waiting for what they send.
        bubble = 0.0 if p == 1 else max(0.0, step - compute - communication - own.update)
        time = StepTime(
            step_seconds=compute + communication + bubble + own.update,
            compute_seconds=compute,
            communication_seconds=communication,
            bubble_seconds=bubble,
            optimizer_seconds=own.update,
        )
        shares = {
            "compute" + (f" of stage {rank}" if p > 1 else ""): compute,
            "pipeline bubble": bubble - min(sent, bubble),
            "optimizer step": own.update,
            "sending activations between stages": min(sent, bubble),
        }
        name = "tensor-parallel all-reduces" if plan.tensor > 1 else "gathering sharded parameters"
        if plan.tensor > 1 and plan.zero_stage >= 2:
            name = "tensor-parallel all-reduces and gathering sharded parameters"
        shares[name] = inside
        shares["exposed gradient all-reduce"] = own.gradients
        shares["broadcast of updated parameters"] = own.after
        bound, seconds = max(shares.items(), key=lambda item: item[1])
        return time, f"{bound} ({seconds / time.step_seconds:.0%} of the step)"

    def _totals(self, plan: Plan) -> tuple[float, float, float]:
        """Peak FLOP/s, watts and dollars per hour of all devices; watts or dollars are 0 unless all are known."""
        key = (plan.devices, plan.precision)
        found = self._flop_rates.get(key)
        if found is None:
            count = Counter(self.cluster.devices[self._position[name]].accelerator for name in plan.devices)
            kinds = [(self.cluster.accelerators[name], times) for name, times in count.items()]
            peak = sum(kind.flop_rate(plan.precision) * times for kind, times in kinds)
            watts = sum(kind.power_watts * times for kind, times in kinds)
            dollars = sum(kind.dollars_per_hour * times for kind, times in kinds)
            found = self._flop_rates[key] = (
                peak,
                watts if all(kind.power_watts for kind, _ in kinds) else 0.0,
                dollars if all(kind.dollars_per_hour for kind, _ in kinds) else 0.0,
            )
        return found

    # ----------------------------------------------------------------------------------------------------- memory

    def memory(self, plan: Plan) -> tuple[Memory, ...]:
        """Peak memory of each rank under `plan`, as in `predict`, without asking how long the step takes."""
        return self._memory(plan)

    def _memory(self, plan: Plan) -> tuple[Memory, ...]:
        shards = self._shards_of(plan)
        found: list[Memory] = []
        for rank in range(plan.pipeline):
            held = [plan.stages[position] for position in plan.stages_of(rank)]
            if plan.zero_stage == 1 and plan.data > 1:
                parts = [self.sizes.zero1(stage.start, stage.stop, shards, plan.data) for stage in held]
                updated = [sum(part[data][0] for part in parts) for data in range(plan.data)]
            else:
                updated = [-1] * plan.data
            made: dict[int, Memory] = {}
            for elements in updated:
                memory = made.get(elements)
                if memory is None:
                    memory = made[elements] = self._rank_memory(plan, rank, held, shards, elements)
                found.extend((memory,) * plan.tensor)
        return tuple(found)

    def _rank_memory(self, plan: Plan, rank: int, held: list[Stage], shards: Shards, updated: int) -> Memory:
        sizes = [self.sizes.parameters(stage.start, stage.stop, shards) for stage in held]
        parameters = float(sum(size.bytes for size in sizes))
        gradients = float(sum(size.trainable_bytes for size in sizes))
        elements = float(sum(size.trainable_elements for size in sizes))
        largest = float(max(size.largest_layer_bytes for size in sizes))
        piped = plan.pipeline > 1
        m = plan.micro_batches
        communication = 0.0
        if plan.data > 1 and plan.zero_stage >= 2:
            pieces = [self.sizes.sharded(stage.start, stage.stop, shards, plan.data) for stage in held]
            elements = float(sum(piece[0] for piece in pieces))
            shard = float(sum(piece[1] for piece in pieces))
            if plan.zero_stage == 2 or piped:
                # Gathered from forward to backward, beside the shard.
                communication += parameters
            else:
                # The layer at work and the next one, fetched early.
                communication += min(2 * largest, parameters)
            # One layer's gradients on their way to the reduce-scatter.
            communication += largest
            if not piped:
                gradients = shard
            parameters = shard
        elif updated >= 0:
            elements = float(updated)
        if plan.data > 1 and plan.zero_stage < 2 and m > 1:
            # Until the last micro-batch gradients are added up outside of the buckets that will be reduced.
            communication += gradients
        optimizer = self.workload.optimizer
        states = elements * optimizer.state_bytes_per_element
        temporary = elements * optimizer.temporary_bytes_per_element
        flights = in_flight(plan.schedule, rank, plan.pipeline, plan.virtual_stages, m) if piped else (1,)
        kept = 0.0
        extra = 0.0
        extra_with_gradients = 0.0
        for stage, flight in zip(held, flights, strict=True):
            size = self.sizes.activations(
                stage.start, stage.stop, stage.recompute, plan.micro_batch, shards, plan.precision
            )
            kept += size.kept * flight
            extra = max(extra, size.peak - size.kept)
            extra_with_gradients = max(extra_with_gradients, size.peak_with_gradients - size.kept)
            if piped:
                # torch.distributed.pipelining receives every micro-batch into a buffer of its own, both ways.
                last = stage.stop == len(self.workload.graph.layers)
                communication += m * (size.input + (0.0 if last else size.output))
        # Every rank holds its replica's share of the batch.
        kept += sum(kind.bytes(plan.global_batch // plan.data) for kind in self.workload.graph.inputs)
        # Without buckets (one replica) gradients are made anew in each step, while activations are released.
        fresh = plan.data == 1 and m == 1 and not piped
        together = kept + extra_with_gradients if fresh else kept + extra + gradients
        together = max(together, gradients + temporary)
        # What gave way to gradients before the peak is not counted twice.
        activations = min(kept, together - gradients)
        return Memory(
            parameters_bytes=parameters + self.workload.graph.buffer_bytes,
            gradients_bytes=gradients,
            optimizer_bytes=states,
            activations_bytes=activations,
            communication_bytes=communication,
            workspace_bytes=together - gradients - activations,
        )

    # --------------------------------------------------------------------------------------------------- timeline

    def timeline(self, plan: Plan) -> Timeline:
        """The predicted step, one group of lanes for each rank: compute, and communication beside it."""
        parts = self._parts(plan, exactly=True)
        p, m = plan.pipeline, plan.micro_batches
        played = play(plan.schedule, p, m, parts.forward, parts.backward, parts.sends)
        spans: list[Span] = []
        end = 0.0
        for rank in range(plan.world_size):
            pipeline, _, _ = plan.coordinates(rank)
            cells = sorted((start, cell) for cell, start in played.starts.items() if cell.stage % p == pipeline)
            for start, cell in cells:
                spans.extend(self._cell_spans(plan, parts, rank, start, cell))
            own = parts.ranks[pipeline]
            now = played.finish[pipeline]
            hidden = own.exchanged - own.gradients
            if own.exchanged > 0 or own.gradients > 0:
                begin = now - max(0.0, hidden)
                length = own.gradients + max(0.0, hidden)
                spans.append(_span("reduce gradients", rank, "communication", begin, length, "communication"))
            now += own.gradients
            spans.append(_span("optimizer", rank, "compute", now, own.update, "optimizer"))
            now += own.update
            if own.after:
                spans.append(_span("broadcast parameters", rank, "communication", now, own.after, "communication"))
            end = max(end, now + own.after)
        if parts.loss:
            for rank in range(plan.world_size):
                spans.append(_span("average loss", rank, "communication", end, parts.loss, "communication"))
        return Timeline(name=f"{plan.model}: {plan.describe()}, predicted", spans=tuple(spans))

    def _cell_spans(self, plan: Plan, parts: _Parts, rank: int, start: float, cell: Cell) -> list[Span]:
        stage, index, backward = cell
        kind = "backward" if backward else "forward"
        compute = (parts.backward_compute if backward else parts.forward_compute)[stage]
        whole = (parts.backward if backward else parts.forward)[stage]
        detail: dict[str, str | int | float] = {"stage": stage, "micro_batch": index}
        name = f"{kind} {index}" + (f" of stage {stage}" if plan.virtual_stages > 1 else "")
        spans = [_span(name, rank, "compute", start, compute, kind, detail)]
        if whole > compute:
            label = "all-reduce of blocks" if plan.tensor > 1 else "gather parameters"
            spans.append(_span(label, rank, "communication", start + compute, whole - compute, "communication", detail))
        sends_on = stage > 0 if backward else stage < len(plan.stages) - 1
        if plan.pipeline > 1 and sends_on:
            channel = (stage - 1 if backward else stage) % plan.pipeline
            label = "send gradient" if backward else "send activation"
            spans.append(_span(label, rank, "send", start + whole, parts.sends[channel], "communication", detail))
        return spans


def _span(name: str, rank: int, lane: str, start: float, length: float, kind: str, detail: dict | None = None) -> Span:
    return Span(
        name=name,
        lane=f"rank {rank}/{lane}",
        start_seconds=start,
        duration_seconds=length,
        kind=kind,
        detail=detail or {},
    )


def _repeated(seconds, size_bytes: float, times: int, channel: Channel) -> float:
    """`times` collectives that move `size_bytes` between them: their cost is affine in bytes but for NCCL's choice."""
    return times * seconds(size_bytes / times, channel) if times else 0.0


def predict(workload: Workload, cluster: Cluster, plan: Plan, profile: Profile | None = None) -> Prediction:
    """What one step of `plan` costs. For many plans of one workload make one `Predictor` and ask it."""
    return Predictor(workload, cluster, profile).predict(plan)


_REMEDIES = {
    "parameters": "raise zero_stage to 3, or the tensor or pipeline degree",
    "gradients": "raise zero_stage to 2 or 3, or the tensor or pipeline degree",
    "optimizer": "raise zero_stage to 1 or more, or the tensor or pipeline degree",
    "activations": "recompute layers, or use a smaller micro_batch",
    "communication": "use zero_stage 1, or fewer micro-batches in flight",
    "workspace": "use a smaller micro_batch, or split the largest layer with tensor parallelism",
}


def check_fit(prediction: Prediction, plan: Plan, cluster: Cluster) -> float:
    """Bytes left free on the fullest device.

    Raises DoesNotFitError naming the rank that lacks most, by how much, what takes the most there, and a remedy.
    """
    position = {device.name: at for at, device in enumerate(cluster.devices)}
    least = math.inf
    worst = 0
    for rank, (name, memory) in enumerate(zip(plan.devices, prediction.memory, strict=True)):
        free = cluster.accelerator_of(position[name]).memory_bytes - memory.total_bytes
        if free < least:
            least, worst = free, rank
    if least >= 0:
        return least
    memory = prediction.memory[worst]
    kinds = {name: getattr(memory, f"{name}_bytes") for name in _REMEDIES}
    largest = max(kinds, key=lambda name: kinds[name])
    has = cluster.accelerator_of(position[plan.devices[worst]]).memory_bytes
    raise DoesNotFitError(
        f"rank {worst} needs {format_bytes(memory.total_bytes)} and {plan.devices[worst]} has {format_bytes(has)}: "
        f"{format_bytes(-least)} too little; most of it is {largest} ({format_bytes(kinds[largest])})",
        place=f"plan {plan.describe()!r}",
        remedy=_REMEDIES[largest],
    )
