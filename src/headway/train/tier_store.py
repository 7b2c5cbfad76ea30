"""The one store in which a rank keeps what its plan puts off the device: parameters, optimizer states, activations."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from headway.errors import PlanError
from headway.memory.tiers import RemoteRegion, Store
from headway.plan.plan import Plan
from headway.train.remote_memory import attach, transfer_buffer_bytes

__all__ = ["open_store", "tier_directory"]


def open_store(
    plan: Plan, rank: int, device: torch.device | str, *, remote: RemoteRegion | None = None
) -> Store | None:
    """A store for what `plan` keeps off the device, or None if that is nothing.

    Its transfer buffers take HEADWAY_BUFFER_BYTES (256 MiB), its disk tier lies in `tier_directory`. `remote` is what
    the remote tier reaches (`memory.tiers.RemoteRegion`). Raises PlanError where the plan wants remote memory and there
    is none. By default it is the memory node that the environment names (`train.remote_memory`).
    """
    tiers = plan.tiers
    if not tiers:
        return None
    if "remote" in tiers and remote is None:
        remote = attach(plan, rank, os.environ)
    if "remote" in tiers and remote is None:
        field = next(f"{what}_on" for what in _STATES if getattr(plan, f"{what}_on") == "remote")
        raise PlanError(
            "no remote memory was given",
            place=f"plan: {field}",
            remedy='headway run and headway.start() start a memory node; or choose "host" or "disk"',
        )
    return Store(
        device=device,
        directory=tier_directory() / f"rank-{rank}" if "disk" in tiers else None,
        buffer_bytes=transfer_buffer_bytes(),
        remote=remote,
    )


_STATES = ("parameters", "optimizer", "activations")


def tier_directory() -> Path:
    """Where the disk tier lies: HEADWAY_TIER_DIRECTORY, else in the run directory, else among temporary files.

    A store removes its files when it closes, and those of a killed predecessor when it opens; so the place is the same
    from run to run.
    """
    if named := os.environ.get("HEADWAY_TIER_DIRECTORY"):
        return Path(named)
    if run := os.environ.get("HEADWAY_RUN_DIRECTORY"):
        return Path(run) / "tiers"
    return Path(tempfile.gettempdir()) / f"headway-tiers-{os.getuid()}"
