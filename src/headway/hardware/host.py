"""The host's memory: how much of it there is for this process, and its allocator, told what training needs of it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

__all__ = ["available_bytes", "control_group_left", "keep_freed_memory", "memory_bytes"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>


def keep_freed_memory() -> bool:
    """Let glibc keep what tensors free for the tensors that follow; whether it could be told.

    A training step frees and takes again the same activations each time. By default glibc hands blocks of several MB
    back to the kernel, which clears every page anew when they are next touched. The probe, the operator profile and
    the ranks all run like this, so that what is measured is what is trained with. Variables of the user's
    (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_) go before; other allocators and systems are left as they are.
    """
    if "MALLOC_TRIM_THRESHOLD_" in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return False
    # 32 MiB is the largest block that glibc takes from its heap rather than by mmap.
    return bool(mallopt(_MMAP_THRESHOLD, 32 * 2**20) and mallopt(_TRIM_THRESHOLD, 2**30))


def available_bytes(root: Path = Path("/")) -> float:
    """Memory that this process can still take: what is free or can be freed, and what its control groups leave.

    `root`: where /proc and /sys lie.
    """
    free = memory_bytes("MemAvailable", root) or float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(free, control_group_left(root))


def memory_bytes(what: str, root: Path = Path("/")) -> float:
    """A figure of /proc/meminfo in bytes; of the whole memory also where there is none, others are 0 then."""
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) if what == "MemTotal" else 0.0


def control_group_left(root: Path = Path("/")) -> float:
    """What this process's control group and those around it leave it, version 2 or 1; infinity where none limits."""
    mounts = {
        "": (root / "sys/fs/cgroup", "memory.max", "memory.current"),
        "memory": (root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    }
    left = float("inf")
    for controller, path in _control_groups(root).items():
        mount, limit, used = mounts[controller]
        for group in (mount / path, *(mount / parent for parent in path.parents)):
            try:
                text = (group / limit).read_text().strip()
                if text != "max" and float(text) < 2**60:
                    left = min(left, float(text) - float((group / used).read_text()))
            except OSError:  # in a container its own group is the mount, whatever the path says
                continue
    return left


def _control_groups(root: Path) -> dict[str, Path]:
    """The group of this process below the mount, for version 2 ("") and for the memory controller of version 1."""
    found = {"": Path(), "memory": Path()}
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in found.keys() & controllers.split(","):
            if ".." not in Path(path).parts:  # else it lies outside of what is mounted here
                found[controller] = Path(path.lstrip("/"))
    return found
