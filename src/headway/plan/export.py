"""The same decision in other frameworks' words: configuration or flags that say what a Plan says.

    export(plan, graph, "megatron").command

Each framework says some things and not others. What it cannot say is refused (PlanError naming the plan's field), never
left out: a configuration that trains differently from what was predicted would be worse than none. What a plan does not
know (the model's own flags, data, learning rate) stays the user's, and `Exported.notes` says so.

Written for Megatron-LM core 0.16, DeepSpeed 0.19, torchtitan 0.3, accelerate 1.15 and PyTorch 2.13; none of them is
needed to export, and the tests check each that is installed.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import msgspec

from headway.errors import FieldError, PlanError
from headway.plan.plan import Plan
from headway.value import Value
from headway.workload.graph import Graph

__all__ = ["Exported", "Framework", "export", "say_first", "transformer_blocks"]

Framework = Literal["deepspeed", "megatron", "torchtitan", "fsdp", "accelerate"]


class Exported(Value):
    """A plan in a framework's words: files by name, flags to add to its command line, and what is left to the user."""

    framework: Framework
    files: dict[str, str] = {}
    flags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def export(plan: Plan, graph: Graph, framework: str, *, devices_per_node: int = 8) -> Exported:
    """`plan` for the model `graph` as `framework` takes it.

    Raises FieldError for a framework that is not known, PlanError naming the field that the framework cannot say.
    """
    if framework not in get_args(Framework):
        known = ", ".join(get_args(Framework))
        raise FieldError(f"{framework!r} is no framework that plans are exported to", place="export", remedy=known)
    plan.validate(graph)
    words = _Words(plan, graph, framework, min(devices_per_node, plan.world_size))
    words.refuse_what_nobody_says()
    return _WRITERS[framework](words)


def say_first(plans: Sequence[Plan], graph: Graph, framework: str, *, devices_per_node: int = 8) -> Exported:
    """The first of the plans (best first) that `framework` can say; the notes name those before it that it cannot.

    Raises as `export` does for the first plan, if none of them can be said.
    """
    refused: list[PlanError] = []
    for position, plan in enumerate(plans):
        try:
            said = export(plan, graph, framework, devices_per_node=devices_per_node)
        except PlanError as error:
            refused.append(error)
            continue
        passed = tuple(f"plan {at} was passed over: {error.message}" for at, error in enumerate(refused, start=1))
        if passed:
            passed = (f"this is plan {position + 1} of the table: {plan.describe()}", *passed)
        return msgspec.structs.replace(said, notes=(*passed, *said.notes))
    raise refused[0]


def transformer_blocks(graph: Graph) -> tuple[int, ...]:
    """The layers that are the model's repeated blocks: those with the signature that most layers have."""
    counts = Counter(layer.signature for layer in graph.layers if layer.signature)
    if not counts:
        return ()
    signature, count = counts.most_common(1)[0]
    if count < 2:
        return ()
    return tuple(position for position, layer in enumerate(graph.layers) if layer.signature == signature)


