"""Operations of a process group in the order of their submission, without making the caller wait.

A `Worker` carries `Task`s out one after the other: in a thread of its own, or in the thread that would only wait for
them anyway, which saves two changes of thread. The first task that fails breaks the group: it and everything after it
raises, since the ranks no longer agree on what comes next.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.futures import Future

from headway.errors import HeadwayError, RankFailedError, RunError, StalledError

__all__ = ["Task", "Together", "Worker", "copy_of", "seconds_of"]


def seconds_of(timeout: timedelta | float | None) -> float | None:
    """A time-out of torch's in seconds, or None where it leaves the choice to the group (unset, zero or negative)."""
    if timeout is None:
        return None
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
    return seconds if seconds > 0 else None


def copy_of(error: HeadwayError) -> HeadwayError:
    """The same error without its traceback: each call that fails raises its own."""
    return type(error)(error.message, place=error.place, remedy=error.remedy)


class Task(dist.Work):
    """One operation: `run` carries it out and returns the output tensors. `what` says what it is.

    `wait` returns True, or raises what the operation raised; with a time-out it raises StalledError when that passes.
    The operation goes on then. `get_future` gives a future of the output tensors.
    """

    def __init__(
        self, what: str, run: Callable[[], list[torch.Tensor]] | None, *, worker: Worker | None = None
    ) -> None:
        super().__init__()
        self.what = what
        self.error: HeadwayError | None = None
        self.source = -1
        self._run = run
        self._worker = worker
        self._outputs: list[torch.Tensor] = []
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._raw: Future[Any] | None = None
        self._future: Future[Any] | None = None

    def carry_out(self, failure: HeadwayError | None) -> HeadwayError | None:
        """Run it, unless the group has failed before; whoever waits is told. Returns the error."""
        error = failure
        outputs: list[torch.Tensor] = []
        if error is None and self._run is not None:
            try:
                with torch.no_grad():
                    outputs = self._run()
            except HeadwayError as raised:
                error = raised
            except Exception as raised:  # noqa: BLE001  whatever it is, whoever waits must hear of it
                error = RunError(f"{type(raised).__name__}: {raised}", place=self.what)
                error.__cause__ = raised
        if error is not None and self._worker is not None and failure is None:
            error = self._worker.on_failure(error, self)
        self.finish(outputs, error)
        return error

    def finish(self, outputs: list[torch.Tensor], error: HeadwayError | None = None) -> None:
        """Set the result and wake whoever waits."""
        with self._lock:
            self._outputs, self.error = outputs, error
            self._run = None  # frees the tensors that it holds
            self._done.set()
            raw = self._raw
        if raw is not None:
            raw.set_result((outputs, error))

    def wait(self, timeout: timedelta | float | None = None) -> bool:
        """True when it is done; raises what it raised, or StalledError if it is not done in time."""
        limit = seconds_of(timeout)
        if limit is None and self._worker is not None:
            self._worker.help(self)
        if not self._done.wait(limit):
            raise StalledError(
                f"not done within {limit:g} s", place=self.what, remedy="see what the other ranks do, or wait longer"
            )
        if self.error is not None:
            raise copy_of(self.error)
        return True

    def get_future(self) -> Future[Any]:
        """A future of the list of output tensors. If the operation fails, so does the future, with its error's text."""
        with self._lock:
            if self._future is None:
                self._raw = Future()
                if self._done.is_set():
                    self._raw.set_result((self._outputs, self.error))
                # An error that a callback raises reaches C++ as one; an exception that is set from Python does not.
                self._future = self._raw.then(_outputs_or_raise)
            return self._future

    def is_completed(self) -> bool:
        """Whether it is done, with or without success."""
        return self._done.is_set()

    def is_success(self) -> bool:
        """Whether it is done without an error."""
        return self._done.is_set() and self.error is None

    def exception(self) -> HeadwayError | None:
        """Its error, if it has failed."""
        return self.error

    def result(self) -> list[torch.Tensor]:
        """The output tensors."""
        self.wait()
        return self._outputs

    def source_rank(self) -> int:
        """Who sent what was received."""
        return self.source

    _source_rank = source_rank

    def synchronize(self) -> None:
        """Wait for it."""
        self.wait()

    def block_current_stream(self) -> None:
        """Nothing: tensors of the CPU have no streams, and operations on devices are on the current stream already."""


def _outputs_or_raise(future: Future[Any]) -> list[torch.Tensor]:
    outputs, error = future.value()
    if error is not None:
        raise copy_of(error)
    return outputs


class Together(Task):
    """Several works as one: done when all are, failed when one is."""

    def __init__(self, what: str, works: list[Any]) -> None:
        super().__init__(what, None)
        self._works = works
        self._waiting = len(works)
        if not works:
            self.finish([])

    def wait(self, timeout: timedelta | float | None = None) -> bool:
        """As of `Task`."""
        for work in self._works:
            work.wait() if seconds_of(timeout) is None else work.wait(timeout)
        return True

    def is_completed(self) -> bool:
        """As of `Task`."""
        return all(work.is_completed() for work in self._works)

    def get_future(self) -> Future[Any]:
        """A future of the tensors of all."""
        gathered = torch.futures.collect_all([work.get_future() for work in self._works])
        return gathered.then(lambda done: [tensor for future in done.value() for tensor in future.value()])


class Worker:
    """Carries out tasks in the order of submission.

    `on_failure` is called once, with the error of the first task that fails. It lets the other ranks know, and returns
    what that task and all later ones raise.
    """

    def __init__(self, name: str, on_failure: Callable[[HeadwayError, Task], HeadwayError]) -> None:
        self.on_failure = on_failure
        self.failure: HeadwayError | None = None
        self._name = name
        self._changed = threading.Condition()
        self._queue: deque[Task] = deque()
        self._running = threading.Lock()  # held by whoever carries a task out
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, task: Task, *, at_once: bool) -> Task:
        """Put `task` behind those before it. `at_once`: the caller will wait, so it may carry it out itself."""
        with self._changed:
            closed = self._closed
            if not closed:
                self._queue.append(task)
                if not at_once:
                    self._wake()
        if closed:
            task.finish([], self.failure or RankFailedError("the process group was destroyed", place=task.what))
        elif at_once:
            self.help(task)
            if not task.is_completed():  # another thread is busy with what came before
                with self._changed:
                    self._wake()
        return task

    def help(self, task: Task) -> None:
        """Carry out what is waiting, up to `task`, as long as nobody else does."""
        while not task.is_completed() and self._running.acquire(blocking=False):
            try:
                if not self._next():
                    return
            finally:
                self._running.release()

    def close(self, timeout_seconds: float) -> None:
        """Let what is waiting be carried out, within the time-out, then end the thread; fail what is left."""
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))

    def fail(self, failure: HeadwayError) -> None:
        """Break the group from outside: whatever is waiting, and whatever comes, raises `failure`."""
        with self._changed:
            self.failure = self.failure or failure
            self._wake()

    def _wake(self) -> None:
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(target=self._work, name=f"headway-{self._name}", daemon=True)
            self._thread.start()
        self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if not self._queue:
                    return
            with self._running:
                self._next()

    def _next(self) -> bool:
        """Carry out the next task; the caller holds `_running`."""
        with self._changed:
            if not self._queue:
                return False
            task = self._queue.popleft()
        error = task.carry_out(self.failure)
        if error is not None and self.failure is None:
            self.failure = error
        return True
