"""What one training step costs: time and memory of a plan, composed from operators, collectives and the schedule.

`predict` for one plan; a `Predictor` for many plans of one workload on one cluster, which it answers from memoised
parts. Every formula is said once, where it is used; docs/predict.md tells them in order.
"""

from __future__ import annotations

import math
from collections import Counter

from headway.errors import DoesNotFitError
from headway.hardware.cluster import Accelerator, Cluster
from headway.plan.plan import Plan
from headway.predict import communication as comm
from headway.predict.communication import Communication
from headway.predict.latency import flop_rate
from headway.predict.measured import MeasuredTimes
from headway.predict.memory import Sizes
from headway.predict.operators import WHOLE, Shards
from headway.predict.parts import Parts, StageParts
from headway.predict.pipeline import WEIGHT, Cell, closed_form, play
from headway.predict.prediction import Memory, Prediction, StepTime
from headway.predict.profile import Profile
from headway.predict.replicas import ReplicaTimes
from headway.predict.residency import Residency
from headway.predict.splits import Splits
from headway.predict.stage import StageTimes
from headway.timeline import Span, Timeline
from headway.units import format_bytes
from headway.workload.graph import Workload

__all__ = ["Predictor", "check_fit", "predict"]

# Up to this many cells a schedule is played exactly; beyond, the closed form stands in for it.
_PLAYED_CELLS = 512


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
        self._position = {device.name: position for position, device in enumerate(cluster.devices)}
        self._flop = workload.graph.forward_flop + workload.graph.backward_flop
        self._plays: dict[tuple, tuple[float, ...]] = {}
        self._flop_rates: dict[tuple, tuple[float, float, float]] = {}
        self._replica_kinds: dict[tuple, tuple[tuple[tuple[tuple[Accelerator, ...], ...], int], ...]] = {}

    def predict(self, plan: Plan) -> Prediction:
        """Time and memory of one step of `plan`. The plan is taken as valid (see `Plan.validate`)."""
        parts = self.parts(plan)
        time, bound = self._step_time(plan, parts)
        memory = self.residency.memory(plan)
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
        return self._step_time(plan, self.parts(plan))[0]

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
        slowest: Parts | None = None
        for kinds, m in self._replicas_of(plan):
            parts = self._parts_of(plan, kinds, m, exactly)
            if slowest is None or max(parts.finish) > max(slowest.finish):
                slowest = parts
        assert slowest is not None
        return slowest

    def _replicas_of(self, plan: Plan) -> tuple[tuple[tuple[tuple[Accelerator, ...], ...], int], ...]:
        """The kinds of device of each pipeline rank and the micro-batches, of replicas that differ in either."""
        if not plan.shares:
            return ((self.stages.layout_of(plan).kinds, plan.micro_batches),)
        key = (plan.devices, plan.pipeline, plan.data, plan.tensor, plan.context, plan.shares)
        found = self._replica_kinds.get(key)
        if found is None:
            unlike = []
            for data, share in enumerate(plan.shares):
                kinds = tuple(
                    tuple(
                        self.cluster.accelerators[name]
                        for name in dict.fromkeys(
                            self.cluster.devices[self._position[plan.devices[rank]]].accelerator
                            for rank in self._ranks_of(plan, pipeline, data)
                        )
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

    def _parts_of(self, plan: Plan, kinds: tuple[tuple[Accelerator, ...], ...], m: int, exactly: bool) -> Parts:
        p = plan.pipeline
        layout = self.stages.layout_of(plan)
        channels, along = layout.channels, layout.along
        sends = self.stages.sends_of(plan, along)
        last = len(plan.stages) - 1
        stages = []
        for position in range(last + 1):
            rank = position % p
            parts = self.stages.parts(plan, position, kinds[rank], channels[rank])
            stages.append(parts._replace(send=sends[rank]) if p > 1 and position < last else parts)
        ranks = tuple(self.replicas.parts(plan, rank, kinds[rank], channels[rank], along) for rank in range(p))
        finish = self._finish(plan, m, tuple(stages), sends, exactly)
        loss = comm.all_reduce_seconds(8, layout.world) if len(plan.devices) > 1 else 0.0
        return Parts(tuple(stages), ranks, sends, finish, loss, m)

    def _finish(
        self, plan: Plan, m: int, stages: tuple[StageParts, ...], sends: tuple[float, ...], exactly: bool
    ) -> tuple[float, ...]:
        p = plan.pipeline
        forward = tuple(stage.forward_seconds for stage in stages)
        backward = tuple(stage.backward_seconds for stage in stages)
        if p == 1:
            return (m * (forward[0] + backward[0]),)
        weights = tuple(stage.backward_weight for stage in stages) if plan.schedule == "zero_bubble" else None
        key = (plan.schedule, p, m, forward, backward, sends, weights, exactly)
        found = self._plays.get(key)
        if found is None:
            if exactly or 2 * m * len(forward) <= _PLAYED_CELLS:
                found = play(plan.schedule, p, m, forward, backward, sends, weights).finish
            else:
                found = closed_form(plan.schedule, p, m, forward, backward, sends, weights)
            self._plays[key] = found
        return found

    def _step_time(self, plan: Plan, parts: Parts) -> tuple[StepTime, str]:
        m, p = parts.micro_batches, plan.pipeline
        ends = [
            finish + rank.gradients + rank.update + rank.after
            for finish, rank in zip(parts.finish, parts.ranks, strict=True)
        ]
        step = max(ends) + parts.loss
        # A delayed update goes on beside the next step, and is through before the one after that needs its parameters.
        late = max(0.0, max(rank.background for rank in parts.ranks) - step)
        busy = []
        for rank in range(p):
            mine = [parts.stages[at] for at in plan.stages_of(rank)]
            compute = m * sum(stage.forward + stage.backward for stage in mine)
            busy.append((compute, m * sum(stage.forward_seconds + stage.backward_seconds for stage in mine) - compute))
        # The rank that bounds the step is the one that waits least.
        rank = max(
            range(p),
            key=lambda at: sum(busy[at]) + parts.ranks[at].gradients + parts.ranks[at].update + parts.ranks[at].after,
        )
        compute, inside = busy[rank]
        own = parts.ranks[rank]
        sent = 0.0
        if p > 1:
            without = self._finish(plan, m, parts.stages, (0.0,) * p, False)
            with_sends = self._finish(plan, m, parts.stages, parts.sends, False)
            sent = max(0.0, max(with_sends) - max(without))
        communication = inside + own.gradients + own.after + parts.loss
        # Waiting for other stages includes waiting for what they send.
        bubble = 0.0 if p == 1 else max(0.0, step - compute - communication - own.update)
        time = StepTime(
            step_seconds=compute + communication + bubble + own.update + late,
            compute_seconds=compute,
            communication_seconds=communication,
            bubble_seconds=bubble,
            optimizer_seconds=own.update + late,
        )
        shares = {
            "compute" + (f" of stage {rank}" if p > 1 else ""): compute,
            "pipeline bubble": bubble - min(sent, bubble),
            "optimizer step": own.update + late,
            "sending activations between stages": min(sent, bubble),
        }
        name = "tensor-parallel all-reduces" if plan.tensor > 1 else "gathering sharded parameters"
        if plan.tensor > 1 and plan.zero_stage >= 2:
            name = "tensor-parallel all-reduces and gathering sharded parameters"
        shares[name] = inside
        shares["exposed reduction of gradients"] = own.gradients
        shares["broadcast of updated parameters"] = own.after
        bound, seconds = max(shares.items(), key=lambda item: item[1])
        return time, f"{bound} ({seconds / time.step_seconds:.0%} of the step)"

    def _totals(self, plan: Plan) -> tuple[float, float, float]:
        """Peak FLOP/s, watts and dollars per hour of all devices; watts or dollars are 0 unless all are known."""
        key = (plan.devices, plan.precision)
        found = self._flop_rates.get(key)
        if found is None:
            count = Counter(self.cluster.devices[self._position[name]].accelerator for name in plan.devices)
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
