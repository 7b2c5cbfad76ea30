"""Verbs that decide: what a model is, how to train it, what that will cost."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from headway.cli.application import app, print_json, verb
from headway.cli.measured_times import Times, formulas_only, with_measured_times
from headway.cli.options import (
    JSON,
    SCRIPT,
    Batch,
    Budget,
    ClusterOption,
    Context,
    Data,
    DelayedUpdate,
    Devices,
    Exchange,
    ExchangeOption,
    Expert,
    Framework,
    Goal,
    GoalOption,
    Method,
    MethodOption,
    MicroBatch,
    Offload,
    OffloadOption,
    Pipeline,
    PlanFile,
    PrecisionOption,
    Recompute,
    RecomputeOption,
    ScheduleOption,
    Seed,
    Sequence,
    SequenceParallel,
    Target,
    Tensor,
    WhatIf,
    Zero,
    constraints_of,
)

__all__ = ["predictor_of", "traced"]


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

    terminal, workload = traced(target, context.args, batch, sequence, None)
    if output is not None:
        workload.save(output)
    if json:
        print_json(workload)
    else:
        terminal.show(*workload_table(workload))


def traced(
    target: str, arguments: list[str], batch: int | None, sequence: int | None, precision: str | None
) -> tuple[Any, Any]:
    """(terminal, workload): the target traced, with what it prints on the way."""
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
            precision=precision if precision in ("float32", "bfloat16") else None,
            on_output=terminal.output,
            scratch=Path(scratch),
        )
    return terminal, workload


def predictor_of(
    plan: Path, target: str, arguments: list[str], *, cluster: str, batch: int | None, sequence: int | None,
    times: Times,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """(terminal, plan, predictor): the plan of a file checked against the target and the machines that are named.

    Operators are timed on this machine where it is the cluster and no measured times were named.
    """
    from headway.plan.plan import Plan
    from headway.predict.step import Predictor
    from headway.train.run import find_cluster, measure_operators

    chosen = Plan.load(plan).validate(place=str(plan))
    terminal, workload = traced(target, arguments, batch or chosen.global_batch, sequence, chosen.precision)
    devices = chosen.world_size if cluster == "local" else None
    machines = find_cluster(cluster, devices, progress=terminal.stage, exchange=chosen.exchange)
    chosen.validate(workload.graph, machines, place=str(plan))
    measured = times(machines)
    replayed = None
    if measured is None:
        replayed = measure_operators(
            workload, machines, micro_batches=[chosen.micro_batch], degrees=sorted({1, chosen.tensor})
        )
    return terminal, chosen, Predictor(workload, machines, replayed, measured=measured)


@app.command(context_settings=SCRIPT)
@verb
@with_measured_times
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
    parallel_context: Context = None,
    expert: Expert = None,
    sequence_parallel: SequenceParallel = None,
    offload: OffloadOption = Offload.none,
    delayed_update: DelayedUpdate = False,
    exchange: ExchangeOption = Exchange.torch,
    method: MethodOption = Method.auto,
    budget: Budget = None,
    seed: Seed = 0,
    what_if: WhatIf = None,
    times: Times = formulas_only,
    runnable: Annotated[
        bool | None,
        typer.Option("--runnable/--any", help="Only plans that `headway run` carries out; so for `local`."),
    ] = None,
    keep: Annotated[int, typer.Option("--keep", min=1, help="Show so many plans.")] = 5,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the best plan to this file.")] = None,
    export: Annotated[
        Framework | None, typer.Option("--export", help="Say the best plan in this framework's words.")
    ] = None,
    export_to: Annotated[Path, typer.Option("--export-to", help="Folder for the files of --export.")] = Path("export"),
    report: Annotated[
        Path | None, typer.Option("--report", help="Write a page with pictures of the best plan to this .html file.")
    ] = None,
    json: JSON = False,
) -> None:
    """Find the best plans for a model on some machines, and say why the others were left out.

    Example: `headway plan llama3.1-70b --cluster dgx-h100:8 --batch 512 --precision bfloat16`
    """
    from headway.hardware.what_if import what_if as change
    from headway.plan.export import say_first
    from headway.report.plans import exported_text, write_exported
    from headway.report.terminal import memory_table, ranking_tables, what_if_table
    from headway.train.run import find_cluster, plan_workload

    constraints = constraints_of(
        cluster == "local" if runnable is None else runnable,
        data=data, tensor=tensor, pipeline=pipeline, micro_batch=micro_batch, zero=zero, schedule=schedule,
        recompute=recompute, precision=precision, exchange=exchange, context=parallel_context, expert=expert,
        sequence_parallel=sequence_parallel, offload=offload, delayed_update=delayed_update,
    )  # fmt: skip
    terminal, workload = traced(target, context.args, batch, sequence, precision.value if precision else None)
    machines = find_cluster(cluster, devices, progress=terminal.stage, exchange=exchange.value)
    changed = change(machines, what_if) if what_if is not None else None
    measured = times(machines)
    terminal.stage(f"Searching plans for {len(machines)} devices")
    search: dict[str, Any] = {
        "goal": goal.value, "constraints": constraints, "devices": devices, "keep": keep, "method": method.value,
        "budget_seconds": budget, "seed": seed,
    }  # fmt: skip
    ranking, replayed = plan_workload(workload, machines, measured=measured, **search)
    best = ranking.best[0]
    if output is not None:
        best.plan.save(output)
    if report is not None:
        from headway.predict.step import Predictor
        from headway.report.plan_page import write_plan_report

        terminal.stage(f"Drawing {report}")
        if precision is not None:
            workload = msgspec.structs.replace(workload, precision=precision.value)
        write_plan_report(report, ranking, Predictor(workload, machines, replayed, measured=measured))
    other, before = None, ranking
    if changed is not None:
        terminal.stage(f"Searching plans for {changed.name}")
        other, _ = plan_workload(workload, changed, **search)
        if measured is not None:  # what was measured does not follow machines that change: formulas on both sides
            before, _ = plan_workload(workload, machines, **search)

    def exported() -> Any:
        """The first of the best plans that the framework can say, written down; raises PlanError if it can say none."""
        if export is None:
            return None
        per_node = max(len(positions) for positions in machines.nodes.values())
        plans = [candidate.plan for candidate in ranking.best]
        said = say_first(plans, workload.graph, export.value, devices_per_node=per_node)
        write_exported(said, export_to)
        return said

    if json:
        said = exported()
        answer = msgspec.to_builtins(ranking)
        if measured is not None:
            answer["times"] = msgspec.to_builtins(measured.used())
        if said is not None:
            answer["export"] = msgspec.to_builtins(said)
        if other is not None:
            answer["what_if"] = msgspec.to_builtins(other)
        print_json(answer)
        return
    terminal.show(*ranking_tables(ranking), memory_table(best.prediction.memory))
    if measured is not None:
        terminal.out.print(measured.used().describe(), soft_wrap=True, highlight=False)
    if other is not None and changed is not None:
        terminal.show(what_if_table(before, other, machines.name, what_if or ""))
        if measured is not None:
            terminal.out.print("Both by the formulas: measured times do not follow machines that change.")
    if (said := exported()) is not None:  # after the plans: where it is refused, what was found is there all the same
        terminal.out.print(exported_text(said, export_to), soft_wrap=True, highlight=False)


@app.command(context_settings=SCRIPT)
@verb
@with_measured_times
def predict(
    context: typer.Context,
    target: Target,
    plan: PlanFile,
    cluster: ClusterOption = "local",
    sequence: Sequence = None,
    times: Times = formulas_only,
    json: JSON = False,
) -> None:
    """Say what one plan will cost: step time in parts, memory of each rank, throughput.

    Example: `headway predict gpt2 --plan plan.json --cluster dgx-a100`
    """
    from headway.predict.step import check_fit
    from headway.report.terminal import memory_table, prediction_table

    terminal, chosen, predictor = predictor_of(
        plan, target, context.args, cluster=cluster, batch=None, sequence=sequence, times=times
    )
    measured = predictor.measured
    prediction = predictor.predict(chosen)
    if json:
        known = {} if measured is None else {"times": msgspec.to_builtins(measured.used())}
        print_json({**msgspec.to_builtins(prediction), **known})
    else:
        terminal.show(prediction_table(chosen, prediction), memory_table(prediction.memory))
        if measured is not None:
            terminal.out.print(measured.used().describe(), soft_wrap=True, highlight=False)
    check_fit(prediction, chosen, predictor.cluster)


@app.command("import")
@verb
def import_configuration(
    configuration: Annotated[
        Path, typer.Argument(help="A Megatron-LM command line or script, or a DeepSpeed JSON file.")
    ],
    cluster: Annotated[str, typer.Option("--cluster", "-c", help="The machines it runs on: a preset or a YAML file.")],
    model: Annotated[
        str | None, typer.Option("--model", help="The model, where the configuration does not say: as for `plan`.")
    ] = None,
    vocabulary: Annotated[
        int | None, typer.Option("--vocabulary", min=1, help="Entries of the tokenizer (a Megatron command).")
    ] = None,
    sequence: Sequence = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the present plan to this file.")] = None,
    json: JSON = False,
) -> None:
    """Say what a present configuration costs, and what would be better.

    Example: `headway import pretrain.sh --cluster dgx-a100:4 --vocabulary 50257`
    """
    from headway.errors import FieldError
    from headway.hardware.catalog import load_cluster
    from headway.plan.imports import read_configuration
    from headway.predict.step import Predictor
    from headway.report.terminal import memory_table, prediction_table, ranking_tables
    from headway.search.find import Constraints, find
    from headway.workload.graph import Workload
    from headway.workload.transformer import transformer

    present = read_configuration(configuration, vocabulary=vocabulary)
    machines = load_cluster(cluster)
    if present.shape is not None:
        from headway.report.terminal import Terminal

        terminal, graph = Terminal(), transformer(present.shape, name=configuration.stem)
    elif model is not None:
        terminal, found = traced(model, [], None, sequence, None)
        graph = found.graph
    else:
        raise FieldError(
            "does not say which model it trains", place=str(configuration), remedy="add --model, as for headway plan"
        )
    plan = present.plan(graph, [device.name for device in machines.devices])
    workload = Workload(
        graph=graph, optimizer=present.optimizer, global_batch=plan.global_batch, precision=plan.precision,
        recipe=present.recipe,
    )  # fmt: skip
    prediction = Predictor(workload, machines).predict(plan)
    if output is not None:
        plan.save(output)
    terminal.stage(f"Searching plans for {len(machines)} devices")
    ranking = find(workload, machines, devices=plan.world_size, constraints=Constraints(runnable=False))
    if json:
        print_json({"plan": plan, "prediction": prediction, "ignored": present.ignored, "better": ranking})
        return
    terminal.show(prediction_table(plan, prediction), memory_table(prediction.memory), *ranking_tables(ranking))
    if present.ignored:
        terminal.out.print(f"Not looked at: {' '.join(present.ignored)}", soft_wrap=True, highlight=False)


@app.command()
@verb
def validate(
    data: Annotated[
        Path,
        typer.Option("--data", "-d", help="A CSV table of published measurements; docs/predict.md says which columns."),
    ],
    worst: Annotated[int, typer.Option("--worst", min=0, help="Show so many of the worst rows.")] = 10,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw predicted against measured into this .png or .svg file.")
    ] = None,
    json: JSON = False,
) -> None:
    """Predict measurements that others published, and say how far off the predictions are.

    Example: `headway validate --data published_throughput.csv --plot scatter.svg`
    """
    from headway.predict.published import read_rows
    from headway.predict.validation import validate as compare
    from headway.report.terminal import Terminal
    from headway.report.validation import validation_tables, write_scatter

    terminal = Terminal()
    terminal.stage(f"Reading {data}")
    rows, skipped = read_rows(data)
    terminal.stage(f"Predicting {len(rows)} rows")
    found = compare(rows, skipped=skipped)
    if plot is not None:
        write_scatter(found, plot, "step" if found.errors("step") else "memory")
    if json:
        print_json(found)
    else:
        terminal.show(*validation_tables(found, worst=worst))
