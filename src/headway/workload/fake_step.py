"""One training step of a model, run on fake tensors under the recorder: forward, loss and backward.

Parameters, buffers and inputs are replaced by fake twins while it runs, and given back afterwards.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from headway.workload.recorder import Recorder
from headway.workload.recording import Recording, tensor_leaves

__all__ = ["record"]


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
    recorder = Recorder(fake_mode)
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
        recorder.outside = False
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
    model: torch.nn.Module, fake_mode: FakeTensorMode, recorder: Recorder, device: torch.device
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
                        recorder.parameter_of_storage[tag.storage] = path
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
def _module_hooks(model: torch.nn.Module, recorder: Recorder) -> Iterator[None]:
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
