"""Parameters that come and go together: how they are laid out in one tensor, and sliced over replicas.

A group's parameters follow each other in `Group.whole`, each contiguous. A rank's part has the same rows of each that
`fully_shard` would give it, so that a slice is a DTensor like any other, to optimizers and to checkpoints.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from headway.errors import RunError

if TYPE_CHECKING:
    from headway.memory.tiers import Pending

__all__ = [
    "Group",
    "Member",
    "ReleasedParameter",
    "allocate",
    "bounds",
    "described",
    "let_go",
    "local_of",
    "rows_of_part",
    "view_of",
    "within",
]


class ReleasedParameter(nn.Parameter):
    """What a parameter is while it has no memory: all but its description raises RunError, instead of a crash."""

    released_name: str

    def __repr__(self, *, tensor_contents: str | None = None) -> str:
        return f"<parameter {self.released_name} of {tuple(self.shape)}, which rests off the device>"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name == "__get__" and getattr(function.__self__, "__name__", "") in _VIEWS:
            name = function.__self__.__name__
        if name not in _DESCRIPTIONS:
            released = [each for each in tree_leaves((args, kwargs or {})) if isinstance(each, cls)]
            raise RunError(
                f"is read ({name}) where the traced model does not read it: it rests off the device, and has no memory "
                "here",
                place=f"parameter {released[0].released_name if released else ''}",
                remedy="read it in Parallel.present() or from a checkpoint, or keep parameters_on the device",
            )
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def described(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter without its gradient's history, for who asks for its shape and the like; it may have no memory."""
    with torch._C.DisableTorchFunctionSubclass():
        return parameter.detach()


_VIEWS = frozenset(("data", "T", "mT", "H", "mH", "real", "imag"))  # attributes whose values would be read
_DESCRIPTIONS = frozenset(
    ("__get__", "__set__", "__delete__", "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride",
     "storage_offset", "untyped_storage", "get_device", "is_floating_point", "is_complex", "is_contiguous", "__len__",
     "__hash__", "zeros_like", "empty_like", "requires_grad_", "register_hook", "register_post_accumulate_grad_hook")
)  # fmt: skip


@dataclass(eq=False)
class Member:
    """One parameter of a group. `slice` is what this rank updates: the parameter itself, or rows of it (a DTensor)."""

    name: str
    parameter: nn.Parameter
    slice: nn.Parameter
    shape: tuple[int, ...]  # of the whole, on this tensor-parallel rank
    whole_at: int  # where it begins in the gathered elements
    part_at: int  # … and in a rank's part of the group
    part: int  # elements in a part, the last of which may be padding

    @property
    def elements(self) -> int:
        """Of the whole parameter."""
        return math.prod(self.shape)


@dataclass(eq=False)
class Group:
    """Parameters that come and go together. `whole` and `part` have memory only while they are needed."""

    name: str
    members: list[Member]
    whole: torch.Tensor
    part: torch.Tensor  # this rank's; with one replica the same tensor as `whole`
    places: tuple[str, ...] = ()
    holders: Counter[str] = field(default_factory=Counter)
    reading: Pending | None = None
    writing: Pending | None = None
    gathering: tuple[dist.Work, torch.Tensor] | None = None
    is_whole: bool = False
    ready: set[str] = field(default_factory=set)  # members whose gradient this backward pass has made

    def allocate(self, tensor: torch.Tensor) -> None:
        """Give `whole` or `part` memory; the parameters can be read again where it is `whole`."""
        allocate(tensor)
        if tensor is self.whole:
            for member in self.members:
                if type(member.parameter) is ReleasedParameter:
                    setattr(member.parameter, "__class__", nn.Parameter)  # noqa: B010 - which no type checker allows

    def let_go(self, tensor: torch.Tensor) -> None:
        """Take the memory of `whole` or `part`; to read the parameters is an error from then on where it is `whole`."""
        let_go(tensor)
        if tensor is self.whole:
            for member in self.members:
                if type(member.parameter) is nn.Parameter:
                    setattr(member.parameter, "__class__", ReleasedParameter)  # noqa: B010
                    setattr(member.parameter, "released_name", member.name)  # noqa: B010


def within(module: str, points: set[str]) -> str:
    """The point that a module is, or lies in; "" if none."""
    path = module
    while path and path not in points:
        path = path.rpartition(".")[0]
    return path


def rows_of_part(shape: tuple[int, ...], replicas: int) -> int:
    """Rows in a part: the same for every replica, though the last may have fewer of its own."""
    return -(-shape[0] // replicas) if shape else 1


def bounds(shape: tuple[int, ...], replicas: int, replica: int) -> tuple[int, int]:
    """First row of a replica's part, and the one after its last; equal where nothing is left for it."""
    rows = rows_of_part(shape, replicas)
    count = shape[0] if shape else 1
    return min(replica * rows, count), min((replica + 1) * rows, count)


def view_of(flat: torch.Tensor, at: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Elements of `flat` from `at` on, seen in that shape."""
    return flat[at : at + math.prod(shape)].view(shape)


def allocate(tensor: torch.Tensor) -> None:
    """Give a flat tensor memory, uninitialised, if it has none; all views of it have it then."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        storage.resize_(tensor.numel() * tensor.element_size())


def let_go(tensor: torch.Tensor) -> None:
    """Take its memory, and that of all views of it. To read one of them is a segmentation fault from then on."""
    tensor.untyped_storage().resize_(0)


def local_of(tensor: Any) -> torch.Tensor:
    """This rank's part of a DTensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
