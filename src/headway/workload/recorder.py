"""Writes down every aten operator that a training step under fake tensors dispatches; fake_step.py runs the step.

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
import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from headway.workload.flop import flop_formula
from headway.workload.recording import Call, OutputPlan, Recording, Signature, TensorMeta, tensor_leaves

__all__ = ["Recorder", "value_of"]

aten = torch.ops.aten

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


class Recorder(TorchDispatchMode):
    """Sees each operator of one step, and keeps the `recording`.

    Whoever runs the step says where it is: `path` of the module at work, `in_backward`, `closed` when it is over, and
    `outside` while tensors are met that are given to the step. `parameter_of_storage`: number of a storage to the name
    of the parameter in it.
    """

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
        self.parameter_of_storage: dict[int, str] = {}
        self._node_numbers: list[int] = []  # autograd's sequence numbers, ascending
        self._node_operators: list[int] = []
        self.outside = True  # tensors met now are given from outside
        self.closed = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would wrap every single call, for the sake of torch.compile, which is not at work here

    # -- tensors -----------------------------------------------------------------------------------------------------

    def meta_number(self, tensor: torch.Tensor) -> int:
        """The place of its metadata among `recording.metas`."""
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
        """An identity that no tensor has had."""
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
        """Give a tensor a tag."""
        tag = _Tag(identity, meta, storage, self._versions[storage])
        tensor._headway_tag = tag  # type: ignore[attr-defined]
        return tag

    def storage_of(self, tensor: torch.Tensor) -> int:
        """The number of the storage that it lies in."""
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
        if self.outside:
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
        """A fake twin of a tensor that the model made or kept by itself."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if tensor.device.type == "meta":
            return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
        was, self.outside = self.outside, True
        try:
            fake = self.fake_mode.from_tensor(tensor, static_shapes=True)
            self.tag(fake)
        finally:
            self.outside = was
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
        formula = flop_formula(func)
        out = flat if several else flat[0]
        flop = int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
        plan: tuple[OutputPlan | None, ...] | None = None
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
            plans = iter([OutputPlan(meta, source) for meta, source in zip(metas, sources, strict=True)])
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
        names = self.parameter_of_storage
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
        """Autograd saves a tensor."""
        if type(tensor) is FakeTensor:
            number = self.storage_of(tensor)
            self.recording.saved.setdefault(number, len(self.recording.signatures) - 1)
        return tensor

    @staticmethod
    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        """Autograd takes it back."""
        return tensor

    # -- modules -----------------------------------------------------------------------------------------------------

    def enter_module(self, name: str, args: Any, kwargs: Any) -> None:
        """A module is called."""
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
        """It returns."""
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
