"""How a divided tensor divides what operators make of it: a rule for each aten operator (sharding propagation).

What is divided is a `Sharding` of a tensor: dimension `dim` is seen as (before, units, rest), and each of n ranks holds
a contiguous n-th of the units. `before` is 1 but for heads merged into a batch dimension, (B, H, T, E) → (B·H, T, E).

A rule says where the division of the inputs reappears in the outputs when every rank works on its own part alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from headway.workload.graph import Operator

__all__ = [
    "Rule",
    "Shape",
    "Sharding",
    "Shardings",
    "Use",
    "is_in_place",
    "packet_name",
    "rule_of",
    "through_view",
]

Shape = tuple[int, ...]


class Sharding(NamedTuple):
    """Dimension `dim` = (before, units, rest), the units divided among the ranks."""

    dim: int
    before: int = 1

    def units(self, shape: Shape) -> int:
        """How much there is to divide: the number of ranks must divide it."""
        return shape[self.dim] // self.before


Shardings = list[Sharding | None]


@dataclass
class Use:
    """One operator with the shardings of its inputs, as a rule sees it."""

    operator: Operator
    inputs: Shardings
    input_shapes: list[Shape]
    output_shapes: list[Shape]

    def argument(self, position: int, default: Any = None, keyword: str = "") -> Any:
        arguments = self.operator.arguments
        return arguments[position] if position < len(arguments) else self.operator.keywords.get(keyword, default)

    def tensor(self, position: int) -> int:
        """Which of the inputs is the argument at `position`; -1 if it is no tensor."""
        argument = self.argument(position)
        return argument["tensor"] if isinstance(argument, dict) and "tensor" in argument else -1

    def all_outputs(self, sharding: Sharding) -> Shardings:
        """Every output divided like this."""
        return [sharding for _ in self.output_shapes]


# A rule gives the shardings of the outputs, or None where ranks could not each work on their own part.
Rule = Callable[[Use], "Shardings | None"]


def _wrap(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


def _pointwise(use: Use) -> Shardings | None:
    """Each element follows from those at its place, after broadcasting."""
    if not use.output_shapes:
        return None
    rank = len(use.output_shapes[0])
    aligned: Sharding | None = None
    for shape, sharding in zip(use.input_shapes, use.inputs, strict=True):
        if sharding is not None:
            moved = Sharding(sharding.dim + rank - len(shape), sharding.before)
            if moved.dim < 0 or (aligned is not None and aligned != moved):
                return None
            if shape[sharding.dim] != use.output_shapes[0][moved.dim]:
                return None
            aligned = moved
    if aligned is None:
        return None
    for shape, sharding in zip(use.input_shapes, use.inputs, strict=True):
        dim = aligned.dim - rank + len(shape)
        if sharding is None and dim >= 0 and shape[dim] != 1:
            return None  # every rank holds it whole, and would need to cut its own part out
    return [aligned if shape == use.output_shapes[0] else None for shape in use.output_shapes]


def through_view(sharding: Sharding, source: Shape, target: Shape) -> Sharding | None:
    """Where the division is after `view(target)`, if every rank can view its own part; else None.

    The first place where the divided units begin must be a place where units of the target's dimension begin.
    """
    if math.prod(source) != math.prod(target) or 0 in source:
        return None
    # How many parts of the flattened tensor there are before the divided units.
    ahead = math.prod(source[: sharding.dim]) * sharding.before
    product = 1
    for dim, size in enumerate(target):
        if product <= ahead < product * size:
            before, rest = divmod(ahead, product)
            if rest or size % before:
                return None
            # The units themselves must nest: a part of one must be a whole number of parts of the other.
            old, new = sharding.units(source), size // before
            return Sharding(dim, before) if old % new == 0 or new % old == 0 else None
        product *= size
    return None


def _view(use: Use) -> Shardings | None:
    sharding = use.inputs[0]
    moved = through_view(sharding, use.input_shapes[0], use.output_shapes[0]) if sharding else None
    return [moved] if moved is not None else None


def _permuted(use: Use, order: Sequence[int]) -> Shardings | None:
    sharding = use.inputs[0]
    if sharding is None:
        return None
    return [Sharding([_wrap(dim, len(order)) for dim in order].index(sharding.dim), sharding.before)]


def _transpose(use: Use) -> Shardings | None:
    order = list(range(len(use.input_shapes[0])))
    if len(order) > 1:
        first, second = (
            (0, 1)
            if use.operator.target.startswith("aten.t.")
            else (_wrap(use.argument(1), len(order)), _wrap(use.argument(2), len(order)))
        )
        order[first], order[second] = order[second], order[first]
    return _permuted(use, order)


def _permute(use: Use) -> Shardings | None:
    return _permuted(use, use.argument(1))


def _unsqueeze(use: Use) -> Shardings | None:
    sharding = use.inputs[0]
    if sharding is None:
        return None
    dim = _wrap(use.argument(1), len(use.output_shapes[0]))
    return [Sharding(sharding.dim + (dim <= sharding.dim), sharding.before)]


def _squeeze(use: Use) -> Shardings | None:
    sharding, shape = use.inputs[0], use.input_shapes[0]
    if sharding is None or shape[sharding.dim] == 1:
        return None
    chosen = use.argument(1)
    dims = range(len(shape)) if chosen is None else [chosen] if isinstance(chosen, int) else chosen
    gone = {_wrap(dim, len(shape)) for dim in dims if shape[dim] == 1}
    return [Sharding(sharding.dim - sum(dim < sharding.dim for dim in gone), sharding.before)]


def _expand(use: Use) -> Shardings | None:
    sharding = use.inputs[0]
    source, target = use.input_shapes[0], use.output_shapes[0]
    if sharding is None:
        return None
    dim = sharding.dim + len(target) - len(source)
    return [Sharding(dim, sharding.before)] if target[dim] == source[sharding.dim] else None


def _repeat(use: Use) -> Shardings | None:
    return _expand(use)  # the divided dimension keeps its size exactly when it is not repeated


def _along(position: int, default: int = 0, keyword: str = "dim") -> Rule:
    """Operators that mix elements along one dimension: it must not be the divided one. Ranks of tensors stay."""

    def rule(use: Use) -> Shardings | None:
        shardings = set(use.inputs)
        sharding = next(iter(shardings))
        dim = _wrap(use.argument(position, default, keyword), len(use.input_shapes[0]))
        if len(shardings) != 1 or sharding is None or sharding.dim == dim:
            return None
        return use.all_outputs(sharding)

    return rule


def _slice(use: Use) -> Shardings | None:
    whole = use.input_shapes[0] == use.output_shapes[0]
    return _pointwise(use) if whole else _along(1)(use)


def _stack(use: Use) -> Shardings | None:
    shardings = set(use.inputs)
    sharding = next(iter(shardings))
    if len(shardings) != 1 or sharding is None:
        return None
    dim = _wrap(use.argument(1, 0, "dim"), len(use.output_shapes[0]))
    return [Sharding(sharding.dim + (dim <= sharding.dim), sharding.before)]


def _without(position: int) -> Rule:
    """Operators that take one dimension away by picking from it (select, unbind)."""

    def rule(use: Use) -> Shardings | None:
        sharding = use.inputs[0]
        dim = _wrap(use.argument(position, 0, "dim"), len(use.input_shapes[0]))
        if sharding is None or sharding.dim == dim:
            return None
        return use.all_outputs(Sharding(sharding.dim - (dim < sharding.dim), sharding.before))

    return rule


def _select_backward(use: Use) -> Shardings | None:
    sharding = use.inputs[0]
    if sharding is None:
        return None
    dim = _wrap(use.argument(2), len(use.output_shapes[0]))
    return [Sharding(sharding.dim + (dim <= sharding.dim), sharding.before)]


def _reduce(use: Use) -> Shardings | None:
    """Sums and means over dimensions among which the divided one is not."""
    sharding, rank = use.inputs[0], len(use.input_shapes[0])
    dims = use.argument(1, None, "dim")
    if sharding is None or not isinstance(dims, int | list) or dims == []:
        return None
    gone = {_wrap(dim, rank) for dim in ([dims] if isinstance(dims, int) else dims)}
    if sharding.dim in gone:
        return None
    kept = len(use.output_shapes[0]) == rank
    return use.all_outputs(
        sharding if kept else Sharding(sharding.dim - sum(dim < sharding.dim for dim in gone), sharding.before)
    )


def _matrix_product(left: Sharding | None, right: Sharding | None, before: int) -> Shardings | None:
    """(…, m, k) x (…, k, n), `before` batch dimensions. A sum over a divided k is one term from each rank: [None]."""
    m, k, n = before, before + 1, before + 1
    if left is not None and right is not None:
        if left == right and left.dim < before:
            return [left]
        contracted = left.dim == k and right.dim == before and left.before == right.before == 1
        return [None] if contracted else None
    if left is not None:
        return [left] if left.dim == m else None
    if right is not None:
        return [right] if right.dim == n else None
    return None


def _mm(use: Use) -> Shardings | None:
    return _matrix_product(use.inputs[0], use.inputs[1], 0)


def _addmm(use: Use) -> Shardings | None:
    product = _matrix_product(use.inputs[1], use.inputs[2], 0)
    if product is None:
        return None
    return _added(use, product)


def _added(use: Use, product: Shardings) -> Shardings | None:
    """The first input added to a product with these shardings."""
    if product[0] is None:
        return product if use.inputs[0] is None else None
    shapes = [use.input_shapes[0], use.output_shapes[0]]
    return _pointwise(Use(use.operator, [use.inputs[0], product[0]], shapes, use.output_shapes))


def _bmm(use: Use) -> Shardings | None:
    product = _matrix_product(use.inputs[0], use.inputs[1], 1)
    return product if product and product[0] is not None else None


def _baddbmm(use: Use) -> Shardings | None:
    product = _matrix_product(use.inputs[1], use.inputs[2], 1)
    return _added(use, product) if product and product[0] is not None else None


_HEADS = Sharding(1)


def _attention_heads(use: Use, tensors: Sequence[int]) -> bool:
    """Whether these arguments, (B, heads, T, E) each, are divided by heads, and nothing else is divided wrongly."""
    positions = [use.tensor(position) for position in tensors]
    if any(position < 0 or use.inputs[position] != _HEADS for position in positions):
        return False
    heads = [use.input_shapes[position][1] for position in positions]
    if any(max(heads) % size for size in heads):
        return False
    for shape, sharding in zip(use.input_shapes, use.inputs, strict=True):
        # A mask: (T, T), (1, T, T), (B, 1, T, T) serve every head; (B, H, T, T) must be divided like the heads.
        if sharding is None and len(shape) >= 3 and shape[-3] != 1:
            return False
        if sharding is not None and sharding != _HEADS:
            return False
    return True


def _attention(use: Use) -> Shardings | None:
    """scaled_dot_product_attention's kernels: the output, then the log-sum-exp (B, H, T), then bookkeeping."""
    if not _attention_heads(use, (0, 1, 2)):
        return None
    heads = use.input_shapes[use.tensor(0)][1]
    return [
        _HEADS if position < 2 and len(shape) >= 3 and shape[1] == heads else None
        for position, shape in enumerate(use.output_shapes)
    ]


