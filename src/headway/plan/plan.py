"""The decision as data: everything that the runtime needs to know about how to train a model on some devices.

Ranks form a mesh of `pipeline` x `data` x `tensor`, tensor fastest: rank = (p * data + d) * tensor + t, and rank r runs
on `devices[r]`. A plan does nothing by itself: `predict` says what it costs, the runtime in `train/` carries it out.
"""

from __future__ import annotations

from typing import Literal

from headway.errors import PlanError
from headway.hardware.cluster import Cluster
from headway.value import Value
from headway.workload.graph import Graph

__all__ = ["Plan", "Stage", "single_device_plan"]

Schedule = Literal["none", "gpipe", "1f1b", "interleaved"]


class Stage(Value):
    """Consecutive layers `start` to `stop` (exclusive) of the graph; `recompute` lists those run again in backward."""

    start: int
    stop: int
    recompute: tuple[int, ...] = ()


class Plan(Value):
    """How to train. Every field has one meaning, and `validate` refuses what contradicts itself.

    - `data`, `tensor`, `pipeline`: degrees; their product is the number of ranks.
    - `stages`: in order; `pipeline` of them, or for the interleaved schedule a multiple v of it, where stage s runs on
      pipeline rank s mod pipeline.
    - `micro_batch`: samples that one data-parallel replica processes at once;
      `global_batch` = `micro_batch` x `data` x number of micro-batches.
    - `schedule`: "none" without a pipeline; "gpipe" (Huang et al., NeurIPS 2019), "1f1b" (PipeDream-Flush, Narayanan
      et al., ICML 2021) or "interleaved" (Megatron-LM, SC 2021).
    - `zero_stage`: 0 replicates, 1 divides the optimizer states, 2 the gradients too, 3 the parameters too
      (Rajbhandari et al., SC 2020), over the data-parallel ranks.
    - `tensor_sharding`: module path to "column" or "row" (see `workload.graph.TensorBlock`); empty when tensor is 1.
    - `precision`: dtype of the forward and backward pass; parameters and optimizer states stay in float32.
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
    precision: Literal["float32", "bfloat16"] = "float32"
    bucket_bytes: int = 25 * 2**20
    overlap: bool = True
    exchange: Literal["torch", "headway"] = "torch"

    @property
    def world_size(self) -> int:
        return self.data * self.tensor * self.pipeline

    @property
    def micro_batches(self) -> int:
        """Micro-batches that each replica runs in one step."""
        return self.global_batch // (self.micro_batch * self.data)

    @property
    def virtual_stages(self) -> int:
        """Stages on each pipeline rank: 1 except for the interleaved schedule."""
        return len(self.stages) // self.pipeline

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(pipeline, data, tensor) position of a rank."""
        return rank // (self.data * self.tensor), rank // self.tensor % self.data, rank % self.tensor

    def rank_of(self, pipeline: int, data: int, tensor: int) -> int:
        return (pipeline * self.data + data) * self.tensor + tensor

    def stages_of(self, pipeline_rank: int) -> tuple[int, ...]:
        """Positions in `stages` that a pipeline rank holds."""
        return tuple(range(pipeline_rank, len(self.stages), self.pipeline))

    def data_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the same part of the model for other samples."""
        pipeline, _, tensor = self.coordinates(rank)
        return tuple(self.rank_of(pipeline, data, tensor) for data in range(self.data))

    def tensor_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that share the operators of one stage and replica."""
        pipeline, data, _ = self.coordinates(rank)
        return tuple(self.rank_of(pipeline, data, tensor) for tensor in range(self.tensor))

    def pipeline_group(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the successive stages of one replica."""
        _, data, tensor = self.coordinates(rank)
        return tuple(self.rank_of(pipeline, data, tensor) for pipeline in range(self.pipeline))

    def describe(self) -> str:
        """One short line: `data 2 x pipeline 2, ZeRO-1, 4 micro-batches of 8 (1f1b), recompute 6/12`."""
        degrees = [f"{name} {size}" for name, size in (("data", self.data), ("tensor", self.tensor)) if size > 1]
        if self.pipeline > 1:
            degrees.append(f"pipeline {self.pipeline}" + (f"x{self.virtual_stages}" if self.virtual_stages > 1 else ""))
        parts = [" x ".join(degrees) or "one device"]
        if self.zero_stage:
            parts.append(f"ZeRO-{self.zero_stage}")
        schedule = f" ({self.schedule})" if self.schedule != "none" else ""
        parts.append(f"{self.micro_batches} x {self.micro_batch}{schedule}")
        layers = sum(stage.stop - stage.start for stage in self.stages)
        again = sum(len(stage.recompute) for stage in self.stages)
        if again:
            parts.append("recompute" if again == layers else f"recompute {again}/{layers}")
        if self.precision != "float32":
            parts.append(self.precision)
        if self.exchange != "torch":
            parts.append(f"exchange by {self.exchange}")
        return ", ".join(parts)

    def validate(self, graph: Graph | None = None, cluster: Cluster | None = None, *, place: str = "plan") -> Plan:
        """This plan, or PlanError naming the field: against itself, and against the model and the machines if given."""

        def refuse(field: str, message: str, remedy: str = "") -> None:
            raise PlanError(message, place=f"{place}: {field}", remedy=remedy)

        for field in ("data", "tensor", "pipeline", "micro_batch", "global_batch"):
            if getattr(self, field) < 1:
                refuse(field, f"must be at least 1, not {getattr(self, field)}")
        if self.world_size != len(self.devices):
            refuse(
                "devices",
                f"data {self.data} x tensor {self.tensor} x pipeline {self.pipeline} = {self.world_size} ranks, "
                f"and {len(self.devices)} devices are listed",
                "make the degrees multiply to the number of devices",
            )
        if len(set(self.devices)) != len(self.devices):
            refuse("devices", "a device is listed twice")
        if self.global_batch % (self.micro_batch * self.data):
            refuse(
                "micro_batch",
                f"a global batch of {self.global_batch} does not divide into {self.data} replicas "
                f"of micro-batches of {self.micro_batch}",
                "choose a micro_batch for which micro_batch x data divides global_batch",
            )
        self._validate_pipeline(refuse)
        if self.data == 1 and self.zero_stage:
            refuse("zero_stage", "there is only one replica, so nothing to divide states over", "set zero_stage to 0")
        if self.tensor > 1 and not self.tensor_sharding:
            refuse(
                "tensor_sharding", "tensor is above 1 and no module is split", "name the modules, or set tensor to 1"
            )
        if self.tensor == 1 and self.tensor_sharding:
            refuse("tensor_sharding", "modules are split, and tensor is 1", "leave it empty")
        if self.bucket_bytes < 1:
            refuse("bucket_bytes", "must be positive")
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
            for layer in stage.recompute:
                if not stage.start <= layer < stage.stop:
                    refuse(f"stages[{position}].recompute", f"layer {layer} is not in this stage")
        if (self.pipeline > 1) != (self.schedule != "none"):
            refuse(
                "schedule",
                f"{self.schedule!r} with {self.pipeline} pipeline ranks",
                "'none' without a pipeline; 'gpipe', '1f1b' or 'interleaved' with one",
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
        if self.schedule in ("1f1b", "interleaved") and self.micro_batches < self.pipeline:
            refuse(
                "micro_batch",
                f"{self.micro_batches} micro-batches cannot fill {self.pipeline} pipeline ranks",
                "use a smaller micro_batch, fewer pipeline ranks, or the gpipe schedule",
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
