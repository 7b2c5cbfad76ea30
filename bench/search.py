"""Which search finds how good a plan in which time, and does the gradient help?

    python bench/search.py --parts enumerable                     a minute
    python bench/search.py --output bench/results/search.json     everything, some ten minutes of one core

Three parts. "enumerable": drawn stage problems small enough to try everything, and "drawn": larger ones, which the
exact programme solves, both at equal numbers of evaluations. "models": GPT-3 175B, Llama 3.1 405B, Mixtral 8x7B and a
wide ResNet on 64 to 16,384 devices of one kind and of two, at equal time.

Random search takes every proposal that is a solution; hill climbing only what is no worse; all three walks have the
same proposals and the same beginnings. "gradient" is descent and rounding alone, "gradient + proposals" spends half of
its evaluations on hill climbing from what it rounded. An iteration counts as one evaluation of each candidate. Time is
that of the processor: each method is run once to learn what an evaluation costs it, then with as many as the time
allows, so that a busy machine changes little. The exact programme runs to the end, within its own limit. "best" is the
least that any method found.
"""

import argparse
import datetime
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

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
from headway.search.problem import Assignment, StageProblem, brute_force
from headway.search.synthetic import synthetic_problem
from headway.search.tables import stage_problem
from headway.value import write_atomically
from headway.workload.graph import Graph, Recipe, Workload
from headway.workload.trace import trace
from headway.workload.transformer import TransformerShape, transformer
from headway.workload.zoo.vision import ResNet

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

PARTS = ["enumerable", "drawn", "models"]
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
)


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
    table = Table(box=SIMPLE_HEAD, title=f"{len(known)} drawn problems, {how}", title_justify="left")
    table.add_column("method")
    for column in ("evaluations", "optimal", "within 2 %", "mean gap", "worst gap", "nothing"):
        table.add_column(column, justify="right")
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
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("method")
    for column in ("step", "over best", "worst seed", "evaluations", "CPU s", "within 1 % at"):
        table.add_column(column, justify="right")
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
    parser.add_argument("--problems", type=int, default=10, help="drawn problems of each size")
    parser.add_argument("--seconds", type=float, default=5.0, help="CPU-seconds for each method and model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which the exact programme stops")
    parser.add_argument("--only", default="", help="cases of models and machines that contain this text")
    parser.add_argument("--output", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # CPU-seconds of one core
    console = Console(width=100 if not sys.stdout.isatty() else None, highlight=False)
    record: dict = {
        "command": "python bench/search.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "hardware": {"processor": _processor(), "python": platform.python_version(), "torch": torch.__version__},
        "seed": f"0 to {arguments.problems - 1} for drawn problems, 0 to {arguments.seeds - 1} for searches",
        "cpu_seconds": arguments.seconds,
    }
    for part in ("enumerable", "drawn"):
        if part in arguments.parts:
            record[part] = drawn(part, arguments.problems, console)
    if "models" in arguments.parts:
        record["models"] = models(arguments.seconds, arguments.seeds, arguments.limit, console, arguments.only)
    if arguments.output is not None:
        text = json.dumps(_finite(record), indent=1, allow_nan=False)
        write_atomically(arguments.output, text + "\n")


def _finite(value):
    """JSON has no infinity: null stands for "none found"."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
