"""torch's reduce operations, in the words of the executor, for every dtype that torch has.

The executor reduces real numbers. What torch asks beyond that is put into other words here: complex numbers as pairs of
reals, truth values as bytes, eight-bit floats as float32, a factor before the sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from headway.errors import InputError

__all__ = ["Reduction", "reduction_of"]

_NAMES = {
    "SUM": "sum",
    "AVG": "average",
    "PRODUCT": "product",
    "MIN": "min",
    "MAX": "max",
    "BAND": "band",
    "BOR": "bor",
    "BXOR": "bxor",
    "PREMUL_SUM": "sum",
}
# Truth values are 0 and 1 in a byte each.
_ON_TRUTH = {"sum": "max", "max": "max", "product": "min", "min": "min", "band": "min", "bor": "max", "bxor": "bxor"}
_BITWISE = {"band", "bor", "bxor"}


class Reduction(NamedTuple):
    """A reduce operation: its `name`, as of `executor.Communicator.run`, and what to multiply by before it."""

    name: str
    factor: Any = None

    def prepare(self, flat: torch.Tensor) -> None:
        """Multiply a contribution by the factor, in place. Raises InputError where dtype and operation do not fit."""
        dtype = flat.dtype
        if (
            (dtype == torch.bool and self.name not in _ON_TRUTH)
            or (dtype.is_complex and self.name not in ("sum", "average"))
            or (self.name in _BITWISE and (dtype.is_floating_point or dtype.is_complex))
        ):
            raise InputError(
                f"{self.name} is not defined for {dtype}", place="reduce", remedy="use another dtype or operation"
            )
        if self.factor is not None:
            flat.mul_(self.factor)

    def encode(self, flat: torch.Tensor) -> torch.Tensor:
        """The vector that the executor reduces: `flat` itself seen as another dtype, or a copy in a wider one."""
        if flat.dtype.is_complex:
            return torch.view_as_real(flat).view(-1)
        if flat.dtype == torch.bool:
            return flat.view(torch.uint8)
        if flat.dtype.is_floating_point and flat.element_size() == 1:
            return flat.to(torch.float32)
        return flat

    def on_the_wire(self, dtype: torch.dtype) -> str:
        """The operation on the encoded vector."""
        return _ON_TRUTH[self.name] if dtype == torch.bool else self.name


def reduction_of(opts: Any, size: int) -> Reduction:
    """The operation that torch's options ask for; a sum unless given. Raises InputError for one that is not known."""
    operation = getattr(opts, "reduceOp", None)
    if operation is None:
        return Reduction("sum")
    kind = getattr(operation, "op", operation).name
    if kind not in _NAMES:
        raise InputError(f"unknown reduce operation {kind}", place="reduce", remedy=", ".join(_NAMES))
    if kind != "PREMUL_SUM":
        return Reduction(_NAMES[kind])
    return Reduction("sum", operation.__getstate__()[1])
