"""Runs one training step of a model under fake tensors and writes down every aten operator that it dispatches.

Nothing is allocated: parameters, inputs and activations are fake tensors (torch._subclasses), which have shapes,
strides and storages, and no memory. The recorder sits above FakeTensorMode and below autograd, so that it sees the
operators that really run, forward and backward.

For a large model nearly every operator has been seen before: the same operator on tensors of the same shapes, strides,
dtypes and devices. FakeTensorMode answers the first time; from then on the recorder makes the output from what it
learnt, exactly as FakeTensorMode's own cache does, for a third of the price. Operators that change their arguments,
have no tensor argument or look at values are never answered from memory.

Small tensors that follow from numbers alone (`torch.arange(length)`, and what is computed from it) carry their values
along, so that a model may branch on them as it does in a real run.
"""

from __future__ import annotations

import bisect
import contextlib
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

__all__ = ["FLOP_FORMULAS", "Call", "Recording", "Signature", "TensorMeta", "record", "tensor_leaves", "value_of"]

aten = torch.ops.aten


def _tensor_shape(value: Any) -> Any:
    return value.shape if isinstance(value, torch.Tensor) else value


def _flash_for_cpu(query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _flash_for_cpu_backward(grad_out, query, key, value, *args, out_val=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_out.shape, query.shape, key.shape, value.shape)


def _grouped_mm(a, b, offs=None, *args, out_val=None, **kwargs) -> int:
    """2 x rows x inner x columns over all groups; each row (or inner index) belongs to one group only."""
    if a.dim() == 2 and b.dim() == 2:  # the inner dimension is divided among the groups
        return 2 * a.shape[0] * a.shape[1] * b.shape[1]
    if a.dim() == 2:  # rows of a are divided among the groups
        return 2 * a.shape[0] * a.shape[1] * b.shape[-1]
    if b.dim() == 2:  # columns of b are divided among the groups
        return 2 * a.shape[-2] * a.shape[-1] * b.shape[1]
    return 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[-1]


def _extra_formulas() -> dict[Any, Callable[..., int]]:
    formulas: dict[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: _flash_for_cpu,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_for_cpu_backward,
    }
    if hasattr(aten, "_grouped_mm"):
        formulas[aten._grouped_mm] = _grouped_mm
    for formula in formulas.values():
        # The mark by which torch's counter gives a formula the tensors instead of their shapes.
        formula._get_raw = True  # type: ignore[attr-defined]
    return {packet: formula for packet, formula in formulas.items() if packet not in flop_registry}


# What torch's registry lacks, in its own terms; pass as FlopCounterMode(custom_mapping=...) to get the same totals.
FLOP_FORMULAS = _extra_formulas()

_PRIM_DEVICE = torch.ops.prim.device.default
_DETACH = aten.detach.default
_GROUPED_MM = getattr(aten, "_grouped_mm", None)
_TENSOR = "\0tensor"  # stands for a tensor in an argument template; no aten argument is this string
_FROM_NUMBERS = {
    f"aten::{name}"
    for name in (
        "arange", "zeros", "ones", "full", "eye", "linspace", "scalar_tensor", "zeros_like", "ones_like", "full_like",
        "new_zeros", "new_ones", "new_full",
    )
}  # fmt: skip
_VALUELESS = {f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")}
_ASKS_FOR_VALUE = {"aten::_local_scalar_dense", "aten::equal"}
_KNOWN_ELEMENTS = 2**20  # values of larger tensors are not carried along
_NEVER_REMEMBERED = {"data_dependent_output", "dynamic_output_shape", "inplace_view"}


@dataclass(frozen=True)
class TensorMeta:
    """What an operator can see of a tensor, values excepted."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    known_value: bool  # a fake tensor that carries its value (a constant made from a Python number)
    plain: bool  # strided, neither lazily conjugated nor lazily negated


@dataclass
class _OutputPlan:
    """How to make one output again: `source` is the tensor argument whose storage it shares, or -1."""

    meta: int
    source: int


@dataclass
class Signature:
    """An operator together with the arguments and the metadata of the tensors that it was called on."""

    func: Any
    arguments: tuple[Any, ...]  # templates: tensors are placeholders, floats and bools come with their type
    keywords: tuple[tuple[str, Any], ...]
    inputs: tuple[int, ...]  # positions in Recording.metas
    outputs: tuple[int, ...]
    flop: int
    is_view: bool
    is_random: bool
    written: tuple[int, ...]  # tensor arguments that it changes in place
    plan: tuple[_OutputPlan | None, ...] | None  # None: ask FakeTensorMode every time
    container: type | None  # of several outputs: tuple or list


class _Tag:
    """What the recorder knows about a tensor: identity, metadata, storage."""

    __slots__ = ("identity", "meta", "storage", "value", "version")

    def __init__(self, identity: int, meta: int, storage: int, version: int):
        self.identity = identity
        self.meta = meta
        self.storage = storage
        self.version = version
        self.value: torch.Tensor | None = None  # the real tensor, where it is known


class _StorageRef(weakref.ref):
    """A weak reference that knows which storage it was."""

    __slots__ = ("address", "number")

    address: int
    number: int


@dataclass
class Call:
    """One call of a module: operators `start` to `stop` (exclusive), tensors in and out."""

    module: str
    parent: int  # position among the calls, or -1
    start: int
    arguments: tuple[int, ...]  # identities of the tensor leaves of (args, kwargs)
    stop: int = -1
    results: tuple[int, ...] = ()
    result_metas: tuple[int, ...] = ()
    structure: Any = None  # TreeSpec of what it returned; None if a leaf is no tensor


@dataclass
class Recording:
    """One training step at one batch size. Operators are parallel lists; `forward_stop` and `loss_stop` divide them."""

    metas: list[TensorMeta] = field(default_factory=list)
    signatures: list[Signature] = field(default_factory=list)
    inputs: list[tuple[int, ...]] = field(default_factory=list)
    outputs: list[tuple[int, ...]] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)  # of a backward operator: the forward operator it differentiates
    parameters_read: list[tuple[str, ...]] = field(default_factory=list)
    alias_updates: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # operator → (identity, meta)
    calls: list[Call] = field(default_factory=list)
    recomputed: set[str] = field(default_factory=set)  # modules that run again during the backward pass
    forward_stop: int = 0
    loss_stop: int = 0
    model_inputs: tuple[int, ...] = ()
    model_input_metas: tuple[int, ...] = ()
    model_outputs: tuple[int, ...] = ()
    output_storages: set[int] = field(default_factory=set)
    parameter_tensors: dict[str, int] = field(default_factory=dict)
    loss_parameters: tuple[str, ...] = ()
    # Memory: (operator, signed bytes, storage) in order; storages given from outside do not appear.
    events: list[tuple[int, int, int]] = field(default_factory=list)
    storage_bytes: list[int] = field(default_factory=list)
    storage_origin: list[int] = field(default_factory=list)  # operator that allocated it; -1: given from outside
    saved: dict[int, int] = field(default_factory=dict)  # storage → first operator position at which it was saved
    gradients: set[int] = field(default_factory=set)  # storages of the parameters' gradients


def tensor_leaves(tree: Any) -> list[torch.Tensor]:
    """The tensors in `tree`, in the order of torch's pytree; mappings and objects it does not know are looked into."""
    found: list[torch.Tensor] = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif isinstance(leaf, dict):
            for value in leaf.values():
                found.extend(tensor_leaves(value))
        elif hasattr(leaf, "__dataclass_fields__"):
            for name in leaf.__dataclass_fields__:
                found.extend(tensor_leaves(getattr(leaf, name, None)))
    return found


class _Recorder(TorchDispatchMode):
    def __init__(self, fake_mode: FakeTensorMode) -> None:
        super().__init__()
        self.fake_mode = fake_mode
        self.recording = Recording()
        self.path = ""  # of the innermost module that is running
        self.stack: list[tuple[str, int]] = []
        self.in_backward = False
        self._meta_numbers: dict[TensorMeta, int] = {}
        self._signatures: dict[Any, Signature] = {}
        self._identities = 0
        self._storages: dict[int, int] = {}  # address of a live storage → its number
        self._refs: list[_StorageRef | None] = []
        self._versions: list[int] = []
        self._writers: list[int] = []
        self._parameter_of_storage: dict[int, str] = {}
        self._node_numbers: list[int] = []  # autograd's sequence numbers, ascending
        self._node_operators: list[int] = []
        self._outside = True  # tensors met now are given from outside
        self.closed = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would wrap every single call, for the sake of torch.compile, which is not at work here

    # -- tensors -----------------------------------------------------------------------------------------------------

    def meta_number(self, tensor: torch.Tensor) -> int:
        meta = TensorMeta(
            shape=tuple(tensor.shape),
            stride=tuple(tensor.stride()) if tensor.layout is torch.strided else (),
            offset=int(tensor.storage_offset()) if tensor.layout is torch.strided else 0,
            dtype=tensor.dtype,
            device=tensor.device,
            known_value=getattr(tensor, "constant", None) is not None,
            plain=tensor.layout is torch.strided and not tensor.is_conj() and not tensor.is_neg(),
        )
        number = self._meta_numbers.get(meta)
        if number is None:
            number = self._meta_numbers[meta] = len(self.recording.metas)
            self.recording.metas.append(meta)
        return number

    def fresh(self) -> int:
        self._identities += 1
        return self._identities

    def tag(self, tensor: torch.Tensor) -> _Tag:
        """The tag of a tensor, made when it is first met, with a new identity if its storage was written meanwhile."""
        try:
            tag: _Tag = tensor._headway_tag  # type: ignore[attr-defined]
        except AttributeError:
            return self.attach(tensor, self.fresh(), self.meta_number(tensor), self.storage_of(tensor))
        if tag.version != self._versions[tag.storage]:
            # Somebody wrote through another view: what this tensor shows now is a result of that operator.
            tag.identity = self.fresh()
            tag.version = self._versions[tag.storage]
            writer = self._writers[tag.storage]
            self.recording.alias_updates.setdefault(writer, []).append((tag.identity, tag.meta))
        return tag

    def attach(self, tensor: torch.Tensor, identity: int, meta: int, storage: int) -> _Tag:
        tag = _Tag(identity, meta, storage, self._versions[storage])
        tensor._headway_tag = tag  # type: ignore[attr-defined]
        return tag

    def storage_of(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        number = self._storages.get(storage._cdata)
        return self._new_storage(storage) if number is None else number

    def _new_storage(self, storage: torch.UntypedStorage) -> int:
        recording = self.recording
        number = len(self._versions)
        address = storage._cdata
        size = storage.nbytes()
        self._versions.append(0)
        self._writers.append(-1)
        recording.storage_bytes.append(size)
        reference = _StorageRef(storage, self._freed)
        reference.address = address
        reference.number = number
        self._refs.append(reference)
        self._storages[address] = number
        if self._outside:
            recording.storage_origin.append(-1)
        else:
            operator = len(recording.signatures)
            recording.storage_origin.append(operator)
            recording.events.append((operator, size, number))
        return number

    def _freed(self, reference: Any) -> None:
        if self.closed:
            return
        number = reference.number
        if self._storages.get(reference.address) == number:
            del self._storages[reference.address]
        self._refs[number] = None
        recording = self.recording
        if recording.storage_origin[number] >= 0:
            recording.events.append((len(recording.signatures), -recording.storage_bytes[number], number))

    # -- operators ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is _PRIM_DEVICE:
            tensor = args[0]
            return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
        kwargs = kwargs or {}
        tensors: list[torch.Tensor] = []
        arguments = tuple([self._template(argument, tensors) for argument in args])
        keywords = tuple([(name, self._template(kwargs[name], tensors)) for name in kwargs]) if kwargs else ()
        for tensor in tensors:
            if type(tensor) is not FakeTensor:
                args, kwargs = pytree.tree_map_only(torch.Tensor, self.to_fake, (args, kwargs))
                tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
                break
        tags = [self.tag(tensor) for tensor in tensors]
        if func is _DETACH:  # autograd's bookkeeping: the same tensor under another name
            source = tags[0]
            result = self._another_view(source, tensors[0])
            number = source.meta
            if result is None:
                result = func(*args, **kwargs)
                number = self.meta_number(result)
            self.attach(result, source.identity, number, source.storage).value = source.value
            return result
        key = (func, arguments, keywords, *[tag.meta for tag in tags])
        signature = self._signatures.get(key)
        input_identities = tuple([tag.identity for tag in tags])
        if signature is not None and signature.plan is not None:
            result = self._remembered(signature, tensors, tags)
        else:
            name = func._schema.name if isinstance(func, torch._ops.OpOverload) else ""
            if name in _ASKS_FOR_VALUE and all(self._known(tag) for tag in tags):
                with torch._C._DisableTorchDispatch():
                    return func(*[tag.value for tag in tags])
            if name and func._overloadpacket is _GROUPED_MM and tensors[0].dtype is not torch.bfloat16:
                result = self._grouped_mm(tensors, args, kwargs)
            else:
                result = func(*args, **kwargs)
            result = self._observe(key, signature, tensors, tags, args, kwargs, result)
        self._write_down(input_identities, tags)
        if not self.in_backward and (not tags or self._known(tags[0]) or func._schema.name in _FROM_NUMBERS):
            self._carry_values(func, args, kwargs, tags, result)
        return result

    def _known(self, tag: _Tag) -> bool:
        return tag.value is not None and self._versions[tag.storage] == 0

    def _carry_values(self, func: Any, args: Any, kwargs: Any, tags: list[_Tag], result: Any) -> None:
        """Compute for real what follows from numbers alone."""
        if not isinstance(result, FakeTensor) or result.numel() > _KNOWN_ELEMENTS or result.device.type != "cpu":
            return
        tag = self.tag(result)
        if result.constant is not None:
            tag.value = result.constant
            return
        name = func._schema.name
        signature = self._last[0]
        if signature.written or signature.is_random or name in _VALUELESS:
            return
        if name in _FROM_NUMBERS:
            # Of a tensor argument only its shape is used.
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: _hollow(t), (args, kwargs))
        elif tags and all(self._known(each) for each in tags):
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: self.tag(t).value, (args, kwargs))
        else:
            return
        with torch._C._DisableTorchDispatch(), torch.no_grad():
            tag.value = func(*args, **kwargs)

    def to_fake(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if tensor.device.type == "meta":
            return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
        was, self._outside = self._outside, True
        try:
            fake = self.fake_mode.from_tensor(tensor, static_shapes=True)
            self.tag(fake)
        finally:
            self._outside = was
        return fake

    def _template(self, value: Any, tensors: list[torch.Tensor]) -> Any:
        kind = type(value)
        if kind is FakeTensor or isinstance(value, torch.Tensor):
            tensors.append(value)
            return _TENSOR
        if kind is list or kind is tuple:
            return tuple([self._template(item, tensors) for item in value])
        if kind is float or kind is bool or kind is complex:  # 1, 1.0 and True are equal and hash alike
            return (kind, value)
        return value

    @staticmethod
    def _grouped_mm(tensors: list[torch.Tensor], args: Any, kwargs: Any) -> torch.Tensor:
        """What aten._grouped_mm returns, its rows padded to 16 bytes. Its own meta kernel refuses all but bfloat16,
        and the CPU kernel takes float32 too."""
        a, b = tensors[:2]
        columns = b.shape[-1]
        if a.dim() == 2 and b.dim() == 2:
            offsets = args[2] if len(args) > 2 else kwargs["offs"]
            shape = (offsets.shape[0], a.shape[0], columns)
        elif a.dim() == 2 or b.dim() == 2:
            shape = (a.shape[-2], columns)
        else:
            shape = (a.shape[0], a.shape[1], columns)
        aligned = 16 // a.element_size()
        row = (columns + aligned - 1) // aligned * aligned
        stride = (shape[1] * row, row, 1) if len(shape) == 3 else (row, 1)
        return torch.empty_strided(shape, stride, dtype=a.dtype, device=a.device)

    def _another_view(self, source: _Tag, tensor: torch.Tensor) -> torch.Tensor | None:
        meta = self.recording.metas[source.meta]
        if meta.known_value or not meta.plain:
            return None
        with torch._C._DisableTorchDispatch():
            element = torch.empty(0, dtype=meta.dtype, device="meta")
            element.set_(tensor.untyped_storage(), meta.offset, meta.shape, meta.stride)  # type: ignore[call-overload]
        return FakeTensor(self.fake_mode, element, meta.device)

    def _remembered(self, signature: Signature, tensors: list[torch.Tensor], tags: list[_Tag]) -> Any:
        metas = self.recording.metas
        made: list[torch.Tensor | None] = []
        identities: list[int] = []
        assert signature.plan is not None
        for plan in signature.plan:
            if plan is None:
                made.append(None)
                continue
            meta = metas[plan.meta]
            with torch._C._DisableTorchDispatch():
                if plan.source >= 0:
                    element = torch.empty(0, dtype=meta.dtype, device="meta")
                    storage = tensors[plan.source].untyped_storage()
                    element.set_(storage, meta.offset, meta.shape, meta.stride)  # type: ignore[call-overload]
                else:
                    element = torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device="meta")
            tensor = FakeTensor(self.fake_mode, element, meta.device)
            if plan.source >= 0:
                number = tags[plan.source].storage
            else:
                number = self._new_storage(tensor.untyped_storage())
            identity = self.fresh()
            self.attach(tensor, identity, plan.meta, number)
            identities.append(identity)
            made.append(tensor)
        self._last = (signature, tuple(identities))
        return made[0] if signature.container is None else signature.container(made)

    def _observe(self, key, signature, tensors, tags, args, kwargs, result) -> Any:
        """Take FakeTensorMode's answer; learn the signature when it is met for the first time."""
        several = isinstance(result, tuple | list)
        flat = list(result) if several else [result]
        results = [item for item in flat if isinstance(item, torch.Tensor)]
        if signature is None:
            written = self._written(key[0], args, kwargs, tensors)
        else:
            written = signature.written
        operator = len(self.recording.signatures)
        for position in written:
            tag = tags[position]
            tensor = tensors[position]
            self._versions[tag.storage] += 1
            self._writers[tag.storage] = operator
            # Resizing and transposing in place change more than values.
            self.attach(tensor, self.fresh(), self.meta_number(tensor), self.storage_of(tensor))
        identities: list[int] = []
        metas: list[int] = []
        sources: list[int] = []
        seen: set[int] = set()
        storages = {tag.storage: position for position, tag in reversed(list(enumerate(tags)))}
        distinct = True
        for item in results:
            same = next((position for position, tensor in enumerate(tensors) if tensor is item), -1)
            if same >= 0:
                distinct = False
                tag = self.tag(item)
                if same not in written:
                    # The operator handed its argument back: a new name for the same tensor.
                    tag.identity = self.fresh()
                sources.append(same)
            else:
                known = self.storage_of(item)
                tag = self.attach(item, self.fresh(), self.meta_number(item), known)
                sources.append(storages.get(known, -1))
                if sources[-1] < 0:
                    if known in seen:
                        distinct = False
                    seen.add(known)
            identities.append(tag.identity)
            metas.append(tag.meta)
        for position in written:
            if not any(tensors[position] is item for item in results):
                tag = self.tag(tensors[position])
                identities.append(tag.identity)
                metas.append(tag.meta)
        if signature is None:
            signature = self._learn(key, tags, results, flat, several, written, metas, sources, distinct, args, kwargs)
        self._last = (signature, tuple(identities))
        return result

    def _learn(self, key, tags, results, flat, several, written, metas, sources, distinct, args, kwargs) -> Signature:
        func, arguments, keywords = key[:3]
        recording = self.recording
        tags_of_func = {str(tag).rsplit(".", 1)[-1] for tag in getattr(func, "tags", ())}
        packet = getattr(func, "_overloadpacket", func)
        formula = flop_registry.get(packet) or FLOP_FORMULAS.get(packet) or _decomposed_flop(func)
        out = flat if several else flat[0]
        flop = int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
        plan: tuple[_OutputPlan | None, ...] | None = None
        involved = [recording.metas[number] for number in (*key[3:], *metas)]
        if (
            distinct
            and not written
            and results
            and tags
            and len(results) + sum(item is None for item in flat) == len(flat)
            and not tags_of_func & _NEVER_REMEMBERED
            and all(meta.plain and not meta.known_value for meta in involved)
            and all(
                source >= 0 or item.untyped_storage().nbytes() == _packed_bytes(item)
                for item, source in zip(results, sources, strict=True)
            )
        ):
            plans = iter([_OutputPlan(meta, source) for meta, source in zip(metas, sources, strict=True)])
            plan = tuple([None if item is None else next(plans) for item in flat])
        signature = Signature(
            func=func,
            arguments=arguments,
            keywords=keywords,
            inputs=tuple(key[3:]),
            outputs=tuple(metas),
            flop=flop,
            is_view=bool(results) and not written and all(source >= 0 for source in sources),
            is_random="nondeterministic_seeded" in tags_of_func,
            written=tuple(written),
            plan=plan,
            container=(type(out) if several else None),
        )
        if signature.container not in (None, tuple, list):
            signature.plan = None
        self._signatures[key] = signature
        return signature

    @staticmethod
    def _written(func, args, kwargs, tensors) -> list[int]:
        schema = getattr(func, "_schema", None)
        if schema is None or not schema.is_mutable:
            return []
        written: list[int] = []
        for position, argument in enumerate(schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, torch.Tensor):
                    written.append(next(index for index, tensor in enumerate(tensors) if tensor is leaf))
        return sorted(set(written))

    def _write_down(self, input_identities: tuple[int, ...], tags: list[_Tag]) -> None:
        signature, output_identities = self._last
        recording = self.recording
        operator = len(recording.signatures)
        recording.signatures.append(signature)
        recording.inputs.append(input_identities)
        recording.outputs.append(output_identities)
        names = self._parameter_of_storage
        read = [names[tag.storage] for tag in tags if tag.storage in names]
        recording.parameters_read.append(tuple(dict.fromkeys(read)) if read else ())
        if self.in_backward:
            owner = self._owner()
            recording.owners.append(owner)
            recording.modules.append(recording.modules[owner])
        else:
            recording.owners.append(-1)
            recording.modules.append(self.path)
            # Autograd numbered its node for this operator just before it called us.
            number = torch.autograd._get_sequence_nr() - 1  # type: ignore[attr-defined]
            numbers = self._node_numbers
            if not numbers or numbers[-1] < number:
                numbers.append(number)
                self._node_operators.append(operator)

    def _owner(self) -> int:
        recording = self.recording
        node = torch._C._current_autograd_node()
        if node is not None:
            number = node._sequence_nr()
            position = bisect.bisect_right(self._node_numbers, number) - 1
            # AccumulateGrad has the highest number there is: it belongs to the node that gave it the gradient.
            if position >= 0 and number <= self._node_numbers[-1] + 1:
                return self._node_operators[position]
        previous = recording.owners[-1]
        return previous if previous >= 0 else len(recording.owners) - 1

    # -- what autograd keeps -----------------------------------------------------------------------------------------

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) is FakeTensor:
            number = self.storage_of(tensor)
            self.recording.saved.setdefault(number, len(self.recording.signatures) - 1)
        return tensor

    @staticmethod
    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    # -- modules -----------------------------------------------------------------------------------------------------

    def enter_module(self, name: str, args: Any, kwargs: Any) -> None:
        recording = self.recording
        parent = self.stack[-1][1] if self.stack else -1
        if self.in_backward:  # activation checkpointing runs it again
            recording.recomputed.add(name)
            self.stack.append((name, parent))
            return
        identities = tuple([self.tag(leaf).identity for leaf in tensor_leaves((args, kwargs))])
        self.stack.append((name, len(recording.calls)))
        recording.calls.append(Call(name, parent, len(recording.signatures), identities))
        self.path = name

    def leave_module(self, output: Any) -> None:
        _, position = self.stack.pop()
        if self.in_backward:
            return
        self.path = self.stack[-1][0] if self.stack else ""
        recording = self.recording
        call = recording.calls[position]
        call.stop = len(recording.signatures)
        leaves, structure = pytree.tree_flatten(output)
        if all(isinstance(leaf, torch.Tensor) for leaf in leaves):
            call.structure = structure
        else:
            leaves = tensor_leaves(output)
        tags = [self.tag(leaf) for leaf in leaves]
        call.results = tuple([tag.identity for tag in tags])
        call.result_metas = tuple([tag.meta for tag in tags])


