"""The table of policies and budgets that `headway simulate memory` prints, and the budgets that it is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from headway.errors import InputError
from headway.memory.swapping.planning import Row
from headway.report.terminal import new_table
from headway.units import format_bytes, parse_bytes

__all__ = ["parse_budgets", "swapping_table"]


def parse_budgets(text: str) -> list[float]:
    """Budgets separated by commas: shares of the peak in (0, 1], or more than one byte (`8GB`).

    Raises InputError for what is neither.
    """
    found: list[float] = []
    for part in (part.strip() for part in text.split(",")):
        try:
            value = float(part)
        except ValueError:
            value = float(parse_bytes(part))
        if not 0 < value < float("inf"):
            raise InputError(f"no budget: {part!r}", place="--budgets", remedy="shares as in 1,0.5 or bytes as in 8GB")
        found.append(value)
    return found


def swapping_table(model: str, samples: int, accelerator: str, rows: Sequence[Row]) -> Table:
    """A line for each policy, a column for each budget: how much longer a step takes than one that keeps everything.

    A dash: the policy does not get below that budget. For `optimal` the bound below every policy follows.
    """
    budgets = list(dict.fromkeys((row.budget_bytes, row.budget_share) for row in rows))
    table = new_table(
        f"One step of {model} with {samples} samples on one {accelerator}: overhead within a budget for activations",
        "policy", *(f"{format_bytes(size)} ({share:.0%})" for size, share in budgets),
        right=tuple(range(1, len(budgets) + 1)),
    )  # fmt: skip
    for policy in dict.fromkeys(row.policy for row in rows):
        of = {row.budget_bytes: row for row in rows if row.policy == policy}
        cells = [of.get(size) for size, _ in budgets]
        table.add_row(policy, *("-" if row is None or row.failure else f"{row.overhead:.1%}" for row in cells))
        if policy == "optimal":
            table.add_row(
                "  bound", *("-" if row is None or row.failure else f"{row.bound_overhead:.1%}" for row in cells)
            )
    table.caption = "-: does not get that low"
    table.caption_justify = "left"
    return table
