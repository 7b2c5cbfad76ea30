"""Routes against brute force over all simple paths; subsets; what cannot be a cluster."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ClusterError, DisconnectedError
from headway.hardware.catalog import preset
from headway.hardware.cluster import Accelerator, Cluster, Device, Link, Switch

KIND = Accelerator(name="kind", flop_per_second={"float32": 1e12}, memory_bytes=1e9, memory_bytes_per_second=1e11)


def cluster_of(devices: dict[str, str], switches: dict[str, str], links: list[tuple[str, str, float]]) -> Cluster:
    return Cluster(
        name="drawn",
        accelerators={"kind": KIND},
        devices=tuple(Device(name=name, accelerator="kind", node=node) for name, node in devices.items()),
        switches=tuple(Switch(name=name, node=node) for name, node in switches.items()),
        links=tuple(Link(source=one, target=other, bytes_per_second=rate) for one, other, rate in links),
    ).validate()


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    devices = {f"d{index}": draw(st.sampled_from(["a", "b", "c"])) for index in range(draw(st.integers(2, 4)))}
    switches = {f"s{index}": draw(st.sampled_from(["a", "b", "c", ""])) for index in range(draw(st.integers(0, 3)))}
    names = [*devices, *switches]
    pairs = [(one, other) for one in names for other in names if one != other]
    chosen = draw(st.lists(st.sampled_from(pairs), max_size=18))  # parallel links may appear
    return cluster_of(devices, switches, [(*pair, draw(st.sampled_from([1.0, 2.0, 4.0]))) for pair in chosen])


Cost = tuple[bool, int, int, float]


def cost_of(cluster: Cluster, path: tuple[int, ...], source: str, target: str) -> Cost:
    """(leaves the two nodes and the network, devices passed through, hops, slowness)."""
    node_of = {thing.name: thing.node for thing in (*cluster.devices, *cluster.switches)}
    between = [cluster.links[position].target for position in path[:-1]]
    devices = {device.name for device in cluster.devices}
    allowed = {node_of[source], node_of[target], ""}
    return (
        any(node_of[name] not in allowed for name in between),
        sum(name in devices for name in between),
        len(path),
        max(1 / cluster.links[position].bytes_per_second for position in path),
    )


def best_by_brute_force(cluster: Cluster, source: str, target: str) -> Cost | None:
    costs: list[Cost] = []

    def walk(name: str, seen: frozenset[str], path: tuple[int, ...]) -> None:
        if name == target:
            costs.append(cost_of(cluster, path, source, target))
            return
        for position, link in enumerate(cluster.links):
            if link.source == name and link.target not in seen:
                walk(link.target, seen | {link.target}, (*path, position))

    walk(source, frozenset([source]), ())
    return min(costs, default=None)


@settings(max_examples=150, deadline=None)
@given(clusters())
def test_a_route_is_the_best_of_all_simple_paths(cluster: Cluster) -> None:
    for source in cluster.devices:
        for target in cluster.devices:
            if source is target:
                continue
            expected = best_by_brute_force(cluster, source.name, target.name)
            if expected is None:
                with pytest.raises(DisconnectedError):
                    cluster.route(source.name, target.name)
                continue
            path = cluster.route(source.name, target.name)
            assert cluster.links[path[0]].source == source.name
            assert cluster.links[path[-1]].target == target.name
            for one, other in itertools.pairwise(path):
                assert cluster.links[one].target == cluster.links[other].source
            assert cost_of(cluster, path, source.name, target.name) == expected


def test_a_route_to_itself_has_no_links() -> None:
    assert preset("dgx-1v").route("node0/gpu0", "node0/gpu0") == ()


def test_a_route_to_an_unknown_device_is_refused_by_name() -> None:
    with pytest.raises(ClusterError, match="gpu99"):
        preset("dgx-1v").route("node0/gpu0", "node0/gpu99")


def test_devices_at_one_switch_take_turns_on_equal_links() -> None:
    cluster = preset("dgx-a100:2")
    used = [cluster.route(f"node0/gpu{index}", f"node1/gpu{index}") for index in range(8)]
    ends = [{cluster.links[position].target for position in path} for path in used]
    for node in ("node0", "node1"):
        assert len({name for names in ends for name in names if name.startswith(f"{node}/nic")}) == 8


def test_thousands_of_devices_have_routes() -> None:
    cluster = preset("dgx-h100:2048")
    assert len(cluster) == 16384
    names = [device.name for device in cluster.devices[:1025]]
    hops = [len(cluster.route(one, other)) for one, other in itertools.pairwise(names)]
    assert set(hops) == {2, 6}  # NVSwitch inside a node; PCIe, NIC, network and back between nodes
    assert hops.count(6) == 128
    assert cluster.route("node0/gpu0", "node2047/gpu7") == cluster.route("node0/gpu0", "node2047/gpu7")


def test_a_subset_keeps_what_serves_its_devices() -> None:
    whole = preset("dgx-a100:2+dgx-1v")
    part = whole.subset(["node0/gpu1", "node2/gpu5"]).validate()
    assert [device.name for device in part.devices] == ["node0/gpu1", "node2/gpu5"]
    assert set(part.accelerators) == {"A100-SXM-80GB", "V100-SXM2-16GB"}
    assert set(part.nodes) == {"node0", "node2"}
    assert not [switch.name for switch in part.switches if switch.node == "node1"]
    ends = [part.links[position].target for position in part.route("node0/gpu1", "node2/gpu5")]
    assert "network" in ends


def test_a_subset_by_number_takes_the_first_devices() -> None:
    whole = preset("dgx-1v")
    assert [device.name for device in whole.subset(3).devices] == ["node0/gpu0", "node0/gpu1", "node0/gpu2"]
    assert whole.subset(8) is whole
    for count in (0, 9):
        with pytest.raises(ClusterError, match=f"{count} devices"):
            whole.subset(count)
    with pytest.raises(ClusterError, match="nobody"):
        whole.subset(["nobody"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"devices": ()}, "no devices"),
        ({"switches": (Switch(name="d0"),)}, "two things"),
        ({"accelerators": {}}, "unknown kind"),
        ({"links": (Link(source="d0", target="d9", bytes_per_second=1.0),)}, "neither a device nor a switch"),
        ({"links": (Link(source="d0", target="d0", bytes_per_second=1.0),)}, "itself"),
        ({"links": (Link(source="d0", target="d1", bytes_per_second=0.0),)}, "bandwidth"),
        ({"links": (Link(source="d0", target="d1", bytes_per_second=float("inf")),)}, "bandwidth"),
        ({"links": (Link(source="d0", target="d1", bytes_per_second=1.0, latency_seconds=-1.0),)}, "latency"),
        ({"accelerators": {"kind": msgspec.structs.replace(KIND, flop_per_second={})}}, "FLOP/s"),
        ({"accelerators": {"kind": msgspec.structs.replace(KIND, memory_bytes=0.0)}}, "positive"),
        ({"accelerators": {"kind": msgspec.structs.replace(KIND, power_watts=-1.0)}}, "negative"),
    ],
)
def test_what_cannot_exist_is_refused_with_its_place(change: dict, says: str) -> None:
    sound = cluster_of({"d0": "a", "d1": "a"}, {}, [("d0", "d1", 1.0)])
    with pytest.raises(ClusterError, match=says) as caught:
        msgspec.structs.replace(sound, **change).validate(place="lab.yaml")
    assert caught.value.place.startswith("lab.yaml")
    assert caught.value.exit_code == 2


def test_devices_are_selected_by_position_range_and_name():
    cluster = preset("dgx-1v")
    assert cluster.select("0,1,4") == ("node0/gpu0", "node0/gpu1", "node0/gpu4")
    assert cluster.select("2-4, node0/gpu0") == ("node0/gpu2", "node0/gpu3", "node0/gpu4", "node0/gpu0")


@pytest.mark.parametrize("text", ["8", "0,0", "3-1", "gpu0", "", "0,,1", "-1", "node0/nvswitch"])
def test_devices_that_are_not_there_are_refused(text):
    with pytest.raises(ClusterError) as refused:
        preset("dgx-1v").select(text)
    assert refused.value.remedy
