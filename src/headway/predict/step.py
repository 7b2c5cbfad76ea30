"""What one training step costs: time and memory of a plan, composed from operators, collectives and the schedule.

`predict` for one plan; a `Predictor` for many plans of one workload on one cluster, which it answers from memoised
parts. Every formula is said once, where it is used; docs/predict.md tells them in order.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from headway.errors import DoesNotFitError
from headway.hardware.cluster import Accelerator, Cluster
from headway.plan.plan import Plan
from headway.predict import communication as comm
from headway.predict.communication import Communication
from headway.predict.latency import flop_rate
from headway.predict.measured import MeasuredTimes
from headway.predict.memory import Sizes
from headway.predict.operators import WHOLE, Shards
from headway.predict.outline import Outline, outline_of
from headway.predict.parts import Parts, RankParts
from headway.predict.pipeline import WEIGHT, Cell, closed_form, finish_seconds, play
from headway.predict.prediction import Memory, Prediction, StepTime
from headway.predict.profile import Profile
from headway.predict.replicas import ReplicaTimes
from headway.predict.residency import Residency
from headway.predict.splits import Splits
from headway.predict.stage import StageTimes, TimedStage
from headway.timeline import Span, Timeline
from headway.units import format_bytes
from headway.workload.graph import Workload

__all__ = ["Predictor", "check_fit", "predict"]

# Up to this many cells a schedule is played exactly; beyond, the closed form stands in for it.
_PLAYED_CELLS = 512
_MOST_PLAYS = 4096  # that are remembered: in a long walk few come again


class _Timing(NamedTuple):
    """`Parts`, with what is asked of each stage again and again at hand, and its send left out."""

    stages: list[TimedStage]
    ranks: tuple[RankParts, ...]
    sends: tuple[float, ...]
    finish: tuple[float, ...]
    loss: float
    micro_batches: int


class Predictor:
    """Predicts plans for one workload on one cluster; parts that plans share are computed once.

    With a `profile`, operators that it knows take the time measured there; without, all follow the roofline.
    `communication`: channels of this cluster that another predictor has measured already. `measured`: times of
    operators and collectives that go before the profile's and the formulas', where it knows them.
    """

    def __init__(
        self,
        workload: Workload,
        cluster: Cluster,
        profile: Profile | None = None,
        *,
        communication: Communication | None = None,
        measured: MeasuredTimes | None = None,
    ) -> None:
        self.workload = workload
        self.cluster = cluster
        self.profile = profile
        self.measured = measured
        self.communication = communication or Communication(cluster, known=measured)
        self.sizes = Sizes(workload.graph)
        splits = Splits(workload.graph)
        self.residency = Residency(workload, cluster, self.sizes, splits)
        self.stages = StageTimes(workload, cluster, profile, self.sizes, self.communication, measured, splits)
        self.replicas = ReplicaTimes(self.stages)
        self._flop = workload.graph.forward_flop + workload.graph.backward_flop
        self._plays: dict[tuple, tuple[float, ...]] = {}
        self._flop_rates: dict[tuple, tuple[float, float, float]] = {}
        self._replica_kinds: dict[tuple, tuple[tuple[tuple[tuple[Accelerator, ...], ...], int], ...]] = {}

    def predict(self, plan: Plan) -> Prediction:
        """Time and memory of one step of `plan`. The plan is taken as valid (see `Plan.validate`)."""
        outline = outline_of(plan, self.sizes, self.residency.splits)
        time, bound = self._step_time(plan, self._slowest(plan, outline))
        memory = self.residency.memory(plan, outline)
        graph = self.workload.graph
        samples = plan.global_batch
        flop = self._flop.at(samples)
        peak, watts, dollars = self._totals(plan)
        step = time.step_seconds
        return Prediction(
            time=time,
            memory=memory,
            samples_per_second=samples / step,
            tokens_per_second=samples * graph.tokens_per_sample / step,
            mfu=flop / (step * peak),
            energy_joules=watts * step,
            dollars=dollars / 3600 * step,
            bound=bound,
        )

    # ------------------------------------------------------------------------------------------------------- time

    def step_time(self, plan: Plan) -> StepTime:
        """The time of one step, as in `predict`, without asking what fits in memory."""
        return self._step_time(plan, self._slowest(plan, outline_of(plan, self.sizes, self.residency.splits)))[0]

    def layer_seconds(
        self, accelerator: str, samples: float, shards: Shards = WHOLE, precision: str = "float32", *, crowded: bool
    ) -> tuple[list[float], list[float]]:
        """Seconds of one micro-batch of `samples` in all layers before each position: forward, backward.

        Without communication and recomputation, on the cluster's accelerator of that name; `crowded`: while other
        devices compute too. Layers j to i (exclusive) take `found[i] - found[j]`.
        """
        kind = self.cluster.accelerators[accelerator]
        times = self.stages.layer_times(kind, crowded, samples, shards, precision)
        return times.forward, times.backward

    def parts(self, plan: Plan, *, exactly: bool = False) -> Parts:
        """What the step is made of; with unequal `shares`, on the replica that is done last.

        `exactly`: the schedule is played out however many cells it has.
        """
        found = self._slowest(plan, outline_of(plan, self.sizes, self.residency.splits), exactly)
        p, last = plan.pipeline, len(plan.stages) - 1
        stages = tuple(
            stage.parts._replace(send=found.sends[at % p]) if p > 1 and at < last else stage.parts
            for at, stage in enumerate(found.stages)
        )
        return Parts(stages, found.ranks, found.sends, found.finish, found.loss, found.micro_batches)

    def _slowest(self, plan: Plan, outline: Outline, exactly: bool = False) -> _Timing:
        """What the step is made of on the replica that is done last."""
        slowest: _Timing | None = None
        for kinds, m in self._replicas_of(plan):
            timing = self._timing_of(plan, outline, kinds, m, exactly)
            if slowest is None or max(timing.finish) > max(slowest.finish):
                slowest = timing
        assert slowest is not None
        return slowest

    def _replicas_of(self, plan: Plan) -> tuple[tuple[tuple[tuple[Accelerator, ...], ...], int], ...]:
        """The kinds of device of each pipeline rank and the micro-batches, of replicas that differ in either."""
        if not plan.shares:
            return ((self.stages.layouts.of(plan).kinds, plan.micro_batches),)
        order = self.communication.orders.of(plan.devices)
        degrees = None if plan.is_uniform else tuple(map(plan.degrees, range(plan.pipeline)))
        key = (order.number, plan.pipeline, plan.data, plan.tensor, plan.context, plan.shares, degrees)
        found = self._replica_kinds.get(key)
        if found is None:
            unlike = []
            for data, share in enumerate(plan.shares):
                kinds = tuple(
                    tuple(
                        self.cluster.accelerators[name]
                        for name in dict.fromkeys(order.kinds[rank] for rank in self._ranks_of(plan, pipeline, data))
                    )
                    for pipeline in range(plan.pipeline)
                )
                if (kinds, share) not in unlike:
                    unlike.append((kinds, share))
            found = self._replica_kinds[key] = tuple(unlike)
        return found

    @staticmethod
    def _ranks_of(plan: Plan, pipeline: int, data: int) -> range:
        """The ranks of a pipeline rank that work for one replica of the plan's."""
        own, tensor = plan.degrees(pipeline)
        width = tensor * plan.context
        first = plan.first_rank(pipeline)
        start, stop = data * own // plan.data, max((data + 1) * own // plan.data, data * own // plan.data + 1)
        return range(first + start * width, first + stop * width)

    def _timing_of(
        self, plan: Plan, outline: Outline, kinds: tuple[tuple[Accelerator, ...], ...], m: int, exactly: bool
    ) -> _Timing:
        layout = self.stages.layouts.of(plan)
        channels, along, rows = layout.channels, layout.along, layout.rows
        if kinds is not layout.kinds:
            rows = tuple(map(self.stages.layouts.row_of, kinds, channels))
        sends = self.stages.layouts.sends_of(plan, along)
        stages = self.stages.timed(plan, outline, kinds, channels, rows)
        ranks = tuple(
            self.replicas.parts_of_rank(plan, outline, rank, kinds[rank], channels[rank], rows[rank], along)
            for rank in range(plan.pipeline)
        )
        finish = self._finish(plan, m, stages, sends, exactly)
        loss = comm.all_reduce_seconds(8, layout.world) if len(plan.devices) > 1 else 0.0
        return _Timing(stages, ranks, sends, finish, loss, m)

    def _finish(
        self, plan: Plan, m: int, stages: list[TimedStage], sends: tuple[float, ...], exactly: bool = False
    ) -> tuple[float, ...]:
        p = plan.pipeline
        if p == 1:
            return (m * (stages[0].forward + stages[0].backward),)
        forward = tuple([stage.forward for stage in stages])
        backward = tuple([stage.backward for stage in stages])
        split = plan.schedule == "zero_bubble"
        weights = tuple([stage.parts.backward_weight for stage in stages]) if split else None
        key = (plan.schedule, p, m, forward, backward, sends, weights, exactly)
        found = self._plays.get(key)
        if found is None:
            asked = (plan.schedule, p, m, forward, backward, sends, weights)
            if 2 * m * len(forward) <= _PLAYED_CELLS:
                found = finish_seconds(*asked)
            else:
                found = play(*asked).finish if exactly else closed_form(*asked)
            if len(self._plays) >= _MOST_PLAYS:
                self._plays.clear()
            self._plays[key] = found
        return found

    def _step_time(self, plan: Plan, timing: _Timing) -> tuple[StepTime, str]:
        m, p = timing.micro_batches, plan.pipeline
        ends = [
            finish + rank.gradients + rank.update + rank.after
            for finish, rank in zip(timing.finish, timing.ranks, strict=True)
        ]
        step = max(ends) + timing.loss
        # A delayed update goes on beside the next step, and is through before the one after that needs its parameters.
        late = max(0.0, max([rank.background for rank in timing.ranks]) - step)
        computes = [stage.compute for stage in timing.stages]
        wholes = [stage.forward + stage.backward for stage in timing.stages]
        busy = []
        for rank in range(p):
            compute = m * sum(computes[rank::p])
            busy.append((compute, m * sum(wholes[rank::p]) - compute))
        # The rank that bounds the step is the one that waits least.
        waits = [
            compute + inside + rank.gradients + rank.update + rank.after
            for (compute, inside), rank in zip(busy, timing.ranks, strict=True)
        ]
        rank = waits.index(max(waits))
        compute, inside = busy[rank]
        own = timing.ranks[rank]
        communication = inside + own.gradients + own.after + timing.loss
        # Waiting for other stages includes waiting for what they send.
        bubble = 0.0 if p == 1 else max(0.0, step - compute - communication - own.update)
        time = StepTime(
            step_seconds=compute + communication + bubble + own.update + late,
            compute_seconds=compute,
            communication_seconds=communication,
            bubble_seconds=bubble,
            optimizer_seconds=own.update + late,
        )
        name = "tensor-parallel all-reduces" if plan.tensor > 1 else "gathering sharded parameters"
        if plan.tensor > 1 and plan.zero_stage >= 2:
            name = "tensor-parallel all-reduces and gathering sharded parameters"
        shares = {
            "compute" + (f" of stage {rank}" if p > 1 else ""): compute,
            "pipeline bubble": bubble,
            "optimizer step": own.update + late,
            "sending activations between stages": 0.0,
            name: inside,
            "exposed reduction of gradients": own.gradients,
            "broadcast of updated parameters": own.after,
        }
        if p > 1 and bubble >= max(shares.values()):
            # Only where waiting is the largest part does it matter how much of it is for sends.
            without = self._finish(plan, m, timing.stages, (0.0,) * p)
            sent = min(bubble, max(0.0, max(timing.finish) - max(without)))
            shares["pipeline bubble"] = bubble - sent
            shares["sending activations between stages"] = sent
        bound, seconds = max(shares.items(), key=lambda item: item[1])
        return time, f"{bound} ({seconds / time.step_seconds:.0%} of the step)"

    def _totals(self, plan: Plan) -> tuple[float, float, float]:
        """Peak FLOP/s, watts and dollars per hour of all devices; watts or dollars are 0 unless all are known."""
        order = self.communication.orders.of(plan.devices)
        key = (order.number, plan.precision)
        found = self._flop_rates.get(key)
        if found is None:
            count = Counter(order.kinds)
            kinds = [(self.cluster.accelerators[name], times) for name, times in count.items()]
            peak = sum(flop_rate(kind, plan.precision) * times for kind, times in kinds)
            watts = sum(kind.power_watts * times for kind, times in kinds)
            dollars = sum(kind.dollars_per_hour * times for kind, times in kinds)
            found = self._flop_rates[key] = (
                peak,
                watts if all(kind.power_watts for kind, _ in kinds) else 0.0,
                dollars if all(kind.dollars_per_hour for kind, _ in kinds) else 0.0,
            )
        return found

    # ----------------------------------------------------------------------------------------------------- memory

    def memory(self, plan: Plan) -> tuple[Memory, ...]:
        """Peak memory of each rank under `plan`, as in `predict`, without asking how long the step takes."""
        return self.residency.memory(plan)

    # --------------------------------------------------------------------------------------------------- timeline

    def timeline(self, plan: Plan) -> Timeline:
        """The predicted step, one group of lanes for each rank: compute, and communication beside it."""
        parts = self.parts(plan, exactly=True)
        p, m = plan.pipeline, parts.micro_batches
        played = play(
            plan.schedule,
            p,
            m,
            [stage.forward_seconds for stage in parts.stages],
            [stage.backward_seconds for stage in parts.stages],
            parts.sends,
            [stage.backward_weight for stage in parts.stages],
        )
        spans: list[Span] = []
        end = 0.0
        for rank in range(plan.world_size):
            pipeline, _, _ = plan.coordinates(rank)
            cells = sorted((start, cell) for cell, start in played.starts.items() if cell.stage % p == pipeline)
            for start, cell in cells:
                spans.extend(self._cell_spans(plan, parts, rank, start, cell))
            own = parts.ranks[pipeline]
            now = played.finish[pipeline]
            hidden = own.exchanged - own.gradients
            if own.exchanged > 0 or own.gradients > 0:
                begin = now - max(0.0, hidden)
                length = own.gradients + max(0.0, hidden)
                spans.append(_span("reduce gradients", rank, "communication", begin, length, "communication"))
            now += own.gradients
            spans.append(_span("optimizer", rank, "compute", now, own.update, "optimizer"))
            now += own.update
            if own.after:
                spans.append(_span("broadcast parameters", rank, "communication", now, own.after, "communication"))
            end = max(end, now + own.after)
        if parts.loss:
            for rank in range(plan.world_size):
                spans.append(_span("average loss", rank, "communication", end, parts.loss, "communication"))
        return Timeline(name=f"{plan.model}: {plan.describe()}, predicted", spans=tuple(spans))

    def _cell_spans(self, plan: Plan, parts: Parts, rank: int, start: float, cell: Cell) -> list[Span]:
        stage, index, backward = cell
        own = parts.stages[stage]
        if backward == WEIGHT:
            kind, compute, whole = "backward", own.backward_weight, own.backward_weight
        elif backward:
            kind, compute, whole = "backward", own.backward, own.backward_seconds
            if plan.schedule == "zero_bubble":
                compute, whole = compute - own.backward_weight, whole - own.backward_weight
        else:
            kind, compute, whole = "forward", own.forward, own.forward_seconds
        detail: dict[str, str | int | float] = {"stage": stage, "micro_batch": index}
        name = (
            ("gradients of parameters" if backward == WEIGHT else kind)
            + f" {index}"
            + (f" of stage {stage}" if plan.virtual_stages > 1 else "")
        )
        spans = [_span(name, rank, "compute", start, compute, kind, detail)]
        if whole > compute:
            label = "all-reduce of blocks" if plan.tensor > 1 else "gather parameters"
            spans.append(_span(label, rank, "communication", start + compute, whole - compute, "communication", detail))
        sends_on = stage > 0 and backward != WEIGHT if backward else stage < len(plan.stages) - 1
        if plan.pipeline > 1 and sends_on:
            channel = (stage - 1 if backward else stage) % plan.pipeline
            label = "send gradient" if backward else "send activation"
            spans.append(_span(label, rank, "send", start + whole, parts.sends[channel], "communication", detail))
        return spans


