"""The launcher: the policy in a simulated world, the engine with real processes, really killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import (
    CheckpointError,
    FileError,
    InputError,
    Interrupted,
    PlanError,
    RankFailedError,
    RunError,
    TraceError,
)
from headway.hardware.cluster import Accelerator, Cluster, Device
from headway.plan.plan import Plan, Stage, single_device_plan
from headway.train import launch as launching
from headway.train.launch import StopRequests, launch, supervise, trace_script
from headway.train.newest_checkpoint import NewestCheckpoint
from headway.train.processes import Event, Exit, Occurrence, Output
from headway.workload.graph import Graph, Workload

# --- the policy: simulated ranks, simulated time -------------------------------------------------------------------


@dataclass
class SimulatedRanks:
    """Ranks that do what a schedule says, on a clock that `poll` moves. Ends them as real ones would end."""

    count: int
    schedule: list[tuple[float, Occurrence]]
    deaf: frozenset[int] = frozenset()  # ranks that do not react to SIGTERM
    stops: frozenset[int] = frozenset()  # ranks that answer SIGTERM by `stopped` and exit code 130
    interrupts: tuple[float, ...] = ()  # when the user presses Ctrl-C
    requests: StopRequests = field(default_factory=StopRequests)
    now: float = 0.0
    left: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.schedule = sorted(self.schedule, key=lambda entry: entry[0])

    def running(self) -> tuple[int, ...]:
        return tuple(rank for rank in range(self.count) if rank not in self.left)

    def where(self, rank: int) -> str:
        return ""

    def poll(self, seconds: float) -> list[Occurrence]:
        self.now += seconds
        for _ in [moment for moment in self.interrupts if self.now - seconds < moment <= self.now]:
            self.requests.count += 1
        due = [entry for entry in self.schedule if entry[0] <= self.now]
        self.schedule = [entry for entry in self.schedule if entry[0] > self.now]
        found = []
        for _, occurrence in due:
            if occurrence.rank in self.left:
                continue
            found.append(occurrence)
            if isinstance(occurrence, Exit):
                self.left.add(occurrence.rank)
        return found

    def signal(self, number: int) -> None:
        for rank in self.running():
            if rank in self.stops:
                self._soon(rank, Event(rank, {"event": "checkpoint", "step": 7, "path": "step-7"}, self.now))
                self._soon(rank, Event(rank, {"event": "stopped", "step": 7}, self.now))
                self._soon(rank, Exit(rank, 130, self.now))
            elif rank not in self.deaf:
                self._soon(rank, Exit(rank, -number, self.now))

    def kill(self) -> None:
        for rank in self.running():
            self._soon(rank, Exit(rank, -signal.SIGKILL, self.now))

    def _soon(self, rank: int, occurrence: Occurrence) -> None:
        self.schedule.append((self.now + 0.05, occurrence))

    def watch(self, folder: Path) -> None:
        supervise(
            self,
            run_directory=folder,
            script=Path("train.py"),
            on_event=lambda event: None,
            on_output=lambda rank, stream, line: None,
            requests=self.requests,
            clock=lambda: self.now,
        )


def failing(rank: int, moment: float, kind: str, message: str, **fields) -> tuple[float, Occurrence]:
    return moment, Event(rank, {"event": "error", "kind": kind, "message": message, **fields}, moment)


PEER_GONE = "RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:41234"


@settings(deadline=None, max_examples=150)
@given(
    count=st.integers(2, 6),
    culprit=st.integers(0, 5),
    cause=st.sampled_from(["raises", "is killed", "crashes", "exits"]),
    delays=st.lists(st.floats(0.0, 0.8), min_size=6, max_size=6),
    early=st.floats(-0.5, 0.1),
    deaf=st.frozensets(st.integers(0, 5)),
)
def test_the_rank_that_failed_first_is_blamed_and_all_end_soon(
    tmp_path_factory, count, culprit, cause, delays, early, deaf
):
    culprit %= count
    moment = 1.0
    causes = {
        "raises": failing(culprit, moment, "ValueError", "ValueError: boom"),
        "is killed": (moment, Exit(culprit, -signal.SIGKILL, moment)),
        "crashes": (moment, Exit(culprit, -signal.SIGSEGV, moment)),
        "exits": (moment, Exit(culprit, 3, moment)),
    }
    schedule = [causes[cause]]
    for rank in range(count):
        if rank != culprit:
            # The launcher may hear of the consequence even before the cause.
            schedule.append(failing(rank, moment + early + delays[rank], "RuntimeError", PEER_GONE))
    ranks = SimulatedRanks(count, schedule, deaf=deaf)
    with pytest.raises(RankFailedError, match=f"^.*rank {culprit} "):
        ranks.watch(tmp_path_factory.mktemp("run"))
    assert not ranks.running()
    assert ranks.now < moment + launching.SETTLE_SECONDS + launching.GRACE_SECONDS + 1.0


@settings(deadline=None, max_examples=100)
@given(
    count=st.integers(1, 5),
    pressed=st.floats(0.1, 3.0),
    again=st.one_of(st.none(), st.floats(0.2, 100.0)),
    stops=st.frozensets(st.integers(0, 4)),
    deaf=st.frozensets(st.integers(0, 4)),
)
def test_a_stop_always_ends_and_is_never_called_a_failure(tmp_path_factory, count, pressed, again, stops, deaf):
    interrupts = (pressed,) if again is None else (pressed, pressed + again)
    ranks = SimulatedRanks(count, [], deaf=deaf, stops=stops, interrupts=interrupts)
    with pytest.raises(Interrupted) as raised:
        ranks.watch(tmp_path_factory.mktemp("run"))
    assert not ranks.running()
    assert ranks.now < pressed + launching.STOP_SECONDS + 1.0
    if any(rank in stops for rank in range(count)):
        assert "step 7" in raised.value.message
        assert "--resume" in raised.value.remedy


def test_a_second_ctrl_c_ends_ranks_that_do_not_stop(tmp_path):
    ranks = SimulatedRanks(2, [], deaf=frozenset({0, 1}), interrupts=(1.0, 4.0))
    with pytest.raises(Interrupted):
        ranks.watch(tmp_path)
    assert ranks.now < 5.0


def test_a_checkpoint_that_fails_during_a_stop_is_reported(tmp_path):
    full = failing(1, 2.0, "CheckpointError", "no space left on the device", place="runs/x", remedy="free some space")
    ranks = SimulatedRanks(2, [full], deaf=frozenset({0, 1}), interrupts=(1.0,))
    with pytest.raises(CheckpointError, match="rank 1: no space left") as raised:
        ranks.watch(tmp_path)
    assert raised.value.remedy == "free some space"


def test_ranks_that_stop_by_themselves_are_a_stop(tmp_path):
    """A scheduler may send SIGTERM to one rank only; the ranks agree, and all end with 130."""
    schedule: list[tuple[float, Occurrence]] = [(1.0, Event(0, {"event": "stopped", "step": 3}, 1.0))]
    schedule += [(1.0 + rank / 10, Exit(rank, 130, 1.0)) for rank in range(3)]
    with pytest.raises(Interrupted, match="step 3"):
        SimulatedRanks(3, schedule).watch(tmp_path)


def test_a_lost_machine_is_blamed_before_those_who_missed_it(tmp_path):
    schedule = [failing(0, 1.0, "RuntimeError", PEER_GONE), (2.5, Exit(1, 1, 2.5, lost="the node died"))]
    with pytest.raises(RankFailedError, match="rank 1 was lost: the node died"):
        SimulatedRanks(2, schedule, deaf=frozenset({1, 0})).watch(tmp_path)


def test_a_rank_that_cannot_be_killed_is_named(tmp_path):
    class Unkillable(SimulatedRanks):
        def kill(self) -> None:
            self._soon(0, Exit(0, -signal.SIGKILL, self.now))

    ranks = Unkillable(2, [failing(0, 1.0, "RuntimeError", PEER_GONE)], deaf=frozenset({0, 1}))
    with pytest.raises(RankFailedError, match="rank 1 was lost: it does not end even when killed"):
        ranks.watch(tmp_path)
    assert ranks.now < 1.0 + launching.SETTLE_SECONDS + launching.GRACE_SECONDS + launching.KILL_SECONDS + 1.0


def test_network_errors_alone_are_reported_too(tmp_path):
    schedule = [failing(1, 1.0, "RuntimeError", PEER_GONE), failing(0, 1.1, "RuntimeError", PEER_GONE)]
    with pytest.raises(RankFailedError, match=r"rank 1 raised RuntimeError.*Connection closed by peer"):
        SimulatedRanks(2, schedule).watch(tmp_path)


def test_the_message_has_the_last_lines_and_names_the_log(tmp_path):
    lines: list[tuple[float, Occurrence]] = [(0.5, Output(1, "stderr", f"line {number}")) for number in range(30)]
    with pytest.raises(RankFailedError) as raised:
        SimulatedRanks(2, [*lines, (1.0, Exit(1, -signal.SIGBUS, 1.0))]).watch(tmp_path)
    text = str(raised.value)
    assert "rank 1 was killed by SIGBUS" in text
    assert "line 29" in text
    assert "line 5\n" not in text
    log = tmp_path / "logs" / "rank-1.log"
    assert str(log) in text
    assert log.read_text().splitlines() == [f"line {number}" for number in range(30)]


# --- the local engine: real processes ------------------------------------------------------------------------------


def plan_for(ranks: int) -> Plan:
    devices = tuple(f"device {rank}" for rank in range(ranks))
    return single_device_plan("model", 1, ranks, devices=devices, data=ranks, micro_batch=1)


@dataclass
class Run:
    """A script launched in a folder of its own, and what was seen of it."""

    folder: Path
    events: list[dict] = field(default_factory=list)
    output: list[tuple[int, str, str]] = field(default_factory=list)

    @property
    def directory(self) -> Path:
        return self.folder / "run"

    def write(self, script: str, name: str = "script.py") -> Path:
        path = self.folder / name
        path.write_text(textwrap.dedent(script))
        return path

    def launch(self, script: str, *arguments: str, ranks: int = 2, **options) -> None:
        path = self.write(script)
        plan = plan_for(ranks)
        plan.save(self.directory / "plan.json")
        (self.directory / "workload.json").write_text("{}")
        launch(
            path,
            arguments,
            plan,
            run_directory=self.directory,
            workload_path=self.directory / "workload.json",
            plan_path=self.directory / "plan.json",
            **{
                "cluster": None,
                "on_event": self.events.append,
                "on_output": lambda *line: self.output.append(line),
                **options,
            },
        )

    def lines(self, rank: int, stream: str = "stdout") -> list[str]:
        return [line for other, source, line in self.output if (other, source) == (rank, stream)]

    def pids(self) -> list[int]:
        """Processes that the ranks noted in files named pid-*."""
        return [int(path.read_text()) for path in self.folder.glob("pid-*")]


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


NOTE_PID = """
import os, pathlib, signal, subprocess, sys, time
folder = pathlib.Path(__file__).parent
rank = os.environ["RANK"]
def note(name, pid):
    (folder / f"new-{name}").write_text(str(pid))
    (folder / f"new-{name}").rename(folder / f"pid-{name}")
