"""The probe: a real, short measurement between real processes, the fit by itself, and the cache."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.errors import ClusterError, RankFailedError
from headway.hardware import probe as module
from headway.hardware.catalog import load_cluster
from headway.hardware.probe import Probe, cache_path, count_cores, measure_memory, probe, ring_all_reduce_seconds
from headway.hardware.probe_worker import Point, Report

REPORT = Report(
    rank=0,
    device_name="cpu",
    flop_per_second={"float32": 1e11, "bfloat16": 2e11},
    memory_bytes_per_second=1e10,
    launch_seconds=3e-6,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))  # where workers meet: tells this test's from others'
    return tmp_path / "cache" / "headway"


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stands in for the processes where a test is about the cache; counts the measurements."""
    calls: list[int] = []

    def run(machine, count, threads, seconds, progress) -> list[Report]:
        calls.append(count)
        return [REPORT] * count

    monkeypatch.setattr(module, "_run_workers", run)
    return calls


def children(folder: Path) -> set[str]:
    """Probe workers that are alive and meet below `folder`: those of other tests, at the same time, meet elsewhere."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes()
        except OSError:
            continue
        if (
            os.fsencode(folder) in command
            and b"headway.hardware.probe_worker" in command
            and command.rstrip(b"\0").count(b"\0") >= 4
        ):
            found.add(entry.parent.name)
    return found


@pytest.mark.processes
def test_two_ranks_are_measured_for_real(cache: Path, tmp_path: Path) -> None:
    said: list[str] = []
    alive: set[str] = set()

    def listen(text: str) -> None:
        said.append(text)
        alive.update(children(tmp_path))

    found = probe(2, progress=listen, seconds=0.5)
    cluster = found.cluster
    assert [device.name for device in cluster.devices] == ["local/cpu0", "local/cpu1"]
    assert len(cluster.links) == 2
    kind = cluster.accelerator_of(0)
    assert kind.torch_device == "cpu"
    assert kind.threads == max(1, count_cores() // 2)
    assert kind.memory_bytes == measure_memory() / 2
    assert set(kind.flop_per_second) == {"float32", "bfloat16", "float16"}
    assert min(kind.flop_per_second.values()) > 1e6
    assert 1e8 < kind.memory_bytes_per_second < 1e13
    assert 1e-8 < kind.launch_seconds < 1e-2
    assert cluster.contention >= 1
    assert cluster.memory_contention >= 1
    assert {point.operation for point in found.points} == {"all_reduce", "all_gather", "reduce_scatter", "send"}
    assert set(cluster.operation_scale) == {"all_gather", "reduce_scatter", "send"}
    # How close the fit is depends on how busy this machine is; that larger messages take longer does not.
    points = sorted((point for point in found.points if point.operation == "all_reduce"), key=lambda one: one.bytes)
    fitted = [found.fitted_seconds(point) for point in points]
    assert 0 < fitted[0] < fitted[-1] < math.inf
    assert fitted == sorted(fitted)
    assert any("all_reduce" in text for text in said)
    assert len(alive) == 2
    assert not children(tmp_path)
    # The second time is from the cache, also by the name that users write.
    assert probe(2) == found
    assert load_cluster("local:2") == cluster
    assert [path.name for path in cache.iterdir()] == [f"probe-{cluster.fingerprint}.json"]


@pytest.mark.processes
def test_a_rank_that_dies_ends_the_probe_and_leaves_no_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = subprocess.Popen

    def broken(command, **arguments):
        if '"rank":1' in command[-1]:
            command = [sys.executable, "-c", "raise SystemExit('out of luck')"]
        return real(command, **arguments)

    monkeypatch.setattr(module.subprocess, "Popen", broken)
    with pytest.raises(RankFailedError, match="out of luck") as caught:
        probe(2, seconds=0.5)
    assert "rank 1" in caught.value.place
    assert not children(tmp_path)


@pytest.mark.processes
def test_a_worker_ends_when_its_parent_is_gone(tmp_path: Path) -> None:
    task = module.Task(
        rank=0,
        count=2,
        threads=1,
        device="cpu",
        rendezvous=(tmp_path / "rendezvous").as_uri(),
        memory_bytes=1e9,
        seconds=60.0,
        backend="gloo",
    )
    worker = subprocess.Popen(
        [sys.executable, "-P", "-m", "headway.hardware.probe_worker", task.to_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
    )
    try:
        assert worker.stdin is not None
        worker.stdin.close()  # what the kernel does when the parent dies
        assert worker.wait(timeout=60) == 1
    finally:
        worker.kill()
        worker.wait()


def test_a_single_rank_has_no_links(workers: list[int]) -> None:
    found = probe(1)
    assert found.cluster.links == ()
    assert found.backend == ""
    assert found.cluster.accelerator_of(0).memory_bytes == found.memory_bytes


def test_a_saved_probe_is_a_cluster_file(workers: list[int], tmp_path: Path) -> None:
    found = probe(1)
    found.save(tmp_path / "probe.json")
    assert load_cluster(tmp_path / "probe.json") == found.cluster


def test_a_result_is_measured_once_and_again_when_asked(workers: list[int]) -> None:
    first = probe(1)
    assert probe(1) == first
    assert workers == [1]
    probe(1, refresh=True)
    assert workers == [1, 1]


@pytest.mark.parametrize("content", ["", "{", "{}", '{"cluster": 3}', "\x00"])
def test_a_cache_that_cannot_be_read_is_measured_again_with_a_notice(
    workers: list[int], caplog: pytest.LogCaptureFixture, content: str
) -> None:
    first = probe(1)
    path = cache_path(first.cluster.fingerprint)
    path.write_text(content)
    again = probe(1)
    assert workers == [1, 1]
    assert "measuring again" in caplog.text
    assert str(path) in caplog.text
    assert Probe.load(path) == again


def test_a_cache_of_another_machine_is_not_used(workers: list[int]) -> None:
    path = cache_path(probe(1).cluster.fingerprint)
    data = json.loads(path.read_text())
    data["cluster"]["fingerprint"] = "another"
    path.write_text(json.dumps(data))
    probe(1)
    assert workers == [1, 1]


def test_a_cache_that_cannot_be_written_is_a_notice(
    workers: list[int], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder belongs")
    assert probe(1).cluster.devices
    assert "not cached" in caplog.text


def test_the_cache_is_below_the_users_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_path("x") == tmp_path / "cache" / "headway" / "probe-x.json"
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_path("x") == tmp_path / ".cache" / "headway" / "probe-x.json"


def test_no_devices_are_refused() -> None:
    with pytest.raises(ClusterError, match="0 devices"):
        probe(0)


def test_a_measurement_that_hangs_is_ended() -> None:
    with pytest.raises(RankFailedError, match="too long"):
        module._hear([None], module.queue.Queue(), [], time.monotonic() - 1, lambda text: None)  # type: ignore[list-item]


@given(
    ranks=st.integers(2, 16),
    latency=st.floats(1e-6, 1e-3),
    bandwidth=st.floats(1e8, 1e11),
    start=st.floats(0, 1e-3),
)
def test_the_fit_recovers_a_machine_that_follows_the_closed_form(
    ranks: int, latency: float, bandwidth: float, start: float
) -> None:
    sizes = [2**power for power in range(12, 27, 2)]
    points = [
        Point(
            operation="all_reduce",
            bytes=size,
            seconds=ring_all_reduce_seconds(ranks, size, latency, bandwidth, start),
            ranks=ranks,
        )
        for size in sizes
    ]
    points += [Point(operation="send", bytes=size, seconds=latency + size / bandwidth, ranks=ranks) for size in sizes]
    found_latency, found_bandwidth, found_start = module._fit(points, ranks)
    for point in points[: len(sizes)]:
        again = ring_all_reduce_seconds(ranks, point.bytes, found_latency, found_bandwidth, found_start)
        assert again == pytest.approx(point.seconds, rel=1e-3)
    assert module._scales(points, latency, bandwidth, start)["send"] == pytest.approx(1)


@given(st.lists(st.floats(1e-6, 1.0), min_size=3, max_size=6))
def test_the_fit_of_any_noise_is_physical(times: list[float]) -> None:
    points = [
        Point(operation=operation, bytes=4096 * 16**index, seconds=seconds, ranks=2)
        for operation in ("all_reduce", "send")
        for index, seconds in enumerate(times)
    ]
    latency, bandwidth, start = module._fit(points, 2)
    assert latency > 0
    assert 0 < bandwidth < float("inf")
    assert start >= 0


def test_memory_and_cores_respect_the_control_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.setattr(module, "_control_groups", lambda: [inner, tmp_path])
    (inner / "memory.max").write_text("max\n")
    (inner / "cpu.max").write_text("max 100000\n")
    cores, memory = count_cores(), measure_memory()
    (tmp_path / "memory.max").write_text("1048576\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert measure_memory() == 1048576 < memory
    assert count_cores() == 1 <= cores
