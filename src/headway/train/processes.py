"""Child processes, one for each rank: what they write is read, their end is noticed, none of them is left behind.

A child stands in a session of its own, so that the terminal's Ctrl-C reaches only the launcher. It has three pipes:
stdout, stderr, and one for events (HEADWAY_EVENTS_FD, one JSON object a line). Whatever happens becomes an occurrence
(`Output`, `Event` or `Exit`), and `poll` hands occurrences out in order: the last words of a child come before its end.

Nobody survives the launcher: a child asks the kernel to be killed with its parent (`headway.train.worker`), and what a
child itself has started is killed with its process group when it ends.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from headway.errors import FileError

__all__ = ["Event", "Exit", "Occurrence", "Output", "Processes"]

_LONGEST_LINE_BYTES = 64 * 1024  # a longer one is cut: a child that never ends its line must not fill our memory
_READ_BYTES = 64 * 1024
_LAST_WORDS_BYTES = 4 * 2**20  # read at most this much from the pipes of a child that has ended


@dataclass(frozen=True)
class Output:
    """One line (without its end) that a rank wrote to `stream`: "stdout" or "stderr"."""

    rank: int
    stream: str
    line: str


@dataclass(frozen=True)
class Event:
    """What a rank reported through its events pipe; `time` is seconds since the epoch, by the rank's own clock."""

    rank: int
    content: dict
    time: float


@dataclass(frozen=True)
class Exit:
    """A rank's process has ended with `code` (minus the signal's number if a signal killed it) or was `lost`.

    `lost` says why nothing is known of the process any more: the machine that it ran on is gone.
    """

    rank: int
    code: int
    time: float
    lost: str = ""


Occurrence = Output | Event | Exit


@dataclass
class _Pipe:
    rank: int
    stream: str
    descriptor: int
    partial: bytes = b""


@dataclass
class _Child:
    rank: int
    process: subprocess.Popen
    pipes: list[_Pipe] = field(default_factory=list)


