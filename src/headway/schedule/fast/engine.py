"""A trace through the scheduler, fast: the compiled twin where it knows the rules, the pure machine everywhere else.

    >>> replay = run(trace, parse_fleet("n256g8"), make_policy("2d-las"), Consolidated(), engine="fast")
    >>> summarise(replay).completion_mean

`headway.schedule.scheduler` stays the single source of truth: the twin (`kernels.py`) must give the same bits, and
says no (`why_not`) where it doesn't know a rule: fleets of several kinds, jobs that name kinds or are elastic, policies
that share or resize.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np

from headway.errors import InputError
from headway.schedule.fast.costs import cost_table
from headway.schedule.fast.kernels import play_compiled
from headway.schedule.fast.places import PLACES
from headway.schedule.fast.story import JOB, ORDERS, RUN
from headway.schedule.fleet import Fleet
from headway.schedule.job import Job
from headway.schedule.pace import Overhead, Pace
from headway.schedule.placement.cost import PlacementCost
from headway.schedule.placement.rules import BestFit, Consolidated, FirstFit, Placement, Random, SkewBased
from headway.schedule.policies.fifo import Fifo, FirstFitFifo, YarnCapacity
from headway.schedule.policies.gandiva import Gandiva
from headway.schedule.policies.headway import HeadwayPolicy
from headway.schedule.policies.history import BINS, group_rows
from headway.schedule.policies.ordering import Policy
from headway.schedule.policies.shortest import (
    ShortestJobFirst,
    ShortestRemainingServiceFirst,
    ShortestRemainingTimeFirst,
    SmallestFirst,
)
from headway.schedule.policies.tiresias import DiscretisedGittins, DiscretisedLas, Las, TwoDimensionalLas
from headway.schedule.replay import Outcome, play
from headway.schedule.summary import Replay
from headway.schedule.tiresias_compatible import play_policy
from headway.schedule.traces.read import Trace

__all__ = ["ENGINES", "replay_of", "run", "why_not"]

ENGINES = ("auto", "fast", "pure", "tiresias")
"""What carries a run out: the twin where it can, the twin or an error, the pure machine; or, for comparison, the ways
of Tiresias's public simulator (tiresias_compatible.py), which counts devices, whatever the placement."""

# By exact type: a subclass may mean something else by the same name.
_ORDER_OF: dict[type[Policy], str] = {
    Fifo: "fixed",
    FirstFitFifo: "fixed",
    YarnCapacity: "fixed",
    SmallestFirst: "fixed",
    ShortestJobFirst: "fixed",
    ShortestRemainingTimeFirst: "srtf",
    ShortestRemainingServiceFirst: "srsf",
    Las: "las",
    TwoDimensionalLas: "2d-las-continuous",
    DiscretisedLas: "queues",
    DiscretisedGittins: "queues",
    HeadwayPolicy: "headway",
    Gandiva: "gandiva",
}


def why_not(
    jobs: Sequence[Job],
    fleet: Fleet,
    policy: Policy,
    placement: Placement,
    *,
    pace: Pace | None = None,
    patience_seconds: float = math.inf,
) -> str:
    """Why the compiled twin can't play this; empty: it can."""
    if type(policy) not in _ORDER_OF:
        return f"policy {policy.name} is played by the pure machine only"
    if _place_of(placement) is None:
        return f"placement {placement.name} is played by the pure machine only"
    if isinstance(policy, Gandiva) and patience_seconds < math.inf:
        # Who is overdue and who has had how many slices come apart by ties in rare traces.
        return "gandiva with a patience is played by the pure machine only"
    if len(set(fleet.classes)) > 1:
        return "the fleet has nodes of several kinds"
    if pace is not None and (type(pace) is not Pace or pace.scaling):
        return "speeds come from measured scaling"
    costs = pace.costs if pace is not None and pace.spread else None
    if costs is not None and not (isinstance(costs, PlacementCost) and costs.by_traffic):
        return "what a placement costs is not predicted by the traffic of nodes that are alike"
    for job in jobs:
        if job.kinds or job.memory_bytes:
            return f"job {job.name} names kinds or memory"
        if isinstance(policy, HeadwayPolicy) and 0 < job.minimum_devices < job.devices:
            return f"job {job.name} is elastic"
        if isinstance(policy, Gandiva) and _may_move(job, policy, pace):
            return f"gandiva may move or pack {job.model}"
        if job.devices > fleet.devices:
            return f"job {job.name} is larger than the fleet"
    return ""


def _may_move(job: Job, policy: Gandiva, pace: Pace | None) -> bool:
    """Whether Gandiva might pack or migrate it: the twin does neither."""
    if job.model in policy.profiles or (pace is not None and job.model in pace.profiles):
        return True
    if pace is not None and pace.pairs is not None and job.model in pace.pairs.models:
        return True
    costs = pace.costs if pace is not None else None
    return isinstance(costs, PlacementCost) and job.model in costs.models


