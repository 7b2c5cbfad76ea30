"""How many bytes each rank needs at the worst moment of a step, by kind.

The state of a parameter in mixed precision or float32 is what ZeRO counts (Rajbhandari et al., SC 2020, section 3):
for AdamW in float32 4 bytes of parameter, 4 of gradient and 8 of moments for each element, the famous 16 psi; ZeRO
stage 1 divides the 8, stage 2 the gradients too, stage 3 everything. Activations are what the trace saw saved for the
backward pass, times the micro-batches that the schedule keeps in flight.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from headway.plan.plan import Stage
from headway.predict.autocast import autocast_surplus
from headway.predict.operators import Shards, operator_name
from headway.predict.parameters import ParameterBytes, ParameterSums, Tied
from headway.workload.graph import Graph, Parameter, TensorKind, dtype_bytes

__all__ = ["ActivationBytes", "Alike", "Keeping", "ParameterBytes", "Sizes", "zero1_partition"]


class Alike(NamedTuple):
    """A class of stages that cost the same: its number, and the first stage of it that was met."""

    number: int
    stage: Stage


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
_MOST_STAGES = 2**16  # whose class is remembered: searches make new ones without end


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
        self._canonical: dict[Shards, dict[int, tuple[Stage, Alike]]] = {}
        self._representatives: dict[tuple, Alike] = {}
        self._classes: dict[Shards, list[int]] = {}
        self._parameters: dict[tuple[Shards, int], ParameterSums] = {}
        self._sharded: dict[tuple[Shards, int], ParameterSums] = {}
        self._partitions: dict[tuple, tuple[tuple[int, int], ...]] = {}  # (elements, tensors) of each rank
        self._activations: dict[tuple, ActivationBytes] = {}
        self._layers: dict[_Division, dict[int, tuple[float, float, float, float, float, float]]] = {}  # by class
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

    def alike(self, stages: Sequence[Stage], shards: Shards) -> list[Alike]:
        """For each stage its class: the number that all stages with like layers have, and the first of them.

        Layers are alike if they compute the same (signature), on parameters of the same shapes, split alike, none of
        them shared with other layers. The ends of the model are like nothing else. Stages under other `shards` have
        other numbers.
        """
        known = self._canonical.setdefault(shards, {})
        found = []
        for stage in stages:
            held = known.get(id(stage))
            if held is None or held[0] is not stage:
                if len(known) >= _MOST_STAGES:
                    known.clear()
                held = known[id(stage)] = (stage, self._find(stage, shards))
            found.append(held[1])
        return found

    def _find(self, stage: Stage, shards: Shards) -> Alike:
        start, stop = stage.start, stage.stop
        key = (
            shards,
            tuple(self._classes_of(shards)[start:stop]),
            tuple(at - start for at in stage.recompute),
            tuple(at - start for at in stage.recompute_attention),
            tuple(at - start for at in stage.swap),
            start == 0,
            stop == len(self.graph.layers),
            stage.data,
            stage.tensor,
        )
        return self._representatives.setdefault(key, Alike(len(self._representatives), stage))

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
                experts = tuple(one.name in self._experts for one in own)
                key = (layer.signature, shapes, split, alone, experts)
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
        return self.parameter_sums(shards, expert).of(start, stop)

    def parameter_sums(self, shards: Shards, expert: int = 1) -> ParameterSums:
        """What `parameters` answers from."""
        found = self._parameters.get((shards, expert))
        if found is None:
            found = self._parameters[shards, expert] = self._sums(shards, expert, 1)
        return found

    def _sums(self, shards: Shards, expert: int, ranks: int) -> ParameterSums:
        """Sums over the layers, of the rank that has most rows of `ranks` (`fully_shard`)."""
        each: dict[int, ParameterBytes] = {}
        layers = []
        for at, number in enumerate(self._classes_of(shards)):
            if number not in each:
                own = self.graph.layer_parameters(at, at + 1).values()
                counted = [self._count(parameter, shards, expert, ranks) for parameter in own]
                columns = list(zip(*counted, strict=True))
                largest = max((one.elements for one in counted), default=0)
                each[number] = ParameterBytes(*map(sum, columns))._replace(largest_tensor_elements=largest)
            layers.append(each[number])
        tied = (Tied(readers, self._count(parameter, shards, expert, ranks)) for parameter, readers in self.shared)
        return ParameterSums(layers, tuple(tied))

    def _count(self, parameter: Parameter, shards: Shards, expert: int, ranks: int) -> ParameterBytes:
        shape = self.local_shape(parameter, shards)
        local = -(-shape[0] // ranks) * _product(shape[1:]) if shape else 1
        is_expert = parameter.name in self._experts
        if is_expert:
            local = -(-local // expert)
        size = local * dtype_bytes(parameter.dtype)
        if not parameter.trainable:
            return ParameterBytes(local, size)
        return ParameterBytes(local, size, local, size, 1, expert_elements=local if is_expert else 0)

    def sharded(self, start: int, stop: int, shards: Shards, ranks: int) -> ParameterBytes:
        """What the fullest of `ranks` ranks holds under `fully_shard`: rows, rounded up."""
        found = self._sharded.get((shards, ranks))
        if found is None:
            found = self._sharded[shards, ranks] = self._sums(shards, 1, ranks)
        return found.of(start, stop)

    def zero1(self, start: int, stop: int, shards: Shards, ranks: int) -> tuple[tuple[int, int], ...]:
        """(elements, tensors) that each of `ranks` ranks updates under ZeRO stage 1."""
        key = (start, stop, shards, ranks)
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
        left = sum(self.parameter_sums(by.shards).of_layers("trainable_bytes")[start:stop])
        classes = self._classes_of(by.shards)
        known = self._layers.setdefault(by, {})
        kept = peak = peak_with_gradients = largest = loss = 0.0
        fetched = 0.0  # of the layer before that was away: it comes back when this one goes backward
        last_away = max(away, default=-1)
        crossing = self._outside_share(by)
        for at in range(start, stop):
            is_last = at == len(graph.layers) - 1
            layer = known.get(classes[at])
            if layer is None:
                layer = known[classes[at]] = self._measure(at, by)
            saved, core, forward_extra, backward_extra, gradients, between = layer
            before = kept
            backward_extra += by.keeping.working
            if at in again:
                # Only what units begin with stays; the rest comes back while this layer goes backward.
                if is_last:
                    between -= _bytes(graph.layers[at].output, samples)
                kept += between * crossing
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
        return ActivationBytes(
            kept=kept,
            peak=max(peak, kept),
            peak_with_gradients=max(peak_with_gradients, kept),
            input=_bytes(entry, samples) * crossing if entry is not None else 0.0,
            output=_bytes(graph.layers[stop - 1].output, samples) * crossing,
            largest_kept=largest,
            loss=loss,
        )

    def _measure(self, at: int, by: _Division) -> tuple[float, float, float, float, float, float]:
        """Of one layer: saved, of that the attention core, most extra in each pass, gradients, and between units."""
        chosen = self._chosen_share(at, by.shards)
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
            self._between_units(at, samples),
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
