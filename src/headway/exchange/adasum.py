"""Adasum: gradients combined so that what they agree on is averaged and what they differ in is added.

Two gradients that point the same way are averaged, two at right angles are added, and everything between is between
(Maleki et al., "Scaling Distributed Training with Adaptive Summation", MLSys 2021, section 3)::

    adasum(a, b) = (1 - a·b / 2|a|²) a + (1 - a·b / 2|b|²) b

Many gradients are combined by halves, neighbours first: `reference` is that definition. `adasum` computes the same over
a process group with the paper's algorithm 1: recursive vector halving with distance doubling, in which each rank
combines only its share of the entries, and the dot products are summed over all ranks that hold shares of the same two
vectors. A second, mirrored half hands the shares back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from headway.errors import FieldError

__all__ = ["adasum", "pair", "reference"]


def pair(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Adasum of two gradients of one shape. One that is zero leaves the other as it is. Dot products in float64."""
    x, y = a.flatten().double(), b.flatten().double()
    scale_a, scale_b = _scales(torch.stack((x @ y, x @ x, y @ y)))
    return (scale_a * x + scale_b * y).to(a.dtype).reshape(a.shape)


def reference(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Adasum of one gradient for each rank, as defined.

    For a power of two: Adasum of the Adasum of the first half and that of the second. For any other number n, with p
    the largest power of two below it, ranks 0 and 1, 2 and 3, … are combined first, n - p pairs of them, which leaves
    p gradients. (The paper's recursion takes powers of two; this is how all-reduces by halving treat other numbers:
    Thakur, Rabenseifner and Gropp 2005, section 4.)
    """
    size = len(gradients)
    extra = size - _power_of_two(size)
    merged = [pair(gradients[2 * i], gradients[2 * i + 1]) for i in range(extra)] + list(gradients[2 * extra :])
    while len(merged) > 1:
        merged = [pair(merged[i], merged[i + 1]) for i in range(0, len(merged), 2)]
    return merged[0]


def adasum(tensors: Sequence[torch.Tensor], *, group: dist.ProcessGroup | None = None) -> list[torch.Tensor]:
    """`reference` of each tensor over the ranks of `group`, tensor by tensor, in one exchange. New tensors.

    The dot products are those of each tensor alone, as the paper has it for layers (section 3.6), however many are
    exchanged at once. All ranks get the same bits: each entry is computed on one rank and copied to the others.
    Arithmetic, and the wire, are in float32 (float64 for float64 tensors), dot products in float64. With p as in
    `reference`, a rank sends at most 2 (p-1)/p of the bytes, and a rank that was merged first sends them once more.
    Needs send and receive from the group, whose errors pass unchanged.

    Raises FieldError for tensors that are not all floating-point, of one dtype and on one device.
    """
    if not tensors:
        return []
    first = tensors[0]
    for position, tensor in enumerate(tensors):
        if not tensor.is_floating_point() or tensor.dtype != first.dtype or tensor.device != first.device:
            raise FieldError(
                f"is {tensor.dtype} on {tensor.device}; the first is {first.dtype} on {first.device}",
                place=f"tensors[{position}]",
                remedy="give floating-point tensors of one dtype and device, or call once for each kind",
            )
    exact = torch.float64 if first.dtype == torch.float64 else torch.float32
    flat = torch.cat([tensor.detach().flatten().to(exact) for tensor in tensors])
    bounds = [0]
    for tensor in tensors:
        bounds.append(bounds[-1] + tensor.numel())
    _Exchange(flat, bounds, group).run()
    return [
        flat[start:stop].reshape(tensor.shape).to(tensor.dtype)
        for tensor, start, stop in zip(tensors, bounds, bounds[1:])
    ]


class _Exchange:
    """One Adasum of `flat` in place; tensor i has its entries `bounds[i]` to `bounds[i + 1]`."""

    def __init__(self, flat: torch.Tensor, bounds: list[int], group: dist.ProcessGroup | None) -> None:
        self.flat = flat
        self.bounds = bounds
        self.group = dist.group.WORLD if group is None else group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def run(self) -> None:
        leaves = _power_of_two(self.size)
        extra = self.size - leaves
        merged = self.rank < 2 * extra  # this rank and its neighbour stand for one leaf
        if merged and self.rank % 2 == 1:
            self._swap(self.rank - 1, self.flat, None)
            self._swap(self.rank - 1, None, self.flat)
            return
        if merged:
            other = torch.empty_like(self.flat)
            self._swap(self.rank + 1, None, other)
            self._combine(0, self.flat.numel(), other, self._dots(self.flat, other, 0, self.flat.numel()), True)
        self._halve(self.rank // 2 if merged else self.rank - extra, leaves, extra)
        if merged:
            self._swap(self.rank + 1, self.flat, None)

    def _halve(self, leaf: int, leaves: int, extra: int) -> None:
        def rank_of(other: int) -> int:
            return 2 * other if other < extra else other + extra

        start, stop = 0, self.flat.numel()
        shares: list[tuple[int, int, int]] = []  # what to exchange on the way back
        distance = 1
        while distance < leaves:
            partner = rank_of(leaf ^ distance)
            middle = start + (stop - start) // 2
            left = leaf & distance == 0  # of the pair, this one holds `a`, keeps the first half and gives the second
            keep, give = ((start, middle), (middle, stop)) if left else ((middle, stop), (start, middle))
            other = torch.empty(keep[1] - keep[0], dtype=self.flat.dtype, device=self.flat.device)
            self._swap(partner, self.flat[slice(*give)], other)
            mine = self.flat[slice(*keep)]
            dots = self._dots(mine, other, *keep) if left else self._dots(other, mine, *keep)
            # Sum over the 2 · distance leaves that hold shares of the same two vectors. x + y = y + x to the bit, so
            # every one of them gets the same sums.
            step = distance
            while step:
                theirs = torch.empty_like(dots)
                self._swap(rank_of(leaf ^ step), dots, theirs)
                dots = dots + theirs
                step //= 2
            self._combine(*keep, other, dots, left)
            shares.append((partner, *give))
            start, stop = keep
            distance *= 2
        for partner, low, high in reversed(shares):
            self._swap(partner, self.flat[start:stop], self.flat[low:high])
            start, stop = min(start, low), max(stop, high)

    def _dots(self, a: torch.Tensor, b: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """For each tensor a·b, a·a and b·b over its entries from `start` to `stop`, which `a` and `b` are."""
        dots = torch.zeros(len(self.bounds) - 1, 3, dtype=torch.float64)
        for i, low, high in self._parts(start, stop):
            x, y = a[low - start : high - start].double(), b[low - start : high - start].double()
            dots[i] = torch.stack((x @ y, x @ x, y @ y)).cpu()
        return dots.to(a.device)

    def _combine(self, start: int, stop: int, other: torch.Tensor, dots: torch.Tensor, left: bool) -> None:
        for i, low, high in self._parts(start, stop):
            scale_a, scale_b = _scales(dots[i])
            mine, theirs = (scale_a, scale_b) if left else (scale_b, scale_a)
            self.flat[low:high].mul_(mine).add_(other[low - start : high - start], alpha=theirs)

    def _parts(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(tensor, start, stop) of what lies between `start` and `stop`."""
        return [
            (i, max(low, start), min(high, stop))
            for i, (low, high) in enumerate(zip(self.bounds, self.bounds[1:]))
            if max(low, start) < min(high, stop)
        ]

    def _swap(self, partner: int, send: torch.Tensor | None, receive: torch.Tensor | None) -> None:
        operations = []
        peer = dist.get_global_rank(self.group, partner) if self.group is not None else partner
        if send is not None and send.numel():
            operations.append(dist.P2POp(dist.isend, send.contiguous(), peer, self.group))
        if receive is not None and receive.numel():
            operations.append(dist.P2POp(dist.irecv, receive, peer, self.group))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()


def _scales(dots: torch.Tensor) -> tuple[float, float]:
    """What a and b are multiplied by, from a·b, a·a and b·b."""
    both, a, b = (float(value) for value in dots)
    return (1 - both / (2 * a) if a > 0 else 1.0, 1 - both / (2 * b) if b > 0 else 1.0)


def _power_of_two(size: int) -> int:
    """The largest power of two that is at most `size`."""
    return 1 << size.bit_length() - 1
