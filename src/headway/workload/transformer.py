"""A decoder-only transformer as a `Graph`, in closed form: from a table of sizes, without a model and without tracing.

Published measurements name a model by its sizes, and a search over a hundred models has no time to trace them. The
graph is of the kind that `workload.trace` makes, float32 as there, so that the same prediction reads both: one layer
for the embedding, `layers` equal ones (equal `signature`), one for the final norm, the projection onto the vocabulary
and the loss. Views are left out; a tensor may appear in the shapes of its views.

What a layer keeps for the backward pass depends on its kernels. In elements for each token, h = hidden, f = ffn,
k = width of keys (and of values), a = heads, s = sequence:

======================  ==================================================================================
part                    kept
======================  ==================================================================================
norm                    its input h (the residual stream), 1 or 2 statistics; RMSNorm of separate operators
                        (`fused` false) also the normalised h
query, key, value       their input h once; what enters attention: h + 2 k
attention "flash"       its output h and one float32 statistic for each head (Dao et al., NeurIPS 2022)
attention "unfused"     the softmax a s; with dropout its mask and its result too: Korthikanti's 5 a s^2 b
output projection       its input h (under "flash" the kept output itself)
MLP, GELU               input h, before and after GELU 2 f
MLP, gated              input h, gate f, up f, product f; separate operators also silu(gate) f
dropout                 one mask of h behind attention, one behind the MLP
mixture of experts      input h, the router's probabilities, and for each of the chosen experts: its input h, the
                        MLP's own as above, its result h
======================  ==================================================================================

For Megatron's layer (f = 4 h, k = h, LayerNorm, dropout, unfused attention, 16 bit) that makes the
34 s b h + 5 a s^2 b bytes of Korthikanti et al. (MLSys 2023, section 4.1), and 34 s b h with attention "flash".
A mask is counted with two bytes for each element, not its one: prediction halves the float32 sizes of a graph for
16-bit training, and one byte is what must be left.

The loss keeps the logits and their logarithmic softmax; fused, only the softmax.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

from headway.errors import FieldError
from headway.value import Value
from headway.workload.graph import (
    Affine,
    Attention,
    Experts,
    Graph,
    Layer,
    Operator,
    Parameter,
    TensorBlock,
    TensorKind,
    Unit,
)
from headway.workload.kernels import (
    elementwise,
    expert_product,
    flash_attention,
    linear,
    norm,
    parts_of,
    product,
    residual,
    rotary,
    unfused_attention,
)
from headway.workload.layer_record import (
    GRADIENT,
    INPUT,
    Block,
    LayerRecord,
    Recorded,
    Tensor,
    Use,
    constant,
    parameter_gradient,
    per_sample,
)

__all__ = ["TransformerShape", "transformer"]

_ONE_TENSOR = '[1, {"type": null, "context": null, "children_spec": []}]'  # torch's pytree of a single tensor


class TransformerShape(Value):
    """The sizes of a decoder-only transformer, and which kernels run it.

    `kv_heads` 0: as many as `heads`; `ffn` 0: 4 x hidden; `head_width` 0: hidden / heads. `positions`: "learned" adds
    a table of `sequence` rows, "rotary" turns queries and keys, "none" has no parameters and costs nothing (ALiBi).
    `experts` > 0 puts a mixture in place of every MLP: `experts_chosen` of them for each token, `expert_ffn` wide
    (0: `ffn`). `packed`: query, key and value in one product, and gate and up in one (Megatron). `fused`: norms,
    rotation, activation, dropout with the residual sum, softmax with its mask, and the loss are one kernel each, and
    what they can compute again is not kept.
    """

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    sequence: int
    kv_heads: int = 0
    ffn: int = 0
    head_width: int = 0
    gated: bool = False
    tied: bool = False
    biases: bool = True
    positions: Literal["learned", "rotary", "none"] = "learned"
    norm: Literal["layer", "rms"] = "layer"
    dropout: bool = False
    experts: int = 0
    experts_chosen: int = 0
    expert_ffn: int = 0
    attention: Literal["flash", "unfused"] = "flash"
    fused: bool = False
    packed: bool = False

    def completed(self, *, place: str = "transformer") -> TransformerShape:
        """This shape with every 0 that stands for a default filled in. Raises FieldError naming the field."""
        for field in ("layers", "hidden", "heads", "vocabulary", "sequence"):
            if getattr(self, field) < 1:
                raise FieldError(f"must be at least 1, not {getattr(self, field)}", place=f"{place}: {field}")
        for field in ("kv_heads", "ffn", "head_width", "experts", "experts_chosen", "expert_ffn"):
            if getattr(self, field) < 0:
                raise FieldError(f"must not be negative, and is {getattr(self, field)}", place=f"{place}: {field}")
        if not self.head_width and self.hidden % self.heads:
            raise FieldError(
                f"{self.heads} heads do not divide hidden = {self.hidden}", place=f"{place}: heads",
                remedy="give head_width if heads are not hidden / heads wide",
            )  # fmt: skip
        kv_heads = self.kv_heads or self.heads
        if self.heads % kv_heads:
            raise FieldError(f"{kv_heads} do not divide {self.heads} heads", place=f"{place}: kv_heads")
        if bool(self.experts) != bool(self.experts_chosen) or self.experts_chosen > self.experts:
            raise FieldError(
                f"{self.experts_chosen} of {self.experts} experts", place=f"{place}: experts_chosen",
                remedy="at least 1 and at most `experts`, or both 0",
            )  # fmt: skip
        ffn = self.ffn or 4 * self.hidden
        return msgspec.structs.replace(
            self,
            kv_heads=kv_heads,
            ffn=ffn,
            head_width=self.head_width or self.hidden // self.heads,
            expert_ffn=(self.expert_ffn or ffn) if self.experts else 0,
        )


def transformer(shape: TransformerShape, name: str = "transformer") -> Graph:
    """The graph of one training step of the model of this shape: see the module's docstring.

    Tensor parallelism finds a block in attention, one in the MLP (or the experts), and one each in the embedding and
    the projection, which are divided by vocabulary (Shoeybi et al., arXiv:1909.08053, section 3): the embedding is a
    row (its output is summed, nothing follows in backward), the projection a column whose forward sum is three numbers
    for each token, for the loss. A degree that does not divide the vocabulary leaves these two whole: pad it first.

    Raises FieldError naming the field of the shape that cannot be.
    """
    shape = shape.completed(place=name)
    digest = hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(shape, layers=1))).hexdigest()[:16]
    parts = _Assembly(name, shape)
    parts.add(_embedding(shape), "", f"embedding {digest}", "embedding", 1)
    parts.add(_block(shape), "layers.{}.", f"block {digest}", "layers.{}", shape.layers)
    parts.add(_head(shape), "", f"head {digest}", "norm", 1)
    return parts.graph()


# -- the parts of a layer ---------------------------------------------------------------------------------------------


def _attention(layer: LayerRecord, x: Tensor) -> Tensor:
    shape = layer.shape
    width, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    # A single head of keys and values cannot be divided, and with it attention.
    divided = shape.kv_heads > 1
    into, out_of = ("column", "row") if divided else ("", "")
    layer.block = len(layer.blocks) if divided else -1
    if shape.packed:
        columns = ("qkv",)
        packed = linear(layer, x, "qkv", width + 2 * keys, into, shape.biases)
        q, k, v = parts_of(layer, packed, [width, keys, keys])
    else:
        columns = ("query", "key", "value")
        sizes = (width, keys, keys)
        q, k, v = (linear(layer, x, name, size, into, shape.biases)
                   for name, size in zip(columns, sizes, strict=True))  # fmt: skip
    if shape.positions == "rotary":
        table = constant(1, 1, shape.sequence, shape.head_width)
        tables = (Use(layer.number(), table), Use(layer.number(), table))
        q, k = rotary(layer, q, tables, "attention"), rotary(layer, k, tables, "attention")
    if shape.attention == "flash":
        y = flash_attention(layer, q, k, v, "attention")
    else:
        y = unfused_attention(layer, q, k, v, "attention")
    layer.attention = Attention(
        core_saved=layer.attention.core_saved if layer.attention else Affine(),
        core_flop=Affine(0.0, 4.0 * shape.sequence**2 * width),
        keys_values=Affine(0.0, 4.0 * 2 * keys * shape.sequence),
    )
    out = linear(layer, y, "output", shape.hidden, out_of, shape.biases)
    layer.block = -1
    if divided:
        _add_block(layer, columns, "output", shape.kv_heads)
    return out


def _add_block(layer: LayerRecord, columns: tuple[str, ...], row: str, divisor: int) -> None:
    """What tensor parallelism divides together: columns with their biases, and the row that adds up."""
    parameters = {f"{name}.weight": 0 for name in columns} | {f"{row}.weight": 1}
    if layer.shape.biases:
        parameters |= {f"{name}.bias": 0 for name in columns}
    stream = per_sample(layer.shape.sequence, layer.shape.hidden)
    layer.blocks.append(Block(columns, (row,), divisor, stream, stream, parameters))


def _activated(layer: LayerRecord, gate: Tensor | None, up: Tensor, module: str = "mlp") -> Tensor:
    """GELU of `up`, or silu(gate) x up (Shazeer, arXiv:2002.05202)."""
    if gate is None:
        return elementwise(layer, "gelu", module, [up], [up])
    if layer.shape.fused:
        return elementwise(layer, "fused.swiglu", module, [gate, up], [gate, up])
    return product(layer, elementwise(layer, "silu", module, [gate], [gate]), up, module)


def _mlp(layer: LayerRecord, x: Tensor) -> Tensor:
    shape = layer.shape
    layer.block = len(layer.blocks)
    gate = None
    if shape.gated and shape.packed:
        columns = ("gate_up",)
        gate, up = parts_of(
            layer, linear(layer, x, "gate_up", 2 * shape.ffn, "column", shape.biases), [shape.ffn, shape.ffn]
        )
    else:
        columns = ("gate", "up") if shape.gated else ("up",)
        gate = linear(layer, x, "gate", shape.ffn, "column", shape.biases) if shape.gated else None
        up = linear(layer, x, "up", shape.ffn, "column", shape.biases)
    out = linear(layer, _activated(layer, gate, up), "down", shape.hidden, "row", shape.biases)
    layer.block = -1
    _add_block(layer, columns, "down", shape.ffn)
    return out


def _mixture(layer: LayerRecord, x: Tensor) -> Tensor:
    """A router, then the chosen experts' MLPs on copies of the tokens (Shazeer et al., ICLR 2017), then their sum."""
    shape, whole = layer.shape, layer.whole
    tokens = shape.sequence * shape.experts_chosen
    logits = linear(layer, x, "router", shape.experts)
    weights = elementwise(layer, "_softmax", "router", [logits], [])
    layer.keep(weights)
    layer.block = len(layer.blocks)
    sent = layer.tensor(shape.hidden, tokens=tokens)
    layer.run("index_select", "experts", [whole(x)], [whole(sent)])

    def gathered() -> None:
        back = whole(layer.tensor(shape.hidden))
        layer.run("index_add", "experts", [whole(layer.gradient(sent))], [back])
        layer.arrive(x, back, "experts")

    layer.differentiate(gathered)
    gate = expert_product(layer, sent, "experts.gate", shape.expert_ffn, "column") if shape.gated else None
    up = expert_product(layer, sent, "experts.up", shape.expert_ffn, "column")
    result = expert_product(layer, _activated(layer, gate, up, "experts"), "experts.down", shape.hidden, "row")
    y = layer.tensor(shape.hidden)
    layer.run("index_add", "experts", [whole(result), whole(weights)], [whole(y)])
    layer.keep(result)

    def summed() -> None:
        back, of_weights = whole(layer.tensor(shape.hidden, tokens=tokens)), whole(layer.tensor(shape.experts))
        given = [whole(layer.gradient(y)), whole(result), whole(weights)]
        layer.run("fused.weighted_sum_backward.default", "experts", given, [back, of_weights])
        layer.arrive(result, back, "experts")
        layer.arrive(weights, of_weights, "experts")

    layer.differentiate(summed)
    layer.block = -1
    columns = ("experts.gate", "experts.up") if shape.gated else ("experts.up",)
    names = tuple(f"{name}.weight" for name in (*columns, "experts.down"))
    layer.experts = (names, 4.0 * tokens * shape.hidden)
    split = dict.fromkeys(names[:-1], 1) | {names[-1]: 2}
    stream = per_sample(shape.sequence, shape.hidden)
    layer.blocks.append(Block(columns, ("experts.down",), shape.expert_ffn, stream, stream, split))
    return y


