"""What each pipeline rank does once in a step: reduce gradients over its replicas, update, share what it updated."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from headway.hardware.cluster import Accelerator
from headway.plan.plan import Plan, Stage, Tier
from headway.predict import communication as comm
from headway.predict.communication import Channel
from headway.predict.layout import Channels
from headway.predict.operators import Shards
from headway.predict.outline import Outline, outline_of
from headway.predict.parts import Offload, RankParts
from headway.predict.stage import StageTimes, hidden_behind, repeated
from headway.predict.tiers import moments_bytes, wire_bytes

__all__ = ["ReplicaTimes", "gradient_reduction", "to_owners_seconds", "to_rows_seconds"]


class ReplicaTimes:
    """Times of gradient reduction and update of one workload on one cluster, memoised."""

    def __init__(self, stages: StageTimes) -> None:
        self.stages = stages
        self.sizes = stages.sizes
        self.workload = stages.workload
        # By what holds for a whole plan; then by classes of stages and row.
        self._known: dict[tuple, dict[tuple[tuple[int, ...], int], RankParts]] = {}

    def forget(self) -> None:
        """Drop every time: the constants have changed."""
        self._known.clear()

    def parts(
        self, plan: Plan, rank: int, kinds: tuple[Accelerator, ...], channels: Channels, along: tuple[Channel, ...]
    ) -> RankParts:
        """What pipeline rank `rank` does besides its micro-batches; `along`: channels between pipeline ranks."""
        outline = outline_of(plan, self.sizes, self.stages.splits)
        row = self.stages.layouts.row_of(kinds, channels)
        return self.parts_of_rank(plan, outline, rank, kinds, channels, row, along)

    def parts_of_rank(
        self, plan: Plan, outline: Outline, rank: int, kinds: tuple[Accelerator, ...], channels: Channels, row: int,
        along: tuple[Channel, ...],
    ) -> RankParts:  # fmt: skip
        """`parts` of a plan with this outline; `row`: the number of these kinds and channels (`Layouts.row_of`)."""
        table = self._table_of(plan, outline.samples[rank])
        key = (outline.held[rank], row)
        found = table.get(key)
        if found is None:
            held = [outline.stages[at].stage for at in plan.stages_of(rank)]
            found = table[key] = self._parts_of(
                plan, held, outline.shards[rank], outline.samples[rank], kinds, channels
            )
        if plan.pipeline > 1 and self.sizes.shared:
            tied = self._tied_seconds(plan, rank, outline.shards[rank], along)
            found = found._replace(gradients=found.gradients + tied, tied=tied)
        return found

    def _table_of(self, plan: Plan, samples: float) -> dict[tuple[tuple[int, ...], int], RankParts]:
        key = (samples, plan.context, plan.expert, plan.precision, plan.zero_stage, plan.overlap, plan.bucket_bytes,
               plan.optimizer_on, plan.optimizer_kept, plan.moments, plan.delayed_update, len(plan.devices) > 1,
               "" if plan.optimizer_on == "device" else plan.devices[0])  # fmt: skip
        return self._known.setdefault(key, {})

    def _parts_of(
        self, plan: Plan, held: list[Stage], shards: Shards, samples: float, kinds: tuple[Accelerator, ...],
        channels: Channels,
    ) -> RankParts:  # fmt: skip
        """All but tied parameters."""
        stages = self.stages
        sizes = [self.sizes.parameters(stage.start, stage.stop, shards, plan.expert) for stage in held]
        elements = float(sum(size.trainable_elements for size in sizes))
        experts = float(sum(size.expert_elements for size in sizes))
        gradient_bytes = sum(stages.gradient_bytes(size) for size in sizes)
        tensors = sum(size.tensors for size in sizes)
        crowded = len(plan.devices) > 1
        channel = channels.replicas
        replicas = channel.size
        exposed = exchanged = after = 0.0
        # Whether each replica updates its rows of every parameter, off the device (train/row_owners.py).
        in_rows = plan.optimizer_on != "device" and self.workload.recipe.framework == "headway"
        if in_rows:
            gradient_bytes *= wire_bytes(plan.precision) / 4.0
        if replicas > 1 and plan.zero_stage < 2:
            of_experts = gradient_bytes * experts / elements if plan.expert > 1 and elements else 0.0
            exposed, exchanged = self._reduce_seconds(
                plan, held, gradient_bytes - of_experts, tensors, shards, samples, kinds, channel
            )
            if of_experts:
                # Experts are held by fewer replicas; they are reduced behind the others.
                seconds = comm.all_reduce_seconds(of_experts, channels.expert_replicas)
                exposed, exchanged = exposed + seconds, exchanged + seconds
        if replicas > 1 and plan.zero_stage < 2 and in_rows:
            count = math.ceil(gradient_bytes / plan.bucket_bytes)
            after = repeated(comm.all_gather_seconds, gradient_bytes, count, channel)
        elif replicas > 1 and plan.zero_stage == 1:
            if self.workload.recipe.framework == "headway":
                fullest = [0.0, 0.0]
                for stage in held:
                    part = max(self.sizes.zero1(stage.start, stage.stop, shards, replicas))
                    fullest = [fullest[0] + part[0], fullest[1] + part[1]]
                # Every rank sends what it has updated to the others, in one piece.
                after = repeated(comm.broadcast_seconds, gradient_bytes, replicas, channel)
                elements, tensors = fullest[0], int(fullest[1])
            else:
                gathered = sum(stages.gathered_bytes(plan, size) for size in sizes)
                after = comm.all_gather_seconds(gathered, channel)
                elements = (elements - experts) / replicas + experts / channels.expert_replicas.size
        if replicas > 1 and (plan.zero_stage >= 2 or in_rows):
            parts = [self.sizes.sharded(stage.start, stage.stop, shards, replicas) for stage in held]
            elements = float(sum(part.trainable_elements for part in parts))
        cover, last = self._beside_backward(plan, held[0], shards, samples, kinds, exposed)
        update, background, offload = self._update(plan, elements, gradient_bytes, tensors, kinds, crowded, cover, last)
        return RankParts(exposed, exchanged, update, after, 0.0, background, offload)

    def _beside_backward(
        self, plan: Plan, first: Stage, shards: Shards, samples: float, kinds: tuple[Accelerator, ...], reducing: float
    ) -> tuple[float, float]:
        """Seconds that gradients have to leave the device while the last micro-batch goes backward and is reduced.

        Counted from when the last layer's are made; and the share of the gradients that the first layer's are, which
        are made last. `first`: the stage that goes backward last.
        """
        if plan.optimizer_on == "device":
            return 0.0, 0.0
        share = samples / plan.context
        times = [self.stages.layer_times(kind, len(plan.devices) > 1, share, shards, plan.precision) for kind in kinds]
        again = set(first.recompute)

        def seconds(start: int, stop: int) -> float:
            found = max(one.backward[stop] - one.backward[start] for one in times)
            return found + sum(
                times[0].forward[at + 1] - times[0].forward[at] for at in range(start, stop) if at in again
            )

        size = self.sizes.parameters(first.start, first.stop, shards).trainable_elements
        own = self.sizes.parameters(first.start, first.start + 1, shards).trainable_elements
        return seconds(first.start, first.stop - 1) + reducing, own / max(size, 1)

    def _update(
        self, plan: Plan, elements: float, gradient_bytes: float, tensors: int, kinds: tuple[Accelerator, ...],
        crowded: bool, cover: float, last: float,
    ) -> tuple[float, float, Offload | None]:  # fmt: skip
        """(seconds that show, seconds beside the next step, their parts) of the optimizer.

        `cover`: seconds of the last backward pass beside which gradients leave for another tier; `last`: the share of
        them that the last layer makes.
        """
        recipe, optimizer = self.workload.recipe, self.workload.optimizer
        traffic = optimizer.traffic_bytes_per_element
        latencies = [self.stages.latency(kind, crowded) for kind in kinds]
        besides = 0.0
        if recipe.framework != "headway":
            # The gradients' norm is taken, they are scaled by it, and set to zero for the next step.
            besides = max(latency.streaming_seconds(4 * gradient_bytes) for latency in latencies)
        kept = elements if plan.optimizer_on == "device" else elements * plan.optimizer_kept
        count = math.ceil(tensors * kept / elements) if elements else tensors
        here = (
            max(latency.update_seconds(kept, count, traffic) for latency in latencies) if kept or not elements else 0.0
        )
        if plan.optimizer_on == "device" or not elements:
            return besides + here, 0.0, None
        device, tiers = plan.devices[0], self.stages.tiers
        away = elements - kept
        host = tiers.copy_rate("host", device)
        moments = moments_bytes(optimizer.state_bytes_per_element, plan.moments)
        update = away * (traffic - 2 * (optimizer.state_bytes_per_element - moments)) / tiers.update_rate(device)
        states = 0.0
        if plan.optimizer_on != "host":
            master = 4.0 if recipe.framework == "headway" else recipe.master_bytes
            states = 2 * away * (master + moments) / tiers.copy_rate(plan.optimizer_on, device)
        if recipe.framework == "headway":
            out = back = away * wire_bytes(plan.precision) / host
            exposed = out
            if self.stages.overlaps(plan, kinds):
                # The last layer's leave when backward is through.
                exposed = max(last * out, hidden_behind(out, cover, 0.0))
        else:
            # They go out when the step is done, in the same pass as parameters come back.
            element = gradient_bytes / max(elements, 1.0) if plan.zero_stage == 0 else recipe.gradient_bytes
            out, exposed, back = 0.0, 0.0, away * (element + recipe.parameter_bytes) / host
        parts = Offload(out, exposed, update, states, back, here)
        if plan.delayed_update:
            return besides + here + exposed, parts.seconds, parts
        return besides + exposed + max(here, parts.seconds), 0.0, parts

    def _reduce_seconds(
        self, plan: Plan, held: list[Stage], gradient_bytes: float, tensors: int, shards: Shards, samples: float,
        kinds: tuple[Accelerator, ...], channel: Channel,
    ) -> tuple[float, float]:  # fmt: skip
        """(exposed, all) seconds of reducing gradients in buckets while the last micro-batch goes backward.

        A bucket can leave when the layer that completes it has gone backward, and when the bucket before it is
        through (Li et al., PyTorch Distributed, VLDB 2020, section 3.2). Under ZeRO-1 each replica has the sums of what
        it updates alone, which halves what is moved (Rajbhandari et al., SC 2020, section 7); so it has with the
        optimizer off the device (Ren et al., ATC 2021, section 4.2).
        """
        stages = self.stages
        overlaps = stages.overlaps(plan, kinds)
        reduce = gradient_reduction(
            plan.zero_stage, self.workload.recipe.framework, optimizer_on=plan.optimizer_on,
            tensor_bytes=gradient_bytes / max(tensors, 1),
        )  # fmt: skip
        # Without overlap the runtime makes one bucket of everything.
        limit = float(plan.bucket_bytes) if plan.overlap else max(gradient_bytes, 1.0)
        whole = repeated(reduce, gradient_bytes, math.ceil(gradient_bytes / limit), channel)
        if not overlaps:
            return whole, whole
        # A bucket waits for the slowest kind of device.
        times = max(
            (
                stages.layer_times(kind, len(plan.devices) > 1, samples / plan.context, shards, plan.precision)
                for kind in kinds
            ),
            key=lambda times: times.backward[-1],
        )
        total = sum(self.sizes.parameters(stage.start, stage.stop, shards).trainable_elements for stage in held)
        byte_share = gradient_bytes / max(total, 1)
        bucket = reduce(limit, channel)
        made = self.sizes.parameter_sums(shards).of_layers("trainable_elements")
        now = sent = filled = 0.0
        for stage in reversed(held):
            again, attention = set(stage.recompute), set(stage.recompute_attention)
            for at in range(stage.stop - 1, stage.start - 1, -1):
                now += times.backward[at + 1] - times.backward[at]
                if at in again:
                    now += times.forward[at + 1] - times.forward[at]
                if at in attention:
                    now += times.attention[at + 1] - times.attention[at]
                filled += made[at] * byte_share
                if filled >= limit:
                    # One after the other: only the first of them may have to wait for the layer.
                    full = int(filled // limit)
                    sent = max(sent, now) + full * bucket
                    filled -= full * limit
        if filled > 0:
            sent = max(sent, now) + reduce(filled, channel)
        exposed = max(0.0, sent - now)
        exposed += stages.slowdown(kinds[0]) * max(0.0, whole - exposed)
        return exposed, whole

    def _tied_seconds(self, plan: Plan, rank: int, shards: Shards, along: tuple[Channel, ...]) -> float:
        """Summing the gradients of a parameter that several pipeline ranks hold (tied embeddings)."""
        if plan.pipeline == 1:
            return 0.0
        total = 0.0
        recipe = self.workload.recipe
        for parameter, layers in self.sizes.shared:
            holders = {
                position % plan.pipeline
                for position, stage in enumerate(plan.stages)
                if any(stage.start <= layer < stage.stop for layer in layers)
            }
            if len(holders) > 1 and rank in holders:
                channel = along[rank]._replace(size=len(holders), known=None)
                size = self.sizes.local_bytes(parameter, shards)
                if recipe.framework != "headway":
                    size *= recipe.gradient_bytes / 4
                elif plan.optimizer_on != "device" and plan.zero_stage < 2:
                    size *= wire_bytes(plan.precision) / 4.0 / (plan.data * plan.context)  # each replica's rows alone
                total += comm.all_reduce_seconds(size, channel)
        return total


def gradient_reduction(
    zero_stage: int, framework: str, *, optimizer_on: Tier, tensor_bytes: float
) -> Callable[[float, Channel], float]:
    """How replicas add up a bucket of gradients under ZeRO-0 and 1: its seconds, from its bytes and their channel.

    `framework`: whose runtime it is (`Recipe.framework`). `tensor_bytes`: gradients of an average tensor.
    """
    if zero_stage == 1 and framework != "headway":
        return comm.reduce_scatter_seconds
    if optimizer_on != "device" and framework == "headway":
        return to_rows_seconds
    if zero_stage == 1:
        return partial(to_owners_seconds, tensor_bytes=tensor_bytes)
    return comm.all_reduce_seconds


def to_rows_seconds(size_bytes: float, channel: Channel) -> float:
    """Seconds to reduce a bucket of gradients to the replicas that update their rows, off the device.

    A reduce-scatter; over gloo, whose own is an all-reduce, an all-to-all and a sum: (n-1)/n of it is moved.
    """
    if channel.backend == "gloo" and channel.size > 1 and channel.known is None:
        return channel.seconds(channel.size - 1, size_bytes * (channel.size - 1) / channel.size)
    return comm.reduce_scatter_seconds(size_bytes, channel)


def to_owners_seconds(size_bytes: float, channel: Channel, *, tensor_bytes: float) -> float:
    """Seconds to reduce a bucket of gradients to the replicas that own its tensors (ZeRO-1), one after the other.

    `tensor_bytes`: of an average tensor; few of them have few owners.
    """
    owners = min(channel.size, max(1, math.ceil(size_bytes / max(tensor_bytes, 1.0))))
    return repeated(comm.reduce_seconds, size_bytes, owners, channel)
