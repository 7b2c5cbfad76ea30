"""An optimizer off the device and its replicas: each updates rows of every parameter, and gets their gradients alone.

ZeRO-Offload (Ren et al., ATC 2021, section 4.2): a gradient is reduced to the replica that updates it, goes to the host
there, and what is updated is all-gathered. With ZeRO-0 and 1 alike that is P elements each way, 2P a step, where an
all-reduce and the same gathering move 3P. The rows are those that `fully_shard` would give a replica, so gradients are
packed replica by replica before they leave, and what comes is the sum of a replica's own rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from headway.train.infinity_groups import bounds, rows_of_part

__all__ = ["RowOwners"]

_UNDER_WAY = 2  # pieces: one on the network while the next is packed

_EXCHANGED_BYTES = 2**20
"""The most in a piece that gloo exchanges: copies of it stand beside the activations when those need most."""

# torch 2.13 has another name for it, and warns of the old one, which is all that torch 2.11 knows.
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Rows(NamedTuple):
    """Of a gradient, rows `start` to `stop` of every replica's part, which has `height` rows (the last ones, less)."""

    gradient: torch.Tensor  # (rows, elements of a row)
    height: int
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """For each replica."""
        return (self.stop - self.start) * self.gradient.shape[1]


class RowOwners:
    """The rows of each parameter that the replicas of `group` update, and the reduction of gradients to them.

    Parameters must be contiguous. A parameter without dimensions has no rows: all replicas update it, and all get its
    gradient. Gradients are packed in pieces of at most `piece_bytes` (for gloo 1 MiB), or one row of each replica; two
    pieces at a time, so that copies take little memory.
    """

    def __init__(self, group: dist.ProcessGroup, *, piece_bytes: int) -> None:
        self.group, self.piece_bytes = group, piece_bytes
        self.replica, self.replicas = dist.get_rank(group), dist.get_world_size(group)
        self._under_way: deque[torch.futures.Future[torch.Tensor]] = deque()

    def part(self, tensor: torch.Tensor) -> torch.Tensor:
        """This replica's rows of a parameter or its gradient, as a view; of one without dimensions, all."""
        if not tensor.ndim:
            return tensor
        first, last = bounds(tuple(tensor.shape), self.replicas, self.replica)
        return tensor[first:last]

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """A DDP hook: the mean over the replicas of this replica's rows of each gradient. Other rows are void."""
        flat = bucket.buffer()
        if flat.layout != torch.strided:
            return default_hooks.allreduce_hook(self.group, bucket)
        gradients, at = [], 0
        for parameter in bucket.parameters():
            gradients.append(flat[at : at + parameter.numel()].view(parameter.shape))
            at += parameter.numel()
        done = self._begin(flat, gradients)
        if bucket.is_last():
            self._under_way.clear()  # DDP waits for each bucket, and may make others for the next step
        return done

    def reduce_by_itself(self, parameter: nn.Parameter) -> None:
        """The same for the gradient of one parameter, at once."""
        assert parameter.grad is not None
        gradient = parameter.grad = parameter.grad.contiguous()
        self._begin(gradient, [gradient]).wait()
        self._under_way.clear()

    def _begin(self, flat: torch.Tensor, gradients: Sequence[torch.Tensor]) -> torch.futures.Future[torch.Tensor]:
        """Begin to reduce gradients, which all lie in `flat`; that, once it is done."""
        flat.div_(self.replicas)  # before they are added up, as DDP does
        # gloo's own reduce-scatter is an all-reduce, of which it drops the rest: twice the bytes.
        exchanges = _backend_name(self.group, flat.device) == "gloo"
        limit = min(self.piece_bytes, _EXCHANGED_BYTES) if exchanges else self.piece_bytes
        begun = [self._reduce_piece(flat, piece, exchanges) for piece in self._pieces(gradients, limit)]
        scalars = [gradient for gradient in gradients if not gradient.ndim]
        if scalars:
            begun.append(self._all_reduce(flat, scalars))
        if not begun:
            begun.append(torch.futures.Future())
            begun[0].set_result(flat)

        def all_done(last: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
            # Each on the stream of this callback, which is why they are not collected: `collect_all` knows no device.
            for each in (*begun[:-1], last):
                each.wait()
            return flat

        return begun[-1].then(all_done)

    def _pieces(self, gradients: Sequence[torch.Tensor], limit: int) -> Iterator[list[_Rows]]:
        """What is packed together. A gradient that is too large for one piece is divided among several, by rows."""
        piece: list[_Rows] = []
        room = 0
        for gradient in gradients:
            if not gradient.ndim or not gradient.numel():
                continue
            rows = gradient.view(gradient.shape[0], -1)
            height = rows_of_part(tuple(gradient.shape), self.replicas)
            row_bytes = self.replicas * rows.shape[1] * rows.element_size()
            at = 0
            while at < height:
                if piece and room < min(height - at, max(1, limit // row_bytes)) * row_bytes:
                    yield piece
                    piece = []
                if not piece:
                    room = limit
                count = min(height - at, max(1, room // row_bytes))
                piece.append(_Rows(rows, height, at, at + count))
                room -= count * row_bytes
                at += count
        if piece:
            yield piece

    def _reduce_piece(
        self, flat: torch.Tensor, piece: list[_Rows], exchanges: bool
    ) -> torch.futures.Future[torch.Tensor]:
        while len(self._under_way) >= _UNDER_WAY:
            self._under_way.popleft().wait()
        sent = self._packed(piece)
        if exchanges:
            received = torch.empty_like(sent)
            work = dist.all_to_all_single(received, sent, group=self.group, async_op=True)
        else:
            received = sent.new_empty(sent.numel() // self.replicas)
            work = _reduce_scatter(received, sent, group=self.group, async_op=True)
        assert work is not None

        def unpack(done: torch.futures.Future[Any]) -> torch.Tensor:
            done.wait()  # raises what went wrong
            # In the order of the replicas, and in float32 before it is rounded to less.
            self._unpack(piece, received.view(self.replicas, -1).sum(0) if exchanges else received)
            return flat

        future = work.get_future().then(unpack)
        self._under_way.append(future)
        return future

    def _packed(self, piece: list[_Rows]) -> torch.Tensor:
        """The rows of a piece, one replica's after the other's; parts that end early are filled up with zeros."""
        if len(piece) == 1:
            rows, height, start, stop = piece[0]
            if (start, stop) == (0, height) and rows.shape[0] == self.replicas * height:
                return rows.view(-1)  # lies as it shall be sent
        total = sum(each.elements for each in piece)
        sent = piece[0].gradient.new_empty(self.replicas, total)
        at = 0
        for each in piece:
            rows, height, start, stop = each
            width = rows.shape[1]
            into = sent[:, at : at + each.elements]
            full = rows.shape[0] // height  # replicas whose part is not short
            parts = rows[: full * height].view(full, height * width)
            into[:full].copy_(parts[:, start * width : stop * width])
            if full < self.replicas:
                rest = rows[full * height :][start:stop].reshape(-1)
                into[full:].zero_()
                into[full, : rest.numel()].copy_(rest)
            at += each.elements
        return sent.view(-1)

    def _unpack(self, piece: list[_Rows], sums: torch.Tensor) -> None:
        at = 0
        for each in piece:
            mine = each.gradient[self.replica * each.height :][: each.height][each.start : each.stop]
            mine.copy_(sums[at : at + mine.numel()].view_as(mine))
            at += each.elements

    def _all_reduce(self, flat: torch.Tensor, gradients: Sequence[torch.Tensor]) -> torch.futures.Future[torch.Tensor]:
        together = torch.stack(list(gradients))
        work = dist.all_reduce(together, group=self.group, async_op=True)
        assert work is not None

        def unpack(done: torch.futures.Future[Any]) -> torch.Tensor:
            done.wait()
            for gradient, total in zip(gradients, together, strict=True):
                gradient.copy_(total)
            return flat

        return work.get_future().then(unpack)


def _backend_name(group: dist.ProcessGroup, device: torch.device) -> str:
    """Who carries out the collectives of a group for tensors on a device."""
    return group._get_backend(device).name()
