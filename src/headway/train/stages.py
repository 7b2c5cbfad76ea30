"""Some layers of a model, run by the model's own forward.

A stage calls the user's `forward` as it stands. Units of other stages are replaced by stand-ins that return zeros of
the recorded shapes; the activation from the stage before is put in where its layer begins, and where the next stage's
layer begins the activation is taken out and the call ends. So a pipeline runs any module, with no code of its own, and
what lies between units (residual additions, reshapes) is the user's.

The whole model is the stage from the first layer to the last: nothing is replaced, put in or taken out.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten, treespec_loads
from torch.utils.checkpoint import checkpoint

from headway.errors import PlanError
from headway.workload.graph import Graph, TensorKind, Unit

__all__ = ["StageModule", "call_model", "canonical_names", "copy_structure", "loss_of", "recompute_units"]

Batch = tuple[Any, Any]


class StageModule(nn.Module):
    """Layers `start` to `stop` (exclusive) of `model`, which is changed in place.

    Called with the number of a micro-batch (an int64 tensor of one element, for that is what a pipeline schedule can
    deal out) and, unless it is the first stage, the activation of the stage before. Returns the activation for the next
    stage, or from the last stage the mean loss of the micro-batch. `micro_batches` holds (inputs, targets) of the step.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph | None,
        start: int,
        stop: int,
        *,
        micro_batch: int,
        loss: Callable[[Any, Any], torch.Tensor] | None,
        device: torch.device,
        context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        super().__init__()
        self.model = model
        self.micro_batches: Sequence[Batch] = ()
        self.is_first = start == 0
        self.is_last = graph is None or stop == len(graph.layers)
        self._loss, self._context = loss, context
        self._received: torch.Tensor | None = None
        self._calls: Counter[str] = Counter()
        if graph is not None and not (self.is_first and self.is_last):
            _leave_out_units(model, graph, start, stop, micro_batch, device)
            _leave_out_parameters(model, graph, start, stop, device)
        self._entry = None if self.is_first or graph is None else (graph, start)
        self._exit = None if self.is_last or graph is None else (graph, stop)

    def watch_cuts(self) -> None:
        """Install the hooks at both cuts. Last, so that they run before the hooks of whatever wraps the units."""
        if self._entry is not None:
            self._hook(*self._entry, self._put_in)
        if self._exit is not None:
            graph, layer = self._exit
            kind = graph.layers[layer].input
            self._hook(graph, layer, lambda leaves, at: self._take_out(leaves[at], kind))

    def forward(self, *received: torch.Tensor, index: torch.Tensor | int) -> torch.Tensor:
        inputs, targets = self.micro_batches[int(index)]
        self._received = received[0] if received else None
        self._calls.clear()
        with self._context():
            try:
                output = call_model(self.model, inputs)
            except _Leave as leave:
                return leave.activation
            finally:
                self._received = None
            if not self.is_last:
                raise PlanError(
                    "the model ended before the next pipeline stage began",
                    place="plan: stages",
                    remedy="the model's control flow differs from the traced one; plan again without a pipeline",
                )
            return loss_of(output, targets, self._loss)

    def _hook(self, graph: Graph, layer: int, act: Callable[[list[Any], int], None]) -> None:
        entry = graph.layers[layer]
        # A module may be called several times in one forward pass; the cut is at one of these calls.
        before = sum(unit.module == entry.entry_module and unit.layer < layer for unit in graph.units)
        key = f"{layer}:{entry.entry_module}"

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            self._calls[key] += 1
            if self._calls[key] != before + 1:
                return None
            leaves, structure = tree_flatten((args, kwargs))
            tensors = [at for at, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
            act(leaves, tensors[entry.entry_argument])
            return tree_unflatten(leaves, structure)

        module = self.model.get_submodule(entry.entry_module)
        module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)

    def _put_in(self, leaves: list[Any], at: int) -> None:
        leaves[at] = self._received

    def _take_out(self, activation: torch.Tensor, kind: TensorKind | None) -> None:
        # Under autocast an activation may come in another dtype than the trace recorded and the next stage awaits.
        if kind is not None:
            activation = activation.to(getattr(torch, kind.dtype))
        raise _Leave(activation.contiguous())


