"""Models, optimizers and plain objects, from one rank to all: what a training script does before its first step.

Objects travel in the format of `torch.save` and are read with `weights_only=True`, which makes tensors, numbers,
texts, and lists, tuples, dicts and sets of them, and nothing else: what arrives from the network cannot run code.
Horovod sends any picklable object; here other kinds raise InputError on all ranks.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from headway.errors import InputError
from headway.horovod.operations import allgather, broadcast, broadcast_async_
from headway.horovod.ranks import ProcessSet, context, global_process_set
from headway.horovod.submission import synchronize

__all__ = ["allgather_object", "broadcast_object", "broadcast_optimizer_state", "broadcast_parameters"]

_TENSOR = "headway.tensor"
_REMEDY = "use tensors, numbers, texts, and lists, tuples, dicts and sets of them"


def broadcast_parameters(
    params: Mapping[str, Any] | Iterable[tuple[str, Any]],
    root_rank: int,
    process_set: ProcessSet | None = global_process_set,
) -> None:
    """Overwrite tensors by those of `root_rank`: `model.state_dict()` or `model.named_parameters()`, by name.

    What is None is left out. Raises InputError for anything else that is no tensor.
    """
    items = list(params.items() if isinstance(params, Mapping) else params)
    handles = []
    for name, tensor in items:
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"{name!r} is a {type(tensor).__name__}",
                place="broadcast_parameters",
                remedy="give model.state_dict() or model.named_parameters(); broadcast_object sends other things",
            )
        handles.append(broadcast_async_(tensor, root_rank, f"parameter.{name}", process_set))
    for handle in handles:
        synchronize(handle)


def broadcast_optimizer_state(
    optimizer: torch.optim.Optimizer,
    root_rank: int,
    model: torch.nn.Module | None = None,
    process_set: ProcessSet | None = global_process_set,
) -> None:
    """Make the state of an optimizer that of `root_rank`: hyperparameters and tensors, also where there are none yet.

    `model` is accepted and not needed. Raises InputError if the state holds what cannot be sent.
    """
    del model
    is_root = context().rank == root_rank
    tensors: list[torch.Tensor] = []
    outline = _without_tensors(optimizer.state_dict(), tensors) if is_root else None
    outline = broadcast_object(outline, root_rank, "optimizer", process_set)
    if not is_root:
        tensors = _room_for(outline)
    handles = [
        broadcast_async_(tensor, root_rank, f"optimizer.{number}", process_set) for number, tensor in enumerate(tensors)
    ]
    for handle in handles:
        synchronize(handle)
    if not is_root:
        optimizer.load_state_dict(_with_tensors(outline, tensors))


def broadcast_object(
    obj: Any = None,
    root_rank: int = 0,
    name: str | None = None,
    process_set: ProcessSet | None = global_process_set,
) -> Any:
    """The object of `root_rank`, on all ranks; tensors in it arrive on the CPU. Other ranks may leave `obj` out.

    Raises InputError, on all ranks, if it is not made of tensors, numbers, texts and containers of them.
    """
    name = name or "object"
    is_root = context().rank == root_rank
    data, problem = _packed(obj) if is_root else (b"", "")
    length = broadcast(torch.tensor([-1 if problem else len(data)]), root_rank, f"{name}.length", process_set)
    if length < 0:
        raise InputError(
            problem or f"rank {root_rank} gave an object that cannot be sent", place="broadcast_object", remedy=_REMEDY
        )
    whole = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8) if is_root else torch.empty(int(length), dtype=torch.uint8)
    )
    whole = broadcast(whole, root_rank, f"{name}.bytes", process_set)
    return obj if is_root else _unpacked(whole)


def allgather_object(
    obj: Any, name: str | None = None, process_set: ProcessSet | None = global_process_set
) -> list[Any]:
    """The objects of all ranks, by rank, on all ranks. Raises InputError, on all ranks, if one cannot be sent."""
    name = name or "objects"
    data, problem = _packed(obj)
    lengths = allgather(torch.tensor([-1 if problem else len(data)]), f"{name}.length", process_set).tolist()
    if min(lengths) < 0:
        ranks = context().controller.sets[process_set.process_set_id or 0 if process_set is not None else 0]
        first = ranks[lengths.index(min(lengths))]
        raise InputError(
            problem or f"rank {first} gave an object that cannot be sent", place="allgather_object", remedy=_REMEDY
        )
    whole = allgather(torch.frombuffer(bytearray(data), dtype=torch.uint8), f"{name}.bytes", process_set)
    return [_unpacked(part) for part in whole.split(lengths)]


def _packed(obj: Any) -> tuple[bytes, str]:
    """The bytes of an object, or why it cannot be sent: tried here, before all others wait for it in vain."""
    stream = io.BytesIO()
    try:
        torch.save(obj, stream)
        stream.seek(0)
        torch.load(stream, weights_only=True, map_location="cpu")
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError) as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = refused[1] if refused else "something"
        return b"", f"a {type(obj).__name__} cannot be sent: it holds {what}, which could run code when read"
    return stream.getvalue(), ""


def _unpacked(data: torch.Tensor) -> Any:
    return torch.load(io.BytesIO(data.numpy().tobytes()), weights_only=True, map_location="cpu")


def _without_tensors(value: Any, tensors: list[torch.Tensor]) -> Any:
    """`value` with its tensors replaced by what it takes to make room for them; the tensors are added to the list."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return (
            _TENSOR,
            len(tensors) - 1,
            tuple(value.shape),
            str(value.dtype).removeprefix("torch."),
            value.device.type,
        )
    if isinstance(value, Mapping):
        return {key: _without_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without_tensors(item, tensors) for item in value)
    return value


def _is_tensor(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 5 and value[0] == _TENSOR


def _room_for(outline: Any) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}

    def visit(value: Any) -> None:
        if _is_tensor(value):
            _, number, shape, dtype, device = value
            found[number] = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    visit(outline)
    return [found[number] for number in sorted(found)]


def _with_tensors(outline: Any, tensors: list[torch.Tensor]) -> Any:
    if _is_tensor(outline):
        return tensors[outline[1]]
    if isinstance(outline, Mapping):
        return {key: _with_tensors(item, tensors) for key, item in outline.items()}
    if isinstance(outline, list | tuple):
        return type(outline)(_with_tensors(item, tensors) for item in outline)
    return outline