class Processes:
    """The children of this process. Used from one thread, which must live as long as they do.

    (The kernel's parent-death signal is tied to the thread that started the child: prctl(2), PR_SET_PDEATHSIG.)
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._children: dict[int, _Child] = {}

    def start(self, rank: int, command: Sequence[str], environment: Mapping[str, str], directory: str = "") -> None:
        """Start `command` (no shell) as `rank` with exactly this environment. Raises FileError if it cannot start."""
        events_read, events_write = os.pipe()
        try:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**environment, "HEADWAY_EVENTS_FD": str(events_write), "HEADWAY_PARENT": str(os.getpid())},
                cwd=directory or None,
                pass_fds=(events_write,),
                start_new_session=True,
            )
        except OSError as error:
            os.close(events_read)
            raise FileError(f"cannot be started: {error.strerror}", place=command[0]) from error
        finally:
            os.close(events_write)
        assert process.stdout is not None
        assert process.stderr is not None
        child = self._children[rank] = _Child(rank, process)
        # The pipes are read through descriptors of our own; the file objects of Popen would buffer beside us.
        for stream, descriptor in (
            ("stdout", os.dup(process.stdout.fileno())),
            ("stderr", os.dup(process.stderr.fileno())),
            ("events", events_read),
        ):
            os.set_blocking(descriptor, False)
            pipe = _Pipe(rank, stream, descriptor)
            child.pipes.append(pipe)
            self._selector.register(descriptor, selectors.EVENT_READ, pipe)
        process.stdout.close()
        process.stderr.close()

    def running(self) -> tuple[int, ...]:
        """Ranks whose end has not been handed out by `poll`."""
        return tuple(self._children)

    def where(self, rank: int) -> str:
        """The machine of a rank; empty: this one."""
        return ""

    def poll(self, seconds: float) -> list[Occurrence]:
        """What happened since the last call; waits up to `seconds` for something to happen."""
        occurrences: list[Occurrence] = []
        if self._selector.get_map():
            for key, _ in self._selector.select(seconds):
                self._read(key.data, occurrences)
        elif self._children:
            time.sleep(min(seconds, 0.02))  # all pipes closed by the children themselves: only their end is left
        for child in list(self._children.values()):
            # WNOWAIT leaves the zombie, and with it the number of its process group, reserved until killpg is done.
            if os.waitid(os.P_PID, child.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                self._finish(child, time.time(), occurrences)
        return occurrences

    def signal(self, number: int) -> None:
        """Send a signal to every rank's process (not to what it started: data loaders finish with their rank)."""
        for child in self._children.values():
            os.kill(child.process.pid, number)  # not reaped yet, so the number is still its own

    def kill(self) -> None:
        """SIGKILL to every rank and to everything that it started."""
        for child in self._children.values():
            _kill_group(child.process.pid)

    def close(self) -> None:
        """Kill what still runs, reap it, and close the pipes. Waits a bounded time; may be called twice."""
        self.kill()
        deadline = time.monotonic() + 5.0
        for child in list(self._children.values()):
            with suppress(subprocess.TimeoutExpired):  # uninterruptible: it will go when the kernel lets it
                child.process.wait(max(0.0, deadline - time.monotonic()))
            for pipe in child.pipes:
                self._close(pipe)
        self._children.clear()
        self._selector.close()

    def _finish(self, child: _Child, now: float, occurrences: list[Occurrence]) -> None:
        _kill_group(child.process.pid)
        budget = _LAST_WORDS_BYTES
        for pipe in child.pipes:
            while pipe.descriptor >= 0 and budget > 0:
                count = self._read(pipe, occurrences)
                if count == 0:
                    break
                budget -= count
            self._close(pipe, occurrences)
        code = child.process.wait()
        del self._children[child.rank]
        occurrences.append(Exit(child.rank, code, now))

    def _read(self, pipe: _Pipe, occurrences: list[Occurrence]) -> int:
        """Read once; bytes read, 0 when there is nothing (more) to read."""
        if pipe.descriptor < 0:
            return 0
        try:
            data = os.read(pipe.descriptor, _READ_BYTES)
        except BlockingIOError:
            return 0
        if not data:
            self._close(pipe, occurrences)
            return 0
        *lines, pipe.partial = (pipe.partial + data).split(b"\n")
        for line in lines:
            _occur(pipe, line, occurrences)
        while pipe.stream != "events" and len(pipe.partial) > _LONGEST_LINE_BYTES:
            _occur(pipe, pipe.partial[:_LONGEST_LINE_BYTES], occurrences)
            pipe.partial = pipe.partial[_LONGEST_LINE_BYTES:]
        return len(data)

    def _close(self, pipe: _Pipe, occurrences: list[Occurrence] | None = None) -> None:
        if pipe.descriptor < 0:
            return
        if pipe.partial and occurrences is not None:
            _occur(pipe, pipe.partial, occurrences)
            pipe.partial = b""
        self._selector.unregister(pipe.descriptor)
        os.close(pipe.descriptor)
        pipe.descriptor = -1


def _occur(pipe: _Pipe, line: bytes, occurrences: list[Occurrence]) -> None:
    text = line.decode("utf-8", errors="replace").removesuffix("\r")
    if pipe.stream != "events":
        occurrences.append(Output(pipe.rank, pipe.stream, text))
        return
    try:
        content = json.loads(text)
    except ValueError:
        content = None
    if isinstance(content, dict) and isinstance(content.get("event"), str):
        moment = content.get("time")
        moment = float(moment) if isinstance(moment, int | float) else time.time()
        occurrences.append(Event(pipe.rank, content, moment))
    else:
        # Half a line from a rank that was killed while writing, or a script that wrote to our descriptor.
        occurrences.append(Output(pipe.rank, "stderr", f"headway: not an event: {text[:200]}"))


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        # No group: not yet its own session (then the leader alone exists). macOS says EPERM for a group of zombies.
        with suppress(ProcessLookupError):
            os.kill(leader, signal.SIGKILL)
