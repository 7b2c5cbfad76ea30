"""What placements cost the models of a trace on the nodes and links of a cluster: the figures that cost.py works with.

A fleet that is only a word (`n256g8`) has no links. It is taken to be made like Tiresias's testbed (Gu et al., NSDI
2019, section 6.1): P100 and one port of 100 Gb/s InfiniBand for each node, on a network that never blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from headway.hardware.catalog import Machine, Part, assemble
from headway.hardware.cluster import Cluster
from headway.predict.communication import Communication
from headway.schedule.fleet import Fleet
from headway.schedule.placement.cost import ModelStep, PlacementCost
from headway.schedule.placement.profiles import MODELS
from headway.schedule.placement.spread import Architecture, SpreadCost

__all__ = ["SAMPLES", "predict_placement_cost", "tiresias_testbed"]

SAMPLES = 32
"""Of each worker in a step; the paper gives none, and of the usual ones 32 comes nearest to its figure 3."""

_TESTBED_ACCELERATOR = "P100-SXM2-16GB"


def tiresias_testbed(fleet: Fleet) -> Cluster:
    """The cluster that a fleet of which only numbers are known is taken to be: Tiresias's nodes, in its sizes."""
    machines = {
        count: Machine(
            parts=(Part(accelerator=_TESTBED_ACCELERATOR, count=count),), wiring="none",
            pcie_bytes_per_second=15.75e9, nics=1, nic_bytes_per_second=12.5e9, nic_latency_seconds=2e-6,
        )
        for count in {node.devices for node in fleet.nodes}
    }  # fmt: skip
    return assemble(fleet.name, [(node.name, machines[node.devices]) for node in fleet.nodes])


def predict_placement_cost(
    fleet: Fleet,
    models: Iterable[str],
    cluster: Cluster | None = None,
    *,
    architecture: Architecture = "parameter-server",
    samples: int = SAMPLES,
) -> PlacementCost | None:
    """Costs of all placements of these models, by the names that traces give them; those not known cost nothing.

    `cluster`: the links of the fleet's nodes, in their order; None: as `tiresias_testbed` makes them. None comes back
    if there is nothing to be said: one node, or no model that is known. Raises ClusterError for nodes that nothing
    joins.
    """
    known = sorted({model for model in models if MODELS.get(model)})
    if not known or len(fleet.nodes) < 2:
        return None
    machines = cluster if cluster is not None else tiresias_testbed(fleet)
    kinds: dict[str, list[str]] = {}  # a node of each kind, and another: what SpreadCost wants
    by_node: dict[str, list[str]] = {}
    for device in machines.devices:
        by_node.setdefault(device.node, []).append(device.name)
    groups = list(by_node.values())
    for place, node in enumerate(fleet.nodes):
        kinds.setdefault(node.kind, groups[place])
    steps = {}
    for model in known:
        compute = {}
        elements: tuple[int, ...] = ()
        for kind, devices in kinds.items():
            own = SpreadCost(MODELS[model], machines, samples=samples, device=devices[0])
            compute[kind], elements = own.compute_seconds, own.elements
        steps[model] = ModelStep(elements, compute)
    communication = Communication(machines)
    if architecture == "all-reduce":
        return PlacementCost(fleet, steps, ports=[1.0] * len(fleet.nodes), cluster=machines)
    ports, uplinks = _rates(fleet, groups, communication)
    return PlacementCost(fleet, steps, ports=ports, uplinks=uplinks)


def _rates(
    fleet: Fleet, groups: Sequence[Sequence[str]], communication: Communication
) -> tuple[list[float], dict[str, float]]:
    """Bytes per second of each node's NICs together, and of the racks whose uplinks are narrower than their nodes."""
    racks: dict[str, list[int]] = {}
    for place, node in enumerate(fleet.nodes):
        racks.setdefault(node.rack, []).append(place)

    def leaving(inside: Sequence[int], outside: Sequence[int]) -> float:
        """Of all devices inside to those outside at once."""
        sources = tuple(name for place in inside for name in groups[place])
        targets = tuple(name for place in outside for name in groups[place])
        # Whole multiples, so that no device has one transfer more than its neighbour, whose rate would count for all.
        if len(targets) >= len(sources):
            targets = targets[: len(targets) // len(sources) * len(sources)]
        else:
            sources = sources[: len(sources) // len(targets) * len(targets)]
        return max(len(sources), len(targets)) * communication.crossing(sources, targets).bytes_per_second

    ports: list[float] = []
    known: dict[tuple, float] = {}
    for place, node in enumerate(fleet.nodes):
        beside = [other for other in racks[node.rack] if other != place]
        # Whose only way out is the rack's uplink is not like others of its kind.
        beyond = "" if beside else node.rack
        beside = beside or [other for other in range(len(fleet.nodes)) if other != place]
        # As many devices outside as could keep it busy: more would only take longer to look at.
        enough, devices = [], 0
        for other in beside:
            enough.append(other)
            devices += len(groups[other])
            if devices >= 2 * node.devices:
                break
        key = (beyond, fleet.classes[place], node.devices, tuple(fleet.nodes[other].devices for other in enough))
        if key not in known:
            known[key] = leaving([place], enough)
        ports.append(known[key])
    uplinks = {}
    for rack, inside in racks.items():
        outside = [place for place in range(len(fleet.nodes)) if fleet.nodes[place].rack != rack]
        if outside:
            rate = leaving(inside, outside)
            if rate < 0.999 * sum(ports[place] for place in inside):
                uplinks[rack] = rate
    return ports, uplinks
