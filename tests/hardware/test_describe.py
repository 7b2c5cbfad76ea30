"""Descriptions in YAML and JSON: what they mean, that they come back equal, and how mistakes are named."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ClusterError, FieldError, FileError, InputError, QuantityError
from headway.hardware import describe
from headway.hardware.catalog import load_cluster, preset
from headway.hardware.cluster import Accelerator, Cluster, Device, Link, Switch

LAB = """
name: the lab
accelerators:
  Workstation GPU:
    like: A100-PCIe-80GB
    memory: 48GB
    flop: {float32: 40TFLOP/s, bfloat16: 160TFLOP/s}
nodes:
  - preset: dgx-1v
    name: dgx
    count: 2
  - name: tower
    devices: 2 x Workstation GPU
    interconnect: {kind: mesh, bandwidth: 50GB/s, latency: 2us}
    pcie: 31GB/s
    nics: {count: 1, bandwidth: 25Gb/s}
network: {latency: 5us, oversubscription: 2}
links:
  - {from: tower/gpu0, to: dgx0/gpu0, bandwidth: 12GB/s, latency: 1us}
"""


def read(tmp_path: Path, text: str, name: str = "lab.yaml") -> Cluster:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return load_cluster(str(path))


def test_a_lab_of_several_kinds_is_understood(tmp_path: Path) -> None:
    cluster = read(tmp_path, LAB)
    assert cluster.name == "the lab"
    assert {node: len(positions) for node, positions in cluster.nodes.items()} == {"dgx0": 8, "dgx1": 8, "tower": 2}
    kind = cluster.accelerators["Workstation GPU"]
    assert kind.memory_bytes == 48e9
    assert kind.flop_rate("bfloat16") == 160e12
    assert kind.flop_rate("float16") == 312e12  # not said, so as in the catalog
    pair = [cluster.links[position] for position in cluster.route("tower/gpu0", "tower/gpu1")]
    assert [(link.bytes_per_second, link.latency_seconds) for link in pair] == [(50e9, 2e-6)]
    cable = [cluster.links[position] for position in cluster.route("dgx0/gpu0", "tower/gpu0")]
    assert [link.bytes_per_second for link in cable] == [12e9]
    far = [cluster.links[position] for position in cluster.route("tower/gpu1", "dgx1/gpu3")]
    assert min(link.bytes_per_second for link in far) == 25e9 / 8
    assert sum(link.latency_seconds for link in far if link.kind == "network") == pytest.approx(5e-6)


def test_the_example_in_the_module_is_a_description() -> None:
    text = (describe.__doc__ or "").split("what joins them::")[1].split("\nDevices are named")[0]
    assert len(describe.describe(msgspec.yaml.decode(text), place="docstring")) == 18


def test_a_preset_alone_is_that_preset(tmp_path: Path) -> None:
    assert read(tmp_path, "preset: dgx-a100:2+dgx-1v") == preset("dgx-a100:2+dgx-1v")


def test_a_preset_can_be_corrected(tmp_path: Path) -> None:
    text = """
    preset: dgx-a100:2
    accelerators: {a100-sxm-80gb: {efficiency: 0.5, watts: 300, launch: 10us}}
    network: {bandwidth: 100Gb/s, latency: 20us, nics: 2}
    """
    cluster = read(tmp_path, text)
    kind = cluster.accelerator_of(0)
    assert (kind.efficiency, kind.power_watts, kind.memory_bytes) == (0.5, 300.0, 80 * 0.985 * 2**30)
    assert kind.launch_seconds == pytest.approx(10e-6)
    leaving = [link for link in cluster.links if link.target == "network"]
    assert [link.bytes_per_second for link in leaving] == [12.5e9] * 4


def test_a_network_gives_nodes_without_nics_one(tmp_path: Path) -> None:
    text = "nodes: [{devices: 2 x T4, pcie: 16GB/s, count: 3}]\nnetwork: {bandwidth: 10Gb/s, latency: 50us}"
    cluster = read(tmp_path, text)
    path = [cluster.links[position] for position in cluster.route("node0/gpu1", "node2/gpu0")]
    assert min(link.bytes_per_second for link in path) == 1.25e9


def test_devices_can_be_written_in_three_ways(tmp_path: Path) -> None:
    written = ["2 x A100-SXM-80GB", "[A100-SXM-80GB, A100]", "{a100-sxm-80gb: 2}"]
    clusters = [read(tmp_path, f"name: x\nnodes: [{{devices: {text}, pcie: 31GB/s}}]") for text in written]
    assert clusters[0] == clusters[1] == clusters[2]


def test_one_way_links_and_links_inside_nodes(tmp_path: Path) -> None:
    text = """
    nodes:
      - devices: {T4: 2}
        count: 2
        links: [{from: gpu0, to: gpu1, bandwidth: 1GB/s, kind: cable}]
    links:
      - {from: node0/gpu0, to: node1/gpu0, bandwidth: 1GB/s, one_way: true}
    """
    cluster = read(tmp_path, text)
    assert len(cluster.links) == 5
    assert len(cluster.route("node0/gpu1", "node1/gpu1")) == 3
    with pytest.raises(ClusterError, match="no path"):
        cluster.route("node1/gpu0", "node0/gpu0")


@pytest.mark.parametrize(
    ("text", "kind", "place", "remedy"),
    [
        ("prest: dgx-1v", FieldError, "prest", "'preset'"),
        ("preset: dgx-1v\nnetwork: {bandwith: 1GB/s}", FieldError, "network.bandwith", "'bandwidth'"),
        ("nodes: [{devices: T4, nic: {count: 1}}]", FieldError, "nodes[0].nic", "'nics'"),
        ("nodes: [{devices: T4, nics: {cuont: 1}}]", FieldError, "nodes[0].nics.cuont", "'count'"),
        ("accelerators: {T4: {memry: 3GB}}\npreset: g4dn", FieldError, "accelerators.T4.memry", "'memory'"),
        ("nodes: [{devices: T4, nics: {count: 1}}]", FieldError, "nodes[0].nics", "docs/hardware.md"),
        ("nodes: [{devices: T4, count: many}]", FieldError, "nodes[0].count", "docs/hardware.md"),
        ("nodes: [{devices: T4, preset: dgx-1v}]", FieldError, "nodes[0]", "preset: dgx-a100"),
        ("nodes: [{name: x}]", FieldError, "nodes[0]", "devices: 4 x"),
        ("preset: dgx-1v\nnodes: [{preset: dgx-1v}]", FieldError, "lab.yaml", "nodes:"),
        ("name: empty", FieldError, "lab.yaml", "nodes:"),
        ("[]", FieldError, "lab.yaml", "preset"),
        ("preset: [", FieldError, "lab.yaml", "docs/hardware.md"),
        ("preset: dgx-1w", ClusterError, "preset", "dgx-1v"),
        ("nodes: [{devices: 2 x B100}]", ClusterError, "nodes[0].devices", "b200"),
        ("nodes: [{devices: {T4: 0}}]", ClusterError, "nodes[0].devices", "leave"),
        ("nodes: [{devices: T4, count: 0}]", ClusterError, "nodes[0].count", "leave"),
        ("nodes: [{devices: T4, count: 2}]", ClusterError, "lab.yaml", "network:"),
        ("preset: dgx-1v\nnetwork: {bandwidth: 20GBit}", QuantityError, "network.bandwidth", "200Gb/s"),
        ("preset: dgx-1v\nnetwork: {bandwidth: 0Gb/s}", ClusterError, "network.bandwidth", "down"),
        ("preset: dgx-1v\nnetwork: {latency: -1}", ClusterError, "network.latency", "really"),
        ("preset: dgx-1v\nnetwork: {oversubscription: 0}", ClusterError, "network", "1"),
        (
            "preset: dgx-1v\nlinks: [{from: node0/gpu0, to: node0/gpu9, bandwidth: 1GB/s}]",
            ClusterError,
            "links[0]",
            "node0/gpu",
        ),
        (
            "preset: dgx-1v\nlinks: [{from: node0/gpu0, to: node0/gpu1, bandwidth: 0}]",
            ClusterError,
            "links[0].bandwidth",
            "down",
        ),
        ("accelerators: {x: {memory: 3GB}}\nnodes: [{devices: x}]", FieldError, "accelerators.x", "flop"),
        ("accelerators: {x: {like: a1000}}\nnodes: [{devices: x}]", ClusterError, "accelerators.x.like", "a100"),
        ("accelerators: {T4: {efficiency: 0}}\npreset: g4dn", ClusterError, "accelerators.T4.efficiency", "0.8"),
        ("nodes: [{devices: T4, interconnect: {bandwidth: 1GB/s}}]", ClusterError, "nodes[0].interconnect", "remove"),
        (
            "name: x\naccelerators: {}\ndevices: [{name: a, acelerator: b, node: n}]",
            FieldError,
            "devices[0].acelerator",
            "'accelerator'",
        ),
        ("name: x\ndevices: []", FieldError, "lab.yaml", ""),
    ],
)
def test_a_mistake_is_refused_with_its_place_and_remedy(
    tmp_path: Path, text: str, kind: type[InputError], place: str, remedy: str
) -> None:
    with pytest.raises(kind) as caught:
        read(tmp_path, text)
    assert caught.value.place.startswith(str(tmp_path / "lab.yaml"))
    assert place in caught.value.place
    assert remedy in caught.value.remedy
    assert caught.value.exit_code == 2


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file"):
        load_cluster(str(tmp_path / "absent.yaml"))


words = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=8)
positive = st.floats(min_value=1e-9, max_value=1e18, allow_nan=False)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    names = draw(st.lists(words, min_size=3, max_size=6, unique=True))
    kinds = draw(st.lists(words, min_size=1, max_size=2, unique=True))
    accelerators = {
        kind: Accelerator(
            name=kind,
            flop_per_second={"float32": draw(positive)},
            memory_bytes=draw(positive),
            memory_bytes_per_second=draw(positive),
            efficiency=draw(st.floats(0.01, 1)),
            source=draw(words),
        )
        for kind in kinds
    }
    devices = tuple(
        Device(name=name, accelerator=draw(st.sampled_from(kinds)), node=draw(st.sampled_from(["a", "0", "yes"])))
        for name in names[:-1]
    )
    pairs = [(one, other) for one in names for other in names if one != other]
    links = tuple(
        Link(source=one, target=other, bytes_per_second=draw(positive), latency_seconds=draw(st.floats(0, 1)))
        for one, other in draw(st.lists(st.sampled_from(pairs), max_size=6))
    )
    return Cluster(
        name=draw(words),
        accelerators=accelerators,
        devices=devices,
        switches=(Switch(name=names[-1]),),
        links=links,
        contention=draw(st.floats(1, 4)),
        operation_scale={"send": draw(positive)},
    ).validate()


@settings(max_examples=60, deadline=None)
@given(cluster=clusters(), kind=st.sampled_from(["yaml", "yml", "json"]))
def test_a_cluster_comes_back_equal_from_its_file(
    tmp_path_factory: pytest.TempPathFactory, cluster: Cluster, kind: str
) -> None:
    path = tmp_path_factory.mktemp("files") / f"cluster.{kind}"
    cluster.save(path)
    assert load_cluster(str(path)) == cluster


def test_presets_come_back_equal_from_their_files(tmp_path: Path) -> None:
    for name in ("dgx-1v:2", "mi300x-8", "dgx-a100+aws-p3"):
        preset(name).save(tmp_path / "flat.yaml")
        assert load_cluster(tmp_path / "flat.yaml") == preset(name)


def test_the_examples_in_the_documentation_are_descriptions() -> None:
    text = (Path(__file__).parents[2] / "docs" / "hardware.md").read_text(encoding="utf-8")
    examples = [block.split("```")[0] for block in text.split("```yaml\n")[1:]]
    sizes = [len(describe.describe(msgspec.yaml.decode(example), place="docs/hardware.md")) for example in examples]
    assert sizes == [32, 18]
