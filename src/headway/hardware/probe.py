"""Measures this machine, and describes it as the cluster `local`.

Each device of the cluster is one local process: one for each GPU, or, without a GPU, one for each core, with the cores
divided among them. The figures are measured as training will meet them: by real processes, started together, that talk
through the same backend. What is measured, in order:

1. rank 0 alone: FLOP/s of matrix products for each dtype, memory bandwidth, the cost of starting an operator;
2. all ranks at once: the same again, and the ratio is the machine's `contention`;
3. between the ranks: all-reduce over several sizes, then send, all-gather and reduce-scatter.

The links of the cluster are fitted so that the closed form of a ring all-reduce of S bytes over n ranks (Thakur,
Rabenseifner and Gropp, IJHPCA 2005, section 4.5),

    collective_latency + 2 (n - 1) latency + 2 (n - 1) / n * S / bandwidth,

passes through the measured points with the least relative error. The points are kept beside the fit. Other operations
do not follow the same figures exactly; `Cluster.operation_scale` says by how much they differ.

A result is cached under the user's cache directory by a fingerprint of the hardware, the number of ranks and torch's
version; it holds until one of these changes or a new measurement is asked for.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import logging
import math
import os
import platform
import queue
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from headway.errors import ClusterError, HeadwayError, RankFailedError
from headway.hardware.cluster import Accelerator, Cluster, Device, Link
from headway.hardware.probe_worker import Point, Report, Task
from headway.value import Value, write_atomically

__all__ = ["Probe", "cache_path", "count_cores", "measure_memory", "probe", "ring_all_reduce_seconds"]

Progress = Callable[[str], None]

_log = logging.getLogger(__name__)
_FORMAT = 1  # changes when older results must not be used any more


class Probe(Value):
    """What was measured on this machine, and the cluster that follows from it."""

    cluster: Cluster
    processor: str  # model of the CPU
    cores: int  # that this process may use
    memory_bytes: float  # of the machine, or the limit of the control group if that is less
    threads: int  # CPU threads of one rank
    flop_per_second_together: float  # float32, of one rank while all compute; 0 with a single rank
    memory_bytes_per_second_together: float
    points: tuple[Point, ...]  # communication as measured
    date: str  # ISO 8601, UTC
    took_seconds: float
    busy_processes: float  # load average of the minute before; far above 0, the figures are too low
    torch_version: str
    backend: str  # "gloo", "nccl", "headway", or "" with a single rank
    format: int = _FORMAT

    def fitted_seconds(self, point: Point) -> float:
        """What the fit gives for an all-reduce of this point's size: the closed form in the module's docstring."""
        link = self.cluster.links[0]
        return ring_all_reduce_seconds(
            point.ranks,
            point.bytes,
            link.latency_seconds,
            link.bytes_per_second,
            self.cluster.collective_latency_seconds,
        )


def ring_all_reduce_seconds(
    ranks: int, size_bytes: float, latency_seconds: float, bytes_per_second: float, collective_latency_seconds: float
) -> float:
    """Time of a ring all-reduce over equal links, in seconds."""
    steps = 2 * (ranks - 1)
    return collective_latency_seconds + steps * latency_seconds + steps / ranks * size_bytes / bytes_per_second


def probe(
    count: int | None = None,
    refresh: bool = False,
    progress: Progress | None = None,
    *,
    seconds: float = 6.0,
    exchange: Literal["torch", "headway"] = "torch",
) -> Probe:
    """This machine with `count` local ranks (one for each GPU or core if None), from the cache or measured now.

    `exchange` says whose collectives are measured: those of torch's own backend, or Headway's programs (backend
    "headway"). `progress` is called with a line of text at each stage. `seconds` is the time for measuring; starting
    the processes comes on top. An unreadable cache is measured again, and a cache that cannot be written is reported
    through logging: neither is an error.

    Raises ClusterError for a count that this machine cannot hold, RankFailedError if a worker dies.
    """
    report = progress or (lambda text: None)
    machine = _Machine(exchange)
    count = machine.default_count if count is None else count
    if count < 1:
        raise ClusterError(f"{count} devices asked for", place="local", remedy="ask for at least one")
    if machine.gpus and count > len(machine.gpus):
        raise ClusterError(
            f"{count} devices asked for, and this machine has {len(machine.gpus)} GPU(s)",
            place="local",
            remedy="ask for fewer, or set CUDA_VISIBLE_DEVICES to nothing to use the CPU's cores",
        )
    path = cache_path(machine.fingerprint(count))
    if not refresh:
        known = _cached(path, machine.fingerprint(count))
        if known is not None:
            return known
    result = _measure(machine, count, seconds, report)
    try:
        write_atomically(path, result.to_json() + "\n")
    except HeadwayError as error:
        _log.warning("the probe's result is not cached: %s", error)
    return result


def cache_path(fingerprint: str) -> Path:
    """Where the probe with this fingerprint is cached: below $XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    # The XDG specification tells programs to ignore a relative path here.
    folder = Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()
    return folder / "headway" / f"probe-{fingerprint}.json"