# -- the three kinds of layer -----------------------------------------------------------------------------------------


def _embedding(shape: TransformerShape) -> LayerRecord:
    layer = LayerRecord(shape)
    s, h = shape.sequence, shape.hidden
    ids = Use(INPUT, TensorKind((0, s), (1, 0), "int64"))
    weight = layer.parameter("embedding.weight", shape.vocabulary, h)
    x = layer.tensor(h)
    layer.block = 0
    layer.run("embedding", "embedding", [Use(weight, constant(shape.vocabulary, h), 0), ids], [layer.whole(x)],
              reads=("embedding.weight",))  # fmt: skip
    # What backward would sum is the gradient of token numbers: nothing.
    nothing = TensorKind((0, 0), (1, 0), "int64")
    layer.blocks.append(Block((), ("embedding",), shape.vocabulary, nothing, per_sample(s, h), {"embedding.weight": 0}))

    def of_tokens() -> None:
        gradient = Use(parameter_gradient(layer), constant(shape.vocabulary, h), 0)
        layer.run("embedding_dense_backward", "embedding", [layer.whole(layer.gradient(x)), ids], [gradient],
                  numbers=(shape.vocabulary, -1, False))  # fmt: skip

    layer.differentiate(of_tokens)
    layer.block = -1
    y = x
    if shape.positions == "rotary":
        layer.fixed_saved = 2.0 * 4 * s * shape.head_width  # the tables that turn queries and keys
    if shape.positions == "learned":
        where = Use(layer.number(), constant(s, dtype="int64"))
        table = layer.parameter("position.weight", s, h)
        rows = Use(layer.number(), constant(s, h))
        y = layer.tensor(h)
        layer.fixed_saved = 8.0 * s  # the positions
        layer.run("embedding", "position", [Use(table, constant(s, h)), where], [rows], reads=("position.weight",))
        layer.run("aten.add.Tensor", "", [layer.whole(x), rows], [layer.whole(y)])

        def of_positions() -> None:
            given = layer.whole(layer.gradient(y))
            total = Use(layer.number(), constant(1, s, h))
            layer.run("aten.sum.dim_IntList", "", [given], [total], numbers=([0], True))
            layer.run("embedding_dense_backward", "position", [total._replace(kind=constant(s, h)), where],
                      [Use(parameter_gradient(layer), constant(s, h))], numbers=(s, -1, False))  # fmt: skip
            layer.arrive(x, given, "")

        layer.differentiate(of_positions)
    if shape.dropout:
        z = layer.tensor(h)
        mask = Use(layer.number(), TensorKind((0, s, 2 * h), (1, 0, 0), "bool"))
        before = y
        layer.run("native_dropout", "", [layer.whole(before)], [layer.whole(z), mask], numbers=(0.1, True))
        layer.keep(mask)

        def of_dropout() -> None:
            back = layer.whole(layer.tensor(h))
            layer.run("native_dropout_backward", "", [layer.whole(layer.gradient(z)), mask], [back])
            layer.arrive(before, back, "")

        layer.differentiate(of_dropout)
        y = z
    layer.finish(y)
    return layer


