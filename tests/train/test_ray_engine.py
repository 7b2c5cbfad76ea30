"""The Ray engine on a real Ray cluster of three nodes on this machine, each with its own loopback address."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.errors import InputError, Interrupted, MissingExtraError, RankFailedError
from headway.hardware.cluster import Accelerator, Cluster, Device
from headway.plan.plan import Plan, Stage, single_device_plan
from headway.train import ray_engine
from headway.train.launch import launch, trace_script

pytestmark = [
    pytest.mark.processes,
    # Ray leaves log files and sockets of its daemons to the garbage collector, and warns of its own future defaults.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO.*:FutureWarning"),
]


def plan_for(data: int = 1, tensor: int = 1) -> Plan:
    ranks = data * tensor
    devices = tuple(f"device {rank}" for rank in range(ranks))
    sharding = {"linear": "column"} if tensor > 1 else {}
    return single_device_plan(
        "model", 1, data, devices=devices, data=data, tensor=tensor, micro_batch=1, tensor_sharding=sharding
    )


@pytest.fixture(scope="module")
def nodes():
    """Three nodes: two CPUs at 127.0.0.2, one each at 127.0.0.3 and 127.0.0.4; calling it takes the last away."""
    pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster as Machines

    if sys.platform != "linux":
        pytest.skip("only Linux gives loopback more than one address")
    small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    before = signal.getsignal(signal.SIGTERM)
    machines = Machines(initialize_head=True, head_node_args={"num_cpus": 2, "node_ip_address": "127.0.0.2", **small})
    try:
        machines.add_node(num_cpus=1, node_ip_address="127.0.0.3", object_store_memory=80 * 2**20)
        doomed = machines.add_node(num_cpus=1, node_ip_address="127.0.0.4", object_store_memory=80 * 2**20)
        ray.init(address=machines.address, log_to_driver=False, logging_level=logging.ERROR)
        yield lambda: machines.remove_node(doomed, allow_graceful=False)
    finally:
        ray.shutdown()
        machines.shutdown()
        signal.signal(signal.SIGTERM, before)


@dataclass
class Run:
    folder: Path
    events: list[dict] = field(default_factory=list)
    output: list[tuple[int, str, str]] = field(default_factory=list)
    on_line: dict[str, object] = field(default_factory=dict)

    def launch(self, script: str, plan: Plan, *arguments: str, cluster: Cluster | None = None) -> None:
        path = self.folder / "script.py"
        path.write_text(textwrap.dedent(script))
        directory = self.folder / "run"
        plan.save(directory / "plan.json")
        (directory / "workload.json").write_text('{"is": "the workload"}')
        launch(
            path,
            arguments,
            plan,
            run_directory=directory,
            workload_path=directory / "workload.json",
            plan_path=directory / "plan.json",
            cluster=cluster,
            engine="ray",
            on_event=self.events.append,
            on_output=self.note,
            environment={"COLOUR": "green"},
        )

    def note(self, rank: int, stream: str, line: str) -> None:
        self.output.append((rank, stream, line))
        action = self.on_line.pop(line, None)
        if callable(action):
            action()

    def said(self, word: str) -> list[list[str]]:
        """What the ranks printed after `word`, in the order of ranks."""
        return [line.split()[1:] for _, _, line in sorted(self.output) if line.startswith(word + " ")]


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


REPORT = """
import os, signal, sys, time

