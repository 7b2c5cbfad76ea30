"""What an operator moves, and in which precision it runs: the facts that prediction reads off a traced operator."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import msgspec

from headway.workload.graph import Operator, TensorKind, dtype_bytes

__all__ = [
    "WHOLE",
    "Shards",
    "computed_dtype",
    "elements_of",
    "is_matrix_operator",
    "needs_full_precision",
    "operator_bytes",
    "operator_key",
    "operator_name",
    "sharded_shape",
    "tensor_bytes",
]

# Autocast runs these in the lower precision (torch.amp documentation, "ops that can autocast to bfloat16").
_MATRIX = frozenset(
    {
        "mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "linear_backward", "convolution", "convolution_backward",
        "_convolution", "scaled_dot_product_attention", "_scaled_dot_product_attention_math", "_grouped_mm",
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward",
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_efficient_attention_backward",
        "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward",
    }
)  # fmt: skip
# And these in float32, whatever comes in.
_FULL_PRECISION = (
    "layer_norm", "group_norm", "softmax", "nll_loss", "cross_entropy", "mse_loss", "pow", "rsqrt", "exp", "log",
    "sum", "norm", "cumsum", "prod", "embedding_dense_backward",
)  # fmt: skip
# They read the rows that the indices name, never the whole table.
_GATHERS = frozenset({"embedding", "index_select", "gather", "index"})


class Shards(NamedTuple):
    """How tensor parallelism divides a model: `degree` ranks share the blocks at positions `blocks` of the graph.

    `sequence`: streaming operators outside of the blocks are divided too, by tokens (sequence parallelism).
    """

    degree: int = 1
    blocks: frozenset[int] = frozenset()
    sequence: bool = False

    def of(self, operator: Operator) -> int:
        """By how much this operator's sharded dimensions are divided."""
        return self.degree if operator.block in self.blocks else 1


WHOLE = Shards()


def operator_name(operator: Operator) -> str:
    """`"addmm"` of `"aten.addmm.default"`."""
    parts = operator.target.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def is_matrix_operator(operator: Operator) -> bool:
    """Whether autocast runs this operator in the lower precision."""
    return operator_name(operator) in _MATRIX


def needs_full_precision(operator: Operator) -> bool:
    """Whether autocast runs this operator in float32, whatever comes in."""
    name = operator_name(operator)
    return any(word in name for word in _FULL_PRECISION)


def sharded_shape(kind: TensorKind, samples: int, dim: int, degree: int) -> tuple[int, ...]:
    """The shape of a tensor at `samples`, dimension `dim` (-1: none) divided among `degree` ranks."""
    return tuple(max(1, size // degree) if at == dim else size for at, size in enumerate(kind.shape(samples)))


def _low_precision_bytes(operator: Operator, kind: TensorKind) -> int:
    size = dtype_bytes(kind.dtype)
    if kind.dtype != "float32":
        return size
    return size if needs_full_precision(operator) else 2


def elements_of(kind: TensorKind, samples: float) -> float:
    """Elements of a tensor; of a fraction of a sample too, as context parallelism computes."""
    product = 1.0
    for fixed, slope in zip(kind.fixed, kind.per_sample):
        product *= fixed + slope * samples
    return product


def tensor_bytes(operator: Operator, kind: TensorKind, dim: int, samples: float, degree: int, low: bool) -> float:
    """Bytes of one of an operator's tensors, its dimension `dim` divided among `degree` ranks; `low`: in 16 bits."""
    elements = elements_of(kind, samples) / (degree if dim >= 0 else 1)
    return elements * (_low_precision_bytes(operator, kind) if low else dtype_bytes(kind.dtype))


def operator_bytes(operator: Operator, samples: float, degree: int = 1, precision: str = "float32") -> float:
    """Bytes that an operator reads and writes at `samples`, its sharded tensors divided by `degree`."""
    low = precision != "float32"
    in_dims = operator.sharded_inputs or (-1,) * len(operator.inputs)
    out_dims = operator.sharded_outputs or (-1,) * len(operator.outputs)
    written = sum(
        tensor_bytes(operator, kind, dim, samples, degree, low) for kind, dim in zip(operator.outputs, out_dims)
    )
    if operator_name(operator) in _GATHERS:
        # The rows read are as many as the rows written; the indices are small beside them.
        return 2 * written
    read = sum(tensor_bytes(operator, kind, dim, samples, degree, low) for kind, dim in zip(operator.inputs, in_dims))
    return read + written


def operator_key(operator: Operator, degree: int, precision: str) -> str:
    """What an operator's time depends on, samples aside: name, arguments, shapes and dtypes, precision, sharding."""
    dims = (*operator.sharded_inputs, -2, *operator.sharded_outputs) if degree > 1 else ()
    content = (operator.target, operator.arguments, operator.keywords, operator.inputs, degree, dims, precision)
    return f"{operator_name(operator)} {hashlib.sha256(msgspec.json.encode(content)).hexdigest()[:24]}"


def computed_dtype(operator: Operator, precision: str) -> str:
    """The dtype that an operator computes in: `precision` for what autocast lowers, else that of its first input."""
    if precision != "float32" and is_matrix_operator(operator):
        return precision
    return operator.inputs[0].dtype if operator.inputs else "float32"
