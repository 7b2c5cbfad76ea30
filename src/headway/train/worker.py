"""`python -m headway.train.worker script.py arguments…`: the user's script as one rank's `__main__`.

What the launcher needs around a script, and nothing more: the process dies with the launcher, its output comes line by
line, and an exception becomes one `error` event (rank, kind, message, place, remedy, traceback) before it ends the
process with the exit code that `headway.errors` gives it.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from headway.errors import FileError, HeadwayError, InputError, Interrupted
from headway.train.events import emit

__all__ = ["die_with_parent", "leave", "main", "run_script"]

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def die_with_parent(parent: int) -> None:
    """Ask the kernel to SIGKILL this process when its parent ends, even if the parent is killed with kill -9.

    Ends the process at once if `parent`, a process id, is gone already. Linux only; elsewhere it only checks.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def run_script(script: str, arguments: Sequence[str]) -> None:
    """Run `script` as if by `python script arguments…`: as `__main__`, with its folder first on the module path.

    Raises what the script raises; FileError or InputError if it cannot be read or compiled.
    """
    try:
        source = Path(script).read_bytes()
    except FileNotFoundError:
        raise FileError("no such file", place=script, remedy="check the path of the script") from None
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror}", place=script) from None
    try:
        code = compile(source, script, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise InputError(
            f"not a Python program: {getattr(error, 'msg', error)}", place=f"{script}:{line}" if line else script
        ) from None
    module = types.ModuleType("__main__")
    module.__dict__.update(__file__=script, __builtins__=__builtins__, __spec__=None)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    sys.modules["__main__"] = module  # pickling and multiprocessing look the script's classes up here
    exec(code, module.__dict__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script named by the first argument with the others; the exit code of the process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        print("usage: python -m headway.train.worker SCRIPT [ARGUMENTS…]", file=sys.stderr)
        return InputError.exit_code
    parent = os.environ.pop("HEADWAY_PARENT", "")
    if parent:
        die_with_parent(int(parent))
    descriptor = os.environ.get("HEADWAY_EVENTS_FD", "")
    if descriptor:
        # The script's own children must not hold the launcher's pipe open. (Forked ones still do; they are killed.)
        os.set_inheritable(int(descriptor), False)
    # A parent that holds signals back (Ray's daemons do) hands that down.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    faulthandler.enable()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    script = arguments[0]
    own = sys.modules["__main__"]  # kept: replacing it in sys.modules must not end the module we run from
    try:
        run_script(script, arguments[1:])
        return 0
    except (KeyboardInterrupt, Interrupted):
        return Interrupted.exit_code
    except SystemExit as leave:
        return _left(leave, script)
    except HeadwayError as error:
        if not error.place:
            error.place = _place(error, script)
        print(error, file=sys.stderr)
        _report(error, error.message, error.place, error.remedy)
        return error.exit_code
    except BaseException as error:  # noqa: BLE001 - the end of the script, whatever ended it, goes to the launcher
        error.__traceback__ = _own_part(error, script)
        traceback.print_exception(error)
        _report(error, _describe(error), _place(error, script), _remedy(error))
        return 1
    finally:
        del own


def _left(leave: SystemExit, script: str) -> int:
    """What `sys.exit(...)` means, as Python itself reads it: None is 0, a text is an error message."""
    if leave.code is None:
        return 0
    if isinstance(leave.code, int):
        if leave.code not in (0, Interrupted.exit_code):
            _report(leave, f"sys.exit({leave.code})", _place(leave, script), "")
        return leave.code & 0xFF
    print(leave.code, file=sys.stderr)
    _report(leave, str(leave.code), _place(leave, script), "")
    return 1


def _report(error: BaseException, message: str, place: str, remedy: str) -> None:
    emit(
        "error",
        time=time.time(),  # so that the launcher can tell whose error came first
        rank=int(os.environ.get("RANK", "0")),
        kind=type(error).__name__,
        message=message,
        place=place,
        remedy=remedy,
        traceback="".join(traceback.format_exception(error)),
    )


def _describe(error: BaseException) -> str:
    """The error in at most twelve lines: the whole stands in the log."""
    lines = (str(error).strip() or "without a message").splitlines()
    text = "\n".join([*lines[:12], "…"] if len(lines) > 12 else lines)
    return f"{type(error).__name__}: {text[:1500]}"


def _remedy(error: BaseException) -> str:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate" in str(error):
        return "use a plan that needs less memory: headway plan --goal memory"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, or choose another run directory"
    return ""


def _own_part(error: BaseException, script: str) -> types.TracebackType | None:
    """The traceback from the script's first frame on: the frames above it are ours."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != script:
        trace = trace.tb_next
    return trace or error.__traceback__


def _place(error: BaseException, script: str) -> str:
    """`file:line` of the innermost frame that is the user's own code: in the script, or beside it."""
    folder = str(Path(script).resolve().parent) + os.sep
    headway = str(Path(__file__).resolve().parents[1]) + os.sep
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_filename
        full = str(Path(name).resolve())
        is_own = full.startswith(folder) and "site-packages" not in full and not full.startswith(headway)
        if name == script or is_own:
            place = f"{name}:{line}"
    return place or script


def leave(code: int) -> NoReturn:
    """End the process as Python would (other threads, atexit functions), but without taking torch apart.

    Its C++ destructors, run in the order of chance while the interpreter goes down, now and then abort a process whose
    work was done ("terminate called without an active exception").
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed by the script, or nobody reads it any more
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
