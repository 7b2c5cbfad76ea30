"""Metropolis search directly over plans: the walk of `mcmc`, where stages cannot be judged by tables.

A `StageProblem` needs stages whose costs do not depend on each other, and one micro-batch and schedule for all. Here a
proposal changes anything that a plan says (degrees, context and expert parallelism, micro-batch, schedule, ZeRO stage,
tiers, recomputation, cuts, the order of the devices) and `Predictor.predict` judges the whole plan: much slower for
each proposal, and exact about what the predictor knows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from headway.errors import FieldError, PlanError
from headway.plan.plan import Plan, Stage
from headway.predict.prediction import Memory, Prediction
from headway.predict.step import Predictor
from headway.search.mcmc import Progress, Record, check_budget
from headway.search.ranking import Constraints
from headway.search.space import Mesh, Space, States
from headway.search.stages import balanced_cuts, stage_costs

__all__ = ["PlanResult", "mcmc_plans"]

_HOT, _COLD = 0.05, 0.001
# What lacking memory adds to log(seconds), and lacking a share of it.
_LACKING, _LACKING_SHARE = 0.3, 2.0
_DRAWS, _WALKS = 200, 20
_KEPT_STAGES = 2**14
_HERE = States(0)


class PlanResult(NamedTuple):
    """The fastest plan found that fits, and its prediction; infinity and None: none of the `evaluated` plans fits."""

    seconds: float
    plan: Plan | None
    prediction: Prediction | None
    evaluated: int
    history: tuple[Progress, ...]


class _Choice(NamedTuple):
    """What a plan of all devices decides; `again`: how many layers of each stage are recomputed, its first ones."""

    placement: int
    data: int
    tensor: int
    pipeline: int
    micro_batch: int
    schedule: str
    virtual: int
    zero_stage: int
    sequence_parallel: bool
    cuts: tuple[int, ...]
    again: tuple[int, ...]
    context: int = 1
    expert: int = 1
    states: States = _HERE  # where they rest; the ZeRO stage is `zero_stage`


class _Plans:
    """Choices as plans, judged, and changed."""

    def __init__(self, predictor: Predictor, constraints: Constraints, rng: np.random.Generator) -> None:
        self.predictor, self.constraints, self.rng = predictor, constraints, rng
        self.workload, self.cluster = predictor.workload, predictor.cluster
        self.layers = len(self.workload.graph.layers)
        self.space = Space(self.workload, self.cluster, constraints, len(self.cluster))
        self.placements = self.space.placements(len(self.cluster))
        kinds = self.cluster.accelerators
        self._is_cpu = any(kind.torch_device == "cpu" for kind in kinds.values())
        self._resting = self.space.states(Mesh(self.placements[0], 1, 1, 1))
        self._cuts: dict[tuple[int, int], tuple[int, ...]] = {}
        # The predictor knows a stage again by its identity: plans share theirs.
        self._stage = lru_cache(maxsize=_KEPT_STAGES)(_stage)
        self._room = lru_cache(maxsize=None)(self._least_room)  # placements times pipeline degrees
        self._micro_batches = lru_cache(maxsize=None)(self._divide)  # data-parallel degrees

    def plan(self, choice: _Choice) -> Plan:
        """The plan of a choice; raises PlanError if it contradicts itself, the model or the constraints."""
        fixed = self.constraints
        for name in ("data", "tensor", "pipeline", "context", "expert", "micro_batch", "zero_stage", "schedule"):
            wanted = getattr(fixed, name)
            if wanted is not None and wanted != getattr(choice, name):
                raise PlanError(f"must be {wanted}", place=f"constraints: {name}")
        is_sliced = choice.states.parameters_on == "device" or choice.zero_stage == 3 or choice.data == 1
        if fixed.runnable and (choice.sequence_parallel or not is_sliced):
            raise PlanError("cannot be run", place="constraints: runnable")
        split = self.space.split(choice.tensor)
        if choice.tensor > 1 and not split.blocks:
            raise PlanError(f"nothing divides {choice.tensor} ways", place="tensor")
        ends = (*choice.cuts[1:], self.layers)
        # Where activations rest elsewhere, a layer is swapped instead of recomputed; a stage that lists none swaps all.
        swap = choice.states.activations_on != "device" and any(choice.again)
        stages = tuple(
            self._stage(start, stop, max(again, 1) if swap else again, swap)
            for start, stop, again in zip(choice.cuts, ends, choice.again, strict=True)
        )
        return Plan(
            model=self.workload.graph.name,
            devices=self.placements[choice.placement].devices,
            global_batch=self.workload.global_batch,
            micro_batch=choice.micro_batch,
            stages=stages,
            data=choice.data,
            tensor=choice.tensor,
            pipeline=choice.pipeline,
            schedule=choice.schedule,  # type: ignore[arg-type]
            zero_stage=choice.zero_stage,  # type: ignore[arg-type]
            sequence_parallel=choice.sequence_parallel,
            context=choice.context,
            expert=choice.expert,
            parameters_on=choice.states.parameters_on,
            optimizer_on=choice.states.optimizer_on,
            activations_on=choice.states.activations_on if swap else "device",
            optimizer_kept=choice.states.optimizer_kept,
            delayed_update=choice.states.delayed_update,
            tensor_sharding=split.sharding,
            precision=self.space.precision,
            exchange=fixed.exchange,
        ).validate(distinct_devices=True)  # of a placement, split as `Space.split` says, and cut within the model

    def judge(self, plan: Plan) -> tuple[float, Prediction, bool]:
        """(energy, prediction, whether it fits)."""
        prediction = self.predictor.predict(plan)
        peaks = self.predictor.residency.peaks_of(plan, prediction.memory)
        placement = next(at for at, one in enumerate(self.placements) if one.devices is plan.devices)
        rooms = self._room(placement, plan.pipeline)
        lacking = max(memory.total_bytes / room for memory, (room, _) in zip(peaks, rooms, strict=True)) - 1
        if plan.tiers:
            lacking = max(lacking, self._lacking_elsewhere(peaks, rooms))
        price = _LACKING + _LACKING_SHARE * min(lacking, 10.0) if lacking > 0 else 0.0
        return math.log(prediction.time.step_seconds) + price, prediction, lacking <= 0

    def _least_room(self, placement: int, pipeline: int) -> tuple[tuple[float, str], ...]:
        """For each pipeline rank the bytes that its smallest device may hold, and the name of that device."""
        found = self.placements[placement]
        bytes_of = {name: kind.memory_bytes for name, kind in self.cluster.accelerators.items()}
        rooms = [bytes_of[kind] * self.constraints.memory_fraction for kind in found.kinds]
        width = len(rooms) // pipeline
        spans = (zip(rooms[at : at + width], found.devices[at : at + width]) for at in range(0, len(rooms), width))
        return tuple(min(span) for span in spans)

    def _lacking_elsewhere(self, peaks: tuple[Memory, ...], rooms: tuple[tuple[float, str], ...]) -> float:
        """The largest share by which any tier off the device lacks room."""
        elsewhere = self.predictor.stages.tiers
        needs = [0.0]
        for memory, (room, name) in zip(peaks, rooms, strict=True):
            for tier, size in memory.tiers.items():
                needs.append(size / elsewhere.capacity_bytes(tier, name))  # type: ignore[arg-type]
            if self._is_cpu:  # there the host's memory is the device's
                needs.append((memory.total_bytes + memory.host_bytes) / room)
        return max(needs) - 1

    def draw(self) -> _Choice:
        """Random degrees; the rest follows from them."""
        tensor = pipeline = 1
        count = len(self.cluster)
        for prime in _primes(count):
            axis = int(self.rng.integers(3))
            tensor *= prime if axis == 1 else 1
            pipeline *= prime if axis == 2 else 1
        fixed = self.constraints
        tensor, pipeline = fixed.tensor or tensor, fixed.pipeline or pipeline
        context = fixed.context or 1
        data = fixed.data or max(1, count // tensor // pipeline // context)
        samples = self.workload.global_batch // data
        # Most schedules need a micro-batch for each pipeline rank.
        filling = [size for size in self._micro_batches(data) if samples // size >= pipeline]
        micro = max(filling or self._micro_batches(data), key=lambda size: (size <= 4, size), default=1)
        choice = _Choice(
            int(self.rng.integers(len(self.placements))), data, tensor, pipeline, fixed.micro_batch or micro,
            "none", 1, fixed.zero_stage or 0, False, (0,), (0,), context, fixed.expert or 1,
        )  # fmt: skip
        return self._staged(choice, fixed.schedule or ("1f1b" if pipeline > 1 else "none"), 1)

    def _divide(self, data: int) -> list[int]:
        """Sizes of micro-batches that divide a replica's samples, up to 64."""
        samples = self.workload.global_batch // data
        return [size for size in range(1, min(samples, 64) + 1) if samples % size == 0]

    def _staged(self, choice: _Choice, schedule: str, virtual: int) -> _Choice:
        """The choice with another number of stages, cut so that they take equally long; all or nothing recomputed."""
        if choice.pipeline == 1:
            schedule, virtual = "none", 1
        elif schedule == "none":
            schedule = "1f1b"
        virtual = virtual if schedule == "interleaved" else 1
        count = choice.pipeline * virtual
        if count > self.layers:
            return choice._replace(schedule=schedule, virtual=virtual)  # no valid plan, and refused as such
        key = (count, choice.micro_batch)
        if key not in self._cuts:
            name = self.cluster.devices[0].accelerator
            forward, backward = self.predictor.layer_seconds(
                name, choice.micro_batch, precision=self.space.precision, crowded=len(self.cluster) > 1
            )
            costs = stage_costs(np.diff(np.asarray(forward) + np.asarray(backward)))
            found = balanced_cuts([costs] * count)
            self._cuts[key] = found[:-1] if found is not None else tuple(range(count))
        again = self.layers if self.constraints.recompute == "full" or sum(choice.again) else 0
        return choice._replace(schedule=schedule, virtual=virtual, cuts=self._cuts[key], again=(again,) * count)

    def propose(self, choice: _Choice) -> _Choice:
        """The choice with one thing changed; it may be impossible."""
        return self._moves[int(self.rng.integers(len(self._moves)))](choice)

    @cached_property
    def _moves(self) -> list[Callable[[_Choice], _Choice]]:
        moves = [self._degrees, self._micro_batch, self._zero_stage, self._schedule, self._cut, self._recompute,
                 self._recompute, self._sequence, self._placement]  # fmt: skip
        # Only where there is a choice: the same walk as before elsewhere.
        moves += [self._context] * self.has_context + [self._expert] * self.has_experts
        return moves + [self._tiers] * (len(self._resting) > 1)

    @cached_property
    def has_context(self) -> bool:
        """Whether tokens of a sample may be divided."""
        return len(self.space.contexts(len(self.cluster))) > 1

    @cached_property
    def has_experts(self) -> bool:
        """Whether experts may be divided."""
        return len(self.space.expert_degrees(len(self.cluster))) > 1

    def _context(self, choice: _Choice) -> _Choice:
        """Some replicas become parts of one sample's tokens, or the other way round."""
        ranks = choice.data * choice.context
        degrees = self.space.contexts(ranks)
        context = degrees[int(self.rng.integers(len(degrees)))] if degrees else 1
        data = ranks // context
        sizes = self._micro_batches(data)
        size = max((size for size in sizes if size <= choice.micro_batch), default=1)
        return choice._replace(context=context, data=data, micro_batch=size)

    def _expert(self, choice: _Choice) -> _Choice:
        degrees = self.space.expert_degrees(choice.data * choice.context)
        return choice._replace(expert=degrees[int(self.rng.integers(len(degrees)))]) if degrees else choice

    def _tiers(self, choice: _Choice) -> _Choice:
        return choice._replace(states=self._resting[int(self.rng.integers(len(self._resting)))])

    def _degrees(self, choice: _Choice) -> _Choice:
        axes, rng = ("data", "tensor", "pipeline"), self.rng
        one, other = (axes[at] for at in rng.permutation(3)[:2])
        primes = _primes(getattr(choice, one))
        if not primes:
            return choice
        prime = primes[int(rng.integers(len(primes)))]
        changed: dict[str, Any] = {one: getattr(choice, one) // prime, other: getattr(choice, other) * prime}
        choice = choice._replace(**changed)
        # Other degrees need another micro-batch and ZeRO stage, or they would have to pass through what does not fit.
        sizes = self._micro_batches(choice.data)
        size = max((size for size in sizes if size <= choice.micro_batch), default=1)
        if sizes and rng.random() < 0.5:
            size = sizes[int(rng.integers(len(sizes)))]
        zero_stage = int(rng.integers(4)) if rng.random() < 0.5 else choice.zero_stage
        choice = choice._replace(
            micro_batch=size,
            zero_stage=zero_stage if choice.data * choice.context > 1 else 0,
            expert=choice.expert if choice.data * choice.context % choice.expert == 0 else 1,
            sequence_parallel=choice.sequence_parallel and choice.tensor > 1,
        )
        return self._staged(choice, choice.schedule, choice.virtual) if "pipeline" in changed else choice

    def _micro_batch(self, choice: _Choice) -> _Choice:
        sizes = self._micro_batches(choice.data)
        if choice.micro_batch not in sizes or len(sizes) < 2:
            return choice
        at = sizes.index(choice.micro_batch) + (1 if self.rng.random() < 0.5 else -1)
        return choice._replace(micro_batch=sizes[min(max(at, 0), len(sizes) - 1)])

    def _zero_stage(self, choice: _Choice) -> _Choice:
        return choice._replace(zero_stage=int(self.rng.integers(4)))

    def _schedule(self, choice: _Choice) -> _Choice:
        kinds = ("gpipe", "1f1b", "interleaved") + ("zero_bubble",) * (not self.constraints.runnable)
        return self._staged(choice, kinds[int(self.rng.integers(len(kinds)))], 2 ** int(self.rng.integers(1, 4)))

    def _cut(self, choice: _Choice) -> _Choice:
        if len(choice.cuts) < 2:
            return choice
        cuts = list(choice.cuts)
        first = int(self.rng.integers(1, len(cuts)))
        last = min(len(cuts), first + 1 + int(self.rng.geometric(0.5)) - 1)
        by = 1 if self.rng.random() < 0.5 else -1
        for at in range(first, last):
            cuts[at] += by
        return choice._replace(cuts=tuple(cuts))

    def _recompute(self, choice: _Choice) -> _Choice:
        if self.constraints.recompute != "any":
            return choice
        again, rng = list(choice.again), self.rng
        chosen = range(len(again)) if rng.random() < 0.5 else [int(rng.integers(len(again)))]
        ends = (*choice.cuts[1:], self.layers)
        value = rng.random()
        step = 1 if rng.random() < 0.5 else -1
        for at in chosen:
            width = ends[at] - choice.cuts[at]
            now = min(again[at], width)
            again[at] = 0 if value < 0.2 else width if value < 0.4 else min(max(now + step, 0), width)
        return choice._replace(again=tuple(again))

    def _sequence(self, choice: _Choice) -> _Choice:
        return choice._replace(sequence_parallel=not choice.sequence_parallel and choice.tensor > 1)

    def _placement(self, choice: _Choice) -> _Choice:
        return choice._replace(placement=int(self.rng.integers(len(self.placements))))


def _stage(start: int, stop: int, again: int, swap: bool) -> Stage:
    chosen = tuple(range(start, start + min(again, stop - start)))
    return Stage(start=start, stop=stop, swap=chosen) if swap else Stage(start=start, stop=stop, recompute=chosen)


def mcmc_plans(
    predictor: Predictor,
    *,
    constraints: Constraints | None = None,
    seed: int = 0,
    evaluations: int | None = None,
    budget_seconds: float | None = None,
    restarts: int = 4,
    progress: Callable[[Progress], Any] | None = None,
) -> PlanResult:
    """Search for the fastest plan that fits, on all devices of the predictor's cluster, by Metropolis walks over plans.

    The temperature falls over the budget of each of `restarts` walks, one after another. An evaluation is one call of
    the predictor; a plan met again is not predicted again, nor counted. The same seed and `evaluations` give the same
    answer. `constraints` mean what they mean to `find`.
    """
    check_budget(evaluations, budget_seconds)
    if restarts < 1:
        raise FieldError(f"must be at least 1, not {restarts}", place="restarts")
    began = time.perf_counter()
    rng = np.random.default_rng(seed)
    plans = _Plans(predictor, (constraints or Constraints()).validate(), rng)
    record = Record(began, progress)
    known: dict[_Choice, float] = {}  # energies; a prediction for thousands of devices is large
    best: tuple[float, Plan | None, Prediction | None] = (math.inf, None, None)
    evaluated = 0

    def done() -> float:
        if evaluations is not None:
            return evaluated / evaluations
        assert budget_seconds is not None
        return (time.perf_counter() - began) / budget_seconds

    def energy(choice: _Choice) -> float:
        nonlocal evaluated, best
        found = known.get(choice)
        if found is not None:
            return found
        try:
            plan = plans.plan(choice)
        except PlanError:
            known[choice] = math.inf
            return math.inf
        evaluated += 1
        value, prediction, fits = plans.judge(plan)
        known[choice] = value
        if fits and prediction.time.step_seconds < best[0]:
            best = (prediction.time.step_seconds, plan, prediction)
            record.note(evaluated, best[0])
        return value

    for restart in range(restarts):
        walks = 0
        # A walk that finds nothing new any more is followed by another, a few times.
        while done() < (restart + 1) / restarts and walks < _WALKS:
            walks += 1
            draws = (plans.draw() for _ in range(_DRAWS))
            choice = next((one for one in draws if math.isfinite(energy(one))), None)
            if choice is None:
                break
            here, idle = energy(choice), 0
            while done() < (restart + 1) / restarts and idle < _DRAWS:
                before = evaluated
                proposal = plans.propose(choice)
                there = energy(proposal)
                idle = 0 if evaluated > before else idle + 1
                temperature = _HOT * (_COLD / _HOT) ** min(1.0, max(0.0, done() * restarts - restart))
                if there <= here or rng.random() < math.exp((here - there) / temperature):
                    choice, here = proposal, there
    return PlanResult(*best, evaluated, tuple(record.history))


def _primes(number: int) -> list[int]:
    """The prime factors of a number, each as often as it divides: 12 → [2, 2, 3]."""
    found, prime = [], 2
    while number > 1:
        while number % prime == 0:
            found.append(prime)
            number //= prime
        prime += 1
    return found
