"""Plans for clusters of unequal devices: pipelines across kinds, and replicas of unequal speed.

Three families, each judged by the predictor:

- one pipeline whose stages stand on different kinds of device, with layers by speed and memory: the dynamic programme
  over several pools (`search.dynamic`), and then other placements of the very stages: all orders of the pools among
  stages of equal width, as links decide (Alpa fixes the mapping; Zheng et al., OSDI 2022, section 5.2);
- virtual workers (HetPipe: Park et al., ATC 2020, section 4): every replica is a pipeline over its own devices, either
  all of one kind ("node partition", replicas unequal) or all with the same mixture ("equal distribution");
- unequal replicas get unequal shares of the batch, so that none waits for another: `apportion` is optimal.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, pairwise, permutations

import msgspec

from headway.errors import InputError
from headway.hardware.cluster import Cluster
from headway.plan.plan import Plan, Stage
from headway.predict.step import Predictor
from headway.search.dynamic_plans import dynamic_search, fits, recompute_less
from headway.search.ranking import Candidate
from headway.search.stages import balanced_cuts, stage_costs
from headway.search.tables import Pool, pools_of, sharding_of, shards_of
from headway.workload.graph import Workload

__all__ = ["apportion", "better_mapping", "search_heterogeneous", "virtual_workers"]

# So many ways to place the same stages are predicted.
_MOST_MAPPINGS = 120


def apportion(seconds: Sequence[Callable[[int], float]], total: int) -> tuple[int, ...]:
    """How many of `total` micro-batches each replica gets, at least one, so that the last is done soonest.

    `seconds[r](n)`: how long replica r takes for n of them; must not fall with n. Each micro-batch goes to where it is
    done first, which is optimal: were the slowest replica of the result to have fewer, another would have as many more
    and end no sooner. Raises InputError if there are fewer micro-batches than replicas.
    """
    if total < len(seconds):
        raise InputError(
            f"{total} micro-batches for {len(seconds)} replicas", place="shares", remedy="use smaller micro-batches"
        )
    shares = [1] * len(seconds)
    queue = [(takes(2), at) for at, takes in enumerate(seconds)]
    heapq.heapify(queue)
    for _ in range(total - len(seconds)):
        _, at = queue[0]
        shares[at] += 1
        heapq.heapreplace(queue, (seconds[at](shares[at] + 1), at))
    return tuple(shares)


def search_heterogeneous(
    workload: Workload,
    cluster: Cluster,
    predictor: Predictor,
    *,
    keep: int = 5,
    budget_seconds: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    memory_fraction: float = 0.95,
) -> list[Candidate]:
    """The `keep` fastest plans of all families that fit, best first, by the predictor; see the module.

    The dynamic programme searches every choice of pools, since slow devices may cost more than they help; half of
    `budget_seconds` is for that. On a cluster of one kind it is all there is to search.
    """
    began = time.perf_counter()
    pools = pools_of(cluster)
    chosen = [some for count in range(len(pools), 0, -1) for some in combinations(pools, count)]
    found: list[Candidate] = []
    for some in chosen:
        left = None if budget_seconds is None else budget_seconds / 2 - (time.perf_counter() - began)
        if left is not None and left <= 0 and found:
            break
        found += dynamic_search(
            workload, cluster, predictor, keep=keep, budget_seconds=left, progress=progress,
            memory_fraction=memory_fraction, pools=some,
        )  # fmt: skip
    if len(pools) == 1:
        return found
    mapped = [better_mapping(one, cluster, predictor, memory_fraction=memory_fraction) for one in found]
    found += [one for one in mapped if one not in found]
    for plan in virtual_workers(workload, cluster, predictor, pools=pools, memory_fraction=memory_fraction):
        if budget_seconds is not None and time.perf_counter() - began > budget_seconds:
            break
        found.append(Candidate(plan=plan, prediction=predictor.predict(plan)))
    return sorted(found, key=lambda one: (one.prediction.time.step_seconds, one.prediction.peak_bytes))[:keep]


def better_mapping(
    candidate: Candidate, cluster: Cluster, predictor: Predictor, *, memory_fraction: float = 0.95
) -> Candidate:
    """The same stages on the sub-meshes in the order that is predicted to be fastest, and fits.

    Sub-meshes of equal width trade places. Those of one pool are alike, so only orders of the pools are tried, all of
    them while they are few (120), and then exchanges of two stages until none helps.
    """
    plan = candidate.plan
    pool_of = {name: at for at, pool in enumerate(pools_of(cluster)) for names in pool.nodes for name in names}
    groups = [
        plan.devices[plan.first_rank(rank) : plan.first_rank(rank) + plan.width(rank)] for rank in range(plan.pipeline)
    ]
    kinds = [pool_of[group[0]] for group in groups]
    best = candidate

    def consider(order: Sequence[int]) -> bool:
        nonlocal best
        devices = tuple(name for at in order for name in groups[at])
        placed = msgspec.structs.replace(plan, devices=devices)
        if not fits(placed, cluster, predictor, memory_fraction):
            return False
        prediction = predictor.predict(placed)
        if prediction.time.step_seconds >= best.prediction.time.step_seconds * (1 - 1e-9):
            return False
        best = Candidate(plan=placed, prediction=prediction)
        return True

    orders = list(_orders(groups, kinds))
    if len(orders) <= _MOST_MAPPINGS:
        for order in orders:
            consider(order)
        return best
    order = list(range(len(groups)))
    improved = True
    while improved:
        improved = False
        for one in range(len(order)):
            for other in range(one):
                if kinds[order[one]] != kinds[order[other]] and len(groups[one]) == len(groups[other]):
                    order[one], order[other] = order[other], order[one]
                    if consider(order):
                        improved = True
                    else:
                        order[one], order[other] = order[other], order[one]
    return best


def _orders(groups: Sequence[tuple[str, ...]], kinds: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Orders of the groups, of those that place the same kinds alike only one; one too many ends the list."""
    seen = set()
    if math.factorial(len(groups)) > 50_000:
        # Too many to look through: as good as too many.
        yield from (tuple(range(len(groups))) for _ in range(_MOST_MAPPINGS + 1))
        return
    for order in permutations(range(len(groups))):
        if any(len(groups[at]) != len(groups[place]) for place, at in enumerate(order)):
            continue
        pattern = tuple(kinds[at] for at in order)
        if pattern not in seen:
            seen.add(pattern)
            yield order
            if len(seen) > _MOST_MAPPINGS:
                return