class _Words:
    """A plan being said in a framework's words, and its ways to say that something cannot be."""

    def __init__(self, plan: Plan, graph: Graph, framework: str, per_node: int) -> None:
        self.plan = plan
        self.graph = graph
        self.framework = framework
        self.per_node = per_node
        self.nodes = math.ceil(plan.world_size / per_node)
        self.blocks = transformer_blocks(graph)

    def refuse(self, field: str, what: str, remedy: str) -> None:
        raise PlanError(f"{self.framework} cannot say {what}", place=f"plan: {field}", remedy=remedy)

    def refuse_what_nobody_says(self) -> None:
        plan = self.plan
        if not plan.is_uniform:
            self.refuse("stages", "that stages have degrees of their own", "plan with uniform stages")
        if plan.shares:
            self.refuse("shares", "that replicas get unequal shares", "plan for devices of one kind")
        if plan.collectives:
            self.refuse("collectives", "which algorithm a collective uses", "leave collectives empty")
        if plan.exchange != "torch":
            self.refuse("exchange", "that Headway carries out the collectives", "set exchange to torch")
        if plan.activations_on != "device":
            self.refuse("activations_on", "where activations rest", "set activations_on to device")
        for field, what in (
            ("optimizer_kept", "which fraction of the optimizer stays on the device"),
            ("delayed_update", "that the update comes a step late"),
            ("tiles", "that a layer is run in tiles"),
        ):
            if getattr(plan, field):
                self.refuse(field, what, f"leave {field} out")
        if plan.moments != "float32":
            self.refuse("moments", f"moments in {plan.moments}", "set moments to float32")
        for field in ("parameters_on", "optimizer_on"):
            if getattr(plan, field) == "remote":
                self.refuse(field, "states in remote memory", f"set {field} to host")
        if plan.schedule == "zero_bubble":
            self.refuse("schedule", "the ZB-H1 schedule", "use 1f1b or interleaved")

    def refuse_above_one(self, *fields: str) -> None:
        for field in fields:
            if getattr(self.plan, field) > 1:
                self.refuse(field, f"{field} parallelism in its configuration", f"plan with {field} 1")

    def refuse_tiers(self, *fields: str) -> None:
        for field in fields:
            if getattr(self.plan, field) != "device":
                self.refuse(field, f"that {field.removesuffix('_on')} rest on the {getattr(self.plan, field)}",
                            f"set {field} to device")  # fmt: skip

    def refuse_precisions(self, *known: str) -> None:
        if self.plan.precision not in known:
            self.refuse("precision", self.plan.precision, f"one of: {', '.join(known)}")

    def recomputed(self) -> str:
        """ "none", "full" or "selective": what is recomputed in every block; refused if blocks differ."""
        full = {layer for stage in self.plan.stages for layer in stage.recompute}
        some = {layer for stage in self.plan.stages for layer in stage.recompute_attention}
        blocks = set(self.blocks) or set(range(len(self.graph.layers)))
        if not full and not some:
            return "none"
        if blocks <= full and not some:
            return "full"
        if blocks <= some and not full:
            return "selective"
        self.refuse("stages.recompute", "that only some blocks are recomputed", "plan with --recompute none or full")
        raise AssertionError

    def blocks_of_stages(self) -> list[int]:
        """How many blocks each stage has; refused where the model has no repeated blocks."""
        if not self.blocks:
            self.refuse("stages", "where to cut a model without repeated blocks", "plan without a pipeline")
        return [sum(stage.start <= block < stage.stop for block in self.blocks) for stage in self.plan.stages]


# ----------------------------------------------------------------------------------------------------------- Megatron


