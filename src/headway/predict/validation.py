"""How far predictions are from published measurements, and what that costs a user who trusts them.

Errors are relative to the measurement: predicted / measured - 1. Beside them stand two figures that matter more to
whoever chooses a plan, taken over groups of rows that differ by plan alone (same model, hardware, devices, batch and
precision, same software): *rank correlation*, whether plans are put in the right order, and *regret*, how much slower
the plan that would be chosen is than the best one that was measured.

Constants may be fitted on rows for which `published.is_fitted` holds; errors are reported for those and for the rest.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Literal, NamedTuple

import msgspec

from headway.errors import HeadwayError
from headway.plan.plan import Plan
from headway.predict.published import PublishedRow, SkippedRow, is_fitted
from headway.predict.step import Predictor
from headway.value import Value

__all__ = [
    "Comparison",
    "Errors",
    "PlanGroup",
    "Predicted",
    "Prophet",
    "Validation",
    "is_fitted",
    "rank_correlation",
    "validate",
]

Quantity = Literal["step", "memory"]
By = Literal["source", "hardware", "kind", "model", "scope", "all"]


class Predicted(NamedTuple):
    """What a method says about one row: seconds of a step, bytes on the fullest device, whether they fit there.

    None: the method does not say.
    """

    step_seconds: float | None
    memory_bytes: float | None = None
    fits: bool | None = None


class Prophet:
    """Headway's own prediction of a row. Rows of one model on one machine share a `Predictor`."""

    def __init__(self) -> None:
        self._predictors: dict[Hashable, tuple[Predictor, PublishedRow]] = {}

    def __call__(self, row: PublishedRow) -> Predicted:
        workload = row.workload
        # The row is kept beside its predictor, so that its parts stay alive and their identities stay theirs.
        key = (id(workload.graph), id(row.cluster), workload.optimizer, workload.recipe, workload.precision)
        found = self._predictors.get(key)
        if found is None:
            found = self._predictors[key] = (Predictor(workload, row.cluster), row)
        prediction = found[0].predict(row.plan)
        position = {device.name: at for at, device in enumerate(row.cluster.devices)}
        fits = all(
            memory.total_bytes <= row.cluster.accelerator_of(position[name]).memory_bytes
            for name, memory in zip(row.plan.devices, prediction.memory, strict=True)
        )
        in_allocator = row.memory_of == "allocator"
        memory = max(one.allocator_bytes if in_allocator else one.total_bytes for one in prediction.memory)
        return Predicted(prediction.time.step_seconds, memory, fits)


class Comparison(Value):
    """One row beside its prediction. Errors are relative and signed; None where either side is not known."""

    line: int
    source: str
    model: str
    hardware: str
    devices: int
    scope: Literal["one node", "several nodes"]
    kind: str
    plan: str
    fitted: bool
    measured_seconds: float | None = None
    predicted_seconds: float | None = None
    measured_bytes: float | None = None
    predicted_bytes: float | None = None
    ran_out_of_memory: bool = False
    predicted_to_fit: bool | None = None
    assumed: tuple[str, ...] = ()
    failed: str = ""  # why there is no prediction

    @property
    def step_error(self) -> float | None:
        return _relative(self.predicted_seconds, self.measured_seconds)

    @property
    def memory_error(self) -> float | None:
        return _relative(self.predicted_bytes, self.measured_bytes)


def _relative(predicted: float | None, measured: float | None) -> float | None:
    return predicted / measured - 1 if predicted is not None and measured else None


class Errors(Value):
    """Absolute relative errors of some rows; `bias` is the mean of the signed ones."""

    name: str
    rows: int
    mean: float
    median: float
    worst: float
    bias: float


class PlanGroup(Value):
    """Rows that differ by plan alone: `plans` of them, after averaging those of equal plans.

    `rank_correlation` is Spearman's, None for fewer than three plans or where all took equally long. `regret` is the
    chosen plan's measured time over the best one's, minus 1; None if the chosen plan ran out of memory when measured.
    """

    model: str
    source: str
    hardware: str
    devices: int
    global_batch: int
    fitted: bool
    plans: int
    chosen: str
    best: str
    rank_correlation: float | None = None
    regret: float | None = None


