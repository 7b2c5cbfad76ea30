"""Elements and bytes of the parameters that any run of layers reads, from sums over the layers before each position.

A search asks for every run of layers there is, under every split. What one layer reads is counted once for each class
of like layers; a parameter that several layers read (tied weights) is taken off again where a run holds it more than
once. All are whole numbers, so the differences of sums are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

__all__ = ["ParameterBytes", "ParameterSums", "Tied"]


class ParameterBytes(NamedTuple):
    """Parameters of some layers on one tensor-parallel rank, before ZeRO divides them.

    `largest_layer_*`: of the layer that reads most. `trainable_*` leave frozen parameters out, `expert_elements` counts
    the trainable ones that are experts' (one expert-parallel rank's part of them). `largest_tensor_elements`: of the
    largest parameter.
    """

    elements: int = 0
    bytes: int = 0
    trainable_elements: int = 0
    trainable_bytes: int = 0
    tensors: int = 0
    largest_layer_bytes: int = 0
    largest_layer_elements: int = 0
    largest_tensor_elements: int = 0
    expert_elements: int = 0


class Tied(NamedTuple):
    """What one parameter counts that several layers read: the layers, and what to take off for each reader but one."""

    layers: tuple[int, ...]
    counts: ParameterBytes


class ParameterSums:
    """`ParameterBytes` of any run of layers, given those of each layer by itself and the tied parameters."""

    def __init__(self, layers: Sequence[ParameterBytes], tied: Sequence[Tied]) -> None:
        self._tied = tuple(tied)
        self._before = [list(accumulate(column, initial=0)) for column in zip(*layers, strict=True)]
        self._each = [list(column) for column in zip(*layers, strict=True)]
        self._known: dict[tuple[int, int], ParameterBytes] = {}

    def of(self, start: int, stop: int) -> ParameterBytes:
        """What layers `start` to `stop` (exclusive) read, each parameter once."""
        found = self._known.get((start, stop))
        if found is None:
            found = self._known[start, stop] = self._add_up(start, stop)
        return found

    def of_layers(self, field: str) -> list[int]:
        """One field of `ParameterBytes` for each layer by itself; not to be changed."""
        return self._each[ParameterBytes._fields.index(field)]

    def _add_up(self, start: int, stop: int) -> ParameterBytes:
        found = ParameterBytes(*(column[stop] - column[start] for column in self._before))
        found = found._replace(
            largest_layer_bytes=max(self._each[_BYTES][start:stop]),
            largest_layer_elements=max(self._each[_ELEMENTS][start:stop]),
            largest_tensor_elements=max(self._each[_LARGEST][start:stop]),
        )
        for layers, counts in self._tied:
            twice = sum(start <= at < stop for at in layers) - 1
            if twice > 0:
                found = found._replace(
                    elements=found.elements - twice * counts.elements,
                    bytes=found.bytes - twice * counts.bytes,
                    trainable_elements=found.trainable_elements - twice * counts.trainable_elements,
                    trainable_bytes=found.trainable_bytes - twice * counts.trainable_bytes,
                    tensors=found.tensors - twice * counts.tensors,
                    expert_elements=found.expert_elements - twice * counts.expert_elements,
                )
        return found


_BYTES = ParameterBytes._fields.index("bytes")
_ELEMENTS = ParameterBytes._fields.index("elements")
_LARGEST = ParameterBytes._fields.index("largest_tensor_elements")