note(rank, os.getpid())
def together(count=2):
    while len(list(folder.glob("pid-*"))) < count:
        time.sleep(0.01)
"""


def is_alive(pid: int) -> bool:
    """Whether a process exists and is more than a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def wait_until(condition, seconds: float = 20.0, what: str = "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


@pytest.mark.processes
def test_ranks_get_their_place_and_the_script_is_main(run, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1234")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    run.write("value = 41", "beside.py")
    script = """
        import json, os, sys
        from beside import value
        class Item: pass
        import pickle
        assert type(pickle.loads(pickle.dumps(Item()))) is Item
        assert sys.modules["__main__"].Item is Item
        names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "HEADWAY_TASK", "COLOUR",
                 "HEADWAY_CHECKPOINT_EVERY", "GLOO_SOCKET_IFNAME", "MASTER_PORT"]
        print(json.dumps({name: os.environ.get(name) for name in names}))
        print(__name__, sys.argv[1:], value + 1)
        print("to stderr", file=sys.stderr)
        sys.stdout.write("no end of line")
    """
    run.launch(script, "--depth", "two words", environment={"COLOUR": "green"}, checkpoint_every=5)
    for rank in range(2):
        seen, main, last = run.lines(rank)
        assert json.loads(seen) == {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "2",
            "OMP_NUM_THREADS": "3",
            "HEADWAY_TASK": "train",
            "COLOUR": "green",
            "HEADWAY_CHECKPOINT_EVERY": "5",
            "GLOO_SOCKET_IFNAME": "lo",
            "MASTER_PORT": None,
        }
        assert main == "__main__ ['--depth', 'two words'] 42"
        assert last == "no end of line"
        assert run.lines(rank, "stderr") == ["to stderr"]
        log = (run.directory / "logs" / f"rank-{rank}.log").read_text().splitlines()
        assert sorted(log) == sorted([seen, main, last, "to stderr"])


@pytest.mark.processes
def test_events_carry_the_rank_and_threads_and_kind_are_those_of_the_device(run):
    kind = Accelerator(
        name="core",
        flop_per_second={"float32": 1e9},
        memory_bytes=1e9,
        memory_bytes_per_second=1e9,
        threads=2,
        torch_device="cpu",
    )
    devices = tuple(Device(name=f"device {rank}", accelerator="core", node="here") for rank in range(2))
    script = """
        import os
        from headway.train.events import emit
        emit("step", step=1, threads=os.environ["OMP_NUM_THREADS"], device=os.environ["HEADWAY_DEVICE"])
        os.write(int(os.environ["HEADWAY_EVENTS_FD"]), b"not an event\\n")
    """
    run.launch(script, cluster=Cluster(name="here", accelerators={"core": kind}, devices=devices))
    seen = sorted((event["event"], event["rank"], event["threads"], event["device"]) for event in run.events)
    assert seen == [("step", 0, "2", "cpu"), ("step", 1, "2", "cpu")]
    assert run.lines(0, "stderr") == ["headway: not an event: not an event"]


@pytest.mark.processes
def test_a_rank_that_raises_is_named_with_its_line_and_the_others_end(run):
    script = """
        if rank == "1":
            together(3)
            raise ValueError("boom")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        note("child", subprocess.Popen(["sleep", "100"]).pid)
        time.sleep(100)
    """
    started = time.monotonic()
    with pytest.raises(RankFailedError) as raised:
        run.launch(NOTE_PID + textwrap.dedent(script))
    assert time.monotonic() - started < 20
    assert "rank 1 raised ValueError: boom" in raised.value.message
    line = 1 + (NOTE_PID + textwrap.dedent(script)).splitlines().index('    raise ValueError("boom")')
    assert raised.value.place == f"{run.folder / 'script.py'}:{line}"
    assert "Traceback" in (run.directory / "logs" / "rank-1.log").read_text()
    (error,) = [event for event in run.events if event["event"] == "error"]
    assert (error["rank"], error["kind"]) == (1, "ValueError")
    assert "headway/train/worker.py" not in error["traceback"]
    # The kernel reaps what the rank had started a moment after the rank itself.
    wait_until(lambda: len(run.pids()) == 3 and not any(map(is_alive, run.pids())), 5, "ranks and their children gone")


@pytest.mark.processes
def test_a_killed_rank_is_started_again_and_one_that_raises_is_not(run):
    killed = """
        import os, pathlib, signal
        tried = pathlib.Path(__file__).parent / "tried"
        if not tried.exists():
            tried.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        """
    run.launch(killed, ranks=1, restarts=1)
    assert [event["attempt"] for event in run.events if event["event"] == "restart"] == [1]
    run.events.clear()
    with pytest.raises(RankFailedError, match="ValueError: boom"):
        run.launch("raise ValueError('boom')", ranks=1, restarts=3)
    assert not [event for event in run.events if event["event"] == "restart"]


@pytest.mark.processes
def test_a_lost_checkpoint_does_not_hide_which_rank_died(run, monkeypatch):
    def gone(_newest):
        raise RunError("the memory node is gone")

    monkeypatch.setattr(NewestCheckpoint, "variables", gone)
    with pytest.raises(RankFailedError, match="rank 0 was killed by SIGKILL") as caught:
        run.launch("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", ranks=1, restarts=1)
    assert "the memory node is gone" in caught.value.__notes__[0]


@pytest.mark.processes
def test_an_error_of_headway_keeps_its_kind_place_and_remedy(run):
    script = """
        from headway.errors import PlanError
        raise PlanError("stages overlap", place="plan: stages[1]", remedy="plan again")
    """
    with pytest.raises(PlanError) as raised:
        run.launch(script, ranks=1)
    assert raised.value.message == "rank 0: stages overlap"
    assert (raised.value.place, raised.value.remedy) == ("plan: stages[1]", "plan again")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("sys.exit('no data here')", "rank 0 ended with no data here"),
        ("sys.exit(7)", "rank 0 ended with sys.exit(7)"),
        ("os._exit(9)", "rank 0 ended with exit code 9"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "rank 0 was killed by SIGKILL (out of memory?)"),
        ("x = [] * (y := ", "rank 0: not a Python program: '(' was never closed"),
    ],
)
def test_every_way_to_end_badly_is_told(run, statement, message):
    with pytest.raises((RankFailedError, InputError)) as raised:
        run.launch(f"import os, signal, sys\n{statement}\n", ranks=1)
    assert message in raised.value.message


