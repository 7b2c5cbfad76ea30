"""Tensors of any shape as flat vectors, which is what programs move, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from headway.errors import InputError

__all__ = ["Flat", "Scratch", "by_dtype", "bytes_of", "check_alike", "joined", "listed", "slices", "text_of"]

_KEPT_BYTES = 256 << 20  # the largest piece of working memory that is kept from one operation to the next


class Scratch:
    """Working memory for one operation at a time."""

    def __init__(self) -> None:
        self._kept: torch.Tensor | None = None

    def borrow(self, length: int, like: torch.Tensor) -> torch.Tensor:
        """A flat tensor of `length` elements like `like`, to be used until the end of the operation."""
        if like.device.type != "cpu":
            return like.new_empty(length)
        needed = length * like.element_size()
        if needed > _KEPT_BYTES:
            return torch.empty(length, dtype=like.dtype)
        if self._kept is None or self._kept.numel() < needed:
            self._kept = torch.empty(max(needed, 1 << 16), dtype=torch.uint8)
        return self._kept[:needed].view(like.dtype)

    def free(self) -> None:
        """Give the memory back."""
        self._kept = None


class Flat:
    """Tensors as one flat vector: a view of the tensor where it is one and contiguous, else working memory.

    The vector begins with the tensors' content (unless `load` is false), and what is in it at the end is put back.
    """

    def __init__(self, scratch: Scratch, tensors: list[torch.Tensor], *, load: bool = True) -> None:
        self._tensors = [tensor.detach() for tensor in tensors]
        self._is_view = len(tensors) == 1 and tensors[0].is_contiguous()
        if self._is_view:
            self._flat = self._tensors[0].view(-1)
            return
        self._flat = scratch.borrow(sum(tensor.numel() for tensor in tensors), tensors[0])
        if load:
            for tensor, part in self._parts():
                part.copy_(tensor)

    def _parts(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        parts = self._flat.split([tensor.numel() for tensor in self._tensors])
        return [(tensor, part.view(tensor.shape)) for tensor, part in zip(self._tensors, parts)]

    def __enter__(self) -> torch.Tensor:
        return self._flat

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None and not self._is_view:
            for tensor, part in self._parts():
                tensor.copy_(part)


def by_dtype(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The tensors in groups of one dtype and device each, in order."""
    groups: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(groups.values())


def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The vector that the tensors are consecutive parts of, if they are."""
    first = tensors[0].detach()
    step = first.numel() * first.element_size()
    for position, tensor in enumerate(tensors):
        if not tensor.is_contiguous() or tensor.dtype != first.dtype:
            return None
        if tensor.data_ptr() != first.data_ptr() + position * step:
            return None
    end = first.storage_offset() + first.numel() * len(tensors)
    if end * first.element_size() > first.untyped_storage().nbytes():
        return None
    return first.as_strided((first.numel() * len(tensors),), (1,))


def slices(tensor: torch.Tensor, splits: Sequence[int] | None, size: int) -> list[torch.Tensor]:
    """The tensor cut along its first dimension, one part for each rank; equal parts unless given. Raises InputError."""
    if not splits:
        splits = [tensor.shape[0] // size] * size
    if len(splits) != size or sum(splits) != tensor.shape[0]:
        raise InputError(
            f"splits {list(splits)} do not add up to {tensor.shape[0]}",
            place="all_to_all_single",
            remedy="one for each rank",
        )
    return list(tensor.detach().split(list(splits)))


def check_alike(kind: str, tensors: Sequence[torch.Tensor]) -> None:
    """Nothing, or InputError if the tensors are not of one size and dtype."""
    if len({(tensor.numel(), tensor.dtype) for tensor in tensors}) > 1:
        raise InputError("the tensors are not of one size and dtype", place=kind, remedy="make them alike")


def listed(tensors: Any) -> list[torch.Tensor]:
    """The tensors as a list; torch also gives a single one."""
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous tensor of the CPU, as a flat uint8 array."""
    return tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, dtype=np.uint8)


def text_of(tensors: Sequence[torch.Tensor]) -> str:
    """Dtype and number of elements, for errors."""
    dtypes = "/".join(dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in tensors))
    sizes = [tensor.numel() for tensor in tensors]
    return f"{dtypes} x {sum(sizes)}" + (f" in {len(sizes)} tensors" if len(sizes) > 1 else "")