def _block(shape: TransformerShape) -> LayerRecord:
    layer = LayerRecord(shape)
    x = layer.input
    x = residual(layer, x, _attention(layer, norm(layer, x, "norm_attention")))
    y = norm(layer, x, "norm_mlp")
    layer.finish(residual(layer, x, _mixture(layer, y) if shape.experts else _mlp(layer, y)))
    return layer


def _head(shape: TransformerShape) -> LayerRecord:
    layer = LayerRecord(shape)
    s, v = shape.sequence, shape.vocabulary
    x = norm(layer, layer.input, "norm")
    layer.block = 0
    name = "embedding.weight" if shape.tied else "head.weight"
    logits = linear(layer, x, "head", v, "column", weight_name=name)
    three = per_sample(s, 3)  # the largest logit of each token, the sum of exponentials, the target's logit
    layer.blocks.append(Block(("head",), (), v, per_sample(s, shape.hidden), three, {name: 0}))
    loss = Use(layer.number(), constant())
    soft = layer.tensor(v, True)
    targets = Use(layer.number(), TensorKind((0,), (s,), "int64"))
    count = Use(layer.number(), constant())
    if shape.fused:
        layer.run("fused.cross_entropy.default", "(loss)", [layer.flat(logits), targets], [loss, layer.flat(soft)])
    else:
        layer.run("_log_softmax", "(loss)", [layer.flat(logits)], [layer.flat(soft)], numbers=(1, False))
        layer.run("nll_loss_forward", "(loss)", [layer.flat(soft), targets], [loss, count])
        layer.keep(logits, loss=True)
    layer.keep(soft, loss=True)

    def of_loss() -> None:
        back = layer.tensor(v, True)
        if shape.fused:
            layer.run("fused.cross_entropy_backward.default", "(loss)", [loss, layer.flat(soft), targets],
                      [layer.flat(back)])  # fmt: skip
        else:
            middle = layer.flat(layer.tensor(v, True))
            layer.run("nll_loss_backward", "(loss)", [loss, layer.flat(soft), targets, count], [middle])
            layer.run("_log_softmax_backward_data", "(loss)", [middle, layer.flat(soft)], [layer.flat(back)],
                      numbers=(1, {"dtype": "float32"}))  # fmt: skip
        layer.arrive(logits, layer.whole(back), "(loss)")

    layer.differentiate(of_loss)
    layer.finish(layer.input, gradient=-1)
    layer.output = logits
    return layer


