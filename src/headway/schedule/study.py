"""Several policies, placements and seeds of one trace, side by side: in this process, in others, or on Ray.

A `Case` says what to play; `play_cases` plays each by `headway.schedule.fast.run`, and gives their figures back in the
order of the cases. A seed of 0 is the trace as it is; any other varies it, in one of three ways (`VARIATIONS`):
"resample" draws its days again, "jitter" delays each submission by up to an hour, and "draw" is for synthetic traces,
which the caller draws with the seed.
"""

from __future__ import annotations

import concurrent.futures
import csv
import io
import logging
import math
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from headway.errors import FieldError, InputError, MissingExtraError
from headway.hardware.cluster import Cluster
from headway.schedule.fast.engine import run
from headway.schedule.fleet import Fleet, fleet_of_cluster, parse_fleet, uniform_fleet
from headway.schedule.job import ModelProfile
from headway.schedule.pace import Overhead, Pace, PlacementCosts
from headway.schedule.placement.cost import PlacementCost
from headway.schedule.placement.pairs import PairSpeeds
from headway.schedule.placement.rules import make_placement
from headway.schedule.policies.catalog import make_policy
from headway.schedule.summary import Replay, Summary, summarise
from headway.schedule.traces.read import Trace
from headway.schedule.traces.synthetic import jitter, resample
from headway.value import Value, read_text

__all__ = [
    "BACKENDS",
    "PLACEMENT_COSTS",
    "VARIATIONS",
    "Case",
    "Played",
    "cases_of",
    "find_fleet",
    "find_machines",
    "play_cases",
    "vary",
]

BACKENDS = ("processes", "ray")
PLACEMENT_COSTS = ("parameter-server", "all-reduce", "published", "none")
"""What being on several nodes costs a job whose model is known: predicted for the very placement, with parameter
servers or all-reduce; one published factor for each model, wherever it is spread (Tiresias's figure 3); nothing."""
VARIATIONS = ("resample", "jitter", "draw")
_JITTER_SECONDS = 3600.0
_SWITCHES = ("num_switch", "num_node_p_switch", "num_gpu_p_node")


class Case(Value):
    """One run: which policy and placement, which seed (of the trace's variation and of random placement), and rules.

    `thresholds` in device-seconds (empty: the policy's own), `promote_knob`, `quantum_seconds` (0: the policy's own),
    `patience_seconds` (0: the policy's own; below 0: endless), `overhead` of preemption, `engine` as in
    `headway.schedule.fast.ENGINES`. `placement_cost`: one of `PLACEMENT_COSTS`. `keep`: keep segments, which pictures
    need.
    """

    policy: str
    placement: str = "consolidated"
    seed: int = 0
    thresholds: tuple[float, ...] = ()
    promote_knob: float = 0.0
    quantum_seconds: float = 0.0
    patience_seconds: float = 0.0
    overhead: Overhead = Overhead()
    engine: str = "auto"
    placement_cost: str = "parameter-server"
    keep: bool = False


class Played(NamedTuple):
    """A case, its figures, and the whole record."""

    case: Case
    summary: Summary
    replay: Replay


class _Room(NamedTuple):
    """What all cases share."""

    traces: Mapping[int, Trace]
    fleet: Fleet
    profiles: Mapping[str, ModelProfile]
    history: Sequence[float]
    costs: Mapping[str, PlacementCosts | None]
    pairs: PairSpeeds | None


def find_fleet(spec: str) -> Fleet:
    """The fleet of `find_machines`."""
    return find_machines(spec)[0]


def find_machines(spec: str) -> tuple[Fleet, Cluster | None]:
    """A fleet as a word (`n256g8`), a cluster file of Tiresias's (`.csv`), a preset or a file of ours; and its links,
    where they are known, of the same nodes in the same order.

    Raises InputError, FileError, FieldError, ClusterError.
    """
    if re.fullmatch(r"n[0-9]+g[0-9]+(r[0-9]+)?", spec):
        return parse_fleet(spec), None
    if spec.lower().endswith(".csv"):
        return _tiresias_fleet(spec), None
    from headway.hardware.catalog import load_cluster

    cluster = load_cluster(spec)
    return fleet_of_cluster(cluster), cluster