def _megatron(words: _Words) -> Exported:
    plan = words.plan
    if plan.schedule == "gpipe":
        words.refuse("schedule", "gpipe (its schedules are 1F1B and interleaved)", "plan with --schedule 1f1b")
    words.refuse_tiers("parameters_on")
    if plan.optimizer_on == "disk":
        words.refuse("optimizer_on", "that the optimizer rests on disk", "set optimizer_on to host")
    chosen = set(plan.tensor_sharding)
    for block in words.graph.blocks:
        if plan.tensor > 1 and not chosen.issuperset({*block.columns, *block.rows}):
            words.refuse("tensor_sharding", "that some modules stay whole", "use a tensor degree that divides all")
    flags: list[Any] = ["--micro-batch-size", plan.micro_batch, "--global-batch-size", plan.global_batch]
    flags += ["--tensor-model-parallel-size", plan.tensor, "--pipeline-model-parallel-size", plan.pipeline]
    if plan.context > 1:
        flags += ["--context-parallel-size", plan.context]
    if plan.expert > 1:
        flags += ["--expert-model-parallel-size", plan.expert]
    if plan.sequence_parallel:
        flags += ["--sequence-parallel"]
    flags += _megatron_pipeline(words)
    flags += _megatron_recompute(words)
    if plan.zero_stage == 1:
        flags += ["--use-distributed-optimizer"]
    elif plan.zero_stage >= 2:
        strategy = {2: "optim_grads", 3: "optim_grads_params"}[plan.zero_stage]
        flags += ["--use-megatron-fsdp", "--data-parallel-sharding-strategy", strategy]
    if plan.data * plan.context > 1 and plan.overlap:
        flags += ["--overlap-grad-reduce"]
        if plan.zero_stage:
            flags += ["--overlap-param-gather"]
        if not plan.zero_stage:
            flags += ["--ddp-bucket-size", max(1, plan.bucket_bytes // 4)]
    flags += {
        "float32": [],
        "bfloat16": ["--bf16"],
        "float16": ["--fp16"],
        "float8": ["--bf16", "--fp8-format", "hybrid"],
        "float4": ["--bf16", "--fp4-format", "e2m1"],
    }[plan.precision]
    if plan.optimizer_on == "host":
        flags += ["--optimizer-cpu-offload", "--use-precision-aware-optimizer"]
    return Exported(
        framework="megatron",
        flags=tuple(str(flag) for flag in flags),
        notes=(
            _ranks(words),
            "add the model's own flags (--num-layers, --hidden-size, …), data and learning rate",
            "Megatron keeps parameters in the training precision and a float32 copy in the optimizer",
        ),
    )


def _megatron_pipeline(words: _Words) -> list[Any]:
    plan = words.plan
    if plan.pipeline == 1:
        return []
    counts = words.blocks_of_stages()
    if len(set(counts)) == 1:
        virtual = plan.virtual_stages
        return ["--num-virtual-stages-per-pipeline-rank", virtual] if virtual > 1 else []
    # E: embedding, t: a block, L: final norm, vocabulary and loss; stages in order of execution.
    parts = ["t" * count for count in counts]
    parts[0] = "E" + parts[0]
    parts[-1] += "L"
    return ["--pipeline-model-parallel-layout", "|".join(parts)]


def _megatron_recompute(words: _Words) -> list[Any]:
    plan = words.plan
    selective = any(stage.recompute_attention for stage in plan.stages)
    if selective:
        words.recomputed()
        return ["--recompute-granularity", "selective", "--recompute-modules", "core_attn"]
    blocks = set(words.blocks)
    if not any(stage.recompute for stage in plan.stages):
        return []
    counts = set()
    for stage in plan.stages:
        here = [block for block in range(stage.start, stage.stop) if block in blocks]
        again = [block for block in here if block in stage.recompute]
        if again != here[: len(again)]:
            words.refuse("stages.recompute", "other layers than the first of each stage", "plan with --recompute full")
        counts.add(len(again))
    if len(counts) > 1:
        if words.recomputed() != "full":
            raise AssertionError
        return ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1]
    return ["--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", counts.pop()]


def _ranks(words: _Words) -> str:
    return f"start {words.plan.world_size} ranks: torchrun --nnodes {words.nodes} --nproc-per-node {words.per_node} …"


# ---------------------------------------------------------------------------------------------------------- DeepSpeed


def _deepspeed(words: _Words) -> Exported:
    config = _deepspeed_config(words)
    return Exported(
        framework="deepspeed",
        files={"deepspeed.json": json.dumps(config, indent=2) + "\n"},
        notes=(_ranks(words), "give the optimizer in your script, or add an `optimizer` section"),
    )


def _deepspeed_config(words: _Words) -> dict[str, Any]:
    plan = words.plan
    if plan.pipeline > 1:
        words.refuse("pipeline", "a pipeline in its configuration (PipelineModule is code)", "plan with pipeline 1")
    words.refuse_above_one("context", "expert")
    if plan.sequence_parallel:
        words.refuse("sequence_parallel", "sequence parallelism", "set sequence_parallel to false")
    words.refuse_precisions("float32", "bfloat16", "float16")
    if words.recomputed() != "none":
        words.refuse("stages.recompute", "what is recomputed (that is code)", "plan with --recompute none")
    if plan.parameters_on != "device" and plan.zero_stage != 3:
        words.refuse("parameters_on", "that parameters rest elsewhere without ZeRO-3", "set zero_stage to 3")
    if plan.optimizer_on != "device" and plan.zero_stage == 0:
        words.refuse("optimizer_on", "that the optimizer rests elsewhere without ZeRO", "set zero_stage to 1 or more")
    zero: dict[str, Any] = {"stage": plan.zero_stage, "overlap_comm": plan.overlap}
    zero["reduce_bucket_size"] = max(1, plan.bucket_bytes // (4 if plan.precision == "float32" else 2))
    for field, name in (("optimizer_on", "offload_optimizer"), ("parameters_on", "offload_param")):
        tier = getattr(plan, field)
        if tier == "host":
            zero[name] = {"device": "cpu", "pin_memory": True}
        elif tier == "disk":
            zero[name] = {"device": "nvme", "nvme_path": "/local_nvme", "pin_memory": True}
    config: dict[str, Any] = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.micro_batches,
        "zero_optimization": zero,
    }
    if plan.precision != "float32":
        config["bf16" if plan.precision == "bfloat16" else "fp16"] = {"enabled": True}
    if plan.tensor > 1:
        config["tensor_parallel"] = {"autotp_size": plan.tensor}
    return config


# --------------------------------------------------------------------------------------------------------- torchtitan

_TITAN_SCHEDULES = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "Interleaved1F1B"}


