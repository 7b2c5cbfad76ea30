"""Memory beyond the device: how fast copies go, what rests where, and what that costs (ZeRO-Infinity's model).

Rajbhandari et al. (ZeRO-Infinity, SC 2021) say in section 3 how much a transformer of nl layers and hidden size hd
holds, and in section 4 how much of the device's rate is left when states come over a link of `bytes_per_second`: with
ait the FLOP computed for each byte moved,

    efficiency = ait bandwidth / (ait bandwidth + peak)        (equation 6, nothing hidden behind compute).

`TierRates` knows the links of a cluster; `rest` says what is where under a plan; `moments_bytes` and `wire_bytes` what
an element takes there.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import NamedTuple

from headway.hardware.cluster import Cluster
from headway.plan.plan import Moments, Plan, Tier

__all__ = [
    "Resting",
    "TierRates",
    "activation_checkpoint_bytes",
    "activation_intensity",
    "efficiency",
    "keeps_masters",
    "moments_bytes",
    "optimizer_intensity",
    "parameter_intensity",
    "parameters",
    "rest",
    "state_bytes",
    "wire_bytes",
    "working_bytes",
]

# Where a description does not say: PCIe 4.0 x16, and DDR4 in eight channels of two sockets, of which an update on the
# host gets what streaming shows. A disk is one NVMe drive of data centres (about 3.2 GB/s) for each device.
_PCIE_BYTES_PER_SECOND = 25e9
_HOST_BYTES_PER_SECOND = 200e9
_DISK_BYTES_PER_SECOND = 3.2e9
# Of a PCIe slot's rate, what large pinned copies reach.
_PCIE_SHARE = 0.8
# For each of 16 devices of a DGX-2 node with 1.5 TB of memory and 28 TB of NVMe (ZeRO-Infinity, figure 2b).
_HOST_BYTES = 1.5e12 / 16
_DISK_BYTES = 28e12 / 16
# The pool of transfer buffers that a store keeps on the host (memory/tiers.py), and the block of 8-bit moments that
# shares one float32 scale.
_POOL_BYTES = 256 * 2**20
_BLOCK_ELEMENTS = 256
_MOMENT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0 + 4.0 / _BLOCK_ELEMENTS}


# ------------------------------------------------------------------------------------------- ZeRO-Infinity's own model


def parameters(layers: int, hidden: int) -> float:
    """Elements of a transformer: 12 nl hd^2 (section 3, equation 1)."""
    return 12.0 * layers * hidden**2


def state_bytes(layers: int, hidden: int) -> float:
    """Bytes of all states in mixed precision with Adam: 20 for each parameter, 240 nl hd^2 (section 3, equation 2)."""
    return 20.0 * parameters(layers, hidden)


def working_bytes(hidden: int) -> float:
    """Bytes of the largest operator, hd to 4 hd, its parameters and gradients in 16 bits: 16 hd^2 (equation 4)."""
    return 2.0 * 2.0 * hidden * 4.0 * hidden


def activation_checkpoint_bytes(layers: int, hidden: int, sequence: int, batch: int, interval: int = 1) -> float:
    """Bytes of activation checkpoints, one each `interval` layers: 2 bsz seq hd nl / ci (section 3, equation 3)."""
    return 2.0 * batch * sequence * hidden * layers / interval


def parameter_intensity(sequence: int, batch: int) -> float:
    """FLOP for each byte of parameters and gradients moved: seq bsz (section 4.1, equation 9)."""
    return float(sequence * batch)


def optimizer_intensity(sequence: int, batch: int) -> float:
    """FLOP for each byte of optimizer states moved: seq bsz / 4 (section 4.1, equation 10)."""
    return sequence * batch / 4.0


def activation_intensity(hidden: int, interval: int = 1) -> float:
    """FLOP for each byte of activation checkpoints moved: 24 hd ci (section 4.1, equation 11)."""
    return 24.0 * hidden * interval


def efficiency(intensity: float, bytes_per_second: float, peak_flop_per_second: float) -> float:
    """The share of its peak that a device reaches when copies are not hidden (section 4, equation 6)."""
    moved = intensity * bytes_per_second
    return moved / (moved + peak_flop_per_second)


# ----------------------------------------------------------------------------------------------------- of one cluster


class TierRates:
    """Rates and sizes of the tiers of a cluster, as each device has them when all of its node copy at once.

    What the description of a cluster does not say (host memory, disks) is assumed for each device, and can be given:
    `host_bytes`, `disk_bytes`, `disk_bytes_per_second`. On a CPU the device's memory is the host's.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        host_bytes: float = _HOST_BYTES,
        disk_bytes: float = _DISK_BYTES,
        disk_bytes_per_second: float = _DISK_BYTES_PER_SECOND,
    ) -> None:
        self.cluster = cluster
        self.host_bytes, self.disk_bytes = host_bytes, disk_bytes
        self.disk_bytes_per_second = disk_bytes_per_second
        self._position = {device.name: position for position, device in enumerate(cluster.devices)}
        self._nodes: dict[str, _Node] = {}

    @property
    def available(self) -> tuple[Tier, ...]:
        """The tiers off the device: the memory of other nodes is one where there are any."""
        return ("host", "remote", "disk") if len(self.cluster.nodes) > 1 else ("host", "disk")

    def capacity_bytes(self, tier: Tier, device: str) -> float:
        """Bytes of a tier for each device; of remote memory, what another node's devices leave of theirs."""
        kind = self.cluster.accelerator_of(self._position[device])
        if tier == "device" or (tier == "host" and kind.torch_device == "cpu"):
            return kind.memory_bytes
        return self.disk_bytes if tier == "disk" else self.host_bytes

    def copy_rate(self, tier: Tier, device: str) -> float:
        """Bytes per second between a device and a tier: over PCIe, and from there to the disk or the network."""
        node = self._node_of(device)
        rate = node.slot.get(device, _PCIE_BYTES_PER_SECOND)
        if tier == "disk":
            return min(rate, self.disk_bytes_per_second)
        return min(rate, node.network) if tier == "remote" and node.network else rate

    def update_rate(self, device: str) -> float:
        """Bytes per second of host memory that an update there streams, for each of the node's devices."""
        kind = self.cluster.accelerator_of(self._position[device])
        if kind.torch_device == "cpu":
            return kind.memory_bytes_per_second * kind.memory_efficiency
        return self._node_of(device).memory

    def _node_of(self, device: str) -> _Node:
        name = self.cluster.devices[self._position[device]].node
        if name not in self._nodes:
            self._nodes[name] = self._look(name)
        return self._nodes[name]

    def _look(self, node: str) -> _Node:
        neighbours = {self.cluster.devices[at].name for at in self.cluster.nodes[node]}
        below: Counter[str] = Counter()
        slots: dict[tuple[str, str], float] = {}
        inside = {switch.name for switch in self.cluster.switches if switch.node == node}
        nics = {name for name in inside if "nic" in name.rpartition("/")[2]}
        network = 0.0
        for link in self.cluster.links:
            if link.source in nics and link.target not in inside and link.target not in neighbours:
                network += link.bytes_per_second
            if link.kind == "pcie" and not {link.source, link.target} & nics and link.source in neighbours | inside:
                slots[link.source, link.target] = link.bytes_per_second
                below[link.target] += link.source in neighbours
        slot: dict[str, float] = {}
        for (source, switch), rate in slots.items():
            if source in neighbours:
                slot[source] = rate * _PCIE_SHARE
                for (lower, upper), above in slots.items():
                    if lower == switch and upper not in neighbours:  # the devices of a switch share its way up
                        slot[source] = min(slot[source], above * _PCIE_SHARE / below[switch])
        share = 1.0 / len(neighbours)
        return _Node(slot, network * share, _HOST_BYTES_PER_SECOND * share)


