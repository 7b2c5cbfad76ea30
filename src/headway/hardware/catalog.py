"""Known accelerators and known machines, and the words that name them.

`load_cluster` turns what a user writes after `--cluster` into a Cluster::

    local                    this machine, probed            local:4        with four local processes
    dgx-a100                 one machine of the catalog      dgx-h100:64    sixty-four, joined by their network
    dgx-a100:2+dgx-1v:4      machines of several kinds       lab.yaml       a description (see `describe`)

Figures are dense peaks and one-directional bandwidths. Where a figure is from stands in the accelerator's `source`
and in the table of machines; DGX-1's wiring follows NVIDIA's DGX-1 white paper (WP-08437-002).

The topology of a machine is built from a few facts: accelerators in pairs on PCIe switches, PCIe switches on two CPUs,
NICs on PCIe switches, NVLink or xGMI beside that, and all NICs on one network. What the facts do not say is assumed
alike everywhere: the link between the CPUs is as wide as one x16 slot, and the network does not block.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from headway.errors import ClusterError
from headway.hardware.cluster import Accelerator, Cluster, Device, Link, Switch
from headway.value import Value

__all__ = [
    "ACCELERATORS",
    "PRESETS",
    "Machine",
    "Network",
    "Part",
    "assemble",
    "find_accelerator",
    "find_machine",
    "load_cluster",
    "parse_machines",
    "preset",
]

_STAS = "stas00/ml-engineering, compute/accelerator and network"
_SHEET = "vendor datasheet"


# Bytes that a program finds for each GB of the vendor's: memory is made in powers of two, and torch says 39.4 GiB of
# an A100's 40 GB, 79.1 of an H100's 80. Parts with GDDR memory keep their error correction in it.
_HBM_BYTES = 0.985 * 2**30
_GDDR_BYTES = 1e9
_GDDR = {"T4-16GB", "A10-24GB", "L4-24GB", "L40S-48GB"}


class _Figures(NamedTuple):
    """One line of the table: TFLOP/s (dense) by dtype, GB, GB/s, W; shares of peak reached; where from."""

    name: str
    tflops: dict[str, float]
    memory_gb: float
    memory_gb_per_second: float
    watts: float
    efficiency: float
    source: str


def _rates(
    float32: float, tf32: float, float16: float, bfloat16: float, float8: float = 0, float4: float = 0
) -> dict[str, float]:
    given = {
        "float32": float32,
        "tfloat32": tf32,
        "float16": float16,
        "bfloat16": bfloat16,
        "float8": float8,
        "float4": float4,
    }
    return {dtype: rate for dtype, rate in given.items() if rate}


# `efficiency` is the share of the peak that large matrix products reach in training. Those of A100-SXM, H100-SXM, B200
# and GB200 were fitted to published step times (bench/fit_efficiency.py); GB300's is GB200's times the ratio of their
# power limits, which is what bounds large products there; the others are defaults in the range that public measurements
# show. Parts that run near their power limit (T4, L4, A10, L40S) reach less of the figure on their datasheet; so does
# MI300X, whose boost clock does not last.
_FIGURES = (
    _Figures("P100-SXM2-16GB", _rates(10.6, 0, 21.2, 0), 16, 732, 300, 0.85, _SHEET),
    _Figures("V100-SXM2-16GB", _rates(15.7, 0, 125, 0), 16, 900, 300, 0.70, _SHEET),
    _Figures("V100-SXM2-32GB", _rates(15.7, 0, 125, 0), 32, 900, 300, 0.70, _SHEET),
    _Figures("T4-16GB", _rates(8.1, 0, 65, 0), 16, 320, 70, 0.45, _SHEET),
    _Figures("A10-24GB", _rates(31.2, 62.5, 125, 125), 24, 600, 150, 0.55, _SHEET),
    _Figures("A30-24GB", _rates(10.3, 82, 165, 165), 24, 933, 165, 0.70, _SHEET),
    _Figures("A100-PCIe-80GB", _rates(19.5, 156, 312, 312), 80, 1935, 300, 0.75, _STAS),
    _Figures("A100-SXM-40GB", _rates(19.5, 156, 312, 312), 40, 1555, 400, 0.80, f"{_STAS}; memory: {_SHEET}"),
    _Figures("A100-SXM-80GB", _rates(19.5, 156, 312, 312), 80, 2039, 400, 0.80, _STAS),
    _Figures("L4-24GB", _rates(30.3, 60, 121, 121, 242.5), 24, 300, 72, 0.50, _SHEET),
    _Figures("L40S-48GB", _rates(91.6, 183, 362, 362, 733), 48, 864, 350, 0.65, f"{_STAS}; memory: {_SHEET}"),
    _Figures("H100-PCIe-80GB", _rates(51, 378, 756, 756, 1513), 80, 2000, 350, 0.65, _STAS),
    _Figures("H100-SXM-80GB", _rates(67, 494.5, 989, 989, 1979), 80, 3350, 700, 0.63, _STAS),
    # A part sold to one customer: its peak is not published, and is below that of the 700 W part by an unknown share.
    _Figures(
        "H100-SXM-96GB-HBM2e-500W",
        _rates(67, 494.5, 989, 989, 1979),
        96,
        2400,
        500,
        0.65,
        "pytorch/torchtitan, benchmarks/llama3_h100_202412; rates of the 700 W part",
    ),
    _Figures("H200-SXM-141GB", _rates(67, 494.5, 989, 989, 1979), 141, 4800, 700, 0.63, _STAS),
    _Figures("B200-SXM", _rates(80, 1125, 2250, 2250, 4500, 9000), 180, 8000, 1000, 0.78, _STAS),
    _Figures("GB200", _rates(80, 1250, 2500, 2500, 5000, 10000), 186, 8000, 1200, 0.72, _STAS),
    _Figures("GB300", _rates(80, 1250, 2500, 2500, 5000, 15000), 279, 8000, 1400, 0.84, f"{_STAS}; memory: {_SHEET}"),
    _Figures("MI250X", _rates(47.9, 0, 383, 383), 128, 3277, 560, 0.45, _STAS),
    _Figures("MI300X", _rates(163.4, 653.7, 1307, 1307, 2615), 192, 5300, 750, 0.50, _STAS),
)

# Streaming reaches this share of the memory's peak (about what STREAM-like kernels show on HBM), and starting one
# operator costs this long when the host runs ahead of the device. Both are defaults to be fitted against runs.
_MEMORY_EFFICIENCY = 0.85
_LAUNCH_SECONDS = 4e-6

ACCELERATORS: dict[str, Accelerator] = {
    line.name: Accelerator(
        name=line.name,
        flop_per_second={dtype: rate * 1e12 for dtype, rate in line.tflops.items()},
        memory_bytes=line.memory_gb * (_GDDR_BYTES if line.name in _GDDR else _HBM_BYTES),
        memory_bytes_per_second=line.memory_gb_per_second * 1e9,
        efficiency=line.efficiency,
        memory_efficiency=_MEMORY_EFFICIENCY,
        launch_seconds=_LAUNCH_SECONDS,
        power_watts=line.watts,
        source=line.source,
    )
    for line in _FIGURES
}

_ACCELERATOR_ALIASES = {
    "p100": "P100-SXM2-16GB", "v100": "V100-SXM2-16GB", "t4": "T4-16GB", "a10": "A10-24GB", "a30": "A30-24GB",
    "a100": "A100-SXM-80GB", "l4": "L4-24GB", "l40s": "L40S-48GB", "h100": "H100-SXM-80GB", "h200": "H200-SXM-141GB",
    "b200": "B200-SXM",
}  # fmt: skip

Wiring = Literal["none", "switch", "mesh", "cube-mesh"]


class Part(Value):
    """Some accelerators of one kind in a machine. `accelerator` is a name of the catalog or of the file at hand."""

    accelerator: str
    count: int = 1


class Machine(Value):
    """The facts about one machine that its topology is built from. Bandwidths are one-directional.

    `wiring` says how the accelerators are joined beside PCIe: "switch" (each has `wiring_bytes_per_second` to an
    NVSwitch), "mesh" (each pair directly; the figure is one accelerator's total), "cube-mesh" (DGX-1's hybrid cube
    mesh of eight; the figure is that of one NVLink, and `ring_links` counts the NVLinks on each edge of its two rings).
    """

    parts: tuple[Part, ...]
    wiring: Wiring = "none"
    wiring_bytes_per_second: float = 0.0
    wiring_latency_seconds: float = 0.0
    wiring_kind: str = "nvlink"
    ring_links: tuple[int, int] = (1, 1)
    pcie_bytes_per_second: float = 0.0  # of one slot; 0: nothing but the wiring
    nics: int = 0
    nic_bytes_per_second: float = 0.0  # of one NIC
    nic_latency_seconds: float = 0.0  # from a NIC into the network, software included

    @property
    def size(self) -> int:
        """Accelerators in one machine."""
        return sum(part.count for part in self.parts)


class Network(Value):
    """What joins the machines. One switch that never blocks, unless `oversubscription` is above 1: then every
    `nodes_per_switch` machines have a switch of their own, whose link to the spine is that much narrower than theirs.
    """

    oversubscription: float = 1.0
    nodes_per_switch: int = 16


_PCIE_BYTES_PER_SECOND = {3: 15.75e9, 4: 31e9, 5: 63e9, 6: 121e9}  # one x16 slot
_PCIE_LATENCY_SECONDS = 0.5e-6  # of one hop
_NVLINK_LATENCY_SECONDS = 1.0e-6  # from accelerator to accelerator
# Half of a message's way from one node's memory to another's; NCCL's own model counts 5 µs for a network hop, and
# kernel TCP takes tens of microseconds.
_FABRIC_LATENCY_SECONDS = {"infiniband": 2e-6, "omni-path": 2e-6, "roce": 3e-6, "efa": 8e-6, "ethernet": 15e-6}
# What NCCL spends to start one collective (its tuning model counts 6.6 to 14 µs for a ring).
_COLLECTIVE_LATENCY_SECONDS = 8e-6

# Two Hamiltonian rings that share no edge; a P100 has one NVLink on each edge of both, a V100 two on the first ring's.
_CUBE_MESH_RINGS = ((0, 3, 2, 1, 5, 6, 7, 4), (0, 2, 6, 4, 5, 7, 3, 1))


class _Server(NamedTuple):
    """One line of the table of machines: bandwidth per accelerator in GB/s, NIC in Gb/s, generation of PCIe."""

    names: str  # the first is the name, the others are also understood
    accelerator: str
    count: int
    wiring: Wiring
    wiring_gb_per_second: float
    nics: int
    nic_gbit_per_second: float
    fabric: str
    pcie: int
    ring_links: tuple[int, int] = (1, 1)


_V100_RINGS = (2, 1)
_SERVERS = (
    _Server("dgx-1p", "P100-SXM2-16GB", 8, "cube-mesh", 20, 4, 100, "infiniband", 3),
    _Server("dgx-1v dgx-1", "V100-SXM2-16GB", 8, "cube-mesh", 25, 4, 100, "infiniband", 3, _V100_RINGS),
    _Server("dgx-2", "V100-SXM2-32GB", 16, "switch", 150, 8, 100, "infiniband", 3),
    _Server("dgx-a100 dgx-a100-80", "A100-SXM-80GB", 8, "switch", 300, 8, 200, "infiniband", 4),
    _Server("dgx-a100-40", "A100-SXM-40GB", 8, "switch", 300, 8, 200, "infiniband", 4),
    _Server("dgx-h100 hgx-h100", "H100-SXM-80GB", 8, "switch", 450, 8, 400, "infiniband", 5),
    _Server("hgx-h200 dgx-h200", "H200-SXM-141GB", 8, "switch", 450, 8, 400, "infiniband", 5),
    _Server("dgx-b200 hgx-b200", "B200-SXM", 8, "switch", 900, 8, 400, "infiniband", 5),
    # One node here is one NVLink domain: the whole rack of 18 trays, or one tray of it.
    _Server("gb200-nvl72", "GB200", 72, "switch", 900, 72, 400, "infiniband", 5),
    _Server("gb200-nvl72-tray gb200", "GB200", 4, "switch", 900, 4, 400, "infiniband", 5),
    _Server("gb300-nvl72", "GB300", 72, "switch", 900, 72, 800, "infiniband", 6),
    _Server("mi300x-8 mi300x", "MI300X", 8, "mesh", 448, 8, 400, "roce", 5),
    _Server("aws-p3.16xlarge aws-p3 p3", "V100-SXM2-16GB", 8, "cube-mesh", 25, 1, 25, "ethernet", 3, _V100_RINGS),
    _Server("aws-p3dn.24xlarge aws-p3dn p3dn", "V100-SXM2-32GB", 8, "cube-mesh", 25, 1, 100, "efa", 3, _V100_RINGS),
    _Server("aws-g4dn.12xlarge aws-g4dn g4dn", "T4-16GB", 4, "none", 0, 1, 50, "ethernet", 3),
    _Server("aws-p4d.24xlarge aws-p4d p4d", "A100-SXM-40GB", 8, "switch", 300, 4, 100, "efa", 4),
    _Server("aws-p4de.24xlarge aws-p4de p4de", "A100-SXM-80GB", 8, "switch", 300, 4, 100, "efa", 4),
    _Server("aws-p5.48xlarge aws-p5 p5", "H100-SXM-80GB", 8, "switch", 450, 32, 100, "efa", 5),
    _Server("aws-p5en.48xlarge aws-p5en p5en", "H200-SXM-141GB", 8, "switch", 450, 16, 200, "efa", 5),
    _Server("aws-p6-b200 p6-b200", "B200-SXM", 8, "switch", 900, 8, 400, "efa", 5),
    _Server("gcp-a2-highgpu-8g gcp-a2", "A100-SXM-40GB", 8, "switch", 300, 1, 100, "ethernet", 4),
    _Server("gcp-a3-highgpu-8g gcp-a3", "H100-SXM-80GB", 8, "switch", 450, 4, 200, "ethernet", 5),
    _Server("gcp-a3-megagpu-8g gcp-a3-mega", "H100-SXM-80GB", 8, "switch", 450, 8, 200, "ethernet", 5),
    _Server("azure-nd96asr_v4", "A100-SXM-40GB", 8, "switch", 300, 8, 200, "infiniband", 4),
    _Server("azure-nd96amsr_a100_v4", "A100-SXM-80GB", 8, "switch", 300, 8, 200, "infiniband", 4),
    _Server("azure-nd96isr_h100_v5", "H100-SXM-80GB", 8, "switch", 450, 8, 400, "infiniband", 5),
    _Server("azure-nc24rs_v3", "V100-SXM2-16GB", 4, "none", 0, 1, 100, "infiniband", 3),
    # Clusters that published measurements were taken on.
    _Server("mosaicml-a100-roce", "A100-SXM-80GB", 8, "switch", 300, 8, 200, "roce", 4),
    _Server("vtrain-a100", "A100-SXM-80GB", 8, "switch", 300, 4, 200, "infiniband", 4),
    _Server("jeanzay-v100", "V100-SXM2-32GB", 4, "mesh", 150, 4, 100, "omni-path", 3),
    _Server("jeanzay-a100", "A100-SXM-80GB", 8, "switch", 300, 4, 100, "omni-path", 4),
    _Server("grandteton-h100", "H100-SXM-96GB-HBM2e-500W", 8, "switch", 450, 8, 400, "roce", 5),
    _Server("oneflow-dlperf-v100", "V100-SXM2-16GB", 8, "cube-mesh", 25, 1, 100, "infiniband", 3, _V100_RINGS),
)


def _machine(server: _Server) -> Machine:
    return Machine(
        parts=(Part(accelerator=server.accelerator, count=server.count),),
        wiring=server.wiring,
        wiring_bytes_per_second=server.wiring_gb_per_second * 1e9,
        wiring_latency_seconds=_NVLINK_LATENCY_SECONDS,
        wiring_kind="xgmi" if server.accelerator.startswith("MI") else "nvlink",
        ring_links=server.ring_links,
        pcie_bytes_per_second=_PCIE_BYTES_PER_SECOND[server.pcie],
        nics=server.nics,
        nic_bytes_per_second=server.nic_gbit_per_second * 1e9 / 8,
        nic_latency_seconds=_FABRIC_LATENCY_SECONDS[server.fabric],
    )


PRESETS: dict[str, Machine] = {server.names.split()[0]: _machine(server) for server in _SERVERS}
_PRESET_ALIASES = {alias: server.names.split()[0] for server in _SERVERS for alias in server.names.split()}


def find_accelerator(name: str, *, place: str = "", known: Iterable[str] = ()) -> Accelerator:
    """The catalog's accelerator of this name, in any case. Raises ClusterError with the closest names.

    `known` are further names that the place at hand knows, for the hint alone.
    """
    names = {key.lower(): key for key in ACCELERATORS} | _ACCELERATOR_ALIASES
    key = names.get(name.strip().lower())
    if key is None:
        raise ClusterError(
            f"no accelerator is called {name!r}",
            place=place,
            remedy=_hint(name, [*ACCELERATORS, *_ACCELERATOR_ALIASES, *known], ACCELERATORS),
        )
    return ACCELERATORS[key]


def find_machine(name: str, *, place: str = "") -> tuple[str, Machine]:
    """The catalog's machine of this name, in any case, with its proper name. Raises ClusterError."""
    key = _PRESET_ALIASES.get(name.strip().lower())
    if key is None:
        raise ClusterError(
            f"no machine is called {name!r}",
            place=place,
            remedy=_hint(name, _PRESET_ALIASES, PRESETS) + "; a file must end in .yaml, .yml or .json",
        )
    return key, PRESETS[key]


