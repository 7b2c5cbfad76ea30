"""The verb that plays a trace of jobs on a shared cluster."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from headway.cli.application import print_json, verb
from headway.cli.options import JSON
from headway.cli.simulating import simulations

__all__: list[str] = []


class BadRows(enum.StrEnum):
    """What becomes of rows with something wrong."""

    refuse = "refuse"
    flag = "flag"


class Arrivals(enum.StrEnum):
    """How synthetic jobs are submitted."""

    poisson = "poisson"
    diurnal = "diurnal"


class Variation(enum.StrEnum):
    """What a seed above 0 does to a trace."""

    resample = "resample"
    jitter = "jitter"


class PlacementCostOption(enum.StrEnum):
    """What being on several nodes costs a job."""

    parameter_server = "parameter-server"
    all_reduce = "all-reduce"
    published = "published"
    none = "none"


class SimulationEngine(enum.StrEnum):
    """What plays the trace."""

    auto = "auto"
    fast = "fast"
    pure = "pure"
    tiresias = "tiresias"
    ray = "ray"


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


@simulations.command("cluster")
@verb
def simulate_cluster(
    trace: Annotated[
        Path | None, typer.Option("--trace", "-t", help="Jobs, in one of the formats of docs/schedule.md.")
    ] = None,
    cluster: Annotated[
        str, typer.Option("--cluster", "-c", help="`n256g8`, a `.csv` of Tiresias's, a preset, or a YAML file.")
    ] = "n256g8",
    policy: Annotated[
        str, typer.Option("--policy", "-p", help="One or more by name: `2d-las,srtf`.")
    ] = "yarn,2d-las,srsf,headway",
    placement: Annotated[str, typer.Option("--placement", help="One or more by name: `skew,consolidated`.")] = "skew",
    synthetic: Annotated[
        int | None, typer.Option("--synthetic", min=1, help="Instead of a trace: draw so many jobs like Philly's.")
    ] = None,
    load: Annotated[float, typer.Option("--load", min=0.01, help="Of synthetic jobs: asked for over offered.")] = 0.8,
    arrivals: Annotated[
        Arrivals, typer.Option("--arrivals", help="Of synthetic jobs: at one rate, or by the hour.")
    ] = Arrivals.poisson,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="So many variations; the first is the trace itself.")
    ] = 1,
    seed: Annotated[int, typer.Option("--seed", min=0, help="The first seed.")] = 0,
    vary: Annotated[
        Variation, typer.Option("--vary", help="What other seeds do: draw days again, or delay submissions.")
    ] = Variation.resample,
    baseline: Annotated[str, typer.Option("--baseline", help="Ratios are to this policy; the first.")] = "",
    bad: Annotated[
        BadRows, typer.Option("--bad", help="Bad rows: refuse the trace, or flag them and go on.")
    ] = BadRows.refuse,
    format: Annotated[
        str | None, typer.Option("--format", help="Of the trace; told by its columns by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first so many jobs.")] = None,
    throughputs: Annotated[
        Path | None,
        typer.Option("--throughputs", help="Gavel's table of steps per second: for its traces, and Gandiva's pairs."),
    ] = None,
    history: Annotated[
        Path | None,
        typer.Option(
            "--history", help="Services of past jobs, for 2d-gittins; else of the trace's first third, or another seed."
        ),
    ] = None,
    thresholds: Annotated[
        str, typer.Option("--thresholds", help="Of the queues, in device-seconds: `3250,7200`.")
    ] = "",
    promote_knob: Annotated[
        float,
        typer.Option("--promote-knob", min=0.0, help="Waited so many times what it ran: back to the first queue."),
    ] = 0.0,
    quantum: Annotated[
        str | None, typer.Option("--quantum", help="Of policies that ask again and again: `5min`.")
    ] = None,
    patience: Annotated[
        str | None,
        typer.Option(
            "--patience", help="Whoever waits longer goes first: `24h`, `never`; the policy's own by default."
        ),
    ] = None,
    overhead: Annotated[str, typer.Option("--overhead", help="Of every resumption: `30s`.")] = "0s",
    storage: Annotated[
        str | None, typer.Option("--storage", help="Bandwidth by which known models are saved and restored: `1GB/s`.")
    ] = None,
    placement_cost: Annotated[
        PlacementCostOption,
        typer.Option("--placement-cost", help="Of known models on several nodes: predicted, a published factor, none."),
    ] = PlacementCostOption.parameter_server,
    engine: Annotated[
        SimulationEngine,
        typer.Option("--engine", help="Compiled where it can, always, never; as Tiresias's simulator; many on Ray."),
    ] = SimulationEngine.auto,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes; 0: one for each core.")] = 0,
    report: Annotated[Path | None, typer.Option("--report", help="Write a page with pictures here.")] = None,
    table: Annotated[Path | None, typer.Option("--csv", help="Write a row for every job here.")] = None,
    json: JSON = False,
) -> None:
    """Play a trace of jobs on a shared cluster under several policies: completion times, queueing, utilisation, cost.

    Every row of the trace that is no job is named with its line, and every job finishes, or the exit code is not 0.

    Example: `headway simulate cluster --trace jobs.csv --cluster n256g8 --policy 2d-las,srtf --report month.html`
    """
    from headway.errors import InputError, RunError
    from headway.report.schedule import StudyProgress, describe_load, schedule_tables, write_schedule_report
    from headway.report.terminal import Terminal
    from headway.schedule.pace import Overhead
    from headway.schedule.placement.pairs import read_pairs
    from headway.schedule.placement.profiles import model_profiles
    from headway.schedule.policies.gittins import read_history
    from headway.schedule.study import Case, cases_of, find_machines, play_cases
    from headway.schedule.study import vary as varied
    from headway.schedule.summary import write_csv
    from headway.schedule.traces.read import read_trace
    from headway.schedule.traces.synthetic import synthesize
    from headway.units import parse_bandwidth, parse_seconds

    terminal = Terminal()
    if (trace is None) == (synthetic is None):
        raise InputError("give a trace or --synthetic, one of both", place="simulate cluster")
    fleet, machines = find_machines(cluster)
    numbers = list(range(seed, seed + seeds))
    if trace is not None:
        base = read_trace(
            trace, format=format, bad=bad.value, devices=fleet.devices, throughputs=throughputs, limit=limit
        )
        traces = {number: varied(base, number, vary.value) for number in numbers}
    else:
        assert synthetic is not None
        traces = {
            number: synthesize(synthetic, devices=fleet.devices, load=load, seed=number, arrivals=arrivals.value)
            for number in numbers
        }
        base = traces[numbers[0]]
    for note in base.notes:
        terminal.stage(note)
    for problem in base.problems:
        terminal.stage(str(problem))
    if not base.jobs:
        raise InputError("there is no job to play", place=str(trace), remedy="mend the rows that are named above")
    policies = _words(policy)
    past = read_history(history) if history else []
    if not past and any(name.startswith("2d-gittins") for name in policies):
        if synthetic is None:
            past = [job.service for job in base.jobs[: max(1, len(base.jobs) // 3)]]
            said = "of the first third of this trace, which is played too: give --history for those of other jobs"
        else:
            other = synthesize(
                synthetic, devices=fleet.devices, load=load, seed=numbers[-1] + 1, arrivals=arrivals.value
            )
            past = [job.service for job in other.jobs]
            said = f"of other jobs, drawn with seed {numbers[-1] + 1}"
        terminal.stage(f"2d-gittins knows the services {said}")
    pattern = Case(
        policy="", thresholds=_numbers(thresholds), promote_knob=promote_knob,
        quantum_seconds=0.0 if quantum is None else _seconds(quantum, "--quantum"),
        patience_seconds=_patience(patience),
        overhead=Overhead(
            fixed_seconds=parse_seconds(overhead),
            storage_bytes_per_second=parse_bandwidth(storage) if storage else 0.0,
        ),
        engine="auto" if engine is SimulationEngine.ray else engine.value,
        placement_cost=placement_cost.value, keep=report is not None,
    )  # fmt: skip
    pairs = None
    beside = trace.parent / "simulation_throughputs.json" if trace is not None and base.format == "gavel" else None
    measured = throughputs or beside
    if "gandiva" in policies and measured:
        pairs = read_pairs(measured)
    placements = _words(placement)
    if engine is SimulationEngine.tiresias:
        placements = placements[:1]  # it counts devices, whatever the placement: all would be one run
    cases = cases_of(policies, placements, numbers, pattern)
    demand = describe_load(base.load(fleet.devices), base.span_seconds)
    terminal.stage(f"{len(base.jobs):,} jobs of {base.name} on {fleet.devices:,} devices of {fleet.name}: {demand}")

    with StudyProgress(terminal.err) as progress:
        played = play_cases(
            cases, traces, fleet, profiles=model_profiles(), history=past, workers=workers,
            backend="ray" if engine is SimulationEngine.ray else "processes", progress=progress.step,
            cluster=machines, pairs=pairs,
        )  # fmt: skip
    summaries = [each.summary for each in played]
    files: list[Path] = []
    if report is not None:
        shown = [each.replay for each in played if each.case.seed == numbers[0]]
        facts = [f"{len(base.jobs):,} jobs", f"{fleet.devices:,} devices", demand, *base.notes]
        problems = [str(problem) for problem in base.problems]
        files.append(
            write_schedule_report(
                report, summaries, shown, machines=fleet.name, facts=facts, problems=problems, baseline=baseline
            )
        )
    if table is not None:
        write_csv([(each.case.seed, each.replay) for each in played], table)
        files.append(table)
    tables = schedule_tables(summaries, baseline)
    if json:
        answer: dict[str, Any] = {"trace": base.name, "format": base.format, "cluster": fleet.name}
        answer |= {"devices": fleet.devices, "notes": base.notes, "problems": base.problems, "summaries": summaries}
        print_json({**answer, "files": [str(file) for file in files]})
    else:
        terminal.show(*tables)
        for file in files:
            terminal.out.print(str(file), soft_wrap=True)
    unfinished = sum(summary.unfinished for summary in summaries)
    if unfinished:
        raise RunError(f"{unfinished:,} jobs did not finish", place=base.name, remedy="see the rows without a finish")
    if base.left_out:
        raise InputError(
            f"{base.left_out:,} rows are left out of all figures", place=str(trace), remedy="mend the rows named above"
        )


def _patience(text: str | None) -> float:
    """As `Case.patience_seconds` has it."""
    if text is None:
        return 0.0
    return -1.0 if text == "never" else _seconds(text, "--patience")


def _seconds(text: str, option: str) -> float:
    from headway.errors import InputError
    from headway.units import parse_seconds

    seconds = parse_seconds(text)
    if not seconds > 0:
        raise InputError(f"{text!r} is not above 0", place=option, remedy="like 5min; left out, the policy's own")
    return seconds


def _numbers(text: str) -> tuple[float, ...]:
    from headway.errors import InputError

    try:
        return tuple(float(word) for word in _words(text))
    except ValueError:
        raise InputError(f"{text!r} are no numbers", place="--thresholds", remedy="like 3250,7200") from None
