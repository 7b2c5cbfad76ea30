"""Machine code that is kept on disk, also where several processes compile it for the first time at once.

numba keeps all versions of a function (types of its arguments, values that it is closed over) under one index, gives a
new version the next free number, and writes index and code one after the other. Two processes that do so at once can
both take the same number, and then one version's code stands under the other's key: what is loaded from then on is
wrong, and nothing says so. Here one process writes at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache

__all__ = ["compiled"]


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: `numba.njit(**options)` of a function, kept on disk (as by its `cache=True`)."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher: Any = numba.njit(**options)(function)
        dispatcher._cache = _Cache(function)
        return dispatcher

    return decorate


class _Cache(FunctionCache):
    """numba looks whether the function's own file has changed; what it calls and reads may stand in others."""

    _is_stamped = False

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        self._stamp()
        return super().load_overload(sig, target_context)

    def save_overload(self, sig: Any, data: Any) -> None:
        self._stamp()
        with _alone(Path(self.cache_path)):
            super().save_overload(sig, data)

    def _stamp(self) -> None:
        # Not when it is decorated: what stands further down in the file is not there yet.
        if not self._is_stamped:
            self._is_stamped = True
            cache: Any = self
            cache._cache_file._source_stamp = _stamp_of(cache._py_func)


def _stamp_of(function: Callable[..., Any]) -> tuple[Any, ...]:
    """What a function's machine code depends on: the files of all that it calls, and the constants that it reads."""
    files: dict[str, tuple[float, int]] = {}
    constants: list[str] = []
    left, seen = [function], {id(function)}
    while left:
        each = left.pop()
        path = each.__code__.co_filename
        found = os.stat(path)
        files[path] = (found.st_mtime, found.st_size)
        read = [each.__globals__.get(name) for name in each.__code__.co_names]
        constants += [repr(value) for value in read if isinstance(value, bool | int | float | str | tuple)]
        # What it is closed over is in numba's own key, but for the files of what is called there.
        for value in (*read, *(cell.cell_contents for cell in each.__closure__ or ())):
            # What numba compiles into its caller: other compiled functions, and intrinsics.
            called = getattr(value, "py_func", None) or getattr(value, "_defn", None)
            if called is not None and id(called) not in seen:
                seen.add(id(called))
                left.append(called)
    return tuple(sorted(files.items())), tuple(sorted(constants))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process is in here for the same folder. Where that cannot be had, nothing can be kept there either."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / "headway-compiled.lock", os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
