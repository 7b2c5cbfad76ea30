"""How well are step time and peak memory predicted on this machine? Really trains each (model, plan) pair.

    python bench/prediction_local.py            every pair, a few minutes; results in bench/results/
    python bench/prediction_local.py --only gpt

For each pair the plan is fixed, predicted, carried out by real processes, and measured: median step time after warm-up,
and the peak memory of every rank above what it used before the model was built. Run it on an otherwise idle machine.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from headway.errors import HeadwayError
from headway.search.find import Constraints
from headway.train.run import RunResult, compare, run
from headway.units import format_bytes, format_seconds
from record import new_record, save_record

HERE = Path(__file__).parent

# Subject, devices, what is fixed about the plan.
PAIRS: list[tuple[str, int, dict]] = [
    ("mlp", 1, {}),
    ("mlp", 2, {"data": 2, "zero_stage": 0}),
    ("mlp", 2, {"data": 2, "zero_stage": 1}),
    ("mlp", 2, {"data": 2, "zero_stage": 3}),
    ("mlp", 2, {"tensor": 2}),
    ("cnn", 1, {}),
    ("cnn", 2, {"data": 2, "zero_stage": 0}),
    ("cnn", 2, {"data": 2, "zero_stage": 2}),
    ("cnn", 2, {"pipeline": 2, "schedule": "1f1b", "micro_batch": 8}),
    ("gpt", 1, {"recompute": "none"}),
    ("gpt", 1, {"recompute": "full"}),
    ("gpt", 2, {"data": 2, "zero_stage": 0}),
    ("gpt", 2, {"data": 2, "zero_stage": 1}),
    ("gpt", 2, {"data": 2, "zero_stage": 3}),
    ("gpt", 2, {"tensor": 2}),
    ("gpt", 2, {"pipeline": 2, "schedule": "gpipe", "micro_batch": 4}),
    ("gpt", 2, {"pipeline": 2, "schedule": "1f1b", "micro_batch": 4}),
    ("gpt", 4, {"data": 2, "tensor": 2, "zero_stage": 0}),
    ("gpt", 4, {"data": 2, "pipeline": 2, "schedule": "1f1b", "zero_stage": 0}),
    ("gpt", 4, {"tensor": 2, "pipeline": 2, "schedule": "1f1b"}),
]

# On a GPU: the sizes that it is made for, one device. GPT-2's sizes have 256 words here, so no head of 50,257.
PAIRS_ON_GPU: list[tuple[str, int, dict]] = [
    ("cnn", 1, {}),
    ("gpt-124m", 1, {"precision": "bfloat16"}),
    ("gpt-124m", 1, {"precision": "bfloat16", "recompute": "full"}),
    ("gpt-124m", 1, {"precision": "bfloat16", "micro_batch": 8}),
    ("gpt-355m", 1, {}),
    ("gpt-355m", 1, {"precision": "bfloat16"}),
    ("gpt-774m", 1, {"precision": "bfloat16"}),
    ("gpt-774m", 1, {"precision": "bfloat16", "recompute": "full"}),
]


class Quiet:
    """A watcher that shows only what a rank prints."""

    def stage(self, text: str) -> None: ...
    def traced(self, workload) -> None: ...
    def probed(self, cluster) -> None: ...
    def planned(self, plan, prediction, ranking) -> None: ...
    def event(self, event: dict) -> None: ...

    def output(self, rank: int, stream: str, line: str) -> None:
        print(f"[rank {rank}] {line}", file=sys.stderr)


def measure(subject: str, devices: int, fixed: dict, steps: int, root: Path) -> tuple[RunResult, list[dict]]:
    degrees = {name: fixed.get(name, 1) for name in ("data", "tensor", "pipeline")}
    constraints = Constraints(**{"recompute": "none", **fixed, **degrees})
    result = run(
        str(HERE / "subjects.py"),
        [subject, "--steps", str(steps)],
        watcher=Quiet(),
        devices=devices,
        constraints=constraints,
        root=root,
    )
    assert result.measured is not None
    return result, compare(result.prediction, result.measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="only this subject")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "prediction_local.json")
    arguments = parser.parse_args()
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    record = new_record(0, cores=torch.get_num_threads(), torch=torch.__version__, **gpu)
    console = Console(width=100 if not sys.stdout.isatty() else None, highlight=False)
    rows = []
    table = Table(box=SIMPLE_HEAD, title="Predicted and measured on this machine", title_justify="left")
    for column in ("subject", "plan", "step predicted", "measured", "error", "memory predicted", "measured", "error"):
        table.add_column(column, justify="left" if column in ("subject", "plan") else "right")
    with tempfile.TemporaryDirectory() as scratch:
        for subject, devices, fixed in PAIRS_ON_GPU if torch.cuda.is_available() else PAIRS:
            if arguments.only not in (None, subject):
                continue
            try:
                result, comparison = measure(subject, devices, fixed, arguments.steps, Path(scratch))
            except HeadwayError as error:
                print(f"{subject} {fixed}: {error}", file=sys.stderr)
                rows.append({"subject": subject, "fixed": fixed, "failed": str(error)})
                continue
            step = comparison[0]
            memory = max((row for row in comparison if row["unit"] == "bytes"), key=lambda row: row["measured"])
            rows.append(
                {"subject": subject, "devices": devices, "plan": result.plan.describe(), "comparison": comparison}
            )
            cells = [subject, result.plan.describe()]
            for row, form in ((step, format_seconds), (memory, format_bytes)):
                cells += [form(row["predicted"]), form(row["measured"]), f"{row['error']:+.1%}"]
            table.add_row(*cells)
            print(" | ".join(cells), file=sys.stderr)
    console.print(table)
    done = [row["comparison"] for row in rows if "comparison" in row]
    summary = {
        "pairs": len(done),
        "failed": len(rows) - len(done),
        "median step-time error": statistics.median(abs(rows_[0]["error"]) for rows_ in done),
        "median memory error": statistics.median(
            abs(row["error"]) for rows_ in done for row in rows_ if row["unit"] == "bytes"
        ),
    }
    console.print(
        f"{summary['pairs']} pairs ({summary['failed']} failed): median error of step time "
        f"{summary['median step-time error']:.1%}, of peak memory of a rank {summary['median memory error']:.1%}"
    )
    save_record(record | {"summary": summary, "rows": rows}, arguments.output)
    if summary["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
