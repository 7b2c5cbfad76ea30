"""Start the ranks of a plan, watch over them, and leave nothing behind.

Two engines start processes: `local` on this machine (`train/processes.py`), `ray` across machines
(`train/ray_engine.py`). One function, `supervise`, decides for both what the processes' occurrences mean: whose error
came first, when all must end, what a Ctrl-C does. It knows neither processes nor Ray, only the `Ranks` that an engine
hands it. docs/launch.md says how launches work from the user's side.

Every wait is bounded except that for the training itself.
"""

from __future__ import annotations

import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from os import environ, sched_getaffinity
from pathlib import Path
from typing import IO, Literal, Protocol

from headway import errors
from headway.errors import (
    CheckpointError,
    FileError,
    HeadwayError,
    InputError,
    Interrupted,
    RankFailedError,
    TraceError,
)
from headway.hardware.cluster import Accelerator, Cluster
from headway.plan.plan import Plan
from headway.train.lost_peers import is_consequence
from headway.train.newest_checkpoint import NewestCheckpoint, note
from headway.train.processes import Event, Exit, Occurrence, Output, Processes
from headway.value import read_text
from headway.workload.graph import Workload

__all__ = [
    "Ranks",
    "accelerator_of",
    "check_options",
    "checkpoint_at",
    "launch",
    "rank_environment",
    "supervise",
    "trace_script",
    "worker_command",
]

OnEvent = Callable[[dict], None]
OnOutput = Callable[[int, str, str], None]

SETTLE_SECONDS = 1.0  # how long an error that looks like a consequence waits for its cause to show
GRACE_SECONDS = 1.0  # between SIGTERM and SIGKILL when a rank has failed
STOP_SECONDS = 60.0  # for a step to end and a checkpoint to be written after Ctrl-C
UNPREPARED_SECONDS = 5.0  # the same when some rank was not yet able to stop in good order
KILL_SECONDS = 10.0  # for the kernel to end a killed process

# A launcher that we were started under (torchrun, Slurm) must not leak into ranks that form a group of their own.
_FOREIGN = ("MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK", "TORCHELASTIC_RUN_ID", "HEADWAY_TRACE_OUTPUT",
            "HEADWAY_RESUME", "HEADWAY_CHECKPOINT_EVERY", "HEADWAY_CHECKPOINT_ON", "HEADWAY_INIT_METHOD",
            "HEADWAY_REMOTE_MEMORY")  # fmt: skip

_TAIL_LINES = 8
_UNREACHABLE = (
    "it does not end even when killed: its machine is gone, or it waits for a dead network disk (ps: state D)"
)


class _RankDied(RankFailedError):
    """A rank was killed, crashed or was lost: what it was doing may go well another time."""


class Ranks(Protocol):
    """The processes of a run, wherever they are, as an engine presents them to `supervise`."""

    def running(self) -> tuple[int, ...]:
        """Ranks whose Exit has not been handed out."""
        ...

    def where(self, rank: int) -> str:
        """The machine of a rank, for messages; empty: this one."""
        ...

    def poll(self, seconds: float) -> list[Occurrence]:
        """What happened since the last call; waits up to `seconds` for something to happen."""
        ...

    def signal(self, number: int) -> None:
        """Send a signal to all running ranks."""
        ...

    def kill(self) -> None:
        """SIGKILL to all running ranks and to what they started."""
        ...


