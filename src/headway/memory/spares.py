"""Files that have been replaced and are kept, so that the next ones of their length are written over them.

A file system takes longer to give a file new blocks than to write to old ones, and longer still to commit that. But
what a replaced file holds may be written over only once a loss of power cannot bring its old name back: after an
`fsync` of the directory. One such `fsync` does for all files that were replaced before it, so a few wait for it
together.
"""

from __future__ import annotations

import itertools
import os
import threading
from pathlib import Path

__all__ = ["SPARE_ENDING", "SpareFiles"]

SPARE_ENDING = ".spare"
"""How the names of spare files end."""

_MOST = 8
_FEW = _MOST // 2


class SpareFiles:
    """The spare files of one `directory`: 8 at most. May be used by several threads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._retired: dict[Path, int] = {}  # bytes; the directory on disk may still call them otherwise
        self._free: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count()  # names are never used twice: a tensor's generations may begin anew

    def keep(self, old: Path, size: int) -> bool:
        """Take over the file `old`, which has been replaced. False where it is not of `size` bytes, or not needed."""
        with self._lock:
            if len(self._retired) + len(self._free) >= _MOST:
                return False
        spare = self._directory / f"{next(self._numbers)}{SPARE_ENDING}"
        try:
            if old.stat().st_size != size:
                return False
            os.rename(old, spare)
        except OSError:
            return False
        with self._lock:
            self._retired[spare] = size
        return True

    @property
    def is_short(self) -> bool:
        """Whether few are left that may be written over, and `secure` would make it more."""
        with self._lock:
            return bool(self._retired) and len(self._free) < _FEW

    def secure(self) -> None:
        """Make sure that the directory on disk is as it is seen now. Raises OSError."""
        with self._lock:
            seen = list(self._retired)
        try:
            descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError:
            self._drop(seen)  # nobody knows whether they may be written over
            raise
        with self._lock:
            for spare in seen:
                if spare in self._retired:  # not dropped in the meantime
                    self._free[spare] = self._retired.pop(spare)

    def take(self, size: int, name: Path) -> bool:
        """Call a spare file of `size` bytes `name`, if there is one that may be written over."""
        with self._lock:
            found = next((spare for spare, each in self._free.items() if each == size), None)
            if found is None:
                return False
            del self._free[found]
        try:
            os.rename(found, name)
        except OSError:
            return False
        return True

    def drop(self) -> bool:
        """Remove them all. Whether there were any."""
        with self._lock:
            spares = [*self._retired, *self._free]
        self._drop(spares)
        return bool(spares)

    def _drop(self, spares: list[Path]) -> None:
        with self._lock:
            gone = [spare for spare in spares if self._retired.pop(spare, None) or self._free.pop(spare, None)]
        for spare in gone:
            spare.unlink(missing_ok=True)
