"""How well are times predicted that were left out of a profile? Sizes, a whole mesh, a dtype, a device.

    python bench/learned.py                     about a minute; results in bench/results/learned.json
    python bench/learned.py --data FOLDER       where alpa_prof_database.csv and vtrain_allreduce_lut.csv are

Each split takes some measurements away, gives the rest to each way of timing, and asks for what was taken. Nothing is
drawn at random. Errors are relative to the measured time; `coverage` counts how many measured times lie within the
bounds, which are meant to hold nine times out of ten. "Small": below 64 KiB.

A time is *contradicted* if the profile has the same collective, size and topology on other meshes, and their median is
more than 15 % away from it: nobody who is told those can be right about this one. The worst error is reported with all
rows, and with contradicted ones left out; the largest are listed with what was measured around them.
"""

import argparse
import itertools
import math
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from headway.errors import InputError
from headway.hardware.catalog import preset
from headway.predict.alpa import read_measurements
from headway.predict.database import Group, Measurement
from headway.predict.learned import Learned, topology
from headway.predict.timing import Catalogued, Interpolated, Linear, Timing, for_cluster
from record import new_record, save_record

HERE = Path(__file__).parent
DATA = HERE.parent.parent / "shared" / "data" / "planning"
SMALL_BYTES = 64 * 1024
CONTRADICTED = 0.15
LISTED = 12

Taken = Callable[[int, int, Measurement], bool]  # place among its key's sizes, how many there are, the measurement

SIZES: list[tuple[str, Taken]] = [
    ("every 4th size of each key", lambda at, count, row: at % 4 == 2),
    ("every 3rd size of each key", lambda at, count, row: at % 3 == 1),
    ("every 2nd size of each key", lambda at, count, row: at % 2 == 1),
    ("every 4th size, of all keys and dtypes", lambda at, count, row: round(np.log2(row.size)) % 4 == 2),
    ("the 2 largest sizes", lambda at, count, row: at >= count - 2),
    ("the 4 largest sizes", lambda at, count, row: at >= count - 4),
]
MESHES: list[tuple[str, Taken]] = [
    ("mesh 4x8 from smaller ones", lambda at, count, row: row.nodes == 4),
    ("mesh 2x8 from all others", lambda at, count, row: row.nodes == 2),
    ("float16 from float32", lambda at, count, row: row.dtype == "float16"),
    ("float32 from float16", lambda at, count, row: row.dtype == "float32"),
]


def ask(way: Timing, row: Measurement):
    if row.unit == "flop":
        return way.operator(row.operation, row.dtype, flop=row.size)
    return way.collective(
        row.operation,
        row.size,
        mesh=(row.nodes, row.devices_per_node),
        group_size=row.group_size,
        groups=row.groups,
        stride=row.stride,
        dtype=row.dtype,
    )


class Repeats:
    """The same collective on other meshes of one profile: same topology and bytes, in the same dtype if any."""

    def __init__(self, rows: Sequence[Measurement]) -> None:
        self.rows: dict[tuple, list[Measurement]] = defaultdict(list)
        self.curves: dict[Group, list[Measurement]] = defaultdict(list)
        for row in rows:
            self.rows[topology(row.group), row.size].append(row)
            self.curves[row.group].append(row)
        for curve in self.curves.values():
            curve.sort(key=lambda row: row.size)

    def of(self, row: Measurement) -> list[float]:
        """Seconds of the others."""
        others = [other for other in self.rows[topology(row.group), row.size] if other.group != row.group]
        alike = [other for other in others if other.dtype == row.dtype]
        return [other.seconds for other in alike or others if other.seconds is not None]

    def contradict(self, row: Measurement) -> bool:
        """Whether their median is far from this one."""
        others = self.of(row)
        return bool(others) and abs(statistics.median(others) / seconds_of(row) - 1) > CONTRADICTED

    def beside(self, row: Measurement) -> list[tuple[float, float]]:
        """(bytes, seconds) of the sizes before and after it in its own group, and its own."""
        curve = self.curves[row.group]
        at = curve.index(row)
        return [(one.size, seconds_of(one)) for one in curve[max(0, at - 2) : at + 3]]


def seconds_of(row: Measurement) -> float:
    assert row.seconds is not None
    return row.seconds