def _cached(path: Path, fingerprint: str) -> Probe | None:
    if not path.exists():
        return None
    try:
        known = Probe.load(path)
        known.cluster.validate(place=str(path))
    except HeadwayError as error:
        _log.warning("the cached probe cannot be used, measuring again: %s", error)
        return None
    if known.format != _FORMAT or known.cluster.fingerprint != fingerprint:
        return None
    return known


class _Machine:
    """What can be known about this machine without measuring."""

    def __init__(self, exchange: str = "torch") -> None:
        self.exchange = exchange
        # Imported where used: torch takes seconds to load, and the module's types are needed without it.
        import torch

        self.torch_version = str(torch.__version__)
        self.gpus: list[tuple[str, int]] = []
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                properties = torch.cuda.get_device_properties(index)
                self.gpus.append((properties.name, properties.total_memory))
        self.processor = _processor()
        self.cores = count_cores()
        self.memory_bytes = measure_memory()

    @property
    def backend(self) -> str:
        """Of torch.distributed: what carries out the collectives that are measured."""
        if self.exchange != "torch":
            return self.exchange
        return "nccl" if self.gpus else "gloo"

    @property
    def default_count(self) -> int:
        return len(self.gpus) or self.cores

    def fingerprint(self, count: int) -> str:
        facts = (_FORMAT, self.processor, self.cores, self.memory_bytes, self.gpus, self.torch_version, count)
        if self.exchange != "torch":
            facts = (*facts, self.exchange)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _processor() -> str:
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine() or "CPU"


def _control_groups() -> list[Path]:
    """Folders of the control groups (version 2, or 1's memory and cpu) that this process is in, innermost first."""
    folders: list[Path] = []
    root = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, inner = line.split(":", 2)
            for base in [root / name for name in controllers.split(",")] if controllers else [root]:
                folder = base / inner.lstrip("/")
                folders += [folder, *(parent for parent in folder.parents if parent.is_relative_to(base))]
    # Inside a container the path in /proc may be the host's; the container's own group is then mounted at the root.
    return [*folders, root, root / "memory", root / "cpu"]


def _limits(name: str) -> Iterable[str]:
    for folder in _control_groups():
        with contextlib.suppress(OSError):
            yield (folder / name).read_text(encoding="utf-8").strip()


def count_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its control group if that is less."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    for text in _limits("cpu.max"):
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit():
            cores = min(cores, math.ceil(int(quota) / int(period)))
    for text, period in zip(_limits("cpu.cfs_quota_us"), _limits("cpu.cfs_period_us"), strict=False):
        if text.isdigit() and period.isdigit():
            cores = min(cores, math.ceil(int(text) / int(period)))
    return max(1, cores)