@pytest.mark.processes
def test_scripts_that_leave_in_peace_end_the_run_in_peace(run):
    run.launch("import sys\nsys.exit()", ranks=1)
    run.launch("import sys\nsys.exit(0)", ranks=1)


def test_a_missing_script_is_a_file_error(run):
    with pytest.raises(FileError, match="no such script"):
        launch(
            run.folder / "nowhere.py", [], plan_for(1), run_directory=run.directory, workload_path=Path("w"),
            plan_path=Path("p"), cluster=None, on_event=print, on_output=print,
        )  # fmt: skip


def test_resuming_from_where_nothing_is_says_so(run):
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        run.launch("", resume=run.folder)


@pytest.mark.processes
def test_threads_and_exit_functions_run_to_their_end(run):
    script = """
        import atexit, sys, threading, time
        atexit.register(lambda: sys.stdout.write("at exit"))
        threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
        print("script")
    """
    run.launch(script, ranks=1)
    assert run.lines(0) == ["script", "thread", "at exit"]


@pytest.mark.processes
def test_a_log_on_a_full_disk_does_not_end_the_training(run):
    logs = run.directory / "logs"
    logs.mkdir(parents=True)
    (logs / "rank-0.log").symlink_to("/dev/full")
    run.launch("print('one')\nprint('two')", ranks=1)
    assert run.lines(0) == ["one", "two"]
    assert run.lines(0, "stderr") == ["headway: the log of rank 0 ends here: No space left on device"]


