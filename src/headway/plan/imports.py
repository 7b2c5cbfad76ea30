"""What other frameworks are told, read as a Plan: a Megatron-LM command line, or a DeepSpeed JSON file.

    present = read_configuration("pretrain.sh")
    plan = present.plan(transformer(present.shape), [device.name for device in cluster.devices])

A Megatron command says the model's shape too (`Imported.shape`); a DeepSpeed file does not, so the model comes from
elsewhere. Nothing is executed: of a shell script the words of the command are read, and plain `NAME=value` lines.
Flags that change neither time nor memory, or whose effect is not known here, are listed in `Imported.ignored`.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from headway.errors import FieldError, PlanError
from headway.plan.export import transformer_blocks
from headway.plan.plan import Plan, Precision, Schedule, Stage, Tier
from headway.value import Value, read_text
from headway.workload.graph import Graph, OptimizerKind, Recipe
from headway.workload.transformer import TransformerShape

__all__ = ["Imported", "read_configuration", "read_deepspeed", "read_megatron"]


class Imported(Value):
    """A configuration as it was read: what of it Headway's plans know.

    `shape` is None where the configuration does not describe the model. `global_batch`, `micro_batch` and
    `micro_batches` 0: follow from the others. `world_size` 0: as many ranks as there are devices. `layout`: blocks of
    each stage in order, empty: even. `recompute_blocks`: how many blocks of each stage are recomputed (-1: all).
    `virtual_stages`: per rank.
    """

    source: Literal["megatron", "deepspeed"]
    micro_batch: int
    global_batch: int = 0
    micro_batches: int = 0
    world_size: int = 0
    shape: TransformerShape | None = None
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    virtual_stages: int = 1
    layout: tuple[int, ...] = ()
    sequence_parallel: bool = False
    zero_stage: Literal[0, 1, 2, 3] = 0
    recompute_blocks: int = 0
    recompute_attention: bool = False
    precision: Precision = "float32"
    overlap: bool = True
    bucket_bytes: int = 0
    parameters_on: Tier = "device"
    optimizer_on: Tier = "device"
    optimizer: OptimizerKind = OptimizerKind()
    recipe: Recipe = Recipe()
    ignored: tuple[str, ...] = ()

    def plan(self, graph: Graph, devices: Sequence[str]) -> Plan:
        """The plan for `graph` on `devices`, in their order. Raises PlanError where the numbers do not fit together."""
        world = self.world_size or len(devices)
        if world > len(devices):
            raise PlanError(
                f"the configuration is for {world} ranks, and the cluster has {len(devices)} devices",
                place=f"{self.source}: ranks",
                remedy="describe the machines that it runs on with --cluster",
            )
        model = self.tensor * self.pipeline * self.context
        if world % model:
            raise PlanError(
                f"tensor {self.tensor} x pipeline {self.pipeline} x context {self.context} "
                f"does not divide {world} ranks",
                place=f"{self.source}: degrees",
                remedy="name all machines: --cluster dgx-a100:8, and --nnodes where the command has --nproc-per-node",
            )
        data = world // model
        passes = data * max(1, self.micro_batches)
        batch = self.global_batch or self.micro_batch * passes
        micro_batch = self.micro_batch or batch // passes
        sharding: dict[str, Literal["column", "row"]] = {}
        if self.tensor > 1:
            for block in graph.blocks:
                if block.divisor % self.tensor == 0:
                    sharding.update((name, "column") for name in block.columns)
                    sharding.update((name, "row") for name in block.rows)
        schedule: Schedule = "none" if self.pipeline == 1 else "interleaved" if self.virtual_stages > 1 else "1f1b"
        plan = Plan(
            model=graph.name,
            devices=tuple(devices[:world]),
            global_batch=batch,
            micro_batch=micro_batch,
            stages=self._stages(graph),
            data=data,
            tensor=self.tensor,
            pipeline=self.pipeline,
            context=self.context,
            expert=self.expert,
            schedule=schedule,
            zero_stage=self.zero_stage if data * self.context > 1 else 0,
            tensor_sharding=sharding,
            precision=self.precision,
            sequence_parallel=self.sequence_parallel and self.tensor > 1,
            overlap=self.overlap,
            parameters_on=self.parameters_on,
            optimizer_on=self.optimizer_on,
            bucket_bytes=self.bucket_bytes or 25 * 2**20,
        )
        if (self.micro_batches or not self.micro_batch) and batch != micro_batch * passes:
            raise PlanError(
                f"{batch} samples are not {passes // data} micro-batches of {micro_batch} on {data} replicas",
                place=f"{self.source}: train_batch_size",
                remedy="train_batch_size = micro batch x accumulation steps x replicas",
            )
        return plan.validate(graph, place=self.source)

    def _stages(self, graph: Graph) -> tuple[Stage, ...]:
        count = self.pipeline * self.virtual_stages
        blocks = transformer_blocks(graph) or tuple(range(len(graph.layers)))
        layout = self.layout
        if not layout:
            if len(blocks) % count:
                raise PlanError(
                    f"{len(blocks)} blocks do not divide into {count} stages", place=f"{self.source}: pipeline",
                    remedy="say how many blocks the first and last stage have",
                )  # fmt: skip
            layout = (len(blocks) // count,) * count
        if len(layout) != count or sum(layout) != len(blocks):
            raise PlanError(
                f"a layout of {len(layout)} stages with {sum(layout)} blocks, for {count} stages and {len(blocks)}",
                place=f"{self.source}: layout",
            )
        stages = []
        start = taken = 0
        for position, here in enumerate(layout):
            taken += here
            stop = blocks[taken] if taken < len(blocks) else blocks[-1] + 1
            if position == count - 1:
                stop = len(graph.layers)
            own = [block for block in blocks if start <= block < stop]
            again = own if self.recompute_blocks < 0 else own[: self.recompute_blocks]
            some = own if self.recompute_attention else []
            stages.append(Stage(start=start, stop=stop, recompute=tuple(again), recompute_attention=tuple(some)))
            start = stop
        return tuple(stages)


def read_configuration(path: str | Path, *, vocabulary: int | None = None) -> Imported:
    """The configuration in a file: JSON is DeepSpeed's, anything else a command line or script of Megatron-LM.

    Raises FileError or FieldError naming the place.
    """
    text = read_text(Path(path))
    if text.lstrip().startswith("{"):
        return read_deepspeed(text, place=str(path))
    return read_megatron(text, place=str(path), vocabulary=vocabulary)


# ----------------------------------------------------------------------------------------------------------- Megatron

_WHOLE = {
    "num-layers", "hidden-size", "num-attention-heads", "seq-length", "micro-batch-size", "global-batch-size",
    "tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size",
    "expert-model-parallel-size", "ffn-hidden-size", "num-query-groups", "kv-channels", "vocab-size",
    "make-vocab-size-divisible-by", "num-layers-per-virtual-pipeline-stage", "num-virtual-stages-per-pipeline-rank",
    "decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers", "recompute-num-layers", "num-experts",
    "moe-router-topk", "moe-ffn-hidden-size", "ddp-bucket-size", "nproc-per-node", "nnodes",
}  # fmt: skip
_WORDS = {
    "recompute-granularity", "recompute-method", "pipeline-model-parallel-layout", "position-embedding-type",
    "normalization", "attention-backend", "transformer-impl", "fp8-format", "fp4-format", "optimizer",
    "data-parallel-sharding-strategy", "attention-dropout", "hidden-dropout",
}  # fmt: skip
_SWITCHES = {
    "sequence-parallel", "use-distributed-optimizer", "use-megatron-fsdp", "overlap-grad-reduce",
    "overlap-param-gather", "bf16", "fp16", "swiglu", "untie-embeddings-and-output-weights", "disable-bias-linear",
    "use-flash-attn", "group-query-attention", "use-rotary-position-embeddings", "optimizer-cpu-offload",
    "recompute-activations", "use-precision-aware-optimizer",
}  # fmt: skip
_REQUIRED = ("num-layers", "hidden-size", "num-attention-heads", "seq-length", "micro-batch-size")
_NOT_KNOWN = {
    "multi-latent-attention": "latent attention",
    "mtp-num-layers": "multi-token prediction",
    "hybrid-attention-ratio": "hybrid models",
    "encoder-num-layers": "encoder-decoder models",
}
_ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z_0-9]*)=(\"[^\"]*\"|'[^']*'|[^\s;]*)\s*;?\s*(?:#.*)?$")
_VARIABLE = re.compile(r"\$\{?([A-Za-z_][A-Za-z_0-9]*)\}?")


def read_megatron(text: str, *, place: str = "command", vocabulary: int | None = None) -> Imported:
    """A Megatron-LM command line, or the script that holds it.

    `vocabulary`: entries of the tokenizer, where the command does not say (`--vocab-size`). Raises FieldError naming
    the flag that is missing, has no value, or says what Headway's plans cannot.
    """
    given, ignored = _flags(text, place)
    for flag, what in _NOT_KNOWN.items():
        if any(name.startswith(f"--{flag}") for name in ignored):
            raise FieldError(f"{what} cannot be predicted yet", place=f"{place}: --{flag}")
    missing = [f"--{flag}" for flag in _REQUIRED if flag not in given]
    if missing:
        raise FieldError(f"missing: {', '.join(missing)}", place=place, remedy="give the whole command of pretrain_gpt")

    def number(flag: str, default: int = 0) -> int:
        return int(given.get(flag, default))

    tensor, pipeline = number("tensor-model-parallel-size", 1), number("pipeline-model-parallel-size", 1)
    words = vocabulary or number("vocab-size")
    if not words:
        raise FieldError(
            "the size of the vocabulary is not in the command", place=f"{place}: --vocab-size",
            remedy="say --vocabulary (50257 for GPT-2, 128256 for Llama 3)",
        )  # fmt: skip
    multiple = number("make-vocab-size-divisible-by", 128) * tensor
    low = "bf16" in given or "fp16" in given
    flash = "use-flash-attn" in given or given.get("attention-backend") in ("flash", "fused", "auto")
    if given.get("transformer-impl", "transformer_engine") == "transformer_engine":
        flash = given.get("attention-backend", "auto") not in ("unfused", "local")
    hidden = number("hidden-size")
    gated = "swiglu" in given
    # Megatron's own default for gated layers: two thirds of 4 x hidden, rounded down to a multiple of 64.
    ffn = number("ffn-hidden-size") or (int(4 * hidden * 2 / 3 / 64) * 64 if gated else 4 * hidden)
    rotary = given.get("position-embedding-type") == "rope" or "use-rotary-position-embeddings" in given
    shape = TransformerShape(
        layers=number("num-layers"),
        hidden=hidden,
        heads=number("num-attention-heads"),
        kv_heads=number("num-query-groups") if "group-query-attention" in given else 0,
        head_width=number("kv-channels"),
        ffn=ffn,
        vocabulary=-(-words // multiple) * multiple,
        sequence=number("seq-length"),
        gated=gated,
        tied="untie-embeddings-and-output-weights" not in given,
        biases="disable-bias-linear" not in given,
        positions="rotary" if rotary else "learned",
        norm="rms" if given.get("normalization") == "RMSNorm" else "layer",
        dropout=float(given.get("hidden-dropout", 0.1)) > 0,
        experts=number("num-experts"),
        experts_chosen=number("moe-router-topk", 2) if number("num-experts") else 0,
        expert_ffn=number("moe-ffn-hidden-size"),
        attention="flash" if flash else "unfused",
        fused=True,
        packed=True,
    ).completed(place=place)
    granularity = given.get("recompute-granularity", "selective" if "recompute-activations" in given else "")
    again = 0
    if granularity == "full":
        # "uniform" checkpoints every so many layers and recomputes all; "block" recomputes the first ones of a stage.
        again = number("recompute-num-layers", 1) if given.get("recompute-method") == "block" else -1
    strategies = {"no_shard": 0, "optim": 1, "optim_grads": 2, "optim_grads_params": 3}
    zero: Any = 1 if "use-distributed-optimizer" in given else 0
    if "use-megatron-fsdp" in given:
        zero = strategies.get(given.get("data-parallel-sharding-strategy", "no_shard"), 0)
    precision: Precision = "bfloat16" if "bf16" in given else "float16" if "fp16" in given else "float32"
    if "fp8-format" in given:
        precision = "float8"
    elif "fp4-format" in given:
        precision = "float4"
    virtual, layout = _megatron_stages(given, place, shape.layers, pipeline)
    return Imported(
        source="megatron",
        shape=shape,
        micro_batch=number("micro-batch-size"),
        global_batch=number("global-batch-size"),
        world_size=number("nproc-per-node") * number("nnodes", 1),
        tensor=tensor,
        pipeline=pipeline,
        context=number("context-parallel-size", 1),
        expert=number("expert-model-parallel-size", 1),
        virtual_stages=virtual,
        layout=layout,
        sequence_parallel="sequence-parallel" in given,
        zero_stage=zero,
        recompute_blocks=again,
        recompute_attention=granularity == "selective",
        precision=precision,
        overlap="overlap-grad-reduce" in given,
        bucket_bytes=number("ddp-bucket-size") * 4,
        optimizer_on="host" if "optimizer-cpu-offload" in given else "device",
        recipe=Recipe(
            framework="megatron",
            parameter_bytes=2.0 if low else 4.0,
            # bf16 training adds up and reduces gradients in float32; fp16 training does so in float16.
            gradient_bytes=2.0 if "fp16" in given else 4.0,
            master_bytes=4.0 if low else 0.0,
            attention=shape.attention,
            compiled=True,
        ),
        ignored=tuple(ignored),
    )


def _megatron_stages(given: dict[str, str], place: str, layers: int, pipeline: int) -> tuple[int, tuple[int, ...]]:
    """(stages on each rank, blocks of each stage or () for even)."""
    text = given.get("pipeline-model-parallel-layout")
    if text is not None:
        stages = _expand_layout(text, place).split("|")
        if len(stages) % pipeline:
            raise FieldError(
                f"{len(stages)} stages for {pipeline} pipeline ranks",
                place=f"{place}: --pipeline-model-parallel-layout",
            )
        return len(stages) // pipeline, tuple(stage.count("t") for stage in stages)
    virtual = int(given.get("num-virtual-stages-per-pipeline-rank", 1))
    per_stage = int(given.get("num-layers-per-virtual-pipeline-stage", 0))
    if per_stage and pipeline > 1:
        virtual = max(1, layers // pipeline // per_stage)
    ends = (given.get("decoder-first-pipeline-num-layers"), given.get("decoder-last-pipeline-num-layers"))
    if pipeline == 1 or ends == (None, None):
        return (virtual if pipeline > 1 else 1), ()
    first, last = (int(end) if end is not None else None for end in ends)
    inner = pipeline - (first is not None) - (last is not None)
    rest = layers - (first or 0) - (last or 0)
    if virtual > 1 or inner < 0 or (inner and rest % inner) or (not inner and rest):
        raise FieldError(
            f"{layers} layers, of which {first} on the first and {last} on the last of {pipeline} stages, are not even "
            "in between", place=f"{place}: --decoder-first-pipeline-num-layers",
        )  # fmt: skip
    middle = (rest // inner,) * inner if inner else ()
    return 1, ((first,) if first is not None else ()) + middle + ((last,) if last is not None else ())


def _expand_layout(text: str, place: str) -> str:
    """Megatron's layout written out: "Et*2|(tt|)*2L" is "Ett|tt|tt|L"."""
    group = re.compile(r"\(([^()]*)\)\*(\d+)|([A-Za-z])\*(\d+)")
    expanded = text.replace(",", "").replace(" ", "")
    while (match := group.search(expanded)) is not None:
        part, times = (match[1], match[2]) if match[1] is not None else (match[3], match[4])
        expanded = expanded[: match.start()] + part * int(times) + expanded[match.end() :]
    if not re.fullmatch(r"[EtL|]*", expanded):
        raise FieldError(f"{text!r} cannot be read", place=f"{place}: --pipeline-model-parallel-layout",
                         remedy="E, t, L and | with * for repetition; other layers are not known")  # fmt: skip
    return expanded


