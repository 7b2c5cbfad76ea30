"""Saved activations that rest off the device between forward and backward, layer by layer.

What autograd saves in the chosen layers leaves as soon as it is saved, and comes back one layer ahead of the backward
pass, as in vDNN (Rhu et al., MICRO 2016) and for activation checkpoints in ZeRO-Infinity (Rajbhandari et al., SC 2021,
section 5.1.2): of a layer that is recomputed as well, only what it began with leaves.

What moves is a storage, whole and once, however many operators and layers saved views of it: that is also what frees
memory, and strides come back as they were, so that every kernel sees what it would have seen. Parameters stay, and so
do their copies in lower precision that autocast made, which is found out from the graph.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import register_multi_grad_hook, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint

from headway.memory.tiers import Pending, Store
from headway.plan.plan import Tier
from headway.train.infinity_groups import local_of
from headway.workload.graph import Graph

__all__ = ["ActivationSwap", "SwapTraffic"]


@dataclass
class SwapTraffic:
    """What went out and came back, in bytes; `late`: storages that nobody had begun to read when they were needed.

    `spared_bytes`: of storages that were needed before they had left.
    """

    out_bytes: int = 0
    back_bytes: int = 0
    spared_bytes: int = 0
    late: int = 0


class _Saved:
    """One storage that autograd needs again. It lives as long as the graph that saved it."""

    def __init__(self, swap: ActivationSwap, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.device, self.size, self.version = tensor.device, storage.nbytes(), tensor._version
        self.seen = StorageWeakRef(storage)  # as long as it exists, no other storage gets this address
        self.uses = 0
        self.here: torch.UntypedStorage | None = storage  # until it is written
        self.reading: tuple[Pending, torch.Tensor] | None = None
        self.name = swap._name(self.size)
        self._free = swap._free

    def __del__(self) -> None:
        self._free.setdefault(self.size, []).append(self.name)


@dataclass
class _Handle:
    """How a saved tensor looks into its storage."""

    saved: _Saved
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass
class _Kept:
    """A tensor that stays; detached, for autograd must not find its own output in its own graph."""

    tensor: torch.Tensor


@dataclass
class _Wrapped:
    """A tensor made of others (a DTensor): what it is made of, packed, and how to put it together."""

    kind: type
    inner: dict[str, Any]
    context: Any
    shape: torch.Size
    stride: tuple[int, ...]


@dataclass(eq=False)
class _Visit:
    """One call of a layer's module in a forward pass: what was saved in it, and the call before it."""

    kept: set[int]  # storages of parameters and buffers
    parameters: set[int]
    previous: _Visit | None
    saved: list[weakref.ref[_Saved]] = field(default_factory=list)


