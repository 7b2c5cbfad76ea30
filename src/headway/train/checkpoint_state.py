"""What a rank holds, as parts of wholes: the tensors of a checkpoint (`train.checkpoint`) by their keys there."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from headway.memory.tiling import Tile
from headway.train.infinity_groups import described, local_of
from headway.train.tiles import RowsOfWhole, place_of

if TYPE_CHECKING:
    from headway.train.offload import OffloadedOptimizer, Share
    from headway.train.parallel import Parallel

__all__ = [
    "Later", "copy_to_ties", "local_shape", "model_of", "part_of_whole", "put_states", "room_for_states",
    "share_of_whole", "state_of",
]  # fmt: skip

Later = dict[str | tuple[str, tuple[int, ...]], Callable[[], torch.Tensor]]
"""By key, or by key and where in the whole a tile's rows begin: how to get what is read only when it is written."""


def state_of(parallel: Parallel) -> tuple[dict[str, Any], Later]:
    """What a rank holds, by key; and for what is read from its tier only when it is written, how to get it."""
    state: dict[str, Any] = {f"model.{name}": tensor for name, tensor in model_of(parallel)}
    later = _rested_state(parallel)
    if parallel.offload is not None:
        later.update(_offloaded_state(parallel, parallel.offload, state))
        return state, later
    states = _states_of(parallel)
    tiles = parallel.tiles()
    tiled: list[tuple[str, Tile, torch.Tensor]] = []
    for name, parameter in parallel.parameters():
        for key, value in states.get(parameter, {}).items():
            if id(parameter) in tiles and value.shape == parameter.shape:
                tiled.append((f"optimizer.{name}.{key}", tiles[id(parameter)], value))
            else:
                state[f"optimizer.{name}.{key}"] = part_of_whole(parallel, name, parameter, value)
    state.update(RowsOfWhole.gather(tiled))
    return state, later


def _rested_state(parallel: Parallel) -> Later:
    """How to read the parameters that rest off the device: all at once they may not fit on it."""
    homes = {id(parameter): home for infinity in parallel.infinities for parameter, home in infinity.rested()}
    tiles = parallel.tiles()
    later: Later = {}
    for name, parameter in parallel.parameters():
        if id(parameter) not in homes:
            continue
        tile = tiles.get(id(parameter))
        key = f"model.{name}"
        later.setdefault(
            key if tile is None else (key, place_of(tile, described(parameter))), homes[id(parameter)].whole
        )
    return later


def _offloaded_state(parallel: Parallel, offload: OffloadedOptimizer, state: dict[str, Any]) -> Later:
    """Put what the optimizer keeps off the device into `state`, as tensors without memory; key → how to read it.

    So no more of it comes to the host at once than one tensor, however much of it rests on disk.
    """
    later: Later = {}
    tiles = parallel.tiles()
    tiled: list[tuple[str, Tile, torch.Tensor]] = []

    def put(key: str, share: Share, read: Callable[[], torch.Tensor]) -> None:
        empty = share_of_whole(parallel, share, torch.empty(local_shape(share), device="meta"))
        tile = tiles.get(id(share.parameter))
        if tile is None:
            state[key] = part_of_whole(parallel, share.name, share.parameter, empty)
            later[key] = read
        else:
            tiled.append((key, tile, empty))
            later[key, place_of(tile, empty)] = read

    for share in offload.all_shares:
        name = share.name
        shape = local_shape(share)
        if share.dtype != torch.float32:
            put(f"model.{name}", share, lambda share=share, shape=shape: offload.master_of(share).view(shape))
        for moment in offload.moment_names(share):
            put(
                f"optimizer.{name}.{moment}",
                share,
                lambda share=share, shape=shape, moment=moment: offload.moment_of(share, moment).view(shape),
            )
        if share.steps and offload.counts_steps(share):
            state[f"optimizer.{name}.step"] = torch.tensor(float(share.steps))
    state.update(RowsOfWhole.gather(tiled))
    return later


def local_shape(share: Share) -> tuple[int, ...]:
    """The shape of a rank's share of a parameter."""
    local = local_of(share.parameter)
    return tuple(local.shape) if share.rows is None else (share.rows[1] - share.rows[0], *local.shape[1:])


def share_of_whole(parallel: Parallel, share: Share, local: torch.Tensor) -> torch.Tensor:
    """A rank's share of a tensor as the part that it is of what the replicas hold together."""
    parameter = share.parameter
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
    elif share.rows is not None:
        assert parallel.mesh is not None
        mesh, placements = parallel.mesh["data"], (Shard(0),)
    else:
        return local
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def model_of(parallel: Parallel, *, without: Container[int] = ()) -> Iterator[tuple[str, Any]]:
    """Parameters (but those with an id in `without`) and buffers by name, as parts of wholes; some have no memory."""
    seen: set[str] = set()
    tiles = parallel.tiles()
    parameters = [(name, parameter) for name, parameter in parallel.parameters() if id(parameter) not in without]
    held = [(name, tiles[id(p)], described(p)) for name, p in parameters if id(p) in tiles]
    yield from RowsOfWhole.gather(held).items()
    for name, parameter in parameters:
        if name not in seen and id(parameter) not in tiles:
            seen.add(name)
            yield name, part_of_whole(parallel, name, parameter, described(parameter))
    for piece in parallel.pieces:
        for path, module in piece.module.model.named_modules():
            for key, buffer in module._buffers.items():
                name = f"{path}.{key}" if path else key
                if buffer is not None and key not in module._non_persistent_buffers_set and name not in seen:
                    seen.add(name)
                    yield name, buffer