def _flags(text: str, place: str) -> tuple[dict[str, str], list[str]]:
    """The flags that matter, without their dashes, and all others as they stand there."""
    variables: dict[str, str] = {}
    lines = []
    for line in text.replace("\\\r\n", " ").replace("\\\n", " ").splitlines():
        stripped = line.strip()
        match = _ASSIGNMENT.fullmatch(stripped)
        if match:
            variables[match[1]] = match[2].strip("\"'")
        elif not stripped.startswith("#"):
            lines.append(line)

    def expand(value: str, depth: int = 0) -> str:
        if depth > 16:
            raise FieldError("variables refer to each other in a circle", place=place)

        def value_of(found: re.Match[str]) -> str:
            known = variables.get(found[1])
            return found[0] if known is None else expand(known, depth + 1)

        return _VARIABLE.sub(value_of, value)

    # An array of flags, ARGS=( --a 1 ), is words like any others once its brackets are gone.
    joined = expand(" ".join(lines)) + " " + " ".join(expand(value) for value in variables.values() if "--" in value)
    joined = re.sub(r"[A-Za-z_][A-Za-z_0-9]*=\(|\(|\)(?!\*)", " ", joined) if "=(" in joined else joined
    try:
        words = shlex.split(joined, comments=True)
    except ValueError as error:
        raise FieldError(f"cannot be read as a command: {error}", place=place, remedy="check its quotes") from None
    given: dict[str, str] = {}
    ignored: list[str] = []
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if not word.startswith("--"):
            continue
        flag, equals, value = word[2:].partition("=")
        flag = flag.replace("_", "-")
        if flag in _SWITCHES:
            given[flag] = "true"
        elif flag in _WHOLE | _WORDS:
            if not equals:
                if at == len(words) or words[at].startswith("--"):
                    raise FieldError("has no value", place=f"{place}: --{flag}")
                value = words[at]
                at += 1
            if flag in _WHOLE and not value.isdigit():
                remedy = f"set {value} in the script, or write the number" if "$" in value else ""
                raise FieldError(f"{value!r} is no whole number", place=f"{place}: --{flag}", remedy=remedy)
            given[flag] = value
        else:
            ignored.append(word)
    return given, ignored


