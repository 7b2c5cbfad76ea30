"""Horovod's elastic training, which Headway does not have: every use of it says so, and what to do instead."""

from __future__ import annotations

from typing import Any

from headway.errors import InputError

__all__: list[str] = []


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise InputError(
        "elastic training in Horovod's way is not part of headway.horovod",
        place=f"hvd.elastic.{name}",
        remedy="write checkpoints and start again with the ranks that are left: torchrun --max-restarts does both",
    )
