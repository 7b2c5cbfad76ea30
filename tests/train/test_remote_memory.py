"""Training with states in a passive memory node: real ranks, real nodes, real kills; losses as on the device."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from headway.errors import DoesNotFitError, FieldError, RankFailedError
from headway.memory.remote_shared import is_supported
from headway.plan.plan import Plan, Stage
from headway.train import remote_memory
from headway.train.infinity_homes import piece_bytes
from headway.train.launch import launch
from headway.train.remote_memory import VARIABLE, attach, memory_node, region_size
from headway.workload.graph import Workload
from headway.workload.trace import trace

pytestmark = pytest.mark.skipif(not is_supported(), reason="memory nodes need Linux")

SCRIPT = textwrap.dedent("""
    import os, sys, time
    import torch, headway
    from torch import nn

    torch.manual_seed(0)
    inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    dataset = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True).tanh())
    session = headway.start()
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    session.prepare(model, optimizer, loss=nn.functional.mse_loss)
    for number, batch in enumerate(session.shard(dataset, batch_size=8, steps=int(sys.argv[1]), seed=3)):
        loss = session.step(batch)
        print(f"loss {loss.hex()} of {session.rank} pid {os.getpid()}", flush=True)
        time.sleep(float(sys.argv[2]))
    session.finish()