def launch(
    script: Path,
    arguments: Sequence[str],
    plan: Plan,
    *,
    run_directory: Path,
    workload_path: Path,
    plan_path: Path,
    cluster: Cluster | None,
    engine: Literal["local", "ray"] = "local",
    resume: Path | None = None,
    checkpoint_every: int | None = None,
    checkpoint_on: Literal["disk", "remote"] = "disk",
    restarts: int = 0,
    on_event: OnEvent,
    on_output: OnOutput,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Train `script` under `plan` in one process for each rank; returns when all of them have ended well.

    `on_event` is called with each event of the ranks (with "rank" in it), `on_output(rank, stream, line)` with each
    line that they print; the whole output of rank R is kept in `run_directory`/logs/rank-R.log. `cluster` says what
    the plan's devices are (threads of a rank, node of a device); `environment` is added to that of the ranks; `resume`
    is a checkpoint, or a run directory that has one; `checkpoint_every` counts steps. With `checkpoint_on` "remote"
    those go to a memory node, and the newest of them to disk when the ranks have ended before they could write one
    there. When a rank was killed by a signal (a crash is one) or lost, or no more is known than that a connection
    between ranks broke, all are started again up to `restarts` times, from the newest checkpoint; an exception of the
    script's would come again. Both with the local engine only.

    Ctrl-C or SIGTERM to this process lets the ranks finish their step, write a checkpoint and end (Interrupted); a
    second one kills them.

    Raises RankFailedError naming the rank that failed first; the error itself where a rank raised one of
    `headway.errors` on purpose (its exit code then is that of the whole run); Interrupted after a stop; FileError for
    a missing script; with the Ray engine also MissingExtraError, and InputError if the placement is impossible.
    """
    script = _existing(script)
    check_options(engine, checkpoint_every=checkpoint_every, checkpoint_on=checkpoint_on, restarts=restarts)
    run_directory.mkdir(parents=True, exist_ok=True)
    extra = dict(environment or {})
    if resume is not None:
        extra["HEADWAY_RESUME"] = str(checkpoint_at(resume))
    if checkpoint_every is not None:
        extra["HEADWAY_CHECKPOINT_EVERY"] = str(checkpoint_every)
    watch = partial(supervise, run_directory=run_directory, script=script, on_output=on_output)
    if engine == "ray":
        from headway.train import ray_engine

        try:
            with ray_engine.start(
                script,
                arguments,
                plan,
                run_directory=run_directory.resolve(),
                workload_path=workload_path,
                plan_path=plan_path,
                cluster=cluster,
                environment=extra,
            ) as ranks:
                watch(ranks, resumed=resume is not None, on_event=on_event)
        except KeyboardInterrupt:  # while Ray was still making room: from then on it is only counted
            raise Interrupted("stopped before training began", place=str(run_directory)) from None
        return
    if checkpoint_on != "disk":
        extra["HEADWAY_CHECKPOINT_ON"] = checkpoint_on
    with (
        tempfile.TemporaryDirectory(prefix="headway-") as private,
        stop_requests() as requests,
        _memory_node(plan, workload_path, checkpoint_on) as remote,
        NewestCheckpoint(
            remote if checkpoint_on == "remote" else {}, run_directory, on_event, lambda: requests.count
        ) as newest,
    ):
        for attempt in range(restarts + 1):
            ranks = Processes()
            try:
                for rank in range(plan.world_size):
                    variables = rank_environment(
                        rank,
                        plan,
                        run_directory=run_directory.resolve(),
                        workload_path=workload_path.resolve(),
                        plan_path=plan_path.resolve(),
                        threads=_threads(plan, cluster, rank),
                        accelerator=accelerator_of(plan, cluster, rank),
                    )
                    local = {
                        "LOCAL_RANK": str(rank),
                        "LOCAL_WORLD_SIZE": str(plan.world_size),
                        "GROUP_RANK": "0",
                        # A file instead of a port: nothing listens, and nobody else can join.
                        "HEADWAY_INIT_METHOD": f"file://{private}/rendezvous-{attempt}",
                    }
                    loopback = loopback_interface()
                    if loopback:
                        local |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
                    inherited = {name: value for name, value in environ.items() if name not in _FOREIGN}
                    ranks.start(
                        rank,
                        worker_command(sys.executable, script, arguments),
                        {**inherited, **variables, **local, **remote, **extra},
                    )
                watch(
                    ranks,
                    requests=requests,
                    resumed=resume is not None or attempt > 0,
                    on_event=newest.on_event,
                )
                return
            except _RankDied as error:
                if attempt == restarts or requests.count:
                    raise
                try:
                    extra |= newest.variables()
                except HeadwayError as lost:
                    note(error, lost)
                    raise error from None
                on_event({"event": "restart", "rank": 0, "attempt": attempt + 1, "message": error.message})
            finally:
                ranks.close()


def check_options(engine: str, *, checkpoint_every: int | None, checkpoint_on: str, restarts: int) -> None:
    """Raises InputError where these, as for `launch`, cannot go together: before anything slow begins."""
    if engine == "ray" and (checkpoint_on != "disk" or restarts):
        raise InputError(
            "checkpoints in remote memory, and restarts, are for ranks on this machine",
            place="--engine ray",
            remedy="leave --checkpoint-on and --restarts away, or use the local engine",
        )
    if checkpoint_on == "remote" and checkpoint_every is None:
        raise InputError(
            "no checkpoint would go to remote memory: that at the end of a run is always on disk",
            place="--checkpoint-on remote",
            remedy="say how often: --checkpoint-every STEPS",
        )


def _memory_node(plan: Plan, workload_path: Path, checkpoint_on: str) -> AbstractContextManager[dict[str, str]]:
    """Variables that name a memory node; none, and nothing imported for it, where no remote memory is needed."""
    if "remote" not in plan.tiers and checkpoint_on != "remote":
        return nullcontext({})
    from headway.train.remote_memory import memory_node

    return memory_node(plan, workload_path, checkpoints=checkpoint_on == "remote")


def trace_script(script: Path, arguments: Sequence[str], output: Path, on_output: OnOutput) -> Workload:
    """Run `script` up to its first step with its model on the meta device, and return the traced workload.

    The script runs in a process of its own with HEADWAY_TASK=trace; its session writes the workload to `output`.

    Raises FileError for a missing script, TraceError if the script ends without ever taking a step or its model does
    not trace, InputError if it raises something else; each with the line of the script. Interrupted after Ctrl-C.
    """
    script = _existing(script)
    output = output.resolve()
    output.unlink(missing_ok=True)
    name = script.name
    variables = {key: value for key, value in environ.items() if key not in (*_FOREIGN, "RANK", "WORLD_SIZE")}
    variables |= {"HEADWAY_TASK": "trace", "HEADWAY_TRACE_OUTPUT": str(output)}
    failure: dict = {}
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    ended: Exit | None = None
    killed_after = None
    with stop_requests() as requests:
        child = Processes()
        try:
            child.start(0, worker_command(sys.executable, script, arguments), variables)
            while ended is None:
                for occurrence in child.poll(0.1):
                    if isinstance(occurrence, Output):
                        if occurrence.stream == "stderr":
                            tail.append(occurrence.line)
                        on_output(0, occurrence.stream, occurrence.line)
                    elif isinstance(occurrence, Event):
                        if occurrence.content["event"] == "error":
                            failure = failure or occurrence.content
                    else:
                        ended = occurrence
                if requests.count and killed_after is None:
                    child.kill()  # there is nothing to save yet
                    killed_after = time.monotonic() + KILL_SECONDS
                if killed_after is not None and time.monotonic() > killed_after:
                    break
        finally:
            child.close()
    if requests.count or ended is None or (ended.code == Interrupted.exit_code and not failure):
        raise Interrupted("stopped while tracing", place=name)
    if ended.code == 0 and output.exists():
        return Workload.load(output)
    if ended.code == 0:
        raise TraceError(
            "the script ended without ever taking a step",
            place=name,
            remedy="call session.step(batch) in the training loop, for batches from session.shard(...)",
        )
    place = failure.get("place") or str(script)
    alone = f"see whether it runs by itself: python {name}"
    if failure:
        kind = _own_error(failure)
        remedy = failure.get("remedy") or ""
        if kind is not None:
            raise kind(failure["message"], place=place, remedy=remedy or alone)
        raise InputError(f"the script {_verb(failure)} {failure['message']}", place=place, remedy=remedy or alone)
    words = "".join(f"\n    {line}" for line in tail)
    raise InputError(
        f"the script {_how_it_ended(ended, oom_kills=0)} while it was traced{words}", place=place, remedy=alone
    )


def worker_command(python: str, script: Path | str, arguments: Sequence[str]) -> list[str]:
    """The command line of a rank. (-P: the current folder is not searched for modules before our own.)"""
    return [python, "-P", "-m", "headway.train.worker", str(script), *arguments]


def checkpoint_at(resume: Path) -> Path:
    """The checkpoint that `resume` means: itself, or the newest one of a run directory or a folder of checkpoints.

    Raises CheckpointError if there is none.
    """
    resume = Path(resume).resolve()
    for folder in (resume, resume / "checkpoint"):
        pointer = folder / "latest"
        if pointer.is_file():
            return folder / read_text(pointer).strip()
    if (resume / ".metadata").is_file():
        return resume
    raise CheckpointError(
        "no checkpoint there",
        place=str(resume),
        remedy="give a run directory (runs/NAME) or a checkpoint (runs/NAME/checkpoint/step-N)",
    )


def rank_environment(
    rank: int,
    plan: Plan,
    *,
    run_directory: Path,
    workload_path: Path,
    plan_path: Path,
    threads: int,
    accelerator: Accelerator | None,
) -> dict[str, str]:
    """Variables that tell a rank who it is and what to do, the same for every engine."""
    variables = {
        "HEADWAY_TASK": "train",
        "HEADWAY_PLAN": str(plan_path),
        "HEADWAY_WORKLOAD": str(workload_path),
        "HEADWAY_RUN_DIRECTORY": str(run_directory),
        "RANK": str(rank),
        "WORLD_SIZE": str(plan.world_size),
        "OMP_NUM_THREADS": str(threads),
    }
    if accelerator is not None and accelerator.torch_device == "cpu":
        variables["HEADWAY_DEVICE"] = "cpu"  # planned for CPUs, so no GPU that happens to be there
    return variables


def accelerator_of(plan: Plan, cluster: Cluster | None, rank: int) -> Accelerator | None:
    """What a rank's device is; None if `cluster` does not say."""
    if cluster is None:
        return None
    kinds = {device.name: device.accelerator for device in cluster.devices}
    return cluster.accelerators.get(kinds.get(plan.devices[rank], ""))


def loopback_interface() -> str:
    """Name of the loopback network interface ("lo"), or empty where there is none."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), "")


@dataclass
class StopRequests:
    """How often this process was asked to stop: 1 in good order, 2 at once.

    Wrappers repeat signals, and a closing terminal sends SIGHUP and SIGTERM: what comes within half a second is one
    request.
    """

    count: int = 0
    last: float = -1.0e9

    def add(self, number: int, frame: object) -> None:
        """A signal handler."""
        now = time.monotonic()
        if now > self.last + 0.5:
            self.count += 1
        self.last = now


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Count SIGINT, SIGTERM and SIGHUP instead of being ended by them.

    Off the main thread Python cannot handle signals; there the count stays 0 and the caller has them.
    """
    requests = StopRequests()
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
            before[number] = signal.signal(number, requests.add)
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@dataclass
class _Watch:
    """What has been seen of the ranks so far."""

    exits: dict[int, Exit] = field(default_factory=dict)
    errors: dict[int, Event] = field(default_factory=dict)  # the first of each rank
    tails: dict[int, deque[str]] = field(default_factory=dict)
    stopped: int | None = None  # the step after which the ranks stopped in good order
    checkpoint: tuple[int, str] | None = None  # (step, path) of the last one written
    killing: bool = False  # deaths by SIGKILL from here on are our own doing
    culprit: int = -1  # the rank for which the others were ended

    def failures(self) -> list[tuple[bool, float, int]]:
        """(is a consequence, when, rank) of everything that went wrong, the first cause first."""
        found = []
        for rank, event in self.errors.items():
            found.append((is_consequence(event.content), event.time, rank))
        for rank, end in self.exits.items():
            if rank in self.errors or end.code == 0 or (end.code == Interrupted.exit_code and not end.lost):
                continue
            found.append((False, end.time, rank))
        return sorted(found)


def supervise(
    ranks: Ranks,
    *,
    run_directory: Path,
    script: Path,
    resumed: bool = False,
    on_event: OnEvent,
    on_output: OnOutput,
    requests: StopRequests | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Watch `ranks` to their end; returns if all ended well, raises like `launch` otherwise.

    When one fails, the others get SIGTERM and, GRACE_SECONDS later, SIGKILL. An error that looks like a consequence
    ("connection closed by peer") first waits SETTLE_SECONDS for the cause, so that the rank to blame is blamed.
    """
    if requests is None:
        with stop_requests() as requests:
            supervise(
                ranks,
                run_directory=run_directory,
                script=script,
                resumed=resumed,
                on_event=on_event,
                on_output=on_output,
                requests=requests,
                clock=clock,
            )
        return
    oom_before = _oom_kills()
    watch = _Watch()
    stop_at = kill_at = give_up_at = None  # moments of time.monotonic()
    first_sign = None
    aborting = False
    with _Logs(run_directory / "logs", append=resumed, on_output=on_output) as logs:
        while ranks.running():
            for occurrence in ranks.poll(0.1):
                _note(occurrence, watch, logs, on_event, on_output)
            now = clock()
            failures = watch.failures()
            if failures and not aborting and kill_at is None:
                unprepared = stop_at is not None and all(
                    consequence or watch.exits[rank].code == -signal.SIGTERM if rank in watch.exits else consequence
                    for consequence, _, rank in failures
                )
                first_sign = first_sign or now
                if unprepared:
                    stop_at = min(stop_at or now, first_sign + UNPREPARED_SECONDS)
                elif not failures[0][0] or now > first_sign + SETTLE_SECONDS:
                    aborting = True
                    watch.culprit = failures[0][2]
                    ranks.signal(signal.SIGTERM)
                    kill_at = now + GRACE_SECONDS
            asked = requests.count or any(end.code == Interrupted.exit_code for end in watch.exits.values())
            if asked and not aborting and stop_at is None:
                stop_at = now + STOP_SECONDS
                if watch.stopped is None:  # else they have agreed already, and a second signal would end them at once
                    ranks.signal(signal.SIGTERM)
            if give_up_at is None and (
                requests.count > 1 or (kill_at is not None and now > kill_at) or (stop_at is not None and now > stop_at)
            ):
                ranks.kill()
                watch.killing = True
                give_up_at = now + KILL_SECONDS
            if give_up_at is not None and now > give_up_at:
                for rank in ranks.running():
                    watch.exits[rank] = Exit(rank, 1, time.time(), lost=_UNREACHABLE)
                break
    _judge(watch, ranks, run_directory, script, stopping=stop_at is not None, oom_kills=_oom_kills() - oom_before)


def _note(occurrence: Occurrence, watch: _Watch, logs: _Logs, on_event: OnEvent, on_output: OnOutput) -> None:
    rank = occurrence.rank
    if isinstance(occurrence, Output):
        logs.write(rank, occurrence.line)
        if occurrence.stream == "stderr":
            watch.tails.setdefault(rank, deque(maxlen=_TAIL_LINES)).append(occurrence.line)
        on_output(rank, occurrence.stream, occurrence.line)
    elif isinstance(occurrence, Exit):
        # A death by the signal that we sent is no failure of the rank's own.
        ours = watch.killing and occurrence.code == -signal.SIGKILL and not occurrence.lost
        watch.exits[rank] = Exit(rank, 0, occurrence.time) if ours else occurrence
    else:
        content = {**occurrence.content, "rank": rank}
        kind = content["event"]
        if kind == "error":
            watch.errors.setdefault(rank, occurrence)
        elif kind == "checkpoint":
            watch.checkpoint = (int(content.get("step", 0)), str(content.get("path", "")))
        elif kind == "stopped":
            watch.stopped = int(content.get("step", 0))
        on_event(content)


def _judge(watch: _Watch, ranks: Ranks, run_directory: Path, script: Path, *, stopping: bool, oom_kills: int) -> None:
    """Raise what the end of the run means; nothing if it was a good one."""
    failures = watch.failures()
    if stopping:
        # What a stop brought about is not a failure: SIGTERM before the rank could handle it, and what followed.
        failures = [
            (consequence, moment, rank)
            for consequence, moment, rank in failures
            if not consequence and not (rank in watch.exits and watch.exits[rank].code == -signal.SIGTERM)
        ]
    again = f"go on with: headway run --resume {run_directory}"
    if failures:
        culprit = failures[0][2]
        if watch.culprit >= 0:
            # What came after we ended the ranks explains nothing, except that a machine was found to be gone.
            lost = [rank for rank, end in watch.exits.items() if end.lost]
            culprit = watch.culprit
            if lost and culprit in watch.errors and is_consequence(watch.errors[culprit].content):
                culprit = lost[0]
        raise _failure(culprit, watch, ranks, run_directory, again if watch.checkpoint else "", oom_kills)
    if not stopping:
        return
    if watch.stopped is not None:
        where = f"; the checkpoint is in {watch.checkpoint[1]}" if watch.checkpoint else ""
        raise Interrupted(f"stopped after step {watch.stopped}{where}", place=str(run_directory), remedy=again)
    if watch.checkpoint:
        raise Interrupted(
            f"killed; the last checkpoint is that of step {watch.checkpoint[0]}, in {watch.checkpoint[1]}",
            place=str(run_directory),
            remedy=again,
        )
    raise Interrupted("stopped before there was anything to save", place=str(run_directory))


def _failure(rank: int, watch: _Watch, ranks: Ranks, run_directory: Path, again: str, oom_kills: int) -> HeadwayError:
    log = run_directory / "logs" / f"rank-{rank}.log"
    machine = ranks.where(rank)
    name = f"rank {rank} on {machine}" if machine else f"rank {rank}"
    event = watch.errors.get(rank)
    end = watch.exits.get(rank)
    failed = RankFailedError
    if event is not None:
        content = event.content
        place, remedy = str(content.get("place") or log), str(content.get("remedy") or "")
        kind = _own_error(content)
        if kind is not None:
            return kind(f"{name}: {content.get('message', '')}", place=place, remedy=remedy or again)
        head = f"{name} {_verb(content)} {content.get('message', '')}"
        if is_consequence(content):
            failed = _RankDied
    else:
        assert end is not None
        if end.lost or end.code < 0:
            failed = _RankDied
        place, remedy = str(log), ""
        head = f"{name} {_how_it_ended(end, oom_kills)}"
        if oom_kills and end.code == -signal.SIGKILL:
            remedy = "use a plan that needs less memory: headway plan --goal memory"
    words = "".join(f"\n    {line}" for line in watch.tails.get(rank, ()))
    text = f"{head}\n  its last lines on stderr:{words}" if words else head
    return failed(f"{text}\n  its whole output: {log}", place=place, remedy=remedy or again)


def _how_it_ended(end: Exit, oom_kills: int) -> str:
    if end.lost:
        return f"was lost: {end.lost}"
    if end.code >= 0:
        return f"ended with exit code {end.code}"
    try:
        name = signal.Signals(-end.code).name
    except ValueError:
        name = f"signal {-end.code}"
    if end.code != -signal.SIGKILL:
        return f"was killed by {name}"
    return f"was killed by {name} ({'the machine ran out of memory' if oom_kills else 'out of memory?'})"


def _verb(content: dict) -> str:
    """What an `error` event says that the rank did: it raised an exception, or left by sys.exit."""
    return "ended with" if content.get("kind") == "SystemExit" else "raised"


def _own_error(content: dict) -> type[HeadwayError] | None:
    """The class in `headway.errors` that an `error` event names, if it is one."""
    kind = str(content.get("kind", ""))
    found = getattr(errors, kind, None) if kind in errors.__all__ else None
    return found if found is not Interrupted else None


def _oom_kills() -> int:
    """How many processes the kernel has killed since boot because memory ran out; 0 where it does not say."""
    try:
        text = Path("/proc/vmstat").read_text(encoding="ascii")
    except OSError:
        return 0  # not Linux: the message then asks "out of memory?" instead of knowing it
    found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(found.group(1)) if found else 0


def _existing(script: Path) -> Path:
    script = Path(script)
    if not script.is_file():
        raise FileError("no such script", place=str(script), remedy="give the path of a Python script")
    return script.resolve()


def _threads(plan: Plan, cluster: Cluster | None, rank: int) -> int:
    """CPU threads of a rank: those its device was probed with, else OMP_NUM_THREADS, else an equal share."""
    accelerator = accelerator_of(plan, cluster, rank)
    if accelerator is not None and accelerator.threads:
        return accelerator.threads
    wanted = environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    return max(1, len(sched_getaffinity(0)) // plan.world_size)


class _Logs:
    """One file for each rank with all that it printed. A full disk must not end the training: it is told once."""

    def __init__(self, folder: Path, *, append: bool, on_output: OnOutput) -> None:
        self._folder = folder
        self._mode = "a" if append else "w"
        self._on_output = on_output
        self._files: dict[int, IO[str] | None] = {}

    def __enter__(self) -> _Logs:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(
                f"the logs cannot be written: {error.strerror}",
                place=str(self._folder),
                remedy="free some space or choose another run directory",
            ) from error
        return self

    def write(self, rank: int, line: str) -> None:
        try:
            if rank not in self._files:
                self._files[rank] = None
                path = self._folder / f"rank-{rank}.log"
                self._files[rank] = path.open(self._mode, encoding="utf-8", buffering=1)
            file = self._files[rank]
            if file is not None:
                file.write(line + "\n")
        except OSError as error:
            self._give_up(rank, error)

    def _give_up(self, rank: int, error: OSError) -> None:
        file, self._files[rank] = self._files.get(rank), None
        self._on_output(rank, "stderr", f"headway: the log of rank {rank} ends here: {error.strerror}")
        if file is not None:
            _close_anyway(file)

    def __exit__(self, *exception) -> None:
        for rank, file in list(self._files.items()):
            if file is not None:
                try:
                    file.close()
                except OSError as error:
                    self._give_up(rank, error)


def _close_anyway(file: IO[str]) -> None:
    with suppress(OSError):  # what was buffered could not be written, which has just been reported
        file.close()
