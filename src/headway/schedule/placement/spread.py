"""What being spread over nodes costs a model, predicted: the speed at random places over the speed on few nodes.

Tiresias measured it with parameter servers (Gu et al., NSDI 2019, figure 3), one beside each worker, tensor i on server
i mod n. A node then takes in, after each step, the gradients of its servers' tensors from all workers elsewhere, and
before the next one its workers' parameters from all servers elsewhere; the node that takes in or gives out most
decides. A large tensor is on one server, whose node has more workers elsewhere the more the job is spread: that is why
skewed models suffer, and others hardly do. Compute is predicted by predict/step.py, bandwidth by
predict/communication.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from headway.errors import InputError
from headway.hardware.cluster import Cluster
from headway.predict.communication import Communication, all_reduce_seconds
from headway.predict.step import Predictor
from headway.schedule.placement.cost import crossing_bytes, stored_bytes
from headway.workload import zoo
from headway.workload.graph import Workload

__all__ = ["SpreadCost", "node_traffic"]

Architecture = Literal["parameter-server", "all-reduce"]


class SpreadCost:
    """Predicts steps of one model on a cluster whose nodes are alike, by where its workers are.

    `model`: a name of the zoo; `samples`: of each worker. `efficiency`: which part of the links' bandwidth parameter
    servers reach. `device`: by name, whose compute counts; empty: the first. Raises InputError for a cluster of one
    node: there is nothing to be spread over.
    """

    def __init__(
        self,
        model: str,
        cluster: Cluster,
        *,
        samples: int = 64,
        architecture: Architecture = "parameter-server",
        efficiency: float = 1.0,
        elements: Sequence[int] = (),
        compute_seconds: float = 0.0,
        device: str = "",
    ) -> None:
        self.cluster = cluster
        self.nodes: dict[str, list[str]] = {}
        for each in cluster.devices:
            self.nodes.setdefault(each.node, []).append(each.name)
        if len(self.nodes) < 2:
            raise InputError("has one node", place=f"cluster {cluster.name}", remedy="being spread needs several")
        self.architecture = architecture
        self.communication = Communication(cluster)
        if elements and compute_seconds:
            self.elements, self.compute_seconds = tuple(elements), compute_seconds
        else:
            graph = zoo.trace(model)
            self.elements = tuple(parameter.elements for parameter in graph.parameters)
            predictor = Predictor(Workload(graph=graph), cluster, communication=self.communication)
            names = [each.name for each in cluster.devices]
            kind = cluster.devices[names.index(device) if device else 0].accelerator
            forward, backward = predictor.layer_seconds(kind, samples, crowded=False)
            self.compute_seconds = forward[-1] + backward[-1]
        first, second = list(self.nodes.values())[:2]
        self.bytes_per_second = efficiency * self.communication.crossing((first[0],), (second[0],)).bytes_per_second

    def step_seconds(self, workers: Sequence[int]) -> float:
        """Of a job with `workers[i]` of its workers on one node each; gradients are not sent before backward ends."""
        if self.architecture == "all-reduce":
            names = [
                name for count, devices in zip(workers, self.nodes.values(), strict=False) for name in devices[:count]
            ]
            total = 4.0 * sum(self.elements)
            return self.compute_seconds + all_reduce_seconds(total, self.communication.group(tuple(names)))
        return self.compute_seconds + 2 * node_traffic(self.elements, workers) / self.bytes_per_second

    def slowdown(self, workers: int, *, draws: int = 100, seed: int = 0) -> float:
        """Mean step with workers on devices drawn at random, over that on as few nodes as possible; at least 1."""
        sizes = [len(devices) for devices in self.nodes.values()]
        if workers > sum(sizes):
            raise InputError(f"{workers} workers on {sum(sizes)} devices", place="spread cost", remedy="fewer workers")
        together = self.step_seconds(_filled(workers, sizes))
        places = [node for node, size in enumerate(sizes) for _ in range(size)]
        generator = random.Random(seed)
        total = 0.0
        for _ in range(draws):
            counts = [0] * len(sizes)
            for node in generator.sample(places, workers):
                counts[node] += 1
            total += self.step_seconds(sorted((count for count in counts if count), reverse=True))
        return max(1.0, total / draws / together)


def _filled(workers: int, sizes: Sequence[int]) -> list[int]:
    counts = []
    for size in sorted(sizes, reverse=True):
        counts.append(min(size, workers))
        workers -= counts[-1]
        if not workers:
            break
    return counts


def node_traffic(elements: Sequence[int], workers: Sequence[int]) -> float:
    """Bytes (float32) in the busiest direction of the busiest node while gradients are pushed.

    While parameters are pulled it is as much, the other way round. `elements` of each tensor; `workers[i]` workers on
    node i, each with a parameter server beside it.
    """
    total = sum(workers)
    prefix = stored_bytes(elements, total)
    begin, busiest = 0, 0.0
    for count in workers:
        own = prefix[begin + count] - prefix[begin]
        begin += count
        busiest = max(busiest, crossing_bytes(own, prefix[total], count, total))
    return busiest