class Validation(Value):
    """All rows of some tables beside their predictions, rows that could not be used, and groups of plans."""

    rows: tuple[Comparison, ...]
    groups: tuple[PlanGroup, ...] = ()
    skipped: tuple[tuple[int, str, tuple[str, ...]], ...] = ()  # line, source, reasons

    def part(self, fitted: bool | None) -> tuple[Comparison, ...]:
        """Rows that constants may be fitted on (true), the held-out ones (false), or all."""
        return tuple(row for row in self.rows if fitted is None or row.fitted == fitted)

    def errors(self, quantity: Quantity = "step", by: By = "all", fitted: bool | None = None) -> tuple[Errors, ...]:
        """Errors of step time or memory by source, hardware, kind of plan, ...: most rows first."""
        found: dict[str, list[float]] = {}
        for row in self.part(fitted):
            error = row.step_error if quantity == "step" else row.memory_error
            if error is not None:
                name = "all" if by == "all" else _source(row.source) if by == "source" else getattr(row, by)
                found.setdefault(name, []).append(error)
        return tuple(
            _errors(name, values) for name, values in sorted(found.items(), key=lambda one: (-len(one[1]), one[0]))
        )

    def out_of_memory(self, fitted: bool | None = None) -> tuple[int, int, int, int]:
        """(rows that ran out of memory, of them predicted not to fit, rows that ran, of them predicted not to fit)."""
        known = [row for row in self.part(fitted) if row.predicted_to_fit is not None]
        failed = [row for row in known if row.ran_out_of_memory]
        ran = [row for row in known if not row.ran_out_of_memory]
        return (
            len(failed),
            sum(not row.predicted_to_fit for row in failed),
            len(ran),
            sum(not row.predicted_to_fit for row in ran),
        )

    def groups_of(self, fitted: bool | None = None) -> tuple[PlanGroup, ...]:
        return tuple(group for group in self.groups if fitted is None or group.fitted == fitted)

    def mean_regret(self, fitted: bool | None = None) -> float | None:
        """Mean regret of all groups in which the chosen plan ran."""
        values = [group.regret for group in self.groups_of(fitted) if group.regret is not None]
        return statistics.fmean(values) if values else None

    def mean_rank_correlation(self, fitted: bool | None = None) -> float | None:
        """Mean over groups of three or more plans, each group counted once."""
        values = [group.rank_correlation for group in self.groups_of(fitted) if group.rank_correlation is not None]
        return statistics.fmean(values) if values else None

    def worst(self, count: int, quantity: Quantity = "step", fitted: bool | None = None) -> tuple[Comparison, ...]:
        """The rows with the largest errors, the largest first."""

        def size(row: Comparison) -> float:
            error = row.step_error if quantity == "step" else row.memory_error
            return -1.0 if error is None else abs(error)

        found = sorted(self.part(fitted), key=lambda row: (-size(row), row.source, row.line))
        return tuple(row for row in found[:count] if size(row) >= 0)


def validate(
    rows: Iterable[PublishedRow],
    predict: Callable[[PublishedRow], Predicted] | None = None,
    skipped: Iterable[SkippedRow] = (),
) -> Validation:
    """Predict every row and compare. `predict` is Headway's own prediction unless another method is given.

    A row that the method refuses (HeadwayError) is kept with the reason in `failed`.
    """
    method = predict or Prophet()
    pairs: list[tuple[PublishedRow, Comparison]] = []
    for row in rows:
        try:
            predicted, failed = method(row), ""
        except HeadwayError as error:
            predicted, failed = Predicted(None), str(error)
        pairs.append((row, _compared(row, predicted, failed)))
    return Validation(
        rows=tuple(comparison for _, comparison in pairs),
        groups=_groups(pairs),
        skipped=tuple((one.line, one.source, one.reasons) for one in skipped),
    )


def _compared(row: PublishedRow, predicted: Predicted, failed: str) -> Comparison:
    node_of = {device.name: device.node for device in row.cluster.devices}
    nodes = {node_of[name] for name in row.plan.devices}
    return Comparison(
        line=row.line,
        source=row.source,
        model=row.model,
        hardware=row.hardware,
        devices=len(row.plan.devices),
        scope="several nodes" if len(nodes) > 1 else "one node",
        kind=row.kind,
        plan=row.plan.describe(),
        fitted=is_fitted(row),
        measured_seconds=None if row.out_of_memory else row.step_seconds,
        predicted_seconds=predicted.step_seconds,
        measured_bytes=None if row.out_of_memory else row.memory_bytes,
        predicted_bytes=predicted.memory_bytes,
        ran_out_of_memory=row.out_of_memory,
        predicted_to_fit=predicted.fits,
        assumed=row.assumed,
        failed=failed,
    )