def _place_of(placement: Placement) -> str | None:
    if type(placement) is Consolidated:
        return "consolidated-strict" if placement.strict else "consolidated"
    names: dict[type[Placement], str] = {
        FirstFit: "first-fit", BestFit: "best-fit", Random: "random", SkewBased: "skew",
    }  # fmt: skip
    return names.get(type(placement))


def run(
    trace: Trace,
    fleet: Fleet,
    policy: Policy,
    placement: Placement,
    *,
    pace: Pace | None = None,
    overhead: Overhead | None = None,
    patience_seconds: float | None = None,
    engine: str = "auto",
    keep_segments: bool = False,
) -> Replay:
    """Play a trace on an empty fleet to the end, job by job in the order of the trace.

    `engine`: one of `ENGINES`; "fast" raises InputError where the twin can't. Jobs larger than the fleet are refused at
    submission by the pure machine and named in `Replay.refused`.
    """
    if engine not in ENGINES:
        raise InputError(f"no engine {engine!r}", place="simulate cluster", remedy=f"one of {', '.join(ENGINES)}")
    begun = time.perf_counter()
    if engine == "tiresias":
        if overhead not in (None, Overhead()) or patience_seconds not in (None, math.inf):
            raise InputError("knows neither overhead nor patience", place="engine tiresias", remedy="leave them out")
        if len(fleet.devices_by_kind) > 1 or any(job.kinds for job in trace.jobs):
            raise InputError("knows one kind of device", place="engine tiresias", remedy="take another engine")
        outcome = play_policy(trace.jobs, fleet.devices, policy)
        replay = replay_of(trace, fleet, outcome, seconds=time.perf_counter() - begun)
        return replay._replace(policy=policy.name, engine=engine)
    patience = policy.patience_seconds if patience_seconds is None else patience_seconds
    if not patience > 0:
        raise InputError(f"patience of {patience} s", place="scheduler", remedy="above 0")
    reason = "asked for" if engine == "pure" else why_not(
        trace.jobs, fleet, policy, placement, pace=pace, patience_seconds=patience
    )  # fmt: skip
    if reason and engine == "fast":
        raise InputError(reason, place="engine fast", remedy="take engine auto or pure")
    if reason:
        outcome = play(
            trace.jobs, fleet, policy, placement, pace=pace, overhead=overhead, patience_seconds=patience,
            keep_segments=keep_segments,
        )  # fmt: skip
        return replay_of(trace, fleet, outcome, seconds=time.perf_counter() - begun)
    return _compiled(
        trace, fleet, policy, placement, pace or Pace(fleet), overhead or Overhead(), patience, keep_segments, begun
    )


def _compiled(
    trace: Trace,
    fleet: Fleet,
    policy: Policy,
    placement: Placement,
    pace: Pace,
    overhead: Overhead,
    patience_seconds: float,
    keep: bool,
    begun: float,
) -> Replay:
    order = _ORDER_OF[type(policy)]
    place = _place_of(placement)
    assert place is not None
    # Numbers are places in the order of submission; equal times as the rows stand.
    in_turn = sorted(range(len(trace.jobs)), key=lambda row: (trace.jobs[row].submit_seconds, row))
    ordered = [trace.jobs[row] for row in in_turn]
    jobs = _rows(ordered, fleet, policy, placement, pace, overhead)
    racks: dict[str, int] = {}
    rack_of = np.array([racks.setdefault(node.rack, len(racks)) for node in fleet.nodes], dtype=np.int64)
    node_devices = np.array([node.devices for node in fleet.nodes], dtype=np.int64)
    rules = np.zeros(1, dtype=RUN)
    own = rules[0]
    own["order"], own["place"] = ORDERS.index(order), PLACES.index(place)
    own["preemptive"], own["head_blocks"] = policy.preemptive, policy.head_blocks
    own["quantum"], own["knob"] = policy.quantum_seconds, policy.promote_knob
    own["seed"] = placement.seed & 0xFFFFFFFFFFFFFFFF if isinstance(placement, Random) else 0
    own["patience"] = patience_seconds
    costs, jobs["cost"] = cost_table(ordered, fleet, pace, racks)
    own["racks"], own["largest_node"], own["keep"] = len(racks), node_devices.max(), keep
    rows, history, bounds = np.zeros((1, 1), dtype=np.int64), np.zeros((1, BINS)), np.array(policy.thresholds or (0.0,))
    if isinstance(policy, HeadwayPolicy):
        own["weight"], own["memory"] = policy.history.weight, policy.history.memory
        rows, groups = group_rows(ordered)
        history = policy.history.table(ordered, rows, groups)
    room = int((jobs["offset"][-1] + min(ordered[-1].devices, len(fleet.nodes))) if ordered else 0)
    log = np.empty((2 * len(ordered) if keep else 0, 5))
    bins = np.array(policy.thresholds, dtype=np.float64)
    decisions, _, segments = play_compiled(
        jobs, node_devices, rack_of, rules, bins, _ranks(policy), rows, history,
        bounds, np.zeros(room, dtype=np.int64), np.zeros(room, dtype=np.int64), log, costs,
    )  # fmt: skip
    back = np.empty(len(ordered), dtype=np.int64)
    back[in_turn] = np.arange(len(ordered))
    if keep and len(segments):
        segments[:, 0] = np.array(in_turn, dtype=np.float64)[segments[:, 0].astype(np.int64)]
    jobs = jobs[back]
    return Replay(
        policy=policy.name, placement=placement.name, trace=trace.name, engine="fast",
        names=tuple(job.name for job in trace.jobs), users=tuple(job.user or job.queue for job in trace.jobs),
        devices=jobs["devices"], durations=jobs["duration"], submitted=jobs["submit"], started=jobs["started"],
        finish=jobs["finish"], ran=jobs["ran"], waited=jobs["waited"], overhead=jobs["overhead"],
        useful=jobs["service"], overhead_service=jobs["overhead_service"], preemptions=jobs["preemptions"],
        migrations=jobs["migrations"], segments=segments, node_devices=tuple(int(count) for count in node_devices),
        decisions=decisions, seconds=time.perf_counter() - begun,
    )  # fmt: skip