def measure_memory() -> float:
    """Bytes of memory that this machine has, or that the control group allows if that is less."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in ("memory.max", "memory.limit_in_bytes"):
        for text in _limits(name):
            if text.isdigit() and int(text) > 0:
                total = min(total, float(text))
    return total


def _measure(machine: _Machine, count: int, seconds: float, progress: Progress) -> Probe:
    started = time.monotonic()
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    threads = max(1, machine.cores // count)
    progress(f"probing this machine: starting {count} process" + ("es" if count > 1 else ""))
    reports = _run_workers(machine, count, threads, seconds, progress)
    first = reports[0]
    points = first.points
    kinds, devices = _devices(machine, reports, count, threads)
    links: tuple[Link, ...] = ()
    collective_latency = 0.0
    scale: dict[str, float] = {}
    if count > 1:
        latency, bandwidth, collective_latency = _fit(points, count)
        names = [device.name for device in devices]
        links = tuple(
            Link(
                source=source,
                target=target,
                bytes_per_second=bandwidth,
                latency_seconds=latency,
                kind="local",
            )
            for source, target in itertools.permutations(names, 2)
        )
        scale = _scales(points, latency, bandwidth, collective_latency)
    together = statistics.median(report.flop_per_second_together for report in reports)
    streaming = statistics.median(report.memory_bytes_per_second_together for report in reports)
    # GPUs have their own memory and clocks; processes on one CPU share both.
    shared = count > 1 and not machine.gpus
    cluster = Cluster(
        name="local",
        accelerators=kinds,
        devices=devices,
        links=links,
        fingerprint=machine.fingerprint(count),
        collective_latency_seconds=collective_latency,
        operation_scale=scale,
        contention=max(1.0, first.flop_per_second["float32"] / together) if shared else 1.0,
        memory_contention=max(1.0, first.memory_bytes_per_second / streaming) if shared else 1.0,
    ).validate()
    return Probe(
        cluster=cluster,
        processor=machine.processor,
        cores=machine.cores,
        memory_bytes=machine.memory_bytes,
        threads=threads,
        flop_per_second_together=together,
        memory_bytes_per_second_together=streaming,
        points=points,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        took_seconds=time.monotonic() - started,
        busy_processes=busy,
        torch_version=machine.torch_version,
        backend="" if count == 1 else machine.backend,
    )


def _devices(
    machine: _Machine, reports: Sequence[Report], count: int, threads: int
) -> tuple[dict[str, Accelerator], tuple[Device, ...]]:
    """The kinds of device and the devices: the CPU's share of one rank, or each GPU by its name."""
    if not machine.gpus:
        kind = _accelerator(machine.processor, reports[:1], machine.memory_bytes / count, "cpu", threads)
        devices = tuple(Device(name=f"local/cpu{rank}", accelerator=kind.name, node="local") for rank in range(count))
        return {kind.name: kind}, devices
    kinds = {}
    for name in dict.fromkeys(report.device_name for report in reports):
        alike = [report for report in reports if report.device_name == name]
        kinds[name] = _accelerator(name, alike, min(report.memory_bytes for report in alike), "cuda", threads)
    return kinds, tuple(
        Device(name=f"local/gpu{report.rank}", accelerator=report.device_name, node="local") for report in reports
    )


def _accelerator(name: str, reports: Sequence[Report], memory_bytes: float, device: str, threads: int) -> Accelerator:
    dtypes = reports[0].flop_per_second
    return Accelerator(
        name=name,
        flop_per_second={
            dtype: statistics.median(report.flop_per_second[dtype] for report in reports) for dtype in dtypes
        },
        memory_bytes=memory_bytes,
        memory_bytes_per_second=statistics.median(report.memory_bytes_per_second for report in reports),
        launch_seconds=statistics.median(report.launch_seconds for report in reports),
        torch_device=device,
        threads=threads,
        source="measured",
    )


def _line(points: Sequence[Point]) -> tuple[float, float]:
    """Seconds at size zero and seconds per byte: least squares of the relative error, neither below zero."""
    sizes = np.array([point.bytes for point in points], dtype=float)
    times = np.array([point.seconds for point in points], dtype=float)
    rows = np.stack([1 / times, sizes / times], axis=1)
    start, slope = np.linalg.lstsq(rows, np.ones(len(points)), rcond=None)[0]
    if start <= 0:
        start = float(times.min()) / 2
        slope = float(np.median(np.maximum(times - start, times / 2) / sizes))
    if slope <= 0:
        slope = float(np.min(times / sizes))
    return float(start), float(slope)


def _fit(points: Sequence[Point], count: int) -> tuple[float, float, float]:
    """Latency and bandwidth of a link, and the latency of a collective, from the measured points.

    The intercept of the all-reduces is `collective_latency + 2 (n - 1) latency`, which one number of ranks cannot
    tell apart; messages between two ranks give the link's latency, and what is left is the collective's.
    """
    start, slope = _line([point for point in points if point.operation == "all_reduce"])
    message, _ = _line([point for point in points if point.operation == "send"])
    steps = 2 * (count - 1)
    latency = min(message, start / steps)
    return latency, steps / count / slope, max(0.0, start - steps * latency)


