"""The kernels that a transformer layer is made of: what each computes, what it keeps, and what its backward pass does.

Each function adds the operators of one kernel to a `LayerRecord`, says what backward needs, and how it is
differentiated. `workload.transformer` makes layers of these and puts them behind each other.
"""

from __future__ import annotations

from typing import Literal

from headway.workload.graph import Affine, Attention, TensorKind
from headway.workload.layer_record import LayerRecord, Tensor, Use, constant, parameter_gradient, per_sample

__all__ = [
    "elementwise",
    "expert_product",
    "flash_attention",
    "linear",
    "norm",
    "parts_of",
    "product",
    "residual",
    "rotary",
    "unfused_attention",
]


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
        layer.sizes[part.at] = total * part.width / x.width
    # The parts are what is alive from now on.
    layer.sizes[x.at] = 0.0

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
