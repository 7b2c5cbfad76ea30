"""Clusters described by people, in YAML or JSON.

The short form starts from machines of the catalog and says what is different::

    preset: dgx-a100:4
    network: {bandwidth: 100Gb/s, latency: 5us}

The long form lists nodes, of any kinds, and what joins them::

    name: the lab
    accelerators:
      Workstation GPU:                  # a new kind, or one of the catalog's names to correct it
        like: A100-PCIe-80GB            # whatever is not said below is as in the catalog
        memory: 48GB
        flop: {float32: 40TFLOP/s, bfloat16: 160TFLOP/s}
    nodes:
      - preset: dgx-1v                  # a whole machine of the catalog
        name: dgx
        count: 2                        # dgx0 and dgx1
      - name: tower
        devices: 2 x Workstation GPU    # or {Workstation GPU: 1, T4-16GB: 1}: kinds may be mixed
        interconnect: {kind: mesh, bandwidth: 50GB/s, latency: 2us}
        pcie: 31GB/s
        nics: {count: 1, bandwidth: 25Gb/s}
    network: {latency: 5us, oversubscription: 2}
    links:
      - {from: tower/gpu0, to: dgx0/gpu0, bandwidth: 12GB/s, latency: 1us}

Devices are named `node/gpu0`, `node/gpu1`, … (`cpu0` where `torch_device` is cpu). A link is a cable, both ways, unless
it says `one_way: true`. Bandwidths are one-directional; `b` is a bit and `B` a byte. The third form is a Cluster as
Headway itself writes it (`devices`, `switches`, `links`, in SI units), which comes back equal; what
`headway probe --json` prints is read as the cluster within.

A field that is not known, a quantity that is none, a link to nowhere or without bandwidth is refused with its place in
the file (FieldError, ClusterError). `docs/hardware.md` is the reference of the fields.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

import msgspec

from headway.errors import ClusterError, FieldError, QuantityError
from headway.hardware.catalog import (
    ACCELERATORS,
    Machine,
    Network,
    Part,
    Wiring,
    assemble,
    find_accelerator,
    find_machine,
    parse_machines,
)
from headway.hardware.cluster import Accelerator, Cluster, Link
from headway.units import parse_bandwidth, parse_bytes, parse_flop_rate, parse_seconds
from headway.value import Value, read_text

__all__ = ["describe", "load"]

Quantity = str | float


class _Written(Value, frozen=True):
    """The base of what stands in a file: fields as people write them."""


class _Accelerator(_Written):
    like: str = ""
    flop: Quantity | dict[str, Quantity] = {}
    memory: Quantity | None = None
    memory_bandwidth: Quantity | None = None
    efficiency: float | None = None
    memory_efficiency: float | None = None
    launch: Quantity | None = None
    watts: float | None = None
    dollars_per_hour: float | None = None
    torch_device: Literal["cuda", "cpu"] | None = None
    threads: int | None = None
    source: str | None = None


class _Interconnect(_Written):
    bandwidth: Quantity
    kind: Literal["switch", "mesh", "cube-mesh"] = "switch"
    latency: Quantity = 0.0
    name: str = "nvlink"
    ring_links: tuple[int, int] = (2, 1)


class _Nics(_Written):
    bandwidth: Quantity
    count: int = 1
    latency: Quantity = 0.0


class _Link(_Written, rename={"source": "from", "target": "to"}):
    source: str
    target: str
    bandwidth: Quantity
    latency: Quantity = 0.0
    kind: str = ""
    one_way: bool = False


class _Node(_Written):
    name: str = ""
    count: int = 1
    preset: str = ""
    devices: str | list[str] | dict[str, int] = []
    interconnect: _Interconnect | None = None
    pcie: Quantity | None = None
    nics: _Nics | None = None
    links: list[_Link] = []


class _Network(_Written):
    bandwidth: Quantity | None = None
    nics: int | None = None
    latency: Quantity | None = None
    oversubscription: float = 1.0
    nodes_per_switch: int = 16


class _Description(_Written):
    name: str = ""
    preset: str = ""
    accelerators: dict[str, _Accelerator] = {}
    nodes: list[_Node] = []
    network: _Network = _Network()
    links: list[_Link] = []


def load(path: str | Path) -> Cluster:
    """The cluster in a `.yaml`, `.yml` or `.json` file of any of the three forms.

    Raises FileError, FieldError, QuantityError or ClusterError, each naming the place in the file.
    """
    place = str(path)
    text = read_text(path)
    try:
        data = msgspec.json.decode(text) if place.lower().endswith(".json") else msgspec.yaml.decode(text)
    except msgspec.DecodeError as error:
        kind = "JSON" if place.lower().endswith(".json") else "YAML"
        raise FieldError(f"not {kind}: {error}", place=place, remedy="see docs/hardware.md for an example") from None
    return describe(data, place=place)


def describe(data: Any, *, place: str) -> Cluster:
    """The cluster that parsed YAML or JSON describes; `place` is where it is from. Raises as `load` does."""
    if not isinstance(data, dict):
        raise FieldError(
            "does not describe a cluster",
            place=place,
            remedy="begin with `preset: dgx-a100`, or with `nodes:` and a list of them",
        )
    # What `headway probe --json` prints has the cluster within.
    if isinstance(data.get("cluster"), dict) and "processor" in data:
        return describe(data["cluster"], place=_at(place, "cluster"))
    # Our own form has `devices` at the top, which no description has; a preset or nodes decide the other way.
    if "devices" in data and not {"preset", "nodes"} & set(data):
        cluster = _converted(data, Cluster, place)
        return cluster.validate(place=place)
    description = _converted(data, _Description, place)
    if bool(description.preset) == bool(description.nodes):
        raise FieldError(
            "gives both `preset` and `nodes`" if description.preset else "gives neither `preset` nor `nodes`",
            place=place,
            remedy="write `preset: dgx-a100:4`, or list the machines under `nodes:` (each may have its own preset)",
        )
    return _Reader(description, place).cluster()


def _converted(data: Any, kind: type, place: str) -> Any:
    _check(data, kind, place, "")
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        field = path.rstrip("`").lstrip(".")
        raise FieldError(
            message, place=_at(place, field), remedy="see docs/hardware.md for the fields and what they hold"
        ) from None


def _at(place: str, field: str) -> str:
    return f"{place}: {field}" if field else place


def _check(data: Any, kind: Any, place: str, field: str) -> None:
    """Refuse a field that the struct at its place does not have, naming the closest that it has."""
    kinds = _members(kind)
    if isinstance(data, dict):
        for struct in kinds:
            if isinstance(struct, type) and issubclass(struct, msgspec.Struct):
                _check_struct(data, struct, place, field)
                return
        for mapping in kinds:
            if typing.get_origin(mapping) is dict:
                for key, value in data.items():
                    _check(value, typing.get_args(mapping)[1], place, f"{field}.{key}".lstrip("."))
                return
    elif isinstance(data, list):
        for sequence in kinds:
            if typing.get_origin(sequence) in (list, tuple):
                for position, value in enumerate(data):
                    _check(value, typing.get_args(sequence)[0], place, f"{field}[{position}]")
                return


def _members(kind: Any) -> tuple[Any, ...]:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def _check_struct(data: dict[Any, Any], struct: type[msgspec.Struct], place: str, field: str) -> None:
    hints = typing.get_type_hints(struct)
    fields = {
        encoded: hints[name]
        for encoded, name in zip(struct.__struct_encode_fields__, struct.__struct_fields__, strict=True)
    }
    for key, value in data.items():
        where = f"{field}.{key}".lstrip(".")
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            listed = "the fields here are: " + ", ".join(fields)
            raise FieldError(
                f"unknown field {str(key)!r}",
                place=_at(place, where),
                remedy=f"did you mean {close[0]!r}? {listed}" if close else listed,
            )
        _check(value, fields[key], place, where)


class _Reader:
    """Turns one description into a cluster."""

    def __init__(self, description: _Description, place: str) -> None:
        self.description = description
        self.place = place

    def cluster(self) -> Cluster:
        written = self.description
        kinds = {_canonical(name): self.accelerator(name, kind) for name, kind in written.accelerators.items()}
        network = Network(
            oversubscription=written.network.oversubscription, nodes_per_switch=written.network.nodes_per_switch
        )
        nodes, links = self.nodes(kinds)
        for position, link in enumerate(written.links):
            links += self.link(link, f"links[{position}]")
        self.reachable(nodes, [link for _, link in links])
        cluster = assemble(
            written.name or written.preset or Path(self.place).stem,
            nodes,
            accelerators=kinds,
            network=network,
            place=self.place,
        )
        known = [thing.name for thing in (*cluster.devices, *cluster.switches)]
        for field, link in links:
            self.ends(link, field, known)
        return msgspec.structs.replace(cluster, links=(*cluster.links, *(link for _, link in links)))

    def ends(self, link: Link, field: str, known: list[str]) -> None:
        """Refuse a link to nowhere, by its place in the file."""
        for end in (link.source, link.target):
            if end not in known:
                close = difflib.get_close_matches(end, known, n=1)
                raise ClusterError(
                    f"goes to {end!r}, which is neither a device nor a switch",
                    place=_at(self.place, field),
                    remedy=f"did you mean {close[0]!r}?" if close else "name a device, like node0/gpu0",
                )
        if link.source == link.target:
            raise ClusterError(
                f"joins {link.source!r} to itself", place=_at(self.place, field), remedy="remove the link"
            )

    def quantity(self, value: Quantity, parse, field: str, *, positive: bool = False) -> float:
        try:
            number = parse(value)
        except QuantityError as error:
            raise QuantityError(error.message, place=_at(self.place, field), remedy=error.remedy) from None
        if number < 0 or (positive and number == 0):
            raise ClusterError(
                f"must be more than zero, not {value}" if positive else f"must not be negative, and is {value}",
                place=_at(self.place, field),
                remedy="give what it really is, or remove the part that is down",
            )
        return number

    def bandwidth(self, value: Quantity, field: str) -> float:
        return self.quantity(value, parse_bandwidth, f"{field}.bandwidth", positive=True)

    def accelerator(self, name: str, written: _Accelerator) -> Accelerator:
        field = f"accelerators.{name}"
        own = _canonical(name)
        like = written.like or (own if own in ACCELERATORS else "")
        values: dict[str, Any] = {}
        if like:
            found = find_accelerator(like, place=_at(self.place, f"{field}.like"), known=self.description.accelerators)
            values = {key: getattr(found, key) for key in Accelerator.__struct_fields__}
        flop = written.flop if isinstance(written.flop, dict) else {"float32": written.flop}
        rates = {
            dtype: self.quantity(rate, parse_flop_rate, f"{field}.flop.{dtype}", positive=True)
            for dtype, rate in flop.items()
        }
        values["flop_per_second"] = {**values.get("flop_per_second", {}), **rates}
        if written.memory is not None:
            values["memory_bytes"] = self.quantity(written.memory, parse_bytes, f"{field}.memory", positive=True)
        if written.memory_bandwidth is not None:
            values["memory_bytes_per_second"] = self.quantity(
                written.memory_bandwidth, parse_bandwidth, f"{field}.memory_bandwidth", positive=True
            )
        if written.launch is not None:
            values["launch_seconds"] = self.quantity(written.launch, parse_seconds, f"{field}.launch")
        plain = ("efficiency", "memory_efficiency", "dollars_per_hour", "torch_device", "threads", "source")
        values |= {key: getattr(written, key) for key in plain if getattr(written, key) is not None}
        for key in ("efficiency", "memory_efficiency"):
            if key in values and not 0 < values[key] <= 1:
                raise ClusterError(
                    f"must be a share of the peak above 0 and up to 1, not {values[key]:g}",
                    place=_at(self.place, f"{field}.{key}"),
                    remedy="write 0.8 for 80 %",
                )
        if written.watts is not None:
            values["power_watts"] = written.watts
        for key, label, example in (
            ("flop_per_second", "flop", "{float32: 20TFLOP/s, bfloat16: 300TFLOP/s}"),
            ("memory_bytes", "memory", "80GB"),
            ("memory_bytes_per_second", "memory_bandwidth", "2TB/s"),
        ):
            if not values.get(key):
                raise FieldError(
                    f"says nothing about `{label}`",
                    place=_at(self.place, field),
                    remedy=f"add `{label}: {example}`, or start from a known one with `like: A100-SXM-80GB`",
                )
        if not written.source and (rates or written.memory or written.memory_bandwidth):
            values["source"] = Path(self.place).name
        return Accelerator(**{**values, "name": own})

    def nodes(self, kinds: dict[str, Accelerator]) -> tuple[list[tuple[str, Machine]], list[tuple[str, Link]]]:
        written = self.description
        nodes: list[tuple[str, Machine]] = []
        links: list[tuple[str, Link]] = []
        if written.preset:
            for _, machine, count in parse_machines(written.preset, place=_at(self.place, "preset")):
                nodes += [(f"node{len(nodes) + index}", self.networked(machine)) for index in range(count)]
            return nodes, links
        names: set[str] = set()
        for position, node in enumerate(written.nodes):
            field = f"nodes[{position}]"
            machine = self.networked(self.machine(node, field, kinds))
            if node.count < 1:
                raise ClusterError(
                    f"count must be at least 1, not {node.count}",
                    place=_at(self.place, f"{field}.count"),
                    remedy="leave the node out if it is not there",
                )
            for index in range(node.count):
                if not node.name:
                    name = f"node{len(nodes)}"
                else:
                    name = node.name if node.count == 1 else f"{node.name}{index}"
                if name in names:
                    raise ClusterError(
                        f"two nodes are named {name!r}",
                        place=_at(self.place, f"{field}.name"),
                        remedy="give each its own name",
                    )
                names.add(name)
                nodes.append((name, machine))
                for place, link in enumerate(node.links):
                    links += self.link(link, f"{field}.links[{place}]", prefix=f"{name}/")
        return nodes, links

    def machine(self, node: _Node, field: str, kinds: dict[str, Accelerator]) -> Machine:
        if bool(node.preset) == bool(node.devices):
            raise FieldError(
                "gives both `preset` and `devices`" if node.preset else "gives neither `preset` nor `devices`",
                place=_at(self.place, field),
                remedy="write `preset: dgx-a100`, or `devices: 4 x A100-SXM-80GB`",
            )
        if node.preset:
            machine = find_machine(node.preset, place=_at(self.place, f"{field}.preset"))[1]
        else:
            machine = Machine(parts=self.parts(node, f"{field}.devices", kinds))
        changes: dict[str, Any] = {}
        wiring = node.interconnect
        if wiring is not None:
            where = f"{field}.interconnect"
            kind: Wiring = wiring.kind
            if machine.size < 2:
                raise ClusterError(
                    "there is only one device to join",
                    place=_at(self.place, where),
                    remedy="remove it, or list more devices",
                )
            changes |= {
                "wiring": kind,
                "wiring_bytes_per_second": self.bandwidth(wiring.bandwidth, where),
                "wiring_latency_seconds": self.quantity(wiring.latency, parse_seconds, f"{where}.latency"),
                "wiring_kind": wiring.name,
                "ring_links": wiring.ring_links,
            }
        if node.pcie is not None:
            changes["pcie_bytes_per_second"] = self.quantity(node.pcie, parse_bandwidth, f"{field}.pcie", positive=True)
        if node.nics is not None:
            where = f"{field}.nics"
            if node.nics.count < 0:
                raise ClusterError("count must not be negative", place=_at(self.place, f"{where}.count"))
            changes |= {
                "nics": node.nics.count,
                "nic_bytes_per_second": self.bandwidth(node.nics.bandwidth, where),
                "nic_latency_seconds": self.quantity(node.nics.latency, parse_seconds, f"{where}.latency"),
            }
        return msgspec.structs.replace(machine, **changes)

    def parts(self, node: _Node, field: str, kinds: dict[str, Accelerator]) -> tuple[Part, ...]:
        """`4 x V100`, a list of such, or {V100: 4, T4: 2}; catalog names come back as the catalog spells them."""
        if isinstance(node.devices, dict):
            counted = list(node.devices.items())
        else:
            counted = []
            for term in [node.devices] if isinstance(node.devices, str) else node.devices:
                match = re.fullmatch(r"\s*(?:([0-9]+)\s*[x×]\s+)?(.+?)\s*", term)
                counted.append((match[2], int(match[1] or 1)) if match else (term, 1))
        parts = []
        for name, count in counted:
            where = _at(self.place, f"{field}: {name}")
            if count < 1:
                raise ClusterError(
                    f"the number of devices must be at least 1, not {count}", place=where, remedy="leave the kind out"
                )
            kind = _canonical(name)
            if kind not in kinds:
                kind = find_accelerator(name, place=where, known=kinds).name
            parts.append(Part(accelerator=kind, count=count))
        return tuple(parts)

    def networked(self, machine: Machine) -> Machine:
        """`machine` with what `network:` says about every node."""
        network = self.description.network
        changes: dict[str, Any] = {}
        if network.nics is not None:
            if network.nics < 1:
                raise ClusterError("must be at least 1", place=_at(self.place, "network.nics"))
            changes["nics"] = network.nics
        if network.bandwidth is not None:
            changes["nic_bytes_per_second"] = self.bandwidth(network.bandwidth, "network")
            changes.setdefault("nics", machine.nics or 1)
        if network.latency is not None:
            # A message crosses two NICs.
            latency = self.quantity(network.latency, parse_seconds, "network.latency")
            changes["nic_latency_seconds"] = latency / 2
        changed = msgspec.structs.replace(machine, **changes)
        if changed.nics and not changed.nic_bytes_per_second:
            raise FieldError(
                "the NICs have no bandwidth",
                place=_at(self.place, "network.nics"),
                remedy="add `bandwidth: 100Gb/s` beside it",
            )
        return changed

    def link(self, written: _Link, field: str, prefix: str = "") -> list[tuple[str, Link]]:
        """The link, or both its directions, each beside its place in the file."""
        rate = self.bandwidth(written.bandwidth, field)
        latency = self.quantity(written.latency, parse_seconds, f"{field}.latency")
        ends = [(prefix + written.source, prefix + written.target)]
        if not written.one_way:
            ends.append((ends[0][1], ends[0][0]))
        return [
            (
                field,
                Link(source=source, target=target, bytes_per_second=rate, latency_seconds=latency, kind=written.kind),
            )
            for source, target in ends
        ]

    def reachable(self, nodes: list[tuple[str, Machine]], links: list[Link]) -> None:
        """Refuse a node that nothing joins to the others, before a search does with less to say."""
        if len(nodes) < 2:
            return
        joined = {end.partition("/")[0] for link in links for end in (link.source, link.target)}
        for name, machine in nodes:
            if not machine.nics and name not in joined:
                raise ClusterError(
                    f"nothing joins node {name!r} to the others",
                    place=self.place,
                    remedy="add `network: {bandwidth: 100Gb/s, latency: 5us}`, or `nics:` to the node",
                )


def _canonical(name: str) -> str:
    """The catalog's own spelling of `name`, or `name` where the catalog has no such kind."""
    try:
        return find_accelerator(name).name
    except ClusterError:
        return name
