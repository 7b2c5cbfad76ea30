"""What a table of published plans allows: how well any smooth law could order its plans, and what its times are.

Used by `bench/prediction.py`. A *smooth law* is Headway's prediction times exp(q), q linear or quadratic in the
logarithms of the degrees, the micro-batch and the number of micro-batches, with coefficients of its own for each width
of model. It is fitted here to the very times that are to be predicted, held-out rows included, which no prediction may
do: it shows what is left when everything that varies smoothly is right. "Each cell left out": a row is foretold by a
law that has not seen the rows of its tensor degree and micro-batch. "One factor for each cell": a free factor for each
width, tensor degree and micro-batch, as if each had its own measurement.
"""

from __future__ import annotations

import csv
import itertools
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from headway.predict.published import PublishedRow
from headway.predict.validation import Predicted, Validation, is_fitted, validate

__all__ = ["LARGE", "composition", "order_of_pairs", "smooth_laws"]

LARGE = 40  # rows of one width and source that a smooth law is fitted to
SAME = 0.03  # two measurements that differ by less are in no order (SOURCE.txt: noise across laboratories)


def _family(row: PublishedRow) -> tuple[str, int]:
    return row.source.split("[")[0].split(":")[0][:40], row.shape.hidden


def _cell(row: PublishedRow) -> tuple[int, int, int]:
    return row.shape.hidden, row.plan.tensor, row.plan.micro_batch


def _columns(rows: Sequence[PublishedRow], quadratic: bool) -> np.ndarray:
    logs = np.log2([[row.plan.tensor, row.plan.pipeline, row.plan.micro_batch, row.plan.micro_batches] for row in rows])
    columns = [np.ones(len(rows)), *logs.T]
    if quadratic:
        columns += [logs[:, at] * logs[:, other] for at in range(4) for other in range(at, 4)]
    return np.stack(columns, axis=1)


