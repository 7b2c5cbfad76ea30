"""Threads that work for a device."""

from __future__ import annotations

import torch

__all__ = ["work_on"]


def work_on(device: torch.device) -> None:
    """Let this thread's CUDA calls go to `device`.

    A thread begins on the first GPU: each rank's would make a context there, which takes some 0.5 GB of its memory.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
