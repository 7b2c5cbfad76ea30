"""Verbs that play a decision on a model of the machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from headway.cli.application import group, print_json, verb
from headway.cli.measured_times import Times, formulas_only, with_measured_times
from headway.cli.options import (
    JSON,
    SCRIPT,
    Batch,
    ClusterOption,
    Operation,
    PlanFile,
    PrecisionOption,
    Seed,
    Sequence,
    Target,
)

__all__: list[str] = []

simulations = group("simulate", "Play a decision on a model of the machines: what if?")


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
        print_json({**msgspec.to_builtins(compared.comparison), "files": [str(file) for file in files]})
    else:
        terminal.show(algorithms_table(compared.comparison))
        for file in files:
            terminal.out.print(str(file), soft_wrap=True)


@simulations.command("step", context_settings=SCRIPT)
@verb
@with_measured_times
def simulate_step(
    context: typer.Context,
    target: Target,
    plan: PlanFile,
    cluster: ClusterOption = "local",
    batch: Batch = None,
    sequence: Sequence = None,
    straggler: Annotated[
        list[str] | None, typer.Option("--straggler", help="A rank that is slower: `5=2.0`. May be repeated.")
    ] = None,
    jitter: Annotated[float, typer.Option("--jitter", min=0.0, help="Spread of every duration: `0.05`.")] = 0.0,
    fault: Annotated[
        list[str] | None, typer.Option("--fault", help="What breaks, and when: `lost=DEVICE@1.5s`. May be repeated.")
    ] = None,
    faults: Annotated[Path | None, typer.Option("--faults", help="Faults from a JSON or YAML file.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Play so many steps.")] = 1,
    checkpoint_steps: Annotated[int, typer.Option("--checkpoint-steps", min=1, help="Steps between checkpoints.")] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the jitter.")] = 0,
    times: Times = formulas_only,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for pictures and timeline.")] = None,
    json: JSON = False,
) -> None:
    """Play one training step event by event: stragglers, jitter, faults; predicted beside simulated.

    Example: `headway simulate step gpt2 --plan plan.json --cluster dgx-a100 --straggler 3=1.5`
    """
    from headway.cli.planning import predictor_of
    from headway.report.step import compared, play, step_table, write_step

    terminal, chosen, predictor = predictor_of(
        plan, target, context.args, cluster=cluster, batch=batch, sequence=sequence, times=times
    )
    machines, measured = predictor.cluster, predictor.measured
    terminal.stage(f"Playing {steps} step{'s' if steps > 1 else ''} on {chosen.world_size} devices (seed {seed})")
    prediction, simulation = play(
        predictor, chosen, stragglers=straggler or (), jitter=jitter, faults=fault or (), faults_file=faults,
        steps=steps, checkpoint_steps=checkpoint_steps, seed=seed,
    )  # fmt: skip
    folder = output or Path("runs") / f"step-{machines.name}-{chosen.world_size}".replace("/", "-").replace(":", "x")
    capacity = min(kind.memory_bytes for kind in machines.accelerators.values())
    files = write_step(folder, prediction, simulation, capacity)
    if json:
        rows = [row._asdict() for row in compared(prediction, simulation)]
        answer = {"seed": seed, "parts": rows, "restarts": simulation.restarts, "seconds": simulation.seconds}
        if measured is not None:
            answer["times"] = msgspec.to_builtins(measured.used())
        print_json({**answer, "bubble_share": simulation.bubble_share, "files": [str(file) for file in files]})
    else:
        terminal.show(step_table(prediction, simulation))
        if measured is not None:
            terminal.out.print(measured.used().describe(), soft_wrap=True, highlight=False)
        for file in files:
            terminal.out.print(str(file), soft_wrap=True)


@simulations.command("memory", context_settings=SCRIPT)
@verb
def simulate_memory(
    context: typer.Context,
    target: Target,
    cluster: ClusterOption = "local",
    batch: Batch = None,
    sequence: Sequence = None,
    precision: PrecisionOption = None,
    budgets: Annotated[
        str, typer.Option("--budgets", help="Shares of the peak (`1,0.5`) or bytes (`8GB`), separated by commas.")
    ] = "1,0.8,0.5,0.3",
    policies: Annotated[
        str | None,
        typer.Option("--policies", help="Only these, by name: `dtr,capuchin`; all but `optimal` by default."),
    ] = None,
    link: Annotated[str, typer.Option("--link", help="Between device and host, each way: `12GB/s`.")] = "12GB/s",
    disk: Annotated[
        str | None, typer.Option("--disk", help="To and from the disk: `2GB/s`; no disk by default.")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="For each policy that searches.")] = 5.0,
    seed: Seed = 0,
    json: JSON = False,
) -> None:
    """Swap and recompute: what each policy costs to keep one device's activations within a budget.

    Example: `headway simulate memory gpt2 --cluster dgx-1v --batch 4 --budgets 1,0.5 --policies dtr,capuchin`
    """
    from headway.cli.planning import traced
    from headway.memory.swapping.planning import POLICIES, swap_table
    from headway.memory.swapping.problem import Path as Way
    from headway.report.swapping import parse_budgets, swapping_table
    from headway.train.run import find_cluster
    from headway.units import parse_bandwidth

    terminal, workload = traced(target, context.args, batch, sequence, precision.value if precision else None)
    machines = find_cluster(cluster, 1 if cluster == "local" else None, progress=terminal.stage)
    accelerator = machines.accelerator_of(0)
    rate = parse_bandwidth(link)
    ways = [Way(tier="host", write_bytes_per_second=rate, read_bytes_per_second=rate)]
    if disk is not None:
        rate = parse_bandwidth(disk)
        ways.append(Way(tier="disk", write_bytes_per_second=rate, read_bytes_per_second=rate))
    asked = [name.strip() for name in policies.split(",")] if policies else [p for p in POLICIES if p != "optimal"]
    terminal.stage(f"Asking {len(asked)} policies")
    rows = swap_table(
        workload.graph,
        accelerator,
        parse_budgets(budgets),
        asked,
        samples=workload.global_batch,
        precision=workload.precision,
        paths=ways,
        seed=seed,
        seconds=seconds,
    )
    if json:
        answer = {"model": workload.graph.name, "accelerator": accelerator.name, "samples": workload.global_batch}
        print_json({**answer, "seed": seed, "rows": [row.to_builtins() for row in rows]})
    else:
        terminal.show(swapping_table(workload.graph.name, workload.global_batch, accelerator.name, rows))