@pytest.mark.processes
def test_output_without_ends_or_sense_is_passed_on(run):
    script = r"""
        import os
        os.write(1, b"\xff\xfe broken\r\n")
        os.write(1, b"x" * 300_000 + b"\nend\n")
    """
    run.launch(script, ranks=1)
    first, *long, end = run.lines(0)
    assert first == "\ufffd\ufffd broken"
    assert "".join(long) == "x" * 300_000
    assert end == "end"


@pytest.mark.processes
def test_an_exception_in_a_callback_leaves_no_process(run):
    def complain(rank, stream, line):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run.launch(NOTE_PID + "together()\nprint(1)\ntime.sleep(100)", on_output=complain)
    assert len(run.pids()) == 2
    for pid in run.pids():
        assert not is_alive(pid)


GLOO = """
import os, signal, sys, time
from datetime import timedelta
import torch
import torch.distributed as distributed
rank = int(os.environ["RANK"])
distributed.init_process_group(
    "gloo", init_method=os.environ["HEADWAY_INIT_METHOD"], rank=rank, world_size=int(os.environ["WORLD_SIZE"]),
    timeout=timedelta(seconds=60),
)
for step in range(int(sys.argv[1])):
    total = torch.tensor([float(rank + 1)])
    distributed.all_reduce(total)
    assert total.item() == 3.0
    if step == 3 and rank == 1 and sys.argv[2] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
print("reduced", step + 1)
distributed.destroy_process_group()
"""


