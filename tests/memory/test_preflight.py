"""Before the first byte is allocated: what a plan needs of the machine, and an error that names the shortfall."""

from __future__ import annotations

import resource
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from headway.errors import DoesNotFitError
from headway.hardware.cluster import Accelerator, Cluster, Device
from headway.memory import preflight
from headway.memory.preflight import PROCESS_BYTES, Available, available_here, check_here, needs_of
from headway.plan.plan import Plan, Stage
from headway.train import run as running
from headway.train.run import run
from headway.workload.graph import Workload
from headway.workload.trace import trace

ELEMENTS = 4 * (64 * 64 + 64)


@cache
def workload() -> Workload:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4)))
    graph = trace(model, torch.randn(2, 64), name="m", loss=nn.functional.mse_loss, target=torch.randn(2, 64))
    return Workload(graph=graph, global_batch=8)


def plan_of(data: int = 1, **fields: Any) -> Plan:
    layers = len(workload().graph.layers)
    return Plan(
        model="m", devices=tuple(f"d{rank}" for rank in range(data)), global_batch=8, micro_batch=2, data=data,
        stages=(Stage(start=0, stop=layers),), **fields,
    ).validate(workload().graph)  # fmt: skip


def host(plan: Plan) -> float:
    (needs,) = needs_of(plan, workload(), buffer_bytes=0)
    return needs.host


def test_adamw_off_the_device_needs_master_and_moments_where_they_rest() -> None:
    (needs,) = needs_of(plan_of(optimizer_on="disk"), workload(), buffer_bytes=100)
    assert needs.disk == 8 * ELEMENTS  # float32 parameters that the processor reaches are their own masters
    assert needs.device == 8 * ELEMENTS  # float32 parameters and gradients
    assert needs.host == needs.device + 100  # the device is the host here
    (needs,) = needs_of(plan_of(optimizer_on="disk", precision="bfloat16"), workload(), buffer_bytes=0)
    assert needs.device == 4 * ELEMENTS
    assert needs.disk == 12 * ELEMENTS
    (needs,) = needs_of(plan_of(optimizer_on="disk", delayed_update=True), workload(), buffer_bytes=0)
    assert needs.disk == 16 * ELEMENTS  # what is updated waits for its step
    (needs,) = needs_of(plan_of(optimizer_on="disk", moments="bfloat16", optimizer_kept=0.25), workload())
    assert needs.disk == pytest.approx(0.75 * 4 * ELEMENTS)


def test_slices_of_replicas_on_one_node_add_up_to_the_whole() -> None:
    one = needs_of(plan_of(parameters_on="disk", optimizer_on="disk"), workload())[0]
    four = needs_of(plan_of(4, zero_stage=3, parameters_on="disk", optimizer_on="disk"), workload())[0]
    assert four.disk == pytest.approx(one.disk)
    assert four.ranks == 4


@given(st.floats(0, 1e9), st.floats(0, 1e9))
def test_what_is_there_passes_and_what_is_not_is_refused(free: float, disk: float) -> None:
    plan = plan_of(optimizer_on="disk")
    (needs,) = needs_of(plan, workload(), buffer_bytes=0)
    here = Available(host=free, disk=disk)
    if free >= needs.host + PROCESS_BYTES and disk >= needs.disk:
        assert check_here(plan, workload(), available=here, buffer_bytes=0) == (needs,)
    else:
        with pytest.raises(DoesNotFitError, match="are missing"):
            check_here(plan, workload(), available=here, buffer_bytes=0)


def test_the_error_names_the_field_the_shortfall_and_the_remedy() -> None:
    here = Available(host=1e12, disk=8 * ELEMENTS - 2048)
    with pytest.raises(DoesNotFitError, match=r"2\.05 kB are missing") as caught:
        check_here(plan_of(optimizer_on="disk"), workload(), available=here, directory=Path("/somewhere"))
    assert caught.value.place == "plan: optimizer_on"
    assert "/somewhere" in caught.value.message
    assert "HEADWAY_TIER_DIRECTORY" in caught.value.remedy


def test_a_plan_that_keeps_all_on_the_device_is_not_preflights_business() -> None:
    assert check_here(plan_of(), workload(), available=Available(host=0.0))


def test_a_real_limit_on_the_process_is_seen(tmp_path: Path) -> None:
    code = "from headway.memory.preflight import available_here; print(available_here().process)"
    limit = 64 * 2**30

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    seen = subprocess.run([sys.executable, "-c", code], preexec_fn=lower, capture_output=True, text=True, check=True)
    assert float(seen.stdout) == limit
    assert 0 < available_here(tmp_path / "not" / "yet").disk < float("inf")


def on_a_gpu() -> Cluster:
    kind = Accelerator(name="g", flop_per_second={"float32": 1e12}, memory_bytes=1e12, memory_bytes_per_second=1e11)
    return Cluster(name="c", accelerators={"g": kind}, devices=(Device(name="d0", accelerator="g", node="n"),))


def test_what_a_gpu_copies_from_has_to_be_pinned_and_too_little_of_that_is_named() -> None:
    plan = plan_of(optimizer_on="host")
    (needs,) = needs_of(plan, workload(), on_a_gpu(), buffer_bytes=1000)
    assert needs.pinned == needs.host == 12 * ELEMENTS + 1000
    here = Available(host=1e12, pinned=needs.pinned - 1, locked_by_limit=65536)
    with pytest.raises(DoesNotFitError, match="of pinned memory on n") as caught:
        check_here(plan, workload(), on_a_gpu(), available=here, buffer_bytes=1000)
    assert "ulimit -l allows 65.5 kB" in caught.value.remedy
    fits = Available(host=1e12, pinned=needs.pinned, locked_by_limit=0)
    assert check_here(plan, workload(), on_a_gpu(), available=fits, buffer_bytes=1000) == (needs,)


def test_a_memory_node_on_this_machine_takes_of_its_memory() -> None:
    plan = plan_of(optimizer_on="remote")
    (needs,) = needs_of(plan, workload(), buffer_bytes=0)
    assert needs.remote == 8 * ELEMENTS
    enough = needs.host + needs.remote + PROCESS_BYTES
    assert check_here(plan, workload(), available=Available(host=enough), buffer_bytes=0)
    with pytest.raises(DoesNotFitError, match="host memory"):
        check_here(plan, workload(), available=Available(host=enough - 1), buffer_bytes=0)


def test_a_run_is_refused_before_its_ranks_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`headway run` with a plan that this machine has no room for: nothing is launched."""
    machine = Cluster(
        name="here",
        accelerators={
            "cpu": Accelerator(
                name="cpu", flop_per_second={"float32": 1e12}, memory_bytes=1e12, memory_bytes_per_second=1e11,
                torch_device="cpu",
            )
        },
        devices=(Device(name="d0", accelerator="cpu", node="n"),),
    )  # fmt: skip
    script = tmp_path / "train.py"
    script.touch()
    plan_of(optimizer_on="host").save(tmp_path / "plan.json")
    monkeypatch.setattr(running, "find_workload", lambda *_, **__: workload())
    monkeypatch.setattr(running, "find_cluster", lambda *_, **__: machine)
    monkeypatch.setattr(running, "launch", lambda *_, **__: pytest.fail("launched"))
    monkeypatch.setattr(preflight, "available_here", lambda directory=None: Available(host=0.0))

    with pytest.raises(DoesNotFitError, match="of host memory on n") as caught:
        run(
            str(script), watcher=MagicMock(), plan_path=str(tmp_path / "plan.json"), root=tmp_path / "runs",
            cluster="here",
        )  # fmt: skip
    assert caught.value.place == "plan: optimizer_on"
