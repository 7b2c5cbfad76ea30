"""Any `torch.nn.Module` to a `Graph`, without allocating it.

The model runs one training step (forward, loss, backward) on fake tensors, twice: with 2 samples and with 3. The two
recordings must dispatch the same operators; every shape, integer argument, FLOP and byte count is then solved as
`fixed + per_sample * samples`. Nothing is assumed about repeated blocks: each operator of each layer really was
dispatched, at both sizes.

Layers are found from the dataflow. A pipeline may be cut before a module call where exactly one tensor that depends on
parameters crosses from before to after, and that tensor enters through this call's arguments and is read nowhere
else. Tensors that follow from the model's inputs alone (masks, rotary tables) may cross freely, as every pipeline
stage computes them again.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import msgspec
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import UninitializedParameter
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from headway.errors import TraceError
from headway.workload.blocks import find_blocks
from headway.workload.graph import Affine, Graph, Layer, Operator, Parameter, TensorKind, Unit
from headway.workload.recorder import Call, Recording, Signature, TensorMeta, record, tensor_leaves, value_of

__all__ = ["construct_on_meta", "meta_construction", "trace", "without_cache"]

_SIZES = (2, 3)  # never 1: size-1 dimensions broadcast, and models treat them specially
_CONTAINERS = (torch.nn.ModuleList, torch.nn.Sequential, torch.nn.ModuleDict)


def trace(
    model: torch.nn.Module,
    inputs: Any,
    *,
    name: str,
    loss: Callable[..., torch.Tensor] | None = None,
    target: Any = None,
    samples: int | None = None,
) -> Graph:
    """What one training step of `model` computes, for any number of samples.

    `inputs`: what the model is called with; a tensor, a tuple (positional arguments) or a dict (keyword arguments),
    with the batch as dimension 0. `target`: what `loss(output, target)` is called with; without one, `loss(output)`.
    Only shapes and dtypes matter: the tensors may be on the meta device, and so may the model. `samples` is the number
    of samples in `inputs`, by default dimension 0 of its first tensor; every tensor with that dimension 0 grows with
    the batch, and the others are kept as they are. Without `loss`, the step differentiates the output's `.loss` if
    there is one, else the sum of its `.logits`, else the sum of all its floating-point tensors.

    Operators of the loss are in the last layer with the module path "(loss)". The operators of a backward pass belong
    to the module and layer of the forward operator that they differentiate. A tensor changed in place gets a new
    identity; where other views of it are read afterwards, they appear as further `outputs` of the operator that wrote.
    `Layer.saved` leaves out the model's own inputs, as the caller keeps them. `Layer.entry_argument` counts the tensor
    leaves of (args, kwargs).

    Raises TraceError, with the path of the module, if the model cannot run on fake tensors (its control flow depends
    on values, it calls `.item()`, its own code raises), or if it computes differently at another batch size.
    """
    arguments, keywords = _call_of(inputs)
    leaves = [leaf for leaf in pytree.tree_leaves((arguments, keywords)) if isinstance(leaf, torch.Tensor)]
    if not leaves:
        raise TraceError("the inputs hold no tensor", place=name, remedy="pass a tensor, a tuple or a dict of tensors")
    batched = next((leaf for leaf in leaves if leaf.dim() > 0), None)
    if samples is None:
        if batched is None:
            raise TraceError("no input has a batch dimension", place=name, remedy="make dimension 0 the batch")
        samples = batched.size(0)
    if samples < 1:
        raise TraceError("the inputs hold no samples", place=name, remedy="give a batch of at least one sample")
    for path, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise TraceError(
                f"parameter {path} has no shape yet", place=name, remedy="call the model once, or avoid lazy modules"
            )
    device = _device(model, leaves)
    recordings = [_record(model, (arguments, keywords), target, loss, samples, size, device, name) for size in _SIZES]
    return find_blocks(_Builder(model, name, recordings[0], recordings[1]).graph(leaves[0]))


def _call_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, dict) or (hasattr(inputs, "keys") and hasattr(inputs, "__getitem__")):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def _device(model: torch.nn.Module, leaves: list[torch.Tensor]) -> torch.device:
    """Where the model would run: on the accelerator that holds it, else on the CPU."""
    for tensor in (*model.parameters(), *model.buffers(), *leaves):
        if tensor.device.type not in ("meta", "cpu"):
            return tensor.device
    return torch.device("cpu")


# -- running ----------------------------------------------------------------------------------------------------------


def _record(model, call, target, loss, samples: int, size: int, device: torch.device, name: str) -> Recording:
    def resized(exact: bool):
        def resize(tensor: torch.Tensor) -> torch.Tensor:
            shape = list(tensor.shape)
            if shape and shape[0] == samples:
                shape[0] = size
            elif shape and not exact and shape[0] > samples and shape[0] % samples == 0:
                shape[0] = shape[0] // samples * size  # targets flattened to (batch * sequence,)
            made = torch.empty(shape, dtype=tensor.dtype, device="meta")
            return made.requires_grad_(tensor.requires_grad)

        return resize

    inputs = pytree.tree_map_only(torch.Tensor, resized(True), call)
    targets = pytree.tree_map_only(torch.Tensor, resized(False), target)

    def run(module, arguments):
        return module(*arguments[0], **arguments[1])

    def reduce(output, wanted):
        if loss is None:
            return _scalar(output)
        value = loss(output) if wanted is None else loss(output, wanted)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(type(value))
            raise TraceError(
                f"the loss is {found}", place=f"{name}: loss", remedy="return a scalar, the mean over the samples"
            )
        return value.reshape(())

    where: list[str] = []
    try:
        with without_cache(model), _transformers_may_look():
            return record(model, run, reduce, inputs, targets, device, where)
    except TraceError:
        raise
    except Exception as error:
        place = where[-1] if where else ""
        place = f"{name}: {place}" if place else name
        raise TraceError(
            f"the model cannot be traced: {_first_lines(error)}", place=place, remedy=_remedy(error, size)
        ) from error


def _first_lines(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()][:3]
    return f"{type(error).__name__}: {' '.join(lines)}" if lines else type(error).__name__


def _remedy(error: Exception, size: int) -> str:
    text = str(error)
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException) or "item()" in text:
        return (
            "tracing knows shapes, not values: avoid .item(), nonzero(), boolean masks and branches on tensor values "
            "in forward and in the loss (torch.where, masks by multiplication)"
        )
    if "numpy" in text:
        return "stay in torch in forward and in the loss: numpy sees values, and tracing has none"
    if isinstance(error, TypeError) and "argument" in text:
        return "give the inputs as the model's forward takes them: a tensor, a tuple, or a dict of keyword arguments"
    if "device" in text:
        return "keep tensors that forward uses in parameters or buffers, and create new ones on the input's device"
    return f"the model is called here with a batch of {size}; it must work for any batch size of 2 or more"


def _scalar(output: Any) -> torch.Tensor:
    loss = getattr(output, "loss", None)
    if isinstance(loss, torch.Tensor):
        return loss
    logits = getattr(output, "logits", None)
    tensors = [logits] if isinstance(logits, torch.Tensor) else tensor_leaves(output)
    sums = [tensor.sum() for tensor in tensors if tensor.is_floating_point()]
    if not sums:
        raise TraceError("the output holds no floating-point tensor", remedy="give a loss")
    total = sums[0]
    for term in sums[1:]:
        total = total + term
    return total


@contextlib.contextmanager
def without_cache(model: torch.nn.Module) -> Iterator[None]:
    """`config.use_cache = False` on every configuration in the model (transformers): training keeps no KV cache."""
    changed: list[tuple[Any, Any]] = []
    try:
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if getattr(config, "use_cache", None):
                changed.append((config, config.use_cache))
                config.use_cache = False
        yield
    finally:
        for config, value in changed:
            config.use_cache = value


@contextlib.contextmanager
def _transformers_may_look() -> Iterator[None]:
    """Let transformers branch on fake tensors whose values are known, as it does on real ones.

    It builds attention masks, and repeats keys and values for them, whenever it sees a fake tensor; a real run that
    finds nothing masked does neither. Positions that follow from the sequence's length are known here.
    """
    module: Any = sys.modules.get("transformers.utils.import_utils")
    original = getattr(module, "is_fake_tensor", None)
    if original is None:
        yield
        return
    module.is_fake_tensor = lambda tensor: original(tensor) and value_of(tensor) is None
    try:
        yield
    finally:
        module.is_fake_tensor = original


# -- solving ----------------------------------------------------------------------------------------------------------


def _solve(low: float, high: float) -> tuple[float, float]:
    slope = (high - low) / (_SIZES[1] - _SIZES[0])
    return low - slope * _SIZES[0], slope


def _affine(low: float, high: float) -> Affine:
    fixed, slope = _solve(low, high)
    return Affine(fixed=fixed, per_sample=slope)


def _integers(low: int, high: int) -> tuple[int, int]:
    slope = (high - low) // (_SIZES[1] - _SIZES[0])
    return low - slope * _SIZES[0], slope


class _Mismatch(Exception):
    """The two recordings differ in a way that no affine function explains."""


class _Solved:
    """One operator with arguments and metadata, solved for any number of samples."""

    __slots__ = ("arguments", "digest", "flop", "inputs", "is_random", "is_view", "keywords", "outputs", "target")

    def __init__(self, builder: _Builder, low: Signature, high: Signature) -> None:
        self.target = str(low.func)
        self.inputs = tuple(builder.kind(a, b) for a, b in zip(low.inputs, high.inputs, strict=True))
        self.outputs = tuple(builder.kind(a, b) for a, b in zip(low.outputs, high.outputs, strict=True))
        position = iter(range(len(low.inputs)))
        self.arguments = tuple(_argument(a, b, position) for a, b in zip(low.arguments, high.arguments, strict=True))
        self.keywords = {
            name: _argument(a, b, position) for (name, a), (_, b) in zip(low.keywords, high.keywords, strict=True)
        }
        self.flop = _affine(low.flop, high.flop)
        self.is_view = low.is_view
        self.is_random = low.is_random
        content = (self.target, self.inputs, self.outputs, self.arguments, self.keywords)
        self.digest = hashlib.sha256(msgspec.json.encode(content)).digest()


def _argument(low: Any, high: Any, position: Iterator[int]) -> Any:
    """A pair of argument templates as the JSON described at `Operator`."""
    if isinstance(low, tuple):
        if len(low) == 2 and isinstance(low[0], type):  # a float, bool or complex number, with its type
            return _number(low[1], high[1])
        if len(low) != len(high):
            raise _Mismatch
        return [_argument(a, b, position) for a, b in zip(low, high, strict=True)]
    if isinstance(low, str):
        return {"tensor": next(position)} if low == "\0tensor" else low
    if low is None or high is None:
        if low is not high:
            raise _Mismatch
        return None
    if isinstance(low, int):
        return _number(low, high)
    if isinstance(low, torch.dtype):
        return {"dtype": _name(low)}
    return _name(low)


def _number(low: Any, high: Any) -> Any:
    if isinstance(low, bool):
        return low
    if isinstance(low, complex):
        return [low.real, low.imag]
    if low == high or low != low:
        return low if abs(low) != float("inf") and low == low else str(low)
    if isinstance(low, int) and isinstance(high, int):
        fixed, slope = _integers(low, high)
        return {"fixed": fixed, "per_sample": slope}
    fixed, slope = _solve(low, high)
    return {"fixed": fixed, "per_sample": slope}


def _name(value: Any) -> str:
    """`torch.float32` → "float32", `torch.device("cpu")` → "cpu"."""
    text = str(value)
    return text.removeprefix("torch.")


# -- building ---------------------------------------------------------------------------------------------------------


class _Builder:
    """Two recordings of the same step, at 2 and at 3 samples, to one Graph."""

    def __init__(self, model: torch.nn.Module, name: str, low: Recording, high: Recording) -> None:
        self.model = model
        self.name = name
        self.low = low
        self.high = high
        self._kinds: dict[tuple[TensorMeta, TensorMeta] | tuple[int, int], TensorKind] = {}
        self._interned: dict[TensorKind, TensorKind] = {}
        self.solved = self._solve_operators()
        self.tainted = self._taint()
        self.notes = self._notes()

    def kind(self, low: int, high: int) -> TensorKind:
        found = self._kinds.get((low, high))
        if found is None:
            a, b = self.low.metas[low], self.high.metas[high]
            if len(a.shape) != len(b.shape) or a.dtype != b.dtype:
                raise _Mismatch
            solved = [_integers(x, y) for x, y in zip(a.shape, b.shape, strict=True)]
            made = TensorKind(
                fixed=tuple(fixed for fixed, _ in solved),
                per_sample=tuple(slope for _, slope in solved),
                dtype=_name(a.dtype),
            )
            found = self._kinds[(low, high)] = self._interned.setdefault(made, made)
        return found

    def _solve_operators(self) -> list[_Solved]:
        low, high = self.low, self.high
        cache: dict[tuple[int, int], _Solved] = {}
        solved: list[_Solved] = []
        for operator, (a, b) in enumerate(zip(low.signatures, high.signatures, strict=False)):
            found = cache.get((id(a), id(b)))
            if found is None:
                if a.func is not b.func or low.modules[operator] != high.modules[operator]:
                    self._refuse(operator)
                try:
                    found = cache[(id(a), id(b))] = _Solved(self, a, b)
                except (_Mismatch, ValueError):
                    self._refuse(operator)
            solved.append(found)
        if len(low.signatures) != len(high.signatures):
            self._refuse(min(len(low.signatures), len(high.signatures)))
        if low.inputs != high.inputs or low.outputs != high.outputs:
            edges = enumerate(zip(low.inputs, high.inputs, low.outputs, high.outputs))
            self._refuse(next(operator for operator, (a, b, c, d) in edges if a != b or c != d))
        if len(low.calls) != len(high.calls) or any(a.module != b.module for a, b in zip(low.calls, high.calls)):
            self._refuse(low.forward_stop)
        return solved

    def _refuse(self, operator: int) -> NoReturn:
        def at(recording: Recording) -> str:
            if operator < len(recording.signatures):
                return f"{recording.signatures[operator].func} in {recording.modules[operator] or 'the model'}"
            return "nothing more"

        raise TraceError(
            f"the model does not compute the same at every batch size: operator {operator} is {at(self.low)} "
            f"with {_SIZES[0]} samples, and {at(self.high)} with {_SIZES[1]}",
            place=self.name,
            remedy="make forward independent of the number of samples (no branch on it, no cache kept between calls)",
        )

    # -- dataflow ----------------------------------------------------------------------------------------------------

    def _taint(self) -> set[int]:
        """Tensors that cannot be had from the model's inputs alone: they depend on parameters, or on chance."""
        low = self.low
        tainted = set(low.parameter_tensors.values())
        for operator in range(low.loss_stop):
            signature = low.signatures[operator]
            # Flash attention is marked as random for its dropout; its result depends on its inputs anyway.
            by_chance = signature.is_random and not signature.func.__name__.startswith("_scaled_dot_product")
            if not by_chance and not any(identity in tainted for identity in low.inputs[operator]):
                continue
            tainted.update(low.outputs[operator])
            tainted.update(identity for identity, _ in low.alias_updates.get(operator, ()))
        return tainted

    def _crossings(self) -> tuple[list[int], list[int], dict[int, int]]:
        """For each operator position: how many tainted tensors cross to it from before, the sum of their identities;
        and for each tensor the last position that reads it."""
        low = self.low
        stop = low.loss_stop
        last: dict[int, int] = {}
        for operator in range(stop):
            for identity in low.inputs[operator]:
                last[identity] = operator
        for identity in low.model_outputs:
            last[identity] = max(last.get(identity, 0), low.forward_stop)
        count = [0] * (stop + 2)
        total = [0] * (stop + 2)
        for operator in range(stop):
            made = (*low.outputs[operator], *(identity for identity, _ in low.alias_updates.get(operator, ())))
            for identity in set(made):
                end = last.get(identity, -1)
                if identity in self.tainted and end > operator:
                    count[operator + 1] += 1
                    total[operator + 1] += identity
                    count[end + 1] -= 1
                    total[end + 1] -= identity
        for operator in range(1, stop + 2):
            count[operator] += count[operator - 1]
            total[operator] += total[operator - 1]
        return count, total, last

    def _entries(self) -> dict[int, int]:
        """Calls before which the dataflow allows a cut → the tensor argument that crosses."""
        low = self.low
        count, total, last = self._crossings()
        metas = {}
        for operator in range(low.forward_stop):
            for identity, meta in zip(low.outputs[operator], low.signatures[operator].outputs, strict=False):
                metas[identity] = meta
        entries: dict[int, int] = {}
        for position, call in enumerate(low.calls):
            if call.start >= low.forward_stop or count[call.start] != 1 or call.stop < 0:
                continue
            if call.module in low.recomputed:  # its call does not happen once for each micro-batch
                continue
            crossing = total[call.start]
            if last[crossing] >= call.stop or call.arguments.count(crossing) != 1:
                continue
            meta = metas.get(crossing)
            if meta is None or not low.metas[meta].dtype.is_floating_point:
                continue
            entries[position] = call.arguments.index(crossing)
        return entries

    # -- units -------------------------------------------------------------------------------------------------------

    def _expanded(self, entries: dict[int, int]) -> set[str]:
        """Modules that are looked into instead of being one unit.

        The root, containers, and modules most of whose parameters sit in a chain of children between which a cut
        is possible. A repeated block (a child of a container with siblings of its own class) stays whole unless it
        holds such a chain of blocks itself.
        """
        modules = dict(self.model.named_modules())
        sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
        cut_at = {self.low.calls[position].module for position in entries}
        blocks: set[str] = set()
        for name, module in modules.items():
            if isinstance(module, _CONTAINERS):
                kinds = [type(child) for child in module.children() if any(True for _ in child.children())]
                for child_name, child in module.named_children():
                    composite = any(True for _ in child.children()) and not isinstance(child, _CONTAINERS)
                    if composite and kinds.count(type(child)) > 1:
                        blocks.add(f"{name}.{child_name}" if name else child_name)

        def chain_inside(name: str, module: torch.nn.Module) -> bool:
            prefix = f"{name}." if name else ""
            for inner_name, inner in module.named_modules():
                if not inner_name or not isinstance(inner, _CONTAINERS):
                    continue
                path = prefix + inner_name
                children = dict(inner.named_children())
                if len(children) < 2 or 2 * sizes[path] <= sizes[name]:
                    continue
                if name in blocks and not any(f"{path}.{child}" in blocks for child in children):
                    continue
                if any(f"{path}.{child}" in cut_at for child in list(children)[1:]):
                    return True
            return False

        expanded: set[str] = set()

        def visit(name: str, module: torch.nn.Module) -> None:
            children = list(module.named_children())
            container = isinstance(module, _CONTAINERS)
            if not children or (name and not container and not chain_inside(name, module)):
                return
            expanded.add(name)
            for child_name, child in children:
                visit(f"{name}.{child_name}" if name else child_name, child)

        visit("", self.model)
        return expanded

    def _unit_calls(self, expanded: set[str]) -> tuple[list[int], dict[str, list[int]]]:
        """Calls that are units (positions in the recording), and for each unit module where in that list it is active.

        A unit module called inside another unit counts as active at the outer unit's place.
        """
        calls = self.low.calls
        units: list[int] = []
        active: dict[str, list[int]] = {}
        inside: dict[int, int] = {}  # call → place of the unit call that it is in
        unit_modules: set[str] = set()
        for position, call in enumerate(calls):
            outer = inside.get(call.parent)
            if outer is not None:
                inside[position] = outer
            elif call.module not in expanded:
                inside[position] = len(units)
                units.append(position)
                unit_modules.add(call.module)
        for position, call in enumerate(calls):
            if position in inside:
                active.setdefault(call.module, []).append(inside[position])
        return units, {module: places for module, places in active.items() if module in unit_modules}

    def _cuts(self, entries: dict[int, int], units: list[int], active: dict[str, list[int]]) -> list[int]:
        """Places in `units` before which the model can be cut, in order; a place 0 is never among them."""
        low = self.low
        if low.loss_parameters:
            return []
        blocked = [False] * (len(units) + 1)
        for places in active.values():
            for place in range(min(places) + 1, max(places) + 1):
                blocked[place] = True
        chosen: list[int] = []
        for place, position in enumerate(units):
            if place and position in entries and not blocked[place]:
                chosen.append(place)
            call = low.calls[position]
            # Whoever begins after this unit must be able to stand in for it.
            if self._depends(call) and not self._structure(call):
                break
        return chosen

    def _depends(self, call: Call) -> bool:
        return any(identity in self.tainted for identity in call.results)

    def _structure(self, call: Call) -> str:
        if call.structure is None:
            return ""
        try:
            return pytree.treespec_dumps(call.structure)
        except (NotImplementedError, TypeError, ValueError):
            return ""  # a type that cannot be written down

    # -- layers ------------------------------------------------------------------------------------------------------

    def graph(self, first_input: torch.Tensor) -> Graph:
        low, high = self.low, self.high
        entries = self._entries()
        units, active = self._unit_calls(self._expanded(entries))
        cuts = self._with_parameters(units, self._cuts(entries, units, active))
        starts = [low.calls[units[place]].start for place in cuts]
        layer_of = self._layers_of_operators(starts)
        count = len(starts) + 1
        operators = self._operators(layer_of)
        memory = [_Memory(recording, layer_of, count) for recording in (low, high)]
        forward: list[list[int]] = [[] for _ in range(count)]
        backward: list[list[int]] = [[] for _ in range(count)]
        for position, layer in enumerate(layer_of):
            (forward if position < low.loss_stop else backward)[layer].append(position)
        read = [
            tuple(dict.fromkeys(name for position in positions for name in low.parameters_read[position]))
            for positions in forward
        ]
        parameters = self._parameters(read)
        places = [0, *cuts, len(units)]
        layers: list[Layer] = []
        kinds = self._identity_kinds()
        for index in range(count):
            own = units[places[index] : places[index + 1]]
            entry = low.calls[units[cuts[index - 1]]] if index else None
            crossing = [
                low.calls[units[place]].arguments[entries[units[place]]]
                for place in cuts[max(index - 1, 0) : index + 1]
            ]
            output = kinds[crossing[-1]] if index < count - 1 else self._final_output()
            shapes = [parameters[name] for name in read[index]]
            layers.append(
                Layer(
                    name=self._layer_name(own, read[index]),
                    entry_module=entry.module if entry else "",
                    entry_argument=entries[units[cuts[index - 1]]] if entry else 0,
                    forward=tuple(forward[index]),
                    backward=tuple(backward[index]),
                    parameters=read[index],
                    forward_flop=self._flop(forward[index]),
                    backward_flop=self._flop(backward[index]),
                    saved=_affine(memory[0].saved[index], memory[1].saved[index]),
                    saved_sharded=Affine(),
                    output=output,
                    input=kinds[crossing[0]] if index else None,
                    forward_peak_extra=_affine(memory[0].forward_extra[index], memory[1].forward_extra[index]),
                    backward_peak_extra=_affine(memory[0].backward_extra[index], memory[1].backward_extra[index]),
                    signature=self._signature(forward[index], shapes),
                )
            )
        return Graph(
            name=self.name,
            operators=tuple(operators),
            layers=tuple(layers),
            parameters=tuple(parameters.values()),
            units=tuple(self._units(units, cuts)),
            inputs=tuple(self.kind(a, b) for a, b in zip(low.model_input_metas, high.model_input_metas, strict=True)),
            input_tensors=low.model_inputs,
            output_tensors=low.model_outputs,
            buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in self.model.buffers()),
            tokens_per_sample=(
                first_input.size(1)
                if first_input.dim() == 2 and not first_input.is_floating_point() and first_input.dtype != torch.bool
                else 0
            ),
            loss_saved=_affine(memory[0].loss_saved, memory[1].loss_saved),
            notes=tuple(self.notes),
        )

    def _with_parameters(self, units: list[int], cuts: list[int]) -> list[int]:
        """The cuts that leave no layer without parameters: such a layer joins the one before (the first, the next)."""
        low = self.low
        bounds = [0, *[low.calls[units[place]].start for place in cuts], low.forward_stop]
        has = [
            any(low.parameters_read[operator] for operator in range(bounds[index], bounds[index + 1]))
            for index in range(len(bounds) - 1)
        ]
        kept: list[int] = []
        seen = has[0] if has else True
        for index, place in enumerate(cuts, start=1):
            if has[index] and seen:
                kept.append(place)
            seen = seen or has[index]
        return kept

    def _layers_of_operators(self, starts: list[int]) -> list[int]:
        low = self.low
        layers: list[int] = []
        for operator, owner in enumerate(low.owners):
            if operator < low.forward_stop:
                layers.append(bisect.bisect_right(starts, operator))
            elif operator < low.loss_stop or owner < 0 or owner >= operator:
                layers.append(len(starts))
            else:
                layers.append(layers[owner])
        return layers

    def _operators(self, layer_of: list[int]) -> list[Operator]:
        low, high = self.low, self.high
        operators: list[Operator] = []
        for position, solved in enumerate(self.solved):
            outputs = solved.outputs
            output_tensors = low.outputs[position]
            inner = position in low.alias_updates
            written = len(output_tensors) - len(outputs)
            if inner or written > 0:
                # Arguments written in place, and other views of them that are read later, are results too.
                metas = (
                    [solved.inputs[index] for index in low.signatures[position].written][-written:] if written else []
                )
                outputs = (*outputs, *metas)
                pairs = zip(low.alias_updates.get(position, ()), high.alias_updates.get(position, ()), strict=True)
                for (identity, a), (_, b) in pairs:
                    outputs = (*outputs, self.kind(a, b))
                    output_tensors = (*output_tensors, identity)
            operators.append(
                Operator(
                    target=solved.target,
                    module=low.modules[position],
                    layer=layer_of[position],
                    backward=position >= low.loss_stop,
                    inputs=solved.inputs,
                    outputs=outputs,
                    input_tensors=low.inputs[position],
                    output_tensors=output_tensors,
                    arguments=solved.arguments,
                    keywords=solved.keywords,
                    flop=solved.flop,
                    is_view=solved.is_view,
                    reads_parameters=low.parameters_read[position],
                )
            )
        return operators

    def _identity_kinds(self) -> dict[int, TensorKind]:
        found: dict[int, TensorKind] = {}
        for position in range(self.low.forward_stop):
            found.update(zip(self.low.outputs[position], self.solved[position].outputs, strict=False))
        return found

    def _final_output(self) -> TensorKind:
        kinds = self._identity_kinds()
        floating = [kinds[identity] for identity in self.low.model_outputs if identity in kinds]
        if floating:
            return floating[0]
        return self.kind(self.low.model_input_metas[0], self.high.model_input_metas[0])

    def _flop(self, positions: list[int]) -> Affine:
        fixed = sum(self.solved[position].flop.fixed for position in positions)
        return Affine(fixed=fixed, per_sample=sum(self.solved[position].flop.per_sample for position in positions))

    def _parameters(self, read: list[tuple[str, ...]]) -> dict[str, Parameter]:
        first: dict[str, int] = {}
        for layer, names in enumerate(read):
            for name in names:
                first.setdefault(name, layer)
        tensors: dict[int, tuple[str, torch.Tensor, list[str]]] = {}
        for name, tensor in self.model.named_parameters(remove_duplicate=False):
            if id(tensor) in tensors:
                tensors[id(tensor)][2].append(name)
            else:
                tensors[id(tensor)] = (name, tensor, [])
        modules = {module: layer for layer, names in enumerate(read) for module in map(_parent, names)}
        made: dict[str, Parameter] = {}
        for name, tensor, aliases in tensors.values():
            made[name] = Parameter(
                name=name,
                shape=tuple(tensor.shape),
                dtype=_name(tensor.dtype),
                # A parameter that nothing reads stays with its neighbours in the same module.
                layer=first.get(name, modules.get(_parent(name), 0)),
                tensor=self.low.parameter_tensors.get(name, -1),
                trainable=tensor.requires_grad,
                aliases=tuple(aliases),
            )
        return made

    def _layer_name(self, units: list[int], read: tuple[str, ...]) -> str:
        names = list(dict.fromkeys(self.low.calls[position].module for position in units))
        bearing = [name for name in names if any(parameter.startswith(f"{name}.") for parameter in read)]
        names = bearing or names
        if not names:
            return self.name
        return names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"

    def _signature(self, positions: list[int], parameters: list[Parameter]) -> str:
        digest = hashlib.sha256()
        numbers: dict[int, int] = {}
        for position in positions:
            if position >= self.low.forward_stop:
                break
            digest.update(self.solved[position].digest)
            edges = [
                numbers.setdefault(identity, len(numbers))
                for identity in (*self.low.inputs[position], *self.low.outputs[position])
            ]
            digest.update(str(edges).encode())
        for parameter in parameters:
            digest.update(f"{parameter.shape} {parameter.dtype} {parameter.trainable}".encode())
        return digest.hexdigest()[:16]

    def _units(self, units: list[int], cuts: list[int]) -> list[Unit]:
        made: list[Unit] = []
        seen: set[str] = set()
        for place, position in enumerate(units):
            call = self.low.calls[position]
            if call.module in seen:
                continue
            seen.add(call.module)
            twin = self.high.calls[position]
            made.append(
                Unit(
                    module=call.module,
                    layer=bisect.bisect_right(cuts, place),
                    produces=tuple(self.kind(a, b) for a, b in zip(call.result_metas, twin.result_metas, strict=True)),
                    structure=self._structure(call),
                    depends_on_parameters=self._depends(call),
                )
            )
        return made

    def _notes(self) -> list[str]:
        notes: list[str] = []
        low = self.low
        # SyncBatchNorm included; InstanceNorm normalises each sample by itself.
        normalising = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
            and (module.training or module.running_mean is None)
        ]
        if normalising:
            notes.append(
                f"BatchNorm in training mode ({normalising[0]} and {len(normalising) - 1} more) couples the samples of "
                "a micro-batch: results depend on how a batch is divided"
            )
        dropping = {"bernoulli", "native_dropout", "bernoulli_", "rrelu_with_noise"}
        random = [
            low.modules[operator]
            for operator in range(low.loss_stop)
            if low.signatures[operator].func.__name__.split(".")[0] in dropping
        ]
        if random:
            notes.append(
                f"dropout is active ({random[0] or 'the model'}): two runs agree only if their random numbers do"
            )
        if any(sum(slope != 0 for slope in kind.per_sample) > 1 for kind in self._kinds.values()):
            notes.append(
                "some tensors grow with the square of the number of samples: sizes and FLOP are exact at "
                f"{_SIZES[0]} and {_SIZES[1]} samples and extrapolated elsewhere"
            )
        if low.loss_parameters:
            notes.append(
                f"the loss reads parameters ({low.loss_parameters[0]}), so the model cannot be cut into stages"
            )
        return notes


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