def _scales(points: Sequence[Point], latency: float, bandwidth: float, collective_latency: float) -> dict[str, float]:
    """For each operation other than all-reduce: measured time over the closed form's, where bandwidth decides."""
    scale = {}
    for operation in dict.fromkeys(point.operation for point in points if point.operation != "all_reduce"):
        ratios = []
        for point in points:
            if point.operation != operation or point.bytes < 2**20:
                continue
            if operation == "send":
                expected = latency + point.bytes / bandwidth
            else:
                ring = ring_all_reduce_seconds(point.ranks, point.bytes, latency, bandwidth, 0.0)
                expected = collective_latency + ring / 2
            ratios.append(point.seconds / expected)
        scale[operation] = statistics.median(ratios)
    return scale


def _run_workers(machine: _Machine, count: int, threads: int, seconds: float, progress: Progress) -> list[Report]:
    """Start the ranks, hear them out, and see to it that none is left, whatever happens."""
    lines: queue.Queue[tuple[int, bytes]] = queue.Queue()
    with contextlib.ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="headway-probe-")))
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        }
        workers: list[subprocess.Popen[bytes]] = []
        errors = [folder / f"rank-{rank}.err" for rank in range(count)]
        for rank in range(count):
            task = Task(
                rank=rank,
                count=count,
                threads=threads,
                device="cuda" if machine.gpus else "cpu",
                rendezvous=(folder / "rendezvous").as_uri(),
                memory_bytes=machine.memory_bytes / count,
                seconds=seconds,
                backend=machine.backend,
            )
            text = msgspec.json.encode(task).decode()
            # -P: a torch.py in the user's folder must not be taken for the real one.
            command = [sys.executable, "-P", "-m", "headway.hardware.probe_worker", text]
            error = cleanup.enter_context(errors[rank].open("wb"))
            try:
                worker = subprocess.Popen(
                    command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=error
                )
            except OSError as failure:
                raise RankFailedError(
                    f"the process cannot be started: {failure.strerror}",
                    place=f"probe, rank {rank}",
                    remedy="try fewer devices with --devices",
                ) from failure
            workers.append(worker)
            cleanup.callback(_end, worker)
            threading.Thread(target=_listen, args=(rank, worker, lines), daemon=True).start()
        return _hear(workers, lines, errors, time.monotonic() + 90 + 5 * seconds, progress)


def _listen(rank: int, worker: subprocess.Popen[bytes], lines: queue.Queue[tuple[int, bytes]]) -> None:
    assert worker.stdout is not None
    with worker.stdout:
        for line in worker.stdout:
            lines.put((rank, line))
    lines.put((rank, b""))


def _hear(
    workers: Sequence[subprocess.Popen[bytes]],
    lines: queue.Queue[tuple[int, bytes]],
    errors: Sequence[Path],
    deadline: float,
    progress: Progress,
) -> list[Report]:
    reports: dict[int, Report] = {}
    while len(reports) < len(workers):
        try:
            rank, line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            missing = ", ".join(str(rank) for rank in range(len(workers)) if rank not in reports)
            raise RankFailedError(
                "the measurement takes too long and was ended",
                place=f"probe, rank {missing}",
                remedy="try fewer devices with --devices, or a machine that is less busy",
            ) from None
        if not line:
            if rank in reports:
                continue
            code = workers[rank].wait()
            text = errors[rank].read_text(encoding="utf-8", errors="replace").strip()
            raise RankFailedError(
                f"the process ended with code {code}: {text.splitlines()[-1] if text else 'it said nothing'}",
                place=f"probe, rank {rank}",
                remedy="try fewer devices with --devices: each needs memory for a process of its own",
            )
        with contextlib.suppress(msgspec.DecodeError):
            # A library that prints to stdout is not ours to refuse.
            message = msgspec.json.decode(line)
            if not isinstance(message, dict):
                continue
            if "progress" in message:
                progress(f"probing this machine: {message['progress']}")
            elif "result" in message:
                reports[rank] = msgspec.convert(message["result"], Report)
    return [reports[rank] for rank in range(len(workers))]


def _end(worker: subprocess.Popen[bytes]) -> None:
    """A worker has nothing to save: what it measured has been read, or is not wanted any more."""
    worker.kill()
    worker.wait()
    assert worker.stdin is not None
    worker.stdin.close()