def _attention_backward(use: Use) -> Shardings | None:
    """Gradients of query, key and value, and of a bias if there is one."""
    if not _attention_heads(use, (0, 1, 2, 3)):
        return None
    return [_HEADS if position < 3 and len(shape) == 4 else None for position, shape in enumerate(use.output_shapes)]


_KERNELS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")

_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            # Pointwise in effect, whatever torch's tags say.
            "clone", "contiguous", "alias", "detach", "lift_fresh", "_to_copy", "to", "copy", "masked_fill", "fill",
            "native_dropout", "native_dropout_backward", "bernoulli", "empty_like", "zeros_like", "ones_like",
            "full_like", "rand_like", "randn_like", "hardswish", "hardswish_backward", "elu", "elu_backward", "gelu",
            "leaky_relu_backward", "softplus_backward", "log_sigmoid_forward", "log_sigmoid_backward",
        ),
        _pointwise,
    ),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten"), _view),
    **dict.fromkeys(("t", "transpose", "swapaxes"), _transpose),
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "repeat": _repeat,
    "cumsum": _along(1),
    "slice": _slice,
    **dict.fromkeys(("_softmax", "softmax", "_log_softmax", "log_softmax", "_safe_softmax"), _along(1)),
    **dict.fromkeys(("_softmax_backward_data", "_log_softmax_backward_data", "slice_backward"), _along(2)),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _along(2)),
    "cat": _along(1),
    "stack": _stack,
    "select": _without(1),
    "unbind": _without(1),
    "select_backward": _select_backward,
    **dict.fromkeys(("sum", "mean", "amax", "amin", "logsumexp"), _reduce),
    "mm": _mm,
    "addmm": _addmm,
    "bmm": _bmm,
    "baddbmm": _baddbmm,
    **{f"_scaled_dot_product_{kernel}": _attention for kernel in _KERNELS},
    **{f"_scaled_dot_product_{kernel}_backward": _attention_backward for kernel in _KERNELS},
}  # fmt: skip


def packet_name(target: str) -> str:
    """`"aten.relu_.default"` → `"relu"`: the rules are the same in place."""
    name = target.split(".")[1] if target.startswith("aten.") else target
    return name if name.startswith("__") else name.rstrip("_")


def is_in_place(operator: Operator) -> bool:
    """Whether its name says that it writes to its first argument."""
    name = operator.target.split(".")[1]
    return name.endswith("_") and not name.endswith("__")


@lru_cache(maxsize=4096)
def rule_of(target: str) -> Rule | None:
    """The rule of an operator, pointwise ones by torch's tag; None: nothing is known of it."""
    found = _RULES.get(packet_name(target))
    if found is not None:
        return found
    space, _, rest = target.partition(".")
    packet, _, overload = rest.partition(".")
    operator = getattr(getattr(getattr(torch.ops, space, None), packet, None), overload or "default", None)
    return _pointwise if torch.Tag.pointwise in getattr(operator, "tags", ()) else None
