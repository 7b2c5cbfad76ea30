"""The session as a script sees it: plain python, trace, torchrun, a plan, Ctrl-C and resume, in real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from headway.errors import InputError, PlanError
from headway.exchange.placement import _first_host
from headway.plan.plan import Plan, Stage
from headway.train.data import StepSampler, split_batch
from headway.train.measure import Meter, allocated_peak
from headway.train.session import optimizer_kind, start
from headway.workload.graph import Workload

SCRIPT = textwrap.dedent("""
    import sys, time
    import torch, headway
    from torch import nn

    torch.manual_seed(0)
    steps, pause = int(sys.argv[1]), float(sys.argv[2])
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    dataset = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True).tanh())
    session = headway.start()
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    model, optimizer = session.prepare(
        model, optimizer, loss=nn.functional.mse_loss, clip_norm=1.0, scheduler=scheduler
    )
    for batch in session.shard(dataset, batch_size=8, steps=steps, seed=3):
        loss = session.step(batch)
        if session.rank == 0:
            print(f"{loss:.6f}", flush=True)
        time.sleep(pause)
    session.finish()
""")


RESIDUAL = textwrap.dedent("""
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x):
            return x + self.down(torch.tanh(self.up(x)))
""")


def test_a_plan_of_one_stage_does_not_pay_for_pipelines_when_it_starts() -> None:
    program = "import sys, headway.train.session; sys.exit('torch.distributed.pipelining' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def plain(script: Path) -> list[float]:
    """The losses of ten steps in one process."""
    return losses(run([sys.executable, str(script), "10", "0"]))


@pytest.fixture(scope="module")
def workload(script: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "workload.json"
    done = run([sys.executable, str(script), "10", "0"], HEADWAY_TASK="trace", HEADWAY_TRACE_OUTPUT=str(path))
    assert done.stdout == ""  # the script ended before its first step was made
    return path


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HEADWAY_", "SLURM_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **variables}


def run(command: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def start_ranks(script: Path, plan: Path, folder: Path, steps: int, pause: float, **variables: str):
    store = folder / f"rendezvous-{time.monotonic_ns()}"
    size = Plan.load(plan).world_size
    return [
        subprocess.Popen(
            [sys.executable, str(script), str(steps), str(pause)],
            env=environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), HEADWAY_PLAN=str(plan),
                HEADWAY_INIT_METHOD=f"file://{store}", HEADWAY_RUN_DIRECTORY=str(folder / "run"), **variables,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]  # fmt: skip


def losses(done: subprocess.CompletedProcess[str]) -> list[float]:
    return [float(line) for line in done.stdout.split()]


def two_stages(workload: Path, path: Path) -> Path:
    graph = Workload.load(workload).graph
    layers = len(graph.layers)
    Plan(
        model=graph.name, devices=("a", "b"), global_batch=8, micro_batch=2, pipeline=2, schedule="1f1b",
        stages=(Stage(start=0, stop=2), Stage(start=2, stop=layers)),
    ).validate(graph).save(path)  # fmt: skip
    return path


@pytest.mark.processes
def test_a_trace_says_what_will_be_trained(workload: Path) -> None:
    found = Workload.load(workload)
    assert found.global_batch == 8
    assert found.graph.parameter_count == 3 * 72 + 9
    assert found.optimizer.name == "AdamW"
    assert found.optimizer.state_bytes_per_element == 8


@pytest.mark.processes
def test_torchrun_without_a_plan_is_data_parallel_and_learns_the_same(script: Path, plain: list[float]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert losses(run([*torchrun, str(script), "10", "0"])) == pytest.approx(plain, abs=2e-6)


@pytest.mark.processes
def test_ctrl_c_leaves_a_checkpoint_and_a_resume_ends_where_a_straight_run_ends(
    script: Path, plain: list[float], workload: Path, tmp_path: Path
) -> None:
    plan = two_stages(workload, tmp_path / "plan.json")
    ranks = start_ranks(script, plan, tmp_path, 10, 0.2, HEADWAY_WORKLOAD=str(workload))
    metrics = tmp_path / "run" / "metrics.jsonl"
    patience = time.monotonic() + 90
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2) and time.monotonic() < patience:
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGINT)  # one rank is told, and all agree
    for rank in ranks:
        _, errors = rank.communicate(timeout=60)
        assert rank.returncode == 130, errors
    checkpoints = tmp_path / "run" / "checkpoint"
    stopped = checkpoints / (checkpoints / "latest").read_text().strip()
    made = int(stopped.name.removeprefix("step-"))
    assert 2 <= made < 10

    # On one device, without the plan.
    done = run(
        [sys.executable, str(script), "10", "0"],
        HEADWAY_RESUME=str(stopped),
        HEADWAY_RUN_DIRECTORY=str(tmp_path / "run"),
    )
    assert losses(done) == pytest.approx(plain[made:], abs=2e-6)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["loss"] for line in lines] == pytest.approx(plain, abs=2e-6)


@pytest.mark.processes
def test_a_run_under_a_plan_leaves_what_was_measured(script: Path, workload: Path, tmp_path: Path) -> None:
    plan = two_stages(workload, tmp_path / "plan.json")
    # Without the workload: the plan's model is traced in place.
    ranks = start_ranks(script, plan, tmp_path, 6, 0)
    for rank in ranks:
        _, errors = rank.communicate(timeout=90)
        assert rank.returncode == 0, errors
    measured = json.loads((tmp_path / "run" / "measured.json").read_text())
    time_parts = measured["time"]
    assert sum(value for name, value in time_parts.items() if name != "step_seconds") == pytest.approx(
        time_parts["step_seconds"]
    )
    assert time_parts["bubble_seconds"] > 0
    assert len(measured["peak_bytes"]) == 2
    assert min(measured["peak_bytes"]) > 0
    events = json.loads((tmp_path / "run" / "timeline.json").read_text())["traceEvents"]
    names = {event["name"] for event in events}
    assert {"forward 0 (stage 0)", "backward 3 (stage 1)", "update"} <= names
    assert (tmp_path / "run" / "checkpoint" / "latest").read_text().strip() == "step-6"


@pytest.mark.processes
def test_memory_is_counted_where_tensor_parallel_parameters_rest_off_the_device(tmp_path: Path) -> None:
    block = "Residual() for _ in range(3)"
    script = tmp_path / "train.py"
    script.write_text(
        SCRIPT.replace("nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)", block).replace(
            "torch.manual_seed(0)\n", f"torch.manual_seed(0)\n{RESIDUAL}"
        )
    )
    assert block in script.read_text()
    sharding = {f"{at}.{name}": style for at in range(3) for name, style in (("up", "column"), ("down", "row"))}
    Plan(
        model="m", devices=("a", "b"), global_batch=8, micro_batch=8, tensor=2, parameters_on="host",
        tensor_sharding=sharding, stages=(Stage(start=0, stop=4),),
    ).save(tmp_path / "plan.json")  # fmt: skip
    ranks = start_ranks(script, tmp_path / "plan.json", tmp_path, 4, 0)
    printed = [rank.communicate(timeout=90) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    measured = json.loads((tmp_path / "run" / "measured.json").read_text())
    assert min(measured["peak_bytes"]) > 0
    assert min(tiers["host"] for tiers in measured["tier_bytes"]) > 0


@pytest.mark.processes
def test_a_plan_for_another_number_of_ranks_is_refused(script: Path, workload: Path, tmp_path: Path) -> None:
    plan = two_stages(workload, tmp_path / "plan.json")
    done = subprocess.run(
        [sys.executable, str(script), "1", "0"], env=environment(HEADWAY_PLAN=str(plan)), capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "the plan is for 2 ranks, and 1 were started" in done.stderr


def test_events_are_lines_of_json(monkeypatch: pytest.MonkeyPatch) -> None:
    from headway.train.events import emit

    read, write = os.pipe()
    monkeypatch.setenv("HEADWAY_EVENTS_FD", str(write))
    emit("step", step=3, loss=0.5)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert json.loads(pipe.read()) == {"event": "step", "step": 3, "loss": 0.5}


def test_a_listener_that_left_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from headway.train.events import emit

    read, write = os.pipe()
    os.close(read)
    monkeypatch.setenv("HEADWAY_EVENTS_FD", str(write))
    emit("step")
    emit("step")
    os.close(write)


def test_what_another_thread_frees_does_not_count_for_ever() -> None:
    # gloo's threads free what they have sent, and the profiler sees only what its own thread frees.
    from headway.train.measure import allocated_peak

    def drop(held: list[torch.Tensor]) -> None:
        held.clear()

    found: list[float] = []
    block = 2_000_000
    with allocated_peak(found):
        for _ in range(20):
            held = [torch.empty(block, dtype=torch.uint8)]
            freer = threading.Thread(target=drop, args=(held,))
            freer.start()
            freer.join()
    assert block <= found[0] < 10 * block


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_the_samples_of_a_step_do_not_depend_on_the_replicas(replicas: int) -> None:
    alone = StepSampler(50, 8, steps=20, seed=5)
    parts = [StepSampler(50, 8, steps=20, seed=5, replica=each, replicas=replicas) for each in range(replicas)]
    for whole, *shares in zip(alone, *parts, strict=True):
        assert [sample for share in shares for sample in share] == whole
        assert len(set(whole)) == 8


def test_each_epoch_is_another_permutation_and_a_resume_takes_it_up() -> None:
    steps = list(StepSampler(48, 8, steps=12, seed=1))
    first, second = ([sample for step in epoch for sample in step] for epoch in (steps[:6], steps[6:]))
    assert sorted(first) == sorted(second) == list(range(48))
    assert first != second
    assert list(StepSampler(48, 8, steps=12, seed=1, first_step=7)) == steps[7:]


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(InputError, match="do not divide"):
        StepSampler(50, 8, replicas=3)
    with pytest.raises(InputError, match="do not divide"):
        split_batch((torch.zeros(6, 2), torch.zeros(6)), 4)


@pytest.mark.parametrize(
    ("make", "state", "traffic"),
    [
        (lambda p: torch.optim.AdamW(p), 8, 28),
        (lambda p: torch.optim.Adam(p, amsgrad=True), 12, 36),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0, 12),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 4, 20),
    ],
)
def test_an_optimizer_is_known_by_what_it_keeps(make, state: float, traffic: float) -> None:
    kind = optimizer_kind(make([nn.Parameter(torch.empty(3, device="meta"))]))
    assert kind.state_bytes_per_element == state
    assert kind.traffic_bytes_per_element == traffic


@pytest.mark.parametrize(
    ("hosts", "first"), [("gpu[03-05,7],login1", "gpu03"), ("node7", "node7"), ("a1,b2", "a1"), ("n[9]-ib", "n9-ib")]
)
def test_the_first_host_of_slurm_is_read_from_its_list(hosts: str, first: str) -> None:
    assert _first_host(hosts) == first


def test_the_memory_log_finds_the_highest_level() -> None:
    found: list[float] = []
    with allocated_peak(found):
        first = torch.ones(250_000)
        second = first + 1
        del first
        third = second + 1
        del second, third
    assert found[0] == pytest.approx(2_000_000, rel=0.01)


def test_the_parts_of_a_step_add_up_and_waits_are_counted_once() -> None:
    meter = Meter(0, torch.device("cpu"))
    with meter.step(1):
        with meter.section("optimizer"), meter.section("communication"):
            time.sleep(0.02)
            meter.add("communication", meter.mark(), meter.mark())
        with meter.section("bubble"):
            time.sleep(0.01)
    assert meter.last is not None
    last = meter.last
    parts = last.compute_seconds + last.communication_seconds + last.bubble_seconds + last.optimizer_seconds
    assert parts == pytest.approx(last.step_seconds)
    assert last.communication_seconds >= 0.02
    assert 0 <= last.optimizer_seconds < last.communication_seconds
    assert last.bubble_seconds >= 0.01


def test_another_batch_than_planned_is_refused(workload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Workload.load(workload).graph
    plan = Plan(
        model="x", devices=("a",), global_batch=8, micro_batch=8, stages=(Stage(start=0, stop=len(graph.layers)),)
    )
    plan.save(tmp_path / "plan.json")
    monkeypatch.setenv("HEADWAY_PLAN", str(tmp_path / "plan.json"))
    monkeypatch.setenv("HEADWAY_WORKLOAD", str(workload))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    session = start()
    try:
        with pytest.raises(PlanError, match="global batch is 16, and the plan is for 8"):
            session.shard(torch.utils.data.TensorDataset(torch.zeros(64, 8)), batch_size=16)
    finally:
        session.finish()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
