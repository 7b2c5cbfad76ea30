"""Checkpoints in remote memory: they outlive ranks, are read under any plan, and reach the disk when the run ends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from headway.errors import (
    CheckpointError,
    DoesNotFitError,
    FieldError,
    InputError,
    Interrupted,
    RankFailedError,
    RunError,
)
from headway.memory.preflight import Available, check_here, checkpoint_bytes, needs_of
from headway.memory.remote_shared import SharedVerbs, is_supported, start_memory_node
from headway.memory.remote_store import RemoteStore
from headway.train import checkpoint
from headway.train.checkpoint import latest, load, load_full, save_in, step_of, write_out
from headway.train.launch import launch
from headway.train.newest_checkpoint import NewestCheckpoint
from headway.train.remote_checkpoint import PREFIX, Reader, RemoteCheckpoints
from headway.train.remote_memory import VARIABLE, RemoteMemory, memory_node, region_size
from headway.train.run import run as train

sys.path.insert(0, str(Path(__file__).parent))
from ranks import make_batch
from test_checkpoint import one_device
from test_remote_memory import plan_of, prepare, workload

pytestmark = pytest.mark.skipif(not is_supported(), reason="memory nodes need Linux")

STEPS = 8


class Run:
    """A launch, and what it told; `kill` takes a rank's process away once a checkpoint of `after` is there."""

    def __init__(self, folder: Path, kill: int | None = None, after: int = 0) -> None:
        self.folder, self._kill, self._after = folder, kill, after
        self.events: list[dict] = []
        self.on_disk_at_restart: list[str] = []
        self._saved = 0

    def start(self, fields: dict | None = None, *, steps: int = STEPS, pause: float = 0.0, **options) -> Run:
        plan = plan_of(**(fields or {}))
        given = {"checkpoint_every": 2, "checkpoint_on": "remote", **options}
        launch(
            prepare(self.folder, plan), [str(steps), str(pause)], plan, run_directory=self.folder / "run",
            workload_path=self.folder / "workload.json", plan_path=self.folder / "plan.json", cluster=None,
            on_event=self._event, on_output=self._output, **given,
        )  # fmt: skip
        return self

    def losses(self) -> dict[int, str]:
        """By step; of one that was made twice, the later."""
        return {event["step"]: event["loss"].hex() for event in self.events if event["event"] == "step"}

    def steps(self) -> list[int]:
        """In the order in which they were made; 0 for a restart."""
        kinds = ("step", "restart")
        return [event.get("step", 0) for event in self.events if event["event"] in kinds]

    def _event(self, event: dict) -> None:
        self.events.append(event)
        if event["event"] == "checkpoint":
            self._saved = event["step"]
        if event["event"] == "restart":
            self.on_disk_at_restart += [path.name for path in (self.folder / "run").glob("checkpoint/*")]

    def _output(self, rank: int, _stream: str, line: str) -> None:
        if self._kill == rank and line.startswith("loss") and self._saved >= self._after:
            self._kill = None
            os.kill(int(line.split()[-1]), signal.SIGKILL)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, RemoteCheckpoints]]:
    """A run to its end, and the memory node that it saved to, which is still there."""
    with memory_node(plan_of(), workload(), checkpoints=True) as variables:
        run = Run(tmp_path_factory.mktemp("whole")).start({"zero_stage": 2}, environment=variables)
        assert run.steps() == list(range(1, STEPS + 1))
        yield run, RemoteCheckpoints.attach(variables)


@pytest.mark.processes
def test_ranks_that_are_killed_go_on_from_remote_memory_as_if_they_had_not_been(tmp_path: Path, uninterrupted) -> None:
    run = Run(tmp_path, kill=1, after=4).start({"optimizer_on": "remote", "zero_stage": 2}, pause=0.05, restarts=1)
    steps = run.steps()
    assert steps.count(0) == 1
    assert run.on_disk_at_restart == []  # so it was not from there that they went on
    first = steps[steps.index(0) + 1]
    assert first in (5, 7)  # after the newest checkpoint, not from the beginning
    assert steps[steps.index(0) + 1 :] == list(range(first, STEPS + 1))
    assert run.losses() == uninterrupted[0].losses()
    # At the end it is on disk.
    assert step_of(latest(tmp_path / "run" / "checkpoint") or "") == STEPS