def _decomposed_flop(func: Any) -> Callable[..., int] | None:
    """Operators that torch defines by others are counted by those, as torch's counter does."""
    if not isinstance(func, torch._ops.OpOverload):
        return None
    if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return None

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
            func.decompose(*args, **kwargs)
        return counter.get_total_flops()

    return count


def _hollow(tensor: torch.Tensor) -> torch.Tensor:
    """A real tensor of the same shape and dtype that holds one element."""
    with torch._C._DisableTorchDispatch():
        return torch.empty((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)


def value_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The real value of a fake tensor that follows from numbers alone, else None."""
    tag = getattr(tensor, "_headway_tag", None)
    return None if tag is None else tag.value


def _packed_bytes(tensor: torch.Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (int(tensor.storage_offset()) + last + 1) * tensor.element_size()


def record(
    model: torch.nn.Module,
    run: Callable[[torch.nn.Module, Any], Any],
    reduce: Callable[[Any, Any], torch.Tensor],
    inputs: Any,
    targets: Any,
    device: torch.device,
    where: list[str],
) -> Recording:
    """Record `reduce(run(model, inputs), targets).backward()`.

    `inputs` and `targets` are pytrees in which tensors are given as meta tensors of the batch size to record. `where`
    receives the path of the module that was running, for whoever has to report an exception.
    """
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = _Recorder(fake_mode)
    recording = recorder.recording
    with _quiet_collector(), _quiet_log(), contextlib.ExitStack() as stack:

        def fake(tensor: torch.Tensor) -> torch.Tensor:
            with fake_mode:
                twin = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
                if tensor.requires_grad:
                    twin.requires_grad_()
            recorder.tag(twin)
            return twin

        inputs, targets = pytree.tree_map_only(torch.Tensor, fake, (inputs, targets))
        tags = [recorder.tag(leaf) for leaf in tensor_leaves(inputs)]
        recording.model_inputs = tuple([tag.identity for tag in tags])
        recording.model_input_metas = tuple([tag.meta for tag in tags])
        twins = stack.enter_context(_fake_state(model, fake_mode, recorder, device))
        stack.enter_context(_module_hooks(model, recorder))
        stack.enter_context(torch.enable_grad())
        recorder._outside = False
        try:
            with fake_mode, recorder, torch.autograd.graph.saved_tensors_hooks(recorder.pack, recorder.unpack):
                output = run(model, inputs)
                recording.forward_stop = len(recording.signatures)
                leaves = tensor_leaves(output)
                recording.model_outputs = tuple([recorder.tag(leaf).identity for leaf in leaves])
                recording.output_storages = {recorder.storage_of(leaf) for leaf in leaves}
                del leaves
                recorder.path = "(loss)"
                loss = reduce(output, targets)
                recording.loss_stop = len(recording.signatures)
                recorder.in_backward = True
                if loss.requires_grad:
                    loss.backward()
                del loss
        finally:
            recorder.closed = True
            where.append(recorder.path if recorder.path == "(loss)" or not recorder.stack else recorder.stack[-1][0])
        read = recording.parameters_read[recording.forward_stop : recording.loss_stop]
        recording.loss_parameters = tuple(dict.fromkeys(name for names in read for name in names))
        for twin in twins:
            if twin.grad is not None:
                recording.gradients.add(recorder.storage_of(twin.grad))
        del output
    return recording


@contextlib.contextmanager
def _quiet_collector() -> Iterator[None]:
    # Hundreds of thousands of small objects are made and kept: cyclic collection would walk them over and over.
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextlib.contextmanager
def _quiet_log() -> Iterator[None]:
    # It logs a traceback of what it also raises.
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(was)


@contextlib.contextmanager
def _fake_state(
    model: torch.nn.Module, fake_mode: FakeTensorMode, recorder: _Recorder, device: torch.device
) -> Iterator[list[torch.Tensor]]:
    """Parameters and buffers of `model` replaced by fake twins; one twin for a tensor reached by several names."""
    undo: list[tuple[dict[str, Any], str, Any]] = []
    recurrent: list[tuple[torch.nn.RNNBase, list[Any]]] = []
    twins: dict[int, torch.Tensor] = {}
    parameters: list[torch.Tensor] = []
    try:
        with fake_mode:
            for prefix, module in model.named_modules():
                for name, tensor in module._parameters.items():
                    if tensor is None:
                        continue
                    path = f"{prefix}.{name}" if prefix else name
                    twin = twins.get(id(tensor))
                    if twin is None:
                        plain = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
                        twin = twins[id(tensor)] = torch.nn.Parameter(plain, requires_grad=tensor.requires_grad)
                        tag = recorder.tag(twin)
                        recorder._parameter_of_storage[tag.storage] = path
                        recorder.recording.parameter_tensors[path] = tag.identity
                        parameters.append(twin)
                    undo.append((module._parameters, name, tensor))
                for name, tensor in module._buffers.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in twins:
                        twins[id(tensor)] = torch.empty_strided(
                            tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device
                        )
                        recorder.tag(twins[id(tensor)])
                    undo.append((module._buffers, name, tensor))
                if isinstance(module, torch.nn.RNNBase):  # keeps a second list of its parameters
                    recurrent.append((module, module._flat_weights))
        for table, name, tensor in undo:
            table[name] = twins[id(tensor)]
        for module, weights in recurrent:
            module.__dict__["_flat_weights"] = [
                twins[id(weight)] if isinstance(weight, torch.Tensor) else weight for weight in weights
            ]
        yield parameters
    finally:
        for table, name, tensor in undo:
            table[name] = tensor
        for module, weights in recurrent:
            module.__dict__["_flat_weights"] = weights


@contextlib.contextmanager
def _module_hooks(model: torch.nn.Module, recorder: _Recorder) -> Iterator[None]:
    handles = []
    try:
        for name, module in model.named_modules():

            def enter(module, args, kwargs, *, name=name):
                recorder.enter_module(name, args, kwargs)

            def leave(module, args, kwargs, output):
                recorder.leave_module(output)

            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
