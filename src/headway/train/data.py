"""Which samples make which step, and which of them a rank loads.

The samples of step n follow from the seed and n alone, never from the plan: under any plan, and after a resume, the
same samples make the same step. A replica takes consecutive samples of the step, and its micro-batches consecutive
samples of those; for a loss that is a mean over samples this is the same mean as that of one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from headway.errors import InputError

__all__ = ["StepSampler", "batch_size_of", "share_of", "slice_batch", "split_batch"]


class StepSampler:
    """The positions in a dataset of the samples that one replica loads, a list for each step.

    `size` samples in the dataset, `batch_size` of them a step over all replicas. Each epoch is its own permutation; the
    samples left over at its end, too few for a step, are left out. Raises InputError where a step cannot be filled.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        steps: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        replica: int = 0,
        replicas: int = 1,
        first_step: int = 0,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"must be at least 1, not {batch_size}", place="session.shard: batch_size")
        if size < batch_size:
            raise InputError(
                f"the dataset has {size} samples, and a step takes {batch_size}",
                place="session.shard: batch_size",
                remedy="use a smaller batch_size or more data",
            )
        if batch_size % replicas:
            raise InputError(
                f"{batch_size} samples do not divide among {replicas} replicas",
                place="session.shard: batch_size",
                remedy=f"choose a multiple of {replicas}",
            )
        self.steps_per_epoch = size // batch_size
        self.steps = self.steps_per_epoch if steps is None else steps
        self._size, self._batch_size, self._seed, self._shuffle = size, batch_size, seed, shuffle
        self._replica, self._replicas, self._first_step = replica, replicas, first_step
        self._epoch = -1
        self._order: list[int] | range = range(size)

    def __len__(self) -> int:
        return max(0, self.steps - self._first_step)

    def __iter__(self) -> Iterator[list[int]]:
        return (self.positions(step) for step in range(self._first_step, self.steps))

    def positions(self, step: int) -> list[int]:
        """The samples of this replica in a step (counted from 0)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._shuffle and epoch != self._epoch:
            # Seeded by a pair, so that the epochs of two neighbouring seeds do not coincide.
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
            self._order = torch.randperm(self._size, generator=generator).tolist()
            self._epoch = epoch
        share = self._batch_size // self._replicas
        start = within * self._batch_size + self._replica * share
        return list(self._order[start : start + share])


def batch_size_of(batch: Any) -> int:
    """Samples in a batch: the length of its first tensor that has dimensions. Raises InputError if there is none."""
    for leaf in tree_flatten(batch)[0]:
        if isinstance(leaf, torch.Tensor) and leaf.ndim:
            return leaf.shape[0]
    raise InputError(
        "the batch holds no tensor with a dimension of samples",
        place="session.step",
        remedy="give (inputs, targets), tensors whose first dimension counts the samples",
    )


def slice_batch(batch: Any, start: int, stop: int, size: int) -> Any:
    """Samples `start` to `stop` of a batch of `size`: every tensor whose first dimension is `size` is cut."""

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == size:
            return leaf[start:stop]
        return leaf

    return tree_map(cut, batch)


def split_batch(batch: Any, parts: int) -> list[Any]:
    """A batch as `parts` consecutive batches of equal size. Raises InputError where it does not divide."""
    size = batch_size_of(batch)
    if size % parts:
        raise InputError(
            f"{size} samples do not divide into {parts} micro-batches",
            place="session.step",
            remedy="give every step the batch size that was planned for",
        )
    if parts == 1:
        return [batch]
    share = size // parts
    return [slice_batch(batch, start, start + share, size) for start in range(0, size, share)]


def share_of(batches: Iterable[Any], replica: int, replicas: int) -> Iterator[Any]:
    """This replica's part of each global batch."""
    for batch in batches:
        size = batch_size_of(batch)
        if size % replicas:
            raise InputError(
                f"{size} samples do not divide among {replicas} replicas",
                place="session.shard",
                remedy=f"give batches of a multiple of {replicas} samples",
            )
        share = size // replicas
        yield slice_batch(batch, replica * share, (replica + 1) * share, size)