def largest(way: Timing, rows: Sequence[Measurement], repeats: Repeats) -> list[dict]:
    """The rows with the largest errors, each with its neighbours and repetitions."""
    found = [(ask(way, row).seconds / seconds_of(row) - 1, row) for row in rows]
    found.sort(key=lambda one: -abs(one[0]))
    return [
        {
            "error": error,
            "collective": f"{row.operation} {row.dtype} of {row.size:.0f} B, {row.nodes}x{row.devices_per_node}, "
            f"groups of {row.group_size}, stride {row.stride}",
            "seconds": row.seconds,
            "sizes beside it": repeats.beside(row),
            "the same on other meshes": repeats.of(row),
            "contradicted": repeats.contradict(row),
        }
        for error, row in found[:LISTED]
    ]  # fmt: skip


def judged(
    method: str,
    split: str,
    way: Timing,
    rows: Sequence[Measurement],
    fit_seconds: float,
    repeats: Repeats | None = None,
) -> dict | None:
    """One line of the table; None if this way of timing cannot answer for these rows."""
    errors, inside, small = [], [], []
    for row in rows:
        try:
            estimate = ask(way, row)
        except InputError:
            return None
        errors.append(abs(estimate.seconds / seconds_of(row) - 1))
        inside.append(estimate.low_seconds <= seconds_of(row) <= estimate.high_seconds)
        small.append(row.unit == "bytes" and row.size < SMALL_BYTES)
    found, few = np.array(errors), np.array(errors)[np.array(small)]
    alone = np.array([repeats is not None and repeats.contradict(row) for row in rows])
    agreed = found[~alone]
    return {
        "split": split,
        "method": method,
        "rows": len(rows),
        "mean": float(found.mean()),
        "median": float(np.median(found)),
        "worst": float(found.max()),
        "above_15_percent": float(np.mean(found > 0.15)),
        "rows_above_15_percent": int(np.sum(found > 0.15)),
        "contradicted": int(alone.sum()),
        "worst_uncontradicted": float(agreed.max()) if len(agreed) else None,
        "rows_above_15_percent_uncontradicted": int(np.sum(agreed > 0.15)),
        "mean_small": float(few.mean()) if len(few) else None,
        "worst_small": float(few.max()) if len(few) else None,
        "coverage": float(np.mean(inside)),
        "fit_seconds": fit_seconds,
    }


def divided(rows: Sequence[Measurement], taken: Taken) -> tuple[list[Measurement], list[Measurement]]:
    keys = defaultdict(list)
    for row in rows:
        keys[row.group if row.unit == "bytes" else (row.operation, row.dtype)].append(row)
    kept, left = [], []
    for found in keys.values():
        found.sort(key=lambda row: row.size)
        for at, row in enumerate(found):
            (left if taken(at, len(found), row) else kept).append(row)
    return kept, left


def compared(
    split: str, kept: list[Measurement], left: list[Measurement], repeats: Repeats | None = None
) -> list[dict]:
    ways = {"linear": Linear, "interpolated": Interpolated, "learned": Learned}
    lines = []
    for name, way in ways.items():
        start = time.process_time()
        fitted = way(kept)
        line = judged(name, split, fitted, left, time.process_time() - start, repeats)
        if line is not None and name == "learned" and repeats is not None:
            line["largest"] = largest(fitted, left, repeats)
        lines.append(line)
    return [line for line in lines if line is not None]


def repeated(rows: Sequence[Measurement]) -> dict:
    """How far two measurements of the same thing differ: one topology, dtype and size, on different meshes."""
    times = defaultdict(list)
    for row in rows:
        times[topology(row.group), row.dtype, row.size].append(row.seconds)
    differences = np.array([abs(b / a - 1) for found in times.values() for a, b in itertools.permutations(found, 2)])
    return {
        "pairs": len(differences),
        "mean": float(differences.mean()),
        "median": float(np.median(differences)),
        "worst": float(differences.max()),
        "above_15_percent": float(np.mean(differences > 0.15)),
    }


def monotone_bound(kept: Sequence[Measurement], left: Sequence[Measurement]) -> dict:
    """What no law can undercut that answers known sizes as measured and never lets a larger message take less time.

    Such a law answers between the slowest smaller and the fastest larger size that are known; where a time that was
    left out lies outside of that, the law is off by the distance at least.
    """
    curves = defaultdict(list)
    for row in kept:
        curves[row.group].append(row)
    least = []
    for row in left:
        slowest = max((seconds_of(one) for one in curves[row.group] if one.size < row.size), default=0.0)
        fastest = min((seconds_of(one) for one in curves[row.group] if one.size > row.size), default=math.inf)
        least.append(max(slowest / seconds_of(row) - 1, 1 - fastest / seconds_of(row), 0.0))
    return {"worst": max(least), "rows_above_15_percent": sum(one > 0.15 for one in least)}