def _span(name: str, rank: int, lane: str, start: float, length: float, kind: str, detail: dict | None = None) -> Span:
    return Span(
        name=name,
        lane=f"rank {rank}/{lane}",
        start_seconds=start,
        duration_seconds=length,
        kind=kind,
        detail=detail or {},
    )


def predict(workload: Workload, cluster: Cluster, plan: Plan, profile: Profile | None = None) -> Prediction:
    """What one step of `plan` costs. For many plans of one workload make one `Predictor` and ask it."""
    return Predictor(workload, cluster, profile).predict(plan)


_REMEDIES = {
    "parameters": "raise zero_stage to 3, or the tensor or pipeline degree",
    "gradients": "raise zero_stage to 2 or 3, or the tensor or pipeline degree",
    "optimizer": "raise zero_stage to 1 or more, or the tensor or pipeline degree",
    "activations": "recompute layers, or use a smaller micro_batch",
    "communication": "use zero_stage 1, or fewer micro-batches in flight",
    "workspace": "use a smaller micro_batch, or split the largest layer with tensor parallelism",
}


def check_fit(prediction: Prediction, plan: Plan, cluster: Cluster) -> float:
    """Bytes left free on the fullest device.

    Raises DoesNotFitError naming the rank that lacks most, by how much, what takes the most there, and a remedy.
    """
    position = {device.name: at for at, device in enumerate(cluster.devices)}
    least = math.inf
    worst = 0
    for rank, (name, memory) in enumerate(zip(plan.devices, prediction.memory, strict=True)):
        free = cluster.accelerator_of(position[name]).memory_bytes - memory.total_bytes
        if free < least:
            least, worst = free, rank
    if least >= 0:
        return least
    memory = prediction.memory[worst]
    kinds = {name: getattr(memory, f"{name}_bytes") for name in _REMEDIES}
    largest = max(kinds, key=lambda name: kinds[name])
    has = cluster.accelerator_of(position[plan.devices[worst]]).memory_bytes
    raise DoesNotFitError(
        f"rank {worst} needs {format_bytes(memory.total_bytes)} and {plan.devices[worst]} has {format_bytes(has)}: "
        f"{format_bytes(-least)} too little; most of it is {largest} ({format_bytes(kinds[largest])})",
        place=f"plan {plan.describe()!r}",
        remedy=_REMEDIES[largest],
    )
