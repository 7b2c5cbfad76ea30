"""The decision as data: everything that the runtime needs to know about how to train a model on some devices.

Ranks form a mesh of `pipeline` x `data` x `context` x `tensor`, tensor fastest: rank = ((p * data + d) * context + c) *
tensor + t, and rank r runs on `devices[r]`. Stages may have degrees of their own (`Stage.data`, `Stage.tensor`): then
each pipeline rank is as wide as its stages say, and its ranks still follow each other.
A plan does nothing by itself: `predict` says what it costs, the runtime in `train/` carries it out.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from headway.errors import PlanError
from headway.hardware.cluster import Cluster
from headway.value import Value
from headway.workload.graph import Graph

__all__ = ["Plan", "Stage", "single_device_plan"]

Schedule = Literal["none", "gpipe", "1f1b", "interleaved", "zero_bubble"]
Precision = Literal["float32", "bfloat16", "float16", "float8", "float4"]
Tier = Literal["device", "host", "remote", "disk"]
Moments = Literal["float32", "bfloat16", "int8"]


class Stage(Value):
    """Consecutive layers `start` to `stop` (exclusive) of the graph.

    `recompute` lists the layers run again in backward; `recompute_attention` those of which only the attention core
    (scores, softmax, and their product with the values) is run again (selective recomputation, Korthikanti et al.,
    MLSys 2023). `swap` lists the layers whose saved activations rest on the plan's `activations_on` between forward
    and backward; empty: all that are not recomputed do, unless that is "device". `data` and `tensor`: degrees of this
    stage; 0 means the plan's.
    """

    start: int
    stop: int
    recompute: tuple[int, ...] = ()
    recompute_attention: tuple[int, ...] = ()
    swap: tuple[int, ...] = ()
    data: int = 0
    tensor: int = 0


class Plan(Value):
    """How to train. Every field has one meaning, and `validate` refuses what contradicts itself.

    - `data`, `tensor`, `pipeline`, `context`: degrees; their product is the number of ranks, unless stages have degrees
      of their own. `context` divides each sample's tokens over that many ranks (ring attention, Liu et al., ICLR 2024).
    - `expert`: over how many of the `data` x `context` ranks the experts of a mixture are divided; it divides them.
    - `sequence_parallel`: activations outside the tensor-parallel blocks are divided by tokens over the tensor ranks,
      all-gather and reduce-scatter in place of all-reduce (Korthikanti et al., MLSys 2023).
    - `stages`: in order; `pipeline` of them, or for the interleaved schedule a multiple v of it, where stage s runs on
      pipeline rank s mod pipeline.
    - `micro_batch`: samples that one data-parallel replica processes at once;
      `global_batch` = `micro_batch` x `data` x number of micro-batches.
    - `schedule`: "none" without a pipeline; "gpipe" (Huang et al., NeurIPS 2019), "1f1b" (PipeDream-Flush, Narayanan
      et al., ICML 2021), "interleaved" (Megatron-LM, SC 2021) or "zero_bubble" (ZB-H1, Qi et al., ICLR 2024).
    - `zero_stage`: 0 replicates, 1 divides the optimizer states, 2 the gradients too, 3 the parameters too
      (Rajbhandari et al., SC 2020), over the data-parallel ranks.
    - `tensor_sharding`: module path to "column" or "row" (see `workload.graph.TensorBlock`); empty when tensor is 1.
    - `precision`: dtype of the forward and backward pass; parameters and optimizer states stay in float32, unless the
      workload's `Recipe` says otherwise. In "float8" and "float4" only matrix products are, the rest is bfloat16.
    - `shares`: micro-batches of each data-parallel replica where they differ (unequal devices); empty: all the same.
      Then `global_batch` = `micro_batch` x sum of `shares`.
    - `parameters_on`, `optimizer_on`, `activations_on`: where each state rests between its uses. With the optimizer off
      the device, its float32 master parameters and moments rest there, gradients go there as backward makes them, and
      the device holds parameters in `precision` alone (ZeRO-Offload, Ren et al., ATC 2021; "disk" and "remote":
      ZeRO-Infinity, Rajbhandari et al., SC 2021).
    - `optimizer_kept`: the fraction of the optimizer's elements that stays on the device all the same.
    - `delayed_update`: the host's update of step t runs beside step t + 1, whose gradients therefore come from
      parameters one step old, once `delay_warmup` steps have been made without (ZeRO-Offload, section 5.2).
    - `moments`: how an optimizer off the device keeps its moments; "int8" in blocks with a scale each.
    - `tiles`: module path to the number of tiles in which a linear layer is run, one tile whole at a time
      (memory-centric tiling, ZeRO-Infinity section 5.1.3).
    - `collectives`: axis ("data", "tensor", …) to the algorithm that its collectives use (`collective.algorithms`);
      an axis that is not listed: the exchange's own choice.
    - `bucket_bytes`: gradients are reduced in buckets of this size while backward goes on, if `overlap`.
    - `exchange`: who carries out the collectives: torch's own backend (gloo, nccl), or Headway's programs.
    - `devices`: the name of each rank's device in the cluster.
    """

    model: str
    devices: tuple[str, ...]
    global_batch: int
    micro_batch: int
    stages: tuple[Stage, ...]
    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    schedule: Schedule = "none"
    zero_stage: Literal[0, 1, 2, 3] = 0
    tensor_sharding: dict[str, Literal["column", "row"]] = {}
    precision: Precision = "float32"
    bucket_bytes: int = 25 * 2**20
    overlap: bool = True
    exchange: Literal["torch", "headway"] = "torch"
    context: int = 1
    expert: int = 1
    sequence_parallel: bool = False
    shares: tuple[int, ...] = ()
    parameters_on: Tier = "device"
    optimizer_on: Tier = "device"
    activations_on: Tier = "device"
    optimizer_kept: float = 0.0
    delayed_update: bool = False
    delay_warmup: int = 40
    moments: Moments = "float32"
    tiles: dict[str, int] = {}
    collectives: dict[str, str] = {}

    @cached_property
    def is_uniform(self) -> bool:
        """Whether every stage has the plan's own degrees."""
        return not any(stage.data or stage.tensor for stage in self.stages)

    @property
    def tiers(self) -> frozenset[Tier]:
        """Where something rests off the device; empty: nothing does."""
        resting: tuple[Tier, ...] = (self.parameters_on, self.optimizer_on, self.activations_on)
        return frozenset(tier for tier in resting if tier != "device")

    def swapped_layers(self, stage: Stage) -> tuple[int, ...]:
        """Layers of a stage whose saved activations rest on `activations_on`: `swap`, or all where none is listed."""
        if self.activations_on == "device":
            return ()
        return stage.swap or tuple(range(stage.start, stage.stop))

    @property
    def world_size(self) -> int:
        if self.is_uniform:
            return self.data * self.tensor * self.context * self.pipeline
        return sum(self.width(rank) for rank in range(self.pipeline))

    @property
    def micro_batches(self) -> int:
        """Micro-batches that a replica runs in one step (the busiest one, where `shares` differ)."""
        if self.shares:
            return max(self.shares)
        return self.global_batch // (self.micro_batch * self.data)

    def degrees(self, pipeline_rank: int) -> tuple[int, int]:
        """(data, tensor) degrees of the stages on a pipeline rank."""
        stage = self.stages[pipeline_rank]
        return stage.data or self.data, stage.tensor or self.tensor

    def width(self, pipeline_rank: int) -> int:
        """Ranks that a pipeline rank is made of."""
        data, tensor = self.degrees(pipeline_rank)
        return data * tensor * self.context

    def first_rank(self, pipeline_rank: int) -> int:
        """The first of the ranks that hold the stages of a pipeline rank."""
        if self.is_uniform:
            return pipeline_rank * self.data * self.tensor * self.context
        return sum(self.width(rank) for rank in range(pipeline_rank))

    def samples_of(self, pipeline_rank: int) -> float:
        """Samples of one micro-batch on one data-parallel rank there: `micro_batch`, unless the stage's degree differs.

        A stage with another number of data-parallel ranks shares the same micro-batches out among them.
        """
        return self.micro_batch * self.data / self.degrees(pipeline_rank)[0]

    @property
    def virtual_stages(self) -> int:
        """Stages on each pipeline rank: 1 except for the interleaved schedule."""
        return len(self.stages) // self.pipeline

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(pipeline, data, tensor) position of a rank; `context_of` says the fourth."""
        pipeline, within = self._place(rank)
        _, tensor = self.degrees(pipeline)
        return pipeline, within // (tensor * self.context), within % tensor

    def context_of(self, rank: int) -> int:
        """Which part of each sample's tokens a rank holds."""
        pipeline, within = self._place(rank)
        return within // self.degrees(pipeline)[1] % self.context

    def _place(self, rank: int) -> tuple[int, int]:
        """The pipeline rank of a rank, and its position within it."""
        if self.is_uniform:
            return divmod(rank, self.data * self.tensor * self.context)
        for pipeline in range(self.pipeline):
            width = self.width(pipeline)
            if rank < width:
                return pipeline, rank
            rank -= width
        raise IndexError(f"rank {rank} beyond the plan's {self.world_size}")

    def rank_of(self, pipeline: int, data: int, tensor: int, context: int = 0) -> int:
        width = self.degrees(pipeline)[1]
        return self.first_rank(pipeline) + (data * self.context + context) * width + tensor

    def stages_of(self, pipeline_rank: int) -> tuple[int, ...]:
        """Positions in `stages` that a pipeline rank holds."""
        return tuple(range(pipeline_rank, len(self.stages), self.pipeline))

    def data_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the same part of the model for other samples (the same tokens of them)."""
        pipeline, _, tensor = self.coordinates(rank)
        context = self.context_of(rank)
        return tuple(self.rank_of(pipeline, data, tensor, context) for data in range(self.degrees(pipeline)[0]))

    def tensor_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that share the operators of one stage and replica."""
        pipeline, data, _ = self.coordinates(rank)
        context = self.context_of(rank)
        return tuple(self.rank_of(pipeline, data, tensor, context) for tensor in range(self.degrees(pipeline)[1]))

    def context_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the other tokens of the same samples."""
        pipeline, data, tensor = self.coordinates(rank)
        return tuple(self.rank_of(pipeline, data, tensor, context) for context in range(self.context))

    def expert_group(self, rank: int) -> tuple[int, ...]:
        """Ranks over which the experts of a mixture are divided: `expert` neighbours of the data and context axes."""
        pipeline, data, tensor = self.coordinates(rank)
        at = data * self.context + self.context_of(rank)
        first = at - at % self.expert
        width = self.degrees(pipeline)[1]
        base = self.first_rank(pipeline) + tensor
        return tuple(base + position * width for position in range(first, first + self.expert))

    def pipeline_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the successive stages of one replica; of a uniform plan."""
        _, data, tensor = self.coordinates(rank)
        context = self.context_of(rank)
        return tuple(self.rank_of(pipeline, data, tensor, context) for pipeline in range(self.pipeline))

    def describe(self) -> str:
        """One short line: `data 2 x pipeline 2, ZeRO-1, 4 micro-batches of 8 (1f1b), recompute 6/12`."""
        sizes = (("data", self.data), ("tensor", self.tensor), ("context", self.context), ("expert", self.expert))
        degrees = [f"{name} {size}" for name, size in sizes if size > 1]
        if self.pipeline > 1:
            degrees.append(f"pipeline {self.pipeline}" + (f"x{self.virtual_stages}" if self.virtual_stages > 1 else ""))
        parts = [" x ".join(degrees) or "one device"]
        if not self.is_uniform:
            parts.append("stages of " + "+".join(str(self.width(rank)) for rank in range(self.pipeline)))
        if self.sequence_parallel:
            parts.append("sequence parallel")
        if self.zero_stage:
            parts.append(f"ZeRO-{self.zero_stage}")
        schedule = f" ({self.schedule})" if self.schedule != "none" else ""
        parts.append(f"{self.micro_batches} x {self.micro_batch}{schedule}")
        layers = sum(stage.stop - stage.start for stage in self.stages)
        again = sum(len(stage.recompute) for stage in self.stages)
        if again:
            parts.append("recompute" if again == layers else f"recompute {again}/{layers}")
        selective = sum(len(stage.recompute_attention) for stage in self.stages)
        if selective:
            parts.append("recompute attention" + ("" if selective == layers else f" {selective}/{layers}"))
        for what in ("parameters", "optimizer", "activations"):
            if (tier := getattr(self, f"{what}_on")) != "device":
                kept = self.optimizer_kept if what == "optimizer" else 0.0
                parts.append(f"{what} on {tier}" + (f" ({kept:.0%} kept)" if kept else ""))
        if self.delayed_update:
            parts.append("delayed update")
        if self.moments != "float32":
            parts.append(f"moments in {self.moments}")
        swapped = sum(len(stage.swap) for stage in self.stages)
        if swapped:
            parts.append(f"swap {swapped}/{layers}")
        if self.tiles:
            parts.append(f"{len(self.tiles)} tiled")
        if self.shares:
            parts.append("shares " + "+".join(map(str, self.shares)))
        if self.precision != "float32":
            parts.append(self.precision)
        if self.exchange != "torch":
            parts.append(f"exchange by {self.exchange}")
        parts += [f"{axis} collectives by {algorithm}" for axis, algorithm in sorted(self.collectives.items())]
        return ", ".join(parts)

    def validate(
        self,
        graph: Graph | None = None,
        cluster: Cluster | None = None,
        *,
        place: str = "plan",
        distinct_devices: bool = False,
    ) -> Plan:
        """This plan, or PlanError naming the field: against itself, and against the model and the machines if given.

        `distinct_devices`: it is known that no device is listed twice (a search takes thousands from one list).
        """

        def refuse(field: str, message: str, remedy: str = "") -> None:
            raise PlanError(message, place=f"{place}: {field}", remedy=remedy)

        for field in ("data", "tensor", "pipeline", "context", "expert", "micro_batch", "global_batch"):
            if getattr(self, field) < 1:
                refuse(field, f"must be at least 1, not {getattr(self, field)}")
        self._validate_pipeline(refuse)
        if self.world_size != len(self.devices):
            context = f" x context {self.context}" if self.context > 1 else ""
            degrees = f"data {self.data} x tensor {self.tensor}{context} x pipeline {self.pipeline} = "
            if not self.is_uniform:
                degrees = "the stages' degrees make "
            refuse(
                "devices",
                f"{degrees}{self.world_size} ranks, and {len(self.devices)} devices are listed",
                "make the degrees multiply to the number of devices",
            )
        if not distinct_devices and len(set(self.devices)) != len(self.devices):
            refuse("devices", "a device is listed twice")
        self._validate_shares(refuse)
        if not self.shares and self.global_batch % (self.micro_batch * self.data):
            refuse(
                "micro_batch",
                f"a global batch of {self.global_batch} does not divide into {self.data} replicas "
                f"of micro-batches of {self.micro_batch}",
                "choose a micro_batch for which micro_batch x data divides global_batch",
            )
        self._validate_schedule(refuse)
        replicas = self.data * self.context
        if not self.is_uniform:
            replicas = max(replicas, *(self.degrees(rank)[0] * self.context for rank in range(self.pipeline)))
        if replicas == 1 and self.zero_stage:
            refuse("zero_stage", "there is only one replica, so nothing to divide states over", "set zero_stage to 0")
        if self.data * self.context % self.expert:
            refuse("expert", f"{self.expert} does not divide data x context = {self.data * self.context}")
        widest = self.tensor if self.is_uniform else max(self.degrees(rank)[1] for rank in range(self.pipeline))
        if self.sequence_parallel and widest == 1:
            refuse("sequence_parallel", "tensor is 1, so there is nothing to divide over", "set it to false")
        if widest > 1 and not self.tensor_sharding:
            refuse(
                "tensor_sharding", "tensor is above 1 and no module is split", "name the modules, or set tensor to 1"
            )
        if widest == 1 and self.tensor_sharding:
            refuse("tensor_sharding", "modules are split, and tensor is 1", "leave it empty")
        if self.bucket_bytes < 1:
            refuse("bucket_bytes", "must be positive")
        self._validate_memory(refuse)
        if graph is not None:
            self._validate_graph(graph, refuse)
        if cluster is not None:
            known = {device.name for device in cluster.devices}
            for rank, name in enumerate(self.devices):
                if name not in known:
                    refuse(f"devices[{rank}]", f"no device {name!r} in cluster {cluster.name!r}")
        return self

    def _validate_pipeline(self, refuse) -> None:
        if not self.stages or len(self.stages) % self.pipeline:
            refuse("stages", f"{len(self.stages)} stages for {self.pipeline} pipeline ranks", "a multiple is needed")
        expected = 0
        for position, stage in enumerate(self.stages):
            if stage.start != expected or stage.stop <= stage.start:
                refuse(
                    f"stages[{position}]",
                    f"layers {stage.start} to {stage.stop}, where a stage beginning at {expected} belongs",
                    "stages follow each other without gaps and none is empty",
                )
            expected = stage.stop
            if stage.recompute or stage.recompute_attention or stage.swap:
                self._validate_chosen(position, stage, refuse)
            if self.is_uniform:
                continue
            if stage.data < 0 or stage.tensor < 0:
                refuse(f"stages[{position}]", "degrees must not be negative", "0 means the plan's own")
            own = (stage.data or self.data, stage.tensor or self.tensor)
            if own != self.degrees(position % self.pipeline):
                refuse(f"stages[{position}]", "stages on one pipeline rank must have the same degrees")

    @staticmethod
    def _validate_chosen(position: int, stage: Stage, refuse) -> None:
        for field in ("recompute", "recompute_attention", "swap"):
            layers = getattr(stage, field)
            if layers and (min(layers) < stage.start or max(layers) >= stage.stop):
                layer = next(layer for layer in layers if not stage.start <= layer < stage.stop)
                refuse(f"stages[{position}].{field}", f"layer {layer} is not in this stage")
        if stage.recompute_attention and set(stage.recompute) & set(stage.recompute_attention):
            refuse(f"stages[{position}].recompute_attention", "a layer is listed in `recompute` too")

    def _validate_shares(self, refuse) -> None:
        if not self.shares:
            return
        if len(self.shares) != self.data or min(self.shares) < 1:
            refuse("shares", f"{len(self.shares)} shares for {self.data} replicas", "one positive number for each")
        if self.global_batch != self.micro_batch * sum(self.shares):
            refuse(
                "shares",
                f"{sum(self.shares)} micro-batches of {self.micro_batch} are not {self.global_batch} samples",
                "global_batch = micro_batch x sum of shares",
            )

    def _validate_schedule(self, refuse) -> None:
        if (self.pipeline > 1) != (self.schedule != "none"):
            refuse(
                "schedule",
                f"{self.schedule!r} with {self.pipeline} pipeline ranks",
                "'none' without a pipeline; 'gpipe', '1f1b', 'interleaved' or 'zero_bubble' with one",
            )
        if (self.virtual_stages > 1) != (self.schedule == "interleaved"):
            refuse(
                "stages",
                f"{len(self.stages)} stages on {self.pipeline} pipeline ranks with schedule {self.schedule!r}",
                "several stages on each rank for 'interleaved', one otherwise",
            )
        if self.schedule == "interleaved" and self.micro_batches % self.pipeline:
            refuse(
                "micro_batch",
                f"{self.micro_batches} micro-batches do not divide among {self.pipeline} pipeline ranks",
                "the interleaved schedule needs a multiple of the pipeline degree",
            )
        if self.schedule in ("1f1b", "interleaved", "zero_bubble") and self.micro_batches < self.pipeline:
            refuse(
                "micro_batch",
                f"{self.micro_batches} micro-batches cannot fill {self.pipeline} pipeline ranks",
                "use a smaller micro_batch, fewer pipeline ranks, or the gpipe schedule",
            )

    def _validate_memory(self, refuse) -> None:
        if not 0.0 <= self.optimizer_kept <= 1.0:
            refuse("optimizer_kept", f"must lie between 0 and 1, not {self.optimizer_kept}")
        if self.optimizer_on == "device":
            for field, unset in (("optimizer_kept", 0.0), ("delayed_update", False), ("moments", "float32")):
                if getattr(self, field) != unset:
                    refuse(field, "speaks of an optimizer off the device", "set optimizer_on to host, remote or disk")
        if self.delay_warmup < 0:
            refuse("delay_warmup", "must not be negative")
        for name, count in self.tiles.items():
            if count < 2:
                refuse(f"tiles.{name}", f"{count} tiles", "at least 2, or leave the module out")
        if self.activations_on == "device" and any(stage.swap for stage in self.stages):
            refuse(
                "stages.swap", "layers are swapped, and activations rest on the device", "set activations_on to host"
            )

    def _validate_graph(self, graph: Graph, refuse) -> None:
        if self.stages[-1].stop != len(graph.layers):
            refuse(
                "stages",
                f"they cover {self.stages[-1].stop} layers, and {graph.name} has {len(graph.layers)}",
                "plan again for this model",
            )
        divisors: dict[str, tuple[int, str]] = {}
        for block in graph.blocks:
            for name in block.columns:
                divisors[name] = (block.divisor, "column")
            for name in block.rows:
                divisors[name] = (block.divisor, "row")
        for name, style in self.tensor_sharding.items():
            if name not in divisors:
                refuse(f"tensor_sharding.{name}", "the trace does not prove that this module can be split")
            divisor, expected = divisors[name]
            if style != expected:
                refuse(f"tensor_sharding.{name}", f"is {style!r}, and the model needs {expected!r}")
            if divisor % self.tensor:
                refuse(f"tensor_sharding.{name}", f"cannot be split {self.tensor} ways: {divisor} does not divide")
        chosen = set(self.tensor_sharding)
        for block in graph.blocks:
            names = {*block.columns, *block.rows}
            if names & chosen and not names <= chosen:
                missing = ", ".join(sorted(names - chosen))
                refuse("tensor_sharding", f"these belong to the same block and must be split together: {missing}")


def single_device_plan(model: str, layers: int, global_batch: int, device: str = "device 0", **fields) -> Plan:
    """The plan that changes nothing: one device, one micro-batch. `fields` override."""
    stages = (Stage(start=0, stop=layers),)
    values = {"model": model, "devices": (device,), "global_batch": global_batch, "micro_batch": global_batch}
    return Plan(**{**values, "stages": stages, **fields})
