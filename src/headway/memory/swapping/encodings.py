"""Lossless encodings of what backward reads of a tensor (Gist, Jain et al., ISCA 2018, section 4), carried out.

- "sign": a bit for each element: whether it is above zero, which is all that ReLU's backward asks. Decoded, elements
  are 1 or 0.
- "window": positions of a max-pool, 8 bytes each, as one byte: the place within the pool's window.
- "shape": nothing but the shape; decoded, elements are zero. For the input of a max-pool, whose backward reads none.
- "sparse": a bit map and the elements that are not zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from headway.memory.swapping.watching import Geometry, flat, shaped

__all__ = ["Encoded", "PoolWindow", "decoded", "encoded"]

_WEIGHTS = (1, 2, 4, 8, 16, 32, 64, 128)


class PoolWindow(NamedTuple):
    """How the windows of a max-pool lie in its input's planes, which are `width` elements wide."""

    width: int
    stride: tuple[int, int]
    padding: tuple[int, int]

    def corners(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """Of each window (rows, columns, 2): row and column of its first element, which padding may put outside."""
        down = torch.arange(rows, device=device) * self.stride[0] - self.padding[0]
        across = torch.arange(columns, device=device) * self.stride[1] - self.padding[1]
        return torch.stack(torch.meshgrid(down, across, indexing="ij"), dim=-1)


class Encoded:
    """An encoded tensor: `payload` are its bytes, the rest is what decoding needs to know."""

    def __init__(
        self,
        name: str,
        payload: torch.Tensor,
        size: int,
        geometry: Geometry,
        split: int = 0,
        window: PoolWindow | None = None,
    ) -> None:
        self.name = name
        self.payload = payload
        self.size = size  # bytes of the storage
        self.geometry = geometry
        self.split = split  # "sparse": bytes of the bit map
        self.window = window

    def without_payload(self) -> Encoded:
        """The same, to be given its payload again when it is back."""
        return Encoded(self.name, self.payload[:0].clone(), self.size, self.geometry, self.split, self.window)

    def with_payload(self, payload: torch.Tensor) -> Encoded:
        """The same with these bytes."""
        return Encoded(self.name, payload, self.size, self.geometry, self.split, self.window)


def encoded(name: str, storage: torch.UntypedStorage, geometry: Geometry, window: PoolWindow | None = None) -> Encoded:
    """Encode a storage. `geometry`: of the tensor that fills it; `window`: of the max-pool that made positions.

    Positions of a pool whose windows are not known, or too large for a byte, are copied.
    """
    size = storage.nbytes()
    if name == "shape":
        return Encoded(name, torch.empty(0, dtype=torch.uint8, device=storage.device), size, geometry)
    elements = _elements(storage, geometry)
    if name == "sign":
        return Encoded(name, packed_bits(elements > 0), size, geometry)
    if name == "window":
        return _encoded_positions(storage, geometry, window)
    mask = elements != 0
    bits = packed_bits(mask)
    values = elements[mask].view(torch.uint8)
    return Encoded("sparse", torch.cat([bits, values]), size, geometry, bits.numel())


_SIDE = 16  # a window of up to 16 x 16 elements: a place within it is a byte


def _encoded_positions(storage: torch.UntypedStorage, geometry: Geometry, window: PoolWindow | None) -> Encoded:
    positions = shaped(storage, geometry)
    if window is not None:
        corners = window.corners(positions.shape[-2], positions.shape[-1], positions.device)
        down = positions // window.width - corners[..., 0]
        across = positions % window.width - corners[..., 1]
        if int(torch.maximum(down, across).max()) < _SIDE:
            body = (down * _SIDE + across).to(torch.uint8).flatten()
            return Encoded("window", body, storage.nbytes(), geometry, window=window)
    return Encoded("plain", flat(storage).clone(), storage.nbytes(), geometry)


def decoded(code: Encoded) -> torch.UntypedStorage:
    """The storage again, as far as backward can tell."""
    device = code.payload.device
    storage = torch.empty(code.size, dtype=torch.uint8, device=device).untyped_storage()
    if code.name == "plain":
        flat(storage).copy_(code.payload)
        return storage
    if code.name == "shape":
        flat(storage).zero_()
        return storage
    if code.name == "window":
        assert code.window is not None
        positions = shaped(storage, code.geometry)
        corners = code.window.corners(positions.shape[-2], positions.shape[-1], positions.device)
        places = code.payload.to(torch.int64).view(positions.shape)
        positions.copy_((places // _SIDE + corners[..., 0]) * code.window.width + places % _SIDE + corners[..., 1])
        return storage
    elements = _elements(storage, code.geometry)
    if code.name == "sign":
        elements.copy_(unpacked_bits(code.payload, elements.numel()))
        return storage
    mask = unpacked_bits(code.payload[: code.split], elements.numel())
    elements.zero_()
    elements[mask] = code.payload[code.split :].clone().view(code.geometry.dtype)
    return storage


def _elements(storage: torch.UntypedStorage, geometry: Geometry) -> torch.Tensor:
    """All elements of a storage, in the order in which they lie in it."""
    return torch.empty(0, dtype=geometry.dtype, device=storage.device).set_(storage)  # type: ignore[call-overload]


def packed_bits(mask: torch.Tensor) -> torch.Tensor:
    """Booleans, eight to a byte."""
    count = mask.numel()
    padded = torch.zeros((count + 7) // 8 * 8, dtype=torch.uint8, device=mask.device)
    padded[:count] = mask
    weights = torch.tensor(_WEIGHTS, dtype=torch.uint8, device=mask.device)
    return (padded.view(-1, 8) * weights).sum(dim=1, dtype=torch.uint8)


def unpacked_bits(bits: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` booleans of packed bytes."""
    weights = torch.tensor(_WEIGHTS, dtype=torch.uint8, device=bits.device)
    return (bits[:, None] & weights).ne(0).flatten()[:count]