def _hint(name: str, names: Iterable[str], listed: Iterable[str]) -> str:
    spelling = {known.lower(): known for known in names}
    close = [spelling[word] for word in difflib.get_close_matches(name.strip().lower(), spelling, n=4, cutoff=0.5)]
    return "did you mean " + " or ".join(close) + "?" if close else "known are: " + ", ".join(listed)


def parse_machines(text: str, *, place: str = "") -> list[tuple[str, Machine, int]]:
    """`"dgx-a100:2+dgx-1v:4"` → name, machine and count of each term. Raises ClusterError."""
    place = place or "--cluster"
    terms = []
    for term in text.split("+"):
        match = re.fullmatch(r"\s*([^:]+?)\s*(?::\s*([^:]*?)\s*)?", term)
        if match is None:
            raise ClusterError(f"{term!r} names no machine", place=place, remedy="write it like dgx-a100:2+dgx-1v:4")
        name, machine = find_machine(match[1], place=place)
        terms.append((name, machine, _count(match[2], term, place)))
    return terms


def _count(text: str | None, term: str, place: str) -> int:
    if text is None:
        return 1
    if not re.fullmatch(r"[0-9]+", text) or int(text) == 0:
        raise ClusterError(
            f"{text!r} in {term.strip()!r} is not a number of machines",
            place=place,
            remedy="write a positive number after the colon, like dgx-h100:64",
        )
    return int(text)


