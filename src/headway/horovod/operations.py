"""Horovod's collectives on tensors, with their gradients: `allreduce`, `allgather`, `broadcast` and the others.

Each has a form that waits and one that does not (`…_async`, whose handle goes to `synchronize` or `poll`), and some a
form that writes into its argument (`…_`). Those that wait and make a new tensor can be differentiated through.

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
from headway.exchange.compression import Compression
from headway.exchange.negotiation import Operation, Submission
from headway.horovod.ranks import ProcessSet, context, global_process_set, number_of

__all__ = [
    "Adasum",
    "Average",
    "Max",
    "Min",
    "Pending",
    "Product",
    "ReduceOp",
    "Sum",
    "allgather",
    "allgather_async",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "alltoall",
    "alltoall_async",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "grouped_allgather",
    "grouped_allgather_async",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "join",
    "poll",
    "reducescatter",
    "reducescatter_async",
    "sparse_allreduce_async",
    "submit",
    "synchronize",
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


class _Several:
    """Several exchanges whose results make one."""

    def __init__(self, parts: Sequence[Pending], combine: Callable[[list[Any]], Any]) -> None:
        self._parts, self._combine = parts, combine

    @property
    def is_done(self) -> bool:
        return all(part.is_done for part in self._parts)

    def wait(self) -> Any:
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


def _unnamed(operation: str) -> str:
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


def _op(average: bool | None, op: ReduceOp | None) -> ReduceOp:
    """What older and newer ways of calling mean; averaging by default."""
    if average is not None and op is not None:
        raise InputError("both average and op are given", place="allreduce", remedy="give op alone")
    if op is not None:
        return op
    return Sum if average is False else Average


# All-reduce


def allreduce_async(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet | None = global_process_set,
) -> Pending:
    """Start to combine `tensor` (the same shape and dtype on all ranks) over the ranks; the result is a new tensor.

    `op` is Average (the default), Sum, Adasum, Min, Max or Product; the factors multiply before and after. Averages of
    integers are rounded towards zero. The tensor must not be changed until the handle is done.
    """
    settings = _settings(average, op, prescale_factor, postscale_factor, process_set)
    return submit("all_reduce", [tensor], [name or _unnamed("allreduce")], **settings)[0]


def allreduce_async_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet | None = global_process_set,
) -> Pending:
    """`allreduce_async` that writes the result into `tensor`."""
    settings = _settings(average, op, prescale_factor, postscale_factor, process_set)
    return submit("all_reduce", [tensor], [name or _unnamed("allreduce")], outputs=[tensor.data], **settings)[0]


def allreduce_(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet | None = global_process_set,
) -> torch.Tensor:
    """Combine `tensor` over the ranks, in place. No gradients."""
    name = name or "allreduce.waiting"
    synchronize(allreduce_async_(tensor, average, name, op, prescale_factor, postscale_factor, process_set))
    return tensor


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, settings: dict[str, Any], group: str, names: list[str], *tensors: torch.Tensor) -> Any:
        ctx.settings, ctx.group, ctx.names = settings, group, names
        handles = submit("all_reduce", tensors, names, group=group, **settings)
        return tuple(handle.wait() for handle in handles)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        # The sum over ranks is its own transpose; so is the average, and factors are constants.
        if ctx.settings["op"] not in (Sum, Average):
            raise InputError(
                f"{ctx.settings['op'].name} has no gradient here", place="allreduce", remedy="Sum, Average"
            )
        names = [f"{name}.gradient" for name in ctx.names]
        group = f"{ctx.group}.gradient" if ctx.group else ""
        handles = submit("all_reduce", gradients, names, group=group, **ctx.settings)
        return None, None, None, *(handle.wait() for handle in handles)


def allreduce(
    tensor: torch.Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet | None = global_process_set,
) -> torch.Tensor:
    """`tensor` combined over the ranks, in a new tensor, sent compressed. Gradients of Sum and Average are all-reduced.

    See `allreduce_async` for the arguments, `Compression` for what there is.
    """
    if compression.is_sparse:
        raise InputError("allreduce sends whole tensors", place="compression", remedy="use top-k in the optimizer")
    small, how = compression.compress(tensor)
    settings = _settings(average, op, prescale_factor, postscale_factor, process_set)
    (result,) = _AllReduce.apply(settings, "", [name or "allreduce.waiting"], small)  # type: ignore[misc]
    return compression.decompress(result, how)


def _settings(
    average: bool | None, op: ReduceOp | None, prescale: float, postscale: float, process_set: ProcessSet | None
) -> dict[str, Any]:
    return {"op": _op(average, op), "prescale": prescale, "postscale": postscale, "process_set": process_set}


def grouped_allreduce_async(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet | None = global_process_set,
) -> Pending:
    """`allreduce_async` of several tensors that go together: none before all are ready on all ranks."""
    name = name or _unnamed("grouped_allreduce")
    settings = _settings(average, op, prescale_factor, postscale_factor, process_set)
    return _Several(submit("all_reduce", tensors, _numbered(name, tensors), group=name, **settings), list)


def grouped_allreduce_async_(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet | None = global_process_set,
) -> Pending:
    """`grouped_allreduce_async` that writes the results into `tensors`."""
    name = name or _unnamed("grouped_allreduce")
    settings = _settings(average, op, prescale_factor, postscale_factor, process_set)
    outputs = [tensor.data for tensor in tensors]
    handles = submit("all_reduce", tensors, _numbered(name, tensors), outputs=outputs, group=name, **settings)
    return _Several(handles, lambda _: list(tensors))


def grouped_allreduce(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet | None = global_process_set,
) -> list[torch.Tensor]:
    """`allreduce` of several tensors that go together, with gradients."""
    if compression.is_sparse:
        raise InputError("allreduce sends whole tensors", place="compression", remedy="use top-k in the optimizer")
    name = name or "grouped_allreduce.waiting"
    small = [compression.compress(tensor) for tensor in tensors]
    settings = _settings(average, op, prescale_factor, postscale_factor, process_set)
    results: Any = _AllReduce.apply(settings, name, _numbered(name, tensors), *(tensor for tensor, _ in small))
    return [compression.decompress(result, how) for result, (_, how) in zip(results, small, strict=True)]


def grouped_allreduce_(
    tensors: Sequence[torch.Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet | None = global_process_set,
) -> list[torch.Tensor]:
    """`allreduce_` of several tensors that go together."""
    name = name or "grouped_allreduce.waiting"
    return synchronize(
        grouped_allreduce_async_(tensors, average, name, op, prescale_factor, postscale_factor, process_set)
    )


def sparse_allreduce_async(
    tensor: torch.Tensor,
    name: str | None = None,
    op: ReduceOp | None = None,
    process_set: ProcessSet | None = global_process_set,
) -> Pending:
    """Start to sum or average a sparse COO tensor over the ranks, by gathering everybody's entries."""
    name, op = name or _unnamed("sparse_allreduce"), op or Average
    if op not in (Sum, Average):
        raise InputError(f"{op.name} of sparse tensors", place=f"sparse_allreduce {name!r}", remedy="Sum or Average")
    mine = tensor.detach().coalesce()
    # Entries along the first dimension, which may differ from rank to rank.
    parts = submit(
        "all_gather",
        [mine.indices().t().contiguous(), mine.values()],
        [f"{name}.indices", f"{name}.values"],
        process_set=process_set,
    )
    count = _size_of(process_set)

    def combine(gathered: list[torch.Tensor]) -> torch.Tensor:
        indices, values = gathered
        summed = torch.sparse_coo_tensor(indices.t(), values, tensor.shape, check_invariants=False).coalesce()
        return summed / count if op is Average else summed

    return _Several(parts, combine)


