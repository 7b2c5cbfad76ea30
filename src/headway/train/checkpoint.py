"""Checkpoints that any plan can read: torch's distributed format (DCP), under the model's own parameter names.

Each rank writes what it holds, and a checkpoint says of each tensor which part of the whole that is. So a run resumes
under the plan that it had, or under another: other degrees, another ZeRO stage, one device. Keys:

    model.<parameter or buffer>          optimizer.<parameter>.<state>        rng.<rank>
    step, groups (hyperparameters of the optimizer's groups), scheduler

An optimizer off the device saves what torch's own would, in float32: masters as the parameters, moments however they
are kept. An update still going on (`delayed_update`) is put in force first, so that a run that goes on and one that
resumes do the same.

A checkpoint is written beside its final place and renamed when it is whole, then `latest` is made to name it. Whatever
happens, a full disk included, the checkpoints before it stay as they are. `save_in` writes into remote memory instead
(`train.remote_checkpoint`), from where `load` reads too; `write_out` brings what is there to disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from headway.errors import CheckpointError, FileError, HeadwayError, Interrupted
from headway.memory.tiling import Tile
from headway.train.checkpoint_state import (
    Later,
    copy_to_ties,
    local_shape,
    model_of,
    part_of_whole,
    put_states,
    room_for_states,
    share_of_whole,
    state_of,
)  # fmt: skip
from headway.train.lost_peers import causes, lost_peer
from headway.train.tiles import RowsOfWhole
from headway.value import read_text, write_atomically

if TYPE_CHECKING:
    from headway.train.offload import OffloadedOptimizer
    from headway.train.parallel import Parallel
    from headway.train.remote_checkpoint import Reader, RemoteCheckpoints

    _Opened = Path | Reader

__all__ = ["latest", "load", "load_full", "save", "save_in", "step_of", "write_out"]


def save(directory: Path, parallel: Parallel, *, step: int, scheduler: Any = None) -> Path:
    """Write `directory`/step-N, on all ranks at once, and let `directory`/latest name it; the path of the checkpoint.

    Raises CheckpointError on every rank if one of them could not write; earlier checkpoints are left as they are. Where
    a rank died meanwhile, the others raise what its loss made of their collectives, for the launcher to blame that one.
    """
    final = directory / f"step-{step}"
    partial = directory / f".step-{step}.partial"
    _on_first_rank(parallel, partial, lambda: _make_empty(partial))
    try:
        _write(parallel, dcp.FileSystemWriter(partial), step, scheduler)
    except (CheckpointException, OSError, RuntimeError) as error:
        if parallel.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        if (lost := lost_peer(error)) is not None:
            raise lost from None
        raise _failed(error, final, "written") from error
    _on_first_rank(parallel, final, lambda: _publish(partial, final))
    return final


def save_in(checkpoints: RemoteCheckpoints, parallel: Parallel, *, step: int, scheduler: Any = None) -> None:
    """Write a checkpoint into remote memory, on all ranks at once; the one before it is then removed.

    Raises CheckpointError on every rank if one of them could not write; the one before is left as it is. As `save`
    where a rank died meanwhile.
    """
    if checkpoints.step == step:
        return
    try:
        _write(parallel, checkpoints.writer(step), step, scheduler)
    except (CheckpointException, OSError, RuntimeError, HeadwayError) as error:
        if (lost := lost_peer(error)) is not None:
            raise lost from None
        remedy = "raise HEADWAY_REMOTE_BYTES, or leave checkpoints on disk; the checkpoint before this one is whole"
        raise _failed(error, f"{checkpoints}: step {step}", "written", remedy) from error


def write_out(
    checkpoints: RemoteCheckpoints, directory: Path, *, is_stopped: Callable[[], bool] = lambda: False
) -> Path:
    """Bring the newest checkpoint in remote memory to `directory`/step-N, in one process; its path.

    One tensor at a time; before each, `is_stopped` says whether to let it be. Raises CheckpointError where it cannot be
    read or written, Interrupted when stopped; nothing is left in `directory` then.
    """
    final = partial = None
    state: dict[str, Any] = {}
    later: Later = {}

    def bring(reader: Reader, key: str, entry: TensorStorageMetadata) -> torch.Tensor:
        if is_stopped():
            raise stopped
        wanted = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
        _read(wanted, reader, alone=True)
        return wanted[key]

    stopped = Interrupted("stopped before the newest checkpoint was brought to disk", place=str(directory))
    try:
        with checkpoints.reader() as reader, _quietly():
            for key, entry in reader.read_metadata().state_dict_metadata.items():
                if isinstance(entry, TensorStorageMetadata):
                    state[key] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
                    later[key] = lambda key=key, entry=entry: bring(reader, key, entry)
                else:
                    state[key] = None
            others: dict[str, Any] = {key: None for key, value in state.items() if value is None}
            _read(others, reader, alone=True)
            final = directory / f"step-{int(others['step'])}"
            partial = directory / f".{final.name}.partial"
            _make_empty(partial)
            dcp.save(
                {**state, **others}, storage_writer=dcp.FileSystemWriter(partial), planner=_Planner(later), no_dist=True
            )
        _publish(partial, final)
    except BaseException as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        if is_stopped() and not isinstance(error, KeyboardInterrupt | SystemExit):
            raise stopped from None
        if isinstance(error, CheckpointException | OSError | RuntimeError | HeadwayError):
            raise _failed(error, final or checkpoints, "written") from error
        raise
    return final


def _write(parallel: Parallel, writer: dcp.StorageWriter, step: int, scheduler: Any) -> None:
    if parallel.offload is not None:
        parallel.offload.settle()
    state, later = state_of(parallel)
    state["step"] = step
    state["groups"] = [
        {key: value for key, value in group.items() if key != "params"} for group in parallel.optimizer.param_groups
    ]
    if scheduler is not None:
        state["scheduler"] = scheduler.state_dict()
    state[f"rng.{parallel.rank}"] = torch.get_rng_state()
    if parallel.device.type == "cuda":
        state[f"cuda_rng.{parallel.rank}"] = torch.cuda.get_rng_state(parallel.device)
    with _quietly():
        dcp.save(state, storage_writer=writer, planner=_Planner(later), no_dist=parallel.mesh is None)


def load(path: Path | RemoteCheckpoints, parallel: Parallel, *, scheduler: Any = None) -> int:
    """Bring parameters, optimizer and scheduler to where they were at `path`; the number of steps made by then.

    Of remote memory the newest checkpoint is read.

    Raises CheckpointError where the checkpoint is broken or belongs to another model.
    """
    with _opened(path) as place:
        return _load(place, parallel, scheduler)


def _load(path: _Opened, parallel: Parallel, scheduler: Any) -> int:
    known = _metadata(path).state_dict_metadata
    _check_model(path, parallel, known)
    states, held = room_for_states(parallel, known) if parallel.offload is None else ({}, {})
    rested = {id(parameter) for infinity in parallel.infinities for parameter, _ in infinity.rested()}
    wanted: dict[str, Any] = {f"model.{name}": tensor for name, tensor in model_of(parallel, without=rested)}
    wanted.update(states)
    wanted.update(dict.fromkeys(key for key in ("step", "groups", "scheduler") if key in known))
    generators = [f"{kind}.{parallel.rank}" for kind in ("rng", "cuda_rng")]
    for key in generators:
        entry = known.get(key)
        if isinstance(entry, TensorStorageMetadata):
            wanted[key] = torch.empty(entry.size, dtype=torch.uint8)
    try:
        with _quietly(), torch.no_grad():
            _read(wanted, path, alone=parallel.mesh is None)
            _load_rested(path, parallel)
            if parallel.offload is not None:
                _load_offloaded(path, parallel, parallel.offload, known)
    except (CheckpointException, OSError, RuntimeError, KeyError, EOFError) as error:
        if (lost := lost_peer(error)) is not None:
            raise lost from None
        raise _failed(error, path, "read") from error
    for group, saved in zip(parallel.optimizer.param_groups, wanted["groups"], strict=False):
        group.update(saved)
    put_states(parallel, wanted, held)
    if any(len(tie.copies) > 1 for tie in parallel.ties):
        with parallel.present(changed=True):
            copy_to_ties(parallel)
    if scheduler is not None and wanted.get("scheduler") is not None:
        scheduler.load_state_dict(wanted["scheduler"])
    # Another number of ranks has other generators; then they go on from the script's seed.
    if wanted.get(generators[0]) is not None and f"rng.{parallel.plan.world_size}" not in known:
        torch.set_rng_state(wanted[generators[0]])
        if parallel.device.type == "cuda" and wanted.get(generators[1]) is not None:
            torch.cuda.set_rng_state(wanted[generators[1]], parallel.device)
    if parallel.offload is not None:
        parallel.offload.steps_done = int(wanted["step"])
    return int(wanted["step"])


def load_full(path: str | Path) -> dict[str, torch.Tensor]:
    """Every parameter and buffer of a checkpoint, whole, in this process: `model.load_state_dict(load_full(path))`.

    Raises CheckpointError if the checkpoint cannot be read.
    """
    known = _metadata(Path(path)).state_dict_metadata
    wanted: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in known.items()
        if key.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }
    try:
        with _quietly():
            _read(wanted, Path(path), alone=True)
    except (CheckpointException, OSError, RuntimeError, EOFError) as error:
        raise _failed(error, Path(path), "read") from error
    return {key.removeprefix("model."): tensor for key, tensor in wanted.items()}


def step_of(path: str | Path | RemoteCheckpoints) -> int:
    """How many steps had been made when the checkpoint was written. Raises CheckpointError."""
    wanted: dict[str, Any] = {"step": None}
    with _opened(Path(path) if isinstance(path, str) else path) as place:
        _metadata(place)
        try:
            with _quietly():
                _read(wanted, place, alone=True)
        except (CheckpointException, OSError, RuntimeError, KeyError, EOFError) as error:
            raise _failed(error, place, "read") from error
    return int(wanted["step"])


def latest(directory: str | Path) -> Path | None:
    """The newest whole checkpoint in a folder of checkpoints, or None. Raises FileError if `latest` is unreadable."""
    pointer = Path(directory) / "latest"
    if not pointer.exists():
        return None
    return Path(directory) / read_text(pointer).strip()


# Reading, and writing what is made only when it is written


class _Planner(DefaultSavePlanner):
    """Our keys are flat already, and their values are to stay whole; some are made only when they are written."""

    def __init__(self, later: Later) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._later = later

    def lookup_object(self, index: Any) -> Any:
        make = self._later.get(index.fqn) or self._later.get((index.fqn, tuple(index.offset or ())))
        return super().lookup_object(index) if make is None else make()


def _load_rested(path: _Opened, parallel: Parallel) -> None:
    """Bring the parameters that rest off the device to their tier, one group at a time."""
    tiles = parallel.tiles()
    names = {id(parameter): name for name, parameter in parallel.parameters()}
    for infinity in parallel.infinities:
        for group in infinity.groups:
            infinity.bring(group)
            wanted: dict[str, Any] = {}
            tiled: list[tuple[str, Tile, torch.Tensor]] = []
            for member in group.members:
                key, values = f"model.{names[id(member.slice)]}", member.slice.detach()
                if (tile := tiles.get(id(member.slice))) is not None:
                    tiled.append((key, tile, values))
                else:
                    wanted[key] = part_of_whole(parallel, names[id(member.slice)], member.slice, values)
            _read({**wanted, **RowsOfWhole.gather(tiled)}, path, alone=True)
            infinity.put_back(group)
            infinity.settle(group)


def _load_offloaded(path: _Opened, parallel: Parallel, offload: OffloadedOptimizer, known: Any) -> None:
    """Bring the states of an optimizer off the device to its tier, one parameter's at a time."""
    tiles = parallel.tiles()
    for share in offload.all_shares:
        tile = tiles.get(id(share.parameter))
        rooms: dict[str, torch.Tensor] = {}
        wanted: dict[str, Any] = {}
        for key in ("model", *offload.possible_moments(share), "step"):
            full = f"model.{share.name}" if key == "model" else f"optimizer.{share.name}.{key}"
            if full not in known:
                continue
            # Where the mesh is: a part of a DTensor that lies elsewhere would be copied there, and the copy read into.
            rooms[key] = torch.zeros(()) if key == "step" else torch.zeros(local_shape(share), device=parallel.device)
            part = rooms[key] if key == "step" else share_of_whole(parallel, share, rooms[key])
            if tile is not None and key != "step":
                wanted[full] = RowsOfWhole([(tile, part)])
            else:
                wanted[full] = part if key == "step" else part_of_whole(parallel, share.name, share.parameter, part)
        # Each rank for itself: that of an empty share has nothing to read, and collectives would wait for it.
        _read(wanted, path, alone=True)
        master = rooms.pop("model").cpu().reshape(-1)
        steps = int(rooms.pop("step").item()) if "step" in rooms else int(bool(rooms))
        offload.put(share, master, {name: room.cpu().reshape(-1) for name, room in rooms.items()}, steps)


