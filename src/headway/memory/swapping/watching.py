"""Watches the operators of a real training step: which storages they read and make, in numbers that are the same in
every step.

A number is given to each aten operator that computes something; views and what only writes to given tensors (buffers,
gradients that are there already) have none. A tensor is a storage between two writes. What autograd saves and takes
back is seen through its saved-tensor hooks, so that an operator also reads what is unpacked for it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Geometry", "Watcher", "flat", "in_backward", "shaped"]

_IGNORED = {"aten::detach", "prim::device", "aten::is_same_size"}


class Geometry:
    """How a tensor lies in its storage."""

    __slots__ = ("dtype", "offset", "size", "stride")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.size = tuple(tensor.shape)
        self.stride = tuple(tensor.stride())
        self.offset = tensor.storage_offset()
        self.dtype = tensor.dtype


def shaped(storage: torch.UntypedStorage, geometry: Geometry) -> torch.Tensor:
    """The tensor that lies so in `storage`."""
    empty = torch.empty(0, dtype=geometry.dtype, device=storage.device)
    return empty.set_(storage, geometry.offset, geometry.size, geometry.stride)  # type: ignore[call-overload]


def flat(storage: torch.UntypedStorage) -> torch.Tensor:
    """All bytes of a storage as one tensor of uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]


def in_backward() -> bool:
    """Whether autograd's engine is at work in this thread."""
    return torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]


class _Reference(weakref.ref):
    __slots__ = ("address", "tensor")

    address: int
    tensor: int


class Watcher(TorchDispatchMode):
    """Numbers operators and tensors of one step. Subclasses see each operator before and after it runs.

    `live_bytes` and `peak_bytes` count the storages that operators made and that are still alive, except those of
    `uncounted` tensors.
    """

    device = torch.device("cpu")  # whose tensors are watched

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.tensors = 0
        self.live_bytes = 0
        self.peak_bytes = 0
        self.uncounted: frozenset[int] = frozenset()
        self._of_storage: dict[int, int] = {}
        self._references: dict[int, _Reference] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)
        self._passing = False

    # ------------------------------------------------------------------------------------------- for subclasses

    def before(self, func: Any, args: Any, kwargs: Any, read: list[int]) -> None:
        """Operator number `operators` is about to run; `read`: the tensors that it reads."""

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run it."""
        return func(*args, **kwargs)

    def after(self, func: Any, made: list[tuple[int, torch.Tensor]], overwritten: int) -> None:
        """It ran: new tensors, and the one whose place the first of them took (-1: none)."""

    def pack(self, tensor: torch.Tensor) -> Any:
        """Autograd saves a tensor."""
        return tensor

    def unpack(self, packed: Any) -> torch.Tensor:
        """Autograd takes it back."""
        return packed

    # ---------------------------------------------------------------------------------------------------- storages

    def number_of(self, tensor: torch.Tensor) -> int:
        """The number of the tensor that shows now in this one's storage; -1: given from outside."""
        if tensor.layout is not torch.strided:
            return -1
        return self._of_storage.get(tensor.untyped_storage()._cdata, -1)

    def known(self, storage: torch.UntypedStorage, tensor: int) -> None:
        """From now on this storage holds the tensor with that number."""
        address = storage._cdata
        if address not in self._references:
            reference = _Reference(storage, self._gone)
            reference.address = address
            reference.tensor = tensor
            self._references[address] = reference
            if tensor not in self.uncounted:
                self.live_bytes += storage.nbytes()
                self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            self._sizes[address] = (storage.nbytes(), tensor not in self.uncounted)
        self._of_storage[address] = tensor

    def _gone(self, reference: Any) -> None:
        address = reference.address
        if self._references.get(address) is not reference:
            return
        del self._references[address]
        self._of_storage.pop(address, None)
        size, counted = self._sizes.pop(address)
        if counted:
            self.live_bytes -= size

    # --------------------------------------------------------------------------------------------------- dispatch

    def __enter__(self):
        self._sizes: dict[int, tuple[int, bool]] = {}
        self._hooks.__enter__()
        return super().__enter__()

    def __exit__(self, kind, error, trace):
        try:
            return super().__exit__(kind, error, trace)
        finally:
            self._hooks.__exit__(kind, error, trace)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._passing or func._schema.name in _IGNORED:
            return func(*args, **kwargs)
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        numbers = [self.number_of(tensor) for tensor in inputs]
        written = _written(func, args, kwargs)
        if written and all(self.number_of(tensor) < 0 for tensor in written):
            return func(*args, **kwargs)  # buffers, and gradients of parameters that are there already
        if not written and _is_view(func):
            return func(*args, **kwargs)
        self.before(func, args, kwargs, list(dict.fromkeys(number for number in numbers if number >= 0)))
        result = self.run(func, args, kwargs)
        made: list[tuple[int, torch.Tensor]] = []
        overwritten = -1
        addresses = {tensor.untyped_storage()._cdata for tensor in inputs if tensor.layout is torch.strided}
        for tensor in written:
            old = self.number_of(tensor)
            if old >= 0:
                if overwritten < 0:
                    overwritten = old
                made.append((self._fresh(tensor), tensor))
        for leaf in pytree.tree_leaves(result):
            # What a GPU's operator leaves on the host (attention's random seed) is read there, and takes no room.
            if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and leaf.device.type == self.device.type:
                storage = leaf.untyped_storage()
                if storage._cdata not in addresses:
                    addresses.add(storage._cdata)
                    made.append((self._fresh(leaf), leaf))
        self.after(func, made, overwritten)
        self.operators += 1
        return result

    def _fresh(self, tensor: torch.Tensor) -> int:
        number = self.tensors
        self.tensors += 1
        self.known(tensor.untyped_storage(), number)
        return number


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    schema = func._schema
    if not schema.is_mutable:
        return []
    found: list[torch.Tensor] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found.extend(leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))
    return found


def _is_view(func: Any) -> bool:
    """Whether the schema says that every result shares storage with an argument."""
    returns = func._schema.returns
    return bool(returns) and all(result.alias_info is not None and not result.alias_info.is_write for result in returns)
