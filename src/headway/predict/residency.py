"""What rests on each rank, and when: the memory of a plan, put together from the sizes of its stages.

How many bytes a parameter takes follows the workload's `Recipe`; who divides them, and which buffers stand beside them,
follows the framework that trains:

- "headway": as `train/` does it. ZeRO 1 hands out whole tensors, ZeRO 2 and 3 are torch's `fully_shard`.
- "fsdp", "torchtitan": `fully_shard` with parameters gathered in 16 bits. What no layer of its own holds (embedding,
  projection) belongs to the root, which stays gathered, its gradients too until backward is through.
- "megatron": gradients in one buffer; ZeRO 1 is the distributed optimizer.
- "megatron-deepspeed": ZeRO over one flat tensor of all parameters, with DeepSpeed's buckets and the float32 copy of
  its share of the gradients that the update makes.

States are divided over the data x context ranks, experts' over what the expert group leaves of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from headway.hardware.cluster import Cluster
from headway.plan.plan import Plan, Stage
from headway.predict.memory import ActivationBytes, Keeping, Sizes
from headway.predict.operators import Shards
from headway.predict.outline import Outline, outline_of
from headway.predict.pipeline import in_flight
from headway.predict.prediction import Memory
from headway.predict.splits import Splits
from headway.predict.tiers import keeps_masters, moments_bytes, rest
from headway.workload.graph import Workload

__all__ = ["Residency"]

# What a CUDA context with the kernels of PyTorch takes, which no allocator counts, by generation: 1271 MiB on V100 and
# 1573 MiB on A100 with CUDA 11 (BigScience, bigscience/train/tr11-176B-ml/chronicles-prequel.md), about 0.5 GiB since
# CUDA 11.7 loads kernels when they are first used.
_CONTEXT_BYTES = {"P100": 1.2e9, "V100": 1.33e9, "A100": 1.65e9} | dict.fromkeys(
    ("T4", "A10", "A30", "L4", "L40S", "H100", "H200", "B200", "GB200", "GB300", "MI250X", "MI300X"), 0.55e9
)
# NCCL's buffers for each communicator: 4 MiB (NCCL_BUFFSIZE) and two smaller ones for each channel and connection, some
# tens of channels. Fitted, together with the next figure, on the rows that `published.is_fitted` names.
_COMMUNICATOR_BYTES = 0.4e9
# Bytes for each logit while the loss is at work. PyTorch's cross entropy on a float32 copy of 16-bit logits (2) holds,
# in backward, the logarithmic softmax and two gradients (4 + 4 + 4); the copy's block is taken again by one of these.
# torchtitan compiles its layers and not its loss (train.py). A fused loss of 16-bit logits (flash-attn's) holds them
# and their gradient. Others: what the graph says.
_LOGIT_BYTES = {("torchtitan", False): 14.0, ("torchtitan", True): 14.0, ("fsdp", False): 14.0, ("fsdp", True): 4.0}
# Transformer Engine keeps for backward what it has cast a matrix product's input to: one byte, or 4 bits and a scale of
# one byte for each 16. torchao (torchtitan) keeps the 16-bit input.
_INPUT_BYTES = {"float8": 1.0, "float4": 0.5625}
# Share of what is allocated at the peak that torch's caching allocator holds on top: blocks are rounded to 2 MiB, and
# what one phase frees in small pieces the next cannot use for large ones.
_FRAGMENTATION = 0.04
# torch gives cuBLAS this much room on Hopper and later, less before (seen on an H100: the first product took 32 MiB).
# Of a GPU that was probed; what is fitted for the catalogue's covers it.
_CUBLAS_BYTES = 32 * 2.0**20
# The largest piece of gradients that Headway's replicas exchange over gloo (train/row_owners.py).
_EXCHANGED_BYTES = 2.0**20
# DeepSpeed's defaults, in elements: reduce_bucket_size, and of ZeRO 3 max_live_parameters and sub_group_size.
_DEEPSPEED_BUCKET_ELEMENTS = 5e8
_DEEPSPEED_LIVE_ELEMENTS = 1e9
_DEEPSPEED_GROUP_ELEMENTS = 1e9


class _Held(NamedTuple):
    """Parameters of one rank's stages before data parallelism divides them: elements, and bytes.

    `computed`: as they are computed with. `largest`: so, of the layer that has most. `largest_tensor`: elements.
    """

    elements: float
    trainable: float
    experts: float
    largest_tensor: float
    parameters: float
    gradients: float
    computed: float
    largest: float


class _States(NamedTuple):
    """Bytes of states on one rank, and of what moves them.

    `update`: temporaries of the update, when activations are gone. `working`: gradients on their way while a layer goes
    backward. `largest`: parameters of the layer that has most, as they are computed with. `updated`: elements.
    """

    parameters: float
    gradients: float
    optimizer: float
    communication: float
    update: float
    working: float = 0.0
    largest: float = 0.0
    updated: float = 0.0


class _HeldStage(NamedTuple):
    """Activations of one micro-batch in a stage: as a whole, and at the peaks, when what rests elsewhere is away.

    `swapped`: bytes that rest elsewhere; `behind`: bytes of the layers after the last of those; `is_last`: in the
    model.
    """

    size: ActivationBytes
    peak: ActivationBytes
    swapped: float
    behind: float
    is_last: bool


class _Holding(NamedTuple):
    """What a rank holds, whatever is in flight there; `inputs`: bytes of the batch, `communicators`: see there."""

    states: _States
    stages: tuple[_HeldStage, ...]
    replicas: int
    inputs: float
    communicators: int


_Place = tuple[tuple[int, ...], tuple[int, int], int]  # classes of stages, degrees, elements updated


class _Known(NamedTuple):
    """Ranks of plans that are alike but for their stages and devices; `stages`: by class, and by `_States.working`."""

    stages: dict[tuple[int, float], _HeldStage]
    holdings: dict[_Place, _Holding]
    ranks: dict[tuple[_Place, tuple[int, ...], str], Memory]


class Residency:
    """Memory of plans of one workload on one cluster; what plans share is computed once."""

    def __init__(self, workload: Workload, cluster: Cluster, sizes: Sizes, splits: Splits | None = None) -> None:
        self.workload = workload
        self.sizes = sizes
        self._kind_of = {device.name: device.accelerator for device in cluster.devices}
        self._is_cpu = {kind.name: kind.torch_device == "cpu" for kind in cluster.accelerators.values()}
        self._is_probed = {kind.name: kind.source == "measured" for kind in cluster.accelerators.values()}
        self.splits = splits or Splits(workload.graph)
        self._updated: dict[tuple, tuple[int, ...]] = {}
        # By what holds for a whole plan; then by what differs from rank to rank.
        self._known: dict[tuple, _Known] = {}

    def memory(self, plan: Plan, outline: Outline | None = None) -> tuple[Memory, ...]:
        """Peak memory of each rank under `plan`; ranks that are alike share one value. `outline`: the plan's."""
        outline = outline or outline_of(plan, self.sizes, self.splits)
        handed = self._handed_out(plan, outline)
        found: list[Memory] = []
        if not handed:
            for rank, memory in enumerate(self._one_each(plan, outline, (-1,) * plan.pipeline)):
                found.extend((memory,) * plan.width(rank))
            return tuple(found)
        for rank, updated in enumerate(handed):
            made = {elements: self._one_each(plan, outline, (elements,), rank)[0] for elements in set(updated)}
            for elements in updated:
                found.extend((made[elements],) * plan.degrees(rank)[1])
        return tuple(found)

    def peaks(self, plan: Plan, outline: Outline | None = None) -> tuple[Memory, ...]:
        """Memory of the fullest rank of each pipeline rank: what a search asks, however many ranks there are."""
        outline = outline or outline_of(plan, self.sizes, self.splits)
        handed = self._handed_out(plan, outline)
        most = [max(updated) for updated in handed] if handed else (-1,) * plan.pipeline
        return tuple(self._one_each(plan, outline, most))

    def peaks_of(self, plan: Plan, memory: tuple[Memory, ...]) -> tuple[Memory, ...]:
        """`peaks`, where the `memory` of each rank is at hand."""
        if plan.zero_stage == 1 and plan.optimizer_on == "device" and self.workload.recipe.framework == "headway":
            return self.peaks(plan)
        return tuple([memory[plan.first_rank(rank)] for rank in range(plan.pipeline)])

    def _handed_out(self, plan: Plan, outline: Outline) -> list[tuple[int, ...]]:
        """Under Headway's ZeRO-1, which hands out whole tensors, what each replica updates (`_updated_by`)."""
        if plan.zero_stage != 1 or plan.optimizer_on != "device" or self.workload.recipe.framework != "headway":
            return []
        return [
            self._updated_by(plan, rank, outline.shards[rank], plan.degrees(rank)[0] * plan.context)
            for rank in range(plan.pipeline)
        ]

    def _known_of(self, plan: Plan) -> _Known:
        key = (plan.data, plan.tensor, plan.pipeline, plan.micro_batch, plan.global_batch, plan.context, plan.expert,
               plan.zero_stage, plan.sequence_parallel, plan.precision, plan.schedule, plan.parameters_on,
               plan.optimizer_on, plan.activations_on, plan.optimizer_kept, plan.moments, plan.delayed_update,
               plan.bucket_bytes if plan.optimizer_on != "device" else 0, plan.shares)  # fmt: skip
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = _Known({}, {}, {})
        return found

    def _updated_by(self, plan: Plan, rank: int, shards: Shards, replicas: int) -> tuple[int, ...]:
        """Elements that each of the replicas of a pipeline rank updates under ZeRO-1."""
        held = tuple((plan.stages[at].start, plan.stages[at].stop) for at in plan.stages_of(rank))
        key = (held, shards, replicas)
        found = self._updated.get(key)
        if found is None:
            parts = [self.sizes.zero1(start, stop, shards, replicas) for start, stop in held]
            found = self._updated[key] = tuple(sum(part[at][0] for part in parts) for at in range(replicas))
        return found

    def shards_of(self, plan: Plan, rank: int = 0) -> Shards:
        """How tensor parallelism divides the model on a pipeline rank (`Splits.of`)."""
        return self.splits.of(plan, rank)

    # -- states

    def _states(self, plan: Plan, stages: Sequence[Stage], shards: Shards, replicas: int, updated: int) -> _States:
        """Of the fullest rank that holds these stages; `updated`: elements it updates, -1 where that follows."""
        held = self._held(plan, stages, shards)
        share = 1.0
        in_rows = plan.optimizer_on != "device" and self.workload.recipe.framework == "headway"
        if (plan.zero_stage or in_rows) and replicas > 1:
            # Experts are replicated only over what the expert group leaves.
            dense = held.trainable - held.experts
            share = (dense + held.experts * plan.expert) / replicas / max(held.trainable, 1.0)
        mine = float(updated) if updated >= 0 else held.trainable * share
        framework = self.workload.recipe.framework
        gathers = framework in ("headway", "fsdp", "torchtitan") or (framework == "megatron" and plan.zero_stage == 3)
        if replicas > 1 and plan.zero_stage >= 2 and gathers:
            states = self._fully_sharded(plan, stages, shards, replicas, held, share, mine)
        elif framework in ("megatron", "megatron-deepspeed"):
            states = self._megatron(plan, replicas, held, share, mine)
        else:
            # DDP's buckets stand beside the gradients; in Headway's runtime only until the last micro-batch, to which
            # the others' gradients are added.
            apart = replicas > 1 and (framework != "headway" or plan.micro_batches > 1)
            buckets = held.gradients if apart else 0.0
            states = _States(
                held.parameters, held.gradients, self._optimizer(mine), buckets, self._temporary(mine), updated=mine
            )
        states = states._replace(largest=held.largest)
        if self._is_lean(plan):
            # Parameters and gradients in 16 bits alone; the part that is updated here has float32 copies here.
            states = states._replace(
                parameters=states.parameters / 2, gradients=states.gradients / 2,
                communication=states.communication / 2, largest=states.largest / 2,
                optimizer=states.optimizer + 4.0 * states.updated,
            )  # fmt: skip
        return states._replace(parameters=states.parameters + self.workload.graph.buffer_bytes)

    def _is_lean(self, plan: Plan) -> bool:
        """Whether Headway's runtime keeps parameters in `precision` alone (otherwise autocast makes copies)."""
        off = plan.optimizer_on != "device" and plan.precision != "float32"
        return off and self.workload.recipe.framework == "headway"

    def _held(self, plan: Plan, stages: Sequence[Stage], shards: Shards) -> _Held:
        recipe = self.workload.recipe
        sizes = [self.sizes.parameters(stage.start, stage.stop, shards, plan.expert) for stage in stages]
        elements = float(sum(size.elements for size in sizes))
        trainable = float(sum(size.trainable_elements for size in sizes))
        if recipe.framework == "headway":
            # As traced; autocast computes with a copy that counts as an activation.
            parameters = computed = float(sum(size.bytes for size in sizes))
            gradients = float(sum(size.trainable_bytes for size in sizes))
            largest = float(max(size.largest_layer_bytes for size in sizes))
        else:
            in_compute = min(recipe.parameter_bytes, 2.0 if plan.precision != "float32" else 4.0)
            parameters, computed = elements * recipe.parameter_bytes, elements * in_compute
            gradients = trainable * recipe.gradient_bytes
            largest = max(size.largest_layer_elements for size in sizes) * in_compute
        return _Held(
            elements=elements,
            trainable=trainable,
            experts=float(sum(size.expert_elements for size in sizes)),
            largest_tensor=float(max(size.largest_tensor_elements for size in sizes)),
            parameters=parameters,
            gradients=gradients,
            computed=computed,
            largest=largest,
        )

    def _optimizer(self, elements: float) -> float:
        return elements * (self.workload.optimizer.state_bytes_per_element + self.workload.recipe.master_bytes)

    def _temporary(self, elements: float) -> float:
        return elements * self.workload.optimizer.temporary_bytes_per_element

    def _fully_sharded(
        self, plan: Plan, stages: Sequence[Stage], shards: Shards, replicas: int, held: _Held, share: float, mine: float
    ) -> _States:
        """`fully_shard`, stages 2 and 3: parameters gathered when they are needed, beside the rank's share of them."""
        parameters, gradients = held.parameters * share, held.gradients * share
        if self.workload.recipe.framework == "headway":
            if plan.expert == 1:
                pieces = [self.sizes.sharded(stage.start, stage.stop, shards, replicas) for stage in stages]
                mine = float(sum(piece.trainable_elements for piece in pieces))
                parameters = float(sum(piece.bytes for piece in pieces))
                gradients = float(sum(piece.trainable_bytes for piece in pieces))
            # The layer at work and the next one, fetched early, and one layer's gradients on their way.
            gathered, working, beside = min(2 * held.largest, held.computed), 0.0, held.largest
        else:
            gathered, working = self._gathered(plan, stages, shards, held)
            beside = 0.0
        if plan.zero_stage == 2 or plan.pipeline > 1:
            gathered = held.computed  # from forward to backward
        if plan.pipeline > 1:
            gradients = held.gradients  # scattered once, after the last micro-batch
        return _States(
            parameters,
            gradients,
            self._optimizer(mine),
            gathered + beside,
            self._temporary(mine),
            working,
            updated=mine,
        )

    def _gathered(self, plan: Plan, stages: Sequence[Stage], shards: Shards, held: _Held) -> tuple[float, float]:
        """What `fully_shard` keeps gathered, and gradients on their way while a layer goes backward.

        Gathered are the layer at work, the next one, fetched early, and the root: what stands outside of the repeated
        layers, embedding and projection, which is not resharded. A layer's gradients are there once as they are made
        and twice as they are reduced: of this layer, and of the one before, whose reduce-scatter may still run. The
        projection's wait for the embedding's, which come last, when no activations are left. In a pipeline gradients
        stay whole, and are only made layer by layer.
        """
        last = len(self.workload.graph.layers) - 1
        sizes = {at: self.sizes.parameters(at, at + 1, shards, plan.expert).elements
                 for stage in stages for at in range(stage.start, stage.stop)}  # fmt: skip
        element_bytes = held.computed / max(held.elements, 1.0)
        root = float(sizes.get(0, 0) + sizes.get(last, 0))
        largest = float(max((size for at, size in sizes.items() if 0 < at < last), default=0.0))
        gathered = min(held.computed, (root + 2 * largest) * element_bytes)
        if plan.pipeline > 1:
            return gathered, largest * element_bytes
        waiting = float(sizes.get(last, 0)) * element_bytes
        return gathered, waiting + largest * (element_bytes + 2 * self.workload.recipe.gradient_bytes)

    def _megatron(self, plan: Plan, replicas: int, held: _Held, share: float, mine: float) -> _States:
        """Megatron's and DeepSpeed's: 16-bit parameters, gradients in one buffer, float32 copies with the optimizer."""
        recipe = self.workload.recipe
        parameters, gradients = held.parameters, held.gradients
        communication = update = 0.0
        if recipe.framework == "megatron-deepspeed":
            communication = self._deepspeed(plan, replicas, held, mine)
        elif recipe.gradient_bytes < 4.0 and recipe.master_bytes:
            update = 4.0 * mine  # the update reads float32 gradients
        if plan.zero_stage >= 2 and replicas > 1:
            gradients *= share
        if plan.zero_stage == 3 and replicas > 1:
            parameters *= share
            communication += min(_DEEPSPEED_LIVE_ELEMENTS * 2, held.computed) + held.largest
        # A parameter's gradient is made whole, then added to those of the micro-batches before.
        working = held.largest_tensor * held.computed / max(held.elements, 1.0)
        return _States(parameters, gradients, self._optimizer(mine), communication, update, working, updated=mine)

    def _deepspeed(self, plan: Plan, replicas: int, held: _Held, mine: float) -> float:
        """DeepSpeed's buffers: its bucket, and what a step makes in blocks larger than any that backward has freed.

        That is a float64 copy of one gradient after the other for the norm (`get_grad_norm_direct`), and then the
        rank's share of all gradients in one flat tensor, as they are and in float32 (runtime/zero/stage_1_and_2.py,
        `step`). Both come on top of what backward needed: the allocator cannot join smaller blocks.
        """
        gradient_bytes = self.workload.recipe.gradient_bytes
        bucket = min(_DEEPSPEED_BUCKET_ELEMENTS, held.trainable) * gradient_bytes if replicas > 1 else 0.0
        if not plan.zero_stage or replicas == 1:
            return bucket + 4.0 * mine
        if plan.zero_stage == 3:
            return bucket + 4.0 * min(mine, _DEEPSPEED_GROUP_ELEMENTS)  # tensor by tensor, in groups
        return bucket + max(8.0 * min(mine, held.largest_tensor), (4.0 + gradient_bytes) * mine)

    # -- one rank

    def _one_each(self, plan: Plan, outline: Outline, updated: Sequence[int], first: int = 0) -> list[Memory]:
        """Peak of one rank of each pipeline rank from `first` on; `updated`: elements it updates, -1: that follows."""
        known = self._known_of(plan)
        found = []
        for rank, elements in enumerate(updated, first):
            flights = self.flights(plan, rank)
            kind = self._kind_of[plan.devices[plan.first_rank(rank)]]
            place = (outline.held[rank], plan.degrees(rank), elements)
            key = (place, flights, kind)
            memory = known.ranks.get(key)
            if memory is None:
                holding = known.holdings.get(place)
                if holding is None:
                    holding = known.holdings[place] = self._hold(plan, outline, known, rank, elements)
                memory = known.ranks[key] = self._compose(plan, holding, flights, kind)
            found.append(memory)
        return found

    def flights(self, plan: Plan, rank: int) -> tuple[int, ...]:
        """For each stage of a pipeline rank, micro-batches of which it holds activations when it holds most."""
        if plan.pipeline == 1:
            return (1,)
        return in_flight(plan.schedule, rank, plan.pipeline, plan.virtual_stages, plan.micro_batches)

    def _hold(self, plan: Plan, outline: Outline, known: _Known, rank: int, updated: int) -> _Holding:
        """What a rank holds, whatever is in flight there; `updated`: elements that it updates, -1 if that follows."""
        shards, samples = outline.shards[rank], outline.samples[rank]
        held = [outline.stages[at] for at in plan.stages_of(rank)]
        replicas = plan.degrees(rank)[0] * plan.context
        states = self._states(plan, [alike.stage for alike in held], shards, replicas, updated)
        stages = []
        for number, stage in held:
            # Stages of other degrees are of another class.
            found = known.stages.get((number, states.working))
            if found is None:
                found = self._hold_stage(plan, stage, samples, shards, states.working)
                known.stages[number, states.working] = found
            stages.append(found)
        # Every rank holds its replica's share of the batch; Megatron's read one micro-batch after the other.
        batch = plan.micro_batch * plan.micro_batches if plan.shares else plan.global_batch // plan.data
        if self.workload.recipe.framework in ("megatron", "megatron-deepspeed"):
            batch = plan.micro_batch
        inputs = sum(one.bytes(batch) for one in self.workload.graph.inputs) / plan.context
        return _Holding(states, tuple(stages), replicas, inputs, self._communicators(plan, rank))

    def _hold_stage(self, plan: Plan, stage: Stage, samples: float, shards: Shards, working: float) -> _HeldStage:
        size = self.activations(plan, stage, samples, shards, working)
        swapped = self._swapped(plan, stage, samples, shards, size)
        behind, peak = 0.0, size
        if plan.pipeline > 1:
            behind = self._after_swapped(plan, stage, samples, shards)
        elif away := plan.swapped_layers(stage):
            # What comes back while layers go backward is part of the peaks, layer by layer.
            peak = self.activations(plan, stage, samples, shards, working, away)
        return _HeldStage(size, peak, swapped, behind, stage.stop == len(self.workload.graph.layers))

    def _compose(self, plan: Plan, holding: _Holding, flights: tuple[int, ...], kind: str) -> Memory:
        recipe, replicas = self.workload.recipe, holding.replicas
        piped = plan.pipeline > 1
        m = plan.micro_batches
        states = holding.states
        gradients, communication = states.gradients, states.communication
        kept = most_kept = loss = away = behind = 0.0
        extra = 0.0
        extra_with_gradients = 0.0
        for (size, peak, swapped, after, last), flight in zip(holding.stages, flights, strict=True):
            loss += size.loss
            away += flight * swapped
            if piped:
                most_kept = max(most_kept, size.largest_kept)
                behind += flight * after
            kept += peak.kept * flight
            extra = max(extra, peak.peak - peak.kept)
            extra_with_gradients = max(extra_with_gradients, peak.peak_with_gradients - peak.kept)
            if piped:
                if recipe.framework in ("megatron", "megatron-deepspeed"):
                    # The input of each micro-batch in flight, and the gradient that arrives and the one that leaves.
                    communication += size.input * (flight + 1) + (0.0 if last else size.output)
                    if recipe.framework == "megatron" and not last:
                        kept -= size.output * max(0, flight - 1)  # released once it is sent
                else:
                    # torch.distributed.pipelining receives every micro-batch into a buffer of its own, both ways.
                    communication += m * (size.input + (0.0 if last else size.output))
        kept += holding.inputs
        parameters, optimizer, update = states.parameters, states.optimizer, states.update
        resting = None
        if plan.tiers:
            away = min(away, kept - loss) if piped else away
            on_cpu = self._is_cpu[kind] and recipe.framework == "headway"
            resting = rest(
                plan, parameters=parameters, gradients=gradients, optimizer=optimizer, activations=away,
                largest_layer=states.largest, largest_kept=most_kept, updated=states.updated,
                master=(4.0 if keeps_masters(plan, on_cpu=on_cpu) else 0.0)
                if recipe.framework == "headway"
                else recipe.master_bytes,
                moments=moments_bytes(self.workload.optimizer.state_bytes_per_element, plan.moments),
                # Where the device is the host, there is nowhere to stream them to; DDP's buckets stay.
                streams_gradients=recipe.framework == "headway" and not on_cpu and _is_hooked(plan, replicas),
                slices=replicas if plan.zero_stage < 3 else 1,
            )  # fmt: skip
            parameters, gradients, optimizer = resting.parameters, resting.gradients, resting.optimizer
            communication += resting.buffers
            # What a layer is at work with stays, and comes when what was kept of the layers after it has gone.
            returned = min(2 * most_kept, away)
            communication -= min(returned, behind)
            if piped:
                kept = kept - away + max(0.0, min(away, most_kept) - max(0.0, behind - returned))
            if plan.optimizer_on != "device" and recipe.framework == "headway":
                update *= plan.optimizer_kept
        # Without buckets (one replica) gradients are made anew in each step, while activations are released.
        fresh = recipe.framework == "headway" and replicas == 1 and m == 1 and not piped
        together = kept + extra_with_gradients if fresh else kept + extra + gradients
        if recipe.framework == "headway" and replicas > 1 and plan.zero_stage >= 2 and m == 1 and not piped:
            # A rank's share of them grows more slowly than activations are released.
            together = max(kept + extra, extra + gradients)
        if self._is_cpu[kind] and self._updates_at_once(plan, replicas):
            # Each is gone before the next is made, but for those of the elements kept, and of one layer.
            gradients = 0.0
            together = kept + extra
        if plan.optimizer_on != "device" and recipe.framework == "headway" and replicas > 1 and plan.zero_stage < 2:
            # Two pieces of gradients on their way to who updates their rows, there and back (train/row_owners.py).
            limit = _EXCHANGED_BYTES if self._is_cpu[kind] else float(plan.bucket_bytes)
            update = max(update, 2.0 * min(limit, gradients) * (2.0 if self._is_cpu[kind] else 1.0 + 1.0 / replicas))
        together = max(together, gradients + update)
        # What gave way to gradients before the peak is not counted twice.
        activations = min(kept, together - gradients)
        workspace = together - gradients - activations
        outside = 0.0
        if not self._is_cpu[kind]:
            generation = _CONTEXT_BYTES.get(kind.split("-")[0], 0.0)
            outside = generation + (_COMMUNICATOR_BYTES * holding.communicators if generation else 0.0)
            workspace += _CUBLAS_BYTES if self._is_probed[kind] else 0.0
        if outside:
            allocated = parameters + gradients + optimizer + activations + communication + workspace
            workspace += _FRAGMENTATION * allocated
        return Memory(
            parameters_bytes=parameters,
            gradients_bytes=gradients,
            optimizer_bytes=optimizer,
            activations_bytes=activations,
            communication_bytes=communication,
            workspace_bytes=workspace,
            outside_bytes=outside,
            pinned_bytes=0.0 if resting is None or self._is_cpu[kind] else resting.pinned,
            **{} if resting is None else {f"{tier}_bytes": size for tier, size in resting.tiers.items()},
        )

    def _updates_at_once(self, plan: Plan, replicas: int) -> bool:
        """Whether Headway's runtime updates off the device as soon as backward has made a gradient."""
        off = plan.optimizer_on != "device" and self.workload.recipe.framework == "headway"
        return off and _is_hooked(plan, replicas) and plan.micro_batches == 1 and not plan.delayed_update

    def _swapped(self, plan: Plan, stage: Stage, samples: float, shards: Shards, size: ActivationBytes) -> float:
        """Bytes of one micro-batch's activations that rest elsewhere between forward and backward."""
        if plan.activations_on == "device":
            return 0.0
        if not stage.swap:
            return size.kept - size.loss
        found = 0.0
        for at in stage.swap:
            again = (at,) if at in stage.recompute else ()
            cores = (at,) if at in stage.recompute_attention else ()
            own = Stage(start=at, stop=at + 1, recompute=again, recompute_attention=cores)
            part = self.activations(plan, own, samples, shards)
            found += part.kept - part.loss
        return min(found, size.kept - size.loss)

    def _after_swapped(self, plan: Plan, stage: Stage, samples: float, shards: Shards) -> float:
        """Bytes that one micro-batch keeps of the layers after the last swapped one: gone when that goes backward."""
        if plan.activations_on == "device" or not stage.swap:
            return 0.0
        first = max(stage.swap) + 1
        if first >= stage.stop:
            return 0.0
        own = Stage(
            start=first,
            stop=stage.stop,
            recompute=tuple(at for at in stage.recompute if at >= first),
            recompute_attention=tuple(at for at in stage.recompute_attention if at >= first),
        )
        return self.activations(plan, own, samples, shards).kept

    def activations(
        self,
        plan: Plan,
        stage: Stage,
        samples: float,
        shards: Shards,
        working: float = 0.0,
        away: tuple[int, ...] = (),
    ) -> ActivationBytes:
        """`Sizes.activations` of one stage, as `plan` divides and recomputes; `working`: of gradients, as each goes."""
        recipe, low = self.workload.recipe, plan.precision != "float32"
        keeping = Keeping(
            context=plan.context,
            sequence_parallel=plan.sequence_parallel and shards.degree > 1,
            autocast=recipe.framework == "headway" and not self._is_lean(plan),
            products=recipe.framework == "torchtitan",
            logit_bytes=_LOGIT_BYTES.get((recipe.framework, recipe.compiled), 0.0) if low else 0.0,
            input_bytes=_INPUT_BYTES.get(plan.precision, 2.0) if recipe.framework == "megatron" else 2.0,
            working=working,
        )
        again = stage.recompute_attention
        return self.sizes.activations(
            stage.start, stage.stop, stage.recompute, samples, shards, plan.precision, again, keeping, away
        )

    def _communicators(self, plan: Plan, rank: int) -> int:
        """Groups that a rank speaks in, each with buffers of its own: all ranks, each axis, and pipeline neighbours."""
        data, tensor = plan.degrees(rank)
        axes = sum(size > 1 for size in (data, tensor, plan.context, plan.expert))
        return (plan.world_size > 1) + axes + (2 if plan.pipeline > 1 else 0)


def _is_hooked(plan: Plan, replicas: int) -> bool:
    """Whether in Headway's runtime a gradient is complete as soon as autograd has made it, so that it can leave."""
    return plan.pipeline == 1 and (replicas == 1 or plan.zero_stage >= 2)
