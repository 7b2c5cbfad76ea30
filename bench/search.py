"""Which search finds how good a plan in which time, what does a plan cost to predict, and does the gradient help?

    python bench/search.py --parts stages predictions             a minute and a half
    python bench/search.py --output bench/results/search.json     everything, some thirteen minutes

Six parts:

- "stages": the stage programme alone, on drawn problems of 128 layers and 50 devices: as many stages as are best, with
  more memory than is needed and with too little, two kinds of device, and one device for each stage (50 stages).
- "verbs": `headway plan` as a user calls it, as a process of its own on all cores: the seconds that it says the search
  took, and those of the whole command, from the shell to the answer.
- "predictions": milliseconds to predict a plan that was never seen, in a walk over whole plans.
- "enumerable": drawn stage problems small enough to try everything, and "drawn": larger ones, which the exact
  programme solves, both at equal numbers of evaluations.
- "models": GPT-3 175B, Llama 3.1 405B, Mixtral 8x7B and a wide ResNet on 64 to 16,384 devices of one kind and of two,
  at equal time.

Random search takes every proposal that is a solution; hill climbing only what is no worse; all three walks have the
same proposals and the same beginnings. "gradient" is descent and rounding alone, "gradient + proposals" spends half of
its evaluations on hill climbing from what it rounded. An iteration counts as one evaluation of each candidate. Time is
that of the processor: each method is run once to learn what an evaluation costs it, then with as many as the time
allows, so that a busy machine changes little. The exact programme runs to the end, within its own limit. "best" is the
least that any method found.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from headway.errors import HeadwayError
from headway.hardware.catalog import load_cluster
from headway.predict.step import Predictor
from headway.search.dynamic import solve
from headway.search.gradient import gradient
from headway.search.mcmc import Result, mcmc, random_search
from headway.search.plan_walk import mcmc_plans
from headway.search.problem import Assignment, StageProblem, brute_force
from headway.search.ranking import Constraints
from headway.search.synthetic import synthetic_problem
from headway.search.tables import stage_problem
from headway.workload.graph import Graph, Recipe, Workload
from headway.workload.trace import trace
from headway.workload.transformer import TransformerShape, transformer
from headway.workload.zoo.vision import ResNet
from record import new_record, save_record

Method = Callable[[StageProblem, int, int], Result]

METHODS: dict[str, Method] = {
    "random": lambda problem, seed, count: random_search(problem, seed=seed, evaluations=count),
    "hill climbing": lambda problem, seed, count: mcmc(problem, seed=seed, evaluations=count, temperature=(0, 0)),
    "mcmc": lambda problem, seed, count: mcmc(problem, seed=seed, evaluations=count),
    "gradient": lambda problem, seed, count: gradient(problem, seed=seed, evaluations=count, polish=0),
    "gradient + proposals": lambda problem, seed, count: gradient(
        problem, seed=seed, evaluations=count, round_iterations=60, polish=60
    ),
}

PARTS = ["stages", "verbs", "predictions", "enumerable", "drawn", "models"]
ENUMERABLE = (
    {"layers": 6, "pools": (4,)},
    {"layers": 5, "pools": (3,), "memory": 1.0},
    {"layers": 5, "pools": (2, 2), "memory": 0.9},
    {"layers": 5, "pools": (4,), "rugged": 0.5},
)
DRAWN = (
    {"layers": 24, "pools": (32,), "micro_batches": 16, "memory": 1.0},
    {"layers": 24, "pools": (16, 8), "micro_batches": 16, "memory": 0.9},
    {"layers": 48, "pools": (16, 16), "micro_batches": 32, "memory": 0.8},
)
# What the stage programme is timed on: 128 layers, 50 devices.
STAGES: dict[str, dict[str, Any]] = {
    "50 devices, memory to spare": {"pools": (50,)},
    "50 devices, memory binds": {"pools": (50,), "memory": 1.0},
    "50 devices, memory binds hard": {"pools": (50,), "memory": 0.8},
    "50 devices, rugged tables": {"pools": (50,), "memory": 1.0, "rugged": 0.3},
    "50 stages of one device": {"pools": (50,)},
    "25 + 25 devices, memory binds": {"pools": (25, 25), "memory": 0.9},
}
# Model, cluster, global batch, and the aim in seconds, on two cores, where there is one.
VERBS = (
    ("gpt3-175b", "dgx-a100:64", 1536, 5.0),
    ("llama3.1-405b", "dgx-h100:2048", 2048, 10.0),
    ("mixtral-8x7b", "dgx-a100:8", 512, None),
    ("mixtral-8x7b", "dgx-a100:4+dgx-h100:4", 512, None),
    ("gpt3-175b", "dgx-a100:32+dgx-h100:32", 1536, None),
)
# Model, cluster, global batch.
PREDICTIONS = (
    ("mixtral-8x7b", "dgx-a100:8", 512),
    ("gpt3-175b", "dgx-a100:64", 1536),
    ("gpt3-175b", "dgx-a100:32+dgx-h100:32", 1536),
    ("llama3.1-405b", "dgx-h100:2048", 4096),
)
COUNTS = {"enumerable": (100, 1000), "drawn": (1000, 10_000)}


def gpt3() -> Graph:
    return transformer(
        TransformerShape(layers=96, hidden=12288, heads=96, vocabulary=50257, sequence=2048), "gpt3-175b"
    )


def llama() -> Graph:
    shape = TransformerShape(
        layers=126, hidden=16384, heads=128, kv_heads=8, ffn=53248, vocabulary=128256, sequence=8192, gated=True,
        positions="rotary", norm="rms", biases=False,
    )  # fmt: skip
    return transformer(shape, "llama3.1-405b")


def mixtral() -> Graph:
    shape = TransformerShape(
        layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocabulary=32000, sequence=4096, gated=True,
        positions="rotary", norm="rms", biases=False, experts=8, experts_chosen=2,
    )  # fmt: skip
    return transformer(shape, "mixtral-8x7b")


def wide_resnet() -> Graph:
    with torch.device("meta"):
        model = ResNet(blocks=(3, 8, 36, 3), width=640)
        images, labels = torch.empty(2, 3, 224, 224), torch.empty(2, dtype=torch.int64)
    return trace(model, (images,), name="wide-resnet", loss=torch.nn.functional.cross_entropy, target=labels)


MODELS: dict[str, Callable[[], Graph]] = {
    "gpt3-175b": gpt3,
    "llama3.1-405b": llama,
    "mixtral-8x7b": mixtral,
    "wide-resnet": wide_resnet,
}
# Mixed precision as in Megatron-LM: bfloat16 parameters, float32 gradients and master copy.
RECIPE = Recipe(framework="megatron", parameter_bytes=2.0, gradient_bytes=4.0, master_bytes=4.0)
# Model, cluster, global batch, micro-batch (of the whole pipeline).
CASES = (
    ("mixtral-8x7b", "dgx-a100:8", 512, 8),
    ("mixtral-8x7b", "dgx-a100:4+dgx-h100:4", 512, 8),
    ("wide-resnet", "dgx-a100:8", 1024, 32),
    ("wide-resnet", "dgx-a100:4+dgx-h100:4", 1024, 32),
    ("gpt3-175b", "dgx-a100:64", 1536, 16),
    ("gpt3-175b", "dgx-a100:32+dgx-h100:32", 1536, 16),
    ("llama3.1-405b", "dgx-h100:256", 2048, 16),
    ("llama3.1-405b", "dgx-h100:128+dgx-a100:128", 2048, 16),
    ("llama3.1-405b", "dgx-h100:2048", 4096, 64),
    ("llama3.1-405b", "dgx-h100:1024+dgx-a100:1024", 4096, 64),
)


def stages(seeds: int, limit: float, console: Console) -> list[dict]:
    """The stage programme alone, on one core, for drawn problems of 128 layers: CPU-seconds, and those of the clock."""
    solve(synthetic_problem(0, layers=24, pools=(16, 8), micro_batches=16, memory=0.9))  # compiles
    table = _table(
        f"The stage programme, 128 layers, 64 micro-batches, seeds 0 to {seeds - 1}",
        "problem", "solved", "median", "worst", "worst seed", "worst by the clock", "stages",
    )  # fmt: skip
    rows = []
    for name, size in STAGES.items():
        spent: dict[int, float] = {}  # by seed
        clock: list[float] = []
        counts, unproven = [], 0
        for seed in range(seeds):
            problem = synthetic_problem(seed, layers=128, micro_batches=64, **size)
            if name.startswith("50 stages"):
                problem = one_device_each(problem)
            began, then = time.process_time(), time.perf_counter()
            try:
                answer = solve(problem, budget_seconds=limit)
            except HeadwayError as error:
                print(f"  {name}, seed {seed}: {error}", file=sys.stderr)
                continue
            spent[seed] = time.process_time() - began
            clock.append(time.perf_counter() - then)
            counts.append(len(answer.stages))
            unproven += not answer.proven
        if not spent:
            continue
        worst = max(spent, key=lambda seed: spent[seed])
        rows.append(
            {
                "problem": name,
                "cpu_seconds": list(spent.values()),
                "wall_seconds": clock,
                "seeds": list(spent),
                "stages": counts,
                "unproven": unproven,
            }
        )
        held = [count for count in counts if count]
        table.add_row(
            name, f"{len(held)}/{seeds}", f"{statistics.median(spent.values()):.3f} s", f"{spent[worst]:.3f} s",
            str(worst), f"{max(clock):.3f} s", f"{min(held)} to {max(held)}" if held else "",
        )  # fmt: skip
    console.print(table)
    return rows


def one_device_each(problem: StageProblem) -> StageProblem:
    """The same problem with stages of one device only: as many stages as there are devices."""
    single = [at for at, option in enumerate(problem.options) if option.devices == 1]
    tables = {name: getattr(problem, name)[single] for name in ("seconds", "fixed_bytes", "kept_bytes")}
    return dataclasses.replace(
        problem, options=tuple(problem.options[at] for at in single), capacity_bytes=problem.capacity_bytes[single],
        **tables,
    )  # fmt: skip


def verbs(repeat: int, console: Console) -> list[dict]:
    """`headway plan --json` as a process: what it says of its search, and how long the whole command takes."""
    table = _table(
        f"headway plan, {os.cpu_count()} cores, median of {repeat}",
        "model", "machines", "plans considered", "search", "aim", "command", "CPU", "best step",
    )  # fmt: skip
    rows = []
    for model, machines, batch, aim in VERBS:
        asked = [model, "--cluster", machines, "--batch", str(batch), "--precision", "bfloat16"]
        print(f"headway plan {' '.join(asked)}", file=sys.stderr)
        runs = []
        for _ in range(repeat):
            before, began = os.times(), time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-m", "headway", "plan", *asked, "--json"], capture_output=True, text=True
            )
            wall, after = time.perf_counter() - began, os.times()
            if done.returncode:
                raise SystemExit(f"headway plan {' '.join(asked)} ended with {done.returncode}:\n{done.stderr}")
            answer = json.loads(done.stdout)
            cpu = after.children_user + after.children_system - before.children_user - before.children_system
            runs.append({"search_seconds": answer["seconds"], "command_seconds": wall, "cpu_seconds": cpu})
        step = answer["best"][0]["prediction"]["time"]["step_seconds"]
        rows.append({
            "command": f"headway plan {' '.join(asked)}", "aim_seconds": aim, "runs": runs, "step_seconds": step,
            "considered": answer["considered"], "evaluated": answer["evaluated"],
        })  # fmt: skip
        middle = {name: f"{statistics.median(run[name] for run in runs):.2f} s" for name in runs[0]}
        table.add_row(
            model, machines, f"{answer['considered']:,}", middle["search_seconds"], f"{aim:g} s" if aim else "",
            middle["command_seconds"], middle["cpu_seconds"], f"{step:.2f} s",
        )  # fmt: skip
    console.print(table)
    return rows


def predictions(count: int, console: Console) -> list[dict]:
    """CPU-milliseconds for each plan of a walk over whole plans, proposing and predicting: what a search pays."""
    table = _table("Predicting whole plans", "model", "machines", "plans", "ms a plan", "of them predicting")
    rows = []
    for model, machines, batch in PREDICTIONS:
        cluster = load_cluster(machines)
        workload = Workload(graph=MODELS[model](), global_batch=batch, precision="bfloat16", recipe=RECIPE)
        predictor = Predictor(workload, cluster)
        inside, predict = [0.0, 0], predictor.predict

        def timed(plan: Any, predict: Any = predict, inside: list = inside) -> Any:
            began = time.process_time()
            answer = predict(plan)
            inside[0] += time.process_time() - began
            inside[1] += 1
            return answer

        predictor.predict = timed  # type: ignore[method-assign]
        began = time.process_time()
        result = mcmc_plans(predictor, constraints=Constraints(runnable=False), seed=0, evaluations=count)
        whole, alone = (1e3 * spent / result.evaluated for spent in (time.process_time() - began, inside[0]))
        rows.append({
            "model": model, "cluster": machines, "devices": len(cluster), "plans": result.evaluated,
            "predicted": inside[1], "milliseconds": whole, "predicting_milliseconds": alone,
        })  # fmt: skip
        table.add_row(model, machines, f"{result.evaluated:,}", f"{whole:.2f}", f"{alone:.2f}")
    console.print(table)
    return rows


def drawn(part: str, seeds: int, console: Console) -> list[dict]:
    """Drawn problems against their optimum: by trying everything, or by the exact programme."""
    sizes, reference = (ENUMERABLE, brute_force) if part == "enumerable" else (DRAWN, solve)
    problems = [
        (seed, synthetic_problem(seed, **size))  # type: ignore[arg-type]
        for size in sizes
        for seed in range(seeds)
    ]
    known = [(seed, problem, reference(problem)) for seed, problem in problems]
    known = [entry for entry in known if math.isfinite(entry[2].seconds)]
    how = "small enough to try everything" if part == "enumerable" else "against the exact programme"
    table = _table(
        f"{len(known)} drawn problems, {how}",
        "method", "evaluations", "optimal", "within 2 %", "mean gap", "worst gap", "nothing",
    )  # fmt: skip
    rows = []
    if part == "enumerable":
        gaps = [solve(problem).seconds / best.seconds - 1 for _, problem, best in known]
        rows.append({"method": "exact programme", "evaluations": None, "gaps": gaps})
        table.add_row("exact programme", "", *_distribution(gaps))
    for count in COUNTS[part]:
        for name, method in METHODS.items():
            gaps = [method(problem, seed, count).seconds / best.seconds - 1 for seed, problem, best in known]
            table.add_row(name, f"{count:,}", *_distribution(gaps))
            rows.append({"method": name, "evaluations": count, "gaps": gaps})
    console.print(table)
    return rows


def _table(title: str, *columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("method", "problem", "model", "machines") else "right")
    return table


def _distribution(gaps: list[float]) -> list[str]:
    found = [gap for gap in gaps if math.isfinite(gap)]
    return [
        f"{sum(gap < 1e-9 for gap in found)}/{len(gaps)}",
        f"{sum(gap <= 0.02 for gap in found)}/{len(gaps)}",
        f"{statistics.mean(found):.2%}" if found else "",
        f"{max(found):.2%}" if found else "",
        str(len(gaps) - len(found)),
    ]


def uniform(problem: StageProblem) -> float:
    """The best of equal stages with one option: the baseline on machines of one kind."""
    best = math.inf
    for at, option in enumerate(problem.options):
        stages, left = divmod(sum(problem.pools), option.devices)
        if len(problem.pools) > 1 or left or stages > problem.layers:
            continue
        cuts = [round(problem.layers * stage / stages) for stage in range(stages + 1)]
        best = min(best, problem.evaluate([Assignment(*pair, at) for pair in pairwise(cuts)]))
    return best


def models(seconds: float, seeds: int, limit: float, console: Console, only: str) -> list[dict]:
    rows: list[dict] = []
    graphs: dict[str, Graph] = {}
    for model, machines, batch, micro_batch in CASES:
        if only and only not in f"{model} {machines}":
            continue
        print(f"{model} on {machines}", file=sys.stderr)
        if model not in graphs:
            graphs[model] = MODELS[model]()
        try:
            cluster = load_cluster(machines)
            workload = Workload(graph=graphs[model], global_batch=batch, precision="bfloat16", recipe=RECIPE)
            began = time.process_time()
            problem = stage_problem(
                workload, cluster, Predictor(workload, cluster), micro_batch=micro_batch, zero_stage=1
            )
            tables = time.process_time() - began
        except HeadwayError as error:
            print(f"  left out: {error}", file=sys.stderr)
            continue
        case = {
            "model": model, "cluster": machines, "devices": len(cluster), "layers": problem.layers,
            "options": len(problem.options), "micro_batches": problem.micro_batches, "tables_cpu_seconds": tables,
            "uniform_seconds": uniform(problem),
        }  # fmt: skip
        runs = []
        began = time.process_time()
        try:
            answer = solve(problem, budget_seconds=limit)
        except HeadwayError as error:
            print(f"  exact programme: {error}", file=sys.stderr)
        else:
            spent = time.process_time() - began
            runs.append({
                "method": "exact programme", "proven": answer.proven, "cpu_seconds": spent, "found": [answer.seconds],
                "evaluated": answer.evaluated, "series": [[spent, answer.seconds]],
            })  # fmt: skip
        for name, method in METHODS.items():
            cost, count = _cost(method, problem, seconds), 0
            found: list[Result] = []
            for seed in range(seeds):
                count = max(64, int(seconds / cost))
                found.append(method(problem, seed, count))
            runs.append({
                "method": name, "cpu_seconds": count * cost, "evaluated": found[0].evaluated,
                "found": [result.seconds for result in found],
                "series": [[entry.evaluated * cost, entry.seconds] for entry in found[0].history],
            })  # fmt: skip
        rows.append({**case, "runs": runs})
        _show(rows[-1], console)
    return rows


def _cost(method: Method, problem: StageProblem, seconds: float) -> float:
    """CPU-seconds of an evaluation, compiled and with the preparation shared out, as in a run of so many seconds."""
    count = 4000
    began = time.process_time()
    method(problem, 0, 64)
    before = time.process_time()
    method(problem, 0, count)
    spent = time.process_time() - before
    preparing = min(before - began, 0.9 * spent)
    rate = (spent - preparing) / count
    return seconds / max(1.0, (seconds - min(preparing, 0.5 * seconds)) / rate)


def _show(row: dict, console: Console) -> None:
    title = f"{row['model']} on {row['cluster']}: {row['layers']} layers, {row['options']} options"
    best = min(min(run["found"]) for run in row["runs"])
    table = _table(title, "method", "step", "over best", "worst seed", "evaluations", "CPU s", "within 1 % at")
    if math.isfinite(row["uniform_seconds"]):
        table.add_row("uniform stages", f"{row['uniform_seconds']:.3f} s", f"{row['uniform_seconds'] / best - 1:.2%}")
    for run in row["runs"]:
        middle = statistics.median(run["found"])
        near = next((f"{at:.2f} s" for at, seconds in run["series"] if seconds <= best * 1.01), "")
        table.add_row(
            run["method"] + (" (proven)" if run.get("proven") else ""),
            f"{middle:.3f} s" if math.isfinite(middle) else "none",
            f"{middle / best - 1:.2%}" if math.isfinite(middle) else "",
            f"{max(run['found']) / best - 1:.2%}" if math.isfinite(max(run["found"])) else "none",
            f"{run['evaluated']:,}",
            f"{run['cpu_seconds']:.2f}",
            near,
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--problems", type=int, default=8, help="drawn problems of each size")
    parser.add_argument("--stage-problems", type=int, default=100, help="problems of each kind for the stage programme")
    parser.add_argument("--repeat", type=int, default=2, help="runs of each verb")
    parser.add_argument("--plans", type=int, default=2000, help="plans predicted for each model")
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU-seconds for each method and model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=30.0, help="seconds after which the exact programme stops")
    parser.add_argument("--only", default="", help="cases of models and machines that contain this text")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # CPU-seconds of one core
    console = Console(width=100 if not sys.stdout.isatty() else None, highlight=False)
    record = new_record(
        f"0 to {arguments.problems - 1} for drawn problems, 0 to {arguments.stage_problems - 1} for the stage "
        f"programme, 0 to {arguments.seeds - 1} for searches, 0 for the walk over plans",
        torch=torch.__version__,
    )
    print(f"seeds: {record['seed']}", file=sys.stderr)
    record["cpu_seconds"] = arguments.seconds
    parts: dict[str, Callable[[], list[dict]]] = {
        "stages": lambda: stages(arguments.stage_problems, arguments.limit, console),
        "verbs": lambda: verbs(arguments.repeat, console),
        "predictions": lambda: predictions(arguments.plans, console),
        "enumerable": lambda: drawn("enumerable", arguments.problems, console),
        "drawn": lambda: drawn("drawn", arguments.problems, console),
        "models": lambda: models(arguments.seconds, arguments.seeds, arguments.limit, console, arguments.only),
    }
    took = {}
    for part in (part for part in PARTS if part in arguments.parts):
        began = time.perf_counter()
        record[part] = parts[part]()
        took[part] = round(time.perf_counter() - began, 1)
    record["wall_seconds"] = took
    print(f"seconds for each part: {took}", file=sys.stderr)
    if arguments.output is not None:
        save_record(_finite(record), arguments.output)


def _finite(value):
    """JSON has no infinity: null stands for "none found"."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
