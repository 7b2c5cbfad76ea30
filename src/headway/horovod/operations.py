"""Horovod's collectives on tensors, with their gradients: `allreduce`, `allgather`, `broadcast` and the others.

Each has a form that waits and one that does not (`…_async`, whose handle goes to `synchronize` or `poll`), and some a
form that writes into its argument (`…_`). Those that wait and make a new tensor can be differentiated through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from headway.errors import InputError
from headway.exchange.batches import Task
from headway.exchange.compression import Compression
from headway.exchange.negotiation import Submission
from headway.horovod.ranks import ProcessSet, context, global_process_set, number_of
from headway.horovod.submission import (
    Average,
    Pending,
    ReduceOp,
    Several,
    Sum,
    numbered,
    rank_in,
    settings_of,
    size_of,
    submit,
    synchronize,
    unnamed,
    with_rows,
)

__all__ = [
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
    "reducescatter",
    "reducescatter_async",
    "sparse_allreduce_async",
]


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
    settings = settings_of(average, op, prescale_factor, postscale_factor, process_set)
    return submit("all_reduce", [tensor], [name or unnamed("allreduce")], **settings)[0]


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
    settings = settings_of(average, op, prescale_factor, postscale_factor, process_set)
    return submit("all_reduce", [tensor], [name or unnamed("allreduce")], outputs=[tensor.data], **settings)[0]


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


def _compressed(
    tensors: Sequence[torch.Tensor], names: list[str], group: str, compression: Any, settings: dict[str, Any]
) -> list[torch.Tensor]:
    """All-reduced, sent compressed, with gradients."""
    if compression.is_sparse:
        raise InputError("allreduce sends whole tensors", place="compression", remedy="use top-k in the optimizer")
    small = [compression.compress(tensor) for tensor in tensors]
    results: Any = _AllReduce.apply(settings, group, names, *(tensor for tensor, _ in small))
    return [compression.decompress(result, how) for result, (_, how) in zip(results, small, strict=True)]


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
    settings = settings_of(average, op, prescale_factor, postscale_factor, process_set)
    return _compressed([tensor], [name or "allreduce.waiting"], "", compression, settings)[0]


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
    name = name or unnamed("grouped_allreduce")
    settings = settings_of(average, op, prescale_factor, postscale_factor, process_set)
    return Several(submit("all_reduce", tensors, numbered(name, tensors), group=name, **settings), list)


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
    name = name or unnamed("grouped_allreduce")
    settings = settings_of(average, op, prescale_factor, postscale_factor, process_set)
    outputs = [tensor.data for tensor in tensors]
    handles = submit("all_reduce", tensors, numbered(name, tensors), outputs=outputs, group=name, **settings)
    return Several(handles, lambda _: list(tensors))


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
    name = name or "grouped_allreduce.waiting"
    settings = settings_of(average, op, prescale_factor, postscale_factor, process_set)
    return _compressed(tensors, numbered(name, tensors), name, compression, settings)


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
    name, op = name or unnamed("sparse_allreduce"), op or Average
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
    count = size_of(process_set)

    def combine(gathered: list[torch.Tensor]) -> torch.Tensor:
        indices, values = gathered
        summed = torch.sparse_coo_tensor(indices.t(), values, tensor.shape, check_invariants=False).coalesce()
        return summed / count if op is Average else summed

    return Several(parts, combine)


# The others


def allgather_async(
    tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet | None = global_process_set
) -> Pending:
    """Start to put the ranks' tensors behind each other along dimension 0, which may differ from rank to rank."""
    return submit("all_gather", [with_rows(tensor)], [name or unnamed("allgather")], process_set=process_set)[0]


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
        start = int(rows.wait()[: rank_in(ctx.process_set)].sum())
        return summed.wait()[start : start + ctx.rows], None, None


def allgather(
    tensor: torch.Tensor, name: str | None = None, process_set: ProcessSet | None = global_process_set
) -> torch.Tensor:
    """The ranks' tensors behind each other along dimension 0, which may differ; all else must be the same."""
    return _AllGather.apply(with_rows(tensor), name or "allgather.waiting", process_set)  # type: ignore[return-value]


def grouped_allgather_async(
    tensors: Sequence[torch.Tensor], name: str | None = None, process_set: ProcessSet | None = global_process_set
) -> Pending:
    """`allgather_async` of several tensors that go together."""
    name = name or unnamed("grouped_allgather")
    rows = [with_rows(tensor) for tensor in tensors]
    return Several(submit("all_gather", rows, numbered(name, rows), group=name, process_set=process_set), list)


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
    return submit("broadcast", [tensor], [name or unnamed("broadcast")], root=root, process_set=process_set)[0]


def broadcast_async_(
    tensor: torch.Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet | None = global_process_set,
) -> Pending:
    """`broadcast_async` that writes the result into `tensor`."""
    root, names = _root(root_rank, process_set), [name or unnamed("broadcast")]
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
    name, size = name or unnamed("alltoall"), size_of(process_set)
    tensor = with_rows(tensor)
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
    result, received = _AllToAll.apply(with_rows(tensor), splits, name or "alltoall.waiting", process_set)  # type: ignore[misc]
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
    name = name or unnamed("reducescatter")
    settings = _scattering(name, op, prescale_factor, postscale_factor, process_set)
    return submit("reduce_scatter", [with_rows(tensor)], [name], **settings)[0]


def grouped_reducescatter_async(
    tensors: Sequence[torch.Tensor],
    name: str | None = None,
    op: ReduceOp | None = None,
    process_set: ProcessSet | None = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Pending:
    """`reducescatter_async` of several tensors that go together."""
    name = name or unnamed("grouped_reducescatter")
    settings = _scattering(name, op, prescale_factor, postscale_factor, process_set)
    rows = [with_rows(tensor) for tensor in tensors]
    return Several(submit("reduce_scatter", rows, numbered(name, rows), group=name, **settings), list)


def _scattering(
    name: str, op: ReduceOp | None, prescale: float, postscale: float, process_set: ProcessSet | None
) -> dict[str, Any]:
    op = op or Average
    if op not in (Sum, Average):
        raise InputError(f"{op.name} in reducescatter", place=f"reducescatter {name!r}", remedy="Sum or Average")
    return settings_of(None, op, prescale, postscale, process_set)


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
            scale /= size_of(process_set)
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
    name = name or "reducescatter.waiting"
    settings = _scattering(name, op, prescale_factor, postscale_factor, process_set)
    small, how = compression.compress(with_rows(tensor))
    result = _ReduceScatter.apply(small, name, settings)
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


def _root(root_rank: int, process_set: ProcessSet | None) -> int:
    ranks = context().controller.sets[number_of(process_set)]
    if root_rank not in ranks:
        raise InputError(
            f"rank {root_rank} is not in the process set, which has {list(ranks)}",
            place="root_rank",
            remedy="give a global rank of the set",
        )
    return root_rank
