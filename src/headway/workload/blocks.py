"""Finds the Linear modules that tensor parallelism can split together, by proof on the traced graph.

Megatron-LM (Shoeybi et al., arXiv:1909.08053, section 3) splits the first Linear of a pair by output features and the
second by input features, and knows where the pairs are because it wrote the model. Here nothing is known about the
model but its aten operators. Some Linears that read the same tensor are supposed to be *columns*; their outputs are
then divided along the features, and what is divided is followed from operator to operator by rules that say where the
division of the inputs reappears in the outputs when every rank works on its own part alone. The supposition holds if
each divided tensor ends in a Linear that sums over the divided dimension, a *row*, whose output is a sum of one term
from each rank. An operator without a rule refutes it, and so does a divided tensor that leaves the layer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from headway.workload.graph import Affine, Graph, Layer, Operator, Parameter, TensorBlock, TensorKind, dtype_bytes
from headway.workload.sharding import Shape, Sharding, Shardings, Use, is_in_place, packet_name, rule_of

__all__ = ["find_blocks"]

# A large prime: sizes that agree for so many samples agree for any number.
_SAMPLES = 1_000_003

_Known = dict[tuple[int, Shape], Sharding]  # (storage, shape) → how a tensor of that shape on it is divided


def find_blocks(graph: Graph) -> Graph:
    """`graph` with `blocks`, the operators' `block` and `sharded_*`, and the layers' `saved_sharded` filled in.

    A block lies within one layer, and its columns read the same tensor. Linears are recognised by their operators: a
    product with a transposed two-dimensional parameter `<module>.weight` that nothing else reads, in a module that does
    nothing else. Backward operators are marked as well: the gradient of a divided tensor is divided alike.
    """
    finder = _Finder(graph)
    return finder.marked(finder.blocks())


@dataclass(frozen=True)
class _Linear:
    """The operator at `position` is the product of a Linear module."""

    position: int
    module: str
    left: int  # which of the operator's inputs is multiplied by the weight
    source: int  # identity of the tensor it reads, before views and casts
    weight: Parameter
    bias: Parameter | None
    splittable: bool


@dataclass
class _Supposition:
    """Columns whose outputs meet, what became of them, and whether the supposition still holds."""

    columns: list[_Linear] = field(default_factory=list)
    rows: list[_Linear] = field(default_factory=list)
    units: int = 0  # greatest common divisor of what must be divided
    holds: bool = True


@dataclass(frozen=True)
class _Found:
    """A block by the positions of its products among the forward operators of its layer."""

    columns: tuple[int, ...]
    rows: tuple[int, ...]
    divisor: int


_VIEWS_AND_CASTS = {"view", "_unsafe_view", "reshape", "_reshape_alias", "_to_copy", "alias", "detach", "clone"}
_INSIDE_A_LINEAR = _VIEWS_AND_CASTS | {"t", "transpose", "mm", "addmm", "add", "expand", "unsqueeze", "squeeze"}


class _Finder:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._shapes: dict[int, Shape] = {}
        self.made_by: dict[int, int] = {}  # identity → position of the operator that made it
        self.readers: dict[int, list[int]] = defaultdict(list)
        self.returned = frozenset(graph.output_tensors)
        self.trained: set[int] = {item.tensor for item in graph.parameters if item.trainable and item.tensor >= 0}
        self.forward_of_module: dict[str, list[int]] = defaultdict(list)
        for position, operator in enumerate(graph.operators):
            for identity in operator.input_tensors:
                self.readers[identity].append(position)
            for identity in operator.output_tensors:
                self.made_by.setdefault(identity, position)
            if not operator.backward:
                self.forward_of_module[operator.module].append(position)
                if not self.trained.isdisjoint(operator.input_tensors):
                    self.trained.update(operator.output_tensors)
        self.linears = self._linears()

    def shape(self, kind: TensorKind) -> Shape:
        # Kinds live as long as the graph, so their addresses are theirs; hashing them by content is much slower.
        found = self._shapes.get(id(kind))
        if found is None:
            found = self._shapes[id(kind)] = kind.shape(_SAMPLES)
        return found

    def use(self, operator: Operator, inputs: Shardings) -> Use:
        return Use(operator, inputs, [*map(self.shape, operator.inputs)], [*map(self.shape, operator.outputs)])

    def source(self, identity: int, through: set[str]) -> int:
        """The tensor that `identity` is a view (or a cast) of."""
        while identity in self.made_by:
            operator = self.graph.operators[self.made_by[identity]]
            if packet_name(operator.target) not in through or not operator.input_tensors:
                break
            identity = operator.input_tensors[0]
        return identity

    def storage(self, identity: int) -> int:
        """The tensor whose memory `identity` shares: what views view, and what operators in place write to."""
        while identity in self.made_by:
            operator = self.graph.operators[self.made_by[identity]]
            if not (operator.is_view or is_in_place(operator)) or not operator.input_tensors:
                break
            identity = operator.input_tensors[0]
        return identity

    def outputs(self, operator: Operator, inputs: Shardings, known: _Known) -> Shardings | None:
        """The shardings of all outputs, or None where no rule allows the operator."""
        rule = rule_of(operator.target)
        outputs = rule(self.use(operator, inputs)) if rule is not None else None
        if outputs is None or not is_in_place(operator):
            return outputs
        # Further outputs are other views of what was written: divided as they were before.
        views = zip(operator.output_tensors[1:], operator.outputs[1:], strict=False)
        storage = self.storage(operator.input_tensors[0])
        found = [known.get((storage, self.shape(kind))) for _, kind in views]
        return None if None in found else [outputs[0], *found]

    # -- Linears -----------------------------------------------------------------------------------------------------

    def _linears(self) -> dict[int, _Linear]:
        parameters = {item.tensor: item for item in self.graph.parameters if item.tensor >= 0}
        found: dict[int, _Linear] = {}
        for position, operator in enumerate(self.graph.operators):
            if operator.backward or operator.target not in ("aten.mm.default", "aten.addmm.default"):
                continue
            left, right = (1, 2) if operator.target == "aten.addmm.default" else (0, 1)
            weight = self._transposed_parameter(operator.input_tensors[right], parameters)
            if weight is None or len(weight.shape) != 2:
                continue
            bias = parameters.get(self.source(operator.input_tensors[0], _VIEWS_AND_CASTS)) if left else None
            module = weight.name.rpartition(".")[0]
            if bias is None and left == 0:
                bias = self.graph.parameter_by_name.get(f"{module}.bias")
            found[position] = _Linear(
                position=position,
                module=module,
                left=left,
                source=self.source(operator.input_tensors[left], _VIEWS_AND_CASTS),
                weight=weight,
                bias=bias,
                splittable=self._is_linear_module(module, operator, weight, bias, left == 1),
            )
        return found

    def _transposed_parameter(self, identity: int, parameters: dict[int, Parameter]) -> Parameter | None:
        transposed = False
        while identity not in parameters:
            position = self.made_by.get(identity)
            if position is None:
                return None
            operator = self.graph.operators[position]
            name = packet_name(operator.target)
            if name in ("t", "transpose"):
                transposed = not transposed
            elif name not in ("_to_copy", "alias", "detach", "clone"):
                return None
            identity = operator.input_tensors[0]
        return parameters[identity] if transposed else None

    def _is_linear_module(
        self, module: str, product: Operator, weight: Parameter, bias: Parameter | None, fused: bool
    ) -> bool:
        """Whether `module` does what nn.Linear does and nothing else, and nobody else reads its parameters."""
        if product.module != module or weight.name != f"{module}.weight" or weight.aliases:
            return False
        if fused and bias is None:
            return False  # what is added is no parameter
        if bias is not None and (bias.name != f"{module}.bias" or bias.aliases or len(bias.shape) != 1):
            return False
        packets = [packet_name(self.graph.operators[position].target) for position in self.forward_of_module[module]]
        if not set(packets) <= _INSIDE_A_LINEAR or sum(packet in ("mm", "addmm") for packet in packets) != 1:
            return False
        return all(
            self.graph.operators[position].backward or self.graph.operators[position].module == module
            for parameter in (weight, bias)
            if parameter is not None
            for position in self.readers[parameter.tensor]
        )

    # -- suppositions ------------------------------------------------------------------------------------------------

    def blocks(self) -> list[TensorBlock]:
        known: dict[tuple[Any, ...], list[_Found]] = {}
        blocks: list[TensorBlock] = []
        for index, layer in enumerate(self.graph.layers):
            linears = [self.linears.get(position) for position in layer.forward]
            # Layers that compute the same split the same; what stands outside a layer's signature is in the key.
            key = (layer.signature, tuple(linear is not None and linear.splittable for linear in linears))
            if not layer.signature or key not in known:
                known[key] = self._search(layer)
            for found in known[key]:
                columns = [linears[place] for place in found.columns]
                rows = [linears[place] for place in found.rows]
                blocks.append(self._block(index, _present(columns), _present(rows), found.divisor))
        return blocks

    def _search(self, layer: Layer) -> list[_Found]:
        refuted: set[int] = set()
        while True:
            suppositions = self._explore(layer, refuted)
            failed = next((item for item in suppositions if not item.holds), None)
            if failed is None:
                break
            # Only the first: what failed later may have failed because of it.
            refuted.update(linear.position for linear in failed.columns)
        place = {position: index for index, position in enumerate(layer.forward)}
        return [
            _Found(
                columns=tuple(place[linear.position] for linear in item.columns),
                rows=tuple(place[linear.position] for linear in item.rows),
                divisor=item.units,
            )
            for item in suppositions
        ]

    def _explore(self, layer: Layer, refuted: set[int]) -> list[_Supposition]:
        """Follow the outputs of all Linears that may be columns through the layer; first those refuted first."""
        operators = self.graph.operators
        inside = set(layer.forward)
        shardings: dict[int, Sharding] = {}
        owner: dict[int, _Supposition] = {}
        known: _Known = {}
        current: dict[int, _Supposition] = {}  # by id(): where a supposition went when it met another
        order: list[_Supposition] = []
        failures: list[_Supposition] = []

        def resolve(item: _Supposition) -> _Supposition:
            while id(item) in current:
                item = current[id(item)]
            return item

        def fail(item: _Supposition) -> None:
            if item.holds:
                item.holds = False
                failures.append(item)

        def divide(item: _Supposition, operator: Operator, outputs: Shardings) -> None:
            for identity, kind, sharding in zip(operator.output_tensors, operator.outputs, outputs, strict=False):
                if sharding is None:
                    continue
                shardings[identity], owner[identity] = sharding, item
                known[self.storage(identity), self.shape(kind)] = sharding
                item.units = math.gcd(item.units, sharding.units(self.shape(kind)))
                leaves = any(r not in inside and not operators[r].backward for r in self.readers[identity])
                if leaves or identity in self.returned:
                    fail(item)

        for position in layer.forward:
            operator = operators[position]
            linear = self.linears.get(position)
            may_be_column = linear is not None and linear.splittable and position not in refuted
            if linear is not None and may_be_column and operator.input_tensors[linear.left] not in shardings:
                item = _Supposition(columns=[linear])
                order.append(item)
                if linear.bias is not None and linear.left == 0:  # to be added by an operator of its own
                    shardings[linear.bias.tensor], owner[linear.bias.tensor] = Sharding(0), item
                divide(item, operator, [Sharding(1)])
                continue
            met = {id(item): item for item in self._owners(operator, owner, resolve)}
            if not met:
                continue
            item, *others = met.values()
            for other in others:
                current[id(other)] = item
                item.columns += other.columns
                item.rows += other.rows
                item.units = math.gcd(item.units, other.units)
                if not other.holds:
                    fail(item)
            if not item.holds:
                continue
            inputs = [shardings.get(identity) for identity in operator.input_tensors]
            if linear is not None:
                only_left = all((sharding is not None) == (k == linear.left) for k, sharding in enumerate(inputs))
                if only_left and linear.splittable and inputs[linear.left] == Sharding(1):
                    item.rows.append(linear)
                else:
                    fail(item)
                continue
            # A tensor that each rank holds whole would get a different gradient on each.
            if any(
                sharding is None and identity in self.trained
                for identity, sharding in zip(operator.input_tensors, inputs, strict=True)
            ):
                fail(item)
                continue
            outputs = self.outputs(operator, inputs, known)
            if outputs is None or not any(outputs):
                fail(item)
                continue
            divide(item, operator, outputs)

        alive = [item for item in order if id(item) not in current]
        for item in alive:
            sources = {linear.source for linear in item.columns}
            if not item.rows or len(sources) > 1 or item.units < 2:
                fail(item)
        return [*(resolve(item) for item in failures), *(item for item in alive if item.holds)]

    @staticmethod
    def _owners(operator: Operator, owner: dict[int, _Supposition], resolve) -> Iterable[_Supposition]:
        return (resolve(owner[identity]) for identity in operator.input_tensors if identity in owner)

    def _block(self, layer: int, columns: list[_Linear], rows: list[_Linear], divisor: int) -> TensorBlock:
        parameters: dict[str, int] = {}
        for column in columns:
            parameters[column.weight.name] = 0
            if column.bias is not None:
                parameters[column.bias.name] = 0
        for row in rows:
            parameters[row.weight.name] = 1
        return TensorBlock(
            layer=layer,
            columns=tuple(column.module for column in columns),
            rows=tuple(row.module for row in rows),
            divisor=divisor,
            input=self._kind(columns[0].source, columns[0]),
            output=self.graph.operators[self.forward_of_module[rows[0].module][-1]].outputs[0],
            parameters=parameters,
        )

    def _kind(self, identity: int, linear: _Linear) -> TensorKind:
        """What the Linear reads, with its own shape if a view stands in between."""
        for position in self.readers[identity]:
            operator = self.graph.operators[position]
            return operator.inputs[operator.input_tensors.index(identity)]
        return self.graph.operators[linear.position].inputs[linear.left]

    # -- marking -----------------------------------------------------------------------------------------------------

    def marked(self, blocks: list[TensorBlock]) -> Graph:
        """The graph with these blocks, every operator that works on a divided tensor marked, forward and backward."""
        graph = self.graph
        divided: dict[int, tuple[Sharding, int]] = {}  # identity → sharding, block
        known: _Known = {}
        for index, block in enumerate(blocks):
            for name, dim in block.parameters.items():
                divided[graph.parameter_by_name[name].tensor] = (Sharding(dim), index)
        if not blocks:
            return msgspec.structs.replace(graph, blocks=())
        operators: list[Operator] = []
        for operator in graph.operators:
            parts = [divided.get(identity) for identity in operator.input_tensors]
            owners = [item[1] for item in parts if item is not None]
            if not owners:
                operators.append(operator)
                continue
            inputs = [item[0] if item else None for item in parts]
            outputs = self.outputs(operator, inputs, known)
            if outputs is None:
                outputs = _like_inputs(self.use(operator, inputs))
            outputs = [*outputs, *[None] * (len(operator.outputs) - len(outputs))]
            for identity, kind, sharding in zip(operator.output_tensors, operator.outputs, outputs, strict=False):
                if sharding is not None:
                    divided[identity] = (sharding, owners[0])
                    known[self.storage(identity), self.shape(kind)] = sharding
            operators.append(
                msgspec.structs.replace(
                    operator,
                    block=owners[0],
                    sharded_inputs=tuple(item[0].dim if item else -1 for item in parts),
                    sharded_outputs=tuple(sharding.dim if sharding else -1 for sharding in outputs),
                )
            )
        return msgspec.structs.replace(
            graph, blocks=tuple(blocks), operators=tuple(operators), layers=self._layers(divided)
        )

    def _layers(self, divided: dict[int, tuple[Sharding, int]]) -> tuple[Layer, ...]:
        """The layers with the bytes of divided tensors that backward operators read, each storage once."""
        operators = self.graph.operators
        sizes: dict[int, list[Affine]] = defaultdict(list)
        seen: set[int] = set()
        for identity in divided:
            if not any(operators[reader].backward for reader in self.readers[identity]):
                continue
            storage = self.storage(identity)
            if storage in seen or storage not in self.made_by or operators[self.made_by[storage]].backward:
                continue
            seen.add(storage)
            maker = operators[self.made_by[storage]]
            sizes[maker.layer].append(_bytes(maker.outputs[maker.output_tensors.index(storage)]))
        return tuple(
            msgspec.structs.replace(layer, saved_sharded=sum(sizes[index], start=Affine()))
            for index, layer in enumerate(self.graph.layers)
        )


def _present(items: Iterable[_Linear | None]) -> list[_Linear]:
    return [item for item in items if item is not None]


def _like_inputs(use: Use) -> Shardings:
    """For a backward operator without a rule: an output of the shape of a divided input is divided alike.

    That it can be computed without communication follows from the forward operator; only its cost is estimated here.
    """
    return [
        next((sharding for shape, sharding in zip(use.input_shapes, use.inputs) if sharding and shape == output), None)
        for output in use.output_shapes
    ]


def _bytes(kind: TensorKind) -> Affine:
    at = [kind.elements(samples) * dtype_bytes(kind.dtype) for samples in (0, 1)]
    return Affine(fixed=at[0], per_sample=at[1] - at[0])
