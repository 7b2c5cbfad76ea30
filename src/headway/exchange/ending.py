"""The last collectives of a process: values gathered from all ranks, and leaving torch's process group in good order.

gloo's threads let go of a collective's tensors a moment *after* they have reported it done, and to let go of a tensor
that Python knows they need the interpreter. A rank that ends in that moment is aborted by C++ ("terminate called
without an active exception"), its work done. So the tensors used here are held until gloo has let go of them.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

__all__ = ["LETTING_GO_SECONDS", "gather_bytes", "leave_group"]

_PATIENCE_SECONDS = 5.0
# For what others used before: a thread that can run gets its turn well within this time.
LETTING_GO_SECONDS = 0.02


def gather_bytes(mine: bytes, device: torch.device) -> list[bytes]:
    """What each rank of the default group gave, in order of rank, on every rank. `device`: where the backend works."""
    world = dist.get_world_size()
    length = torch.tensor([len(mine)], dtype=torch.int64, device=device)
    lengths = [torch.zeros_like(length) for _ in range(world)]
    dist.all_gather(lengths, length)
    longest = max(int(each) for each in lengths)
    padded = torch.zeros(max(1, longest), dtype=torch.uint8)
    if mine:
        padded[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
    padded = padded.to(device)
    parts = [torch.zeros_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    found = [bytes(part.cpu().numpy()[: int(size)]) for part, size in zip(parts, lengths, strict=True)]
    _await_release([length, *lengths, padded, *parts])
    return found


def leave_group(device: torch.device) -> None:
    """Wait for the other ranks of the default group, then destroy all groups."""
    token = torch.zeros(1, device=device)
    dist.all_reduce(token)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    _await_release([token])
    time.sleep(LETTING_GO_SECONDS)
    dist.destroy_process_group()


def _await_release(tensors: list[torch.Tensor]) -> None:
    """Wait until nobody but the caller holds the tensors, or for a few seconds: then something else holds them."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    # `_use_count` counts the C++ references: one, the Python object's.
    while any(tensor._use_count() > 1 for tensor in tensors) and time.monotonic() < deadline:  # type: ignore
        time.sleep(0.0005)