def virtual_workers(
    workload: Workload,
    cluster: Cluster,
    predictor: Predictor,
    *,
    pools: Sequence[Pool] | None = None,
    memory_fraction: float = 0.95,
) -> Iterator[Plan]:
    """Valid plans that fit, with a replica for each virtual worker (HetPipe, ATC 2020, section 4).

    "Node partition": each worker has `tensor` x `pipeline` devices of one pool, and shares follow their speeds. "Equal
    distribution": stage k of every worker stands on the same pool, so that workers are alike. Cuts balance the stages
    on the devices that they have; all workers have the same cuts, as a `Plan` demands, which for unequal workers are
    those that suit the slowest. Of the micro-batches for each mesh only the one that seems fastest is kept.
    """
    pools = pools or pools_of(cluster)
    shapes: list[tuple[int, int, tuple[str, ...], list[list[int]]]] = []
    node = min(len(pool.nodes[0]) for pool in pools)
    for tensor in [size for size in pools[0].sizes if size <= node and node % size == 0]:
        if tensor > 1 and not shards_of(workload.graph, tensor).blocks:
            continue
        for pipeline in range(1, min(len(workload.graph.layers), sum(pool.devices for pool in pools) // tensor) + 1):
            shapes += _workers(pools, tensor, pipeline)
    for tensor, pipeline, devices, kinds in shapes:
        best: tuple[float, Plan] | None = None
        for micro_batch in _micro_batches(workload.global_batch, len(kinds)):
            plan = _worker_plan(workload, cluster, predictor, pools, tensor, pipeline, devices, kinds, micro_batch)
            for zero in (2, 3, 1, 0) if plan is not None else ():
                assert plan is not None
                chosen = msgspec.structs.replace(plan, zero_stage=zero if plan.data > 1 else 0)
                if not fits(chosen, cluster, predictor, memory_fraction):
                    whole = [
                        msgspec.structs.replace(stage, recompute=tuple(range(stage.start, stage.stop)))
                        for stage in chosen.stages
                    ]
                    chosen = msgspec.structs.replace(chosen, stages=tuple(whole))
                    if not fits(chosen, cluster, predictor, memory_fraction):
                        continue
                    chosen = recompute_less(chosen, cluster, predictor, memory_fraction)
                seconds = predictor.predict(chosen).time.step_seconds
                if best is None or seconds < best[0]:
                    best = (seconds, chosen)
        if best is not None:
            yield best[1].validate(workload.graph, cluster)


def _micro_batches(batch: int, replicas: int) -> list[int]:
    """Sizes that divide the batch and leave each replica at least one: powers of two."""
    return [2**at for at in range(batch.bit_length()) if batch % 2**at == 0 and batch // 2**at >= replicas]


def _workers(pools: Sequence[Pool], tensor: int, pipeline: int) -> list[tuple]:
    """(tensor, pipeline, devices in the order of the ranks, pool of each stage of each worker)."""
    flat = [[name for names in pool.nodes for name in names] for pool in pools]
    found = []
    width = tensor * pipeline
    if all(len(names) % width == 0 for names in flat):
        workers = [(at, names[start : start + width]) for at, names in enumerate(flat)
                   for start in range(0, len(names), width)]  # fmt: skip
        devices = tuple(
            name for stage in range(pipeline) for _, names in workers
            for name in names[stage * tensor : (stage + 1) * tensor]
        )  # fmt: skip
        found.append((tensor, pipeline, devices, [[at] * pipeline for at, _ in workers]))
    # The same mixture for all: pool k gives each worker as many stages as it has room for.
    replicas = sum(map(len, flat)) // width
    if pipeline >= len(pools) and replicas and sum(map(len, flat)) == replicas * width:
        each = [len(names) / (replicas * tensor) for names in flat]
        if all(count == int(count) and count for count in each):
            for order in permutations(range(len(pools))):
                stages = [at for at in order for _ in range(int(each[at]))]
                left = [iter(names) for names in flat]
                devices = tuple(next(left[at]) for at in stages for _ in range(replicas * tensor))
                found.append((tensor, pipeline, devices, [stages] * replicas))
    return found


def _worker_plan(
    workload: Workload, cluster: Cluster, predictor: Predictor, pools: Sequence[Pool], tensor: int, pipeline: int,
    devices: tuple[str, ...], kinds: list[list[int]], micro_batch: int,
) -> Plan | None:  # fmt: skip
    """A plan without ZeRO, or None where these workers can't fill their pipelines."""
    graph, count = workload.graph, workload.global_batch // micro_batch
    costs = {}
    for at in {pool for worker in kinds for pool in worker}:
        forward, backward = predictor.layer_seconds(
            pools[at].accelerator, micro_batch, shards_of(graph, tensor), workload.precision, crowded=True
        )
        costs[at] = stage_costs([f + b for f, b in zip(_steps(forward), _steps(backward), strict=True)])
    slowest = max(kinds, key=lambda worker: sum(float(costs[at][0, -1]) for at in worker))
    cuts = balanced_cuts([costs[at] for at in slowest])
    if cuts is None:
        return None

    def takes(worker: list[int]) -> Callable[[int], float]:
        stages = [float(costs[at][start, stop]) for at, (start, stop) in zip(worker, pairwise(cuts), strict=True)]
        return lambda share: sum(stages) + (share - 1) * max(stages)

    shares = apportion([takes(worker) for worker in kinds], count)
    if pipeline > 1 and max(shares) < pipeline:
        return None
    alike = len(set(shares)) == 1
    return Plan(
        model=graph.name,
        devices=devices,
        global_batch=workload.global_batch,
        micro_batch=micro_batch,
        stages=tuple(Stage(start=start, stop=stop) for start, stop in pairwise(cuts)),
        data=len(kinds),
        tensor=tensor,
        pipeline=pipeline,
        schedule="none" if pipeline == 1 else "1f1b",
        tensor_sharding=sharding_of(graph, tensor),
        precision=workload.precision,  # type: ignore[arg-type]
        shares=() if alike else shares,
    )


def _steps(before: Sequence[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(before)]
