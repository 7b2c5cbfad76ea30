"""Branch and bound over all plans: best first, and nothing is left out that could be among the best.

The space is a tree: meshes (devices and degrees), in each of them groups (schedule and micro-batch), in each of them
states (ZeRO stage, and where parameters and optimizer rest). Every node has a lower bound on what the goal counts. The
node with the least bound is opened next; once that bound is worse than the worst of the best `keep` plans found so far,
so is everything that is still closed, and the search ends (Land and Doig, Econometrica 1960). Only plans whose bound is
in the way are predicted in full.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import msgspec
import numpy as np

from headway.plan.plan import Plan, Stage
from headway.predict.pipeline import in_flight
from headway.predict.prediction import Memory, Prediction
from headway.predict.programs import choices
from headway.predict.step import Predictor
from headway.search.bounds import Bounds
from headway.search.ranking import Candidate, Goal
from headway.search.space import Group, Mesh, Placement, Space, States
from headway.search.stages import balanced_cuts, stage_costs

__all__ = ["Found", "MeshRecord", "Misfit", "exhaustive_search"]

# So many meshes that a bound rules out are looked into nevertheless, up to so many plans each, to name the reason.
_EXPLAINED_MESHES = 8
_EXPLAINED_PLANS = 6

# Key figures of a plan, smaller is better: what the goal counts, then what decides between equals.
Figures = tuple[float, float]


class Misfit(NamedTuple):
    """A plan that does not fit, the rank that lacks most, what it needs and how many bytes it lacks."""

    excess_bytes: float
    plan: Plan
    memory: Memory
    rank: int


class _Attempt(NamedTuple):
    """A plan and the memory that it needs; `over`: bytes that each pipeline rank lacks (negative: has left)."""

    plan: Plan
    over: np.ndarray
    worst: Memory  # of the rank that lacks most
    rank: int
    peak_bytes: float
    excess_bytes: float
    fits: bool


class MeshRecord:
    """What the search learnt about one mesh."""

    def __init__(self, mesh: Mesh, plans: int, bound_seconds: float) -> None:
        self.mesh = mesh
        self.plans = plans
        self.bound_seconds = bound_seconds
        self.open_bound: Figures | None = None  # least bound of what was never predicted
        self.excess_bytes = math.inf  # least excess of what was left out by a bound on memory
        self.excess_of = ""  # and what that bound counted
        self.best: tuple[Figures, Candidate] | None = None
        self.boundless: tuple[Figures, Candidate] | None = None  # the best if memory had no limit, where it is too slow
        self.misfit: Misfit | None = None


class Found(NamedTuple):
    """The best plans with their figures, best first, and how the search went."""

    best: tuple[tuple[Figures, Candidate], ...]
    records: tuple[MeshRecord, ...]
    impossible: tuple[tuple[Mesh, str], ...]
    totals: dict[str, int]
    considered: int
    evaluated: int
    history: tuple[tuple[float, float], ...] = ()


class _Node(NamedTuple):
    bound: Figures
    order: int  # no two nodes share it: what follows is never compared
    record: MeshRecord
    group: Group | None
    exact_cuts: bool


def exhaustive_search(
    space: Space,
    predictor: Predictor,
    *,
    goal: Goal = "time",
    keep: int = 5,
    limited: bool = True,
    prune: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Found:
    """The best `keep` plans of a space that fit into memory.

    `limited=False` ignores how much memory there is. `prune=False` predicts every plan of the space: the same answer,
    slowly. `progress` is called with the number of plans settled and the number of all plans.
    """
    return _Search(space, predictor, goal, keep, limited, prune, progress).run()


class _Search:
    def __init__(
        self, space: Space, predictor: Predictor, goal: Goal, keep: int, limited: bool, prune: bool,
        progress: Callable[[int, int], None] | None,
    ) -> None:  # fmt: skip
        self.space = space
        self.predictor = predictor
        self.bounds = Bounds(space, predictor)
        self.goal = goal
        self.keep = keep
        self.limited = limited
        self.prune = prune
        self.progress = progress
        self.best: list[tuple[Figures, int, Candidate]] = []
        self.evaluated = 0
        self.settled = 0
        self.order = 0
        self.began = time.perf_counter()
        self.history: list[tuple[float, float]] = []
        self.totals = {"does not fit": 0, "worse": 0, "worse by a bound": 0}
        self.priced = all(kind.dollars_per_hour for kind in space.cluster.accelerators.values())
        self._only_gpus = all(kind.torch_device != "cpu" for kind in space.cluster.accelerators.values())
        self._stages: dict[tuple, Stage] = {}
        self._room: dict[Placement, np.ndarray] = {}
        self._least: dict[tuple[Placement, int], tuple[np.ndarray, list[int]]] = {}

    # ----------------------------------------------------------------------------------------------------- figures

    def _rate(self, placement: Placement) -> float:
        """What a second on these devices costs: dollars, or device-seconds where a price is not known."""
        return placement.dollars_per_hour / 3600 if self.priced else float(len(placement.devices))

    def _figures(self, placement: Placement, prediction: Prediction, peak: float) -> Figures:
        seconds = prediction.time.step_seconds
        if self.goal == "memory":
            return peak, seconds
        if self.goal == "cost":
            return seconds * self._rate(placement), peak
        return seconds, peak

    def _bound(self, placement: Placement, seconds: float, state_bytes: float) -> Figures:
        if self.goal == "memory":
            return state_bytes, seconds
        if self.goal == "cost":
            return seconds * self._rate(placement), 0.0
        return seconds, 0.0

    def _hopeless(self, bound: Figures) -> bool:
        return self.prune and len(self.best) == self.keep and bound > self.best[-1][0]

    # -------------------------------------------------------------------------------------------------------- tree

    def run(self) -> Found:
        records: list[MeshRecord] = []
        impossible: list[tuple[Mesh, str]] = []
        heap: list[_Node] = []
        for count in self.space.counts:
            for placement in self.space.placements(count):
                for mesh, obstacle in self.space.meshes(placement):
                    if obstacle:
                        impossible.append((mesh, obstacle))
                        continue
                    plans = len(self.space.groups(mesh)) * len(self.space.states(mesh))
                    record = MeshRecord(mesh, plans, self.bounds.mesh_seconds(mesh))
                    records.append(record)
                    self._push(heap, record, record.bound_seconds, None, False)
        considered = sum(record.plans for record in records)
        while heap:
            node = heapq.heappop(heap)
            if self._hopeless(node.bound):
                # Every other node has at least this bound.
                self._explain([node, *heap])
                break
            self._open(heap, node)
            if self.progress is not None:
                self.progress(self.settled, considered)
        if self.progress is not None:
            self.progress(considered, considered)
        self._choose_algorithms()
        return Found(
            best=tuple((figures, candidate) for figures, _, candidate in self.best),
            records=tuple(records),
            impossible=tuple(impossible),
            totals={reason: count for reason, count in self.totals.items() if count},
            considered=considered,
            evaluated=self.evaluated,
            history=tuple(self.history),
        )

    def _choose_algorithms(self) -> None:
        """Name the fastest algorithm of each axis for the best plans, where Headway's exchange carries them out.

        Axes do not depend on each other, so one after the other is exact for each plan. The plans were compared under
        the exchange's own choice: one that only an algorithm of its own would bring among the best is not seen.
        """
        chosen: list[tuple[Figures, int, Candidate]] = []
        for figures, order, candidate in self.best:
            plan = candidate.plan
            for axis, names in choices(plan):
                options = [
                    msgspec.structs.replace(plan, collectives=plan.collectives | ({axis: name} if name else {}))
                    for name in names
                ]
                plan = min(options, key=lambda one: self.predictor.step_time(one).step_seconds)
            if plan is not candidate.plan and plan.collectives:
                candidate = Candidate(plan=plan, prediction=self.predictor.predict(plan))
                peak = max(memory.total_bytes for memory in candidate.prediction.memory)
                placement = self._placement_of(plan)
                figures = self._figures(placement, candidate.prediction, peak)
            chosen.append((figures, order, candidate))
        self.best = sorted(chosen, key=lambda entry: entry[:2])

    def _placement_of(self, plan: Plan) -> Placement:
        return next(one for one in self._room if one.devices == plan.devices)

    def _push(self, heap: list[_Node], record: MeshRecord, seconds: float, group: Group | None, exact: bool) -> None:
        mesh = record.mesh
        held = min(self._least_bytes(mesh, group, states) for states in self.space.states(mesh))
        self.order += 1
        bound = self._bound(mesh.placement, seconds, held)
        heapq.heappush(heap, _Node(bound, self.order, record, group, exact))

    def _open(self, heap: list[_Node], node: _Node) -> None:
        record, group = node.record, node.group
        mesh = record.mesh
        if group is None:
            if self._too_full(record):
                return
            for child in self.space.groups(mesh):
                self._push(heap, record, self.bounds.group_seconds(mesh, child), child, False)
        elif not node.exact_cuts and mesh.pipeline > 1 and self._has_room(mesh, group):
            seconds = max(self.bounds.group_seconds(mesh, group), self.bounds.cut_seconds(mesh, group))
            self._push(heap, record, seconds, group, True)
        else:
            roomy: set[int] = set()
            for states in self.space.states(mesh):
                if states.is_here and self._is_roomy(mesh, group, states):
                    roomy.add(states.zero_stage)
                if not states.is_here and states.zero_stage in roomy:
                    self.settled += 1
                    self.totals["worse"] += 1
                else:
                    self._settle(record, group, states)

    def _explain(self, closed: list[_Node]) -> None:
        """Look into the likeliest of the meshes that stay closed, only to say what is wrong with them."""
        widest = max(self.space.counts)
        of_record: dict[int, list[_Node]] = {}
        for node in sorted(closed):
            of_record.setdefault(id(node.record), []).append(node)
        explained = 0
        for nodes in of_record.values():
            record = nodes[0].record
            wanted = record.best is None and record.misfit is None and len(record.mesh.placement.devices) == widest
            if wanted and explained < _EXPLAINED_MESHES:
                explained += 1
                limit = self.evaluated + _EXPLAINED_PLANS
                while nodes and record.best is None and self.evaluated < limit:
                    self._open(nodes, heapq.heappop(nodes))
            for node in nodes:
                self._leave(node)

    def _has_room(self, mesh: Mesh, group: Group) -> bool:
        if not self.limited or not self.prune:
            return True
        return min(self._lacking(mesh, group, states) for states in self.space.states(mesh)) <= 0

    def _leave(self, node: _Node) -> None:
        record = node.record
        if node.group is None and self._too_full(record):
            return
        plans = record.plans if node.group is None else len(self.space.states(record.mesh))
        self.totals["worse by a bound"] += plans
        record.open_bound = node.bound if record.open_bound is None else min(record.open_bound, node.bound)

    def _too_full(self, record: MeshRecord) -> bool:
        """Whether the states alone leave no plan of a mesh any room."""
        if not self.limited or not self.prune:
            return False
        lacks = [self._lacking(record.mesh, None, states) for states in self.space.states(record.mesh)]
        if min(lacks) <= 0:
            return False
        record.excess_bytes, record.excess_of = min(lacks), "parameters, gradients and optimizer states alone"
        self.totals["does not fit"] += record.plans
        self.settled += record.plans
        return True

    def _least_bytes(self, mesh: Mesh, group: Group | None, states: States) -> float:
        if group is None:
            return self.bounds.state_bytes(mesh, states)
        return self.bounds.group_bytes(mesh, group, states)

    def _lacking(self, mesh: Mesh, group: Group | None, states: States) -> float:
        return self._least_bytes(mesh, group, states) - float(np.max(self._room_of(mesh.placement)))

    # ------------------------------------------------------------------------------------------------------ leaves

    def _is_roomy(self, mesh: Mesh, group: Group, states: States) -> bool:
        """Whether everything fits on the devices as it is: then no state is sent elsewhere, which only costs time."""
        wanted = self.space.constraints
        if wanted.offload == "none" or wanted.recompute not in ("any", "none") or self.goal == "memory":
            return False
        if not self._only_gpus:
            return False
        return self._attempt(mesh, self._plan(mesh, group, states, self.bounds.cuts(mesh, group), frozenset())).fits

    def _settle(self, record: MeshRecord, group: Group, states: States) -> None:
        self.settled += 1
        mesh = record.mesh
        if self.limited and self.prune:
            lacks = self._lacking(mesh, group, states)
            if lacks > 0:
                if lacks < record.excess_bytes:
                    record.excess_bytes, record.excess_of = lacks, "its states and the least activations"
                self.totals["does not fit"] += 1
                return
        if self._too_slow(record, group, states):
            return
        chosen, nearest = self._choose(mesh, group, states)
        if chosen is None:
            self.totals["does not fit"] += 1
            if record.misfit is None or nearest.excess_bytes < record.misfit.excess_bytes:
                record.misfit = Misfit(nearest.excess_bytes, nearest.plan, nearest.worst, nearest.rank)
            return
        if states.activations_on != "device" and chosen.plan.activations_on == "device":
            self.totals["worse"] += 1  # nothing had to go: the same plan as without
            return
        peak = chosen.peak_bytes
        known = record.best is not None and record.best[0][0] <= peak
        if self.goal == "memory" and (known or not self.limited) and self._hopeless((peak, 0.0)):
            # Only the time is not known, and it decides between equals alone.
            self.totals["worse"] += 1
            return
        self.evaluated += 1
        candidate = Candidate(plan=chosen.plan, prediction=self.predictor.predict(chosen.plan))
        figures = self._figures(mesh.placement, candidate.prediction, peak)
        if record.best is None or figures < record.best[0]:
            record.best = (figures, candidate)
        self.order += 1
        self.best.append((figures, self.order, candidate))
        self.best.sort(key=lambda entry: entry[:2])
        if self.best[0][2] is candidate:
            self.history.append((time.perf_counter() - self.began, candidate.prediction.time.step_seconds))
        if len(self.best) > self.keep:
            self.best.pop()
            self.totals["worse"] += 1

    def _too_slow(self, record: MeshRecord, group: Group, states: States) -> bool:
        """Whether a leaf would be worse than what was found even if nothing had to be recomputed.

        Recomputation adds to the compute of a stage. It may cover communication, by no more than it adds.
        """
        if not self.limited or self.goal == "memory" or not self.prune or len(self.best) < self.keep:
            return False
        mesh = record.mesh
        plain = self._plan(mesh, group, states, self.bounds.cuts(mesh, group), frozenset())
        # Only the time: the memory of each of ten thousand ranks is not asked for.
        prediction = Prediction(time=self.predictor.step_time(plain), memory=(), samples_per_second=0.0)
        figures = self._figures(mesh.placement, prediction, 0.0)
        if not self._hopeless((figures[0] * (1 - 1e-9), 0.0)):
            return False
        if record.boundless is None or figures < record.boundless[0]:
            record.boundless = (figures, Candidate(plan=plain, prediction=prediction))
        self.totals["worse by a bound"] += 1
        return True

    def _choose(self, mesh: Mesh, group: Group, states: States) -> tuple[_Attempt | None, _Attempt]:
        """The plan of a leaf that recomputes least and fits (or None), and the one that comes nearest to fitting.

        Memory alone decides, so nothing is timed here. For the goal "memory" the plan that needs least is chosen.
        """
        cuts = self.bounds.cuts(mesh, group)
        wanted = self.space.constraints.recompute
        if states.activations_on != "device":
            wanted = "any"  # of what is swapped
        everything = frozenset(range(self.space.layers))

        def attempt(cuts: tuple[int, ...], recompute: frozenset[int], selective: bool = False) -> _Attempt:
            return self._attempt(mesh, self._plan(mesh, group, states, cuts, recompute, selective))

        if wanted == "selective":
            only = attempt(cuts, frozenset(), True)
            return (only if only.fits else None), only
        if wanted != "any":
            only = attempt(cuts, everything if wanted == "full" else frozenset())
            return (only if only.fits else None), only
        plain = attempt(cuts, frozenset())
        if plain.fits and self.goal != "memory":
            return plain, plain
        full = attempt(cuts, everything)
        tried = [full, plain]
        if not full.fits and not plain.fits:
            other = self._roomier_cuts(mesh, group, states, full.over)
            if other is not None and other != cuts:
                cuts = other
                plain, full = attempt(cuts, frozenset()), attempt(cuts, everything)
                tried += [full, plain]
        fitting = [one for one in tried if one.fits]
        if not fitting:
            return None, min(tried, key=lambda one: one.excess_bytes)
        if self.goal == "memory":
            least = min(fitting, key=lambda one: one.peak_bytes)
            return least, least
        if plain.fits:
            return plain, plain
        less = self._recompute_less(mesh, group, cuts, plain.over, full.over, attempt) or full
        if self.bounds.cores and not self.space.constraints.runnable and states.activations_on == "device":
            selective = attempt(cuts, frozenset(), True)
            if selective.fits and self._seconds(selective) < self._seconds(less):
                return selective, full
        return less, full

    def _seconds(self, attempt: _Attempt) -> float:
        return self.predictor.step_time(attempt.plan).step_seconds

    def _attempt(self, mesh: Mesh, plan: Plan) -> _Attempt:
        peaks = self.predictor.residency.peaks(plan)
        used = np.array([memory.total_bytes for memory in peaks])
        room, smallest = self._least_room(mesh)
        over = used - room
        if plan.tiers:
            if not self._only_gpus:  # there the host's memory is the device's
                over += np.array([memory.host_bytes for memory in peaks])
            over = np.maximum(over, self._lacking_elsewhere(plan, peaks))
        worst = int(np.argmax(over))
        excess = float(over[worst])
        fits = excess <= 0 or not self.limited
        return _Attempt(plan, over, peaks[worst], smallest[worst], float(np.max(used)), excess, fits)

    def _lacking_elsewhere(self, plan: Plan, peaks: tuple[Memory, ...]) -> np.ndarray:
        """For each pipeline rank the bytes that it lacks in the tier that lacks most (negative: has left)."""
        lacking = np.full(len(peaks), -np.inf)
        for at, memory in enumerate(peaks):
            device = plan.devices[plan.first_rank(at)]
            for tier, size in memory.tiers.items():
                room = self.predictor.stages.tiers.capacity_bytes(tier, device)  # type: ignore[arg-type]
                lacking[at] = max(lacking[at], size - room)
        return lacking

    def _least_room(self, mesh: Mesh) -> tuple[np.ndarray, list[int]]:
        """For each pipeline rank the bytes that a plan may use on its smallest device, and which rank that is."""
        key = (mesh.placement, mesh.pipeline)
        found = self._least.get(key)
        if found is None:
            rows = self._room_of(mesh.placement).reshape(mesh.pipeline, -1)
            at = rows.argmin(axis=1)
            found = self._least[key] = (
                rows.min(axis=1),
                [row * rows.shape[1] + int(one) for row, one in enumerate(at)],
            )
        return found

    def _recompute_less(
        self, mesh: Mesh, group: Group, cuts: tuple[int, ...], over_plain: np.ndarray, over_full: np.ndarray,
        attempt: Callable[[tuple[int, ...], frozenset[int]], _Attempt],
    ) -> _Attempt | None:  # fmt: skip
        """Recompute just as many layers on each pipeline rank as make it fit, those first that free most per second."""
        p = mesh.pipeline
        held = [
            [layer for stage in range(rank, len(cuts) - 1, p) for layer in range(cuts[stage], cuts[stage + 1])]
            for rank in range(p)
        ]
        worth = self._worth(mesh, group)
        for layers in held:
            layers.sort(key=lambda layer: (-worth[layer], layer))
        # Bisection on all ranks at once: what one recomputes changes nothing for the others.
        enough = np.where(over_plain > 0, [len(layers) for layers in held], 0)
        too_few = np.where(over_plain > 0, 0, -1)

        def with_counts(counts: np.ndarray) -> _Attempt:
            chosen = (layer for layers, count in zip(held, counts, strict=True) for layer in layers[:count])
            return attempt(cuts, frozenset(chosen))

        # Layers are mostly alike, so that memory falls in proportion: the first tries are where it should be enough.
        share = over_plain / np.maximum(over_plain - over_full, 1.0)
        guess = np.ceil(np.clip(share, 0.0, 1.0) * enough).astype(int)
        for around in range(64):
            if not np.any(enough - too_few > 1):
                break
            middle = (enough + too_few) // 2
            if around < 2:
                middle = np.clip(guess, too_few + 1, np.maximum(enough - 1, too_few + 1))
            tried = np.where(enough - too_few > 1, middle, enough)
            fits = with_counts(tried).over <= 0
            enough = np.where(fits, tried, enough)
            too_few = np.where(fits, too_few, tried)
            guess = np.where(fits, guess - 1, guess + 1)
        found = with_counts(enough)
        return found if found.fits else None

    def _worth(self, mesh: Mesh, group: Group) -> list[float]:
        """Bytes that recomputing each layer frees, for each second of its forward pass."""
        kind = mesh.placement.kinds[0]
        forward, _ = self.predictor.layer_seconds(
            kind, self.bounds.share(mesh, group), self.bounds.shards(mesh.tensor), self.space.precision,
            crowded=len(mesh.placement.devices) > 1,
        )  # fmt: skip
        seconds = np.maximum(np.diff(forward), 1e-12)
        saved = np.array([layer.saved.at(group.micro_batch) for layer in self.bounds.graph.layers])
        # Layers of one signature differ by the rounding of their sums only.
        return [float(f"{value:.6g}") for value in saved / seconds]

    def _roomier_cuts(self, mesh: Mesh, group: Group, held: States, over: np.ndarray) -> tuple[int, ...] | None:
        """The fastest cut whose stages fit, by an estimate, with everything recomputed; None if there is no such cut.

        Cuts that balance time may load one device with more states than it can hold (the embedding of a large
        vocabulary computes nothing and weighs much) while others have room.
        """
        if mesh.pipeline == 1 or group.virtual_stages > 1 or not np.any(over < 0):
            return None
        sizes, graph, size = self.predictor.sizes, self.bounds.graph, group.micro_batch
        part = 1 / mesh.context
        shards = self.bounds.shards(mesh.tensor)
        own = [sizes.parameters(at, at + 1, shards) for at in range(self.space.layers)]
        away = held.optimizer_on != "device"
        lean = 0.5 if away and self.space.precision != "float32" else 1.0
        kept = held.optimizer_kept if away else 1.0
        weights = stage_costs(
            [lean * (one.bytes * (held.parameters_on == "device") + kept * one.trainable_bytes) for one in own]
        )
        optimizer = self.space.workload.optimizer
        in_rows = away and self.space.workload.recipe.framework == "headway"
        divided = mesh.replicas if held.zero_stage or in_rows else 1
        elements = np.array([one.trainable_elements for one in own]) / divided
        states = stage_costs(elements * optimizer.state_bytes_per_element * kept)
        temporary = stage_costs(elements * optimizer.temporary_bytes_per_element)
        entering = stage_costs([0.0 if each.input is None else each.input.bytes(size) * part for each in graph.layers])
        working = max(layer.saved.at(size) for layer in graph.layers) / mesh.tensor * part
        room, _ = self._least_room(mesh)
        costs = []
        for rank, cost in enumerate(self.bounds.costs(mesh, 1, size)):
            flights = sum(in_flight(group.schedule, rank, mesh.pipeline, 1, group.micro_batches))
            # The update comes when no activations are left.
            needed = weights + states + np.maximum(entering * flights + working, temporary)
            costs.append(np.where(needed <= room[rank], cost, np.inf))
        return balanced_cuts(costs)

    # ------------------------------------------------------------------------------------------------------- plans

    def _plan(
        self, mesh: Mesh, group: Group, states: States, cuts: tuple[int, ...], recompute: frozenset[int],
        selective: bool = False,
    ) -> Plan:  # fmt: skip
        swap = states.activations_on != "device"
        return Plan(
            model=self.space.workload.graph.name,
            devices=mesh.placement.devices,
            global_batch=self.space.workload.global_batch,
            micro_batch=group.micro_batch,
            stages=tuple(self._stage(start, stop, recompute, selective, swap) for start, stop in pairwise(cuts)),
            data=mesh.data,
            tensor=mesh.tensor,
            pipeline=mesh.pipeline,
            schedule=group.schedule,
            context=mesh.context,
            expert=mesh.expert,
            sequence_parallel=self.space.sequence_parallel(mesh.tensor),
            zero_stage=states.zero_stage,
            parameters_on=states.parameters_on,
            optimizer_on=states.optimizer_on,
            activations_on=states.activations_on if recompute else "device",
            optimizer_kept=states.optimizer_kept,
            delayed_update=states.delayed_update,
            tensor_sharding=self.space.split(mesh.tensor).sharding,
            precision=self.space.precision,
            exchange=self.space.constraints.exchange,
        )

    def _stage(self, start: int, stop: int, recompute: frozenset[int], selective: bool, swap: bool) -> Stage:
        again = tuple(layer for layer in range(start, stop) if layer in recompute)
        key = (start, stop, again, selective, swap)
        found = self._stages.get(key)
        if found is None:
            cores = tuple(layer for layer in range(start, stop) if selective and layer in self.bounds.cores)
            if swap:
                # A stage that lists none swaps all: where others swap, each gives at least one away.
                stage = Stage(start=start, stop=stop, swap=again or ((start,) if recompute else ()))
            else:
                stage = Stage(start=start, stop=stop, recompute=again, recompute_attention=cores)
            found = self._stages[key] = stage
        return found

    def _room_of(self, placement: Placement) -> np.ndarray:
        """Bytes that a plan may use on each device."""
        found = self._room.get(placement)
        if found is None:
            kinds = self.space.cluster.accelerators
            fraction = self.space.constraints.memory_fraction
            found = np.array([kinds[kind].memory_bytes * fraction for kind in placement.kinds])
            self._room[placement] = found
        return found
