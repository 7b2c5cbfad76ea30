"""How a tensor gets to the exchange: checked, named, and handed in with those that go together; and what comes back.

Names match tensors of different ranks. Without one, calls are matched by their order: the n-th unnamed asynchronous
all-reduce of one rank with the n-th of the others; and those that wait by themselves, since there is one at a time.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Protocol

import torch

from headway.errors import InputError
from headway.exchange.batches import REDUCIBLE, Task
from headway.exchange.negotiation import Operation, Submission
from headway.horovod.ranks import ProcessSet, context, number_of

__all__ = [
    "Adasum",
    "Average",
    "Max",
    "Min",
    "Pending",
    "Product",
    "ReduceOp",
    "Several",
    "Sum",
    "numbered",
    "poll",
    "rank_in",
    "settings_of",
    "size_of",
    "submit",
    "synchronize",
    "unnamed",
    "with_rows",
]


class ReduceOp(Enum):
    """How tensors are combined over the ranks."""

    Average = "average"
    Sum = "sum"
    Adasum = "adasum"
    Min = "min"
    Max = "max"
    Product = "product"


Average, Sum, Adasum = ReduceOp.Average, ReduceOp.Sum, ReduceOp.Adasum
Min, Max, Product = ReduceOp.Min, ReduceOp.Max, ReduceOp.Product


class Pending(Protocol):
    """What an asynchronous collective returns: for `synchronize` and `poll`."""

    @property
    def is_done(self) -> bool:
        """Whether `wait` returns, or raises, at once."""
        ...

    def wait(self) -> Any:
        """The result. Raises MismatchError, StalledError or RankFailedError if the exchange did not come about."""
        ...


class Several:
    """Several exchanges whose results make one."""

    def __init__(self, parts: Sequence[Pending], combine: Callable[[list[Any]], Any]) -> None:
        self._parts, self._combine = parts, combine

    @property
    def is_done(self) -> bool:
        """Whether all of them are."""
        return all(part.is_done for part in self._parts)

    def wait(self) -> Any:
        """What `combine` makes of all results."""
        return self._combine([part.wait() for part in self._parts])


def synchronize(handle: Pending) -> Any:
    """Wait for an asynchronous collective; its result.

    Raises MismatchError if the ranks' tensors do not fit together, StalledError if a rank did not submit its own in
    time, RankFailedError if a rank died or left; each names tensor and ranks, on every rank.
    """
    return handle.wait()


def poll(handle: Pending) -> bool:
    """Whether `synchronize` would return, or raise, at once."""
    return handle.is_done


_counts: Counter[str] = Counter()
_counts_lock = threading.Lock()


def unnamed(operation: str) -> str:
    """The name of the next tensor that was given none."""
    with _counts_lock:
        _counts[operation] += 1
        return f"{operation}.noname.{_counts[operation]}"


def submit(
    operation: Operation,
    tensors: Sequence[torch.Tensor],
    names: Sequence[str],
    *,
    outputs: Sequence[torch.Tensor] | None = None,
    op: ReduceOp | None = None,
    process_set: ProcessSet | None = None,
    root: int = -1,
    prescale: float = 1.0,
    postscale: float = 1.0,
    group: str = "",
    priorities: Sequence[int] | None = None,
    splits: tuple[int, ...] = (),
) -> list[Pending]:
    """Have tensors exchanged under `names`; a handle for each. With `group` they go together or not at all.

    Raises InputError for tensors that cannot be exchanged like this.
    """
    submissions, tasks = [], []
    for index, (name, tensor) in enumerate(zip(names, tensors, strict=True)):
        _check(operation, tensor, name, op)
        submissions.append(
            Submission(
                name=name,
                operation=operation,
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                element_bytes=tensor.element_size(),
                device=tensor.device.type,
                reduction=op.value if op is not None else "",
                root=root,
                process_set=number_of(process_set),
                prescale=float(prescale),
                postscale=float(postscale),
                group=group,
                group_size=len(tensors) if group else 1,
                priority=priorities[index] if priorities is not None else 0,
                splits=splits,
            )
        )
        tasks.append(Task(tensor.detach(), outputs[index] if outputs is not None else None))
    return list(context().controller.submit(submissions, tasks))


def _check(operation: str, tensor: torch.Tensor, name: str, op: ReduceOp | None) -> None:
    place = f"{operation} {name!r}"
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"a {type(tensor).__name__} is no tensor", place=place, remedy="give a torch.Tensor")
    if tensor.layout is not torch.strided:
        raise InputError("the tensor is sparse", place=place, remedy="use sparse_allreduce_async, or to_dense()")
    if tensor.device.type not in ("cpu", "cuda"):
        raise InputError(f"the tensor is on {tensor.device}", place=place, remedy="move it to the CPU or a CUDA GPU")
    if op is not None and tensor.dtype not in REDUCIBLE:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in REDUCIBLE)
        raise InputError(f"{tensor.dtype} cannot be reduced", place=place, remedy=f"convert it to one of {dtypes}")
    if op is Adasum and not tensor.is_floating_point():
        raise InputError(f"Adasum of {tensor.dtype}", place=place, remedy="use op=hvd.Sum, or floating point")


def _chosen(average: bool | None, op: ReduceOp | None) -> ReduceOp:
    """What older and newer ways of calling mean; averaging by default."""
    if average is not None and op is not None:
        raise InputError("both average and op are given", place="allreduce", remedy="give op alone")
    if op is not None:
        return op
    return Sum if average is False else Average


def settings_of(
    average: bool | None, op: ReduceOp | None, prescale: float, postscale: float, process_set: ProcessSet | None
) -> dict[str, Any]:
    """What `submit` is told of how to reduce. Raises InputError for `average` and `op` together."""
    return {"op": _chosen(average, op), "prescale": prescale, "postscale": postscale, "process_set": process_set}


def numbered(name: str, tensors: Sequence[object]) -> list[str]:
    """Names of tensors that go together."""
    return [f"{name}.{index + 1}of{len(tensors)}" for index in range(len(tensors))]


def with_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A scalar has one row."""
    return tensor.reshape(1) if isinstance(tensor, torch.Tensor) and tensor.ndim == 0 else tensor


def size_of(process_set: ProcessSet | None) -> int:
    """How many ranks it has."""
    return len(context().controller.sets[number_of(process_set)])


def rank_in(process_set: ProcessSet | None) -> int:
    """This rank's place in it. Raises InputError for a rank that is not in it."""
    ranks = context().controller.sets[number_of(process_set)]
    if context().rank not in ranks:
        raise InputError(f"rank {context().rank} is not in {process_set}", place="process_set")
    return ranks.index(context().rank)
