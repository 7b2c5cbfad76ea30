"""Find the best plan for a workload on a cluster, and say why it is that one.

    ranking = find(workload, load_cluster("dgx-a100:2"))
    ranking.best[0].plan, ranking.best[0].prediction

`docs/search.md` says what is searched and why nothing better is missed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import get_args

import msgspec

from headway.errors import DoesNotFitError, FieldError, InputError, PlanError
from headway.hardware.cluster import Cluster
from headway.plan.plan import Plan
from headway.predict.measured import MeasuredTimes
from headway.predict.operators import Shards
from headway.predict.prediction import Memory, Prediction
from headway.predict.profile import Profile
from headway.predict.step import Predictor
from headway.search.exhaustive import Figures, Found, MeshRecord, Misfit, exhaustive_search
from headway.search.ranking import Candidate, Constraints, Goal, Ranking, Rejected
from headway.search.space import Mesh, Space
from headway.units import format_bytes
from headway.workload.graph import Workload

__all__ = ["Candidate", "Constraints", "Goal", "Ranking", "Rejected", "find"]

_KINDS = ("parameters", "gradients", "optimizer", "activations", "communication", "workspace", "outside")
_UNCONSTRAINED = Constraints()
_COMPARED = {"time": "slower", "memory": "more memory", "cost": "dearer"}


def find(
    workload: Workload,
    cluster: Cluster,
    *,
    goal: Goal = "time",
    devices: int | None = None,
    constraints: Constraints = _UNCONSTRAINED,
    profile: Profile | None = None,
    measured: MeasuredTimes | None = None,
    keep: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> Ranking:
    """The best `keep` plans that fit, best first, and why others are not among them.

    `goal`: "time" is the fastest step; "memory" the fewest peak bytes on the fullest device, the faster of equals;
    "cost" the fewest dollars for a step, or device-seconds where a device's price is not known. `devices`: how many to
    use; None: as many of the cluster's as are best for the goal. `profile` and `measured`: times for the predictor.
    `progress` is called with the number of plans settled so far and the number of all plans.

    Raises DoesNotFitError, naming the plan that comes nearest and what it lacks, if no plan fits; PlanError if the
    constraints leave no plan; FieldError if they, or `goal`, mean nothing.
    """
    started = time.perf_counter()
    if goal not in get_args(Goal):
        raise FieldError(f"{goal!r} is no goal", place="goal", remedy=f"one of: {', '.join(get_args(Goal))}")
    if keep < 1:
        raise InputError(f"must be at least 1, not {keep}", place="keep")
    constraints.validate()
    if devices is not None and not 0 < devices <= len(cluster):
        raise InputError(
            f"{devices} devices asked for, and {cluster.name} has {len(cluster)}",
            place="devices",
            remedy="ask for fewer devices, or describe more with --cluster",
        )
    space = Space(workload, cluster, constraints, devices)
    predictor = Predictor(workload, cluster, profile, measured=measured)
    found = exhaustive_search(space, predictor, goal=goal, keep=keep, progress=progress)
    if not found.records:
        raise _no_plan(space, found)
    if not found.best:
        raise _does_not_fit(space, predictor, found)
    for _, candidate in found.best:
        candidate.plan.validate(workload.graph, cluster)
    return Ranking(
        goal=goal,
        best=tuple(candidate for _, candidate in found.best),
        rejected=_rejected(found, space, goal),
        totals=found.totals | ({"impossible degrees": len(found.impossible)} if found.impossible else {}),
        considered=found.considered,
        evaluated=found.evaluated,
        seconds=time.perf_counter() - started,
        history=found.history,
    )


def _no_plan(space: Space, found: Found) -> PlanError:
    fixed = space.constraints.describe() or "no constraints"
    reasons = list(dict.fromkeys(reason for _, reason in found.impossible))
    counts = ", ".join(str(count) for count in space.counts)
    why = "; ".join(reasons[:4]) or f"no degrees like these multiply to {counts} devices"
    return PlanError(
        f"no plan has {fixed}: {why}", place="constraints", remedy="leave one of them open, or change the global batch"
    )


def _does_not_fit(space: Space, predictor: Predictor, found: Found) -> DoesNotFitError:
    misfits = [record.misfit for record in found.records if record.misfit is not None]
    if misfits:
        nearest = min(misfits, key=lambda misfit: misfit.excess_bytes)
        plan, needs = nearest.plan, predictor.memory(nearest.plan)
    else:
        # Bounds alone ruled out everything: the plan that needs least says how far away the machines are.
        least = exhaustive_search(space, predictor, goal="memory", keep=1, limited=False)
        plan, needs = least.best[0][1].plan, least.best[0][1].prediction.memory
    kinds = {device.name: space.cluster.accelerators[device.accelerator] for device in space.cluster.devices}
    fraction = space.constraints.memory_fraction
    lacking = [
        memory.total_bytes - kinds[name].memory_bytes * fraction
        for name, memory in zip(plan.devices, needs, strict=True)
    ]
    rank = max(range(len(lacking)), key=lambda at: lacking[at])
    if lacking[rank] <= 0:
        tiers = needs[rank].tiers
        held = ", ".join(f"{format_bytes(size)} on {tier}" for tier, size in tiers.items())
        raise DoesNotFitError(
            f"no plan for {plan.model} fits; the nearest fits on the devices and needs {held} for rank {rank}, more "
            "than there is",
            place=f"{space.cluster.name}: {plan.describe()}",
            remedy="use more devices or nodes, or moments in fewer bytes",
        )
    memory = needs[rank]
    has = kinds[plan.devices[rank]].memory_bytes
    used = f"{fraction:.0%} of " if fraction < 1 else ""
    giant = _giant_layer(space, predictor, max(kinds[name].memory_bytes * fraction for name in plan.devices))
    # Single precision needs more, not less.
    fixed = msgspec.structs.replace(space.constraints, precision=None).describe()
    remedies = ["use more devices or devices with more memory"]
    if space.constraints.offload == "none":
        remedies.append("states that rest on the host or on disk (headway plan --offload any)")
    if space.workload.global_batch > plan.data:
        remedies.append("a smaller batch")
    if fixed:
        remedies.append(f"leave open what was fixed ({fixed})")
    return DoesNotFitError(
        f"no plan for {plan.model} fits; the nearest needs {format_bytes(memory.total_bytes)} on rank {rank} where "
        f"{used}{format_bytes(has)} can be used: {format_bytes(max(lacking))} too little; "
        f"the largest part is {_largest(memory)}{giant}",
        place=f"{space.cluster.name}: {plan.describe()}",
        remedy=", or ".join(remedies),
    )


def _giant_layer(space: Space, predictor: Predictor, room: float) -> str:
    """Says which layer no device can hold while it computes, however states are divided; "" if there is none."""
    degrees = [degree for degree in range(1, max(space.counts) + 1) if degree == 1 or space.split(degree).blocks]
    split = space.split(max(degrees[-64:]))
    shards = Shards(split.degree, split.blocks) if split.blocks else Shards()
    sizes = [predictor.sizes.parameters(at, at + 1, shards).bytes for at in range(space.layers)]
    largest = max(range(space.layers), key=lambda at: sizes[at])
    if sizes[largest] <= room:
        return ""
    name = space.workload.graph.layers[largest].name
    whole = predictor.sizes.parameters(largest, largest + 1, Shards()).bytes
    divided = f", divided {split.degree} ways," if sizes[largest] < whole else ""
    return f"; layer {name!r} alone has {format_bytes(sizes[largest])} of parameters{divided} more than any device"


# ------------------------------------------------------------------------------------------------------------ reasons


def _rejected(found: Found, space: Space, goal: Goal) -> tuple[Rejected, ...]:
    """One reason for each mesh of all devices that has no plan among the best, and for the best mesh of fewer devices.

    The nearest come first: of those slower, those that do not fit and those that are impossible, in turn.
    """
    first, best = found.best[0]
    widest = max(space.counts)
    seen: set[tuple[int, ...]] = {
        _key(candidate.plan.world_size, candidate.plan, widest) for _, candidate in found.best
    }
    slower: list[tuple[bool, float, Rejected]] = []
    misfits: list[tuple[bool, float, Rejected]] = []
    # The record of a mesh that knows most: plans that were predicted before those that were only bounded.
    for record in sorted(found.records, key=_knowledge):
        devices = len(record.mesh.placement.devices)
        key = _key(devices, record.mesh, widest)
        if key in seen:
            continue
        seen.add(key)
        if record.best is not None:
            factor, reason = _worse(record, *record.best, first, best, goal)
            slower.append((devices < widest, factor, reason))
        elif record.boundless is not None:
            factor, reason = _worse(record, *record.boundless, first, best, goal)
            reason = msgspec.structs.replace(reason, exact=False, reason=f"at least {reason.reason}")
            slower.append((devices < widest, factor, reason))
        elif record.misfit is not None:
            misfits.append((devices < widest, record.misfit.excess_bytes, _misfit(record.mesh, record.misfit)))
        elif record.open_bound is not None:
            factor, reason = _bounded(record, record.open_bound, first, goal)
            slower.append((devices < widest, factor, reason))
        else:
            misfits.append((devices < widest, record.excess_bytes, _overfull(record)))
    impossible = [
        _impossible(mesh, reason)
        for mesh, reason in {reason: (mesh, reason) for mesh, reason in reversed(found.impossible)}.values()
        if len(mesh.placement.devices) == widest
    ]
    columns = [[entry[2] for entry in sorted(column, key=lambda one: one[:2])] for column in (slower, misfits)]
    columns.append(impossible)
    rows = range(max(map(len, columns)))
    return tuple(column[row] for row in rows for column in columns if row < len(column))


def _key(devices: int, degrees: Plan | Mesh, widest: int) -> tuple[int, ...]:
    if devices != widest:
        return (devices,)
    return (devices, degrees.data, degrees.tensor, degrees.pipeline, degrees.context, degrees.expert)


def _knowledge(record: MeshRecord) -> tuple:
    known = 0 if record.best is not None else 1 if record.boundless or record.misfit is not None else 2
    figures: Figures = record.best[0] if record.best is not None else (record.bound_seconds, 0.0)
    return known, figures


def _summary(mesh: Mesh) -> str:
    degrees = [(name, getattr(mesh, name)) for name in ("data", "tensor", "pipeline", "context", "expert")]
    return " x ".join(f"{name} {degree}" for name, degree in degrees if degree > 1) or "one device"


def _worse(
    record: MeshRecord, figures: Figures, candidate: Candidate, first: Figures, best: Candidate, goal: Goal
) -> tuple[float, Rejected]:
    mesh = record.mesh
    factor = figures[0] / first[0]
    because = _because_memory(candidate, best) if goal == "memory" else _because_time(candidate, best)
    return factor, Rejected(
        summary=candidate.plan.describe(),
        data=mesh.data,
        tensor=mesh.tensor,
        pipeline=mesh.pipeline,
        context=mesh.context,
        expert=mesh.expert,
        kind=_COMPARED[goal],  # type: ignore[arg-type]
        reason=f"{_times(factor, goal)}: {because}",
        factor=factor,
        because=because,
    )


def _bounded(record: MeshRecord, bound: Figures, first: Figures, goal: Goal) -> tuple[float, Rejected]:
    mesh = record.mesh
    factor = bound[0] / first[0]
    devices = len(mesh.placement.devices)
    kind = _COMPARED[goal]
    if goal == "memory":
        because = "parameters, gradients and optimizer states alone"
    else:
        because = f"compute on {devices} device{'s' if devices > 1 else ''} alone"
    return factor, Rejected(
        summary=_summary(mesh),
        data=mesh.data,
        tensor=mesh.tensor,
        pipeline=mesh.pipeline,
        context=mesh.context,
        expert=mesh.expert,
        kind=kind,  # type: ignore[arg-type]
        reason=f"at least {_times(factor, goal)}: {because}",
        factor=factor,
        because=because,
        exact=False,
    )


def _times(factor: float, goal: Goal) -> str:
    word = _COMPARED[goal]
    return f"{factor:.2f}x {word}" if factor < 1.095 else f"{factor:.1f}x {word}"


def _because_time(candidate: Candidate, best: Candidate) -> str:
    """The part of the step in which a plan loses most against the best one."""
    mine, theirs = candidate.prediction.time, best.prediction.time
    compute = "compute"
    if candidate.plan.world_size < best.plan.world_size:
        compute = f"compute on {candidate.plan.world_size} devices rather than {best.plan.world_size}"
    elif _recomputed(candidate) > _recomputed(best):
        compute = "recomputation"
    parts = {
        compute: mine.compute_seconds - theirs.compute_seconds,
        "exposed communication": mine.communication_seconds - theirs.communication_seconds,
        "pipeline bubble": mine.bubble_seconds - theirs.bubble_seconds,
        "optimizer step": mine.optimizer_seconds - theirs.optimizer_seconds,
    }
    part, loss = max(parts.items(), key=lambda item: item[1])
    if loss <= 0:
        return f"more devices ({candidate.plan.world_size}) for no less of their time"
    return part


def _recomputed(candidate: Candidate) -> int:
    return sum(len(stage.recompute) for stage in candidate.plan.stages)


def _because_memory(candidate: Candidate, best: Candidate) -> str:
    mine, theirs = _fullest(candidate.prediction), _fullest(best.prediction)
    return max(_KINDS, key=lambda kind: getattr(mine, f"{kind}_bytes") - getattr(theirs, f"{kind}_bytes"))


def _fullest(prediction: Prediction) -> Memory:
    distinct = {id(memory): memory for memory in prediction.memory}
    return max(distinct.values(), key=lambda memory: memory.total_bytes)


def _largest(memory: Memory) -> str:
    kind = max(_KINDS, key=lambda name: getattr(memory, f"{name}_bytes"))
    return f"{kind} {getattr(memory, f'{kind}_bytes') / memory.total_bytes:.0%}"


def _misfit(mesh: Mesh, misfit: Misfit) -> Rejected:
    because = _largest(misfit.memory)
    return Rejected(
        summary=misfit.plan.describe(),
        data=mesh.data,
        tensor=mesh.tensor,
        pipeline=mesh.pipeline,
        context=mesh.context,
        expert=mesh.expert,
        kind="does not fit",
        reason=f"does not fit: {format_bytes(misfit.excess_bytes)} over on rank {misfit.rank} ({because})",
        excess_bytes=misfit.excess_bytes,
        because=because,
    )


def _overfull(record: MeshRecord) -> Rejected:
    mesh = record.mesh
    because = record.excess_of
    return Rejected(
        summary=_summary(mesh),
        data=mesh.data,
        tensor=mesh.tensor,
        pipeline=mesh.pipeline,
        context=mesh.context,
        expert=mesh.expert,
        kind="does not fit",
        reason=f"does not fit: at least {format_bytes(record.excess_bytes)} over ({because})",
        excess_bytes=record.excess_bytes,
        because=because,
        exact=False,
    )


def _impossible(mesh: Mesh, reason: str) -> Rejected:
    return Rejected(
        summary=_summary(mesh),
        data=mesh.data,
        tensor=mesh.tensor,
        pipeline=mesh.pipeline,
        context=mesh.context,
        expert=mesh.expert,
        kind="impossible",
        reason=reason,
        because=reason,
    )
