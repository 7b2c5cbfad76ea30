"""The kernels that a transformer layer is made of: what each computes, what it keeps, and what its backward pass does.

A `LayerRecord` writes one layer down operator by operator, as a tracer would have seen it: each function here adds the
operators of one kernel, says what backward needs, and how it is differentiated; `LayerRecord.finish` then runs the
backward pass. Tensors and modules are named within the layer, so that one record stands for all equal layers of a
model. `workload.transformer` makes layers of these and puts them behind each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

from headway.workload.graph import Affine, Attention, TensorKind

if TYPE_CHECKING:
    from headway.workload.transformer import TransformerShape

__all__ = [
    "GRADIENT",
    "INPUT",
    "Block",
    "LayerRecord",
    "Recorded",
    "Tensor",
    "Use",
    "constant",
    "elementwise",
    "expert_product",
    "flash_attention",
    "linear",
    "norm",
    "parameter_gradient",
    "parts_of",
    "per_sample",
    "product",
    "residual",
    "rotary",
    "unfused_attention",
]

# -- one layer, recorded forward and differentiated backward ----------------------------------------------------------


class Tensor(NamedTuple):
    """A tensor of a layer: for each of `tokens` tokens of a sample `width` numbers; the width divided, or not."""

    at: int
    width: int
    sharded: bool = False
    tokens: int = 0


class Use(NamedTuple):
    """A tensor as one operator sees it: which one, in what shape, and the dimension divided among tensor ranks."""

    at: int
    kind: TensorKind
    dim: int = -1


class Recorded(NamedTuple):
    """An operator of a layer; tensors are numbered within the layer, modules named without its prefix."""

    target: str
    module: str
    inputs: tuple[TensorKind, ...]
    outputs: tuple[TensorKind, ...]
    input_tensors: tuple[int, ...]
    output_tensors: tuple[int, ...]
    arguments: tuple
    flop: Affine
    reads: tuple[str, ...]
    block: int
    sharded_inputs: tuple[int, ...]
    sharded_outputs: tuple[int, ...]


class Block(NamedTuple):
    """A `TensorBlock` of a layer, its names without the layer's prefix."""

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    divisor: int
    input: TensorKind
    output: TensorKind
    parameters: dict[str, int]


INPUT, GRADIENT = 0, 1  # a layer's tensors that come from its neighbours