@pytest.mark.processes
def test_ranks_meet_through_a_private_file(run):
    run.launch(GLOO, "3", "lives", environment={"OMP_NUM_THREADS": "1"})
    assert run.lines(0)[-1] == run.lines(1)[-1] == "reduced 3"


@pytest.mark.processes
def test_the_killed_rank_is_blamed_and_not_those_that_lost_it(run):
    with pytest.raises(RankFailedError, match="rank 1 was killed by SIGKILL"):
        run.launch(GLOO, "100000", "dies", environment={"OMP_NUM_THREADS": "1"})


# --- the launcher itself is interrupted or killed ------------------------------------------------------------------

LAUNCHER = """
import sys
from pathlib import Path
from headway.errors import HeadwayError
from headway.plan.plan import Plan
from headway.train.launch import launch
script, run = Path(sys.argv[1]), Path(sys.argv[2])
try:
    launch(script, [], Plan.load(run / "plan.json"), run_directory=run, workload_path=run / "workload.json",
           plan_path=run / "plan.json", cluster=None, on_event=lambda event: print(event, flush=True),
           on_output=lambda rank, stream, line: print(rank, stream, line, flush=True))
except HeadwayError as error:
    print(type(error).__name__, error)
    sys.exit(error.exit_code)
"""


@dataclass
class Launcher:
    """A launcher in a process of its own, so that it can be killed."""

    run: Run
    process: subprocess.Popen

    @classmethod
    def start(cls, run: Run, script: str, ranks: int = 2) -> Launcher:
        path = run.write(NOTE_PID + textwrap.dedent(script))
        plan_for(ranks).save(run.directory / "plan.json")
        (run.directory / "workload.json").write_text("{}")
        command = [sys.executable, "-c", LAUNCHER, str(path), str(run.directory)]
        environment = {**os.environ, "TMPDIR": str(run.folder)}  # what a killed launcher leaves there goes with it
        return cls(
            run, subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment)
        )

    def ready(self, count: int) -> None:
        wait_until(lambda: len(self.run.pids()) >= count or self.process.poll() is not None, what="ranks at work")
        assert self.process.poll() is None

    def ends(self) -> tuple[int, str]:
        try:
            output, _ = self.process.communicate(timeout=30)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.communicate()
        return self.process.returncode, output


