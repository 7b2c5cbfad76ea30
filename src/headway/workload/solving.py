"""Two recordings of one training step, at 2 and at 3 samples, as one for any number of samples.

The two must dispatch the same operators; every shape, integer argument, FLOP and byte count is then solved as
`fixed + per_sample * samples`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import msgspec
import torch

from headway.errors import TraceError
from headway.workload.graph import Affine, TensorKind
from headway.workload.recording import Recording, Signature

__all__ = ["SIZES", "Solution", "Solved", "affine", "short_name"]

SIZES = (2, 3)  # never 1: size-1 dimensions broadcast, and models treat them specially


def _solve(low: float, high: float) -> tuple[float, float]:
    slope = (high - low) / (SIZES[1] - SIZES[0])
    return low - slope * SIZES[0], slope


def affine(low: float, high: float) -> Affine:
    """The line through what was counted at both sizes."""
    fixed, slope = _solve(low, high)
    return Affine(fixed=fixed, per_sample=slope)


def _integers(low: int, high: int) -> tuple[int, int]:
    slope = (high - low) // (SIZES[1] - SIZES[0])
    return low - slope * SIZES[0], slope


class _Mismatch(Exception):
    """The two recordings differ in a way that no affine function explains."""


class Solved:
    """One operator with arguments and metadata, solved for any number of samples."""

    __slots__ = ("arguments", "digest", "flop", "inputs", "is_random", "is_view", "keywords", "outputs", "target")

    def __init__(self, kind: Callable[[int, int], TensorKind], low: Signature, high: Signature) -> None:
        self.target = str(low.func)
        self.inputs = tuple(kind(a, b) for a, b in zip(low.inputs, high.inputs, strict=True))
        self.outputs = tuple(kind(a, b) for a, b in zip(low.outputs, high.outputs, strict=True))
        position = iter(range(len(low.inputs)))
        self.arguments = tuple(_argument(a, b, position) for a, b in zip(low.arguments, high.arguments, strict=True))
        self.keywords = {
            name: _argument(a, b, position) for (name, a), (_, b) in zip(low.keywords, high.keywords, strict=True)
        }
        self.flop = affine(low.flop, high.flop)
        self.is_view = low.is_view
        self.is_random = low.is_random
        content = (self.target, self.inputs, self.outputs, self.arguments, self.keywords)
        self.digest = hashlib.sha256(msgspec.json.encode(content)).digest()


def _argument(low: Any, high: Any, position: Iterator[int]) -> Any:
    """A pair of argument templates as the JSON described at `Operator`."""
    if isinstance(low, tuple):
        if len(low) == 2 and isinstance(low[0], type):  # a float, bool or complex number, with its type
            return _number(low[1], high[1])
        if len(low) != len(high):
            raise _Mismatch
        return [_argument(a, b, position) for a, b in zip(low, high, strict=True)]
    if isinstance(low, str):
        return {"tensor": next(position)} if low == "\0tensor" else low
    if low is None or high is None:
        if low is not high:
            raise _Mismatch
        return None
    if isinstance(low, int):
        return _number(low, high)
    if isinstance(low, torch.dtype):
        return {"dtype": short_name(low)}
    return short_name(low)


def _number(low: Any, high: Any) -> Any:
    if isinstance(low, bool):
        return low
    if isinstance(low, complex):
        return [low.real, low.imag]
    if low == high or low != low:
        return low if abs(low) != float("inf") and low == low else str(low)
    if isinstance(low, int) and isinstance(high, int):
        fixed, slope = _integers(low, high)
        return {"fixed": fixed, "per_sample": slope}
    fixed, slope = _solve(low, high)
    return {"fixed": fixed, "per_sample": slope}


def short_name(value: Any) -> str:
    """`torch.float32` → "float32", `torch.device("cpu")` → "cpu"."""
    text = str(value)
    return text.removeprefix("torch.")


class Solution:
    """Two recordings of the same step, at the two `SIZES`, solved.

    `operators`: those of the step, in order. `kinds`: all tensors met. Raises TraceError, naming the model and the
    first operator that differs, if the recordings are not of the same operators.
    """

    def __init__(self, name: str, low: Recording, high: Recording) -> None:
        self.name = name
        self.low = low
        self.high = high
        self.kinds: dict[tuple[int, int], TensorKind] = {}
        self._interned: dict[TensorKind, TensorKind] = {}
        self.operators = self._solve_operators()

    def kind(self, low: int, high: int) -> TensorKind:
        """The tensor whose metadata stand at these places of the two recordings, for any number of samples."""
        found = self.kinds.get((low, high))
        if found is None:
            a, b = self.low.metas[low], self.high.metas[high]
            if len(a.shape) != len(b.shape) or a.dtype != b.dtype:
                raise _Mismatch
            solved = [_integers(x, y) for x, y in zip(a.shape, b.shape, strict=True)]
            made = TensorKind(
                fixed=tuple(fixed for fixed, _ in solved),
                per_sample=tuple(slope for _, slope in solved),
                dtype=short_name(a.dtype),
            )
            found = self.kinds[(low, high)] = self._interned.setdefault(made, made)
        return found

    def _solve_operators(self) -> list[Solved]:
        low, high = self.low, self.high
        cache: dict[tuple[int, int], Solved] = {}
        solved: list[Solved] = []
        for operator, (a, b) in enumerate(zip(low.signatures, high.signatures, strict=False)):
            found = cache.get((id(a), id(b)))
            if found is None:
                if a.func is not b.func or low.modules[operator] != high.modules[operator]:
                    self._refuse(operator)
                try:
                    found = cache[(id(a), id(b))] = Solved(self.kind, a, b)
                except (_Mismatch, ValueError):
                    self._refuse(operator)
            solved.append(found)
        if len(low.signatures) != len(high.signatures):
            self._refuse(min(len(low.signatures), len(high.signatures)))
        if low.inputs != high.inputs or low.outputs != high.outputs:
            edges = enumerate(zip(low.inputs, high.inputs, low.outputs, high.outputs))
            self._refuse(next(operator for operator, (a, b, c, d) in edges if a != b or c != d))
        if len(low.calls) != len(high.calls) or any(a.module != b.module for a, b in zip(low.calls, high.calls)):
            self._refuse(low.forward_stop)
        return solved

    def _refuse(self, operator: int) -> NoReturn:
        def at(recording: Recording) -> str:
            if operator < len(recording.signatures):
                return f"{recording.signatures[operator].func} in {recording.modules[operator] or 'the model'}"
            return "nothing more"

        raise TraceError(
            f"the model does not compute the same at every batch size: operator {operator} is {at(self.low)} "
            f"with {SIZES[0]} samples, and {at(self.high)} with {SIZES[1]}",
            place=self.name,
            remedy="make forward independent of the number of samples (no branch on it, no cache kept between calls)",
        )