@pytest.mark.processes
def test_what_two_ranks_have_divided_one_reads_whole(uninterrupted) -> None:
    run, checkpoints = uninterrupted
    assert checkpoints.step == STEPS
    on_disk = load_full(latest(run.folder / "run" / "checkpoint") or "")
    whole = write_out(checkpoints, run.folder / "out")
    found = load_full(whole)
    assert found.keys() == on_disk.keys()
    assert len(found) == 8
    assert all(torch.equal(found[name], tensor) for name, tensor in on_disk.items())


@pytest.mark.processes
def test_without_a_restart_the_newest_is_brought_to_disk_and_can_be_resumed(tmp_path: Path) -> None:
    alone = {"data": 1, "micro_batch": 8, "devices": ("a",)}
    run = Run(tmp_path, kill=0, after=2)
    with pytest.raises(RankFailedError, match="rank 0 was killed by SIGKILL") as caught:
        run.start(alone, pause=0.05)
    assert "--resume" in caught.value.remedy
    path = latest(tmp_path / "run" / "checkpoint")
    assert path is not None
    step = step_of(path)
    assert step >= 2
    assert [event["path"] for event in run.events if event["event"] == "checkpoint"][-1] == str(path)
    rest = Run(tmp_path).start(alone, resume=tmp_path / "run", checkpoint_every=None, checkpoint_on="disk")
    assert rest.steps() == list(range(step + 1, STEPS + 1))
    both = {at: loss for at, loss in run.losses().items() if at in rest.losses()}
    assert both == {at: rest.losses()[at] for at in both}


@pytest.mark.processes
def test_ctrl_c_writes_to_disk(tmp_path: Path) -> None:
    class Stopped(Run):
        def _output(self, rank: int, stream: str, line: str) -> None:
            super()._output(rank, stream, line)
            if self._saved >= 2 and line.startswith("loss"):
                os.kill(int(line.split()[-1]), signal.SIGINT)

    run = Stopped(tmp_path)
    with pytest.raises(Interrupted, match="stopped after step"):
        run.start({"data": 1, "micro_batch": 8, "devices": ("a",)}, steps=1000, pause=0.05)
    path = latest(tmp_path / "run" / "checkpoint")
    assert path is not None
    assert step_of(path) == run.steps()[-1]