@pytest.mark.processes
def test_no_rank_survives_a_killed_launcher(run):
    launcher = Launcher.start(run, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(100)", ranks=3)
    launcher.ready(3)
    launcher.process.kill()
    launcher.ends()
    wait_until(lambda: not any(map(is_alive, run.pids())), 5, "ranks gone")


STOPS = """
    from headway.train.events import emit
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    note("ready-" + rank, os.getpid())
    while not stop:
        time.sleep(0.01)
    if rank == "0":
        emit("checkpoint", step=12, path="run/checkpoint/step-12")
        emit("stopped", step=12)
    sys.exit(130)
"""


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_lets_the_ranks_save(run, number):
    launcher = Launcher.start(run, STOPS)
    launcher.ready(4)
    launcher.process.send_signal(number)
    code, output = launcher.ends()
    assert code == 130
    assert "Interrupted" in output
    assert "stopped after step 12; the checkpoint is in run/checkpoint/step-12" in output
    assert f"--resume {run.directory}" in output
    assert not any(map(is_alive, run.pids()))


@pytest.mark.processes
def test_a_second_ctrl_c_kills(run):
    script = """
        signal.signal(signal.SIGTERM, lambda *_: note("asked-" + rank, os.getpid()))
        note("ready-" + rank, os.getpid())
        while True:
            time.sleep(0.1)
    """
    launcher = Launcher.start(run, script)
    launcher.ready(4)
    launcher.process.send_signal(signal.SIGINT)
    launcher.ready(6)  # the ranks were asked, and have not ended
    time.sleep(0.6)
    launcher.process.send_signal(signal.SIGINT)
    code, output = launcher.ends()
    assert (code, "stopped before there was anything to save" in output) == (130, True)
    assert not any(map(is_alive, run.pids()))


# --- tracing -------------------------------------------------------------------------------------------------------

EMPTY = Workload(graph=Graph(name="empty", operators=(), layers=(), parameters=(), units=(), inputs=()))


def trace(run: Run, script: str) -> Workload:
    path = run.write(script)
    return trace_script(path, ["--layers", "2"], run.folder / "workload.json", lambda *line: run.output.append(line))


@pytest.mark.processes
def test_a_traced_workload_comes_back(run):
    EMPTY.save(run.folder / "given.json")
    script = """
        import os, pathlib, sys
        assert os.environ["HEADWAY_TASK"] == "trace" and "RANK" not in os.environ
        given = pathlib.Path(__file__).with_name("given.json").read_text()
        pathlib.Path(os.environ["HEADWAY_TRACE_OUTPUT"]).write_text(given)
        print("tracing", *sys.argv[1:])
        sys.exit(0)
    """
    assert trace(run, script) == EMPTY
    assert run.lines(0) == ["tracing --layers 2"]


@pytest.mark.processes
def test_a_script_without_a_step_is_a_trace_error(run):
    (run.folder / "workload.json").write_text("from another time")
    with pytest.raises(TraceError, match="without ever taking a step") as raised:
        trace(run, "print('nothing')")
    assert "session.step" in raised.value.remedy


@pytest.mark.processes
@pytest.mark.parametrize(
    ("script", "kind", "place", "message"),
    [
        ("x = 1\nnowhere()\n", InputError, "script.py:2", "NameError"),
        ("def f(:\n", InputError, "script.py:1", "not a Python program"),
        (
            "import headway.errors as e\n\nraise e.TraceError('cannot', remedy='do')",
            TraceError,
            "script.py:3",
            "cannot",
        ),
        ("import os\nos.abort()\n", InputError, "script.py", "was killed by SIGABRT"),
        ("import sys\nsys.exit('no data')\n", InputError, "script.py:2", "no data"),
    ],
)
def test_errors_of_a_traced_script_have_place_and_remedy(run, script, kind, place, message):
    with pytest.raises(kind, match=message) as raised:
        trace(run, script)
    assert raised.value.place.endswith(place)
    assert raised.value.remedy


def test_tracing_a_missing_script_is_a_file_error(run):
    with pytest.raises(FileError):
        trace_script(run.folder / "nowhere.py", [], run.folder / "workload.json", print)


# --- a real session, started in every way that there is ------------------------------------------------------------

SESSION = """
import os
import torch
from torch import nn
import headway

steps = int(os.environ.get("STEPS", "6"))
session = headway.start()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
model, optimizer = session.prepare(model, optimizer, loss=nn.functional.mse_loss)
generator = torch.Generator().manual_seed(1)
x, y = torch.randn(64, 8, generator=generator), torch.randn(64, 1, generator=generator)
for batch in session.shard(torch.utils.data.TensorDataset(x, y), batch_size=8, steps=steps, seed=3):
    loss = session.step(batch)
    if session.rank == 0:
        print("loss", session.steps_done, f"{loss:.7f}", flush=True)
session.finish()
"""


def losses(lines: list[str]) -> dict[int, float]:
    return {int(line.split()[1]): float(line.split()[2]) for line in lines if line.startswith("loss ")}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[int, float]:
    """The losses of the script under plain `python`."""
    script = tmp_path_factory.mktemp("plain") / "script.py"
    script.write_text(SESSION)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=100, env={**os.environ, "STEPS": "20"}
    )
    assert done.returncode == 0, done.stderr
    return losses(done.stdout.splitlines())


