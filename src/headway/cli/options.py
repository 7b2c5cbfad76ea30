"""Options that several verbs take, and the words that they are one of."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "JSON",
    "SCRIPT",
    "Batch",
    "Budget",
    "ClusterOption",
    "Context",
    "Data",
    "DelayedUpdate",
    "Devices",
    "Engine",
    "Exchange",
    "ExchangeOption",
    "Expert",
    "Framework",
    "Goal",
    "GoalOption",
    "Method",
    "MethodOption",
    "MicroBatch",
    "Offload",
    "OffloadOption",
    "Operation",
    "Pipeline",
    "PlanFile",
    "Precision",
    "PrecisionOption",
    "Recompute",
    "RecomputeOption",
    "Schedule",
    "ScheduleOption",
    "Seed",
    "Sequence",
    "SequenceParallel",
    "Target",
    "Tensor",
    "WhatIf",
    "Zero",
    "constraints_of",
]


class Goal(enum.StrEnum):
    """What the best plan is best at."""

    time = "time"
    memory = "memory"
    cost = "cost"


class Engine(enum.StrEnum):
    """What starts the ranks."""

    local = "local"
    ray = "ray"


class Exchange(enum.StrEnum):
    """Who carries out collectives: torch's backend, or Headway's programs."""

    torch = "torch"
    headway = "headway"


class Precision(enum.StrEnum):
    """Of the forward and backward pass."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float8 = "float8"


class Schedule(enum.StrEnum):
    """Of a pipeline."""

    none = "none"
    gpipe = "gpipe"
    one_forward_one_backward = "1f1b"
    interleaved = "interleaved"
    zero_bubble = "zero_bubble"


class Method(enum.StrEnum):
    """How plans are searched (`search.methods`)."""

    auto = "auto"
    exact = "exact"
    dynamic = "dynamic"
    heterogeneous = "heterogeneous"
    mcmc = "mcmc"
    gradient = "gradient"


class Framework(enum.StrEnum):
    """Whose words a plan is exported to (`plan.export`)."""

    deepspeed = "deepspeed"
    megatron = "megatron"
    torchtitan = "torchtitan"
    fsdp = "fsdp"
    accelerate = "accelerate"


class Offload(enum.StrEnum):
    """What may rest elsewhere than on the device."""

    none = "none"
    optimizer = "optimizer"
    any = "any"


class Operation(enum.StrEnum):
    """A collective."""

    broadcast = "broadcast"
    reduce = "reduce"
    all_reduce = "all_reduce"
    reduce_scatter = "reduce_scatter"
    all_gather = "all_gather"
    gather = "gather"
    scatter = "scatter"
    all_to_all = "all_to_all"


class Recompute(enum.StrEnum):
    """What is run again in backward."""

    none = "none"
    full = "full"
    selective = "selective"
    any = "any"


JSON = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
ClusterOption = Annotated[
    str,
    typer.Option("--cluster", "-c", help="`local` (this machine, probed), a preset (`dgx-h100:64`), or a YAML file."),
]
Devices = Annotated[int | None, typer.Option("--devices", "-n", min=1, help="Use so many devices.")]
Target = Annotated[
    str,
    typer.Argument(help="A script.py, a model of the zoo (`gpt2`), package.module:function, or a workload.json."),
]
Batch = Annotated[int | None, typer.Option("--batch", min=1, help="Samples of one step, over all devices.")]
Sequence = Annotated[int | None, typer.Option("--sequence", min=1, help="Tokens of one sample (models of the zoo).")]
PrecisionOption = Annotated[Precision | None, typer.Option("--precision", help="Of the forward and backward pass.")]
GoalOption = Annotated[Goal, typer.Option("--goal", help="What the best plan is best at.")]
Data = Annotated[int | None, typer.Option("--data", min=1, help="Fix the data-parallel degree.")]
Tensor = Annotated[int | None, typer.Option("--tensor", min=1, help="Fix the tensor-parallel degree.")]
Pipeline = Annotated[int | None, typer.Option("--pipeline", min=1, help="Fix the pipeline degree.")]
MicroBatch = Annotated[int | None, typer.Option("--micro-batch", min=1, help="Fix the samples of a micro-batch.")]
Zero = Annotated[int | None, typer.Option("--zero", min=0, max=3, help="Fix the ZeRO stage.")]
ScheduleOption = Annotated[Schedule | None, typer.Option("--schedule", help="Fix the pipeline schedule.")]
RecomputeOption = Annotated[Recompute, typer.Option("--recompute", help="Recompute activations in backward.")]
ExchangeOption = Annotated[
    Exchange,
    typer.Option("--exchange", help="Who carries out collectives: torch's backend, or Headway's programs."),
]

Context = Annotated[int | None, typer.Option("--context", min=1, help="Fix the context-parallel degree (tokens).")]
Expert = Annotated[int | None, typer.Option("--expert", min=1, help="Fix the expert-parallel degree.")]
SequenceParallel = Annotated[
    bool | None,
    typer.Option("--sequence-parallel/--no-sequence-parallel", help="Divide activations by tokens over tensor ranks."),
]
OffloadOption = Annotated[
    Offload, typer.Option("--offload", help="What may rest off the device: host, disk, other nodes.")
]
DelayedUpdate = Annotated[
    bool, typer.Option("--delayed-update", help="Let the host update beside the next step (one step of delay).")
]
MethodOption = Annotated[Method, typer.Option("--search", help="How plans are searched (docs/search.md).")]
Budget = Annotated[
    float | None, typer.Option("--budget", min=0.1, help="Seconds for the search, for all methods but exact.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the stochastic methods.")]
WhatIf = Annotated[
    str | None,
    typer.Option("--what-if", help="Change the machines: `network=400Gb/s,memory=141GB`, `flops=2x`."),
]
PlanFile = Annotated[Path, typer.Option("--plan", "-p", help="The plan, as JSON or YAML.")]

# Everything after the script that is no option of Headway's is the script's own.
SCRIPT = {"allow_extra_args": True, "ignore_unknown_options": True}


def constraints_of(runnable: bool, **given: Any) -> Any:
    """Constraints from the options that were given; enums by their values, None and "any" left open."""
    from headway.search.find import Constraints

    fields: dict[str, Any] = {"runnable": runnable}
    for name, value in given.items():
        plain = value.value if isinstance(value, enum.Enum) else value
        if plain is not None and (name != "recompute" or plain != "any"):
            fields["zero_stage" if name == "zero" else name] = plain
    return Constraints(**fields)