def _torchtitan(words: _Words) -> Exported:
    plan = words.plan
    words.refuse_precisions("float32", "bfloat16")
    if plan.zero_stage == 1:
        words.refuse("zero_stage", "ZeRO-1 (it has DDP and FSDP)", "plan with --zero 2 or 3")
    tiers = {plan.parameters_on, plan.optimizer_on}
    if tiers not in ({"device"}, {"host"}) or (tiers == {"host"} and plan.zero_stage < 2):
        words.refuse("optimizer_on", "that only some states rest elsewhere", "all on the host with FSDP, or on devices")
    recomputed = words.recomputed()
    if recomputed == "selective":
        words.refuse("stages.recompute_attention", "that just the attention core is recomputed", "none or full")
    sharded = plan.zero_stage >= 2
    local = plan.micro_batch * (plan.micro_batches if plan.pipeline > 1 else 1)
    training: dict[str, Any] = {
        "local_batch_size": local,
        "global_batch_size": plan.global_batch,
        "mixed_precision_param": plan.precision,
        "enable_cpu_offload": tiers == {"host"},
    }
    parallelism: dict[str, Any] = {
        "data_parallel_replicate_degree": 1 if sharded else plan.data,
        "data_parallel_shard_degree": plan.data if sharded else 1,
        "tensor_parallel_degree": plan.tensor,
        "enable_sequence_parallel": plan.sequence_parallel,
        "context_parallel_degree": plan.context,
        "expert_parallel_degree": plan.expert,
        "pipeline_parallel_degree": plan.pipeline,
    }
    if sharded:
        parallelism["fsdp_reshard_after_forward"] = "always" if plan.zero_stage == 3 else "never"
    if plan.pipeline > 1:
        parallelism["pipeline_parallel_schedule"] = _TITAN_SCHEDULES[plan.schedule]
        parallelism["pipeline_parallel_microbatch_size"] = plan.micro_batch
        parallelism["module_fqns_per_model_part"] = _titan_parts(words.blocks_of_stages())
    lines = ['"""Headway\'s plan for torchtitan: call `apply` in your config_registry function."""', ""]
    if recomputed == "full":
        lines += ["from torchtitan.distributed.activation_checkpoint import FullAC", ""]
    lines += ["", "def apply(config):", '    """`config`: a `Trainer.Config`; changed in place and returned."""']
    lines += [f"    config.training.{name} = {value!r}" for name, value in training.items()]
    lines += [f"    config.parallelism.{name} = {value!r}" for name, value in parallelism.items()]
    lines += [f"    config.activation_checkpoint = {'FullAC.Config()' if recomputed == 'full' else 'None'}"]
    lines += ["    return config", ""]
    return Exported(
        framework="torchtitan",
        files={"headway_plan.py": "\n".join(lines)},
        notes=(_ranks(words), "parameters are kept in float32, computed in mixed_precision_param"),
    )


