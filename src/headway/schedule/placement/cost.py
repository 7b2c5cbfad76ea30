"""What a placement costs a job, predicted for the very nodes that it was given: a step there over a step well placed.

Steps are predicted as in spread.py: compute by predict/step.py, and after it the transfers of parameter servers, or an
all-reduce by predict/communication.py. Rates are those of the cluster's links: a node takes in and gives out through
its NICs, a rack through its uplink, if that is narrower than its nodes' NICs together. The job is alone on them.

What the figures are is found out in prediction.py; here is what follows from them, without the model or the links at
hand, so that it can be handed to other processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from headway.errors import InputError
from headway.hardware.cluster import Cluster
from headway.schedule.fleet import Fleet

__all__ = ["ModelStep", "PlacementCost", "crossing_bytes", "stored_bytes"]


def stored_bytes(elements: Sequence[int], servers: int) -> tuple[float, ...]:
    """Bytes (float32) on the first 0, 1, ... of as many parameter servers: tensor i is on server i mod `servers`."""
    server = [0.0] * servers
    for place, count in enumerate(elements):
        server[place % servers] += 4.0 * count
    return (0.0, *accumulate(server))


def crossing_bytes(own: float, whole: float, workers: int, total: int) -> float:
    """Bytes in the busier direction of a node (or a rack) while gradients are pushed; as many when they are pulled.

    It has `workers` of `total` workers, and servers with `own` of `whole` bytes: in come the gradients of its tensors
    from the workers elsewhere, out go its workers' gradients of all other tensors.
    """
    return max(own * (total - workers), workers * (whole - own))


class ModelStep(NamedTuple):
    """What is known of a model's step: elements of each tensor, and seconds of compute by kind of node."""

    elements: tuple[int, ...]
    compute_seconds: Mapping[str, float]


