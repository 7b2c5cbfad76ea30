"""From columns and rows to what HiGHS takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["Row", "model_of", "new_solver"]

Row = tuple[float, float, Sequence[tuple[int, float]]]
"""Least and greatest value of a sum of (column, factor); a column may come several times."""


def model_of(
    highspy: Any,
    costs: Sequence[float],
    lower: Sequence[float],
    upper: Sequence[float],
    rows: Sequence[Row],
    whole: Sequence[bool],
) -> Any:
    """The program that minimises the sum of costs; `lower`, `upper` and `whole` (a whole number) are of each column."""
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = len(costs), len(rows)
    model.col_cost_, model.col_lower_, model.col_upper_ = list(costs), list(lower), list(upper)
    model.row_lower_ = [least for least, _, _ in rows]
    model.row_upper_ = [most for _, most, _ in rows]
    matrix = model.a_matrix_
    matrix.format_ = highspy.MatrixFormat.kRowwise
    starts, columns, values = [0], [], []
    for _, _, terms in rows:
        summed: dict[int, float] = {}
        for column, value in terms:
            summed[column] = summed.get(column, 0.0) + value
        columns.extend(summed)
        values.extend(summed.values())
        starts.append(len(columns))
    matrix.start_, matrix.index_, matrix.value_ = starts, columns, values
    kinds = highspy.HighsVarType
    model.integrality_ = [kinds.kInteger if each else kinds.kContinuous for each in whole]
    return model


def new_solver(highspy: Any, seconds: float) -> Any:
    """HiGHS, silent, in one thread, for so many seconds at most."""
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    solver.setOptionValue("time_limit", float(seconds))
    return solver