# ---------------------------------------------------------------------------------------------------------- DeepSpeed

_TIERS: dict[str, Tier] = {"none": "device", "cpu": "host", "nvme": "disk"}
_READ = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_optimization", "bf16",
    "fp16", "tensor_parallel", "optimizer",
}  # fmt: skip


def read_deepspeed(text: str, *, place: str = "deepspeed.json") -> Imported:
    """A DeepSpeed configuration. Raises FieldError naming the key that is missing, "auto" or not what it should be."""
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise FieldError(f"is no JSON: {error.msg}", place=f"{place}:{error.lineno}") from None
    if not isinstance(config, dict):
        raise FieldError(
            "is no DeepSpeed configuration", place=place, remedy="an object with train_batch_size and so on"
        )

    def section(name: str, within: dict[str, Any] = config) -> dict[str, Any]:
        value = within.get(name) or {}
        if not isinstance(value, dict):
            raise FieldError(f"must be an object, not {value!r}", place=f"{place}: {name}")
        return value

    def number(name: str, within: dict[str, Any] = config, default: int = 0) -> int:
        value = within.get(name, default)
        if value == "auto":
            raise FieldError(
                "is 'auto', which the trainer fills in", place=f"{place}: {name}", remedy="write the number"
            )
        if not isinstance(value, int | float) or isinstance(value, bool) or value < 0 or value != int(value):
            raise FieldError(f"must be a whole number, not {value!r}", place=f"{place}: {name}")
        return int(value)

    def enabled(name: str) -> bool:
        value = section(name).get("enabled", False)
        if value == "auto":
            raise FieldError("is 'auto', which the trainer fills in", place=f"{place}: {name}.enabled",
                             remedy="write true or false")  # fmt: skip
        return bool(value)

    batch, micro = number("train_batch_size"), number("train_micro_batch_size_per_gpu")
    steps = number("gradient_accumulation_steps")
    if not micro and (not batch or "train_micro_batch_size_per_gpu" in config):
        raise FieldError(
            "is missing or 0", place=f"{place}: train_micro_batch_size_per_gpu",
            remedy="write it, or train_batch_size: the samples of one pass on one GPU, or of a step on all",
        )  # fmt: skip
    zero = section("zero_optimization")
    stage = number("stage", zero)
    if stage > 3:
        raise FieldError(f"must be 0 to 3, not {stage}", place=f"{place}: zero_optimization.stage")
    tiers: dict[str, Tier] = {}
    for name in ("offload_param", "offload_optimizer"):
        device = section(name, zero).get("device", "none")
        if device not in _TIERS:
            raise FieldError(
                f"{device!r} is no device to offload to",
                place=f"{place}: zero_optimization.{name}.device",
                remedy=f"one of: {', '.join(_TIERS)}",
            )
        tiers[name] = _TIERS[device]
    precision: Precision = "bfloat16" if enabled("bf16") else "float16" if enabled("fp16") else "float32"
    low = precision != "float32"
    name = str(section("optimizer").get("type", "AdamW"))
    kinds = {"sgd": OptimizerKind(name="SGD", state_bytes_per_element=4.0, traffic_bytes_per_element=20.0)}
    return Imported(
        source="deepspeed",
        micro_batch=micro,
        global_batch=batch,
        micro_batches=steps,
        tensor=number("autotp_size", section("tensor_parallel"), 1) or 1,
        zero_stage=stage,  # type: ignore[arg-type]
        precision=precision,
        overlap=bool(zero.get("overlap_comm", stage == 3)),
        bucket_bytes=number("reduce_bucket_size", zero, 500_000_000) * (2 if low else 4),
        parameters_on=tiers["offload_param"],
        optimizer_on=tiers["offload_optimizer"],
        optimizer=kinds.get(name.lower(), OptimizerKind()),
        recipe=Recipe(
            framework="megatron-deepspeed",
            parameter_bytes=2.0 if low else 4.0,
            gradient_bytes=2.0 if low else 4.0,
            master_bytes=4.0 if low else 0.0,
        ),
        ignored=tuple(sorted(set(config) - _READ)),
    )