@pytest.mark.processes
def test_traced_launched_stopped_and_resumed_a_script_learns_what_it_learns_alone(run, plain):
    path = run.write(SESSION)
    workload = trace_script(path, [], run.directory / "workload.json", lambda *line: run.output.append(line))
    assert (workload.global_batch, len(run.output)) == (8, 0)
    plan = Plan(
        model=workload.graph.name,
        devices=("device 0", "device 1"),
        global_batch=8,
        micro_batch=4,
        data=2,
        stages=(Stage(start=0, stop=len(workload.graph.layers)),),
    )
    plan.save(run.directory / "plan.json")

    def stop(event: dict) -> None:
        run.events.append(event)
        if event["event"] == "step" and event["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    def start(steps: int, on_event, resume: Path | None) -> None:
        launch(
            path,
            [],
            plan,
            run_directory=run.directory,
            workload_path=run.directory / "workload.json",
            plan_path=run.directory / "plan.json",
            cluster=None,
            resume=resume,
            on_event=on_event,
            on_output=lambda *line: run.output.append(line),
            environment={"STEPS": str(steps), "OMP_NUM_THREADS": "1"},
        )

    with pytest.raises(Interrupted) as raised:
        start(100_000, stop, None)
    stopped = next(event["step"] for event in run.events if event["event"] == "stopped")
    assert f"stopped after step {stopped}; the checkpoint is in " in raised.value.message
    start(stopped + 5, run.events.append, run.directory)
    found = {event["step"]: event["loss"] for event in run.events if event["event"] == "step"}
    assert list(found) == list(range(1, stopped + 6))
    assert losses(run.lines(0)).keys() == found.keys() - {stopped}
    for step in set(found) & set(plain):
        assert found[step] == pytest.approx(plain[step], rel=1e-4)
    assert run.events[-1]["event"] == "done"


@pytest.mark.processes
def test_torchrun_starts_a_session(run, plain):
    path = run.write(SESSION)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
         "--master-port", str(free_port()), str(path)],
        capture_output=True, text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = losses(done.stdout.splitlines())
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert list(found.values()) == pytest.approx([plain[step] for step in found], rel=1e-4)


@pytest.mark.processes
def test_slurm_variables_start_a_session(run, plain):
    path = run.write(SESSION)
    port = str(free_port())
    tasks = []
    for rank in range(2):
        slurm = {
            "SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_LOCALID": str(rank), "SLURM_STEP_ID": "0",
            "SLURM_JOB_ID": "7", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        tasks.append(
            subprocess.Popen(
                [sys.executable, str(path)], stdout=subprocess.PIPE, text=True, env={**os.environ, **slurm}
            )
        )
    try:
        output = [task.communicate(timeout=100)[0] for task in tasks]
    finally:
        for task in tasks:
            task.kill()
            task.wait()
    assert [task.returncode for task in tasks] == [0, 0]
    found = losses(output[0].splitlines())
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert list(found.values()) == pytest.approx([plain[step] for step in found], rel=1e-4)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