def _tiresias_fleet(path: str) -> Fleet:
    rows = list(csv.DictReader(io.StringIO(read_text(path))))
    if len(rows) != 1 or any(not (rows[0].get(name) or "").strip().isdigit() for name in _SWITCHES):
        raise FieldError(
            "is no cluster of Tiresias's", place=path, remedy=f"one row with the columns {', '.join(_SWITCHES)}"
        )
    switches, nodes, devices = (int(rows[0][name]) for name in _SWITCHES)
    return uniform_fleet(switches * nodes, devices, rack=nodes, name=Path(path).stem)


def vary(trace: Trace, seed: int, variation: str) -> Trace:
    """The trace that a seed stands for; 0: itself. Raises InputError for an unknown variation."""
    if variation not in VARIATIONS:
        raise InputError(f"no variation {variation!r}", place="seeds", remedy=f"one of {', '.join(VARIATIONS)}")
    if seed == 0 or variation == "draw":
        return trace
    return resample(trace, seed) if variation == "resample" else jitter(trace, seed, _JITTER_SECONDS)


def cases_of(
    policies: Sequence[str], placements: Sequence[str], seeds: Sequence[int], pattern: Case | None = None
) -> list[Case]:
    """Every policy on every placement with every seed; all else as in `pattern`.

    Only the first seed keeps segments, if the pattern does. YARN's capacity scheduler waits for as few nodes as
    possible, so it has strict consolidation where others have "consolidated" or "skew".
    """
    fields = (pattern or Case(policy="")).to_builtins()
    made = []
    for policy in policies:
        for placement in placements:
            strict = policy == "yarn" and placement in ("consolidated", "skew")
            own = "consolidated-strict" if strict else placement
            for seed in seeds:
                fields |= {"policy": policy, "placement": own, "seed": seed}
                keep = bool(pattern and pattern.keep and seed == seeds[0])
                made.append(Case(**{**fields, "keep": keep, "overhead": (pattern or Case(policy="")).overhead}))
    return made


def play_case(case: Case, room: _Room) -> Played:
    """Play one case. Raises InputError for a policy or a placement that there isn't."""
    policy = make_policy(
        case.policy, history=list(room.history), thresholds=case.thresholds or None, promote_knob=case.promote_knob,
        quantum_seconds=case.quantum_seconds or None, profiles=room.profiles,
    )  # fmt: skip
    placement = make_placement(case.placement, profiles=room.profiles, seed=case.seed)
    replay = run(
        room.traces[case.seed], room.fleet, policy, placement,
        pace=Pace(
            room.fleet, room.profiles, spread=case.placement_cost != "none", costs=room.costs.get(case.placement_cost),
            pairs=room.pairs,
        ),
        overhead=case.overhead,
        patience_seconds=_patience(case), engine=case.engine, keep_segments=case.keep,
    )  # fmt: skip
    # As the case names them, but for a simulator that places nothing: it counts.
    placement = replay.placement if case.engine == "tiresias" else case.placement
    replay = replay._replace(policy=case.policy, placement=placement)
    return Played(case, summarise(replay, seed=case.seed), replay)


def _patience(case: Case) -> float | None:
    return math.inf if case.patience_seconds < 0 else case.patience_seconds or None


_ROOM: list[_Room] = []  # of a worker process: set once, when it starts, so that traces travel once


def _enter(room: _Room) -> None:
    _ROOM[:] = [room]


def _play_here(case: Case) -> Played:
    return play_case(case, _ROOM[0])