rank = os.environ["RANK"]
print("pid", os.getpid(), flush=True)
names = ["MASTER_ADDR", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GLOO_SOCKET_IFNAME", "COLOUR"]
print("is", *[os.environ[name] for name in names], flush=True)
"""

TRAINS = """
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as distributed
from headway.plan.plan import Plan
from headway.train.events import emit
assert Plan.load(os.environ["HEADWAY_PLAN"]).world_size == int(os.environ["WORLD_SIZE"])
assert Path(os.environ["HEADWAY_WORKLOAD"]).read_text() == '{"is": "the workload"}'
assert os.environ["HEADWAY_INIT_METHOD"] == "env://"
distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
for step in range(int(sys.argv[1])):
    total = torch.tensor([2.0 ** int(rank)])
    distributed.all_reduce(total)
    if rank == "0":
        emit("step", step=step, loss=total.item())
    if step == 5:
        print("at step", step, flush=True)
distributed.destroy_process_group()
"""


def test_ranks_meet_and_stream_their_events_and_lines(nodes, run):
    run.launch(REPORT + TRAINS, plan_for(data=2, tensor=1), "8")
    assert [event["loss"] for event in run.events] == [3.0] * 8
    assert {event["rank"] for event in run.events} == {0}
    assert (run.folder / "run" / "logs" / "rank-1.log").read_text().splitlines()[-1] == "at step 5"
    assert not list((run.folder / "run").glob(".headway-*"))


SESSION = """
import torch
from torch import nn
import headway

session = headway.start()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
model, optimizer = session.prepare(model, optimizer, loss=nn.functional.mse_loss)
x, y = torch.randn(64, 8), torch.randn(64, 1)
for batch in session.shard(torch.utils.data.TensorDataset(x, y), batch_size=12, steps=4, seed=3):
    session.step(batch)
session.finish()
"""


def test_the_same_script_and_plan_train_here_and_across_nodes(nodes, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SESSION)
    workload = trace_script(script, [], tmp_path / "workload.json", lambda *line: None)
    plan = Plan(
        model=workload.graph.name,
        devices=("device 0", "device 1", "device 2"),
        global_batch=12,
        micro_batch=2,
        data=3,
        zero_stage=1,
        stages=(Stage(start=0, stop=len(workload.graph.layers)),),
    )
    plan.save(tmp_path / "plan.json")
    losses: dict[str, list[float]] = {"local": [], "ray": []}
    for engine, found in losses.items():
        launch(
            script,
            [],
            plan,
            run_directory=tmp_path / engine,
            workload_path=tmp_path / "workload.json",
            plan_path=tmp_path / "plan.json",
            cluster=None,
            engine=engine,  # type: ignore[arg-type]
            on_event=lambda event, found=found: found.append(event["loss"]) if event["event"] == "step" else None,
            on_output=lambda *line: None,
            environment={"OMP_NUM_THREADS": "1"},
        )
        assert (tmp_path / engine / "checkpoint" / "latest").read_text().strip() == "step-4"
    assert len(losses["ray"]) == 4
    assert losses["ray"] == pytest.approx(losses["local"], rel=1e-5)


def test_the_mesh_decides_who_shares_a_node(nodes, run):
    script = REPORT + 'print("node", os.environ["GROUP_RANK"], flush=True)'
    run.launch(script, plan_for(data=1, tensor=2))
    first, second = run.said("is")
    # Both ranks of the tensor group on the only machine with two CPUs, and everything on loopback.
    assert first == ["127.0.0.2", "0", "2", "0", "lo", "green"]
    assert second == ["127.0.0.2", "1", "2", "0", "lo", "green"]


def test_all_end_when_one_rank_is_killed(nodes, run):
    def kill() -> None:
        os.kill(int(run.said("pid")[1][0]), signal.SIGKILL)

    run.on_line["at step 5"] = kill
    with pytest.raises(RankFailedError, match=r"rank 1 on 127\.0\.0\.\d was killed by SIGKILL"):
        run.launch(REPORT + TRAINS, plan_for(data=2), "1000000")
    assert not any(is_alive(int(pid)) for (pid,) in run.said("pid"))


def test_a_stop_reaches_every_rank(nodes, run):
    script = """
        from headway.train.events import emit
        stop = []
        signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
        print("ready", flush=True)
        while not stop:
            time.sleep(0.01)
        emit("stopped", step=4)
        sys.exit(130)
    """
    ready = []

    def press() -> None:
        ready.append(1)
        if len(ready) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        else:
            run.on_line["ready"] = press

    run.on_line["ready"] = press
    with pytest.raises(Interrupted, match="stopped after step 4"):
        run.launch(REPORT + textwrap.dedent(script), plan_for(data=3))
    assert len(run.said("pid")) == 3


def test_no_room_says_what_is_needed_and_what_there_is(nodes, run, monkeypatch):
    monkeypatch.setattr(ray_engine, "PLACEMENT_SECONDS", 1.0)
    with pytest.raises(InputError) as raised:
        run.launch("", plan_for(data=64))
    assert "64 ranks of 1 CPU each" in raised.value.message
    assert "127.0.0.2: 2 CPU; 127.0.0.3: 1 CPU" in raised.value.message
    assert "--devices" in raised.value.remedy


def test_a_lost_node_ends_the_run(nodes, run):
    """Last: it takes a machine away."""

    run.on_line["at step 5"] = nodes
    with pytest.raises(RankFailedError, match=r"rank \d on 127\.0\.0\.4"):
        run.launch(REPORT + TRAINS, plan_for(data=4), "1000000")
    deadline = time.monotonic() + 5
    while any(is_alive(int(pid)) for (pid,) in run.said("pid")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- without a cluster ---------------------------------------------------------------------------------------------


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_groupings_hold_every_rank_once(data, tensor, per_node):
    plan = plan_for(data, tensor)
    kind = Accelerator(name="core", flop_per_second={"float32": 1.0}, memory_bytes=1.0, memory_bytes_per_second=1.0)
    devices = tuple(
        Device(name=name, accelerator="core", node=f"node {rank // per_node}") for rank, name in enumerate(plan.devices)
    )
    for cluster in (None, Cluster(name="many", accelerators={"core": kind}, devices=devices)):
        ways = ray_engine.groupings(plan, cluster)
        for way in ways:
            assert sorted(rank for ranks in way for rank in ranks) == list(range(plan.world_size))
        assert [(rank,) for rank in range(plan.world_size)] in ways
        if cluster is not None:
            assert all(len({devices[rank].node for rank in ranks}) == 1 for ranks in ways[0])
        elif tensor > 1:
            assert all(plan.tensor_group(ranks[0]) == ranks for ranks in ways[0])


def test_without_ray_the_extra_is_named(monkeypatch, run):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match="ray is not installed") as raised:
        run.launch("", plan_for())
    assert "headway[ray]" in raised.value.remedy


def test_an_address_where_no_ray_answers_is_refused_at_once(monkeypatch, run):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.9:1")
    with pytest.raises(InputError, match="no Ray answers") as raised:
        run.launch("", plan_for())
    assert "RAY_ADDRESS" in raised.value.place


def test_a_machine_without_the_script_or_the_run_directory_complains(tmp_path):
    import hashlib

    host = ray_engine.Host()
    script = tmp_path / "script.py"
    assert "cannot be read there: No such file" in host.complaint(str(script), "", "")
    script.write_text("print(1)")
    assert "another version" in host.complaint(str(script), "0" * 64, "")
    digest = hashlib.sha256(script.read_bytes()).hexdigest()
    assert "run directory" in host.complaint(str(script), digest, str(tmp_path / "run" / "token"))
    (tmp_path / "token").touch()
    assert host.complaint(str(script), digest, str(tmp_path / "token")) == ""


def test_local_ranks_see_the_gpus_of_their_neighbours_in_order(tmp_path):
    places = [
        {"node": node, "address": node, "interface": "eth0", "gpus": [gpu]}
        for node, gpu in (("a", "3"), ("a", "1"), ("b", "0"))
    ]
    needs = [{"CPU": 2.0, "GPU": 1.0}] * 3
    first, second, third = ray_engine._environments(plan_for(data=3), None, places, needs, tmp_path)
    assert (first["CUDA_VISIBLE_DEVICES"], first["LOCAL_RANK"]) == ("3,1", "0")
    assert (second["CUDA_VISIBLE_DEVICES"], second["LOCAL_RANK"]) == ("3,1", "1")
    assert (third["CUDA_VISIBLE_DEVICES"], third["LOCAL_RANK"], third["GROUP_RANK"]) == ("0", "0", "1")
    assert first["OMP_NUM_THREADS"] == "2"


def test_a_port_that_somebody_listens_on_at_one_address_is_not_given_to_the_rendezvous(monkeypatch) -> None:
    host = ray_engine.Host.__new__(ray_engine.Host)
    first = host.free_port()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", first))
        listener.listen()
        offers = iter([first - 20_000, *range(12_000)])
        monkeypatch.setattr(ray_engine.secrets, "randbelow", lambda _: next(offers))
        assert host.free_port() != first