""")


@cache
def workload() -> Workload:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)), nn.Linear(16, 1))
    graph = trace(model, torch.randn(2, 16), name="m", loss=nn.functional.mse_loss, target=torch.randn(2, 1))
    return Workload(graph=graph, global_batch=8)


def plan_of(**fields) -> Plan:
    layers = len(workload().graph.layers)
    given = {"data": 2, "micro_batch": 4, "stages": (Stage(start=0, stop=layers),), **fields}
    return Plan(model="m", global_batch=8, **{"devices": ("a", "b"), **given})


def prepare(folder: Path, plan: Plan) -> Path:
    script = folder / "train.py"
    script.write_text(SCRIPT)
    workload().save(folder / "workload.json")
    plan.save(folder / "plan.json")
    return script


def start(folder: Path, plan: Plan, steps: int = 4, pause: float = 0.0, on_output=None) -> list[str]:
    lines: list[str] = []

    def output(rank: int, _stream: str, line: str) -> None:
        lines.append(line)
        if on_output is not None:
            on_output(rank, line)

    launch(
        prepare(folder, plan), [str(steps), str(pause)], plan, run_directory=folder / "run",
        workload_path=folder / "workload.json", plan_path=folder / "plan.json", cluster=None,
        on_event=lambda event: None, on_output=output,
    )  # fmt: skip
    return [line for line in lines if line.startswith("loss")]


def losses(lines: list[str], rank: int = 0) -> list[str]:
    return [line.split()[1] for line in lines if f" of {rank} " in line]


def nodes_of(parent: int) -> list[int]:
    """Processes that are memory nodes and were started by `parent`."""
    found = []
    for children in Path(f"/proc/{parent}/task").glob("*/children"):
        try:
            found += [int(pid) for pid in children.read_text().split()]
        except OSError:
            continue
    return [pid for pid in found if b"passive_node" in _command(pid)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()  # empty for a zombie
    except OSError:
        return b""


def is_gone(pid: int, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def on_device(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return losses(start(tmp_path_factory.mktemp("device"), plan_of()))


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer_on": "remote"},
        {"optimizer_on": "remote", "parameters_on": "remote", "activations_on": "remote", "zero_stage": 3},
    ],
    ids=["optimizer", "everything"],
)
def test_ranks_whose_states_rest_in_remote_memory_learn_bit_for_bit_the_same(tmp_path, on_device, fields) -> None:
    seen: list[int] = []
    lines = start(tmp_path, plan_of(**fields), on_output=lambda *_: seen.extend(nodes_of(os.getpid())))
    assert losses(lines) == on_device
    assert len(on_device) == 4
    assert len(set(seen)) == 1  # one node for both ranks
    assert is_gone(seen[0])


def test_a_session_under_torchrun_starts_a_node_of_its_own(tmp_path, on_device) -> None:
    plan = plan_of(optimizer_on="remote")
    script = prepare(tmp_path, plan)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HEADWAY_")}
    # What torchrun sets, without torchrun: it is slow, and ends ranks in its own way.
    shared = {**kept, "HEADWAY_PLAN": str(tmp_path / "plan.json"), "HEADWAY_RUN_DIRECTORY": str(tmp_path),
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
              "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    with (tmp_path / "printed").open("w") as printed:
        ranks = [
            subprocess.Popen(
                [sys.executable, str(script), "4", "0"],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=printed if rank == 0 else subprocess.DEVNULL,
            )
            for rank in range(2)
        ]
    nodes: set[int] = set()
    while any(rank.poll() is None for rank in ranks):
        nodes |= {pid for rank in ranks for pid in nodes_of(rank.pid)}
        time.sleep(0.02)
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert losses((tmp_path / "printed").read_text().splitlines()) == on_device
    assert len(nodes) == 1
    assert all(is_gone(pid) for pid in nodes)


def test_a_killed_rank_takes_the_node_with_it_and_is_blamed(tmp_path) -> None:
    nodes: set[int] = set()

    def kill(rank: int, line: str) -> None:
        nodes.update(nodes_of(os.getpid()))
        if rank == 1 and line.startswith("loss") and line.split()[-1].isdigit():
            os.kill(int(line.split()[-1]), signal.SIGKILL)

    with pytest.raises(RankFailedError, match="rank 1 was killed by SIGKILL"):
        start(tmp_path, plan_of(optimizer_on="remote"), steps=1000, pause=0.05, on_output=kill)
    assert len(nodes) == 1
    assert is_gone(nodes.pop())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_no_node_survives_its_launcher(tmp_path, number: signal.Signals) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_remote_memory import plan_of, start
start(Path({str(tmp_path)!r}), plan_of(optimizer_on="remote"), 1000, 0.05, lambda rank, line: print(line, flush=True))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as launcher:
        assert launcher.stdout is not None
        line = next(line for line in launcher.stdout if line.startswith("loss"))
        (node,) = nodes_of(launcher.pid)
        launcher.send_signal(number)
        launcher.stdout.read()
    assert is_gone(node)
    assert is_gone(int(line.split()[-1]))


def test_a_plan_without_remote_memory_starts_no_node() -> None:
    with memory_node(plan_of(optimizer_on="host"), workload()) as variables:
        assert variables == {}
        assert not nodes_of(os.getpid())
    assert attach(plan_of(), 0, {}) is None


def test_the_region_has_room_for_what_the_ranks_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(optimizer_on="remote")
    elements = 3 * (16 * 16 + 16) + 17
    size, slots = region_size(plan, workload(), [0, 1])
    assert size >= 8 * elements + 256 * slots
    with memory_node(plan, workload()) as variables:
        one, other = (attach(plan, rank, variables) for rank in range(2))
        assert one is not None
        assert other is not None
        one.write("x", memoryview(b"1" * 64))
        other.write("x", memoryview(b"2" * 64))
        assert one.used_bytes == 128
        assert one.capacity_bytes >= 8 * elements
    monkeypatch.setenv("HEADWAY_REMOTE_BYTES", "1000000")
    assert region_size(plan, workload(), [0, 1])[0] == 1000000 + 256 * (slots + 2)
    monkeypatch.setenv("HEADWAY_REMOTE_BYTES", "a lot")
    with pytest.raises(FieldError, match="no number of bytes"):
        region_size(plan, workload(), [0])


def test_the_region_has_a_name_for_each_piece_however_small_the_buffers_make_them(monkeypatch) -> None:
    model = nn.Linear(1024, 1024)
    graph = trace(model, torch.randn(2, 1024), name="m", loss=nn.functional.mse_loss, target=torch.randn(2, 1024))
    monkeypatch.setenv("HEADWAY_BUFFER_BYTES", str(2**17))
    plan = Plan(
        model="m", global_batch=2, micro_batch=2, devices=("a",), parameters_on="remote", optimizer_on="host",
        stages=(Stage(start=0, stop=len(graph.layers)),),
    )  # fmt: skip
    _, slots = region_size(plan, Workload(graph=graph, global_batch=2), [0])
    assert slots >= 4 * 1024 * 1025 / piece_bytes(2**17, "remote")


def test_too_little_memory_for_the_node_names_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWAY_REMOTE_BYTES", str(2**50))
    with pytest.raises(DoesNotFitError, match="short") as caught:
        remote_memory._start(plan_of(optimizer_on="remote"), workload(), [0])
    assert caught.value.place == "plan: optimizer_on"
    assert VARIABLE not in os.environ