def _titan_parts(counts: list[int]) -> list[list[str]]:
    parts: list[list[str]] = []
    first = 0
    for count in counts:
        parts.append([f"layers.{first + at}" for at in range(count)])
        first += count
    parts[0].insert(0, "tok_embeddings")
    parts[-1] += ["norm", "lm_head"]
    return parts


# --------------------------------------------------------------------------------------------------------------- FSDP


def _fsdp(words: _Words) -> Exported:
    plan = words.plan
    words.refuse_above_one("pipeline", "context", "expert")
    words.refuse_precisions("float32", "bfloat16", "float16")
    if plan.zero_stage < 2 and plan.data > 1:
        words.refuse("zero_stage", f"ZeRO-{plan.zero_stage} (fully_shard is stage 2 or 3)", "plan with --zero 2 or 3")
    if plan.sequence_parallel:
        words.refuse("sequence_parallel", "sequence parallelism for modules that it does not know", "set it to false")
    if plan.optimizer_on != plan.parameters_on or "disk" in (plan.optimizer_on, plan.parameters_on):
        words.refuse("optimizer_on", "that only some states rest elsewhere", "both on the host, or on the device")
    if any(stage.recompute_attention for stage in plan.stages):
        words.refuse("stages.recompute_attention", "that just the attention core is recomputed", "none or full")
    again = sorted(layer for stage in plan.stages for layer in stage.recompute)
    units = {unit.layer: unit.module for unit in words.graph.units if unit.depends_on_parameters}
    modules = [unit.module for unit in words.graph.units if unit.depends_on_parameters and unit.module]
    recompute = [units[layer] for layer in again if units.get(layer)]
    text = _FSDP_FILE.format(
        data=plan.data,
        tensor=plan.tensor,
        sharding=_literal(dict(plan.tensor_sharding)),
        modules=_literal(modules),
        recompute=_literal(recompute),
        reshard=plan.zero_stage == 3,
        dtype=f"torch.{plan.precision}",
        offload=plan.parameters_on == "host",
        micro_batch=plan.micro_batch,
        micro_batches=plan.micro_batches,
    )
    return Exported(framework="fsdp", files={"headway_plan.py": text}, notes=(_ranks(words),))


def _literal(value: Any) -> str:
    """A list or dict as Python writes it, one entry on a line."""
    if not value:
        return "{}" if isinstance(value, dict) else "[]"
    if isinstance(value, dict):
        return "{\n" + "".join(f"    {key!r}: {each!r},\n" for key, each in value.items()) + "}"
    return "[\n" + "".join(f"    {each!r},\n" for each in value) + "]"


_FSDP_FILE = textwrap.dedent('''\
    """Headway's plan for plain PyTorch: call `parallelise` before the optimizer is made.

    Each replica runs {micro_batches} micro-batches of {micro_batch} samples in a step.
    """

    import torch
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    DATA, TENSOR = {data}, {tensor}
    SHARDING = {sharding}
    UNITS = {modules}
    RECOMPUTED = {recompute}


    def parallelise(model, device_type="cuda"):
        """The model, split over a mesh of DATA x TENSOR ranks."""
        mesh = init_device_mesh(device_type, (DATA, TENSOR), mesh_dim_names=("data", "tensor"))
        if TENSOR > 1:
            styles = {{"column": ColwiseParallel, "row": RowwiseParallel}}
            parallelize_module(model, mesh["tensor"], {{name: styles[style]() for name, style in SHARDING.items()}})
        for name in RECOMPUTED:
            parent, _, child = name.rpartition(".")
            owner = model.get_submodule(parent)
            owner.register_module(child, checkpoint_wrapper(owner.get_submodule(child)))
        if DATA > 1:
            policy = {{
                "mesh": mesh["data"],
                "reshard_after_forward": {reshard},
                "mp_policy": MixedPrecisionPolicy(param_dtype={dtype}, reduce_dtype=torch.float32),
                "offload_policy": CPUOffloadPolicy() if {offload} else OffloadPolicy(),
            }}
            for name in UNITS:
                fully_shard(model.get_submodule(name), **policy)
            fully_shard(model, **policy)
        return model
    ''')