def _fitted(columns: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return np.linalg.lstsq(columns, wanted, rcond=None)[0]


def smooth_laws(rows: Sequence[PublishedRow], predicted: Sequence[float]) -> list[dict]:
    """Errors, regret and rank correlation of held-out rows under laws fitted to all rows of large families."""
    families: dict[tuple, list[int]] = defaultdict(list)
    for at, row in enumerate(rows):
        if row.step_seconds and row.plan.schedule != "interleaved":
            families[_family(row)].append(at)
    large = [members for members in families.values() if len(members) >= LARGE and _is_search(rows, members)]
    if not large:
        return []
    chosen = [rows[at] for members in large for at in members]
    base = np.array([predicted[at] for members in large for at in members])
    wanted = np.log(np.array([row.step_seconds for row in chosen], dtype=float) / base)
    spans = [slice(stop - len(members), stop) for members, stop in zip(large, itertools.accumulate(map(len, large)))]
    found = [_figures("Headway", chosen, base)]
    for name, quadratic in (("linear", False), ("quadratic", True)):
        whole, out = np.zeros(len(chosen)), np.zeros(len(chosen))
        for span in spans:
            columns, target = _columns(chosen[span], quadratic), wanted[span]
            whole[span] = columns @ _fitted(columns, target)
            cells = np.array([hash(_cell(row)) for row in chosen[span]])
            for cell in np.unique(cells):
                here = cells == cell
                out[span][here] = columns[here] @ _fitted(columns[~here], target[~here])
        found.append(_figures(f"{name} law, fitted to the answers", chosen, base * np.exp(whole)))
        found.append(_figures(f"{name} law, each cell left out", chosen, base * np.exp(out)))
    cells = defaultdict(list)
    for row, value in zip(chosen, wanted, strict=True):
        cells[_cell(row)].append(float(value))
    factor = np.array([statistics.fmean(cells[_cell(row)]) for row in chosen])
    found.append(_figures("one factor for each cell", chosen, base * np.exp(factor)))
    return found


def _is_search(rows: Sequence[PublishedRow], members: Sequence[int]) -> bool:
    """Whether these rows vary tensor degree and micro-batch: a search, not runs of one plan."""
    return len({_cell(rows[at]) for at in members}) >= 8


def _figures(name: str, rows: Sequence[PublishedRow], seconds: np.ndarray) -> dict:
    known = {id(row): float(value) for row, value in zip(rows, seconds, strict=True)}
    validation = validate(rows, lambda row: Predicted(known[id(row)]))
    held = validation.errors("step", "all", False)
    return {
        "law": name,
        "held out rows": held[0].rows if held else 0,
        "step": held[0].mean if held else None,
        "regret": validation.mean_regret(False),
        "rank": validation.mean_rank_correlation(False),
    }


def order_of_pairs(rows: Sequence[PublishedRow], validation: Validation) -> dict:
    """Of pairs of held-out plans of one job whose measured times differ by more than `SAME`: the share in right order.

    Each pair counts once, so large groups weigh most. `chance`: pairs that differ by less, in no order.
    """
    jobs: dict[tuple, list[tuple[float, float]]] = defaultdict(list)
    for row, found in zip(rows, validation.rows, strict=True):
        if not is_fitted(row) and row.step_seconds and found.predicted_seconds:
            plan, shape = row.plan, row.shape
            key = (shape.layers, shape.hidden, shape.sequence, row.hardware, len(plan.devices), plan.global_batch,
                   plan.precision, row.workload.recipe, _family(row))  # fmt: skip
            jobs[key].append((row.step_seconds, found.predicted_seconds))
    right = wrong = same = 0
    for plans in jobs.values():
        for (measured, one), (other_measured, other) in itertools.combinations(plans, 2):
            if abs(measured / other_measured - 1) <= SAME:
                same += 1
            elif (measured < other_measured) == (one < other):
                right += 1
            else:
                wrong += 1
    total = right + wrong
    return {"pairs": total, "right": right / total if total else None, "within 3 %": same}


def composition(rows: Sequence[PublishedRow], all_reduces: Path) -> dict:
    """Whether times of a table are sums of parts: m micro-batches of equal length, and a look-up in `all_reduces`.

    Rows without pipeline that differ by the number of micro-batches alone should, if measured, scatter about a straight
    line as measurements do. And where only the data degree differs, the time of an all-reduce is what differs: it is
    compared with what vTrain's published simulator would add (MICRO 2024, its repository's `compute_comm_time`): the
    entry of its table of all-reduces at the size of all parameters in whole MiB, counting the tied embedding twice, and
    beyond the table the size over the bus bandwidth of the largest entry, whatever the number of members.
    """
    lines: dict[tuple, list[tuple[int, float]]] = defaultdict(list)
    by_data: dict[tuple, dict[int, float]] = defaultdict(dict)
    for row in rows:
        plan, shape = row.plan, row.shape
        if plan.pipeline == 1 and row.step_seconds:
            key = (shape.hidden, shape.layers, plan.tensor, plan.micro_batch)
            lines[*key, plan.data].append((plan.micro_batches, row.step_seconds))
            by_data[*key, plan.micro_batches][plan.data] = row.step_seconds
    deviations = []
    for points in lines.values():
        if len(points) >= 3:
            count, seconds = np.array(points, dtype=float).T
            columns = np.stack([count, np.ones(len(count))], axis=1)
            deviations += list(np.abs(columns @ _fitted(columns, seconds) / seconds - 1))
    found: dict = {
        "rows on straight lines": len(deviations),
        "largest distance from them": float(max(deviations)) if deviations else None,
    }
    found |= _layer_rates(rows) | _shrinking(lines)
    if not all_reduces.exists():
        return found
    table: dict[int, dict[int, tuple[float, float]]] = defaultdict(dict)
    with all_reduces.open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["gpu"] == "a100":
                entry = float(line["ip_time_us"]) * 1e-6, float(line["ip_busbw_gbs"])
                table[int(line["n_gpus"])][int(line["bytes"]) // 2**20] = entry
    differences = []
    for (hidden, layers, tensor, *_), seconds in by_data.items():
        size = round(2 * _simulated_parameters(hidden, layers, tensor) / 2**20)
        for one, other in itertools.combinations(sorted(seconds), 2):
            expected = _looked_up(table, size, other) - _looked_up(table, size, one)
            differences.append((abs(seconds[other] - seconds[one] - expected), abs(expected)))
    return found | {
        "pairs that differ by the data degree alone": len(differences),
        "all-reduce expected in them, mean seconds": statistics.fmean(expected for _, expected in differences),
        "distance from it, mean seconds": statistics.fmean(distance for distance, _ in differences),
        "distance from it, worst seconds": max(distance for distance, _ in differences),
    }


def _shrinking(lines: Mapping[tuple, Sequence[tuple[int, float]]]) -> dict:
    """How often a micro-batch of twice the samples takes less time, and the least of its time over that of the smaller.

    A micro-batch's time is the slope of a line (hidden, layers, tensor, micro-batch, data); lines that differ by the
    data degree alone have one. No law by which more samples take no less time has these in order.
    """
    slopes = {}
    for (*key, _), points in lines.items():
        if len(points) >= 2:
            count, seconds = np.array(points, dtype=float).T
            slopes[tuple(key)] = float(_fitted(np.stack([count, np.ones(len(count))], axis=1), seconds)[0])
    ratios = [
        slopes[hidden, layers, tensor, 2 * size] / slope
        for (hidden, layers, tensor, size), slope in slopes.items()
        if (hidden, layers, tensor, 2 * size) in slopes
    ]
    return {
        "micro-batches compared with half the samples": len(ratios),
        "of them faster than the half": sum(ratio < 1 for ratio in ratios),
        "least time over that of the half": min(ratios),
    }


def _layer_rates(rows: Sequence[PublishedRow]) -> dict:
    """FLOP per second in the layers of the widest model, if they run forward twice for each pass backward, or once.

    A micro-batch more costs the last stage's layers and the head; half of the layers less tells them apart. Without
    tensor parallelism, of the micro-batch that reaches most.
    """
    widest = max(row.shape.hidden for row in rows)
    times: dict[tuple, list[tuple[int, float]]] = defaultdict(list)
    shapes = {}
    for row in rows:
        plan = row.plan
        if row.shape.hidden == widest and plan.tensor == 1 and plan.pipeline <= 2 and row.step_seconds:
            key = (row.shape.layers, plan.micro_batch)
            shapes[key] = row.shape
            times[*key, plan.pipeline, plan.data].append((plan.micro_batches, row.step_seconds))
    slopes: dict[tuple, float] = {}
    for (layers, micro_batch, pipeline, _), points in times.items():
        (few, short), (many, long) = min(points), max(points)
        if many > few:
            slopes[layers, micro_batch, pipeline] = (long - short) / (many - few)
    best = 0.0
    for (layers, micro_batch, pipeline), whole in slopes.items():
        half = slopes.get((layers, micro_batch, 2))
        if pipeline == 1 and half:
            shape = shapes[layers, micro_batch]
            forward = (24 * widest**2 + 4 * shape.sequence * widest) * shape.sequence * micro_batch
            best = max(best, forward / ((whole - half) / (layers / 2)))
    return {
        "TFLOP/s in layers, if forward runs twice": 4 * best / 1e12,
        "TFLOP/s in layers, if forward runs once": 3 * best / 1e12,
    } if best else {}  # fmt: skip


def _simulated_parameters(hidden: int, layers: int, tensor: int) -> float:
    h, vocabulary, positions = hidden, 50257, 1024
    layer = 4 * h + (3 * h * h + 3 * h + h * h + 4 * h * h + 4 * h + 4 * h * h) // tensor + 2 * h
    return 2 * (vocabulary // tensor) * h + positions * h + layers * layer


def _looked_up(table: dict[int, dict[int, tuple[float, float]]], mebibytes: int, members: int) -> float:
    if members == 1:
        return 0.0
    known = table[members]
    largest = max(known)
    return known[mebibytes][0] if mebibytes in known else mebibytes / (known[largest][1] * 1024)
