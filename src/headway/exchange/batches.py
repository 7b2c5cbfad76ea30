"""Carries out a batch that the ranks have agreed on: into one buffer, one collective, and out of it again.

What `exchange.negotiation` decides, this does with `torch.distributed`. A `Carrier` has the process groups of each
process set: one for the collectives that Headway's own backend is made for, where it is used, and one of torch's own
(gloo for CPU tensors, nccl for CUDA tensors) for everything else. With one rank there are no groups, and every
collective is a copy.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
import torch.distributed as dist

from headway.errors import InputError
from headway.exchange.adasum import adasum
from headway.exchange.negotiation import Response, Submission

__all__ = ["REDUCIBLE", "Carrier", "Task", "block_rows", "divide"]

REDUCIBLE = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
)
"""The dtypes that every backend adds up."""

_OPERATORS = {
    "sum": dist.ReduceOp.SUM,
    "average": dist.ReduceOp.SUM,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "product": dist.ReduceOp.PRODUCT,
}
_CONNECT_SECONDS = 60.0
_ABORT_TAG = 2**30 - 7  # a message that nobody sends

Span = Callable[[str], AbstractContextManager[Any]]


class Task:
    """What this rank gave for one submission: `tensor` to read, and `output` to write, if the caller has one."""

    __slots__ = ("output", "ready", "tensor")

    def __init__(self, tensor: torch.Tensor | None, output: torch.Tensor | None = None) -> None:
        self.tensor, self.output = tensor, output
        self.ready: torch.cuda.Event | None = None
        if tensor is not None and tensor.is_cuda:
            self.ready = torch.cuda.Event()
            self.ready.record(torch.cuda.current_stream(tensor.device))

    def result(self, like: torch.Tensor) -> torch.Tensor:
        """Where the result goes: the caller's tensor, or a new one like `like`."""
        return self.output if self.output is not None else torch.empty_like(like, memory_format=torch.contiguous_format)