class _Node(NamedTuple):
    """Bytes per second: each device's slot, and each device's share of the network and of the host's memory."""

    slot: dict[str, float]
    network: float
    memory: float


# -------------------------------------------------------------------------------------------------- what rests where


def moments_bytes(state_bytes_per_element: float, moments: Moments) -> float:
    """Bytes of an optimizer's moments for one element, which take `state_bytes_per_element` in float32.

    In "int8" each block of 256 has a float32 scale of its own.
    """
    return state_bytes_per_element / 4.0 * _MOMENT_BYTES[moments]


def keeps_masters(plan: Plan, *, on_cpu: bool) -> bool:
    """Whether Headway's runtime keeps float32 masters beside the parameters of an optimizer off the device.

    Not where the processor can reach float32 parameters and update them where they are: they are their own.
    """
    reachable = on_cpu and plan.precision == "float32" and plan.parameters_on in ("device", "host")
    return plan.optimizer_on != "device" and (plan.delayed_update or not reachable)


def wire_bytes(precision: str) -> float:
    """Bytes of one element of a gradient on its way to another tier, and of a parameter on its way back."""
    return 4.0 if precision == "float32" else 2.0


class Resting(NamedTuple):
    """Bytes of one rank: on the device, in buffers there, and off it by tier; `pinned` is part of the host's."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    tiers: dict[str, float]
    pinned: float


def rest(
    plan: Plan, *, parameters: float, gradients: float, optimizer: float, activations: float, largest_layer: float,
    largest_kept: float, updated: float, master: float, moments: float, streams_gradients: bool, slices: int = 1,
) -> Resting:  # fmt: skip
    """Where the states of a rank rest under `plan`, given what they would take on the device.

    `activations`: those that go away; `largest_kept`: of one layer of them; `largest_layer`: parameters of one layer;
    `slices`: into how many parts the ranks divide parameters that rest elsewhere. Of the optimizer `updated` elements
    with `master` and `moments` bytes each; with `streams_gradients` gradients leave as backward makes them. Whatever
    rests elsewhere is on the device while it is used: this layer's and the next one's.
    """
    tiers: defaultdict[str, float] = defaultdict(float)
    buffers = streamed = 0.0
    if plan.parameters_on != "device":
        used = min(2 * largest_layer, parameters)
        buffers += used
        tiers[plan.parameters_on] += parameters / slices
        streamed += used if plan.parameters_on != "host" else 0.0
        parameters = 0.0
    if plan.optimizer_on != "device":
        gone = 1.0 - plan.optimizer_kept
        away = gone * updated
        tiers[plan.optimizer_on] += away * (master + moments)
        if streams_gradients:
            buffers += min(2.0 * plan.bucket_bytes, gone * gradients)
            tiers["host"] += away * wire_bytes(plan.precision)
            gradients *= plan.optimizer_kept
        if plan.delayed_update:
            tiers[plan.optimizer_on] += away * wire_bytes(plan.precision)  # what is updated waits for its step
        streamed += away * (master + moments) if plan.optimizer_on != "host" else 0.0
        optimizer *= plan.optimizer_kept
    if plan.activations_on != "device":
        used = min(2 * largest_kept, activations)
        buffers += used
        tiers[plan.activations_on] += activations
        streamed += activations if plan.activations_on != "host" else 0.0
        activations = 0.0
    # What passes through the host on its way needs room there, no more than the pool of buffers.
    pinned = min(_POOL_BYTES, streamed + sum(tiers.values()))
    if tiers:
        tiers["host"] += min(_POOL_BYTES, streamed)
    found = {tier: size for tier, size in tiers.items() if size > 0}
    return Resting(parameters, gradients, optimizer, activations, buffers, found, pinned)