class PlacementCost:
    """Slowdowns of the models of `models` on the nodes of a fleet, each computed once.

    - `ports[i]`: bytes per second that node i takes in, and gives out, at most.
    - `uplinks`: the same of a rack; racks that are not named have one that never binds.
    - `cluster`: None: parameter servers, one beside each worker; else all-reduce over the cluster's links, whose nodes
      are those of the fleet, in their order.

    Raises InputError if `ports` are not one for each node, above 0.
    """

    def __init__(
        self,
        fleet: Fleet,
        models: Mapping[str, ModelStep],
        *,
        ports: Sequence[float],
        uplinks: Mapping[str, float] | None = None,
        cluster: Cluster | None = None,
    ) -> None:
        if len(ports) != len(fleet.nodes) or not all(port > 0 for port in ports):
            raise InputError(
                "ports are not one rate above 0 for each node", place=f"fleet {fleet.name}", remedy="bytes per second"
            )
        self.fleet = fleet
        self.models = dict(models)
        self.ports = tuple(ports)
        self.uplinks = dict(uplinks or {})
        self.cluster = cluster
        self._names: list[list[str]] = []
        self._all_reduce: Callable[[float, tuple[str, ...]], float] | None = None
        if cluster is not None:
            # Imported late: predict/ needs torch, which is not for every process that plays a trace.
            from headway.predict.communication import Communication, all_reduce_seconds

            communication = Communication(cluster)
            self._all_reduce = lambda size, devices: all_reduce_seconds(size, communication.group(devices))
            by_node: dict[str, list[str]] = {}
            for device in cluster.devices:
                by_node.setdefault(device.node, []).append(device.name)
            self._names = list(by_node.values())
        self._slowdowns: dict[tuple, float] = {}
        self._prefixes: dict[tuple[str, int], tuple[float, ...]] = {}

    def __reduce__(self) -> tuple:
        return _made, (self.fleet, self.models, self.ports, self.uplinks, self.cluster)

    @property
    def by_traffic(self) -> bool:
        """Whether steps follow from what nodes and racks send (parameter servers), with one rate for all nodes."""
        return self.cluster is None and len(set(self.ports)) == 1

    def slowdown(self, model: str, nodes: Sequence[int], counts: Sequence[int]) -> float:
        """Step of a job with `counts[i]` workers on node `nodes[i]` of the fleet, over its step on as few nodes of
        these kinds as could hold it, in one rack; at least 1. It is 1 on one node, and of a model that is not known."""
        step = self.models.get(model)
        if step is None or len(nodes) < 2:
            return 1.0
        placed = sorted(zip(nodes, counts, strict=True), key=lambda item: (-item[1], item[0]))
        racks: dict[str, int] = {}
        key = (
            model,
            tuple(
                (count, self.fleet.classes[node], self.ports[node], self._rack(node, racks)) for node, count in placed
            ),
        )
        found = self._slowdowns.get(key)
        if found is None:
            together = self.together_seconds(model, [node for node, _ in placed], sum(counts))
            found = self._slowdowns[key] = max(1.0, self.step_seconds(model, placed) / together)
        return found

    def _rack(self, node: int, racks: dict[str, int]) -> tuple[int, float] | int:
        """Racks by the order in which they come, with what their uplink carries: names don't matter."""
        if not self.uplinks and self.cluster is None:
            return 0
        rack = self.fleet.nodes[node].rack
        return racks.setdefault(rack, len(racks)), self.uplinks.get(rack, 0.0)

    def step_seconds(self, model: str, placed: Sequence[tuple[int, int]]) -> float:
        """Of a job with (node, workers on it), in this order: workers and the servers beside them are numbered so."""
        step = self.models[model]
        compute = max(step.compute_seconds[self.fleet.nodes[node].kind] for node, _ in placed)
        if self._all_reduce is not None:
            devices = tuple(name for node, count in placed for name in self._names[node][:count])
            total = 4.0 * sum(step.elements)
            return compute + self._all_reduce(total, devices)
        rates = [(count, self.ports[node], self.fleet.nodes[node].rack) for node, count in placed]
        return compute + self._transfer_seconds(model, rates)

    def together_seconds(self, model: str, nodes: Sequence[int], workers: int) -> float:
        """Of as many workers on as few nodes as could hold them, of the kinds that these have, in one rack."""
        kinds = {self.fleet.nodes[node].kind for node in nodes}
        alike = [place for place, node in enumerate(self.fleet.nodes) if node.kind in kinds]
        alike.sort(key=lambda place: (-self.fleet.nodes[place].devices, place))
        placed: list[tuple[int, int]] = []
        for place in alike:
            placed.append((place, min(workers, self.fleet.nodes[place].devices)))
            workers -= placed[-1][1]
            if not workers:
                break
        if self._all_reduce is not None:
            return self.step_seconds(model, placed)
        compute = max(self.models[model].compute_seconds[kind] for kind in kinds)
        port = min(self.ports[node] for node in nodes)
        return compute + self._transfer_seconds(model, [(count, port, "") for _, count in placed])

    def prefix(self, model: str, workers: int) -> tuple[float, ...]:
        """`stored_bytes` of a model on as many servers, computed once."""
        key = (model, workers)
        found = self._prefixes.get(key)
        if found is None:
            found = self._prefixes[key] = stored_bytes(self.models[model].elements, workers)
        return found

    def _transfer_seconds(self, model: str, rates: Sequence[tuple[int, float, str]]) -> float:
        """To push all gradients and to pull all parameters; `rates`: workers, port and rack of each node.

        As in spread.py, with the rate of each node, and of each rack. Of integers below 2^53 all sums are exact, so
        that the compiled twin (fast/costs.py) comes to the same bits in whatever order it adds.
        """
        total = sum(count for count, _, _ in rates)
        prefix = self.prefix(model, total)
        begin, slowest = 0, 0.0
        held: dict[str, tuple[int, float]] = {}
        if total < 2 or len(rates) < 2:
            return 0.0
        for count, port, rack in rates:
            own = prefix[begin + count] - prefix[begin]
            begin += count
            slowest = max(slowest, crossing_bytes(own, prefix[total], count, total) / port)
            workers, stored = held.get(rack, (0, 0.0))
            held[rack] = (workers + count, stored + own)
        for rack, (workers, own) in held.items():
            if rack in self.uplinks:
                slowest = max(slowest, crossing_bytes(own, prefix[total], workers, total) / self.uplinks[rack])
        return 2 * slowest


def _made(
    fleet: Fleet,
    models: Mapping[str, ModelStep],
    ports: Sequence[float],
    uplinks: Mapping[str, float],
    cluster: Cluster | None,
) -> PlacementCost:
    """For another process: what is computed on the way stays behind."""
    return PlacementCost(fleet, models, ports=ports, uplinks=uplinks, cluster=cluster)