class Carrier:
    """Carries out batches, in the order that all ranks have agreed on, from one thread.

    `backend` is the name of a `torch.distributed` backend for CPU tensors that is used for all-reduce, broadcast and
    all-gather; empty: gloo for them, too. `timeout_seconds` bounds a collective (60 s at least).
    """

    def __init__(self, rank: int, size: int, *, backend: str = "", timeout_seconds: float = 300.0) -> None:
        self.rank, self.size, self.backend = rank, size, backend
        if backend == "headway" and size > 1:
            from headway.exchange import process_group

            process_group.register()
        # It is also the time in which a group has to come about, for which ranks may come late.
        self._timeout = datetime.timedelta(seconds=max(timeout_seconds, _CONNECT_SECONDS))
        self._groups: dict[int, tuple[Any, Any]] = {}
        self._ranks: dict[int, tuple[int, ...]] = {}
        self._buffers: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.add(0, tuple(range(size)))

    def add(self, number: int, ranks: tuple[int, ...]) -> None:
        """Make the process groups of a process set; all ranks do it at the same point of their work."""
        self._ranks[number] = ranks
        self._groups[number] = (None, None)
        if self.size == 1 or (len(ranks) == 1 and number):
            return
        usual = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        plain = dist.new_group(list(ranks), timeout=self._timeout, backend=usual)
        own = dist.new_group(list(ranks), timeout=self._timeout, backend=self.backend) if self.backend else None
        if self.rank in ranks:
            self._groups[number] = (plain, own)

    def remove(self, number: int) -> None:
        """Give the process groups of a process set back."""
        self._ranks.pop(number, None)
        for group in self._groups.pop(number, ()):
            if group is not None:
                with suppress(ValueError):  # the user has destroyed all groups already
                    dist.destroy_process_group(group)

    def close(self) -> None:
        """Give all process groups back."""
        for number in list(self._groups):
            self.remove(number)
        self._buffers.clear()

    def abort(self) -> None:
        """Let every exchange that still runs fail, on this rank and on those that wait for it.

        A rank whose exchange has failed must not leave others waiting in theirs. Gloo closes all connections of a
        group when one of its time-outs passes, so one that passes at once is what does it.
        """
        for number, (plain, own) in self._groups.items():
            others = [rank for rank in self._ranks[number] if rank != self.rank]
            if plain is None or not others:
                continue
            if own is not None and hasattr(own, "abort"):
                own.abort()
            with suppress(RuntimeError):  # the time-out, or connections that are closed already
                work = dist.irecv(torch.empty(1), others[0], group=plain, tag=_ABORT_TAG)
                if work is not None:
                    work.wait(datetime.timedelta(milliseconds=1))

    def run(
        self, batch: Sequence[Response], tasks: Mapping[str, Task], span: Span = lambda activity: nullcontext()
    ) -> dict[str, Any]:
        """Exchange the tensors of a batch; the result of each key that this rank has a task for.

        Keys without a task are those of a rank that has joined: it gives zeros. `span(activity)` is entered around
        each part of the work. Raises what `torch.distributed` raises.
        """
        first = batch[0].submission
        task = tasks.get(first.key)
        if first.device == "cpu":
            return self._carry_out(first, batch, tasks, span)
        device = task.tensor.device if task and task.tensor is not None else torch.device("cuda")
        with torch.cuda.device(device):
            stream = self._streams.setdefault(device, torch.cuda.Stream(device))
            for task in tasks.values():
                if task.ready is not None and task.tensor is not None:
                    stream.wait_event(task.ready)
                    task.tensor.record_stream(stream)
            with torch.cuda.stream(stream):
                results = self._carry_out(first, batch, tasks, span)
                done = torch.cuda.Event()
                done.record(stream)
            for task in tasks.values():
                task.ready = done
            return results

    def _carry_out(
        self, first: Submission, batch: Sequence[Response], tasks: Mapping[str, Task], span: Span
    ) -> dict[str, Any]:
        if first.operation == "all_reduce":
            return self._all_reduce(batch, tasks, span)
        one = {
            "all_gather": self._all_gather,
            "broadcast": self._broadcast,
            "all_to_all": self._all_to_all,
            "reduce_scatter": self._reduce_scatter,
            "barrier": lambda response, task, span: None,
        }[first.operation]
        return {response.submission.key: one(response, tasks.get(response.submission.key), span) for response in batch}

    def _group(self, submission: Submission, *, for_own_backend: bool = True) -> Any:
        """The process group to use; None where there is nobody to talk to."""
        plain, own = self._groups[submission.process_set]
        return own if own is not None and for_own_backend and submission.device == "cpu" else plain

    def _activity(self, submission: Submission, operation: str, *, for_own_backend: bool = True) -> str:
        if submission.device == "cuda":
            return f"NCCL_{operation}"
        return f"{(self.backend if for_own_backend and self.backend else 'gloo').upper()}_{operation}"

    def _all_reduce(self, batch: Sequence[Response], tasks: Mapping[str, Task], span: Span) -> dict[str, Any]:
        first = batch[0].submission
        found = [tasks.get(response.submission.key) for response in batch]
        if first.reduction == "adasum":
            return self._adasum(batch, [task for task in found if task is not None], span)
        outputs: list[torch.Tensor | None] = [
            task.result(task.tensor) if task is not None and task.tensor is not None else None for task in found
        ]
        single = outputs[0] if len(batch) == 1 else None
        if single is not None and single.is_contiguous():
            task = found[0]
            assert task is not None
            assert task.tensor is not None
            if single.data_ptr() != task.tensor.data_ptr():
                single.copy_(task.tensor)
            self._reduce(single.view(-1), first, span)
            return {first.key: single}
        sizes = [_count(response.submission.shape) for response in batch]
        buffer = self._buffer(sum(sizes), getattr(torch, first.dtype), _device(first, found))
        parts = [
            part.view(response.submission.shape) for part, response in zip(buffer.split(sizes), batch, strict=True)
        ]
        with span("MEMCPY_IN_FUSION_BUFFER"):
            for part, task in zip(parts, found, strict=True):
                if task is None or task.tensor is None:
                    part.zero_()
            given = [
                (part, task.tensor)
                for part, task in zip(parts, found, strict=True)
                if task is not None and task.tensor is not None
            ]
            if given:
                torch._foreach_copy_([part for part, _ in given], [tensor for _, tensor in given])
        self._reduce(buffer, first, span)
        with span("MEMCPY_OUT_FUSION_BUFFER"):
            taken = [(output, part) for output, part in zip(outputs, parts, strict=True) if output is not None]
            if taken:
                torch._foreach_copy_([output for output, _ in taken], [part for _, part in taken])
        return {
            response.submission.key: output
            for response, output in zip(batch, outputs, strict=True)
            if output is not None
        }

    def _reduce(self, buffer: torch.Tensor, submission: Submission, span: Span) -> None:
        """Reduce a flat buffer in place, with the factors before and after."""
        _scale(buffer, submission.prescale)
        group = self._group(submission)
        if group is not None and buffer.numel():
            with span(self._activity(submission, "ALLREDUCE")):
                dist.all_reduce(buffer, op=_OPERATORS[submission.reduction], group=group)
        if submission.reduction == "average":
            divide(buffer, len(self._ranks[submission.process_set]))
        _scale(buffer, submission.postscale)

    def _adasum(self, batch: Sequence[Response], tasks: Sequence[Task], span: Span) -> dict[str, Any]:
        tensors = [task.tensor for task in tasks if task.tensor is not None]
        first = batch[0].submission
        group = self._group(first, for_own_backend=False)
        if first.prescale != 1.0:
            tensors = [tensor * first.prescale for tensor in tensors]
        with span(self._activity(first, "ADASUM", for_own_backend=False)):
            results = tensors if group is None else adasum(tensors, group=group)
        found = {}
        for response, task, result in zip(batch, tasks, results, strict=True):
            output = task.result(result)
            output.copy_(result)
            _scale(output, response.submission.postscale)
            found[response.submission.key] = output
        return found

    def _all_gather(self, response: Response, task: Task | None, span: Span) -> torch.Tensor:
        submission, sizes = response.submission, response.sizes
        tail, dtype = submission.shape[1:], getattr(torch, submission.dtype)
        device = _device(submission, [task])
        mine = task.tensor if task is not None else None
        rows = torch.empty((0, *tail), dtype=dtype, device=device) if mine is None else mine.contiguous()
        group = self._group(submission)
        if group is None:
            return rows.clone()
        row_bytes = _count(tail) * dtype.itemsize
        longest = max(sizes) * row_bytes
        result = torch.empty((sum(sizes), *tail), dtype=dtype, device=device)
        if not longest:
            return result
        # Ranks may have different numbers of rows, and the backends want the same of everybody: the shorter are padded.
        flat = rows.view(-1).view(torch.uint8)
        if flat.numel() < longest:
            flat = torch.cat([flat, torch.zeros(longest - flat.numel(), dtype=torch.uint8, device=device)])
        if len(set(sizes)) == 1:
            parts = list(result.view(-1).view(torch.uint8).split(longest))
        else:
            parts = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in sizes]
        with span(self._activity(submission, "ALLGATHER")):
            dist.all_gather(parts, flat, group=group)
        if len(set(sizes)) > 1:
            whole = [part[: count * row_bytes] for part, count in zip(parts, sizes, strict=True)]
            torch.cat(whole, out=result.view(-1).view(torch.uint8))
        return result

    def _broadcast(self, response: Response, task: Task | None, span: Span) -> torch.Tensor | None:
        submission = response.submission
        group = self._group(submission)
        if task is None or task.tensor is None:  # joined: takes part and forgets
            dtype, device = getattr(torch, submission.dtype), _device(submission, [task])
            task = Task(torch.empty(submission.shape, dtype=dtype, device=device))
        assert task.tensor is not None
        output = task.result(task.tensor)
        contiguous = (
            output if output.is_contiguous() else torch.empty_like(output, memory_format=torch.contiguous_format)
        )
        if (group is None or self.rank == submission.root) and contiguous.data_ptr() != task.tensor.data_ptr():
            contiguous.copy_(task.tensor)
        if group is not None and contiguous.numel():
            with span(self._activity(submission, "BCAST")):
                dist.broadcast(contiguous.view(-1).view(torch.uint8), src=submission.root, group=group)
        if contiguous is not output:
            output.copy_(contiguous)
        return output

    def _all_to_all(self, response: Response, task: Task | None, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        submission, ranks = response.submission, self._ranks[response.submission.process_set]
        assert task is not None
        assert task.tensor is not None
        tensor, me, size = task.tensor.contiguous(), ranks.index(self.rank), len(ranks)
        sent = list(response.sizes[me * size : (me + 1) * size])
        received = list(response.sizes[me::size])
        result = tensor.new_empty((sum(received), *tensor.shape[1:]))
        group = self._group(submission, for_own_backend=False)
        row_bytes = _count(tensor.shape[1:]) * tensor.element_size()
        if group is None:
            result.copy_(tensor)
        elif row_bytes:
            with span(self._activity(submission, "ALLTOALL", for_own_backend=False)):
                dist.all_to_all_single(
                    result.view(-1).view(torch.uint8),
                    tensor.view(-1).view(torch.uint8),
                    [rows * row_bytes for rows in received],
                    [rows * row_bytes for rows in sent],
                    group=group,
                )
        return result, torch.tensor(received, dtype=torch.int32)

    def _reduce_scatter(self, response: Response, task: Task | None, span: Span) -> torch.Tensor:
        submission, ranks = response.submission, self._ranks[response.submission.process_set]
        dtype, device = getattr(torch, submission.dtype), _device(submission, [task])
        if task is not None and task.tensor is not None:
            whole = task.tensor.clone(memory_format=torch.contiguous_format)
        else:
            whole = torch.zeros(submission.shape, dtype=dtype, device=device)
        me, group = ranks.index(self.rank), self._group(submission, for_own_backend=False)
        rows = [block_rows(submission.shape[0], len(ranks), index) for index in range(len(ranks))]
        blocks = list(whole.split(rows))
        if group is None or len(set(rows)) > 1:
            self._reduce(whole.view(-1), submission, span)  # the backends scatter equal blocks only
            return blocks[me].clone()
        mine = torch.empty_like(blocks[me])
        _scale(whole, submission.prescale)
        if mine.numel():
            with span(self._activity(submission, "REDUCESCATTER", for_own_backend=False)):
                dist.reduce_scatter(mine, blocks, op=_OPERATORS[submission.reduction], group=group)
        if submission.reduction == "average":
            divide(mine, len(ranks))
        _scale(mine, submission.postscale)
        return mine

    def _buffer(self, elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The fusion buffer of this dtype and device: kept, and made larger when it must be."""
        buffer = self._buffers.get((dtype, device))
        if buffer is None or buffer.numel() < elements:
            buffer = self._buffers[dtype, device] = torch.empty(elements, dtype=dtype, device=device)
        return buffer[:elements]


def block_rows(rows: int, size: int, index: int) -> int:
    """How many of `rows` reduce_scatter gives to the `index`-th of `size` ranks: the first ones get what is left over.

    Raises InputError if there are no ranks.
    """
    if size < 1:
        raise InputError(f"{size} ranks", place="reduce_scatter", remedy="one at least")
    return rows // size + (index < rows % size)


def divide(tensor: torch.Tensor, count: int) -> None:
    """Divide in place; integers are rounded towards zero."""
    if count == 1:
        return
    if tensor.is_floating_point():
        tensor.div_(count)
    else:
        tensor.div_(count, rounding_mode="trunc")


def _scale(tensor: torch.Tensor, factor: float) -> None:
    if factor == 1.0:
        return
    if tensor.is_floating_point():
        tensor.mul_(factor)
    else:
        tensor.copy_((tensor.double() * factor).trunc())


def _count(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _device(submission: Submission, tasks: Sequence[Task | None]) -> torch.device:
    for task in tasks:
        if task is not None and task.tensor is not None:
            return task.tensor.device
    return torch.device(submission.device)