def part_of_whole(parallel: Parallel, name: str, parameter: nn.Parameter, value: Any) -> Any:
    """A parameter, or a state of its shape, as the part of the whole tensor that it is."""
    dim = parallel.tensor_dims.get(name)
    if dim is None or not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    assert parallel.mesh is not None
    plan = parallel.plan
    shape = list(value.shape)
    shape[dim] *= plan.tensor
    stride = torch.empty(shape, device="meta").stride()
    if not isinstance(value, DTensor):
        return DTensor.from_local(
            value, parallel.mesh["tensor"], (Shard(dim),), run_check=False, shape=torch.Size(shape), stride=stride
        )
    # ZeRO divided, along dimension 0, what tensor parallelism had divided before: the same nesting that fully_shard
    # itself writes down for a model whose parameters are DTensors.
    outer = _StridedShard(0, split_factor=plan.tensor) if dim == 0 else Shard(0)
    return DTensor.from_local(
        value.to_local(),
        parallel.mesh["data", "tensor"],
        (outer, Shard(dim)),
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )


def _states_of(parallel: Parallel) -> dict[nn.Parameter, dict[str, Any]]:
    """Of the optimizer that updates what this rank holds."""
    return (parallel.optimizer if parallel.zero is None else parallel.zero.optim).state  # type: ignore[return-value]


def room_for_states(parallel: Parallel, known: Any) -> tuple[dict[str, Any], dict[str, tuple[nn.Parameter, str, Any]]]:
    """Empty states for the parameters that this rank updates: key → what to load, key → (parameter, name, tensor)."""
    inner = parallel.optimizer if parallel.zero is None else parallel.zero.optim
    updated = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    by_parameter: dict[str, list[str]] = {}
    for key in known:
        if key.startswith("optimizer."):
            name, _, state = key.removeprefix("optimizer.").rpartition(".")
            by_parameter.setdefault(name, []).append(state)
    wanted: dict[str, Any] = {}
    held: dict[str, tuple[nn.Parameter, str, Any]] = {}
    tiles = parallel.tiles()
    tiled: list[tuple[str, nn.Parameter, str, Any]] = []
    for name, parameter in parallel.parameters():
        if id(parameter) not in updated:
            continue
        for state in by_parameter.get(name, ()):
            key = f"optimizer.{name}.{state}"
            entry = known[key]
            if id(parameter) in tiles:
                tiled.append((key, parameter, state, entry))
                continue
            if key in held:
                continue
            room: Any = None
            if isinstance(entry, TensorStorageMetadata):
                whole = part_of_whole(parallel, name, parameter, described(parameter)).shape
                if entry.size == whole and entry.size:
                    room = torch.zeros_like(parameter, dtype=entry.properties.dtype, requires_grad=False)
                else:
                    room = torch.zeros(entry.size, dtype=entry.properties.dtype)
            wanted[key] = part_of_whole(parallel, name, parameter, room)
            held[key] = (parameter, state, room)
    _room_for_tiles(parallel, tiled, wanted, held)
    return wanted, held


def _room_for_tiles(
    parallel: Parallel,
    tiled: list[tuple[str, nn.Parameter, str, Any]],
    wanted: dict[str, Any],
    held: dict[str, tuple[nn.Parameter, str, Any]],
) -> None:
    """The states of layers in tiles: each tile has its own, and together they are the untiled one's."""
    tiles = parallel.tiles()
    rows: list[tuple[str, Tile, torch.Tensor]] = []
    for number, (key, parameter, state, entry) in enumerate(tiled):
        room: Any = None
        if isinstance(entry, TensorStorageMetadata):
            if tuple(entry.size) == tiles[id(parameter)].whole:
                room = torch.zeros_like(parameter, dtype=entry.properties.dtype, requires_grad=False)
                rows.append((key, tiles[id(parameter)], room))
            else:  # a number for the whole tensor, like its step: every tile has it
                room = torch.zeros(entry.size, dtype=entry.properties.dtype)
                wanted[key] = room = wanted.get(key, room)
        held[f"{key}#{number}"] = (parameter, state, room)
    wanted.update(RowsOfWhole.gather(rows))


def put_states(parallel: Parallel, loaded: dict[str, Any], held: dict[str, tuple[nn.Parameter, str, Any]]) -> None:
    """Let the optimizer go on from what was loaded into the rooms that `room_for_states` made."""
    states = _states_of(parallel)
    on_device = {
        id(parameter)
        for group in parallel.optimizer.param_groups
        if group.get("fused") or group.get("capturable")
        for parameter in group["params"]
    }
    for key, (parameter, state, room) in held.items():
        value = loaded[key.partition("#")[0]] if room is None else room
        if state == "step" and id(parameter) in on_device and isinstance(value, torch.Tensor):
            value = value.to(parameter.device, torch.float32)
        # Tiles of one layer share what was saved of it as a number, and count on by themselves.
        states[parameter][state] = (
            value.clone() if "#" in key and isinstance(value, torch.Tensor) and value.ndim == 0 else value
        )


def copy_to_ties(parallel: Parallel) -> None:
    """A tied parameter of two stages on this rank was loaded once."""
    states = _states_of(parallel)
    with torch.no_grad():
        for tie in parallel.ties:
            first = tie.copies[0]
            for copy in tie.copies[1:]:
                copy.copy_(first)
                for key, value in states.get(first, {}).items():
                    states[copy][key] = value.clone() if isinstance(value, torch.Tensor) else value
