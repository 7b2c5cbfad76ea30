"""Gradients made smaller for the wire: half precision, or only the largest few entries with error feedback.

`Compression` has Horovod's names. Each compressor has `compress` (tensor → what is sent, and a context) and
`decompress`; `all_reduce` sums or averages a tensor over a process group through one of them.

Top-k sends the `ratio` of a tensor's entries that are largest by magnitude. What is not sent is not lost: it is kept as
a residual and added to the next gradient of the same name (error feedback, or memory: Stich et al., "Sparsified SGD
with Memory", NeurIPS 2018; Lin et al., "Deep Gradient Compression", ICLR 2018, section 3). So after any number of steps
what was sent and the residual add up to the gradients. Without it, entries that are never among the largest are never
learnt from.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.distributed as dist

from headway.errors import FieldError

__all__ = ["Cast", "Compression", "Compressor", "NoCompression", "TopK", "all_reduce"]


class Compressor(Protocol):
    """What makes a tensor smaller, and whole again; `name` tells the tensors of a model apart."""

    is_sparse: bool
    """Whether what `compress` returns cannot be summed entry by entry over the ranks."""

    def compress(self, tensor: torch.Tensor, name: str = "") -> tuple[torch.Tensor, Any]:
        """What to send, and what `decompress` has to know besides."""
        ...

    def decompress(self, tensor: torch.Tensor, context: Any) -> torch.Tensor:
        """The tensor again, with the shape and dtype that it had."""
        ...


class NoCompression:
    """Sends tensors as they are."""

    is_sparse = False

    def compress(self, tensor: torch.Tensor, name: str = "") -> tuple[torch.Tensor, Any]:
        return tensor, None

    def decompress(self, tensor: torch.Tensor, context: Any) -> torch.Tensor:
        return tensor


class Cast:
    """Sends wider floating-point tensors as `dtype`; others as they are.

    float16 has 10 bits of fraction but ends at 65,504: a gradient beyond it becomes infinite. bfloat16 has float32's
    range and 7 bits of fraction.
    """

    is_sparse = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def compress(self, tensor: torch.Tensor, name: str = "") -> tuple[torch.Tensor, Any]:
        wider = tensor.is_floating_point() and tensor.element_size() > self.dtype.itemsize
        return (tensor.to(self.dtype) if wider else tensor), tensor.dtype

    def decompress(self, tensor: torch.Tensor, context: Any) -> torch.Tensor:
        return tensor.to(context)


class TopK:
    """Sends the largest entries by magnitude, `ratio` of all and one at least; remembers the rest for next time.

    `compress` returns their values; the context is their positions in the flattened tensor (int32, or int64 above
    2³¹ - 1 entries) and the shape. Residuals are kept by name, in float32 for narrower dtypes, so what rounding to the
    tensor's dtype takes away is remembered too. With `feedback=False` nothing is remembered: for comparison only.
    """

    is_sparse = True

    def __init__(self, ratio: float = 0.01, *, feedback: bool = True) -> None:
        """Raises FieldError for a ratio that is not above 0 and at most 1."""
        if not 0 < ratio <= 1:
            raise FieldError(f"a ratio of {ratio}", place="Compression.topk", remedy="give one above 0, at most 1")
        self.ratio = ratio
        self.feedback = feedback
        self.residuals: dict[str, torch.Tensor] = {}

    def compress(self, tensor: torch.Tensor, name: str = "") -> tuple[torch.Tensor, Any]:
        """The values that are sent. Raises FieldError for integers, and if the name had another size before."""
        place = f"tensor {name!r}"
        if not tensor.is_floating_point():
            raise FieldError(f"top-k of {tensor.dtype}", place=place, remedy="send integers with Compression.none")
        exact = tensor.dtype if tensor.element_size() >= 4 else torch.float32
        corrected = tensor.detach().to(exact).flatten()
        residual = self.residuals.get(name)
        if residual is not None:
            if residual.shape != corrected.shape:
                raise FieldError(
                    f"had {residual.numel()} entries before and now has {corrected.numel()}",
                    place=place,
                    remedy="give each tensor a name of its own",
                )
            corrected = corrected + residual
        count = min(max(1, math.ceil(self.ratio * corrected.numel())), corrected.numel())
        positions = corrected.abs().topk(count, sorted=False).indices
        sent = corrected[positions].to(tensor.dtype)
        if self.feedback:
            # An infinite entry was sent as such; infinite minus infinite must not poison all later steps.
            lost = (corrected[positions] - sent.to(exact)).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            residual = corrected.clone() if corrected.data_ptr() == tensor.data_ptr() else corrected
            residual[positions] = lost
            self.residuals[name] = residual
        width = torch.int32 if corrected.numel() < 2**31 else torch.int64
        return sent, (positions.to(width), tensor.shape)

    def decompress(self, tensor: torch.Tensor, context: Any) -> torch.Tensor:
        """The sent entries in their places, zero elsewhere."""
        positions, shape = context
        flat = torch.zeros(math.prod(shape), dtype=tensor.dtype, device=tensor.device)
        flat[positions.long()] = tensor
        return flat.reshape(shape)


class Compression:
    """The compressors by Horovod's names, and two more: `none`, `fp16`, `bf16`, `topk(ratio)`."""

    none = NoCompression()
    fp16 = Cast(torch.float16)
    bf16 = Cast(torch.bfloat16)

    @staticmethod
    def topk(ratio: float = 0.01, *, feedback: bool = True) -> TopK:
        """A new top-k compressor, with residuals of its own: one for each optimizer."""
        return TopK(ratio, feedback=feedback)


def all_reduce(
    tensor: torch.Tensor,
    compression: Compressor = Compression.none,
    *,
    name: str = "",
    group: dist.ProcessGroup | None = None,
    average: bool = True,
) -> torch.Tensor:
    """The sum, or average, of `tensor` over the ranks of `group`, sent compressed. A new tensor; the same bits on all.

    Dense compressors go through an all-reduce, and an average divides before it sums, so that fp16 overflows no
    earlier than the average does. Top-k goes through an all-gather of positions and values: each rank receives
    `size · ratio` of the entries, so it pays where `ratio` is well below 1 / size. Errors of the group pass unchanged.
    """
    size = dist.get_world_size(group)
    sent, context = compression.compress(tensor, name)
    if not compression.is_sparse:
        sent = sent / size if average and sent.is_floating_point() else sent.clone()
        sent = sent.contiguous()
        dist.all_reduce(sent, group=group)
        if average and not sent.is_floating_point():
            sent = sent.div(size, rounding_mode="floor")
        return compression.decompress(sent, context)
    positions, shape = context
    all_values = [torch.empty_like(sent) for _ in range(size)]
    all_positions = [torch.empty_like(positions) for _ in range(size)]
    dist.all_gather(all_values, sent, group=group)
    dist.all_gather(all_positions, positions, group=group)
    # Rank after rank, each with its positions once: the order of additions, and so the bits, are the same everywhere.
    exact = tensor.dtype if tensor.element_size() >= 4 else torch.float32
    flat = torch.zeros(math.prod(shape), dtype=exact, device=tensor.device)
    for values, places in zip(all_values, all_positions):
        flat[places.long()] += values.to(exact)
    if average:
        flat /= size
    return flat.to(tensor.dtype).reshape(shape)
