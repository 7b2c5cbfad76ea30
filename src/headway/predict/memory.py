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

from headway.plan.plan import Stage
from headway.predict.autocast import autocast_surplus
from headway.predict.operators import Shards, operator_name
from headway.workload.graph import Graph, Parameter, TensorKind, dtype_bytes

__all__ = ["ActivationBytes", "Keeping", "ParameterBytes", "Sizes", "zero1_partition"]


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


class ActivationBytes(NamedTuple):
    """Activations of one micro-batch in one stage.

    `kept`: from forward to backward, without the tensor that enters (it belongs to whoever made it). `peak`: the most
    that activations and temporaries take together while this micro-batch runs; `peak_with_gradients`: the most that
    they take together with gradients that are made anew, layer by layer as activations are released. `input` and
    `output` cross the stage's cuts. `largest_kept` is what the layer keeps that keeps most; `loss`, what the loss
    keeps, is in `kept` and not in that.
    """

    kept: float
    peak: float
    peak_with_gradients: float
    input: float
    output: float
    largest_kept: float = 0.0
    loss: float = 0.0


class Keeping(NamedTuple):
    """What a program that trains keeps of activations, besides what the graph says.

    - `context`: ranks over which the tokens of everything are divided.
    - `sequence_parallel`: what lies outside of tensor-parallel blocks is divided over the tensor ranks too (Korthikanti
      et al., MLSys 2023, section 4).
    - `autocast`: below float32, the stream between layers stays in float32, and each weight has a low-precision copy;
      otherwise all but the loss is low.
    - `products`: selective recomputation keeps what attention and every second matrix product return, as torchtitan
      does; otherwise it leaves out the attention core alone.
    - `logit_bytes`: what the loss takes for each element of the model's output at its worst moment; 0: what the graph
      says.
    - `input_bytes`: of each element that a matrix product keeps of its input, below float32.
    - `working`: bytes beside the temporaries of each layer that goes backward (gradients on their way), but not beside
      the loss.
    """

    context: int = 1
    sequence_parallel: bool = False
    autocast: bool = True
    products: bool = False
    logit_bytes: float = 0.0
    input_bytes: float = 2.0
    working: float = 0.0


_OWN = Keeping()