class LayerRecord:
    """Records one layer: operators forward, and how each is differentiated; `finish` runs that backward.

    Gradients of a tensor that is used twice are added up, as autograd does. `keep` names what backward needs.
    """

    def __init__(self, shape: TransformerShape) -> None:
        self.shape = shape
        self.forward: list[Recorded] = []
        self.backward: list[Recorded] = []
        self.blocks: list[Block] = []
        self.parameters: dict[str, tuple[int, ...]] = {}
        self.parameter_tensors: dict[str, int] = {}
        self.attention: Attention | None = None
        self.experts: tuple[tuple[str, ...], float] | None = None
        self.loss_saved = 0.0
        self.fixed_saved = 0.0
        self.input = Tensor(INPUT, shape.hidden, tokens=shape.sequence)
        self.output = self.input
        self._sizes: dict[int, float] = {INPUT: 0.0, GRADIENT: 4.0 * shape.sequence * shape.hidden}
        self._kept: dict[int, bool] = {}  # tensor → whether it is divided
        self._loss_kept: set[int] = set()
        self._steps: list[Callable[[], None]] = []  # the backward pass, to be run from the last to the first
        self._gradients: dict[int, Use] = {}
        self._next = 2
        self._into = self.forward
        self.block = -1

    # -- tensors

    def tensor(self, width: int, sharded: bool = False, tokens: int = 0) -> Tensor:
        """A new tensor of this layer."""
        return Tensor(self.number(), width, sharded, tokens or self.shape.sequence)

    def number(self) -> int:
        """The number of a new tensor."""
        self._next += 1
        return self._next - 1

    @property
    def tensors(self) -> int:
        """How many tensors have been numbered."""
        return self._next

    def parameter(self, name: str, *shape: int) -> int:
        """The tensor of a parameter of this layer, which is made at its first mention."""
        if name not in self.parameters:
            self.parameters[name] = shape
            self.parameter_tensors[name] = self.number()
        return self.parameter_tensors[name]

    def whole(self, tensor: Tensor) -> Use:
        """As (samples, tokens, width)."""
        return Use(tensor.at, per_sample(tensor.tokens, tensor.width), 2 if tensor.sharded else -1)

    def flat(self, tensor: Tensor) -> Use:
        """As (samples x tokens, width)."""
        return Use(tensor.at, TensorKind((0, tensor.width), (tensor.tokens, 0), "float32"), 1 if tensor.sharded else -1)

    def heads(self, tensor: Tensor) -> Use:
        """As (samples, heads, tokens, head width)."""
        width = self.shape.head_width
        kind = per_sample(tensor.width // width, tensor.tokens, width)
        return Use(tensor.at, kind, 1 if tensor.sharded else -1)

    def statistic(self, width: int = 1) -> Use:
        """A new tensor of `width` float32 numbers for each token."""
        return Use(self.number(), per_sample(self.shape.sequence, width))

    def keep(self, *uses: Use | Tensor, loss: bool = False) -> None:
        """Backward needs these. What the loss keeps is counted apart."""
        for use in uses:
            if use.at == INPUT or use.at in self.parameter_tensors.values():
                continue
            if loss:
                self._loss_kept.add(use.at)
            else:
                self._kept[use.at] = use.sharded if isinstance(use, Tensor) else use.dim >= 0

    # -- operators

    def run(
        self, target: str, module: str, inputs: list[Use], outputs: list[Use], flop: float = 0.0,
        reads: tuple[str, ...] = (), numbers: tuple = (),
    ) -> None:  # fmt: skip
        """Record an operator. `numbers`: arguments behind the tensors."""
        for use in outputs:
            self._sizes.setdefault(use.at, float(use.kind.bytes(1)))
        sharded = self.block >= 0 and any(use.dim >= 0 for use in (*inputs, *outputs))
        self._into.append(
            Recorded(
                target=target if "." in target else f"aten.{target}.default",
                module=module,
                inputs=tuple(use.kind for use in inputs),
                outputs=tuple(use.kind for use in outputs),
                input_tensors=tuple(use.at for use in inputs),
                output_tensors=tuple(use.at for use in outputs),
                arguments=(*({"tensor": at} for at in range(len(inputs))), *numbers),
                flop=Affine(per_sample=flop),
                reads=reads,
                block=self.block if sharded else -1,
                sharded_inputs=tuple(use.dim for use in inputs) if sharded else (),
                sharded_outputs=tuple(use.dim for use in outputs) if sharded else (),
            )
        )

    def differentiate(self, step: Callable[[], None]) -> None:
        """`step` runs in the backward pass, in the block of now."""
        block = self.block

        def there() -> None:
            self.block = block
            step()

        self._steps.append(there)

    def gradient(self, tensor: Tensor) -> Tensor:
        """The gradient that has arrived at a tensor."""
        return tensor._replace(at=self._gradients[tensor.at].at)

    def arrive(self, tensor: Tensor, gradient: Use, module: str) -> None:
        """A gradient for a tensor: added to what came before it."""
        before = self._gradients.get(tensor.at)
        if before is not None:
            total = self.whole(tensor._replace(at=self.number()))
            self.run("aten.add.Tensor", module, [self.whole(tensor._replace(at=before.at)),
                                                 self.whole(tensor._replace(at=gradient.at))], [total])  # fmt: skip
            gradient = total
        self._gradients[tensor.at] = gradient

    def finish(self, output: Tensor, gradient: int = GRADIENT) -> None:
        """The layer ends with `output`; `gradient` arrives there."""
        self.output = output
        self.keep(output)  # the norm with which the next layer begins needs it
        self.block = -1
        self._into = self.backward
        if gradient != GRADIENT:
            self._sizes[GRADIENT] = 0.0
        else:
            self._gradients[output.at] = self.whole(output)._replace(at=GRADIENT)
        for step in reversed(self._steps):
            step()

    # -- what becomes of it

    @property
    def input_gradient(self) -> int:
        """The tensor that goes to the layer before as the gradient of its output; -1 for none."""
        use = self._gradients.get(INPUT)
        return use.at if use else -1

    def saved(self) -> tuple[Affine, Affine]:
        """Bytes kept for backward, and those of them that tensor parallelism divides."""
        everything = sum(self._sizes[at] for at in self._kept)
        divided = sum(self._sizes[at] for at, sharded in self._kept.items() if sharded)
        return Affine(self.fixed_saved, everything), Affine(0.0, divided)

    def loss_bytes(self) -> Affine:
        """Bytes that the loss keeps."""
        return Affine(0.0, sum(self._sizes[at] for at in self._loss_kept))

    def extras(self) -> tuple[Affine, Affine]:
        """Most bytes alive at once above what is kept, forward and backward, gradients of parameters left out."""
        kept = {**self._kept, **dict.fromkeys(self._loss_kept, False)}
        above = sum(self._sizes[at] for at in kept)
        parameters = set(self.parameter_tensors.values())
        peaks = []
        # When this layer goes backward, the next one has released what this one handed to it.
        released = {GRADIENT, *kept} - {self.output.at}
        for operators, alive in ((self.forward, {INPUT}), (self.backward, released)):
            last = {at: position for position, one in enumerate(operators)
                    for at in (*one.input_tensors, *one.output_tensors)}  # fmt: skip
            stays = set(kept) if operators is self.forward else {self.input_gradient}
            live = sum(self._sizes.get(at, 0.0) for at in alive)
            peak = live
            for position, one in enumerate(operators):
                for at in one.output_tensors:
                    if at not in alive and at not in parameters:
                        alive.add(at)
                        live += self._sizes[at]
                peak = max(peak, live)
                for at in {*one.input_tensors, *one.output_tensors}:
                    if last[at] == position and at in alive and at not in stays:
                        alive.discard(at)
                        live -= self._sizes.get(at, 0.0)
            peaks.append(Affine(0.0, max(0.0, peak - above)))
        return peaks[0], peaks[1]


def per_sample(*shape: int) -> TensorKind:
    """A float32 tensor of this shape for each sample, the samples as dimension 0."""
    return TensorKind((0, *shape), (1, *(0 for _ in shape)), "float32")


def constant(*shape: int, dtype: str = "float32") -> TensorKind:
    """A tensor whose shape does not depend on the samples."""
    return TensorKind(shape, tuple(0 for _ in shape), dtype)


# -- kernels ----------------------------------------------------------------------------------------------------------


def linear(
    layer: LayerRecord, x: Tensor, module: str, width: int, split: Literal["column", "row", ""] = "",
    bias: bool = False, weight_name: str = "",
) -> Tensor:  # fmt: skip
    """x W + b, forward and backward; keeps x."""
    name = weight_name or f"{module}.weight"
    weight = layer.parameter(name, width, x.width)
    y = layer.tensor(width, split == "column", x.tokens)
    column, row = split == "column", split == "row"
    flop = 2.0 * x.tokens * x.width * width
    inputs = [layer.flat(x), Use(weight, constant(x.width, width), 1 if column else 0 if row else -1)]
    if bias:
        added = layer.parameter(f"{module}.bias", width)
        inputs.insert(0, Use(added, constant(width), 0 if column else -1))
    reads = (f"{module}.bias", name) if bias else (name,)
    layer.run("addmm" if bias else "mm", module, inputs, [layer.flat(y)], flop, reads)
    layer.keep(x)

    def backward() -> None:
        given = layer.gradient(y)
        back = layer.tensor(x.width, x.sharded, x.tokens)
        transposed = Use(weight, constant(width, x.width), 0 if column else 1 if row else -1)
        layer.run("mm", module, [layer.flat(given), transposed], [layer.flat(back)], flop, (name,))
        turned = TensorKind((width, 0), (0, x.tokens), "float32")
        of_weight = Use(parameter_gradient(layer), constant(width, x.width), 0 if column else 1 if row else -1)
        layer.run("mm", module, [Use(given.at, turned, 0 if column else -1), layer.flat(x)], [of_weight], flop)
        if bias:
            of_bias = Use(parameter_gradient(layer), constant(1, width), 1 if column else -1)
            layer.run("aten.sum.dim_IntList", module, [layer.flat(given)], [of_bias], numbers=([0], True))
        layer.arrive(x, layer.whole(back), module)

    layer.differentiate(backward)
    return y


def parameter_gradient(layer: LayerRecord) -> int:
    """A new tensor that holds the gradient of a parameter: counted with the gradients, not with what is alive."""
    at = layer.number()
    layer._sizes[at] = 0.0
    return at


def norm(layer: LayerRecord, x: Tensor, module: str) -> Tensor:
    """LayerNorm or RMSNorm; keeps x and the statistics."""
    shape = layer.shape
    weight = Use(layer.parameter(f"{module}.weight", x.width), constant(x.width))
    y = layer.tensor(x.width)
    scale = layer.statistic()
    reads = (f"{module}.weight",)
    layer.keep(x, scale)
    inputs, means, own = [weight], [], [Use(parameter_gradient(layer), constant(x.width))]
    if shape.norm == "rms" and not shape.fused:
        return _separate_rms_norm(layer, x, y, weight, scale, module)
    if shape.norm == "layer":
        reads = (*reads, f"{module}.bias")
        inputs.append(Use(layer.parameter(f"{module}.bias", x.width), constant(x.width)))
        means.append(layer.statistic())
        own.append(Use(parameter_gradient(layer), constant(x.width)))
        layer.keep(*means)
    target = "native_layer_norm" if shape.norm == "layer" else "_fused_rms_norm"
    layer.run(target, module, [layer.whole(x), *inputs], [layer.whole(y), *means, scale], reads=reads,
              numbers=([x.width], 1e-5))  # fmt: skip

    def backward() -> None:
        back = layer.whole(layer.tensor(x.width))
        given = [layer.whole(layer.gradient(y)), layer.whole(x), *means, scale, *inputs]
        layer.run(f"{target}_backward", module, given, [back, *own], reads=reads)
        layer.arrive(x, back, module)

    layer.differentiate(backward)
    return y


def _separate_rms_norm(layer: LayerRecord, x: Tensor, y: Tensor, weight: Use, scale: Use, module: str) -> Tensor:
    """RMSNorm as the operators that eager PyTorch runs; keeps the normalised tensor as well."""
    whole, name = layer.whole, (f"{module}.weight",)
    square, normal = layer.tensor(x.width), layer.tensor(x.width)
    mean, shifted = layer.statistic(), layer.statistic()
    layer.run("aten.pow.Tensor_Scalar", module, [whole(x)], [whole(square)], numbers=(2,))
    layer.run("aten.mean.dim", module, [whole(square)], [mean], numbers=([-1], True))
    layer.run("aten.add.Tensor", module, [mean], [shifted], numbers=(1e-6,))
    layer.run("rsqrt", module, [shifted], [scale])
    layer.run("aten.mul.Tensor", module, [whole(x), scale], [whole(normal)])
    layer.run("aten.mul.Tensor", module, [weight, whole(normal)], [whole(y)], reads=name)
    layer.keep(normal)

    def backward() -> None:
        given = whole(layer.gradient(y))
        made = [layer.tensor(x.width) for _ in range(8)]
        scaled, product, along, direct, spread, power, double, through = map(whole, made)
        small, cube, twice, slope = (layer.statistic() for _ in range(4))
        mul = "aten.mul.Tensor"
        layer.run(mul, module, [given, weight], [scaled], reads=name)
        layer.run(mul, module, [given, whole(normal)], [product])
        layer.run("aten.sum.dim_IntList", module, [product], [Use(parameter_gradient(layer), constant(1, 1, x.width))],
                  numbers=([0, 1], True))  # fmt: skip
        layer.run(mul, module, [scaled, whole(x)], [along])
        layer.run(mul, module, [scaled, scale], [direct])
        layer.run("aten.sum.dim_IntList", module, [along], [small], numbers=([2], True))
        layer.arrive(x, direct, module)
        layer.run("aten.pow.Tensor_Scalar", module, [scale], [cube], numbers=(3,))
        layer.run("aten.mul.Scalar", module, [small], [twice], numbers=(-0.5,))
        layer.run(mul, module, [twice, cube], [slope])
        layer.run("aten.div.Scalar", module, [slope._replace(kind=whole(x).kind)], [spread], numbers=(x.width,))
        layer.run("aten.pow.Tensor_Scalar", module, [whole(x)], [power], numbers=(1.0,))
        layer.run("aten.mul.Scalar", module, [power], [double], numbers=(2.0,))
        layer.run(mul, module, [spread, double], [through])
        layer.arrive(x, through, module)

    layer.differentiate(backward)
    return y


def elementwise(layer: LayerRecord, target: str, module: str, inputs: list[Tensor], kept: list[Tensor]) -> Tensor:
    """One kernel that makes a tensor as wide as its last input; its backward reads `kept` and the gradient."""
    y = layer.tensor(inputs[-1].width, inputs[-1].sharded, inputs[-1].tokens)
    layer.run(target, module, [layer.whole(one) for one in inputs], [layer.whole(y)])
    layer.keep(*kept)

    def backward() -> None:
        backs = [layer.whole(layer.tensor(one.width, one.sharded, one.tokens)) for one in inputs]
        given = [layer.whole(layer.gradient(y)), *map(layer.whole, kept)]
        name = target.split(".")[1] if "." in target else target
        layer.run(f"{target.split('.')[0] if '.' in target else 'aten'}.{name}_backward.default", module, given, backs)
        for one, back in zip(inputs, backs, strict=True):
            layer.arrive(one, back, module)

    layer.differentiate(backward)
    return y


def product(layer: LayerRecord, one: Tensor, other: Tensor, module: str) -> Tensor:
    """one x other, element by element; keeps both."""
    y = layer.tensor(one.width, one.sharded, one.tokens)
    whole = layer.whole
    layer.run("aten.mul.Tensor", module, [whole(one), whole(other)], [whole(y)])
    layer.keep(one, other)

    def backward() -> None:
        given = whole(layer.gradient(y))
        for source, factor in ((one, other), (other, one)):
            back = whole(layer.tensor(one.width, one.sharded, one.tokens))
            layer.run("aten.mul.Tensor", module, [given, whole(factor)], [back])
            layer.arrive(source, back, module)

    layer.differentiate(backward)
    return y


def residual(layer: LayerRecord, stream: Tensor, branch: Tensor, module: str = "") -> Tensor:
    """stream + dropout(branch)."""
    shape, whole = layer.shape, layer.whole
    y = layer.tensor(stream.width)
    dropped, mask = branch, Use(layer.number(), TensorKind((0, shape.sequence, 2 * stream.width), (1, 0, 0), "bool"))
    if shape.dropout:
        layer.keep(mask)
    if shape.dropout and shape.fused:
        layer.run("fused.dropout_add.default", module, [whole(branch), whole(stream)], [whole(y), mask])
    else:
        if shape.dropout:
            dropped = layer.tensor(stream.width)
            layer.run("native_dropout", module, [whole(branch)], [whole(dropped), mask], numbers=(0.1, True))
        layer.run("aten.add.Tensor", module, [whole(stream), whole(dropped)], [whole(y)])

    def backward() -> None:
        given = whole(layer.gradient(y))
        back = given
        if shape.dropout:
            back = whole(layer.tensor(stream.width))
            layer.run("native_dropout_backward", module, [given, mask], [back])
        layer.arrive(branch, back, module)
        layer.arrive(stream, given, module)

    layer.differentiate(backward)
    return y


def rotary(layer: LayerRecord, x: Tensor, table: tuple[Use, Use], module: str) -> Tensor:
    """Queries or keys turned by their positions (Su et al., 2021); linear, so nothing is kept but the tables."""
    y = layer.tensor(x.width, x.sharded)
    seen = layer.heads

    def turn(source: Tensor, target: Tensor, back: bool) -> None:
        if layer.shape.fused:
            name = "fused.rotary_backward.default" if back else "fused.rotary.default"
            layer.run(name, module, [seen(source), *table], [seen(target)])
            return
        made = [seen(layer.tensor(x.width, x.sharded)) for _ in range(3)]
        half = seen(layer.tensor(x.width // 2, x.sharded))._replace(
            kind=per_sample(x.width // layer.shape.head_width, layer.shape.sequence, layer.shape.head_width // 2)
        )
        layer.run("aten.mul.Tensor", module, [seen(source), table[0]], [made[0]])
        layer.run("neg", module, [half._replace(at=source.at)], [half])
        layer.run("cat", module, [half, half._replace(at=source.at)], [made[1]])
        layer.run("aten.mul.Tensor", module, [made[1], table[1]], [made[2]])
        layer.run("aten.add.Tensor", module, [made[0], made[2]], [seen(target)])

    turn(x, y, False)

    def backward() -> None:
        back = layer.tensor(x.width, x.sharded)
        turn(layer.gradient(y), back, True)
        layer.arrive(x, layer.whole(back), module)

    layer.differentiate(backward)
    return y


def flash_attention(layer: LayerRecord, q: Tensor, k: Tensor, v: Tensor, module: str) -> Tensor:
    """Attention in one kernel (Dao et al., NeurIPS 2022); keeps inputs, output, and a statistic for each head."""
    shape = layer.shape
    y = layer.tensor(q.width, q.sharded)
    lse = Use(layer.number(), per_sample(shape.heads, shape.sequence), 1 if q.sharded else -1)
    flop = 4.0 * shape.sequence**2 * q.width
    uses = [layer.heads(one) for one in (q, k, v)]
    layer.run("_scaled_dot_product_flash_attention", module, uses, [layer.heads(y), lse], flop)
    layer.keep(q, k, v, y, lse)

    def backward() -> None:
        made = [layer.tensor(one.width, one.sharded) for one in (q, k, v)]
        given = [layer.heads(layer.gradient(y)), *uses, layer.heads(y), lse]
        # Scores are computed once more: five products for the two of the forward pass.
        layer.run("_scaled_dot_product_flash_attention_backward", module, given, [layer.heads(one) for one in made],
                  2.5 * flop)  # fmt: skip
        for one, back in zip((q, k, v), made, strict=True):
            layer.arrive(one, layer.whole(back), module)

    layer.differentiate(backward)
    return y


def unfused_attention(layer: LayerRecord, q: Tensor, k: Tensor, v: Tensor, module: str) -> Tensor:
    """Scores, softmax and their product with the values as operators; keys and values repeated for each group."""
    shape = layer.shape
    s, a = shape.sequence, shape.heads
    if shape.kv_heads < a:
        k, v = (_repeated(layer, one, q.width, module) for one in (k, v))
    scores_kind = TensorKind((0, s, s), (a, 0, 0), "float32")

    def scores(size: int = 1) -> Use:
        kind = scores_kind if size == 1 else TensorKind((0, s, 2 * s), (a, 0, 0), "bool")
        return Use(layer.number(), kind, 0 if q.sharded else -1)

    def batch(tensor: Tensor, turned: bool = False) -> Use:
        width = shape.head_width
        kind = TensorKind((0, width, s) if turned else (0, s, width), (a, 0, 0), "float32")
        return Use(tensor.at, kind, 0 if tensor.sharded else -1)

    flop = 2.0 * s * s * q.width
    raw, soft = scores(), scores()
    layer.run("bmm", module, [batch(q), batch(k, True)], [raw], flop)
    if shape.fused:
        layer.run("fused.scaled_masked_softmax.default", module, [raw], [soft])
    else:
        scaled, masked = scores(), scores()
        mask = Use(layer.number(), constant(1, s, s))
        layer.run("aten.mul.Scalar", module, [raw], [scaled], numbers=(shape.head_width**-0.5,))
        layer.run("aten.add.Tensor", module, [scaled, mask], [masked])
        layer.run("_softmax", module, [masked], [soft], numbers=(-1, False))
    dropped, dropout = soft, scores(2)
    if shape.dropout:
        dropped = scores()
        layer.run("native_dropout", module, [soft], [dropped, dropout], numbers=(0.1, True))
        layer.keep(dropped, dropout)
    y = layer.tensor(q.width, q.sharded)
    layer.run("bmm", module, [dropped, batch(v)], [batch(y)], flop)
    layer.keep(q, k, v, soft)

    def backward() -> None:
        given = layer.gradient(y)
        backs = [layer.tensor(one.width, one.sharded) for one in (q, k, v)]
        of_dropped, of_soft, of_raw = scores(), scores(), scores()
        layer.run("bmm", module, [dropped, batch(given)], [batch(backs[2])], flop)
        layer.run("bmm", module, [batch(given), batch(v, True)], [of_dropped], flop)
        if shape.dropout:
            layer.run("native_dropout_backward", module, [of_dropped, dropout], [of_soft])
        else:
            of_soft = of_dropped
        if shape.fused:
            layer.run("fused.scaled_masked_softmax_backward.default", module, [of_soft, soft], [of_raw])
        else:
            of_scaled = scores()
            layer.run(
                "_softmax_backward_data", module, [of_soft, soft], [of_scaled], numbers=(-1, {"dtype": "float32"})
            )
            layer.run("aten.mul.Scalar", module, [of_scaled], [of_raw], numbers=(shape.head_width**-0.5,))
        layer.run("bmm", module, [batch(q, True), of_raw], [batch(backs[1], True)], flop)
        layer.run("bmm", module, [of_raw, batch(k)], [batch(backs[0])], flop)
        for one, back in zip((q, k, v), backs, strict=True):
            layer.arrive(one, layer.whole(back), module)

    layer.differentiate(backward)
    kept = [soft, dropped, dropout] if shape.dropout else [soft]
    layer.attention = Attention(core_saved=Affine(0.0, float(sum(use.kind.bytes(1) for use in kept))))
    return y


def _repeated(layer: LayerRecord, x: Tensor, width: int, module: str) -> Tensor:
    y = layer.tensor(width, x.sharded)
    layer.run("clone", module, [layer.heads(x)], [layer.heads(y)])

    def backward() -> None:
        back = layer.tensor(x.width, x.sharded)
        layer.run("aten.sum.dim_IntList", module, [layer.heads(layer.gradient(y))], [layer.heads(back)])
        layer.arrive(x, layer.whole(back), module)

    layer.differentiate(backward)
    return y


def parts_of(layer: LayerRecord, x: Tensor, widths: list[int]) -> list[Tensor]:
    """A tensor cut into parts without a copy: views of the same storage, whose gradients are gathered into one."""
    parts = [layer.tensor(width, x.sharded, x.tokens) for width in widths]
    total = float(layer.whole(x).kind.bytes(1))
    for part in parts:
        layer._sizes[part.at] = total * part.width / x.width
    # The parts are what is alive from now on.
    layer._sizes[x.at] = 0.0

    def backward() -> None:
        back = layer.whole(layer.tensor(x.width, x.sharded, x.tokens))
        layer.run("cat", "", [layer.whole(layer.gradient(part)) for part in parts], [back])
        layer.arrive(x, back, "")

    layer.differentiate(backward)
    return parts


def expert_product(layer: LayerRecord, x: Tensor, module: str, width: int, split: Literal["column", "row"]) -> Tensor:
    """Each token times the matrix of its expert, as one grouped product; keeps x."""
    count, name, column = layer.shape.experts, f"{module}.weight", split == "column"
    weight = layer.parameter(name, count, width, x.width)
    y = layer.tensor(width, column, x.tokens)
    flop = 2.0 * x.tokens * x.width * width
    ends = Use(layer.number(), constant(count, dtype="int32"))
    uses = [layer.flat(x), Use(weight, constant(count, x.width, width), 2 if column else 1), ends]
    layer.run("_grouped_mm", module, uses, [layer.flat(y)], flop, (name,))
    layer.keep(x)

    def backward() -> None:
        given, back = layer.gradient(y), layer.tensor(x.width, x.sharded, x.tokens)
        turned = Use(weight, constant(count, width, x.width), 1 if column else 2)
        layer.run("_grouped_mm", module, [layer.flat(given), turned, ends], [layer.flat(back)], flop, (name,))
        given_kind = TensorKind((width, 0), (0, x.tokens), "float32")
        of_weight = Use(parameter_gradient(layer), constant(count, width, x.width), 1 if column else 2)
        layer.run("_grouped_mm", module, [Use(given.at, given_kind, 0 if column else -1), layer.flat(x), ends],
                  [of_weight], flop)  # fmt: skip
        layer.arrive(x, layer.whole(back), module)

    layer.differentiate(backward)
    return y