def _rows(
    ordered: list[Job], fleet: Fleet, policy: Policy, placement: Placement, pace: Pace, overhead: Overhead
) -> np.ndarray:
    jobs = np.zeros(len(ordered), dtype=JOB)
    jobs["submit"] = [job.submit_seconds for job in ordered]
    jobs["duration"] = [job.duration_seconds for job in ordered]
    jobs["devices"] = [job.devices for job in ordered]
    jobs["started"], jobs["finish"], jobs["crossing"] = -1.0, np.nan, np.inf
    kind = fleet.nodes[0].kind
    base = [job.throughputs.get(kind, 1.0) if job.throughputs else 1.0 for job in ordered]
    profiles = [pace.profile(job) for job in ordered]
    published = pace.spread and pace.costs is None
    slowdown = [profile.spread_slowdown if profile and published else 1.0 for profile in profiles]
    jobs["base"] = base
    jobs["spread"] = [rate / slow for rate, slow in zip(base, slowdown, strict=True)]
    jobs["fewest"] = [fleet.fewest_nodes(job, job.devices) for job in ordered]
    costs = [
        [overhead.start(job, profile, resumed=resumed) for job, profile in zip(ordered, profiles, strict=True)]
        for resumed in (False, True)
    ]
    jobs["first_cost"], jobs["resume_cost"] = costs
    if isinstance(placement, SkewBased):
        jobs["strict"] = [placement.consolidates(job) for job in ordered]
    room = np.minimum(jobs["devices"], len(fleet.nodes))
    jobs["offset"] = np.concatenate(([0], np.cumsum(room)[:-1])) if ordered else 0
    if isinstance(policy, SmallestFirst):
        jobs["fixed_key"] = jobs["devices"]
    elif isinstance(policy, ShortestJobFirst):
        jobs["fixed_key"] = jobs["duration"]
    return jobs


def _ranks(policy: Policy) -> np.ndarray:
    """For each queue its place in the order of queues."""
    queues = range(len(policy.thresholds) + 1)
    if not isinstance(policy, DiscretisedGittins):
        return np.arange(len(policy.thresholds) + 1, dtype=np.float64)
    order = sorted(queues, key=lambda queue: (-policy.ranks[queue], queue))
    ranks = np.empty(len(order))
    ranks[order] = np.arange(len(order), dtype=np.float64)
    return ranks


def replay_of(trace: Trace, fleet: Fleet, outcome: Outcome, *, seconds: float = 0.0) -> Replay:
    """What the pure machine made of a trace, as the columns that figures and pictures are made of."""
    jobs = outcome.jobs

    def column(field: str, kind: type = float) -> np.ndarray:
        return np.array([getattr(job, field) for job in jobs], dtype=kind)

    finish = column("finish_seconds")
    place = {job.name: at for at, job in enumerate(jobs)}
    rows = [
        (place[segment.job], segment.begin, segment.end, fleet.position[share.node], len(share.devices))
        for segment in outcome.segments
        if not segment.shared_with
        for share in segment.shares
    ]
    return Replay(
        policy=outcome.policy, placement=outcome.placement, trace=trace.name, engine="pure",
        names=tuple(job.name for job in jobs), users=tuple(job.user or job.queue for job in trace.jobs),
        devices=column("devices", int), durations=column("duration_seconds"), submitted=column("submit_seconds"),
        started=column("start_seconds"), finish=np.where(finish < 0, np.nan, finish), ran=column("run_seconds"),
        waited=column("wait_seconds"), overhead=column("overhead_seconds"), useful=column("service_seconds"),
        overhead_service=column("overhead_service_seconds"), preemptions=column("preemptions", int),
        migrations=column("migrations", int), segments=np.array(rows, dtype=float).reshape(-1, 5),
        node_devices=tuple(node.devices for node in fleet.nodes), decisions=outcome.decisions, seconds=seconds,
        refused=tuple(job.name for job in jobs if job.refused),
    )  # fmt: skip