# The others


def allgather_async(
    tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet | None = global_process_set
) -> Pending:
    """Start to put the ranks' tensors behind each other along dimension 0, which may differ from rank to rank."""
    return submit("all_gather", [_with_rows(tensor)], [name or _unnamed("allgather")], process_set=process_set)[0]


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, name: str, process_set: ProcessSet | None) -> torch.Tensor:
        ctx.rows, ctx.name, ctx.process_set = tensor.shape[0], name, process_set
        return synchronize(allgather_async(tensor, name, process_set))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        # What came from this rank had an effect on all: the sum of their gradients, and of it the rows that are ours.
        rows = allgather_async(torch.tensor([ctx.rows]), f"{ctx.name}.rows", ctx.process_set)
        summed = allreduce_async(gradient, name=f"{ctx.name}.gradient", op=Sum, process_set=ctx.process_set)
        start = int(rows.wait()[: _rank_in(ctx.process_set)].sum())
        return summed.wait()[start : start + ctx.rows], None, None


def allgather(
    tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet | None = global_process_set
) -> torch.Tensor:
    """The ranks' tensors behind each other along dimension 0, which may differ; all else must be the same."""
    return _AllGather.apply(_with_rows(tensor), name or "allgather.waiting", process_set)  # type: ignore[return-value]


