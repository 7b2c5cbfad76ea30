"""Which policy has the shortest completion times? Ours against Tiresias's and those before it, and against a bound.

    python bench/policies.py                      about ten minutes on two cores; results in bench/results/
    python bench/policies.py --quick              a smoke run: two seeds, the first jobs of each trace
    python bench/policies.py --only muri1,drawn

Published traces (in ../shared/data/scheduling, or --data) and drawn ones, each on machines that it loads, on average
over the seeds, to between 0.5 and 1.1 of all that they can do (`load` in the results, seed by seed). The first third of
a published trace is the past: thresholds are tuned on it, and Gittins knows the services of its jobs. The rest is
played. Seeds 1 to 20 draw its days again, some twice, some not at all; of a drawn trace they draw new jobs, and seed 0
is the past. So no policy has seen a job that it is judged on. All see the same jobs; resuming a job costs 30 s on all
of its devices, and nobody's patience ends. The compiled twin plays all but elastic, which the pure machine plays; no
figure depends on how busy the machine is.

- `2d-las`, `2d-gittins`: as published, with the thresholds of Tiresias's public simulator for all traces. `2d-las
  tuned`, `2d-gittins tuned`: the pair of a grid that is best on the past of that very trace.
- `gandiva`: time slices of ten minutes; no packing, since no trace says how busy a job keeps a device.
- `srsf` knows how long jobs last: the bound. `headway` begins with nothing learned.
- `headway shuffled`: users, queues and models dealt out anew among the jobs, so that history misleads.
- `philly-whole`: all 82,247 jobs as they came, once; the past is the first third here too, and so was seen by those
  that are tuned or know a history.
- elastic: drawn jobs that could run on half of their devices, where `headway` may shrink them, Optimus and Pollux
  resize them, and 2D-LAS does neither. On n times as many devices a job is assumed n ** 0.9 times as fast.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from headway.schedule.fleet import parse_fleet
from headway.schedule.pace import Overhead
from headway.schedule.study import Case, play_cases, vary
from headway.schedule.summary import interval, paired_ratio
from headway.schedule.traces.read import Trace, read_trace
from headway.schedule.traces.synthetic import shuffle, synthesize
from record import new_record, save_record

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "shared" / "data" / "scheduling"
RESUME_SECONDS = 30.0
PATIENCE = -1.0  # nobody's ends
# Name: (file, fleet).
PUBLISHED = {
    "philly": ("philly_jobs/philly.csv", "n52g8"),
    "muri1": ("muri/trace1.csv", "n18g8"),
    "muri2": ("muri/trace2.csv", "n48g8"),
    "muri4": ("muri/trace4.csv", "n14g8"),
    "gavel": ("gavel/msr_seed0_ee9e8c.trace", "n14g8"),
}
WHOLE = "philly-whole"
PAST = 1 / 3
ELASTIC_FLEET, ELASTIC_JOBS, ELASTIC_LOAD = "n8g8", 1000, 0.95
ELASTIC_POLICIES = ("2d-las", "headway rigid", "headway", "optimus", "pollux")
DRAWN_FLEET, DRAWN_JOBS, DRAWN_LOAD = "n16g8", 30_000, 0.95
GRID = (900.0, 3600.0, 14400.0, 57600.0, 230400.0, 921600.0, 3686400.0)
NAMES = (*PUBLISHED, "drawn", "elastic", WHOLE)
KEPT = ("completion_mean", "completion_p99", "delay_mean", "preemptions", "overhead_share")
CLAIMS = (
    (("yarn", "2d-las"), ("yarn", "2d-las tuned"), ("gandiva", "2d-las tuned")),
    (("2d-las", "headway"), ("2d-gittins", "headway"), ("2d-las tuned", "headway"), ("2d-gittins tuned", "headway")),
    (("headway shuffled", "headway"), ("headway", "srsf")),
)
POLICIES = ("yarn", "gandiva", "2d-las", "2d-las tuned", "2d-gittins", "2d-gittins tuned", "headway", "srsf")


def traces_of(name: str, data: Path, seeds: list[int], limit: int | None) -> tuple[dict[int, Trace], str]:
    """Seed to trace, and the fleet. 0 is the past."""
    if name == "drawn":
        devices = parse_fleet(DRAWN_FLEET).devices
        jobs = min(DRAWN_JOBS, limit or DRAWN_JOBS)
        return {
            seed: synthesize(jobs, devices=devices, load=DRAWN_LOAD, seed=seed, arrivals="diurnal")
            for seed in [0, *seeds]
        }, DRAWN_FLEET
    file, fleet = PUBLISHED["philly" if name == WHOLE else name]
    base = read_trace(data / file, bad="flag", devices=parse_fleet(fleet).devices, limit=limit)
    past, rest = split(base)
    if name == WHOLE:
        return {0: past, 1: base}, fleet
    return {0: past} | {seed: vary(rest, seed, "resample") for seed in seeds}, fleet


def split(trace: Trace) -> tuple[Trace, Trace]:
    """The first third of the jobs, and the rest, beginning at 0."""
    at = int(len(trace.jobs) * PAST)
    begin = trace.jobs[at].submit_seconds
    later = tuple(msgspec.structs.replace(job, submit_seconds=job.submit_seconds - begin) for job in trace.jobs[at:])
    return (
        Trace(name=f"{trace.name}-past", format=trace.format, jobs=trace.jobs[:at]),
        Trace(name=trace.name, format=trace.format, jobs=later),
    )


def case_of(policy: str, seed: int, thresholds: tuple[float, ...] = (), engine: str = "fast") -> Case:
    return Case(
        policy=policy.split()[0], placement="consolidated-strict" if policy == "yarn" else "consolidated", seed=seed,
        thresholds=thresholds, quantum_seconds=600.0 if policy == "gandiva" else 0.0,
        overhead=Overhead(fixed_seconds=RESUME_SECONDS), patience_seconds=PATIENCE, engine=engine,
    )  # fmt: skip


def compare(name: str, data: Path, seeds: list[int], limit: int | None, workers: int) -> dict:
    traces, spec = traces_of(name, data, seeds, limit)
    fleet = parse_fleet(spec)
    history = [job.service for job in traces[0].jobs]
    pairs = list(itertools.combinations(GRID, 2))

    def played(cases: list[Case], of: dict[int, Trace]) -> list:
        return [each.summary for each in play_cases(cases, of, fleet, history=history, workers=workers)]

    tuned = {}
    for policy in ("2d-las", "2d-gittins"):
        found = played([case_of(policy, 0, pair) for pair in pairs], traces)
        tuned[f"{policy} tuned"] = min(zip(found, pairs, strict=True), key=lambda item: item[0].completion_mean)[1]
    cases = [case_of(policy, seed, tuned.get(policy, ())) for policy in POLICIES for seed in seeds]
    summaries = played(cases, traces)
    by_policy = {policy: summaries[at * len(seeds) : (at + 1) * len(seeds)] for at, policy in enumerate(POLICIES)}
    shuffled = {seed: shuffle(traces[seed], seed) for seed in seeds}
    by_policy["headway shuffled"] = played([case_of("headway", seed) for seed in seeds], shuffled)
    jobs = [len(traces[seed].jobs) for seed in seeds]
    loads = [traces[seed].load(fleet.devices) for seed in seeds]
    return {
        "trace": name, "fleet": spec, "jobs": jobs, "load": [round(load, 3) for load in loads],
        "thresholds": {policy: list(pair) for policy, pair in tuned.items()},
        "policies": {policy: kept(runs) for policy, runs in by_policy.items()},
    }  # fmt: skip


def kept(runs: list) -> dict[str, list[float]]:
    """Of each figure of the table, all seeds."""
    return {field: [getattr(run, field) for run in runs] for field in KEPT}


def compare_elastic(seeds: list[int], limit: int | None, workers: int) -> dict:
    """Jobs of which each of two devices and more could run on half of them: who shrinks them, and who gains by it."""
    fleet = parse_fleet(ELASTIC_FLEET)
    count = min(ELASTIC_JOBS, limit or ELASTIC_JOBS)
    rigid = {
        seed: synthesize(count, devices=fleet.devices, load=ELASTIC_LOAD, seed=seed, arrivals="diurnal")
        for seed in seeds
    }  # fmt: skip
    elastic = {
        seed: msgspec.structs.replace(
            trace,
            jobs=tuple(
                msgspec.structs.replace(
                    job, minimum_devices=job.devices // 2, maximum_devices=min(2 * job.devices, fleet.devices)
                )
                if job.devices > 1 else job
                for job in trace.jobs
            ),
        )
        for seed, trace in rigid.items()
    }  # fmt: skip
    by_policy = {}
    for policy in ELASTIC_POLICIES:
        cases = [case_of(policy, seed, engine="pure") for seed in seeds]
        traces = rigid if policy == "headway rigid" else elastic
        by_policy[policy] = [each.summary for each in play_cases(cases, traces, fleet, workers=workers)]
    return {
        "trace": "elastic", "fleet": ELASTIC_FLEET, "jobs": [count for _ in seeds],
        "load": [round(rigid[seed].load(fleet.devices), 3) for seed in seeds],
        "policies": {policy: kept(runs) for policy, runs in by_policy.items()},
    }  # fmt: skip


def ratio_of(found: dict, slower: str, faster: str) -> str:
    """How many times the mean completion time of `faster` that of `slower` is, seed by seed, and its 95 % interval."""
    runs = found["policies"]
    ours, theirs = (runs[policy]["completion_mean"] for policy in (faster, slower))
    ratio = paired_ratio(ours, theirs)
    if ratio.runs < 2:
        return f"{ratio.mean:.2f}"
    highest = ratio.mean + ratio.half
    return f"{ratio.mean:.2f} ({ratio.mean**2 / highest:.2f}-{highest:.2f})"  # symmetrical in the logarithm


def table_of(found: dict) -> Table:
    jobs = interval(found["jobs"])
    load = interval(found["load"])
    table = Table(
        title=f"{found['trace']} on {found['fleet']}: {jobs.mean:,.0f} jobs, load {load.mean:.2f}", box=SIMPLE_HEAD,
        title_justify="left",
    )  # fmt: skip
    bound = next(policy for policy in ("srsf", "headway") if policy in found["policies"])
    columns = ("policy", "average JCT, h", "p99, h", "delay, h", "preemptions", "overhead", f"x slower than {bound}")
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at else "left")
    for policy, runs in found["policies"].items():

        def mean(field: str, runs: dict = runs) -> float:
            return interval(runs[field]).mean

        average = interval([seconds / 3600 for seconds in runs["completion_mean"]])
        table.add_row(
            policy, str(average), f"{mean('completion_p99') / 3600:.1f}", f"{mean('delay_mean') / 3600:.2f}",
            f"{mean('preemptions'):,.0f}", f"{mean('overhead_share'):.2%}", ratio_of(found, policy, bound),
        )  # fmt: skip
    return table


def claims_of(results: list[dict], pairs: tuple[tuple[str, str], ...]) -> Table:
    table = Table(title="Average JCT of the first over that of the second", box=SIMPLE_HEAD, title_justify="left")
    table.add_column("trace")
    for slower, faster in pairs:
        table.add_column(f"{slower} / {faster}", justify="right")
    for found in results:
        table.add_row(found["trace"], *(ratio_of(found, slower, faster) for slower, faster in pairs))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run, kept nowhere")
    parser.add_argument("--only", default="", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one for each core")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "policies.json")
    options = parser.parse_args()
    seeds = list(range(1, (2 if options.quick else options.seeds) + 1))
    names = [name for name in options.only.split(",") if name] or list(NAMES)
    console = Console(width=100)
    record = new_record(f"1 to {seeds[-1]}; thresholds tuned on 0")
    results = []
    begun = time.perf_counter()
    limit = 600 if options.quick else None
    for name in names:
        file = PUBLISHED["philly" if name == WHOLE else name][0] if name not in ("drawn", "elastic") else ""
        if file and not (options.data / file).exists():
            print(f"{name}: no {file} in {options.data}", file=sys.stderr)
            continue
        if name == "elastic":
            found = compare_elastic(seeds, 200 if options.quick else None, options.workers)
        else:
            found = compare(name, options.data, [1] if name == WHOLE else seeds, limit, options.workers)
        results.append(found)
        console.print(table_of(found))
        print(f"{name}: after {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    for pairs in CLAIMS:
        console.print(claims_of([found for found in results if found["trace"] != "elastic"], pairs))
    record |= {"results": results, "seconds": round(time.perf_counter() - begun, 1)}
    if not options.quick:
        save_record(record, options.output)


if __name__ == "__main__":
    main()