class _Memory:
    """What autograd keeps, and what lives besides, layer by layer, in one recording. Everything in bytes.

    `saved` counts a storage with the layer that allocated it. `loss_saved` is what the loss saves besides, and the
    model's output, which whoever computes the loss still holds during the backward pass. An extra is the peak of all
    live storages while the layer runs (parameters, inputs and gradients of parameters excluded) above what layers up
    to it have saved; for the last layer, which includes the loss, also above `loss_saved`.
    """

    def __init__(self, recording: Recording, layer_of: list[int], layers: int) -> None:
        self.saved = [0] * layers
        self.loss_saved = 0
        sizes, origin = recording.storage_bytes, recording.storage_origin
        held = dict.fromkeys(recording.output_storages, recording.forward_stop)
        for storage, operator in {**held, **recording.saved}.items():
            if origin[storage] < 0:
                continue
            if operator >= recording.forward_stop:
                self.loss_saved += sizes[storage]
            else:
                self.saved[layer_of[min(origin[storage], len(layer_of) - 1)]] += sizes[storage]
        through = 0
        kept: list[int] = []
        for amount in self.saved:
            through += amount
            kept.append(through)
        # The output that the loss's caller holds is nothing to layers on a device that never sees it.
        held = {storage for storage in held if recording.saved.get(storage, len(layer_of)) >= recording.forward_stop}
        forward = [0] * layers
        backward = [0] * layers
        live = live_held = 0
        for operator, amount, storage in recording.events:
            if storage in recording.gradients:
                continue
            live += amount
            if storage in held:
                live_held += amount
            if operator >= len(layer_of):
                continue
            layer = layer_of[operator]
            peaks = forward if operator < recording.loss_stop else backward
            peaks[layer] = max(peaks[layer], live if layer == layers - 1 else live - live_held)
        kept[-1] += self.loss_saved
        self.forward_extra = [max(0, peak - above) for peak, above in zip(forward, kept, strict=True)]
        self.backward_extra = [max(0, peak - above) for peak, above in zip(backward, kept, strict=True)]


# -- construction without allocation ----------------------------------------------------------------------------------


def construct_on_meta() -> Any:
    """From now on, parameters land on the meta device while ordinary code constructs modules; call `.remove()` to end.

    Every parameter that a module registers is replaced by one of the same shape on the meta device, which takes no
    memory and which initialisers leave alone. A tensor registered under two names stays one tensor. Buffers are left
    as they are: they are small, and data pipelines may need their values.
    """
    twins: Any = WeakIdKeyDictionary()

    def replace(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> Any:
        if parameter is None or parameter.device.type == "meta" or isinstance(parameter, UninitializedParameter):
            return None
        twin = twins.get(parameter)
        if twin is None:
            empty = torch.empty_strided(parameter.size(), parameter.stride(), dtype=parameter.dtype, device="meta")
            twin = twins[parameter] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
        return twin

    return register_module_parameter_registration_hook(replace)


@contextlib.contextmanager
def meta_construction() -> Iterator[None]:
    """Modules constructed inside have their parameters on the meta device (see `construct_on_meta`)."""
    handle = construct_on_meta()
    try:
        yield
    finally:
        handle.remove()