def grouped_allgather_async(
    tensors: Sequence[torch.Tensor], name: str | None = None, process_set: ProcessSet | None = global_process_set
) -> Pending:
    """`allgather_async` of several tensors that go together."""
    name = name or _unnamed("grouped_allgather")
    rows = [_with_rows(tensor) for tensor in tensors]
    return _Several(submit("all_gather", rows, _numbered(name, rows), group=name, process_set=process_set), list)


def grouped_allgather(
    tensors: Sequence[torch.Tensor], name: str | None = None, process_set: ProcessSet | None = global_process_set
) -> list[torch.Tensor]:
    """`allgather` of several tensors that go together, without gradients."""
    return synchronize(grouped_allgather_async(tensors, name or "grouped_allgather.waiting", process_set))


def broadcast_async(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet | None = global_process_set,
) -> Pending:
    """Start to copy the tensor of `root_rank` (a global rank) to all; the result is a new tensor."""
    root = _root(root_rank, process_set)
    return submit("broadcast", [tensor], [name or _unnamed("broadcast")], root=root, process_set=process_set)[0]


def broadcast_async_(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet | None = global_process_set,
) -> Pending:
    """`broadcast_async` that writes the result into `tensor`."""
    root, names = _root(root_rank, process_set), [name or _unnamed("broadcast")]
    return submit("broadcast", [tensor], names, outputs=[tensor.data], root=root, process_set=process_set)[0]


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, root: int, name: str, process_set: ProcessSet | None) -> torch.Tensor:
        ctx.root, ctx.name, ctx.process_set = root, name, process_set
        return synchronize(broadcast_async(tensor, root, name, process_set))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        summed = allreduce_async(gradient, name=f"{ctx.name}.gradient", op=Sum, process_set=ctx.process_set).wait()
        return (summed if context().rank == ctx.root else torch.zeros_like(summed)), None, None, None


def broadcast(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet | None = global_process_set,
) -> torch.Tensor:
    """The tensor of `root_rank` (a global rank), on all ranks, with gradients."""
    return _Broadcast.apply(tensor, root_rank, name or "broadcast.waiting", process_set)  # type: ignore[return-value]


def broadcast_(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet | None = global_process_set,
) -> torch.Tensor:
    """Overwrite `tensor` by that of `root_rank` (a global rank). No gradients."""
    synchronize(broadcast_async_(tensor, root_rank, name or "broadcast.waiting", process_set))
    return tensor


def alltoall_async(
    tensor: torch.Tensor,
    splits: torch.Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet | None = global_process_set,
) -> Pending:
    """Start to send `splits[r]` rows of `tensor` to rank r, in order; without `splits` the same number to each.

    The result is (rows received, in the order of ranks; how many came from each, int32).
    """
    name, size = name or _unnamed("alltoall"), _size_of(process_set)
    tensor = _with_rows(tensor)
    if splits is None:
        rows, left = divmod(tensor.shape[0], size)
        if left:
            raise InputError(
                f"{tensor.shape[0]} rows do not divide among {size} ranks",
                place=f"alltoall {name!r}",
                remedy="give splits",
            )
        given = [rows] * size
    else:
        given = [int(rows) for rows in splits]
    if len(given) != size or min(given, default=0) < 0 or sum(given) != tensor.shape[0]:
        raise InputError(
            f"splits {given} for {tensor.shape[0]} rows and {size} ranks",
            place=f"alltoall {name!r}",
            remedy="give one number for each rank, which add up to the rows",
        )
    return submit("all_to_all", [tensor], [name], splits=tuple(given), process_set=process_set)[0]


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, splits: Any, name: str, process_set: ProcessSet | None) -> Any:
        result, received = synchronize(alltoall_async(tensor, splits, name, process_set))
        ctx.received, ctx.name, ctx.process_set = received, name, process_set
        ctx.mark_non_differentiable(received)
        return result, received

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> Any:  # type: ignore[override]
        handle = alltoall_async(gradient, ctx.received, f"{ctx.name}.gradient", ctx.process_set)
        return handle.wait()[0], None, None, None


def alltoall(
    tensor: torch.Tensor,
    splits: torch.Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet | None = global_process_set,
) -> Any:
    """`splits[r]` rows to each rank r: the rows received, and with `splits` also how many came from each rank."""
    result, received = _AllToAll.apply(_with_rows(tensor), splits, name or "alltoall.waiting", process_set)  # type: ignore[misc]
    return result if splits is None else (result, received)


