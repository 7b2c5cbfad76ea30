"""The host's memory allocator, told what training needs of it."""

from __future__ import annotations

import ctypes
import os

__all__ = ["keep_freed_memory"]

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
