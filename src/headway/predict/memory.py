"""How many bytes each rank needs at the worst moment of a step, by kind.

The state of a parameter in mixed precision or float32 is what ZeRO counts (Rajbhandari et al., SC 2020, section 3):
for AdamW in float32 4 bytes of parameter, 4 of gradient and 8 of moments for each element, the famous 16 psi; ZeRO
stage 1 divides the 8, stage 2 the gradients too, stage 3 everything. Activations are what the trace saw saved for the
backward pass, times the micro-batches that the schedule keeps in flight.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import NamedTuple

from headway.predict.operators import Shards
from headway.workload.graph import Graph, Parameter, dtype_bytes

__all__ = ["ActivationBytes", "ParameterBytes", "Sizes", "zero1_partition"]


class ParameterBytes(NamedTuple):
    """Parameters of some layers on one tensor-parallel rank, before ZeRO divides them.

    `largest_layer_bytes`: of the layer that reads most. `trainable_*` leave frozen parameters out.
    """

    elements: int = 0
    bytes: int = 0
    trainable_elements: int = 0
    trainable_bytes: int = 0
    tensors: int = 0
    largest_layer_bytes: int = 0


class ActivationBytes(NamedTuple):
    """Activations of one micro-batch in one stage.

    `kept`: from forward to backward, without the tensor that enters (it belongs to whoever made it). `peak`: the most
    that activations and temporaries take together while this micro-batch runs; `peak_with_gradients`: the most that
    they take together with gradients that are made anew, layer by layer as activations are released. `input` and
    `output` cross the stage's cuts.
    """

    kept: float
    peak: float
    peak_with_gradients: float
    input: float
    output: float


def zero1_partition(elements: Iterable[int], ranks: int) -> list[list[int]]:
    """Which parameters (positions) each rank updates under torch's ZeroRedundancyOptimizer.

    It hands out whole tensors, the largest first, each to the rank that has least so far.
    """
    sizes = list(elements)
    order = sorted(range(len(sizes)), key=lambda at: -sizes[at])
    parts: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0, rank) for rank in range(ranks)]
    for at in order:
        held, rank = heap[0]
        heapq.heapreplace(heap, (held + sizes[at], rank))
        parts[rank].append(at)
    return parts


class Sizes:
    """Bytes of parameters and activations of any stage of one graph, memoised."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._parameters: dict[tuple, ParameterBytes] = {}
        self._partitions: dict[tuple, tuple[tuple[int, int], ...]] = {}  # (elements, bytes or tensors) of each rank
        self._activations: dict[tuple, ActivationBytes] = {}
        self._blocks_of_layer: dict[int, list[int]] = {}
        for position, block in enumerate(graph.blocks):
            self._blocks_of_layer.setdefault(block.layer, []).append(position)
        self._split: dict[str, tuple[int, int]] = {}  # canonical name → (block, dimension)
        for position, block in enumerate(graph.blocks):
            for name, dim in block.parameters.items():
                self._split[graph.parameter_by_name[name].name] = (position, dim)
        readers: dict[str, list[int]] = {}
        for position, layer in enumerate(graph.layers):
            for name in {graph.parameter_by_name[name].name for name in layer.parameters}:
                readers.setdefault(name, []).append(position)
        modules = {unit.module for unit in graph.units}
        # `fully_shard` communicates unit by unit: how many units of each layer have parameters.
        self.units = [
            max(1, len({owner for name in layer.parameters if (owner := _owner(name, modules))}))
            for layer in graph.layers
        ]
        # Parameters that several layers read, and which: tied weights.
        self.shared = tuple(
            (graph.parameter_by_name[name], tuple(layers)) for name, layers in readers.items() if len(layers) > 1
        )

    def local_shape(self, parameter: Parameter, shards: Shards) -> tuple[int, ...]:
        """The shape of a parameter on one tensor-parallel rank."""
        block, dim = self._split.get(parameter.name, (-1, -1))
        if block not in shards.blocks or shards.degree == 1:
            return parameter.shape
        return tuple(-(-size // shards.degree) if at == dim else size for at, size in enumerate(parameter.shape))

    def local_bytes(self, parameter: Parameter, shards: Shards) -> int:
        """Bytes of a parameter on one tensor-parallel rank."""
        return _product(self.local_shape(parameter, shards)) * dtype_bytes(parameter.dtype)

    def parameters(self, start: int, stop: int, shards: Shards) -> ParameterBytes:
        """Parameters that layers `start` to `stop` read, each counted once."""
        key = (start, stop, shards)
        found = self._parameters.get(key)
        if found is None:
            found = self._parameters[key] = self._count(start, stop, shards)
        return found

    def _count(self, start: int, stop: int, shards: Shards) -> ParameterBytes:
        elements = size = trainable = trainable_size = tensors = 0
        for parameter in self.graph.layer_parameters(start, stop).values():
            local = _product(self.local_shape(parameter, shards))
            elements += local
            size += local * dtype_bytes(parameter.dtype)
            if parameter.trainable:
                trainable += local
                trainable_size += local * dtype_bytes(parameter.dtype)
                tensors += 1
        if stop - start == 1:
            largest = size
        else:
            largest = max(self.parameters(at, at + 1, shards).bytes for at in range(start, stop))
        return ParameterBytes(elements, size, trainable, trainable_size, tensors, largest)

    def sharded(self, start: int, stop: int, shards: Shards, ranks: int) -> tuple[int, int]:
        """(elements, bytes) that the fullest of `ranks` ranks holds under `fully_shard`: rows, rounded up."""
        key = (start, stop, shards, ranks)
        found = self._partitions.get(key)
        if found is None:
            elements = size = 0
            for parameter in self.graph.layer_parameters(start, stop).values():
                shape = self.local_shape(parameter, shards)
                rows = -(-shape[0] // ranks) if shape else 1
                part = rows * _product(shape[1:])
                elements += part
                size += part * dtype_bytes(parameter.dtype)
            found = self._partitions[key] = ((elements, size),)
        return found[0]

    def zero1(self, start: int, stop: int, shards: Shards, ranks: int) -> tuple[tuple[int, int], ...]:
        """(elements, tensors) that each of `ranks` ranks updates under ZeRO stage 1."""
        key = (start, stop, shards, -ranks)
        found = self._partitions.get(key)
        if found is None:
            chosen = [one for one in self.graph.layer_parameters(start, stop).values() if one.trainable]
            local = [_product(self.local_shape(one, shards)) for one in chosen]
            parts = zero1_partition((one.elements for one in chosen), ranks)
            found = tuple((sum(local[at] for at in part), len(part)) for part in parts)
            self._partitions[key] = found
        return found

    def activations(
        self, start: int, stop: int, recompute: tuple[int, ...], samples: int, shards: Shards, precision: str
    ) -> ActivationBytes:
        """Activations of one micro-batch of `samples` in the stage of layers `start` to `stop`."""
        key = (start, stop, recompute, samples, shards, precision)
        found = self._activations.get(key)
        if found is None:
            found = self._activations[key] = self._stage(start, stop, recompute, samples, shards, precision)
        return found

    def _stage(
        self, start: int, stop: int, recompute: tuple[int, ...], samples: int, shards: Shards, precision: str
    ) -> ActivationBytes:
        graph = self.graph
        again = set(recompute)
        left = sum(self.parameters(at, at + 1, shards).trainable_bytes for at in range(start, stop))
        kept = peak = peak_with_gradients = 0.0
        for at in range(start, stop):
            is_last = at == len(graph.layers) - 1
            saved, forward_extra, backward_extra, gradients = self._layer(at, samples, shards, precision)
            if at in again:
                # Only what units begin with stays; the rest comes back while this layer goes backward.
                kept += self._between_units(at, samples) - (graph.layers[at].output.bytes(samples) if is_last else 0)
                extra = max(forward_extra, saved + backward_extra)
            else:
                kept += saved
                extra = max(forward_extra, backward_extra)
            if is_last:
                kept += graph.loss_saved.at(samples)
            # When this layer goes backward, those behind it have released what they kept and made their gradients.
            peak = max(peak, kept + extra)
            peak_with_gradients = max(peak_with_gradients, kept + extra + left)
            left -= gradients
        entry = graph.layers[start].input
        return ActivationBytes(
            kept=kept,
            peak=max(peak, kept),
            peak_with_gradients=max(peak_with_gradients, kept),
            input=float(entry.bytes(samples)) if entry is not None else 0.0,
            output=float(graph.layers[stop - 1].output.bytes(samples)),
        )

    def _layer(self, at: int, samples: int, shards: Shards, precision: str) -> tuple[float, float, float, float]:
        """Saved, most extra going forward, most extra going backward, and gradients of one layer."""
        layer = self.graph.layers[at]
        blocks = self._blocks_of_layer.get(at, [])
        chosen = sum(1 for block in blocks if block in shards.blocks)
        # `saved_sharded` is for all blocks of the layer together.
        share = chosen / len(blocks) if blocks else 0.0
        scale = 1.0 - share * (1.0 - 1.0 / shards.degree)
        low = self.low_precision_share(at) if precision != "float32" else 1.0
        divided = layer.saved_sharded.at(samples)
        saved = (layer.saved.at(samples) - divided + divided * scale) * low
        own = self.parameters(at, at + 1, shards)
        if precision != "float32":
            # Autocast keeps a low-precision copy of each weight from forward to backward.
            saved += own.bytes / 2
        return (
            saved,
            layer.forward_peak_extra.at(samples) * scale * low,
            layer.backward_peak_extra.at(samples) * scale * low,
            own.trainable_bytes,
        )

    def _between_units(self, at: int, samples: int) -> float:
        """Bytes that the units of a layer hand on: recomputation works unit by unit and keeps what each begins with."""
        made = [kind for unit in self.graph.units if unit.layer == at and unit.depends_on_parameters
                for kind in unit.produces]  # fmt: skip
        return float(sum(kind.bytes(samples) for kind in made) if made else self.graph.layers[at].output.bytes(samples))

    def low_precision_share(self, at: int) -> float:
        """What is left of a layer's float32 activations under bfloat16 autocast: a half."""
        return 0.5


def _product(shape: Iterable[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _owner(name: str, modules: set[str]) -> str:
    """The module among `modules` that holds the parameter of this name: the outermost one, or ""."""
    parts = name.split(".")
    return next((path for at in range(1, len(parts)) if (path := ".".join(parts[:at])) in modules), "")