class _Division(NamedTuple):
    """A micro-batch, and how its activations are divided and kept; `low`: below float32."""

    samples: float
    shards: Shards
    low: bool
    keeping: Keeping

    @property
    def outside(self) -> int:
        """Over how many tensor ranks the stream between blocks is divided."""
        return self.shards.degree if self.keeping.sequence_parallel else 1


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
        self._canonical: dict[tuple[int, Shards], tuple[Stage, Stage]] = {}
        self._representatives: dict[tuple, Stage] = {}
        self._classes: dict[Shards, list[int]] = {}
        self._parameters: dict[tuple, ParameterBytes] = {}
        self._partitions: dict[tuple, tuple[tuple[int, int], ...]] = {}  # (elements, bytes or tensors) of each rank
        self._activations: dict[tuple, ActivationBytes] = {}
        self._layers: dict[tuple, tuple[float, float, float, float, float]] = {}  # equal signature: equal layers
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
        self._made_by_units: dict[int, list[TensorKind]] = {}
        for unit in graph.units:
            if unit.depends_on_parameters:
                self._made_by_units.setdefault(unit.layer, []).extend(unit.produces)
        # `fully_shard` communicates unit by unit: how many units of each layer have parameters.
        self._experts = frozenset(
            graph.parameter_by_name[name].name
            for layer in graph.layers
            if layer.experts is not None
            for name in layer.experts.parameters
        )
        self.units = [
            max(1, len({owner for name in layer.parameters if (owner := _owner(name, modules))}))
            for layer in graph.layers
        ]
        # Parameters that several layers read, and which: tied weights.
        self.shared = tuple(
            (graph.parameter_by_name[name], tuple(layers)) for name, layers in readers.items() if len(layers) > 1
        )

    def canonical(self, stage: Stage, shards: Shards) -> Stage:
        """The first stage that was asked for with layers like these: what costs the same is computed once.

        Layers are alike if they compute the same (signature), on parameters of the same shapes, split alike, none of
        them shared with other layers. The ends of the model are like nothing else.
        """
        known = self._canonical.get((id(stage), shards))
        if known is not None and known[0] is stage:
            return known[1]
        classes = self._classes_of(shards)
        last = len(self.graph.layers)
        key = (
            shards,
            tuple(classes[stage.start : stage.stop]),
            tuple(at - stage.start for at in stage.recompute),
            tuple(at - stage.start for at in stage.recompute_attention),
            tuple(at - stage.start for at in stage.swap),
            stage.start == 0,
            stage.stop == last,
            stage.data,
            stage.tensor,
        )
        found = self._representatives.setdefault(key, stage)
        self._canonical[id(stage), shards] = (stage, found)
        return found

    def _classes_of(self, shards: Shards) -> list[int]:
        found = self._classes.get(shards)
        if found is None:
            tied = {at for _, layers in self.shared for at in layers}
            numbers: dict[tuple, int] = {}
            found = self._classes[shards] = []
            for at, layer in enumerate(self.graph.layers):
                own = [self.graph.parameter_by_name[name] for name in layer.parameters]
                shapes = tuple((one.shape, one.dtype, one.trainable) for one in own)
                split = tuple(block in shards.blocks for block in self._blocks_of_layer.get(at, ()))
                # What has no signature, or shares parameters, is like no other layer.
                alone = at if not layer.signature or at in tied else -1
                key = (layer.signature, shapes, split, alone)
                found.append(numbers.setdefault(key, len(numbers)))
        return found

    def local_shape(self, parameter: Parameter, shards: Shards) -> tuple[int, ...]:
        """The shape of a parameter on one tensor-parallel rank."""
        block, dim = self._split.get(parameter.name, (-1, -1))
        if block not in shards.blocks or shards.degree == 1:
            return parameter.shape
        return tuple(-(-size // shards.degree) if at == dim else size for at, size in enumerate(parameter.shape))

    def local_bytes(self, parameter: Parameter, shards: Shards) -> int:
        """Bytes of a parameter on one tensor-parallel rank."""
        return _product(self.local_shape(parameter, shards)) * dtype_bytes(parameter.dtype)

    def parameters(self, start: int, stop: int, shards: Shards, expert: int = 1) -> ParameterBytes:
        """Parameters that layers `start` to `stop` read, each counted once; experts divided over `expert` ranks."""
        key = (start, stop, shards, expert)
        found = self._parameters.get(key)
        if found is None:
            found = self._parameters[key] = self._count(start, stop, shards, expert)
        return found

    def _count(self, start: int, stop: int, shards: Shards, expert: int) -> ParameterBytes:
        elements = size = trainable = trainable_size = tensors = experts = largest = 0
        for parameter in self.graph.layer_parameters(start, stop).values():
            local = _product(self.local_shape(parameter, shards))
            if parameter.name in self._experts:
                local = -(-local // expert)
                experts += local if parameter.trainable else 0
            width = dtype_bytes(parameter.dtype)
            elements += local
            size += local * width
            largest = max(largest, local)
            if parameter.trainable:
                trainable += local
                trainable_size += local * width
                tensors += 1
        if stop - start == 1:
            most_bytes, most_elements = size, elements
        else:
            each = [self.parameters(at, at + 1, shards, expert) for at in range(start, stop)]
            most_bytes = max(one.bytes for one in each)
            most_elements = max(one.elements for one in each)
        return ParameterBytes(
            elements, size, trainable, trainable_size, tensors, most_bytes, most_elements, largest, experts
        )

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
        self,
        start: int,
        stop: int,
        recompute: tuple[int, ...],
        samples: float,
        shards: Shards,
        precision: str,
        recompute_attention: tuple[int, ...] = (),
        keeping: Keeping | None = None,
        away: tuple[int, ...] = (),
    ) -> ActivationBytes:
        """Activations of one micro-batch of `samples` in the stage of layers `start` to `stop`.

        Tensor parallelism divides what lies inside of its blocks. `keeping`: what else divides, and which kernels keep
        what; Headway's own runtime if None. `away`: layers whose activations rest elsewhere between forward and
        backward: not among what is kept, but among the peaks while they, or the next of them, go backward.
        """
        key = (start, stop, recompute, samples, shards, precision, recompute_attention, keeping, away)
        found = self._activations.get(key)
        if found is None:
            by = _Division(samples, shards, precision != "float32", keeping or _OWN)
            found = self._activations[key] = self._stage(start, stop, recompute, recompute_attention, by, away)
        return found

    def _stage(
        self,
        start: int,
        stop: int,
        recompute: tuple[int, ...],
        recompute_attention: tuple[int, ...],
        by: _Division,
        away: tuple[int, ...] = (),
    ) -> ActivationBytes:
        graph = self.graph
        again, cores = set(recompute), set(recompute_attention)
        samples = by.samples
        left = sum(self.parameters(at, at + 1, by.shards).trainable_bytes for at in range(start, stop))
        kept = peak = peak_with_gradients = largest = loss = 0.0
        fetched = 0.0  # of the layer before that was away: it comes back when this one goes backward
        last_away = max(away, default=-1)
        for at in range(start, stop):
            is_last = at == len(graph.layers) - 1
            saved, core, forward_extra, backward_extra, gradients = self._layer(at, by)
            before = kept
            backward_extra += by.keeping.working
            if at in again:
                # Only what units begin with stays; the rest comes back while this layer goes backward.
                between = self._between_units(at, samples)
                if is_last:
                    between -= _bytes(graph.layers[at].output, samples)
                kept += between * self._outside_share(by)
                extra = max(forward_extra, saved + backward_extra)
            elif at in cores and by.keeping.products:
                products = min(saved, self._products(at, by))
                kept += products
                extra = max(forward_extra, saved - products + backward_extra)
            elif at in cores:
                kept += saved - core
                extra = max(forward_extra, core + backward_extra)
            else:
                kept += saved
                extra = max(forward_extra, backward_extra)
            own = kept - before
            largest = max(largest, own)
            if at <= last_away:
                extra += fetched
            if at in away:
                kept, extra, fetched = before, extra + own, own
            if is_last and by.keeping.logit_bytes:
                output = graph.layers[at].output
                loss = by.keeping.logit_bytes * _bytes(output, samples) / dtype_bytes(output.dtype)
                extra = 0.0  # it is the loss
            elif is_last:
                loss = graph.loss_saved.at(samples)
            if is_last:
                loss *= self._loss_share(at, by)
            kept += loss
            # When this layer goes backward, those behind it have released what they kept and made their gradients.
            peak = max(peak, kept + extra)
            peak_with_gradients = max(peak_with_gradients, kept + extra + left)
            left -= gradients
        entry = graph.layers[start].input
        crossing = self._outside_share(by)
        return ActivationBytes(
            kept=kept,
            peak=max(peak, kept),
            peak_with_gradients=max(peak_with_gradients, kept),
            input=_bytes(entry, samples) * crossing if entry is not None else 0.0,
            output=_bytes(graph.layers[stop - 1].output, samples) * crossing,
            largest_kept=largest,
            loss=loss,
        )

    def _layer(self, at: int, by: _Division) -> tuple[float, float, float, float, float]:
        """Saved, of that the attention core, most extra forward, most extra backward, and gradients of one layer."""
        chosen = self._chosen_share(at, by.shards)
        key = (self.graph.layers[at].signature or at, chosen, by)
        found = self._layers.get(key)
        if found is None:
            found = self._layers[key] = self._measure(at, chosen, by)
        return found

    def _measure(self, at: int, chosen: float, by: _Division) -> tuple[float, float, float, float, float]:
        layer = self.graph.layers[at]
        samples, shards = by.samples, by.shards
        # `saved_sharded` is for all blocks of the layer together.
        scale = 1.0 - chosen * (1.0 - 1.0 / shards.degree)
        low = self.low_precision_share(at) if by.low else 1.0
        divided = layer.saved_sharded.at(samples)
        outside = scale if by.keeping.sequence_parallel else 1.0
        share = low / by.keeping.context
        saved = ((layer.saved.at(samples) - divided) * outside + divided * scale) * share
        if by.low and by.keeping.input_bytes != 2.0:
            saved -= self._inputs(at, by) * (1.0 - by.keeping.input_bytes / 2.0)
        core = layer.attention.core_saved.at(samples) * scale * share if layer.attention is not None else 0.0
        own = self.parameters(at, at + 1, shards)
        if by.low and by.keeping.autocast:
            # Autocast keeps a low-precision copy of each weight from forward to backward, and more of some activations.
            saved += own.bytes / 2
            for tensor, times in autocast_surplus(self.graph, at):
                saved += times * _bytes(tensor, samples) * scale / by.keeping.context
        return (
            saved,
            min(core, saved),
            layer.forward_peak_extra.at(samples) * scale * share,
            layer.backward_peak_extra.at(samples) * scale * share,
            own.trainable_bytes,
        )

    def _products(self, at: int, by: _Division) -> float:
        """Bytes of what attention and every second matrix product of a layer return, and of what the layer returns.

        (torchtitan, parallelisms/parallelize_llama.py, selective_ac_option "op")
        """
        kept = _bytes(self.graph.layers[at].output, by.samples) / by.outside
        products = 0
        for position in self.graph.layers[at].forward:
            operator = self.graph.operators[position]
            name = operator_name(operator)
            if name in ("mm", "addmm"):
                products += 1
            if "attention" in name or (name in ("mm", "addmm") and products % 2):
                dims = operator.sharded_outputs or (-1,) * len(operator.outputs)
                for kind, dim in zip(operator.outputs, dims, strict=True):
                    kept += _bytes(kind, by.samples) / (by.shards.of(operator) if dim >= 0 else 1)
        return kept * (0.5 if by.low else 1.0) / by.keeping.context

    def _inputs(self, at: int, by: _Division) -> float:
        """Bytes that matrix products of a layer keep of their inputs, each tensor once, in 16 bits.

        What attention returns is kept by attention too, as it is: that counts against it.
        """
        found: dict[int, float] = {}
        attention: set[int] = set()
        weights = set(self.graph.layers[at].parameters)
        for position in self.graph.layers[at].forward:
            operator = self.graph.operators[position]
            name = operator_name(operator)
            if "attention" in name:
                attention.update(operator.output_tensors)
            if name not in ("mm", "addmm") or not weights & set(operator.reads_parameters):
                continue
            dims = operator.sharded_inputs or (-1,) * len(operator.inputs)
            given = zip(operator.input_tensors, operator.inputs, dims, strict=True)
            for tensor, kind, dim in given:
                if any(kind.per_sample):
                    divided = by.shards.of(operator) if dim >= 0 else by.outside
                    found[tensor] = _bytes(kind, by.samples) / divided
        kept = sum(size for tensor, size in found.items() if tensor not in attention)
        again = sum(size for tensor, size in found.items() if tensor in attention)
        kept -= again * by.keeping.input_bytes / (2.0 - by.keeping.input_bytes)
        return kept * 0.5 / by.keeping.context

    def _chosen_share(self, at: int, shards: Shards) -> float:
        """Which share of a layer's blocks tensor parallelism splits."""
        blocks = self._blocks_of_layer.get(at, [])
        return sum(1 for block in blocks if block in shards.blocks) / len(blocks) if blocks else 0.0

    def _outside_share(self, by: _Division) -> float:
        """What is left of the stream between layers, which lies outside of all tensor-parallel blocks."""
        low = 0.5 if by.low and not by.keeping.autocast else 1.0
        return low / by.keeping.context / by.outside

    def _loss_share(self, at: int, by: _Division) -> float:
        """The loss is divided where the projection before it leaves each rank a part of the vocabulary."""
        splits = any(
            block in by.shards.blocks and not self.graph.blocks[block].rows
            for block in self._blocks_of_layer.get(at, [])
        )
        return 1.0 / by.keeping.context / (by.shards.degree if splits else 1)

    def _between_units(self, at: int, samples: float) -> float:
        """Bytes that the units of a layer hand on: recomputation works unit by unit and keeps what each begins with."""
        made = self._made_by_units.get(at)
        return sum(_bytes(kind, samples) for kind in made or (self.graph.layers[at].output,))

    def low_precision_share(self, at: int) -> float:
        """What is left of a layer's float32 activations in a lower precision: a half."""
        return 0.5


def _bytes(kind: TensorKind, samples: float) -> float:
    """Bytes of a tensor; samples may be a fraction where stages share a micro-batch out."""
    size = float(dtype_bytes(kind.dtype))
    for fixed, slope in zip(kind.fixed, kind.per_sample, strict=True):
        size *= fixed + slope * samples
    return size


def _product(shape: Iterable[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _owner(name: str, modules: set[str]) -> str:
    """The module among `modules` that holds the parameter of this name: the outermost one, or ""."""
    parts = name.split(".")
    return next((path for at in range(1, len(parts)) if (path := ".".join(parts[:at])) in modules), "")