# -- many layers, one graph -------------------------------------------------------------------------------------------


class _Assembly:
    """Puts layers behind each other: numbers their tensors, names their modules, orders forward and backward."""

    def __init__(self, name: str, shape: TransformerShape) -> None:
        self.name = name
        self.shape = shape
        self.ids = 0  # the model's input
        self._next = 1
        self._parts: list[tuple[LayerRecord, str, str, str, list[int]]] = []
        self._parameters: dict[str, Parameter] = {}
        self._stream = self.ids

    def add(self, layer: LayerRecord, prefix: str, signature: str, entry: str, times: int) -> None:
        for index in range(times):
            own = prefix.format(index)
            tensors = list(range(self._next - 2, self._next - 2 + layer.tensors))
            self._next += layer.tensors - 2
            for local, at in layer.parameter_tensors.items():
                known = self._parameters.get(own + local)
                if known is None:
                    self._parameters[own + local] = Parameter(
                        name=own + local, shape=layer.parameters[local], dtype="float32", layer=len(self._parts),
                        tensor=tensors[at],
                        aliases=("head.weight",) if self.shape.tied and local == "embedding.weight" else (),
                    )  # fmt: skip
                else:
                    tensors[at] = known.tensor
            tensors[INPUT] = self._stream
            self._stream = tensors[layer.output.at]
            self._parts.append((layer, own, signature, entry.format(index), tensors))

    def graph(self) -> Graph:
        operators: list[Operator] = []
        forward: list[tuple[int, ...]] = []
        backward: list[tuple[int, ...]] = [()] * len(self._parts)
        starts: list[int] = []
        blocks: list[TensorBlock] = []
        for position, (layer, prefix, _, _, _) in enumerate(self._parts):
            starts.append(len(blocks))
            for block in layer.blocks:
                blocks.append(
                    TensorBlock(
                        layer=position,
                        columns=tuple(prefix + name for name in block.columns),
                        rows=tuple(prefix + name for name in block.rows),
                        divisor=block.divisor,
                        input=block.input,
                        output=block.output,
                        parameters={prefix + name: dim for name, dim in block.parameters.items()},
                    )
                )
            forward.append(self._place(operators, position, layer.forward, False, starts[-1]))
        gradient = -1
        for position in range(len(self._parts) - 1, -1, -1):
            layer, _, _, _, tensors = self._parts[position]
            tensors[GRADIENT] = gradient
            backward[position] = self._place(operators, position, layer.backward, True, starts[position])
            gradient = tensors[layer.input_gradient] if layer.input_gradient >= 0 else -1
        layers = self._layers(forward, backward)
        return Graph(
            name=self.name,
            operators=tuple(operators),
            layers=tuple(layers),
            parameters=tuple(self._parameters.values()),
            units=tuple(self._units()),
            inputs=(TensorKind((0, self.shape.sequence), (1, 0), "int64"),),
            input_tensors=(self.ids,),
            output_tensors=(self._stream,),
            blocks=tuple(blocks),
            tokens_per_sample=self.shape.sequence,
            loss_saved=self._parts[-1][0].loss_bytes(),
        )

    def _place(
        self, operators: list[Operator], position: int, recorded: list[Recorded], backward: bool, first_block: int
    ) -> tuple[int, ...]:
        """Append the operators of one layer with their names and tensors in the model; their positions."""
        _, prefix, _, _, tensors = self._parts[position]
        start = len(operators)
        for one in recorded:
            module = one.module if one.module == "(loss)" else (prefix + one.module).removesuffix(".")
            operators.append(
                Operator(
                    one.target, module, position, backward, one.inputs, one.outputs,
                    tuple([tensors[at] for at in one.input_tensors]), tuple([tensors[at] for at in one.output_tensors]),
                    one.arguments, {}, one.flop, False, tuple([prefix + name for name in one.reads]),
                    first_block + one.block if one.block >= 0 else -1, one.sharded_inputs, one.sharded_outputs,
                )
            )  # fmt: skip
        return tuple(range(start, len(operators)))

    def _layers(self, forward: list[tuple[int, ...]], backward: list[tuple[int, ...]]) -> list[Layer]:
        stream = per_sample(self.shape.sequence, self.shape.hidden)
        facts: dict[int, tuple] = {}
        made: list[Layer] = []
        for position, (layer, prefix, signature, entry, _) in enumerate(self._parts):
            known = facts.get(id(layer))
            if known is None:
                flops = (Affine(0.0, sum(one.flop.per_sample for one in side))
                         for side in (layer.forward, layer.backward))  # fmt: skip
                known = facts[id(layer)] = (*flops, *layer.saved(), *layer.extras())
            forward_flop, backward_flop, saved, divided, there, back = known
            experts = None
            if layer.experts:
                names, sent = layer.experts
                experts = Experts(
                    self.shape.experts, self.shape.experts_chosen, tuple(prefix + name for name in names),
                    Affine(0.0, sent),
                )  # fmt: skip
            made.append(
                Layer(
                    name=prefix.removesuffix(".") or entry,
                    entry_module=entry if position else "",
                    entry_argument=0,
                    forward=forward[position],
                    backward=backward[position],
                    parameters=tuple(prefix + name for name in layer.parameters),
                    forward_flop=forward_flop,
                    backward_flop=backward_flop,
                    saved=saved,
                    saved_sharded=divided,
                    output=layer.whole(layer.output).kind,
                    input=stream if position else None,
                    forward_peak_extra=there,
                    backward_peak_extra=back,
                    signature=signature,
                    attention=layer.attention,
                    experts=experts,
                )
            )
        return made

    def _units(self) -> list[Unit]:
        stream = per_sample(self.shape.sequence, self.shape.hidden)
        last = len(self._parts) - 1
        units = [Unit("embedding", 0, (stream,), _ONE_TENSOR)]
        if self.shape.positions == "learned":
            units.append(Unit("position", 0, (constant(self.shape.sequence, self.shape.hidden),), _ONE_TENSOR))
        units += [Unit(self._parts[at][3], at, (stream,), _ONE_TENSOR) for at in range(1, last)]
        units.append(Unit("norm", last, (stream,), _ONE_TENSOR))
        units.append(Unit("head", last, (per_sample(self.shape.sequence, self.shape.vocabulary),), _ONE_TENSOR))
        return units
