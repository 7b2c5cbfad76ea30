"""The verbs: each parses its options, calls one function, and prints.

Answers go to standard output (`--json` for machines), everything else to standard error. Exit codes: 0 done; 2 bad
input; 3 nothing fits; 4 the run failed; 130 stopped by Ctrl-C, in good order.
"""

from __future__ import annotations

import enum
import functools
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from headway.errors import HeadwayError, Interrupted

__all__ = ["app", "main"]

app = typer.Typer(
    name="headway",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Plans, predicts, simulates, runs and shares distributed deep-learning training.",
)


class Goal(enum.StrEnum):
    time = "time"
    memory = "memory"
    cost = "cost"


class Engine(enum.StrEnum):
    local = "local"
    ray = "ray"


class Exchange(enum.StrEnum):
    torch = "torch"
    headway = "headway"


class Precision(enum.StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Schedule(enum.StrEnum):
    none = "none"
    gpipe = "gpipe"
    one_forward_one_backward = "1f1b"
    interleaved = "interleaved"


class Operation(enum.StrEnum):
    broadcast = "broadcast"
    reduce = "reduce"
    all_reduce = "all_reduce"
    reduce_scatter = "reduce_scatter"
    all_gather = "all_gather"
    gather = "gather"
    scatter = "scatter"
    all_to_all = "all_to_all"


class Recompute(enum.StrEnum):
    none = "none"
    full = "full"
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

# Everything after the script that is no option of Headway's is the script's own.
SCRIPT = {"allow_extra_args": True, "ignore_unknown_options": True}


def verb(function: Callable[..., Any]) -> Callable[..., Any]:
    """Errors of ours become a message and an exit code; a broken pipe is not an error."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        from headway.report.terminal import Terminal

        try:
            return function(*arguments, **keywords)
        except HeadwayError as error:
            Terminal().error(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            Terminal().error(Interrupted("stopped by Ctrl-C"))
            raise typer.Exit(Interrupted.exit_code) from None
        except BrokenPipeError:
            # Whoever read our output has seen enough (`headway plan | head`).
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None

    return wrapped


def _print_json(value: Any) -> None:
    data = msgspec.json.encode(value)
    sys.stdout.write(msgspec.json.format(data, indent=2).decode() + "\n")


def _constraints(
    data: int | None,
    tensor: int | None,
    pipeline: int | None,
    micro_batch: int | None,
    zero: int | None,
    schedule: Schedule | None,
    recompute: Recompute,
    precision: Precision | None,
    exchange: Exchange,
) -> Any:
    from headway.search.find import Constraints

    fields: dict[str, Any] = {
        "data": data,
        "tensor": tensor,
        "pipeline": pipeline,
        "micro_batch": micro_batch,
        "zero_stage": zero,
        "schedule": schedule.value if schedule else None,
        "recompute": None if recompute is Recompute.any else recompute.value,
        "precision": precision.value if precision else None,
        "exchange": exchange.value,
    }
    return Constraints(**{name: value for name, value in fields.items() if value is not None})


@app.command()
@verb
def probe(
    devices: Devices = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again instead of reading the cache.")] = False,
    exchange: ExchangeOption = Exchange.torch,
    json: JSON = False,
) -> None:
    """Measure this machine: FLOP/s, memory bandwidth, collectives between local processes.

    Example: `headway probe --devices 2`
    """
    from headway.hardware.probe import probe as measure
    from headway.report.terminal import Terminal, probe_tables

    terminal = Terminal()
    result = measure(count=devices, refresh=refresh, progress=terminal.stage, exchange=exchange.value)
    if json:
        _print_json(result)
    else:
        terminal.show(*probe_tables(result))


@app.command(context_settings=SCRIPT)
@verb
def trace(
    context: typer.Context,
    target: Target,
    batch: Batch = None,
    sequence: Sequence = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the workload to this file.")] = None,
    json: JSON = False,
) -> None:
    """Show what a model is, without allocating it: layers, parameters, FLOP, bytes.

    Example: `headway trace llama3.1-405b`
    """
    from headway.report.terminal import workload_table

    terminal, workload = _workload(target, context.args, batch, sequence, None)
    if output is not None:
        workload.save(output)
    if json:
        _print_json(workload)
    else:
        terminal.show(*workload_table(workload))


def _workload(
    target: str, arguments: list[str], batch: int | None, sequence: int | None, precision: Precision | None
) -> tuple[Any, Any]:
    from headway.report.terminal import Terminal
    from headway.train.source import find_workload

    terminal = Terminal()
    terminal.stage(f"Tracing {target}")
    with tempfile.TemporaryDirectory(prefix="headway-") as scratch:
        workload = find_workload(
            target,
            arguments,
            global_batch=batch,
            sequence=sequence,
            precision=precision.value if precision else None,
            on_output=terminal.output,
            scratch=Path(scratch),
        )
    return terminal, workload


@app.command(context_settings=SCRIPT)
@verb
def plan(
    context: typer.Context,
    target: Target,
    cluster: ClusterOption = "local",
    devices: Devices = None,
    goal: GoalOption = Goal.time,
    batch: Batch = None,
    sequence: Sequence = None,
    precision: PrecisionOption = None,
    data: Data = None,
    tensor: Tensor = None,
    pipeline: Pipeline = None,
    micro_batch: MicroBatch = None,
    zero: Zero = None,
    schedule: ScheduleOption = None,
    recompute: RecomputeOption = Recompute.any,
    exchange: ExchangeOption = Exchange.torch,
    keep: Annotated[int, typer.Option("--keep", min=1, help="Show so many plans.")] = 5,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the best plan to this file.")] = None,
    json: JSON = False,
) -> None:
    """Find the best plans for a model on some machines, and say why the others were left out.

    Example: `headway plan llama3.1-70b --cluster dgx-h100:8 --batch 512 --precision bfloat16`
    """
    from headway.report.terminal import memory_table, ranking_tables
    from headway.train.run import find_cluster, plan_workload

    constraints = _constraints(data, tensor, pipeline, micro_batch, zero, schedule, recompute, precision, exchange)
    terminal, workload = _workload(target, context.args, batch, sequence, precision)
    machines = find_cluster(cluster, devices, progress=terminal.stage, exchange=exchange.value)
    terminal.stage(f"Searching plans for {len(machines)} devices")
    ranking, _ = plan_workload(workload, machines, goal=goal.value, constraints=constraints, devices=devices, keep=keep)
    best = ranking.best[0]
    if output is not None:
        best.plan.save(output)
    if json:
        _print_json(ranking)
    else:
        terminal.show(*ranking_tables(ranking), memory_table(best.prediction.memory))


@app.command(context_settings=SCRIPT)
@verb
def predict(
    context: typer.Context,
    target: Target,
    plan: Annotated[Path, typer.Option("--plan", "-p", help="The plan, as JSON or YAML.")],
    cluster: ClusterOption = "local",
    sequence: Sequence = None,
    json: JSON = False,
) -> None:
    """Say what one plan will cost: step time in parts, memory of each rank, throughput.

    Example: `headway predict gpt2 --plan plan.json --cluster dgx-a100`
    """
    from headway.plan.plan import Plan
    from headway.predict.step import Predictor, check_fit
    from headway.report.terminal import memory_table, prediction_table
    from headway.train.run import find_cluster, measure_operators

    chosen = Plan.load(plan).validate(place=str(plan))
    terminal, workload = _workload(target, context.args, chosen.global_batch, sequence, Precision(chosen.precision))
    machines = find_cluster(
        cluster,
        chosen.world_size if cluster == "local" else None,
        progress=terminal.stage,
        exchange=chosen.exchange,
    )
    chosen.validate(workload.graph, machines, place=str(plan))
    profile = measure_operators(
        workload, machines, micro_batches=[chosen.micro_batch], degrees=sorted({1, chosen.tensor})
    )
    prediction = Predictor(workload, machines, profile).predict(chosen)
    if json:
        _print_json(prediction)
    else:
        terminal.show(prediction_table(chosen, prediction), memory_table(prediction.memory))
    check_fit(prediction, chosen, machines)


@app.command(context_settings=SCRIPT)
@verb
def run(
    context: typer.Context,
    script: Annotated[str | None, typer.Argument(help="An ordinary PyTorch script with Headway's lines.")] = None,
    plan: Annotated[Path | None, typer.Option("--plan", "-p", help="Train under this plan; no search.")] = None,
    cluster: ClusterOption = "local",
    devices: Devices = None,
    goal: GoalOption = Goal.time,
    engine: Annotated[Engine, typer.Option("--engine", help="Local processes, or Ray across machines.")] = Engine.local,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Go on from the latest checkpoint of this run directory.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the folder under runs/.")] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option("--checkpoint-every", min=1, help="Steps between checkpoints; always one at the end.")
    ] = None,
    precision: PrecisionOption = None,
    data: Data = None,
    tensor: Tensor = None,
    pipeline: Pipeline = None,
    micro_batch: MicroBatch = None,
    zero: Zero = None,
    schedule: ScheduleOption = None,
    recompute: RecomputeOption = Recompute.any,
    exchange: ExchangeOption = Exchange.torch,
    json: JSON = False,
) -> None:
    """Train a script under the best plan for the machines; predicted beside measured at the end.

    Options that Headway does not know go to the script; so does everything after `--`.

    Example: `headway run examples/gpt.py --devices 2 --steps 100`
    """
    from headway.report.page import write_report
    from headway.report.terminal import Terminal, comparison_table
    from headway.train.run import compare
    from headway.train.run import run as train

    constraints = _constraints(data, tensor, pipeline, micro_batch, zero, schedule, recompute, precision, exchange)
    terminal = Terminal(quiet=json)
    try:
        result = train(
            script,
            context.args,
            watcher=terminal,
            cluster=cluster,
            devices=devices,
            goal=goal.value,
            constraints=None if constraints == type(constraints)() else constraints,
            plan_path=str(plan) if plan else None,
            engine=engine.value,
            resume=str(resume) if resume else None,
            name=name,
            checkpoint_every=checkpoint_every,
        )
    finally:
        terminal.close()
    page = write_report(Path(result.directory))
    rows = compare(result.prediction, result.measured) if result.measured else []
    if json:
        _print_json({**msgspec.to_builtins(result), "comparison": rows, "report": str(page)})
    else:
        terminal.show(comparison_table(rows))
        loss = "" if result.final_loss is None else f"Final loss {result.final_loss:.4f}. "
        terminal.out.print(f"{loss}Everything is in {result.directory}; open {page}", soft_wrap=True)


@app.command()
@verb
def report(
    directory: Annotated[Path, typer.Argument(help="A folder under runs/.")],
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Also draw the step timelines into this .png or .svg file.")
    ] = None,
    json: JSON = False,
) -> None:
    """Write report.html for a run: one self-contained page with timeline, loss, memory, predicted against measured.

    Example: `headway report runs/gpt-20260101-120000 --picture step.png`
    """
    from headway.report.page import write_report
    from headway.report.picture import write_picture
    from headway.report.terminal import Terminal

    files = {"report": str(write_report(directory))}
    if picture is not None:
        files["picture"] = str(write_picture(directory, picture))
    if json:
        _print_json(files)
    else:
        for file in files.values():
            Terminal().out.print(file, soft_wrap=True)


simulations = typer.Typer(no_args_is_help=True, help="Play a decision on a model of the machines: what if?")
app.add_typer(simulations, name="simulate")


@simulations.command("collective")
@verb
def simulate_collective(
    cluster: Annotated[str, typer.Option("--cluster", "-c", help="A preset (`dgx-1v`), `local`, or a YAML file.")],
    devices: Annotated[
        str | None, typer.Option("--devices", "-n", help="Which devices, by position or name: `0,1,4`; all by default.")
    ] = None,
    op: Annotated[Operation, typer.Option("--op", help="The collective.")] = Operation.all_reduce,
    size: Annotated[str, typer.Option("--size", help="Bytes of the vector: `100MB`, `1GiB`.")] = "100MB",
    root: Annotated[int, typer.Option("--root", min=0, help="The rank that has, or gets, everything.")] = 0,
    algorithm: Annotated[
        str | None, typer.Option("--algorithm", "-a", help="Only these, by name: `ring,packed`; all by default.")
    ] = None,
    pieces: Annotated[
        int | None, typer.Option("--pieces", min=1, help="Cut each chunk into so many; the fastest by default.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for pictures, timelines and programs.")
    ] = None,
    json: JSON = False,
) -> None:
    """Compare algorithms for a collective: time, bandwidth, share of the optimum; draw the load of every link.

    Example: `headway simulate collective --cluster dgx-1v --devices 0,1,4 --op all_reduce --size 100MB`
    """
    from headway.report.collectives import write_collective
    from headway.report.terminal import Terminal, algorithms_table
    from headway.simulate.compare import compare
    from headway.train.run import find_cluster
    from headway.units import parse_bytes

    terminal = Terminal()
    machines = find_cluster(cluster, None, progress=terminal.stage)
    compared = compare(
        machines,
        op.value,
        parse_bytes(size),
        devices=machines.select(devices) if devices is not None else None,
        root=root,
        names=[name.strip() for name in algorithm.split(",")] if algorithm else None,
        pieces=pieces,
        progress=terminal.stage,
    )
    name = f"{op.value}-{machines.name}-{len(compared.comparison.devices)}"
    folder = output or Path("runs") / name.replace("/", "-").replace(":", "x")
    files = write_collective(folder, compared)
    if json:
        _print_json({**msgspec.to_builtins(compared.comparison), "files": [str(file) for file in files]})
    else:
        terminal.show(algorithms_table(compared.comparison))
        for file in files:
            terminal.out.print(str(file), soft_wrap=True)


def _terminated(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """The `headway` command."""
    # A verb that is terminated cleans up as it does for Ctrl-C: no process is left behind.
    signal.signal(signal.SIGTERM, _terminated)
    app()


if __name__ == "__main__":
    main()
