"""What came out of a trace: figures of one run, of several seeds together, and a row for each job.

A `Replay` is the record of a whole run as columns, one value for each job, whoever made it: the pure scheduler
(`headway.schedule.replay`) or the compiled one (`headway.schedule.fast`). Seconds and device-seconds throughout.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from headway.errors import InputError
from headway.value import Value, write_atomically

__all__ = [
    "COLUMNS",
    "FIGURES",
    "Interval",
    "Replay",
    "Summary",
    "Usage",
    "interval",
    "paired_ratio",
    "summarise",
    "usage",
    "write_csv",
]

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond the last, the normal one is near.
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


class Replay(NamedTuple):
    """One run of a trace, job by job in the order of the trace; times in seconds since its beginning.

    - `finish`: nan for a job that did not finish. `ran` + `waited` + `overhead` = finish - submitted.
    - `useful`, `overhead_service`: device-seconds of work, and held without working.
    - `segments`: (job, start, stop, node, devices) of every time that a job held devices of a node, empty if the run
      was not asked to keep them. `capacity`: devices of the fleet; `node_devices`: of each node.
    - `decisions`: how many the scheduler made. `seconds`: how long the run took (not a result).
    """

    policy: str
    placement: str
    trace: str
    engine: str
    names: tuple[str, ...]
    users: tuple[str, ...]
    devices: np.ndarray
    durations: np.ndarray
    submitted: np.ndarray
    started: np.ndarray
    finish: np.ndarray
    ran: np.ndarray
    waited: np.ndarray
    overhead: np.ndarray
    useful: np.ndarray
    overhead_service: np.ndarray
    preemptions: np.ndarray
    migrations: np.ndarray
    segments: np.ndarray
    node_devices: tuple[int, ...]
    decisions: int
    seconds: float
    refused: tuple[str, ...] = ()

    @property
    def capacity(self) -> int:
        """Devices of the fleet."""
        return sum(self.node_devices)

    @property
    def completion(self) -> np.ndarray:
        """Job completion times: from submission to the end, in seconds; nan for jobs that did not finish."""
        return self.finish - self.submitted


class Summary(Value):
    """The figures of one run. Seconds, device-seconds and shares.

    - `completion_*`: of the job completion time (JCT). `delay_*`: of the time until the first start.
    - `utilisation`: device-seconds of work over those offered from the first submission to the last end.
    - `overhead_share`: of the device-seconds held, those without work (saving, restoring, switching).
    - `fairness`: Jain's index (DEC-TR-301, 1984) of the slowdowns (completion time over run time): 1, all the same.
      `slowdown_p99`: of the same slowdowns.
    - `unfinished`: jobs that did not finish, or were refused: 0 unless something is wrong.
    """

    policy: str
    placement: str
    trace: str
    engine: str
    jobs: int
    unfinished: int
    completion_mean: float
    completion_median: float
    completion_p95: float
    completion_p99: float
    delay_mean: float
    delay_p95: float
    makespan: float
    utilisation: float
    preemptions: int
    migrations: int
    overhead_share: float
    fairness: float
    slowdown_mean: float
    slowdown_p99: float
    decisions: int
    seed: int = 0
    seconds: float = 0.0


FIGURES: tuple[str, ...] = (
    "completion_mean", "completion_median", "completion_p95", "completion_p99", "delay_mean", "delay_p95", "makespan",
    "utilisation", "preemptions", "migrations", "overhead_share", "fairness", "slowdown_mean", "slowdown_p99",
)  # fmt: skip
"""The fields of a `Summary` that are figures, which several seeds have an interval of."""


def summarise(replay: Replay, *, seed: int = 0) -> Summary:
    """The figures of a run. Percentiles are interpolated linearly, as numpy does by default."""
    done = ~np.isnan(replay.finish)
    completion = replay.completion[done]
    submitted, finish = replay.submitted[done], replay.finish[done]
    if len(completion) == 0:
        completion = finish = submitted = np.zeros(1)
    begun = replay.started >= 0
    delay = (replay.started - replay.submitted)[begun]
    slowdown = completion / replay.durations[done] if done.any() else np.ones(1)
    makespan = float(finish.max() - submitted.min())
    useful, spent = float(replay.useful.sum()), float(replay.overhead_service.sum())
    return Summary(
        policy=replay.policy,
        placement=replay.placement,
        trace=replay.trace,
        engine=replay.engine,
        jobs=len(replay.names),
        unfinished=int((~done).sum()),
        completion_mean=float(completion.mean()),
        completion_median=float(np.median(completion)),
        completion_p95=float(np.percentile(completion, 95)),
        completion_p99=float(np.percentile(completion, 99)),
        delay_mean=float(delay.mean()) if len(delay) else 0.0,
        delay_p95=float(np.percentile(delay, 95)) if len(delay) else 0.0,
        makespan=makespan,
        utilisation=useful / (replay.capacity * makespan) if makespan > 0 else 0.0,
        preemptions=int(replay.preemptions.sum()),
        migrations=int(replay.migrations.sum()),
        overhead_share=spent / (useful + spent) if useful + spent > 0 else 0.0,
        fairness=float(slowdown.sum() ** 2 / (len(slowdown) * (slowdown**2).sum())),
        slowdown_mean=float(slowdown.mean()),
        slowdown_p99=float(np.percentile(slowdown, 99)),
        decisions=replay.decisions,
        seed=seed,
        seconds=replay.seconds,
    )


class Interval(Value):
    """A mean of several runs and the 95 % confidence interval around it (Student's t); `half` is nan for one run."""

    mean: float
    half: float
    runs: int

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if math.isnan(self.half) else f"{self.mean:.4g} ± {self.half:.3g}"


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % confidence interval. Raises InputError for no values."""
    if len(values) == 0:
        raise InputError("no values to average", place="interval")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean=mean, half=math.nan, runs=1)
    degrees = len(values) - 1
    student = _STUDENT[degrees - 1] if degrees <= len(_STUDENT) else 1.96 + 2.4 / degrees
    half = student * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean=mean, half=half, runs=len(values))


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """The ratio theirs / ours, seed by seed: geometric mean, and half the width of its interval.

    Both lists are of the same seeds in the same order: what is common to a seed cancels. The interval is that of the
    logarithms, given around the mean at its wider side. Raises InputError for lists of different length.
    """
    if len(ours) != len(theirs):
        raise InputError(f"{len(ours)} runs beside {len(theirs)}", place="ratio", remedy="the same seeds for both")
    logs = interval([math.log(their / our) for our, their in zip(ours, theirs, strict=True)])
    mean = math.exp(logs.mean)
    half = math.nan if math.isnan(logs.half) else math.exp(logs.mean + logs.half) - mean
    return Interval(mean=mean, half=half, runs=logs.runs)


class Usage(NamedTuple):
    """Over time, at `seconds` (the beginnings of equal spans): what was in use, and what was not, and why.

    - `busy`: devices held, on average over the span. `waiting`: jobs that wait. `wanted`: devices they ask for.
    - `stranded`: devices free while somebody waits who asks for at most as many: what fragmentation (or the policy)
      costs. `scattered`: of the free devices, the share that is on nodes partly in use; nan where none are free.
    """

    seconds: np.ndarray
    busy: np.ndarray
    waiting: np.ndarray
    wanted: np.ndarray
    stranded: np.ndarray
    scattered: np.ndarray


def usage(replay: Replay, points: int = 400) -> Usage:
    """How full the fleet was over time, from the segments of a run that kept them.

    `busy` is exact for each span; the rest is looked at in the middle of each.
    """
    finish = replay.finish[~np.isnan(replay.finish)]
    stop = float(finish.max()) if len(finish) else 1.0
    edges = np.linspace(0.0, stop or 1.0, points + 1)
    middle = (edges[:-1] + edges[1:]) / 2
    nodes = len(replay.node_devices)
    used = np.zeros((points, nodes))
    busy = np.zeros(points)
    waiting = np.zeros(points)
    wanted = np.zeros(points)
    _job, start, end, node, count = (replay.segments[:, column] for column in range(5))
    # Integral of the devices held up to t, at every edge: sums of count x (t - start) and of what has ended.
    for times, sign in ((start, 1.0), (end, -1.0)):
        order = np.argsort(times, kind="stable")
        sorted_times, weight = times[order], count[order]
        total = np.concatenate(([0.0], np.cumsum(weight)))
        moment = np.concatenate(([0.0], np.cumsum(weight * sorted_times)))
        at = np.searchsorted(sorted_times, edges, side="right")
        busy += sign * np.diff(total[at] * edges - moment[at])
        of_node = np.zeros((points + 1, nodes))
        np.add.at(of_node, (np.searchsorted(middle, times, side="left"), node.astype(int)), sign * count)
        used += np.cumsum(of_node, axis=0)[:points]
    busy /= np.diff(edges)
    # Jobs in the system minus jobs that hold devices (each counted once, on the first of its nodes).
    last = np.where(np.isnan(replay.finish), np.inf, replay.finish)
    held = np.unique(replay.segments[:, :3], axis=0) if len(replay.segments) else np.zeros((0, 3))
    smallest = np.full(points, np.inf)
    for index, moment_ in enumerate(middle):
        here = (replay.submitted <= moment_) & (last > moment_)
        running = held[(held[:, 1] <= moment_) & (held[:, 2] > moment_), 0].astype(int)
        here[running] = False
        waiting[index] = here.sum()
        if waiting[index]:
            wanted[index] = replay.devices[here].sum()
            smallest[index] = replay.devices[here].min()
    free = np.asarray(replay.node_devices) - used
    total_free = free.sum(axis=1)
    partly = np.where((used > 0) & (free > 0), free, 0.0).sum(axis=1)
    scattered = np.divide(partly, total_free, out=np.full(points, np.nan), where=total_free > 0)
    stranded = np.where(total_free >= smallest, np.minimum(total_free, wanted), 0.0)
    return Usage(edges[:-1], busy, waiting, wanted, stranded, scattered)


COLUMNS: tuple[str, ...] = (
    "policy", "placement", "seed", "name", "user", "devices", "duration_seconds", "submit_seconds", "start_seconds",
    "finish_seconds", "completion_seconds", "wait_seconds", "run_seconds", "overhead_seconds", "preemptions",
    "migrations",
)  # fmt: skip
"""The columns of `write_csv`."""


def write_csv(replays: Sequence[tuple[int, Replay]], path: str | Path) -> None:
    """A row for every job of each (seed, run), as `COLUMNS` says. Raises FileError."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for seed, replay in replays:
        for at, name in enumerate(replay.names):
            row: list[Any] = [replay.policy, replay.placement, seed, name, replay.users[at], int(replay.devices[at])]
            columns = (
                replay.durations, replay.submitted, replay.started, replay.finish, replay.completion, replay.waited,
                replay.ran, replay.overhead,
            )  # fmt: skip
            row += [_plain(float(column[at])) for column in columns]
            writer.writerow([*row, int(replay.preemptions[at]), int(replay.migrations[at])])
    write_atomically(path, out.getvalue())


def _plain(value: float) -> str:
    return "" if math.isnan(value) else repr(value)
