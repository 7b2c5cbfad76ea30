"""Any `torch.nn.Module` to a `Graph`, without allocating it.

The model runs one training step (forward, loss, backward) on fake tensors (recorder.py), twice: with 2 samples and with
3. What differs is solved for any number of samples (solving.py), layers are found between the places where a pipeline
may be cut (cuts.py), and the graph is made of them (building.py). Nothing is assumed about repeated blocks: each
operator of each layer really was dispatched, at both sizes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import UninitializedParameter
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from headway.errors import TraceError
from headway.workload.blocks import find_blocks
from headway.workload.building import Builder
from headway.workload.cuts import Cuts
from headway.workload.fake_step import record
from headway.workload.graph import Graph
from headway.workload.recorder import value_of
from headway.workload.recording import Recording, tensor_leaves
from headway.workload.solving import SIZES, Solution

__all__ = ["construct_on_meta", "meta_construction", "trace", "without_cache"]


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
    recordings = [_record(model, (arguments, keywords), target, loss, samples, size, device, name) for size in SIZES]
    solution = Solution(name, *recordings)
    return find_blocks(Builder(model, solution, Cuts(model, solution.low)).graph(leaves[0]))


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