def _source(text: str) -> str:
    """A source without what tells its rows apart: the repository and the document, not the line or the commit."""
    words = text.replace(",", " ").split()
    name = " ".join(words[:2]) if len(words) > 1 else text
    head, colon, tail = name.rpartition(":")
    return head if colon and tail.isdigit() else name


def _errors(name: str, values: Sequence[float]) -> Errors:
    sizes = [abs(value) for value in values]
    return Errors(
        name=name,
        rows=len(values),
        mean=statistics.fmean(sizes),
        median=statistics.median(sizes),
        worst=max(sizes),
        bias=statistics.fmean(values),
    )


# -- plans of one job -------------------------------------------------------------------------------------------------


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rank correlation: Pearson's of the ranks, equal values sharing the mean of theirs.

    None for fewer than two values, or if all of `one` are equal; 0 if all of `other` are.
    """
    if len(one) < 2 or len(set(one)) == 1:
        return None
    first, second = _ranks(one), _ranks(other)
    if len(set(second)) == 1:
        return 0.0
    return max(-1.0, min(1.0, statistics.correlation(first, second)))


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda at: values[at])
    ranks = [0.0] * len(values)
    for _, tied in itertools.groupby(enumerate(order), key=lambda pair: values[pair[1]]):
        places = list(tied)
        mean = statistics.fmean(place for place, _ in places)
        for _, at in places:
            ranks[at] = mean
    return ranks


def _job(row: PublishedRow) -> Hashable:
    """Equal for rows that could have chosen each other's plan."""
    # Padding the vocabulary to the tensor degree follows from the plan, and is no other model.
    shape = msgspec.structs.replace(row.shape, vocabulary=0)
    plan = row.plan
    return (shape, row.hardware, len(plan.devices), plan.global_batch, plan.precision, row.workload.recipe,
            _source(row.source))  # fmt: skip


def _choice(plan: Plan) -> Hashable:
    """What is chosen in a plan."""
    return msgspec.structs.replace(plan, devices=(), model="", tensor_sharding={}).to_json()


class _Candidate(NamedTuple):
    """One plan of a job, its rows averaged. Seconds measured: infinity if it ran out of memory."""

    text: str
    measured: float
    predicted: float
    fits: bool


def _candidate(same: list[Comparison]) -> _Candidate | None:
    predicted = [row.predicted_seconds for row in same if row.predicted_seconds is not None]
    measured = [row.measured_seconds for row in same if row.measured_seconds is not None]
    failed = any(row.ran_out_of_memory for row in same)
    if not predicted or not (measured or failed):
        return None
    seconds = statistics.fmean(measured) if measured else math.inf
    return _Candidate(same[0].plan, seconds, statistics.fmean(predicted), same[0].predicted_to_fit is not False)


def _groups(pairs: list[tuple[PublishedRow, Comparison]]) -> tuple[PlanGroup, ...]:
    jobs: dict[Hashable, dict[Hashable, list[Comparison]]] = {}
    firsts: dict[Hashable, PublishedRow] = {}
    for row, comparison in pairs:
        job = _job(row)
        firsts.setdefault(job, row)
        jobs.setdefault(job, {}).setdefault(_choice(row.plan), []).append(comparison)
    found: list[PlanGroup] = []
    for job, plans in jobs.items():
        candidates = [one for same in plans.values() if (one := _candidate(same)) is not None]
        ran = [one for one in candidates if math.isfinite(one.measured)]
        if len(candidates) < 2 or not ran:
            continue
        best = min(ran, key=lambda one: one.measured)
        chosen = min([one for one in candidates if one.fits] or candidates, key=lambda one: one.predicted)
        row = firsts[job]
        found.append(
            PlanGroup(
                model=row.model,
                source=_source(row.source),
                hardware=row.hardware,
                devices=len(row.plan.devices),
                global_batch=row.plan.global_batch,
                fitted=is_fitted(row),
                plans=len(candidates),
                chosen=chosen.text,
                best=best.text,
                rank_correlation=(
                    rank_correlation([one.measured for one in ran], [one.predicted for one in ran])
                    if len(ran) >= 3
                    else None
                ),
                regret=chosen.measured / best.measured - 1 if math.isfinite(chosen.measured) else None,
            )
        )
    return tuple(sorted(found, key=lambda group: (-group.plans, group.source, group.model, group.devices)))
