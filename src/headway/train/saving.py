"""When and where a session saves, and what it goes on from: files in the run directory, or remote memory.

Variables: HEADWAY_CHECKPOINT_EVERY (steps), HEADWAY_CHECKPOINT_ON ("disk", "remote": where those between the first step
and the last go), HEADWAY_RESUME (a checkpoint's folder, or "remote": the newest in remote memory).

What a script asks for, and what a session writes when it ends or is told to stop, is always a folder on disk: remote
memory ends with the run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from headway.errors import FieldError
from headway.exchange.placement import whole_number
from headway.train import checkpoint
from headway.train.events import emit

if TYPE_CHECKING:
    from headway.train.rank import Parallel
    from headway.train.remote_checkpoint import RemoteCheckpoints

__all__ = ["Saving"]


class Saving:
    """The checkpoints of one rank's session. `resumed_step`: how many steps had been made when it began.

    `directory`: the folder of checkpoints; None: none are written unless somebody says where. Raises CheckpointError
    where what is to be resumed from cannot be read, FieldError for a variable that makes no sense.
    """

    def __init__(self, directory: Path | None, device: torch.device) -> None:
        self.directory = directory
        self.saved_step = -1
        self._every = whole_number(os.environ, "HEADWAY_CHECKPOINT_EVERY", 0)
        on = os.environ.get("HEADWAY_CHECKPOINT_ON", "disk")
        if on not in ("disk", "remote"):
            raise FieldError(f"{on!r} is no place", place="HEADWAY_CHECKPOINT_ON", remedy='"disk" or "remote"')
        resume = os.environ.get("HEADWAY_RESUME", "")
        self._remote: RemoteCheckpoints | None = None
        if on == "remote" or resume == "remote":
            # Imported where used: most runs save to disk, and each rank would pay for it when it starts.
            from headway.train.remote_checkpoint import RemoteCheckpoints

            self._remote = RemoteCheckpoints.attach(os.environ, device=device)
        self._between = self._remote if on == "remote" else None
        self._source = self._remote if resume == "remote" else Path(resume) if resume else None
        self.resumed_step = 0 if self._source is None else checkpoint.step_of(self._source)

    def resume(self, parallel: Parallel, scheduler: Any) -> None:
        """Bring a rank to where the checkpoint is that it goes on from, if there is one."""
        if self._source is None:
            return
        checkpoint.load(self._source, parallel, scheduler=scheduler)
        if isinstance(self._source, Path):
            self.saved_step = self.resumed_step

    def after_step(self, parallel: Parallel, step: int, scheduler: Any) -> None:
        """Save if it is time to, where the checkpoints between the first step and the last go."""
        if not self._every or step % self._every:
            return
        if self._between is None:
            self.save(parallel, step, scheduler)
            return
        checkpoint.save_in(self._between, parallel, step=step, scheduler=scheduler)
        # Where it will be when the run ends, however it does: the launcher sees to that.
        path = "" if self.directory is None else self.directory / f"step-{step}"
        if parallel.rank == 0:
            emit("checkpoint", step=step, path=str(path), on="remote")

    def save(self, parallel: Parallel, step: int, scheduler: Any, directory: Path | None = None) -> Path | None:
        """Write a checkpoint to disk, on all ranks at once; its path, or None where there is no place for it."""
        directory = directory or self.directory
        if directory is None:
            return None
        path = checkpoint.save(directory, parallel, step=step, scheduler=scheduler)
        self.saved_step = step
        if parallel.rank == 0:
            emit("checkpoint", step=step, path=str(path))
        return path
