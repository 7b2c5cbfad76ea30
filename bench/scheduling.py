"""How fast are the schedulers? Whole traces by size, and one decision with many jobs waiting.

    python bench/scheduling.py            some six minutes; results in bench/results/
    python bench/scheduling.py --quick    a smoke run, kept nowhere

Processor time of one core, the best of several rounds. Run it on an otherwise idle machine.

- traces: the first 1,000 to 82,247 jobs of the Philly trace on 2,048 devices (a fifth busy) and on 416 (nine tenths),
  reading the file not counted. `pure` is the state machine, `fast` its compiled twin; both end at the same bits.
- pure: the first 10,000 jobs on 416 devices, once, under the policies that the twin does not know.
- decisions: one call of the pure scheduler when a job ends while 1,000 or 10,000 others wait for 2,048 devices.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from headway.errors import MissingExtraError
from headway.schedule.events import Finish, Submit
from headway.schedule.fast.engine import run
from headway.schedule.fleet import parse_fleet
from headway.schedule.job import Job
from headway.schedule.placement.rules import make_placement
from headway.schedule.policies.catalog import make_policy
from headway.schedule.scheduler import Scheduler
from headway.schedule.summary import Replay
from headway.schedule.traces.read import Trace, read_trace
from headway.schedule.traces.synthetic import synthesize
from record import new_record, save_record

HERE = Path(__file__).parent
PHILLY = HERE.parents[1] / "shared" / "data" / "scheduling" / "philly_jobs" / "philly.csv"
FLEETS = ("n256g8", "n52g8")
POLICIES = (
    "fifo", "yarn", "sf", "sjf", "srtf", "srsf", "las", "2d-las-continuous", "2d-las", "2d-gittins", "gandiva",
    "headway",
)  # fmt: skip
ASKED = ("qssf", "themis", "max-min", "optimus", "pollux", "gavel")
ASKED_JOBS = 10_000
DECIDING = ("fifo", "srtf", "2d-las", "headway", "qssf", "gandiva", "themis", "max-min", "optimus", "pollux")
SIZES = (1000, 10_000, 40_000, 82_247)
PURE_JOBS = 1000
SEED = 0


def played(trace: Trace, fleet: str, policy: str, engine: str, rounds: int) -> tuple[float, Replay]:
    """The least processor seconds of several rounds, and what came out."""
    best, replay = float("inf"), None
    history = [job.service for job in trace.jobs[:1000]]
    for _ in range(rounds):
        rule = make_policy(policy, history=history)
        placement = make_placement("consolidated-strict" if policy == "yarn" else "consolidated")
        begun = time.process_time()
        replay = run(trace, parse_fleet(fleet), rule, placement, engine=engine)
        best = min(best, time.process_time() - begun)
    assert replay is not None
    assert not np.isnan(replay.finish).any(), f"{policy} did not finish all jobs"
    return best, replay


def trace_rows(whole: Trace, sizes: list[int], rounds: int) -> list[dict]:
    rows = []
    for fleet in FLEETS:
        for policy in POLICIES:
            played(Trace(name="warm", format=whole.format, jobs=whole.jobs[:50]), fleet, policy, "fast", 1)
            for size in sizes:
                part = Trace(name=whole.name, format=whole.format, jobs=whole.jobs[:size])
                seconds, replay = played(part, fleet, policy, "fast", rounds)
                row = {"fleet": fleet, "policy": policy, "jobs": len(part.jobs), "fast_seconds": round(seconds, 4)}
                row |= {"decisions": replay.decisions, "preemptions": int(replay.preemptions.sum())}
                if size <= PURE_JOBS:
                    pure_seconds, pure = played(part, fleet, policy, "pure", 1)
                    same = bool(np.array_equal(pure.finish, replay.finish) and pure.decisions == replay.decisions)
                    row |= {"pure_seconds": round(pure_seconds, 3), "same_bits": same}
                rows.append(row)
    return rows


def asked_rows(whole: Trace, jobs: int) -> list[dict]:
    """The pure machine alone, under each policy that the twin does not know."""
    rows = []
    part = Trace(name=whole.name, format=whole.format, jobs=whole.jobs[:jobs])
    for policy in ASKED:
        try:
            seconds, replay = played(part, FLEETS[1], policy, "pure", 1)
        except MissingExtraError as error:
            print(f"{policy}: {error}", file=sys.stderr)
            continue
        row = {"fleet": FLEETS[1], "policy": policy, "jobs": len(part.jobs), "pure_seconds": round(seconds, 3)}
        rows.append(row | {"decisions": replay.decisions, "preemptions": int(replay.preemptions.sum())})
    return rows


def decision_rows(counts: list[int], rounds: int) -> list[dict]:
    """Milliseconds that one call takes, the median over ends of jobs, for each number of waiting jobs."""
    rows = []
    fleet = parse_fleet("n256g8")
    for policy in DECIDING:
        for waiting in counts:
            scheduler = Scheduler(fleet, make_policy(policy), make_placement("consolidated"))
            # Runners hold everything; those that wait are like Philly's, and all have come before the clock starts.
            runners = [Job(name=f"r{at}", submit_seconds=0.0, devices=8, duration_seconds=1e6) for at in range(256)]
            drawn = synthesize(waiting, devices=2048, load=1.0, seed=SEED)
            scheduler.handle(0.0, *(Submit(job=job) for job in runners))
            scheduler.handle(1.0, *(Submit(job=job) for job in drawn.jobs))
            times = []
            for turn in range(rounds):
                running = next(entry.job.name for entry in scheduler.entries.values() if entry.running)
                begun = time.process_time()
                scheduler.handle(2.0 + turn, Finish(job=running))
                times.append(time.process_time() - begun)
            median = float(np.median(times)) * 1000
            rows.append({"policy": policy, "waiting": waiting, "milliseconds": round(median, 3)})
    return rows


def show(record: dict, console: Console) -> None:
    table = Table(title="Whole traces, processor seconds", box=SIMPLE_HEAD, title_justify="left")
    columns = ("fleet", "policy", "jobs", "fast", "pure", "jobs/s", "decisions", "same bits")
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at > 1 else "left")
    for row in [*record["traces"], *record["asked"]]:
        seconds = row["fast_seconds"] if "fast_seconds" in row else row["pure_seconds"]
        table.add_row(
            row["fleet"], row["policy"], f"{row['jobs']:,}",
            *(f"{row[field]:.2f}" if field in row else "" for field in ("fast_seconds", "pure_seconds")),
            f"{row['jobs'] / seconds:,.0f}", f"{row['decisions']:,}", str(row.get("same_bits", "")),
        )  # fmt: skip
    console.print(table)
    table = Table(title="One decision of the pure scheduler on 2,048 devices", box=SIMPLE_HEAD, title_justify="left")
    for at, column in enumerate(("policy", "waiting", "ms")):
        table.add_column(column, justify="right" if at else "left")
    for row in record["decisions"]:
        table.add_row(row["policy"], f"{row['waiting']:,}", f"{row['milliseconds']:.1f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run, kept nowhere")
    parser.add_argument("--data", type=Path, default=PHILLY)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "scheduling.json")
    options = parser.parse_args()
    record = new_record(SEED)
    if options.data.exists():
        begun = time.process_time()
        whole = read_trace(options.data)
        record["reading_seconds"] = round(time.process_time() - begun, 3)
    else:
        print(f"no {options.data}: synthetic jobs instead", file=sys.stderr)
        whole = synthesize(SIZES[-1], devices=416, load=0.9, seed=SEED)
    record["trace"] = whole.name
    rounds = 1 if options.quick else options.rounds
    record["traces"] = trace_rows(whole, [300, 3000] if options.quick else list(SIZES), rounds)
    record["asked"] = asked_rows(whole, 300 if options.quick else ASKED_JOBS)
    record["decisions"] = decision_rows([1000] if options.quick else [1000, 10_000], 3 if options.quick else 15)
    show(record, Console(width=100))
    if not options.quick:
        save_record(record, options.output)


if __name__ == "__main__":
    main()
