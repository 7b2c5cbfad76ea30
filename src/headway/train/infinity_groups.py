"""Parameters that come and go together: how they are laid out in one tensor, and sliced over replicas.

A group's parameters follow each other in `Group.whole`, each contiguous. A rank's part has the same rows of each that
`fully_shard` would give it, so that a slice is a DTensor like any other, to optimizers and to checkpoints.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from headway.errors import RunError

if TYPE_CHECKING:
    from headway.memory.tiers import Pending, Store
    from headway.plan.plan import Tier

__all__ = [
    "Group",
    "Member",
    "Piece",
    "ReleasedDTensor",
    "ReleasedParameter",
    "Together",
    "allocate",
    "bounds",
    "described",
    "let_go",
    "local_of",
    "rows_of_part",
    "view_of",
    "within",
]


def _refused(released_name: str, name: str) -> RunError:
    return RunError(
        f"is read ({name}) where the traced model does not read it: it rests off the device, and has no memory here",
        place=f"parameter {released_name}",
        remedy="read it in Parallel.present() or from a checkpoint, or keep parameters_on the device",
    )


def _describe_or_refuse(cls: type, function: Any, args: Any, kwargs: Any) -> Any:
    """What `__torch_function__` of a parameter without memory does: describe it, and raise RunError for all else."""
    name = getattr(function, "__name__", "")
    if name == "__get__" and getattr(function.__self__, "__name__", "") in _VIEWS:
        name = function.__self__.__name__
    if name not in _DESCRIPTIONS:
        released = [each for each in tree_leaves((args, kwargs or {})) if isinstance(each, cls)]
        raise _refused(released[0].released_name if released else "", name)
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **(kwargs or {}))


class ReleasedParameter(nn.Parameter):
    """What a parameter is while it has no memory: all but its description raises RunError, instead of a crash."""

    released_name: str

    def __repr__(self, *, tensor_contents: str | None = None) -> str:
        return f"<parameter {self.released_name} of {tuple(self.shape)}, which rests off the device>"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _describe_or_refuse(cls, function, args, kwargs)


class ReleasedDTensor(DTensor):
    """The same of a slice, which is a part of a DTensor, or of a parameter that is one."""

    released_name: str

    def __repr__(self, *, tensor_contents: str | None = None) -> str:
        return f"<parameter {self.released_name} of {tuple(self.shape)}, which rests off the device>"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _describe_or_refuse(cls, function, args, kwargs)

    # These are no functions of torch's, and what they return has no memory either.

    def to_local(self, *_: Any, **kwargs: Any) -> torch.Tensor:
        """Raises RunError."""
        raise _refused(self.released_name, "to_local")

    def full_tensor(self, *_: Any, **kwargs: Any) -> torch.Tensor:
        """Raises RunError."""
        raise _refused(self.released_name, "full_tensor")

    def redistribute(self, *_: Any, **kwargs: Any) -> DTensor:
        """Raises RunError."""
        raise _refused(self.released_name, "redistribute")


_RELEASED: dict[type, type] = {nn.Parameter: ReleasedParameter, DTensor: ReleasedDTensor}
_PRESENT = {released: present for present, released in _RELEASED.items()}


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


class Piece(NamedTuple):
    """Elements of a group's part that rest as one tensor of the store."""

    name: str
    start: int
    stop: int


class Together:
    """Several transfers, waited for as one (`memory.tiers.Pending`)."""

    def __init__(self, pending: Sequence[Pending], tensor: torch.Tensor) -> None:
        self._pending, self._tensor = pending, tensor

    @property
    def done(self) -> bool:
        """Whether all have ended."""
        return all(each.done for each in self._pending)

    def wait(self, timeout_seconds: float | None = None) -> torch.Tensor:
        """The whole, once all have ended; the timeout is for each. Raises what went wrong first."""
        for each in self._pending:
            each.wait(timeout_seconds)
        return self._tensor


@dataclass(eq=False)
class Group:
    """Parameters that come and go together. `whole` and `part` have memory only while they are needed.

    `piece_bytes`: a part that is larger rests in pieces of so many bytes; 0: in one.
    """

    name: str
    members: list[Member]
    whole: torch.Tensor
    part: torch.Tensor  # this rank's; with one replica the same tensor as `whole`
    places: tuple[str, ...] = ()
    piece_bytes: int = 0
    holders: Counter[str] = field(default_factory=Counter)
    reading: Pending | None = None
    writing: Pending | None = None
    gathering: tuple[dist.Work, torch.Tensor] | None = None
    is_whole: bool = False
    ready: set[str] = field(default_factory=set)  # members whose gradient this backward pass has made

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """How the part rests in its tier, in order."""
        count, at_once = self.part.numel(), self.piece_bytes // self.part.element_size()
        if not at_once or count <= at_once:
            return (Piece(self.name, 0, count),)
        starts = range(0, count, at_once)
        return tuple(Piece(f"{self.name}.{n}", at, min(at + at_once, count)) for n, at in enumerate(starts))

    def read(self, store: Store) -> Pending:
        """Begin to read the part from its tier."""
        return Together([store.read(name, into=self.part[a:b]) for name, a, b in self.pieces], self.part)

    def write(self, store: Store, tier: Tier) -> Pending:
        """Begin to write the part to its tier."""
        return Together([store.write(name, self.part[a:b], tier) for name, a, b in self.pieces], self.part)

    def prefetch(self, store: Store) -> None:
        """Begin to read into the store's buffers, as far as some are free."""
        for name, _, _ in self.pieces:
            store.prefetch(name)

    def allocate(self, tensor: torch.Tensor) -> None:
        """Give `whole` or `part` memory; the parameters, or their slices, can be read again."""
        allocate(tensor)
        self._become(tensor, _PRESENT)

    def let_go(self, tensor: torch.Tensor) -> None:
        """Take the memory of `whole` or `part`; to read the parameters, or their slices, is an error from then on."""
        let_go(tensor)
        self._become(tensor, _RELEASED)

    def _become(self, tensor: torch.Tensor, classes: dict[type, type]) -> None:
        for member in self.members:
            parameter = member.parameter if tensor is self.whole else member.slice
            if (other := classes.get(type(parameter))) is not None:
                setattr(parameter, "__class__", other)  # noqa: B010 - which no type checker allows
                setattr(parameter, "released_name", member.name)  # noqa: B010


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
    if isinstance(tensor, ReleasedDTensor):
        return tensor._local_tensor
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