def reducescatter_async(
    tensor: torch.Tensor,
    name: str | None = None,
    op: ReduceOp | None = None,
    process_set: ProcessSet | None = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Pending:
    """Start to combine `tensor` over the ranks; each gets its block of rows, the first ones also what is left over."""
    name = name or _unnamed("reducescatter")
    return grouped_reducescatter_async([tensor], name, op, process_set, prescale_factor, postscale_factor, group="")


def grouped_reducescatter_async(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    op: ReduceOp | None = None,
    process_set: ProcessSet | None = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    *,
    group: str | None = None,
) -> Pending:
    """`reducescatter_async` of several tensors that go together."""
    name, op = name or _unnamed("grouped_reducescatter"), op or Average
    if op not in (Sum, Average):
        raise InputError(f"{op.name} in reducescatter", place=f"reducescatter {name!r}", remedy="Sum or Average")
    single = group == ""
    settings = _settings(None, op, prescale_factor, postscale_factor, process_set)
    rows = [_with_rows(tensor) for tensor in tensors]
    names = [name] if single else _numbered(name, rows)
    handles = submit("reduce_scatter", rows, names, group=name if group is None else group, **settings)
    return handles[0] if single else _Several(handles, list)


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, name: str, settings: dict[str, Any]) -> torch.Tensor:
        ctx.name, ctx.settings = name, settings
        return submit("reduce_scatter", [tensor], [name], **settings)[0].wait()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        process_set = ctx.settings["process_set"]
        scale = ctx.settings["prescale"] * ctx.settings["postscale"]
        if ctx.settings["op"] is Average:
            scale /= _size_of(process_set)
        return allgather_async(gradient * scale, f"{ctx.name}.gradient", process_set).wait(), None, None


def reducescatter(
    tensor: torch.Tensor,
    name: str | None = None,
    compression: Any = Compression.none,
    op: ReduceOp | None = None,
    process_set: ProcessSet | None = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> torch.Tensor:
    """This rank's block of rows of `tensor` summed or averaged over the ranks, with gradients."""
    op = op or Average
    if op not in (Sum, Average):
        raise InputError(f"{op.name} in reducescatter", place="reducescatter", remedy="Sum or Average")
    small, how = compression.compress(_with_rows(tensor))
    settings = _settings(None, op, prescale_factor, postscale_factor, process_set)
    result = _ReduceScatter.apply(small, name or "reducescatter.waiting", settings)
    return compression.decompress(result, how)


def grouped_reducescatter(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    op: ReduceOp | None = None,
    process_set: ProcessSet | None = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[torch.Tensor]:
    """`reducescatter` of several tensors that go together, without gradients."""
    name = name or "grouped_reducescatter.waiting"
    return synchronize(grouped_reducescatter_async(tensors, name, op, process_set, prescale_factor, postscale_factor))


def barrier(process_set: ProcessSet | None = global_process_set) -> None:
    """Wait until all ranks have come here."""
    submission = Submission(name="barrier.waiting", operation="barrier", process_set=number_of(process_set))
    context().controller.submit([submission], [Task(None)])[0].wait()


def join(device: int = -1) -> int:
    """This rank has no more data: take part with zeros until all ranks have joined; the rank that was last.

    While ranks have joined, sums, averages, gathers, barriers and broadcasts from the others go on; averages still
    divide by the number of all ranks. `device` is accepted and not needed.
    """
    del device
    return context().controller.join().wait()


def _numbered(name: str, tensors: Sequence[object]) -> list[str]:
    return [f"{name}.{index + 1}of{len(tensors)}" for index in range(len(tensors))]


def _with_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A scalar has one row."""
    return tensor.reshape(1) if isinstance(tensor, torch.Tensor) and tensor.ndim == 0 else tensor


def _size_of(process_set: ProcessSet | None) -> int:
    return len(context().controller.sets[number_of(process_set)])


def _rank_in(process_set: ProcessSet | None) -> int:
    ranks = context().controller.sets[number_of(process_set)]
    if context().rank not in ranks:
        raise InputError(f"rank {context().rank} is not in {process_set}", place="process_set")
    return ranks.index(context().rank)


def _root(root_rank: int, process_set: ProcessSet | None) -> int:
    ranks = context().controller.sets[number_of(process_set)]
    if root_rank not in ranks:
        raise InputError(
            f"rank {root_rank} is not in the process set, which has {list(ranks)}",
            place="root_rank",
            remedy="give a global rank of the set",
        )
    return root_rank