class LeftInRemoteMemory:
    """A memory node with a checkpoint of `step`, of a launch whose ranks have ended; `events` are the launcher's."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.events = folder, []
        self.node = start_memory_node(2**22)
        self.variables = {VARIABLE: RemoteMemory(node=self.node.address, slots=256).to_json()}
        self.checkpoints = RemoteCheckpoints.attach(self.variables)
        save_in(self.checkpoints, one_device(), step=step)

    def newest(self, **options) -> NewestCheckpoint:
        return NewestCheckpoint(self.variables, self.folder, self.events.append, **options)

    @property
    def on_disk(self) -> int | None:
        path = latest(self.folder / "checkpoint")
        return None if path is None else step_of(path)


@pytest.fixture
def left(tmp_path: Path) -> Iterator[LeftInRemoteMemory]:
    found = LeftInRemoteMemory(tmp_path, 20)
    with found.node:
        yield found


def test_a_script_that_ends_well_without_finishing_its_session_loses_no_checkpoint(left: LeftInRemoteMemory) -> None:
    with left.newest():
        pass
    assert left.on_disk == 20
    assert [event["path"] for event in left.events] == [str(left.folder / "checkpoint" / "step-20")]


def test_a_checkpoint_that_the_script_put_elsewhere_is_none_that_the_run_can_be_resumed_from(
    left: LeftInRemoteMemory,
) -> None:
    with left.newest() as newest:
        newest.on_event({"event": "checkpoint", "step": 25, "path": str(left.folder / "elsewhere" / "step-25")})
        assert newest.variables() == {"HEADWAY_RESUME": str(left.folder / "elsewhere" / "step-25")}
    assert left.on_disk == 20


def test_what_is_in_the_run_folder_already_is_not_brought_again(left: LeftInRemoteMemory) -> None:
    with left.newest() as newest:
        newest.on_event({"event": "checkpoint", "step": 25, "path": str(left.folder / "checkpoint" / "step-25")})
    assert left.on_disk is None


def test_what_goes_wrong_with_the_newest_checkpoint_does_not_hide_why_the_run_ended(
    left: LeftInRemoteMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    read = Reader.read_data

    def gone(*given):
        nonlocal calls
        calls += 1
        if calls % 2 == 0:  # after the numbers, when the folder has been begun
            raise RunError("the memory node is gone")
        return read(*given)

    monkeypatch.setattr(Reader, "read_data", gone)
    with pytest.raises(RankFailedError, match="rank 1 was killed") as caught, left.newest():
        raise RankFailedError("rank 1 was killed")
    assert "the memory node is gone" in caught.value.__notes__[0]
    # Nothing else to tell of: then this is the error.
    with pytest.raises(CheckpointError, match="the memory node is gone"), left.newest():
        pass
    assert list((left.folder / "checkpoint").iterdir()) == []


def test_asked_twice_to_stop_the_launcher_lets_the_newest_checkpoint_be(
    left: LeftInRemoteMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0
    read = Reader.read_data

    def impatient(*given):
        nonlocal asked
        asked += 1
        return read(*given)

    monkeypatch.setattr(Reader, "read_data", impatient)
    with pytest.raises(Interrupted, match="before the newest checkpoint"), left.newest(requests=lambda: asked):
        pass
    assert asked == 2
    assert list((left.folder / "checkpoint").iterdir()) == []


def test_bringing_a_checkpoint_to_disk_looks_once_where_everything_is(
    left: LeftInRemoteMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    metadata = RemoteCheckpoints.latest
    open_store = RemoteCheckpoints.open
    monkeypatch.setattr(RemoteCheckpoints, "open", lambda self: opened.append("store") or open_store(self))
    monkeypatch.setattr(
        RemoteCheckpoints, "latest", lambda self, store=None: opened.append("latest") or metadata(self, store)
    )
    path = write_out(left.checkpoints, left.folder)
    assert len(load_full(path)) > 4
    assert opened == ["store", "latest"]
    opened.clear()
    load(left.checkpoints, one_device(steps=0))
    assert opened == ["store", "latest"]


def test_a_rank_that_dies_while_the_others_save_is_blamed_and_not_the_checkpoint(
    checkpoints: RemoteCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:41234")

    trained = one_device()
    monkeypatch.setattr(checkpoint, "_write", lost)
    with pytest.raises(RuntimeError, match="closed by peer"):
        save_in(checkpoints, trained, step=1)
    with pytest.raises(RuntimeError, match="closed by peer"):
        checkpoint.save(tmp_path, trained, step=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "ray", "checkpoint_every": 2, "checkpoint_on": "remote"}, "ranks on this machine"),
        ({"engine": "ray", "restarts": 1}, "ranks on this machine"),
        ({"checkpoint_on": "remote"}, "no checkpoint would go to remote memory"),
    ],
)
def test_options_that_cannot_go_together_are_refused_before_anything_begins(tmp_path: Path, options, message) -> None:
    with pytest.raises(InputError, match=message) as caught:
        train("train.py", watcher=None, root=tmp_path / "runs", **options)  # type: ignore[arg-type]
    assert caught.value.remedy
    assert not (tmp_path / "runs").exists()
    with pytest.raises(InputError, match=message):
        Run(tmp_path).start(**{"checkpoint_every": None, "checkpoint_on": "disk", **options})


@pytest.fixture
def checkpoints() -> Iterator[RemoteCheckpoints]:
    with start_memory_node(2**22) as node:
        yield of_node(node)


def of_node(node) -> RemoteCheckpoints:
    return RemoteCheckpoints(RemoteStore(SharedVerbs([node.address]), node.address.region_bytes, prefix=PREFIX))


def names(checkpoints: RemoteCheckpoints) -> set[str]:
    return {name.partition("/")[0] for name in checkpoints._region.names()}


def test_what_is_loaded_goes_on_bit_for_bit(checkpoints: RemoteCheckpoints) -> None:
    assert checkpoints.step is None
    trained = one_device(steps=2)
    save_in(checkpoints, trained, step=2)
    assert (checkpoints.step, step_of(checkpoints)) == (2, 2)
    again = one_device(steps=0)
    assert load(checkpoints, again) == 2
    for step in (2, 3):
        batch = [make_batch("mlp", 2, step)] * 4
        assert torch.equal(trained.step(batch), again.step(batch))  # type: ignore[arg-type]


def test_the_region_holds_no_more_than_the_newest_however_many_there_were(checkpoints: RemoteCheckpoints) -> None:
    trained = one_device()
    save_in(checkpoints, trained, step=1)
    taken = checkpoints._region.used_bytes
    for step in range(2, 6):
        save_in(checkpoints, trained, step=step)
        assert checkpoints._region.used_bytes == taken
    assert names(checkpoints) == {"5", "latest"}


def test_one_that_was_not_written_to_its_end_does_not_exist(
    checkpoints: RemoteCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = one_device()
    save_in(checkpoints, trained, step=1)
    with monkeypatch.context() as patch:
        patch.setattr(RemoteCheckpoints, "commit", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        with pytest.raises(CheckpointError, match="killed"):
            save_in(checkpoints, trained, step=2)
    assert names(checkpoints) == {"1", "2", "latest"}
    assert checkpoints.step == 1
    assert load(checkpoints, one_device(steps=0)) == 1
    save_in(checkpoints, trained, step=3)
    assert names(checkpoints) == {"3", "latest"}


def test_a_region_that_is_too_small_says_so_and_keeps_what_it_has() -> None:
    with start_memory_node(130_000) as node:
        checkpoints = of_node(node)
        trained = one_device()
        save_in(checkpoints, trained, step=1)
        blocker = RemoteStore(SharedVerbs([node.address]), node.address.region_bytes)
        blocker.write("other", memoryview(bytes(8192)))
        with pytest.raises(CheckpointError, match=r"cannot be written.*gap") as caught:
            save_in(checkpoints, trained, step=2)
        assert "HEADWAY_REMOTE_BYTES" in caught.value.remedy
        assert load(checkpoints, one_device(steps=0)) == 1


def test_without_a_node_the_variable_is_refused() -> None:
    with pytest.raises(FieldError, match="no memory node"):
        RemoteCheckpoints.attach({})


def test_the_node_has_room_for_two_and_preflight_counts_it() -> None:
    plan = plan_of()
    one = checkpoint_bytes(workload())
    elements = 3 * (16 * 16 + 16) + 17
    assert one == elements * (4 + 8)
    assert region_size(plan, workload(), [0, 1], checkpoints=True)[0] >= 2 * one
    with memory_node(plan, workload(), checkpoints=True) as variables:
        assert VARIABLE in variables
        assert RemoteCheckpoints.attach(variables).step is None
    (without,), (needs,) = needs_of(plan, workload()), needs_of(plan, workload(), remote_checkpoints=True)
    assert needs.remote - without.remote == needs.checkpoints == 2 * one
    with pytest.raises(DoesNotFitError, match="host memory"):
        check_here(plan, workload(), available=Available(host=2 * one), remote_checkpoints=True)
    assert check_here(plan, workload(), available=Available(host=0.0))