def other_devices(rows: list[Measurement]) -> list[dict]:
    """All-reduces within one node, of one device from the other's, scaled."""
    machines = {"A100-SXM-80GB": preset("dgx-a100"), "V100-SXM2-16GB": preset("dgx-1v")}
    lines = []
    for source, target in itertools.permutations(machines):
        kept = [row for row in rows if row.device == source]
        left = [row for row in rows if row.device == target][::7]
        split = f"{target} from {source}"
        for name, way in (("interpolated", Interpolated(kept)), ("learned", Learned(kept[::16], bounds=False))):
            scaled = for_cluster(way, machines[target], scale=True, origin=machines[source])
            lines.append(judged(f"{name}, scaled", split, scaled, left, 0.0))
        lines.append(judged("catalogue", split, Catalogued(machines[target]), left, 0.0))
    return [line for line in lines if line is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "learned.json")
    arguments = parser.parse_args()
    record = new_record(0, python=platform.python_version(), numpy=np.__version__)
    console = Console(width=100 if not sys.stdout.isatty() else None, highlight=False)
    alpa = [
        row
        for row in read_measurements(arguments.data / "alpa_prof_database.csv", device="V100-SXM2-16GB")
        if row.seconds is not None and row.size > 0
    ]
    collectives = [row for row in alpa if row.unit == "bytes"]
    products = [row for row in alpa if row.unit == "flop"]
    repeats = Repeats(collectives)
    lines, bounds = [], {}
    for split, taken in (*SIZES, *MESHES):
        kept, left = divided(collectives, taken)
        if (split, taken) in SIZES:
            bounds[split] = monotone_bound(kept, left)
        lines += compared(split, kept, left, repeats)
        if split.startswith("mesh 4x8"):
            # Most groups of a large mesh exist on smaller ones too. These do not.
            new = [row for row in left if row.group.spans > 2]
            lines += compared("mesh 4x8, groups over 4 nodes only", kept, new, repeats)
    for split, taken in (SIZES[0], SIZES[4], *MESHES[2:]):
        kept, left = divided(products, taken)
        lines += compared(f"products: {split}", kept, left)
    lines += other_devices(read_measurements(arguments.data / "vtrain_allreduce_lut.csv"))
    table = Table(box=SIMPLE_HEAD, title="Relative error of what was left out", title_justify="left")
    for column in (
        "left out",
        "method",
        "rows",
        "mean",
        "median",
        "worst",
        "> 15 %",
        "uncontradicted: worst",
        "> 15 %",
        "small: mean",
        "worst",
        "coverage",
    ):
        table.add_column(column, justify="left" if column in ("left out", "method") else "right")
    for line in lines:
        shares = ("mean", "median", "worst", "", "worst_uncontradicted", "", "mean_small", "worst_small", "coverage")
        counts = iter(("rows_above_15_percent", "rows_above_15_percent_uncontradicted"))
        cells = [
            (("" if line[name] is None else f"{line[name]:.1%}") if name else str(line[next(counts)]))
            for name in shares
        ]
        table.add_row(line["split"], line["method"], str(line["rows"]), *cells)
    console.print(table)
    for line in lines:
        if "largest" in line and line["split"] == SIZES[0][0]:
            console.print(
                f"The largest errors of {line['split']}, learned (microseconds; * the time that was left out):"
            )
            for one in line["largest"]:
                beside = " ".join(
                    f"{seconds * 1e6:.0f}" + ("*" if seconds == one["seconds"] else "")
                    for _, seconds in one["sizes beside it"]
                )
                others = " ".join(f"{seconds * 1e6:.0f}" for seconds in one["the same on other meshes"]) or "none"
                console.print(f"  {one['error']:+.0%} {one['collective']}: {beside}; on other meshes: {others}")
    for split, bound in bounds.items():
        console.print(
            f"{split}: any law that keeps to known times and lets no larger message take less is off by up to "
            f"{bound['worst']:.0%}, by more than 15 % on {bound['rows_above_15_percent']} rows"
        )
    noise = repeated(collectives)
    console.print(
        f"The same collective, size and dtype on different meshes of the same profile: {noise['pairs']} pairs, "
        f"mean difference {noise['mean']:.1%}, median {noise['median']:.1%}, worst {noise['worst']:.0%}, "
        f"{noise['above_15_percent']:.1%} above 15 %"
    )
    save_record(record | {"lines": lines, "monotone_bounds": bounds, "repeated_measurements": noise}, arguments.output)


if __name__ == "__main__":
    main()
