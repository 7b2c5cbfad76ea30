"""Layers in tiles, as checkpoints see them: the untiled tensor, of which this rank holds some rows here and there.

torch's distributed checkpoint asks an object which chunks of a whole tensor it holds (`_Checkpointable`). So a
checkpoint of a tiled model has the names and the shapes of the untiled one, and either reads the other's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from headway.memory.tiling import Tile

__all__ = ["RowsOfWhole", "place_of"]


def place_of(tile: Tile, values: torch.Tensor) -> tuple[int, ...]:
    """Where in the whole tensor what this rank holds of a tile begins: an offset in each dimension."""
    offset = (tile.start, *(0 for _ in tile.whole[1:]))
    if not isinstance(values, DTensor):
        return offset
    _, within = compute_local_shape_and_global_offset(values.shape, values.device_mesh, values.placements)
    return tuple(start + more for start, more in zip(offset, within, strict=True))


class RowsOfWhole(torch.Tensor):
    """Tiles of one tensor that this rank holds: what each is, and its values, sliced over replicas or not.

    A tensor in name only, of the whole shape: nothing can be computed with it.
    """

    _chunks: dict[tuple[int, ...], torch.Tensor]

    @staticmethod
    def __new__(cls, tiles: Sequence[tuple[Tile, torch.Tensor]]) -> RowsOfWhole:
        tile, values = tiles[0]
        made = torch.Tensor._make_wrapper_subclass(cls, tile.whole, dtype=values.dtype, device=values.device)
        made._chunks = {}
        for tile, values in tiles:
            local = values.to_local() if isinstance(values, DTensor) else values
            if local.numel():
                made._chunks[place_of(tile, values)] = local
        return made

    def __init__(self, tiles: Sequence[tuple[Tile, torch.Tensor]]) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{function} of rows of a tensor")

    @classmethod
    def gather(cls, tiles: Iterable[tuple[str, Tile, torch.Tensor]]) -> dict[str, RowsOfWhole]:
        """Tiles put together by their key in a checkpoint."""
        by_key: dict[str, list[tuple[Tile, torch.Tensor]]] = {}
        for key, tile, values in tiles:
            by_key.setdefault(key, []).append((tile, values))
        return {key: cls(found) for key, found in by_key.items()}

    def __create_write_items__(self, fqn: str, _object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(offset)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offsets=torch.Size(offset), sizes=values.shape),
                    properties=TensorProperties.create_from_tensor(values),
                    size=self.shape,
                ),
            )
            for offset, values in self._chunks.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size(offset), sizes=values.shape)
            for offset, values in self._chunks.items()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self._chunks[tuple(index.offset)]
