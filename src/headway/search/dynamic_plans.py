"""Whole plans by the dynamic programme: which stage problems to ask it, and what its answers are by the predictor.

`dynamic.py` solves one stage problem: one size of micro-batch, one ZeRO stage, memory and time from tables. Here those
are chosen, tables are corrected where the predictor finds that a solution does not fit, and solutions are interleaved
and recompute no more than they must.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from headway.hardware.cluster import Cluster
from headway.plan.plan import Plan
from headway.predict.step import Predictor
from headway.search.dynamic import solve
from headway.search.ranking import Candidate
from headway.search.tables import Pool, options_of, plan_of, pools_of, sharding_of, stage_problem
from headway.workload.graph import Workload

__all__ = ["dynamic_search", "fits", "recompute_less"]

# The tables are a model of the predictor: solutions this close are not told apart by solving longer.
_EPSILON = 0.005
# A solution that is slower by less than this may still win: interleaved, it loses most of its bubble.
_PREFERRED = 1.5
# The tables' memory is brought to the predictor's so many times, where a solution turns out not to fit.
_CORRECTIONS = 3


def dynamic_search(
    workload: Workload,
    cluster: Cluster,
    predictor: Predictor,
    *,
    keep: int = 5,
    budget_seconds: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    memory_fraction: float = 0.95,
    micro_batches: Sequence[int] | None = None,
    zero_stages: Sequence[int] = (2, 3, 1, 0),
    pools: Sequence[Pool] | None = None,
) -> list[Candidate]:
    """Plans whose stages the dynamic programme chose, the `keep` fastest by the predictor, best first.

    All devices of `pools` work (None: of the cluster). One problem is solved, to within 0.5 %, for each size of
    micro-batch and ZeRO stage that is looked at. `micro_batches` (samples through the whole pipeline) are looked at
    from about 32 of them in both directions, until it gets worse twice, and the whole batch in one; for the best the
    other ZeRO stages are tried. Each solution is also predicted interleaved, and recomputes no more than it must.
    `progress` is told the number of problems solved and of those at hand. Nothing is returned where nothing fits. After
    `budget_seconds` no further problem is begun.
    """
    began = time.perf_counter()
    batch = workload.global_batch
    pools = pools or pools_of(cluster)
    devices = sum(pool.devices for pool in pools)
    sizes = sorted(micro_batches or _sizes(batch))
    best: list[Candidate] = []
    seconds: dict[tuple[int, int], float] = {}

    def least() -> float:
        return min((found.prediction.time.step_seconds for found in best), default=math.inf)

    def look(size: int, zero: int) -> float:
        """Seconds of the best plan of one problem."""
        if (size, zero) not in seconds:
            if budget_seconds is not None and seconds and time.perf_counter() - began > budget_seconds:
                return math.inf
            bar = least() * _PREFERRED
            found = _candidate(workload, cluster, predictor, pools, size, zero, memory_fraction, bar)
            if found is not None and all(found.plan != other.plan for other in best):
                best.append(found)
            seconds[size, zero] = math.inf if found is None else found.prediction.time.step_seconds
            if progress is not None:
                progress(len(seconds), len(sizes) + len(zero_stages) - 1)
        return seconds[size, zero]

    if sizes[-1] == batch:
        # One micro-batch leaves no pipeline: a single stage, and a first bar for the others.
        for zero in zero_stages:
            look(batch, zero)
    # Sub-meshes of whole nodes need a sample for each replica.
    node = max(len(pool.nodes[0]) for pool in pools)
    wanted = max(batch / 32, devices / (node * len(workload.graph.layers)))
    middle = min(range(len(sizes)), key=lambda at: abs(math.log(sizes[at] / wanted)))
    for zero in zero_stages:
        if any(found.plan.pipeline > 1 for found in best):
            break
        reached = look(sizes[middle], zero)
        for direction in (-1, 1):
            least_here, worse = reached, 0
            at = middle + direction
            while 0 <= at < len(sizes) and worse < 2:
                value = look(sizes[at], zero)
                # Where nothing fits, smaller micro-batches are the way out: nothing is learned from larger ones.
                worse += value >= least_here and (math.isfinite(value) or direction > 0)
                least_here = min(least_here, value)
                at += direction
    if best:
        size = min(seconds, key=lambda key: seconds[key])[0]
        for zero in zero_stages:
            look(size, zero)
    return sorted(best, key=lambda found: (found.prediction.time.step_seconds, found.prediction.peak_bytes))[:keep]


def _sizes(batch: int) -> list[int]:
    """Micro-batches to try: the divisors of the batch, of many only those that are about a factor of two apart."""
    divisors = [size for size in range(1, batch + 1) if batch % size == 0]
    if len(divisors) <= 8:
        return divisors
    chosen = [1]
    for size in divisors:
        if size >= 2 * chosen[-1]:
            chosen.append(size)
    return chosen


def _candidate(
    workload: Workload, cluster: Cluster, predictor: Predictor, pools: Sequence[Pool], size: int, zero: int,
    memory_fraction: float, bar: float,
) -> Candidate | None:  # fmt: skip
    """The best plan with micro-batches of `size` samples that fits, by the tables; None: there is none below `bar`."""
    options = options_of(workload.graph, pools, size, zero_stage=zero)
    if size == workload.global_batch:
        options = tuple(option for option in options if option.devices == sum(pool.devices for pool in pools))
    if not options:
        return None
    problem = stage_problem(
        workload, cluster, predictor, micro_batch=size, options=options, memory_fraction=memory_fraction, pools=pools
    )
    for _ in range(_CORRECTIONS):
        solution = solve(problem, epsilon=_EPSILON, better_than=bar)
        if not solution.stages:
            return None
        plan = plan_of(problem, solution.stages, workload, cluster, pools=pools)
        over = _over(plan, cluster, predictor, memory_fraction)
        if max(over) <= 1:
            plans = [recompute_less(plan, cluster, predictor, memory_fraction)]
            plans += _interleaved(plan, cluster, predictor, memory_fraction)
            found = [Candidate(plan=one, prediction=predictor.predict(one)) for one in plans]
            return min(found, key=lambda one: one.prediction.time.step_seconds)
        # The tables were too generous: with what those stages really need the programme decides again.
        capacity = problem.capacity_bytes.copy()
        for stage, factor in zip(solution.stages, over, strict=True):
            capacity[stage.option] /= max(1.0, factor)
        problem = replace(problem, capacity_bytes=capacity)
    return None


def fits(plan: Plan, cluster: Cluster, predictor: Predictor, memory_fraction: float = 0.95) -> bool:
    """Whether every device has room for its part of the plan, by the predictor."""
    return max(_over(plan, cluster, predictor, memory_fraction)) <= 1


def _over(plan: Plan, cluster: Cluster, predictor: Predictor, memory_fraction: float) -> list[float]:
    """For each stage, memory of its fullest rank over what may be used."""
    memory = predictor.memory(plan)
    room = {device.name: cluster.accelerators[device.accelerator].memory_bytes for device in cluster.devices}
    found = []
    for rank in range(plan.pipeline):
        first = plan.first_rank(rank)
        # Ranks that are alike share one record.
        ranks = {(id(memory[at]), room[plan.devices[at]]): at for at in range(first, first + plan.width(rank))}
        found.append(max(memory[at].total_bytes / (has * memory_fraction) for (_, has), at in ranks.items()))
    return found


def recompute_less(plan: Plan, cluster: Cluster, predictor: Predictor, memory_fraction: float = 0.95) -> Plan:
    """The plan with as few recomputed layers as fit on each pipeline rank: by bisection, all ranks at once."""
    if not any(stage.recompute for stage in plan.stages):
        return plan

    def with_counts(counts: Sequence[int]) -> Plan:
        left, stages = list(counts), []
        for position, stage in enumerate(plan.stages):
            rank = position % plan.pipeline
            chosen = stage.recompute[: left[rank]]
            left[rank] -= len(chosen)
            stages.append(msgspec.structs.replace(stage, recompute=chosen))
        return msgspec.structs.replace(plan, stages=tuple(stages))

    ranks = range(plan.pipeline)
    enough = [sum(len(plan.stages[at].recompute) for at in plan.stages_of(rank)) for rank in ranks]
    too_few = [-1] * len(enough)
    while any(high - low > 1 for low, high in zip(too_few, enough, strict=True)):
        middle = [(low + high) // 2 if high - low > 1 else high for low, high in zip(too_few, enough, strict=True)]
        over = _over(with_counts(middle), cluster, predictor, memory_fraction)
        for at, count in enumerate(middle):
            if count != enough[at]:
                if over[at] <= 1:
                    enough[at] = count
                else:
                    too_few[at] = count
    return with_counts(enough)


def _interleaved(plan: Plan, cluster: Cluster, predictor: Predictor, memory_fraction: float) -> list[Plan]:
    """The plan with each rank's layers in 2, 4 or 8 chunks, rank after rank (Narayanan et al., SC 2021, section 2.2).

    Every rank keeps its number of layers. Those that fit, with all layers recomputed if they must be.
    """
    found = []
    counts = [stage.stop - stage.start for stage in plan.stages]
    for chunks in (2, 4, 8):
        if plan.pipeline == 1 or plan.micro_batches % plan.pipeline or min(counts) < chunks:
            break
        start, stages = 0, []
        for chunk in range(chunks):
            for stage, count in zip(plan.stages, counts, strict=True):
                stop = start + count // chunks + (chunk < count % chunks)
                stages.append(msgspec.structs.replace(stage, start=start, stop=stop, recompute=()))
                start = stop
        sharding = {
            name: style
            for (_, tensor), held in ((plan.degrees(at % plan.pipeline), one) for at, one in enumerate(stages))
            for name, style in sharding_of(predictor.workload.graph, tensor, held.start, held.stop).items()
        }
        plain = msgspec.structs.replace(plan, stages=tuple(stages), schedule="interleaved", tensor_sharding=sharding)
        again = [msgspec.structs.replace(one, recompute=tuple(range(one.start, one.stop))) for one in stages]
        if fits(plain, cluster, predictor, memory_fraction):
            found.append(plain)
        elif fits(whole := msgspec.structs.replace(plain, stages=tuple(again)), cluster, predictor, memory_fraction):
            found.append(recompute_less(whole, cluster, predictor, memory_fraction))
    return found
