"""Verbs that carry plans out: probe this machine, run a script, report on a run."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from headway.cli.application import app, print_json, verb
from headway.cli.options import (
    JSON,
    SCRIPT,
    ClusterOption,
    Data,
    Devices,
    Engine,
    Exchange,
    ExchangeOption,
    Goal,
    GoalOption,
    MicroBatch,
    Pipeline,
    PrecisionOption,
    Recompute,
    RecomputeOption,
    ScheduleOption,
    Tensor,
    Zero,
    constraints_of,
)

__all__: list[str] = []


class CheckpointOn(enum.StrEnum):
    """Where the checkpoints between the first step and the last go."""

    disk = "disk"
    remote = "remote"


@app.command()
@verb
def probe(
    devices: Devices = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again instead of reading the cache.")] = False,
    exchange: ExchangeOption = Exchange.torch,
    profile: Annotated[
        str | None, typer.Option("--profile", help="Also measure the operators of this model into the database.")
    ] = None,
    json: JSON = False,
) -> None:
    """Measure this machine: FLOP/s, memory bandwidth, collectives between local processes.

    Example: `headway probe --devices 2`
    """
    from headway.hardware.probe import probe as measure
    from headway.report.terminal import Terminal, probe_tables

    terminal = Terminal()
    result = measure(count=devices, refresh=refresh, progress=terminal.stage, exchange=exchange.value)
    if profile is not None:
        from headway.cli.planning import traced
        from headway.predict.measure import measure_workload

        terminal, workload = traced(profile, [], None, None, None)
        terminal.stage(f"Measuring the operators of {workload.graph.name}")
        measure_workload(workload, result.cluster, refresh=refresh)
    if json:
        print_json(result)
    else:
        terminal.show(*probe_tables(result))


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
    checkpoint_on: Annotated[
        CheckpointOn,
        typer.Option("--checkpoint-on", help="Where those of --checkpoint-every go: files, or remote memory."),
    ] = CheckpointOn.disk,
    restarts: Annotated[
        int,
        typer.Option("--restarts", min=0, help="Start all ranks again, so many times, when one was killed or crashed."),
    ] = 0,
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

    constraints = constraints_of(
        True, data=data, tensor=tensor, pipeline=pipeline, micro_batch=micro_batch, zero=zero, schedule=schedule,
        recompute=recompute, precision=precision, exchange=exchange,
    )  # fmt: skip
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
            checkpoint_on=checkpoint_on.value,
            restarts=restarts,
        )
    finally:
        terminal.close()
    page = write_report(Path(result.directory))
    rows = compare(result.prediction, result.measured) if result.measured else []
    if json:
        print_json({**msgspec.to_builtins(result), "comparison": rows, "report": str(page)})
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
        print_json(files)
    else:
        for file in files.values():
            Terminal().out.print(file, soft_wrap=True)


@app.command()
@verb
def aggregate(
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="UDP port; 0: any that is free.")] = 7000,
    bind: Annotated[str, typer.Option("--bind", help="Address; beyond loopback only with a token.")] = "127.0.0.1",
    workers: Annotated[int, typer.Option("--workers", min=1, help="Workers of a job.")] = 2,
    slots: Annotated[int | None, typer.Option("--slots", min=1, help="Segments held at once.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Jobs served at once.")] = 16,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="The token, where it is not in HEADWAY_TOKEN.")
    ] = None,
    json: JSON = False,
) -> None:
    """Serve in-network aggregation in user space: workers send gradients by UDP, and get their sums.

    Example: `headway aggregate --port 7000 --workers 2`
    """
    from headway.exchange.aggregation import aggregate as serve

    serve(port=port, bind=bind, workers=workers, slots=slots, jobs=jobs, token_file=token_file, as_json=json)