# Files, and remote memory


@contextlib.contextmanager
def _opened(path: Path | RemoteCheckpoints) -> Iterator[_Opened]:
    """What to read a checkpoint from, as often as is needed: of remote memory all its parts are found once."""
    if isinstance(path, Path):
        yield path
        return
    with path.reader() as reader:
        yield reader


def _metadata(path: _Opened) -> Metadata:
    if not isinstance(path, Path):
        return path.read_metadata()
    if not path.is_dir():
        raise CheckpointError("no such checkpoint", place=str(path), remedy="give a folder runs/NAME/checkpoint/step-N")
    try:
        return dcp.FileSystemReader(path).read_metadata()
    except Exception as error:
        raise CheckpointError(
            "has no readable metadata, so it was not written to its end", place=str(path), remedy="use an earlier one"
        ) from error


def _read(wanted: dict[str, Any], path: _Opened, *, alone: bool) -> None:
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    reader = dcp.FileSystemReader(path) if isinstance(path, Path) else path
    dcp.load(wanted, storage_reader=reader, planner=planner, no_dist=alone)


def _check_model(path: _Opened, parallel: Parallel, known: Any) -> None:
    for name, tensor in model_of(parallel):
        entry = known.get(f"model.{name}")
        if entry is None or isinstance(entry, BytesStorageMetadata):
            raise CheckpointError(
                f"holds no {name}, which the model has", place=str(path), remedy="resume with the script that wrote it"
            )
        if tuple(entry.size) != tuple(tensor.shape):
            raise CheckpointError(
                f"holds {name} of shape {tuple(entry.size)}, and the model's is {tuple(tensor.shape)}",
                place=str(path),
                remedy="resume with the script and the arguments that wrote it",
            )


