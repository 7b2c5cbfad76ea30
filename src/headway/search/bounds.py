"""What a plan takes at least: cheap bounds that leave most of the space unvisited and never the best of it.

Each bound is proved in its docstring. Times follow from dependencies alone, memory from what the runtime must hold, so
that they stay true whatever the predictor adds: exposed communication, recomputation, temporaries, rounding.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from headway.plan.plan import Plan, Stage
from headway.predict.communication import all_gather_seconds, all_reduce_seconds, reduce_scatter_seconds
from headway.predict.operators import Shards, elements_of
from headway.predict.pipeline import in_flight
from headway.predict.step import Predictor
from headway.search.space import Group, Mesh, Placement, Space, States
from headway.search.stages import balanced_cuts, stage_costs
from headway.workload.graph import dtype_bytes

__all__ = ["Bounds"]

# Sums are taken in another order than the predictor's: a bound gives way by this much, so that rounding never prunes.
_ROUNDING = 1 - 1e-9


class Bounds:
    """Lower bounds on step time and memory of the plans of one space, memoised by what they depend on."""

    def __init__(self, space: Space, predictor: Predictor) -> None:
        self.space = space
        self.predictor = predictor
        self.graph = space.workload.graph
        # Layers of which recomputing the attention core alone frees anything.
        self.cores = frozenset(
            position
            for position, layer in enumerate(self.graph.layers)
            if layer.attention is not None and layer.attention.core_saved.per_sample > 0
        )
        self._layer_seconds = lru_cache(maxsize=None)(self._measure_layers)
        self._reduce_seconds = lru_cache(maxsize=None)(self._measure_reduces)
        self._fastest = lru_cache(maxsize=None)(self._fastest_sample)
        self._cuts = lru_cache(maxsize=4096)(self._cut)
        self._states = lru_cache(maxsize=None)(self._measure_states)
        self._activations = lru_cache(maxsize=None)(self._measure_activations)
        self._group_bytes: dict[tuple, float] = {}

    def shards(self, tensor: int) -> Shards:
        """The predictor's word for a tensor-parallel split."""
        split = self.space.split(tensor)
        return Shards(tensor, split.blocks, self.space.sequence_parallel(tensor)) if split.blocks else Shards()

    def share(self, mesh: Mesh, group: Group) -> float:
        """Samples of a micro-batch that one rank computes: a part of each, where tokens are divided."""
        return group.micro_batch / mesh.context if mesh.context > 1 else group.micro_batch

    # ------------------------------------------------------------------------------------------------------- time

    def _measure_layers(self, kinds: tuple[str, ...], crowded: bool, micro_batch: float, tensor: int) -> np.ndarray:
        """Seconds of each layer, forward and backward of one micro-batch together, on the slowest of `kinds`."""
        found = []
        for kind in kinds:
            forward, backward = self.predictor.layer_seconds(
                kind, micro_batch, self.shards(tensor), self.space.precision, crowded=crowded
            )
            found.append(np.diff(forward) + np.diff(backward))
        return np.max(found, axis=0)

    def _measure_reduces(
        self, placement: Placement, data: int, tensor: int, pipeline: int, context: int, size: float
    ) -> np.ndarray:
        """Seconds that each layer spends at least in the collectives of its tensor-parallel blocks."""
        seconds = np.zeros(self.space.layers)
        split = self.space.split(tensor)
        # Megatron hides part of them behind products.
        if not split.blocks or self.space.workload.recipe.framework == "megatron":
            return seconds
        channels = self.predictor.communication.channels(
            placement.devices, pipeline, data, tensor, "tensor", context=context
        )
        share = 0.5 if self.space.precision != "float32" else 1.0
        known: dict[float, float] = {}
        for position in split.blocks:
            block = self.graph.blocks[position]
            for kind in (block.output, block.input):
                moved = elements_of(kind, size) * dtype_bytes(kind.dtype) * share
                if not moved:
                    continue
                if moved not in known:
                    known[moved] = min(
                        min(
                            all_reduce_seconds(moved, channel),
                            all_gather_seconds(moved, channel) + reduce_scatter_seconds(moved, channel),
                        )
                        for channel in channels
                    )
                seconds[block.layer] += known[moved]
        return seconds

    def _fastest_sample(self, placement: Placement, tensor: int, context: int) -> float:
        """Seconds of all layers for one sample, at the best micro-batch on the fastest device."""
        batch = self.space.workload.global_batch
        replicas = [data for data in range(1, len(placement.devices) + 1) if batch % data == 0]
        sizes = {size for data in replicas for size in self.space.micro_batches(batch // data)}
        crowded = len(placement.devices) > 1
        return min(
            (
                float(np.sum(self._layer_seconds((kind,), crowded, size / context if context > 1 else size, tensor)))
                / size
                for size in sizes
                for kind in set(placement.kinds)
            ),
            default=0.0,
        )

    def mesh_seconds(self, mesh: Mesh) -> float:
        """At least this long takes any plan of a mesh: all of its devices compute without pause, at their best."""
        share = self.space.workload.global_batch / (mesh.data * mesh.pipeline)
        return share * self._fastest(mesh.placement, mesh.tensor, mesh.context) * _ROUNDING

    def group_seconds(self, mesh: Mesh, group: Group) -> float:
        """At least this long takes any plan of a group, wherever the pipeline is cut.

        Let b_k be the time of a micro-batch in stage k, forward and backward, and m their number. Stage k begins after
        the first micro-batch came through the stages before it and ends before the last one went back through them, so
        the step T is at least b_0 + … + b_(k-1) + m b_k. Hence b_k <= (T - b_0 - … - b_(k-1)) / m: each stage leaves at
        least (1 - 1/m) of what is left of T, and the sum of all b_k is at most T (1 - (1 - 1/m)^p).
        """
        m, p = group.micro_batches, mesh.pipeline
        seconds = self._least_layers(mesh, group)
        total = float(np.sum(seconds))
        if group.virtual_stages > 1 or group.schedule == "zero_bubble":
            # Chunks, and gradients of weights, need not wait for the stages before.
            return max(m * total / p, m * float(np.max(seconds))) * _ROUNDING
        pipelined = total / (1 - (1 - 1 / m) ** p)
        return max(pipelined, m * float(np.max(seconds))) * _ROUNDING

    def _least_layers(self, mesh: Mesh, group: Group) -> np.ndarray:
        crowded = len(mesh.placement.devices) > 1
        kinds = set(mesh.placement.rank_kinds(mesh.pipeline))
        share = self.share(mesh, group)
        compute = np.min([self._layer_seconds(some, crowded, share, mesh.tensor) for some in kinds], axis=0)
        return compute + self._reduces(mesh, share)

    def _reduces(self, mesh: Mesh, share: float) -> np.ndarray:
        return self._reduce_seconds(mesh.placement, mesh.data, mesh.tensor, mesh.pipeline, mesh.context, share)

    def cut_seconds(self, mesh: Mesh, group: Group) -> float:
        """At least this long takes a plan of a group with the stages of `cuts` (see `group_seconds`)."""
        m, p = group.micro_batches, mesh.pipeline
        cuts = self.cuts(mesh, group)
        before = np.concatenate(([0.0], np.cumsum(self._least_layers(mesh, group))))
        stages = np.diff(before[list(cuts)])
        ranks = stages.reshape(group.virtual_stages, p).sum(axis=0)
        # Only the first chunk of each rank lies before the others begin.
        ahead = np.concatenate(([0.0], np.cumsum(stages[: p - 1])))
        if group.schedule == "zero_bubble":
            ahead *= 0.0
        return float(np.max(ahead + m * ranks)) * _ROUNDING

    def cuts(self, mesh: Mesh, group: Group) -> tuple[int, ...]:
        """Where the stages begin so that the slowest is fastest, and the number of layers at the end."""
        return self._cuts(mesh, group.virtual_stages, group.micro_batch)

    def _cut(self, mesh: Mesh, virtual_stages: int, micro_batch: int) -> tuple[int, ...]:
        stages = mesh.pipeline * virtual_stages
        if stages == 1:
            return (0, self.space.layers)
        cuts = balanced_cuts(self.costs(mesh, virtual_stages, micro_batch))
        assert cuts is not None, "more stages than layers"
        return cuts

    def costs(self, mesh: Mesh, virtual_stages: int, micro_batch: int) -> list[np.ndarray]:
        """For each stage what any run of layers takes there (see `stage_costs`)."""
        crowded = len(mesh.placement.devices) > 1
        share = micro_batch / mesh.context if mesh.context > 1 else micro_batch
        reduces = self._reduces(mesh, share)
        matrices: dict[tuple[str, ...], np.ndarray] = {}
        found = []
        for kinds in mesh.placement.rank_kinds(mesh.pipeline):
            if kinds not in matrices:
                matrices[kinds] = stage_costs(self._layer_seconds(kinds, crowded, share, mesh.tensor) + reduces)
            found.append(matrices[kinds])
        return found * virtual_stages

    # ----------------------------------------------------------------------------------------------------- memory

    def _measure_states(self, tensor: int, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bytes of parameters, gradients and optimizer states that each layer brings to one tensor-parallel rank.

        A parameter that several layers share counts for the first of them alone.
        """
        shards = self.shards(tensor)
        recipe = self.space.workload.recipe
        foreign = recipe.framework != "headway"
        parameters, gradients, states = np.zeros((3, self.space.layers))
        seen: set[str] = set()
        for at, layer in enumerate(self.graph.layers):
            divided = frozenset(layer.experts.parameters) if layer.experts is not None else frozenset()
            for name, parameter in self.graph.layer_parameters(at, at + 1).items():
                if name in seen:
                    continue
                seen.add(name)
                size = self.predictor.sizes.local_bytes(parameter, shards) / (expert if name in divided else 1)
                elements = size / dtype_bytes(parameter.dtype)
                parameters[at] += elements * recipe.parameter_bytes if foreign else size
                if parameter.trainable:
                    gradients[at] += elements * recipe.gradient_bytes if foreign else size
                    kept = self.space.workload.optimizer.state_bytes_per_element + recipe.master_bytes
                    states[at] += elements * kept
        return parameters, gradients, states

    def _layer_states(self, mesh: Mesh, held: States) -> np.ndarray:
        """Bytes of states that each layer brings to a rank at least, as the runtime holds them.

        ZeRO stage 1 divides the optimizer states over the replicas. Stage 2 keeps the parameters gathered from forward
        to backward. Stages 2 and 3 within a pipeline keep parameters and gradients whole between micro-batches. Other
        frameworks than our runtime may divide more: everything by the replicas, from stage 2 on.
        """
        parameters, gradients, states = self._states(mesh.tensor, mesh.expert)
        if held.parameters_on != "device":
            parameters = parameters * 0.0
        if held.optimizer_on != "device":
            states = states * held.optimizer_kept
            if self.space.workload.recipe.framework == "headway":
                # Gradients leave as they are made; in less than 32 bits parameters have no float32 copy here.
                lean = 1.0 if self.space.precision == "float32" else 0.5
                parameters, gradients = parameters * lean, gradients * lean * held.optimizer_kept
        replicas = mesh.replicas
        if held.zero_stage == 0:
            if held.optimizer_on != "device" and self.space.workload.recipe.framework == "headway":
                states = states / replicas  # each updates rows of its own, off the device and on it
            return parameters + gradients + states
        if held.zero_stage >= 2 and self.space.workload.recipe.framework != "headway":
            return (parameters + gradients + states) / replicas
        states = states / replicas
        if held.zero_stage == 1 or mesh.pipeline > 1:
            return parameters + gradients + states
        if held.zero_stage == 2:
            return parameters + gradients / replicas + states
        return (parameters + gradients) / replicas + states

    def state_bytes(self, mesh: Mesh, held: States) -> float:
        """Parameters, gradients and optimizer states of the fullest rank, at least: those of the average rank."""
        return float(np.sum(self._layer_states(mesh, held))) / mesh.pipeline * _ROUNDING

    def _measure_activations(self, tensor: int, context: int, micro_batch: int) -> tuple[np.ndarray, float, float]:
        """Bytes that each layer keeps for backward, that any layer works with, and that cross any cut, at least."""
        if self.space.workload.recipe.framework != "headway":
            return np.zeros(self.space.layers), 0.0, 0.0
        residency, shards = self.predictor.residency, self.shards(tensor)
        wanted = self.space.constraints.recompute
        kept, working, crossing = [], [], []
        for at in range(self.space.layers):
            either = []
            for again, cores in (((), ()), ((at,), ()), ((), (at,))):
                if (cores and (at not in self.cores or wanted not in ("any", "selective"))) or (
                    not cores and wanted not in ("any", "full" if again else "none", "selective")
                ):
                    continue
                stage = Stage(start=at, stop=at + 1, recompute=again, recompute_attention=cores)
                plan = Plan(
                    model="", devices=(), global_batch=micro_batch, micro_batch=micro_batch, stages=(stage,),
                    tensor=tensor, context=context, precision=self.space.precision,
                    sequence_parallel=self.space.sequence_parallel(tensor),
                )  # fmt: skip
                either.append(residency.activations(plan, stage, micro_batch, shards))
            kept.append(min(one.kept for one in either))
            working.append(min(one.peak - one.kept for one in either))
            crossing.append(min(one.input for one in either))
        return np.array(kept), min(working), float(min(crossing[1:], default=0.0))

    def group_bytes(self, mesh: Mesh, group: Group, held: States) -> float:
        """At least this much has the fullest rank of any plan of a group, wherever it is cut, whatever it recomputes.

        Let layer l cost s_l + f_r k_l on pipeline rank r: its states, and what it keeps of each of the f_r
        micro-batches in flight there. For any weights w_r that add up to 1 the fullest rank holds at least the weighted
        mean of all, which is at least the sum over layers of min over r of w_r (s_l + f_r k_l) (weak duality). The
        weights that would make equal layers tight are taken.
        """
        key = (*mesh[1:], group, held)
        found = self._group_bytes.get(key)
        if found is None:
            found = self._group_bytes[key] = self._least_bytes(mesh, group, held)
        return found

    def _least_bytes(self, mesh: Mesh, group: Group, held: States) -> float:
        states = self._layer_states(mesh, held)
        kept, working, crossing = self._activations(mesh.tensor, mesh.context, group.micro_batch)
        if held.activations_on != "device":
            kept, working = kept * 0.0, 0.0
        p, v, m = mesh.pipeline, group.virtual_stages, group.micro_batches
        if p == 1:
            return float(np.sum(states) + np.sum(kept) + working) * _ROUNDING
        flights = np.array([min(in_flight(group.schedule, rank, p, v, m)) for rank in range(p)], dtype=float)
        weights = 1 / np.maximum(np.sum(states) + flights * np.sum(kept), 1.0)
        weights /= np.sum(weights)
        loads = weights[:, None] * (states[None, :] + flights[:, None] * kept[None, :])
        # Every stage receives each micro-batch, forward or backward, into a buffer of its own.
        return float(np.sum(np.min(loads, axis=0)) + working + v * m * crossing) * _ROUNDING