def preset(text: str, *, network: Network | None = None) -> Cluster:
    """The cluster of catalog machines that `text` names: `dgx-1v`, `dgx-h100:64`, `dgx-a100:2+dgx-1v:4`.

    Devices are called `node0/gpu0`, nodes are numbered across all terms. Raises ClusterError.
    """
    terms = parse_machines(text)
    machines = [machine for _, machine, count in terms for _ in range(count)]
    name = "+".join(term if count == 1 else f"{term}:{count}" for term, _, count in terms)
    nodes = [(f"node{position}", machine) for position, machine in enumerate(machines)]
    return assemble(name, nodes, network=network)


def load_cluster(spec: str | Path) -> Cluster:
    """The cluster that `spec` names: `local`, `local:4`, catalog machines, or a YAML or JSON file (see the module).

    Raises ClusterError for an unknown name, FileError and FieldError for a file that is not there or not right.
    """
    text = str(spec)
    if text.lower().endswith((".yaml", ".yml", ".json")) or isinstance(spec, Path):
        # Imported where used: `describe` stands on this module.
        from headway.hardware.describe import load

        return load(text)
    name, _, count = text.partition(":")
    if name.strip().lower() == "local":
        # Imported where used: the probe needs torch, and naming a machine of the catalog does not.
        from headway.hardware.probe import probe

        return probe(_count(count.strip(), text, "--cluster") if count else None).cluster
    if "local" in (term.partition(":")[0].strip().lower() for term in text.split("+")):
        raise ClusterError(
            "this machine cannot be joined to others by '+': nothing says how",
            place="--cluster",
            remedy="save it with `headway probe --json`, and describe the network between them in a file",
        )
    if Path(text).is_file():
        raise ClusterError(
            f"{text!r} is a file, and neither YAML nor JSON by its name",
            place="--cluster",
            remedy="rename it to end in .yaml or .json",
        )
    return preset(text)