# --------------------------------------------------------------------------------------------------------- accelerate


def _accelerate(words: _Words) -> Exported:
    plan = words.plan
    words.refuse_above_one("pipeline", "expert")
    words.refuse_precisions("float32", "bfloat16", "float16")
    precision = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[plan.precision]
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "NO",
        "mixed_precision": precision,
        "num_machines": words.nodes,
        "num_processes": plan.world_size,
        "machine_rank": 0,
        "main_training_function": "main",
        "use_cpu": False,
        "debug": False,
    }
    notes = [
        f"on each of {words.nodes} machines: accelerate launch --config_file accelerate.yaml …",
        f"set gradient accumulation of {plan.micro_batches} and batches of {plan.micro_batch} in your script",
    ]
    if plan.zero_stage in (1, 2):
        if plan.tensor > 1:
            words.refuse("tensor", "tensor parallelism with ZeRO-1 or 2", "plan with --zero 3")
        config["distributed_type"] = "DEEPSPEED"
        deepspeed = _deepspeed_config(words)
        zero = deepspeed["zero_optimization"]
        config["deepspeed_config"] = {
            "zero_stage": plan.zero_stage,
            "gradient_accumulation_steps": plan.micro_batches,
            "offload_optimizer_device": zero.get("offload_optimizer", {"device": "none"})["device"],
            "offload_param_device": "none",
        }
    elif plan.zero_stage == 3:
        if plan.optimizer_on != plan.parameters_on or plan.parameters_on == "disk":
            words.refuse("optimizer_on", "that only some states rest elsewhere", "both on the host, or on the device")
        recomputed = words.recomputed()
        if recomputed == "selective":
            words.refuse("stages.recompute_attention", "that just the attention core is recomputed", "none or full")
        config["distributed_type"] = "FSDP"
        config["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_reshard_after_forward": True,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_activation_checkpointing": recomputed == "full",
            "fsdp_offload_params": plan.parameters_on == "host",
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
            "fsdp_cpu_ram_efficient_loading": True,
        }
        if plan.tensor > 1 or plan.context > 1:
            config["parallelism_config"] = {
                "parallelism_config_dp_replicate_size": 1,
                "parallelism_config_dp_shard_size": plan.data,
                "parallelism_config_tp_size": plan.tensor,
                "parallelism_config_cp_size": plan.context,
            }
    else:
        words.refuse_above_one("tensor", "context")
        words.refuse_tiers("parameters_on", "optimizer_on")
        if words.recomputed() != "none":
            words.refuse("stages.recompute", "what is recomputed without FSDP", "plan with --recompute none")
        config["distributed_type"] = "MULTI_GPU" if plan.world_size > 1 else "NO"
    if plan.sequence_parallel:
        words.refuse("sequence_parallel", "sequence parallelism beside tensor parallelism", "set it to false")
    text = msgspec.yaml.encode(config).decode()
    return Exported(framework="accelerate", files={"accelerate.yaml": text}, notes=tuple(notes))


_WRITERS: dict[str, Callable[[_Words], Exported]] = {
    "megatron": _megatron,
    "deepspeed": _deepspeed,
    "torchtitan": _torchtitan,
    "fsdp": _fsdp,
    "accelerate": _accelerate,
}
