"""The cells of one row of a table of published measurements: what is wrong is collected, and nothing is guessed."""

from __future__ import annotations

from typing import Literal

__all__ = ["Line", "Unusable", "precision_of"]

# What no training run has had; beyond it a cell is a slip, and what it asks for would take hours to build.
_MOST = {"layers": 10_000, "n_gpus": 131_072, "gpus_per_node": 1024}
_MOST_ELSEWHERE = 10**9


class Unusable(Exception):
    """The row's reasons are complete; it cannot become a prediction."""


class Line:
    """The cells of one row; collects what is wrong with them, and what had to be assumed."""

    def __init__(self, cells: dict[str, str]) -> None:
        self.cells = cells
        self.reasons: list[str] = []
        self.assumed: list[str] = []

    def text(self, column: str) -> str:
        """A cell; empty if there is none."""
        return self.cells.get(column, "")

    def refuse(self, reason: str) -> None:
        """Say why the row cannot be predicted."""
        if reason not in self.reasons:
            self.reasons.append(reason)

    def number(self, column: str, default: int | None = None, said: str = "", least: int = 1) -> int:
        """A whole number. An empty cell is `default`, noted as assumed with the words `said`; without one, missing."""
        text = self.text(column)
        if not text:
            if default is None:
                self.refuse(f"{column}: missing")
                return least
            if said:
                self.assumed.append(f"{column} = {default} ({said})")
            return default
        value = self.real(column)
        most = _MOST.get(column, _MOST_ELSEWHERE)
        if value is not None and (value != int(value) or not least <= value <= most):
            self.refuse(f"{column}: {text!r} is not a whole number from {least} to {most}")
            return least
        return least if value is None else int(value)

    def real(self, column: str) -> float | None:
        """A positive number, None if the cell is empty."""
        text = self.text(column)
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            self.refuse(f"{column}: {text!r} is not a number")
            return None
        return value

    def finish(self) -> None:
        """Raises Unusable if there are reasons."""
        if self.reasons:
            raise Unusable


def precision_of(word: str) -> Literal["float32", "bfloat16", "float16", "float8", "float4"] | None:
    """`"amp_bf16/DEFAULT"` → "bfloat16", `"FP8-CS"` → "float8", `"NVFP4"` → "float4"; None for an unknown word."""
    lower = word.lower()
    if "fp4" in lower:
        return "float4"
    if "fp8" in lower or "float8" in lower:
        return "float8"
    if "bf16" in lower or "bfloat16" in lower:
        return "bfloat16"
    if "fp16" in lower or "float16" in lower:
        return "float16"
    return "float32" if "32" in lower else None