class _Leave(BaseException):
    """Ends the model's forward pass where the next stage begins. No `except Exception` of the model may catch it."""

    def __init__(self, activation: torch.Tensor) -> None:
        super().__init__()
        self.activation = activation


class _StandIn(nn.Module):
    """Returns, call by call, zeros of the shapes that the unit it replaces would return."""

    def __init__(self, units: Sequence[Unit], samples: int, device: torch.device) -> None:
        super().__init__()
        self._units = [(_structure(unit), [_shape(kind, samples) for kind in unit.produces]) for unit in units]
        self._device = device
        self._call = 0

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        structure, kinds = self._units[self._call % len(self._units)]
        self._call += 1
        return tree_unflatten(
            [torch.zeros(shape, dtype=dtype, device=self._device) for shape, dtype in kinds], structure
        )


def _structure(unit: Unit) -> TreeSpec:
    return treespec_loads(unit.structure) if unit.structure else tree_flatten(torch.empty(0))[1]


def _shape(kind: TensorKind, samples: int) -> tuple[tuple[int, ...], torch.dtype]:
    return kind.shape(samples), getattr(torch, kind.dtype)


def _leave_out_units(model: nn.Module, graph: Graph, start: int, stop: int, samples: int, device: torch.device) -> None:
    calls: dict[str, list[Unit]] = {}
    for unit in graph.units:
        calls.setdefault(unit.module, []).append(unit)
    for path, units in calls.items():
        mine = any(start <= unit.layer < stop for unit in units)
        if path and not mine and any(unit.depends_on_parameters for unit in units):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _StandIn(units, samples, device))


def _leave_out_parameters(model: nn.Module, graph: Graph, start: int, stop: int, device: torch.device) -> None:
    """Replace parameters of other stages that hang outside of units by zeros that take no memory."""
    mine = graph.layer_parameters(start, stop)
    used = graph.layer_parameters(0, len(graph.layers))
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            full = f"{path}.{name}" if path else name
            known = graph.parameter_by_name.get(full)
            canonical = known.name if known is not None else full
            # Parameters that no layer reads are still the user's: the first stage keeps them for the checkpoint.
            if canonical in mine or (start == 0 and canonical not in used):
                continue
            del module._parameters[name]
            zeros = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
            module.register_buffer(name, zeros, persistent=False)


def copy_structure(model: nn.Module) -> nn.Module:
    """The same modules once more, sharing parameters and buffers: another stage of the interleaved schedule."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name by which a parameter is reached → the first of them, under which checkpoints keep it."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}


def recompute_units(model: nn.Module, graph: Graph, layers: Sequence[int]) -> None:
    """Keep only the inputs of the units in these layers, and run the units again in the backward pass.

    Chen et al., Training Deep Nets with Sublinear Memory Cost (arXiv:1604.06174).
    """
    chosen = set(layers)
    for path in dict.fromkeys(unit.module for unit in graph.units if unit.layer in chosen):
        module = model.get_submodule(path)
        module.forward = _again(module.forward)


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Of which devices the random numbers are repeated, `checkpoint` sees by the tensors among positional arguments.
        return checkpoint(lambda named, *given: forward(*given, **named), kwargs, *args, use_reentrant=False)

    return recomputed


def call_model(model: nn.Module, inputs: Any) -> Any:
    """The model on one micro-batch: a dict gives keyword arguments, a tuple or list positional ones."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def loss_of(output: Any, targets: Any, loss: Callable[[Any, Any], torch.Tensor] | None) -> torch.Tensor:
    """The mean loss of a micro-batch: `loss(output, targets)`, or what the model itself gives as its loss.

    Raises PlanError where that is not one number.
    """
    if loss is not None:
        value = loss(output, targets)
    elif isinstance(output, torch.Tensor):
        value = output
    elif isinstance(output, dict):
        value = output.get("loss")
    else:
        value = getattr(output, "loss", None)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise PlanError(
            f"the loss is {found}, not one number",
            place="session.prepare: loss",
            remedy="give loss(output, targets) that returns the mean over the samples",
        )
    return value if value.ndim == 0 else value.sum()  # not a view, which FSDP cannot hang its hooks on