def _make_empty(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def _publish(partial: Path, final: Path) -> None:
    if final.exists():
        # The same step once more, after a resume: the old one goes only when the new one is whole.
        old = partial.with_suffix(".old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
        os.replace(partial, final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(partial, final)
    write_atomically(final.parent / "latest", final.name + "\n")


def _on_first_rank(parallel: Parallel, path: Path, act: Callable[[], None]) -> None:
    """Do something on rank 0; where it fails, every rank raises CheckpointError, and none waits for ever."""
    outcome: list[str | None] = [None]
    if parallel.rank == 0:
        try:
            act()
        except (OSError, FileError) as error:
            outcome[0] = str(_failed(error, path, "written").message)
    if parallel.mesh is not None:
        dist.broadcast_object_list(outcome, 0, device=parallel.device)
    if outcome[0] is not None:
        raise CheckpointError(outcome[0], place=str(path), remedy=_REMEDY)


_REMEDY = "free some space or choose another folder; the checkpoints before this one are whole"


def _failed(error: BaseException, path: object, done: str, remedy: str = "") -> CheckpointError:
    found = [error, *filter(None, [error.__cause__]), *(each for each in causes(error) if each is not error)]
    reason = next((f"{os.strerror(c.errno)}" for c in found if isinstance(c, OSError) and c.errno), "")
    full = any(isinstance(c, OSError) and c.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) for c in found)
    text = reason or (str(found[-1]).strip() or type(found[-1]).__name__).splitlines()[0]
    if not full and "No space left" in str(error):
        text = os.strerror(errno.ENOSPC)
    default = _REMEDY if done == "written" else "use an earlier checkpoint, or the script that wrote this one"
    remedy = remedy or getattr(found[-1], "remedy", "") or default
    return CheckpointError(f"cannot be {done}: {text}", place=str(path), remedy=remedy)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    # torch warns of its own insides here (single process, typed storages), and nobody could act on that.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