def play_cases(
    cases: Sequence[Case],
    traces: Mapping[int, Trace],
    fleet: Fleet,
    *,
    profiles: Mapping[str, ModelProfile] | None = None,
    history: Sequence[float] = (),
    workers: int = 0,
    backend: str = "processes",
    progress: Callable[[int, int, Case], None] | None = None,
    cluster: Cluster | None = None,
    pairs: PairSpeeds | None = None,
) -> list[Played]:
    """Play all cases, in the order given; `traces` by seed.

    - `profiles`: of the models that are known; placements cost the others nothing, whatever a case says. `cluster`: the
      links of the fleet's nodes, as `find_machines` gave them, by which the cost of placements is predicted. `pairs`:
      measured speeds of jobs that share devices, for Gandiva's packing.
    - `history`: services of past jobs in device-seconds, for the policies that need one.
    - `workers`: processes; 0: one for each core that this process may use, 1: this process.
    - `backend`: one of `BACKENDS`; Ray runs the cases wherever it is connected to. Raises MissingExtraError without it.
    - `progress(done, all, case)` is called after each case, in the order in which they end.
    """
    if backend not in BACKENDS:
        raise InputError(f"no backend {backend!r}", place="study", remedy=f"one of {', '.join(BACKENDS)}")
    for case in cases:
        if case.placement_cost not in PLACEMENT_COSTS:
            raise InputError(
                f"no placement cost {case.placement_cost!r}", place="study",
                remedy=f"one of {', '.join(PLACEMENT_COSTS)}",
            )  # fmt: skip
    costs = _costs({case.placement_cost for case in cases}, traces, fleet, profiles or {}, cluster)
    room = _Room(dict(traces), fleet, dict(profiles or {}), tuple(history), costs, pairs)
    for case in cases:
        if case.seed not in room.traces:
            raise InputError(f"there is no trace for seed {case.seed}", place="study", remedy="give one for each seed")
    found: dict[int, Played] = {}
    steps = _on_ray(cases, room) if backend == "ray" else _in_processes(cases, room, workers)
    for at, played in steps:
        found[at] = played
        if progress is not None:
            progress(len(found), len(cases), played.case)
    return [found[at] for at in range(len(cases))]


def _costs(
    wanted: Collection[str],
    traces: Mapping[int, Trace],
    fleet: Fleet,
    profiles: Mapping[str, ModelProfile],
    cluster: Cluster | None,
) -> dict[str, PlacementCosts | None]:
    """What is predicted once for all processes: of the models of the traces, for each of the wanted architectures."""
    models = {job.model for trace in traces.values() for job in trace.jobs if job.devices > 1} & set(profiles)
    found: dict[str, PlacementCosts | None] = {}
    for architecture in ("parameter-server", "all-reduce"):
        if architecture in wanted:
            # Of models that nothing is known of, nothing is predicted either; the published factors are not asked for.
            found[architecture] = PlacementCost(fleet, {}, ports=[1.0] * len(fleet.nodes))
            if models:
                # Imported late: predicting compute needs torch, and most traces name no model.
                from headway.schedule.placement.prediction import predict_placement_cost

                predicted = predict_placement_cost(fleet, models, cluster, architecture=architecture)
                found[architecture] = predicted or found[architecture]
    return found


def _in_processes(cases: Sequence[Case], room: _Room, workers: int) -> Iterator[tuple[int, Played]]:
    count = min(workers or len(os.sched_getaffinity(0)), len(cases))
    if count <= 1:
        for at, case in enumerate(cases):
            yield at, play_case(case, room)
        return
    # Fresh processes: this one may have threads, which a fork does not survive in good order.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(count, context, _enter, (room,)) as pool:
        try:
            # Processes start as cases are handed in. Ctrl-C is for this process alone, which ends them; they would
            # print where it found them.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                waiting = {pool.submit(_play_here, case): at for at, case in enumerate(cases)}
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for future in concurrent.futures.as_completed(waiting):
                yield waiting[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def _on_ray(cases: Sequence[Case], room: _Room) -> Iterator[tuple[int, Played]]:
    # Headway reports nothing to anybody; neither shall the Ray that it starts.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise MissingExtraError(library="ray", extra="ray", place="--engine ray") from None
    own = not ray.is_initialized()
    if own:
        address = os.environ.get("RAY_ADDRESS")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if not address:
            # Nobody else needs to reach it.
            options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.2", "num_cpus": os.cpu_count()}
        ray.init(address=address or "local", **options)
    try:
        remote: Any = ray.remote(num_cpus=1)(play_case)
        shared = ray.put(room)
        waiting = {remote.remote(case, shared): at for at, case in enumerate(cases)}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            try:
                yield waiting.pop(done), ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, Exception) else error from None
    finally:
        if own:
            ray.shutdown()
