"""From a script to a trained model: trace, find the machines, plan, launch, and put predicted beside measured.

One function for each step, so that `headway plan` and `headway predict` stop where they should, and `run` for all.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import torch

from headway.errors import FileError, HeadwayError, InputError, Interrupted
from headway.hardware.catalog import load_cluster
from headway.hardware.cluster import Cluster
from headway.hardware.probe import probe
from headway.memory.preflight import check_here
from headway.plan.plan import Plan
from headway.predict.measure import measure_workload
from headway.predict.measured import MeasuredTimes
from headway.predict.prediction import Prediction
from headway.predict.profile import Profile
from headway.predict.step import Predictor, check_fit
from headway.search.find import Constraints, Goal, Ranking
from headway.search.methods import find_by
from headway.train.launch import check_options, launch
from headway.train.remote_memory import transfer_buffer_bytes
from headway.train.source import find_workload
from headway.train.support import check_supported
from headway.train.tier_store import tier_directory
from headway.value import Value, read_text
from headway.workload.graph import Workload

__all__ = ["Measured", "RunRecord", "RunResult", "Watcher", "compare", "find_cluster", "plan_workload", "run"]


class Watcher(Protocol):
    """Who looks on: the command line shows what happens, a test notes it."""

    def stage(self, text: str) -> None:
        """A new phase of the work begins."""

    def traced(self, workload: Workload) -> None: ...

    def probed(self, cluster: Cluster) -> None: ...

    def planned(self, plan: Plan, prediction: Prediction, ranking: Ranking | None) -> None: ...

    def event(self, event: dict[str, Any]) -> None:
        """A rank reports (see `train.events`)."""

    def output(self, rank: int, stream: str, line: str) -> None:
        """A rank printed a line."""


class RunRecord(Value):
    """`run.json`: how the run was started and how it ended."""

    script: str
    arguments: tuple[str, ...] = ()
    engine: str = "local"
    cluster: str = "local"
    started: str = ""
    finished: str = ""
    outcome: str = "running"  # "running", "finished", "interrupted" or "failed"
    message: str = ""
    resumed_from: str = ""


class Measured(msgspec.Struct, frozen=True):
    """`measured.json`, as far as it is compared with the prediction. Seconds and bytes."""

    time: dict[str, float]
    peak_bytes: tuple[float, ...]
    samples_per_second: float = 0.0
    steps: int = 0


class RunResult(Value):
    """What a run leaves behind, and how well it was predicted."""

    directory: str
    plan: Plan
    prediction: Prediction
    measured: Measured | None
    final_loss: float | None = None


def find_cluster(
    specification: str,
    devices: int | None = None,
    *,
    refresh: bool = False,
    progress: Callable[[str], None] | None = None,
    exchange: Literal["torch", "headway"] = "torch",
) -> Cluster:
    """The cluster that a specification names (`local`, a preset, a file), cut to so many devices if given.

    `local` with a number of devices is probed with that many processes: their speed depends on how many share the
    machine; `exchange` says whose collectives are measured. Raises ClusterError, FileError or FieldError.
    """
    if specification == "local":
        return probe(count=devices, refresh=refresh, progress=progress, exchange=exchange).cluster
    cluster = load_cluster(specification)
    return cluster if devices is None else cluster.subset(devices)


def plan_workload(
    workload: Workload,
    cluster: Cluster,
    *,
    goal: Goal = "time",
    constraints: Constraints | None = None,
    devices: int | None = None,
    keep: int = 5,
    method: str = "exact",
    budget_seconds: float | None = None,
    seed: int = 0,
    measured: MeasuredTimes | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Ranking, Profile | None]:
    """Search plans for a workload; on a probed machine with its operators measured first, unless times are given.

    `method`, `budget_seconds`, `seed`: as for `search.methods.find_by`.
    The search may leave devices idle where that is faster; with `devices` given it uses exactly so many.
    """
    profile = measure_operators(workload, cluster) if measured is None else None
    ranking = find_by(
        method,
        workload,
        cluster,
        goal=goal,
        devices=devices,
        constraints=constraints or Constraints(),
        profile=profile,
        measured=measured,
        keep=keep,
        budget_seconds=budget_seconds,
        seed=seed,
        progress=progress,
    )
    return ranking, profile


def measure_operators(
    workload: Workload, cluster: Cluster, *, micro_batches: Sequence[int] = (), degrees: Sequence[int] = ()
) -> Profile | None:
    """Times of the workload's operators on this machine; None where the cluster is a description of another.

    Measured for these micro-batches and tensor-parallel degrees; by default for a few that span what a search tries,
    between which the predictor interpolates.
    """
    if not cluster.fingerprint or not cluster.is_homogeneous:
        return None
    return measure_workload(workload, cluster, samples=micro_batches, degrees=degrees)


def run(
    script: str | None,
    arguments: Sequence[str] = (),
    *,
    watcher: Watcher,
    cluster: str = "local",
    devices: int | None = None,
    goal: Goal = "time",
    constraints: Constraints | None = None,
    plan_path: str | None = None,
    engine: str = "local",
    resume: str | None = None,
    name: str | None = None,
    checkpoint_every: int | None = None,
    checkpoint_on: Literal["disk", "remote"] = "disk",
    restarts: int = 0,
    root: Path = Path("runs"),
) -> RunResult:
    """Train a script under the best plan for the machines, or under the plan in `plan_path`.

    `resume` names a run directory (or one of its checkpoints): training goes on from its latest checkpoint, by default
    with the script, the arguments and the plan of that run. Everything is left in `root`/`name`. `checkpoint_on` and
    `restarts`: as for `train.launch.launch`.
    Raises whatever went wrong as a HeadwayError, with the run directory in good order.
    """
    checkpoint: Path | None = None
    if resume is not None:
        directory, checkpoint = _resumed(Path(resume))
        record = RunRecord.load(directory / "run.json")
        if script is None:
            script, arguments = record.script, record.arguments
        if plan_path is None and devices is None and constraints is None:
            plan_path = str(directory / "plan.json")
    elif script is None:
        raise FileError("no script given", remedy="headway run SCRIPT.py, or headway run --resume runs/NAME")
    else:
        directory = _new_directory(root, name or Path(script).stem, named=name is not None)
    # What cannot work is refused before anything slow begins, and before a folder is made.
    check_options(engine, checkpoint_every=checkpoint_every, checkpoint_on=checkpoint_on, restarts=restarts)
    if not Path(script).is_file():
        raise FileError("no such script", place=script, remedy="give the path of a Python script")
    plan = None
    if plan_path is not None:
        plan = check_supported(Plan.load(plan_path).validate(place=str(plan_path)), place=str(plan_path))
    directory.mkdir(parents=True, exist_ok=True)
    record = RunRecord(
        script=script, arguments=tuple(arguments), engine=engine, cluster=cluster, started=_now(),
        resumed_from=str(checkpoint or ""),
    )  # fmt: skip
    try:
        record.save(directory / "run.json")
        watcher.stage(f"Tracing {script}")
        workload = find_workload(script, arguments, on_output=watcher.output, scratch=directory)
        watcher.traced(workload)
        if constraints is not None and constraints.precision is not None:
            workload = msgspec.structs.replace(workload, precision=constraints.precision)
        if plan is not None and devices is None:
            devices = plan.world_size
        watcher.stage("Probing this machine" if cluster == "local" else f"Reading {cluster}")
        exchange = plan.exchange if plan is not None else constraints.exchange if constraints is not None else "torch"
        machines = find_cluster(cluster, devices, progress=watcher.stage, exchange=exchange)
        watcher.probed(machines)
        ranking: Ranking | None = None
        if plan is None:
            watcher.stage("Measuring operators and searching plans" if machines.fingerprint else "Searching plans")
            ranking, profile = plan_workload(workload, machines, goal=goal, constraints=constraints, devices=devices)
            plan, prediction = ranking.best[0].plan, ranking.best[0].prediction
            ranking.save(directory / "ranking.json")
        else:
            plan.validate(workload.graph, machines, place=str(plan_path))
            watcher.stage("Measuring operators" if machines.fingerprint else "Predicting")
            profile = measure_operators(
                workload, machines, micro_batches=[plan.micro_batch], degrees=sorted({1, plan.tensor})
            )
            prediction = Predictor(workload, machines, profile).predict(plan)
        check_fit(prediction, plan, machines)
        if engine == "local":
            check_here(
                plan, workload, machines, directory=tier_directory(), buffer_bytes=transfer_buffer_bytes(),
                remote_checkpoints=checkpoint_on == "remote",
            )  # fmt: skip
        _check_is_here(plan, machines, engine)
        workload.save(directory / "workload.json")
        machines.save(directory / "cluster.json")
        plan.save(directory / "plan.json")
        prediction.save(directory / "prediction.json")
        predicted_timeline = Predictor(workload, machines, profile).timeline(plan)
        predicted_timeline.save_chrome(str(directory / "predicted_timeline.json"))
        watcher.planned(plan, prediction, ranking)
        watcher.stage(f"Training on {plan.world_size} {'rank' if plan.world_size == 1 else 'ranks'}")
        launch(
            Path(script),
            arguments,
            plan,
            run_directory=directory,
            workload_path=directory / "workload.json",
            plan_path=directory / "plan.json",
            cluster=machines,
            engine=engine,  # type: ignore[arg-type]
            resume=checkpoint,
            checkpoint_every=checkpoint_every,
            checkpoint_on=checkpoint_on,
            restarts=restarts,
            on_event=watcher.event,
            on_output=watcher.output,
        )
    except BaseException as error:
        outcome = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        message = str(error) if isinstance(error, HeadwayError) else repr(error)
        _close(record, directory, outcome, message)
        raise
    _close(record, directory, "finished", "")
    return RunResult(
        directory=str(directory), plan=plan, prediction=prediction, measured=read_measured(directory),
        final_loss=_final_loss(directory),
    )  # fmt: skip


def _check_is_here(plan: Plan, cluster: Cluster, engine: str) -> None:
    """Refuse to start on this machine what was planned for others. Raises InputError."""
    if engine != "local":
        return
    planned = set(plan.devices)
    devices = [device for device in cluster.devices if device.name in planned]
    nodes = {device.node for device in devices}
    if len(nodes) > 1:
        raise InputError(
            f"the plan is for {len(nodes)} machines, and local processes run on this one",
            place=cluster.name,
            remedy="add --engine ray on a Ray cluster of those machines, or plan for one with --devices",
        )
    on_gpus = [device for device in devices if cluster.accelerators[device.accelerator].torch_device == "cuda"]
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(on_gpus) > here and os.environ.get("HEADWAY_DEVICE") != "cpu":
        raise InputError(
            f"the plan is for {len(on_gpus)} GPUs ({on_gpus[0].accelerator}), and this machine has {here}",
            place=cluster.name,
            remedy="run it there; or set HEADWAY_DEVICE=cpu to carry the plan out on CPU processes here, only slower",
        )


def _close(record: RunRecord, directory: Path, outcome: str, message: str) -> None:
    msgspec.structs.replace(record, outcome=outcome, message=message, finished=_now()).save(directory / "run.json")


def read_measured(directory: Path) -> Measured | None:
    """What the ranks of a run measured, or None if it ended before they could say."""
    path = directory / "measured.json"
    if not path.exists():
        return None
    return msgspec.json.decode(read_text(path), type=Measured)


def _final_loss(directory: Path) -> float | None:
    path = directory / "metrics.jsonl"
    if not path.exists():
        return None
    lines = read_text(path).splitlines()
    losses = [json.loads(line)["loss"] for line in lines[-10:]]
    return sum(losses) / len(losses) if losses else None


def compare(prediction: Prediction, measured: Measured) -> list[dict[str, Any]]:
    """Rows `{quantity, unit, predicted, measured, error}`; error is relative to the measured, None where that is 0."""
    rows = []

    def row(quantity: str, unit: str, predicted: float, actual: float) -> None:
        error = (predicted - actual) / actual if actual > 0 else None
        rows.append({"quantity": quantity, "unit": unit, "predicted": predicted, "measured": actual, "error": error})

    predicted_time = msgspec.to_builtins(prediction.time)
    for field in ("step", "compute", "communication", "bubble", "optimizer"):
        row(f"{field} time", "seconds", predicted_time[f"{field}_seconds"], measured.time[f"{field}_seconds"])
    for rank, (memory, peak) in enumerate(zip(prediction.memory, measured.peak_bytes)):
        row(f"peak memory of rank {rank}", "bytes", memory.total_bytes, peak)
    return rows


def _new_directory(root: Path, name: str, *, named: bool) -> Path:
    if named:
        directory = root / name
        if (directory / "run.json").exists():
            raise FileError(
                "there is already a run of that name",
                place=str(directory),
                remedy=f"headway run --resume {directory}, or choose another --name",
            )
        return directory
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    directory = root / f"{name}-{stamp}"
    number = 2
    while directory.exists():
        directory = root / f"{name}-{stamp}-{number}"
        number += 1
    return directory


def _resumed(path: Path) -> tuple[Path, Path]:
    """(run directory, checkpoint) that `--resume` names."""
    if path.name.startswith("step-") and path.parent.name == "checkpoint":
        directory, checkpoint = path.parent.parent, path
    else:
        directory = path
        pointer = directory / "checkpoint" / "latest"
        if not pointer.exists():
            raise FileError(
                "has no checkpoint to resume from" if directory.exists() else "no such run",
                place=str(path),
                remedy="name a folder under runs/ that has checkpoint/latest",
            )
        checkpoint = directory / "checkpoint" / read_text(pointer).strip()
    if not checkpoint.is_dir():
        raise FileError("no such checkpoint", place=str(checkpoint), remedy=f"one of: {os.listdir(checkpoint.parent)}")
    return directory, checkpoint


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