class ActivationSwap:
    """Lets what `module`'s layers save rest in `tier` of `store`. Install once, before the first forward pass.

    `root` is what is called for each micro-batch, `model` the model in it. `layers` go out; of those in `recompute`
    only the inputs. Storages below `smallest_bytes` stay. At most `in_flight_bytes` are on their way out before the
    forward pass waits; that much more than the layers at work is on the device at any time.
    """

    def __init__(
        self,
        root: nn.Module,
        model: nn.Module,
        graph: Graph,
        *,
        store: Store,
        tier: Tier,
        layers: tuple[int, ...],
        recompute: tuple[int, ...] = (),
        prefix: str = "",
        smallest_bytes: int = 4096,
        in_flight_bytes: int = 256 * 2**20,
    ) -> None:
        self.store, self.prefix = store, prefix
        self.tier: Tier = tier
        self.smallest_bytes, self.in_flight_bytes = smallest_bytes, in_flight_bytes
        self.traffic = SwapTraffic()
        self._numbers = count()
        self._free: dict[int, list[str]] = {}  # names of tensors in the store that nobody needs, by size
        self._known: weakref.WeakValueDictionary[int, _Saved] = weakref.WeakValueDictionary()
        self._leaving: deque[tuple[Pending, torch.Tensor, weakref.ref[_Saved]]] = deque()
        self._leaving_bytes = 0
        self._last: _Visit | None = None
        chosen, again = set(layers), set(recompute)
        for path in dict.fromkeys(unit.module for unit in graph.units if unit.layer in chosen):
            module = model.get_submodule(path)
            is_recomputed = any(unit.module == path and unit.layer in again for unit in graph.units)
            wrap = self._recomputed if is_recomputed else self._swapped
            module.forward = wrap(module, module.forward)
        for path in dict.fromkeys(unit.module for unit in graph.units if unit.layer not in chosen):
            with contextlib.suppress(AttributeError):  # a layer of another stage
                # What has left meanwhile is let go, also while other layers are at work.
                model.get_submodule(path).register_forward_pre_hook(self._passing)
        root.register_forward_pre_hook(self._begin, prepend=True)

    # -- layers

    def _begin(self, _module: nn.Module, _args: Any) -> None:
        self._last = None

    def _passing(self, _module: nn.Module, _args: Any) -> None:
        self._forget_what_left()

    def _swapped(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            visit = self._visit(module)
            with saved_tensors_hooks(lambda tensor: self._pack(visit, tensor), self._unpack):
                output = forward(*args, **kwargs)
            self._watch(visit, output)
            return output

        return run

    def _recomputed(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Chen et al. (arXiv:1604.06174), with the inputs that it keeps resting off the device."""

        def run(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            visit = self._visit(module)
            leaves, structure = tree_flatten((args, kwargs))
            packed = [self._pack(visit, leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            needs = [isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves]
            first = [leaves]  # for the forward pass; emptied there, so that nothing here keeps them
            del leaves

            # `checkpoint` repeats the random numbers of those devices that its positional arguments lie on.
            def compute(_where: torch.Tensor) -> Any:
                given = first.pop() if first else self._bring_back(packed, needs)
                positional, named = tree_unflatten(given, structure)
                return forward(*positional, **named)

            output = checkpoint(compute, torch.empty(0, device=self.store.device), use_reentrant=False)
            self._watch(visit, output)
            return output

        return run

    def _bring_back(self, packed: list[Any], needs: list[bool]) -> list[Any]:
        found = []
        for leaf, need in zip(packed, needs):
            if isinstance(leaf, _Handle | _Kept | _Wrapped):
                leaf = self._unpack(leaf).detach()
                leaf.requires_grad_(need)
            found.append(leaf)
        return found

    def _visit(self, module: nn.Module) -> _Visit:
        kept = {local_of(tensor).untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
        self._last = _Visit(kept, {id(parameter) for parameter in module.parameters()}, self._last)
        return self._last

    def _watch(self, visit: _Visit, output: Any) -> None:
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        if outputs and visit.saved:
            register_multi_grad_hook(outputs, lambda _grad: self._backward_begins(visit), mode="any")

    def _backward_begins(self, visit: _Visit) -> None:
        for each in (visit, visit.previous):
            for reference in each.saved if each is not None else ():
                saved = reference()
                if saved is not None and saved.uses:
                    self._fetch(saved)

    # -- tensors

    def _pack(self, visit: _Visit, tensor: torch.Tensor) -> _Handle | _Kept | _Wrapped:
        if is_traceable_wrapper_subclass(tensor):
            names, context = tensor.__tensor_flatten__()
            parts = {name: getattr(tensor, name) for name in names}
            inner = {
                name: self._pack(visit, part) if isinstance(part, torch.Tensor) else part
                for name, part in parts.items()
            }
            return _Wrapped(type(tensor), inner, context, tensor.shape, tensor.stride())
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout != torch.strided:
            return _Kept(tensor.detach())
        storage = tensor.untyped_storage()
        if (
            storage.nbytes() < self.smallest_bytes
            or storage._cdata in visit.kept
            or _is_cast_of(tensor, visit.parameters)
        ):
            return _Kept(tensor.detach())
        self._forget_what_left()
        saved = self._known.get(storage._cdata)
        if saved is None or saved.seen.expired() or saved.version != tensor._version:
            saved = self._send(tensor)
            self._known[storage._cdata] = saved
        saved.uses += 1
        if not any(reference() is saved for reference in visit.saved):
            visit.saved.append(weakref.ref(saved))
        return _Handle(saved, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, _Kept):
            return packed.tensor
        if isinstance(packed, _Wrapped):
            inner = {
                name: self._unpack(each) if isinstance(each, _Handle | _Kept | _Wrapped) else each
                for name, each in packed.inner.items()
            }
            kind: Any = packed.kind
            return kind.__tensor_unflatten__(inner, packed.context, packed.shape, packed.stride)
        saved = packed.saved
        storage = saved.here
        if storage is not None:
            self.traffic.spared_bytes += saved.size
        else:
            self.traffic.late += saved.reading is None
            self._fetch(saved)
            assert saved.reading is not None
            pending, back = saved.reading
            pending.wait()
            storage = back.untyped_storage()
        saved.uses -= 1
        if saved.uses <= 0:
            saved.reading = None  # autograd has it now; should it ask once more, it is read once more
        with torch.no_grad():
            view = torch.empty(0, dtype=packed.dtype, device=saved.device)
            return view.set_(storage, packed.offset, packed.shape, packed.stride)  # type: ignore[call-overload]

    def _send(self, tensor: torch.Tensor) -> _Saved:
        saved = _Saved(self, tensor)
        whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        whole.set_(tensor.untyped_storage())  # type: ignore[call-overload]
        pending = self.store.write(saved.name, whole, self.tier)
        self.traffic.out_bytes += saved.size
        self._leaving.append((pending, whole, weakref.ref(saved)))
        self._leaving_bytes += saved.size
        while self._leaving_bytes > self.in_flight_bytes:
            self._forget_oldest()
        return saved

    def _fetch(self, saved: _Saved) -> None:
        self._forget_what_left()
        if saved.here is not None or saved.reading is not None:
            return
        back = torch.empty(saved.size, dtype=torch.uint8, device=saved.device)
        saved.reading = (self.store.read(saved.name, into=back), back)
        self.traffic.back_bytes += saved.size

    def _forget_what_left(self) -> None:
        while self._leaving and self._leaving[0][0].done:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        """Let go of what has left the device; wait for it if it has not."""
        pending, whole, reference = self._leaving.popleft()
        pending.wait()
        self._leaving_bytes -= whole.numel()
        saved = reference()
        if saved is not None:
            saved.here = None

    def _name(self, size: int) -> str:
        free = self._free.get(size)
        return free.pop() if free else f"{self.prefix}activations.{next(self._numbers)}"

    def end_step(self) -> None:
        """Between steps: everything has left, and nothing is needed any more."""
        self._last = None
        while self._leaving:
            self._forget_oldest()


def _is_cast_of(tensor: torch.Tensor, parameters: set[int]) -> bool:
    """Whether a tensor is a cast, or a view of a cast, of one of the parameters and nothing else."""
    node = tensor.grad_fn
    for _ in range(4):
        if node is None:
            return False
        variable = getattr(node, "variable", None)
        if variable is not None:
            return id(variable) in parameters
        if len(node.next_functions) != 1 or not node.name().startswith(_VIEWS_AND_CASTS):
            return False
        node = node.next_functions[0][0]
    return False


_VIEWS_AND_CASTS = ("ToCopyBackward", "TBackward", "TransposeBackward", "ViewBackward", "PermuteBackward")
