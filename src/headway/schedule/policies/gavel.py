"""Gavel's heterogeneity-aware max-min fairness (Narayanan et al., OSDI 2020, section 4.1), solved by HiGHS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy

from headway.errors import MissingExtraError, RunError
from headway.schedule.job import Job
from headway.schedule.policies.fairness import RoundPolicy
from headway.schedule.policies.ordering import View

__all__ = ["Gavel", "fair_time"]


class Gavel(RoundPolicy):
    """Maximises the smallest throughput / (weight x throughput with an equal share), jobs being faster on some kinds.

    Carried out in rounds. The program is solved again when jobs come or end. Needs highspy (extra `solve`).
    """

    name = "gavel"

    def __init__(self, quantum_seconds: float = 360.0) -> None:
        super().__init__(quantum_seconds)
        self._solved: tuple[tuple[int, ...], dict[int, dict[str, float]]] | None = None

    def shares(self, view: View) -> dict[int, dict[str, float]]:
        """Of the program, kept until other jobs are there."""
        numbers = tuple(entry.number for entry in view.entries)
        if self._solved is None or self._solved[0] != numbers:
            parts = fair_time([entry.job for entry in view.entries], view.fleet.devices_by_kind)
            self._solved = (numbers, dict(zip(numbers, parts, strict=True)))
        return self._solved[1]


def fair_time(jobs: Sequence[Job], devices: Mapping[str, int]) -> list[dict[str, float]]:
    """For each job, kind of device to the part of the time that it should run there.

    `devices`: how many there are of each kind. Variables are x[job, kind] and the level L; maximise L subject to
    sum over kinds of x <= 1 for each job, sum over jobs of devices x x <= devices for each kind, and
    throughput(job, x) x gang / (weight x throughput(job, equal)) >= L. A second program holds L and gives what is left
    where it brings most. Raises MissingExtraError without highspy, RunError if the solver fails.
    """
    if not jobs:
        return []
    kinds = list(devices)
    total = sum(devices.values())
    count, width = len(jobs), len(kinds)
    allowed = numpy.array(
        [
            [(not job.kinds or kind in job.kinds) and devices[kind] >= job.devices for kind in kinds]
            for job in jobs
        ]
    )  # fmt: skip
    speed = numpy.array([[job.throughputs.get(kind, 1.0) for kind in kinds] for job in jobs])
    equal = speed @ numpy.array([devices[kind] / total for kind in kinds])
    gain = speed / equal[:, None] * allowed
    fair = numpy.array([[job.devices / job.weight] for job in jobs])

    # Each job has its time once, each kind its devices, each job its level: row by row, what is not 0.
    columns = numpy.arange(count * width).reshape(count, width)
    sizes = numpy.array([float(job.devices) for job in jobs])
    level_value = gain * fair
    index = numpy.concatenate(
        [
            columns.reshape(-1),
            columns.T.reshape(-1),
            numpy.pad(columns, ((0, 0), (0, 1)), constant_values=count * width).reshape(-1),
        ]
    )
    value = numpy.concatenate(
        [
            numpy.ones(count * width),
            numpy.tile(sizes, width),
            numpy.pad(level_value, ((0, 0), (0, 1)), constant_values=-1.0).reshape(-1),
        ]
    )
    row = numpy.concatenate(
        [
            numpy.repeat(numpy.arange(count), width),
            count + numpy.repeat(numpy.arange(width), count),
            count + width + numpy.repeat(numpy.arange(count), width + 1),
        ]
    )
    lower = numpy.concatenate([numpy.full(count + width, -numpy.inf), numpy.zeros(count)])
    upper = numpy.concatenate(
        [numpy.ones(count), [float(devices[kind]) for kind in kinds], numpy.full(count, numpy.inf)]
    )
    rows = _Rows(row[value != 0], index[value != 0], value[value != 0], lower, upper)
    bounds = numpy.concatenate([allowed.reshape(-1).astype(float), [numpy.inf]])
    cost = numpy.zeros(count * width + 1)
    cost[-1] = 1.0
    level = _maximise(cost, numpy.zeros(count * width + 1), bounds, rows)[-1]
    cost = numpy.concatenate([(gain * fair).reshape(-1), [0.0]])
    floor = numpy.zeros(count * width + 1)
    floor[-1] = level * (1 - 1e-7)
    found = _maximise(cost, floor, bounds, rows)
    parts = found[:-1].reshape(count, width)
    # Rounded, so that jobs that are alike get equal parts: the slack of the second program would order them at will.
    return [{kind: round(float(part), 5) for kind, part in zip(kinds, row, strict=True)} for row in parts]


class _Rows(NamedTuple):
    """A matrix by its entries, sorted by row, with the bounds of its rows."""

    row: numpy.ndarray
    column: numpy.ndarray
    value: numpy.ndarray
    lower: numpy.ndarray
    upper: numpy.ndarray


def _maximise(cost: numpy.ndarray, least: numpy.ndarray, most: numpy.ndarray, rows: _Rows) -> numpy.ndarray:
    try:
        import highspy
    except ImportError:
        raise MissingExtraError(library="highspy", extra="solve") from None
    program = highspy.HighsLp()
    program.num_col_, program.num_row_ = len(cost), len(rows.lower)
    program.sense_ = highspy.ObjSense.kMaximize
    program.col_cost_, program.col_lower_, program.col_upper_ = cost, least, most
    program.row_lower_, program.row_upper_ = rows.lower, rows.upper
    program.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    program.a_matrix_.start_ = numpy.searchsorted(rows.row, numpy.arange(len(rows.lower) + 1))
    program.a_matrix_.index_ = rows.column
    program.a_matrix_.value_ = rows.value
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    solver.passModel(program)
    solver.run()
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        raise RunError(f"HiGHS says {solver.getModelStatus()}", place="fair shares")
    return numpy.array(solver.getSolution().col_value)