def assemble(
    name: str,
    nodes: Sequence[tuple[str, Machine]],
    *,
    accelerators: dict[str, Accelerator] | None = None,
    network: Network | None = None,
    links: Iterable[Link] = (),
    place: str = "",
) -> Cluster:
    """The cluster of these (name, machine) nodes, joined by a network where they have NICs.

    `accelerators` are further kinds, or replace those of the catalog by name. Raises ClusterError.
    """
    place = place or name
    own = accelerators or {}
    if network is not None and (network.oversubscription < 1 or network.nodes_per_switch < 1):
        raise ClusterError(
            "oversubscription and nodes_per_switch must be at least 1", place=f"{place}: network", remedy="1: none"
        )
    assembly = _Assembly(own, place)
    for node, machine in nodes:
        assembly.add(node, machine)
    assembly.join(network or Network())
    used = {device.accelerator for device in assembly.devices}
    return Cluster(
        name=name,
        accelerators={key: kind for key, kind in assembly.kinds.items() if key in used},
        devices=tuple(assembly.devices),
        switches=tuple(assembly.switches),
        links=(*assembly.links, *links),
        collective_latency_seconds=_COLLECTIVE_LATENCY_SECONDS,
    ).validate(place=place)


class _Assembly:
    """Devices, switches and links of a cluster while it is put together."""

    def __init__(self, kinds: dict[str, Accelerator], place: str) -> None:
        self.place = place
        self.kinds = dict(kinds)
        self.devices: list[Device] = []
        self.switches: list[Switch] = []
        self.links: list[Link] = []
        self.nics: list[tuple[int, str, float, float]] = []  # position of the node, NIC, bytes per second, latency
        self.nodes = 0

    def cable(self, one: str, other: str, bytes_per_second: float, latency_seconds: float, kind: str) -> None:
        """A link each way."""
        for source, target in ((one, other), (other, one)):
            self.links.append(
                Link(
                    source=source,
                    target=target,
                    bytes_per_second=bytes_per_second,
                    latency_seconds=latency_seconds,
                    kind=kind,
                )
            )

    def switch(self, name: str, node: str = "") -> str:
        self.switches.append(Switch(name=name, node=node))
        return name

    def add(self, node: str, machine: Machine) -> None:
        """One machine, complete up to its NICs."""
        names = []
        for part in machine.parts:
            kind = part.accelerator
            if kind not in self.kinds:
                found = find_accelerator(kind, place=f"{self.place}: {node}", known=self.kinds)
                kind = found.name
                self.kinds.setdefault(kind, found)
            prefix = "gpu" if self.kinds[kind].torch_device == "cuda" else self.kinds[kind].torch_device
            for _ in range(part.count):
                names.append(f"{node}/{prefix}{len(names)}")
                self.devices.append(Device(name=names[-1], accelerator=kind, node=node))
        if not names:
            raise ClusterError("has no devices", place=f"{self.place}: {node}", remedy="list at least one")
        self._wire(node, machine, names)
        roots = self._pcie(node, machine, names)
        self._nics(node, machine, names, roots)
        self.nodes += 1

    def _wire(self, node: str, machine: Machine, names: list[str]) -> None:
        rate, latency, kind = machine.wiring_bytes_per_second, machine.wiring_latency_seconds, machine.wiring_kind
        count = len(names)
        if machine.wiring == "switch":
            switch = self.switch(f"{node}/{'nvswitch' if kind == 'nvlink' else 'switch'}", node)
            for name in names:
                self.cable(name, switch, rate, latency / 2, kind)
        elif machine.wiring == "mesh":
            for position, one in enumerate(names):
                for other in names[position + 1 :]:
                    self.cable(one, other, rate / (count - 1), latency, kind)
        elif machine.wiring == "cube-mesh":
            if count != 8:
                raise ClusterError(
                    f"a hybrid cube mesh joins 8 devices, not {count}",
                    place=f"{self.place}: {node}",
                    remedy="use the wiring 'mesh' or 'switch'",
                )
            for ring, links in zip(_CUBE_MESH_RINGS, machine.ring_links, strict=True):
                for position, one in enumerate(ring):
                    other = ring[(position + 1) % 8]
                    self.cable(names[one], names[other], links * rate, latency, kind)

    def _pcie(self, node: str, machine: Machine, names: list[str]) -> list[str]:
        """The PCIe tree: two CPUs, switches for pairs of devices; the switches' names, or none without PCIe."""
        rate = machine.pcie_bytes_per_second
        if not rate:
            return []
        pairs = [names[position : position + 2] for position in range(0, len(names), 2)]
        cpus = [self.switch(f"{node}/root{cpu}", node) for cpu in range(min(2, len(pairs)))]
        if len(cpus) == 2:
            self.cable(cpus[0], cpus[1], rate, _PCIE_LATENCY_SECONDS, "socket")
        roots = []
        for position, pair in enumerate(pairs):
            roots.append(self.switch(f"{node}/pcie{position}", node))
            self.cable(roots[-1], cpus[position * len(cpus) // len(pairs)], rate, _PCIE_LATENCY_SECONDS, "pcie")
            for name in pair:
                self.cable(name, roots[-1], rate, _PCIE_LATENCY_SECONDS, "pcie")
        return roots

    def _nics(self, node: str, machine: Machine, names: list[str], roots: list[str]) -> None:
        if not machine.nics:
            return
        # Where each device has several NICs they act as one: NCCL stripes a message over them.
        count = machine.nics
        if count > len(names) and count % len(names) == 0:
            count = len(names)
        rate = machine.nic_bytes_per_second * machine.nics / count
        for position in range(count):
            nic = self.switch(f"{node}/nic{position}", node)
            if not roots:
                # Without PCIe figures the NIC itself is the only bound.
                for name in names:
                    self.cable(name, nic, rate, 0.0, "pcie")
            else:
                # A slot as wide as its NICs, where one x16 slot is narrower than the bundle.
                slot = max(machine.pcie_bytes_per_second, rate)
                root = roots[position * len(roots) // count]
                # The only NIC of a machine hangs on a CPU: no pair of devices is nearer to it than another.
                end = f"{node}/root0" if count == 1 and len(roots) > 1 else root
                self.cable(nic, end, slot, _PCIE_LATENCY_SECONDS, "pcie")
            self.nics.append((self.nodes, nic, rate, machine.nic_latency_seconds))

    def join(self, network: Network) -> None:
        """All NICs on the network; a machine that stands alone needs none."""
        if self.nodes < 2 or not self.nics:
            return
        spine = self.switch("network")
        leaves: dict[int, str] = {}
        uplinks: dict[str, float] = {}
        for node, nic, rate, latency in self.nics:
            end = spine
            if network.oversubscription > 1:
                position = node // network.nodes_per_switch
                if position not in leaves:
                    leaves[position] = self.switch(f"network/leaf{position}")
                end = leaves[position]
                uplinks[end] = uplinks.get(end, 0.0) + rate
            self.cable(nic, end, rate, latency, "network")
        for leaf, rate in uplinks.items():
            self.cable(leaf, spine, rate / network.oversubscription, 0.0, "network")
