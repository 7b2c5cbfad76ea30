"""How tensor parallelism divides a model under a plan: one answer for times and for memory."""

from __future__ import annotations

from headway.plan.plan import Plan
from headway.predict.operators import WHOLE, Shards
from headway.workload.graph import Graph

__all__ = ["Splits"]


class Splits:
    """`Shards` of plans of one graph, memoised."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._known: dict[tuple[int, bool, frozenset[str]], Shards] = {}
        # A plan's stages are asked for one after the other, and the names of a large model take long to hash: plans of
        # one search share `tensor_sharding`, and nobody changes it.
        self._by_identity: dict[tuple[int, bool, int], tuple[dict, Shards]] = {}

    def of(self, plan: Plan, rank: int = 0) -> Shards:
        """How pipeline rank `rank` divides the blocks whose modules are all in `plan.tensor_sharding`."""
        tensor = plan.tensor if plan.is_uniform else plan.degrees(rank)[1]
        if tensor == 1:
            return WHOLE
        place = (tensor, plan.sequence_parallel, id(plan.tensor_sharding))
        known = self._by_identity.get(place)
        if known is None or known[0] is not plan.tensor_sharding:
            known = self._by_identity[place] = (plan.tensor_sharding, self._find(plan, tensor))
        return known[1]

    def _find(self, plan: Plan, tensor: int) -> Shards:
        key = (tensor, plan.sequence_parallel, frozenset(plan.tensor_sharding))
        found = self._known.get(key)
        if found is None:
            chosen = key[2]
            blocks = frozenset(
                position
                for position, block in enumerate(self.graph.blocks)
                if chosen.issuperset(block.columns) and chosen.issuperset(block.rows)
            )
            found = self._known[key] = Shards(tensor, blocks, plan.sequence_parallel)
        return found
