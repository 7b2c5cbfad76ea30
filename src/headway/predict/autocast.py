"""What autocast keeps for the backward pass beyond half of what the same model keeps in float32.

A trace sees the model in float32. Below it, autocast (torch.amp) lowers matrix operators alone: what normalisations and
residual sums return stays in float32, and each matrix operator that reads such a tensor saves a low-precision copy of
its own (query, key and value of one normalised input save three).
"""

from __future__ import annotations

from typing import NamedTuple

from headway.predict.operators import is_matrix_operator, needs_full_precision
from headway.workload.graph import Graph, Operator, TensorKind

__all__ = ["Surplus", "autocast_surplus"]


class Surplus(NamedTuple):
    """A saved tensor, and how many times its float32 bytes are kept more than the half that all of them count."""

    kind: TensorKind
    times: float


def autocast_surplus(graph: Graph, position: int) -> tuple[Surplus, ...]:
    """The tensors of a layer that autocast keeps in float32, or more than once, with how much more that is."""
    layer = graph.layers[position]
    parameters = {parameter.tensor for parameter in graph.parameters if parameter.tensor >= 0}
    roots: dict[int, int] = {}  # a view's tensor → the tensor that it looks into
    kinds: dict[int, TensorKind] = {}
    low: set[int] = set()
    copies: dict[int, int] = {}
    for at in layer.forward:
        operator = graph.operators[at]
        read = [
            (roots.get(tensor, tensor), kind) for tensor, kind in _floating(operator.input_tensors, operator.inputs)
        ]
        read = [(root, kind) for root, kind in read if root not in parameters]
        made = _floating(operator.output_tensors, operator.outputs)
        if operator.is_view:
            for tensor, _ in made:
                if read:
                    roots[tensor] = read[0][0]
            continue
        for root, kind in read:
            kinds.setdefault(root, kind)
        if is_matrix_operator(operator):
            for root in {root for root, _ in read if root not in low}:
                copies[root] = copies.get(root, 0) + 1
            low.update(tensor for tensor, _ in made)
        elif not needs_full_precision(operator) and read and all(root in low for root, _ in read):
            low.update(tensor for tensor, _ in made)
        for tensor, kind in made:
            kinds.setdefault(tensor, kind)
    whole, lowered = _read_backward(graph, layer.backward, roots, kinds)
    found = []
    for root in sorted(whole | lowered):
        if root in low:
            continue
        kept = (1.0 if root in whole else 0.0) + (0.5 * copies.get(root, 1) if root in lowered else 0.0)
        if kept > 0.5:
            found.append(Surplus(kinds[root], kept - 0.5))
    return tuple(found)


def _read_backward(
    graph: Graph, positions: tuple[int, ...], roots: dict[int, int], kinds: dict[int, TensorKind]
) -> tuple[set[int], set[int]]:
    """Forward tensors that the backward pass reads: by operators as they are, and by matrix operators."""
    whole: set[int] = set()
    lowered: set[int] = set()
    views: dict[int, int] = {}
    for at in positions:
        operator: Operator = graph.operators[at]
        read = [views.get(tensor, roots.get(tensor, tensor)) for tensor in operator.input_tensors]
        if operator.is_view:
            for tensor in operator.output_tensors:
                if read:
                    views[tensor] = read[0]
            continue
        (lowered if is_matrix_operator(operator) else whole).update(root for root in read if root in kinds)
    return whole, lowered


def _floating(tensors: tuple[int, ...], kinds: tuple[TensorKind, ...]) -> list[tuple[int, TensorKind]]:
    return [(tensor, kind) for tensor, kind in zip(tensors, kinds) if kind.dtype == "float32" and any(kind.per_sample)]
