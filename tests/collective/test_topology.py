"""What is left of a cluster for a collective among some of its devices."""

from __future__ import annotations

import pytest

from headway.collective.topology import Topology, fast_kinds, topology_of
from headway.errors import ClusterError, DisconnectedError
from headway.hardware.catalog import load_cluster
from headway.hardware.cluster import Accelerator, Cluster, Device, Link, Switch

KIND = Accelerator(name="any", flop_per_second={"float32": 1.0}, memory_bytes=1.0, memory_bytes_per_second=1.0)


def cluster(devices: int, switches: list[str], links: list[tuple[str, str, float]], kind: str = "nvlink") -> Cluster:
    """Devices are named d0, d1, …; links go one way."""
    return Cluster(
        name="drawn",
        accelerators={"any": KIND},
        devices=tuple(Device(name=f"d{number}", accelerator="any", node="node0") for number in range(devices)),
        switches=tuple(Switch(name=name) for name in switches),
        links=tuple(
            Link(source=source, target=target, bytes_per_second=rate, kind=kind) for source, target, rate in links
        ),
    ).validate()


def both(one: str, other: str, rate: float) -> list[tuple[str, str, float]]:
    return [(one, other, rate), (other, one, rate)]


def paths(topology: Topology) -> dict[tuple[str, ...], float]:
    found = {edge.path: edge.bytes_per_second for edge in topology.edges}
    assert len(found) == len(topology.edges)
    for edge in topology.edges:
        assert (edge.path[0], edge.path[-1]) == (topology.names[edge.source], topology.names[edge.target])
    return found


def test_a_dgx_1v_has_two_links_on_one_ring_and_one_on_the_other():
    topology = topology_of(load_cluster("dgx-1v"))
    assert not topology.is_switched
    assert sorted(set(topology.capacity.values())) == [25e9, 50e9]
    assert len(topology.capacity) == 32
    assert topology.capacity == {(v, u): rate for (u, v), rate in topology.capacity.items()}


def test_ranks_are_in_the_order_in_which_devices_are_chosen():
    chosen = ["node0/gpu3", "node0/gpu0"]
    topology = topology_of(load_cluster("dgx-1v"), chosen)
    assert list(topology.devices) == chosen
    assert topology.capacity == {(0, 1): 50e9, (1, 0): 50e9}


def test_pcie_is_used_only_where_nvlink_alone_does_not_join_the_devices():
    dgx = load_cluster("dgx-1v")
    assert fast_kinds(dgx, ["node0/gpu0", "node0/gpu1"]) == {"nvlink"}
    assert "pcie" in fast_kinds(dgx, ["node0/gpu0", "node0/gpu5"])
    topology = topology_of(dgx, ["node0/gpu0", "node0/gpu5"])
    assert set(paths(topology)) == {
        ("node0/gpu0", "node0/pcie0", "node0/root0", "node0/root1", "node0/pcie2", "node0/gpu5"),
        ("node0/gpu5", "node0/pcie2", "node0/root1", "node0/root0", "node0/pcie0", "node0/gpu0"),
    }


def test_a_switch_between_two_things_becomes_a_path_as_wide_as_its_narrow_side():
    drawn = cluster(2, ["s", "t"], [*both("d0", "s", 5.0), *both("s", "t", 3.0), *both("t", "d1", 4.0)])
    assert paths(topology_of(drawn)) == {("d0", "s", "t", "d1"): 3.0, ("d1", "t", "s", "d0"): 3.0}


def test_switches_that_lead_nowhere_are_gone():
    links = [*both("d0", "d1", 1.0), *both("d0", "s", 1.0), *both("s", "t", 1.0)]
    topology = topology_of(cluster(2, ["s", "t", "alone"], links))
    assert topology.names == ("d0", "d1")
    assert len(topology.edges) == 2


def test_two_ways_between_the_same_things_stay_two_edges():
    links = [*both("d0", "s", 2.0), *both("s", "d1", 2.0), *both("d0", "t", 3.0), *both("t", "d1", 3.0)]
    topology = topology_of(cluster(2, ["s", "t"], links))
    assert paths(topology)["d0", "s", "d1"] == 2.0
    assert topology.capacity == {(0, 1): 5.0, (1, 0): 5.0}


def test_a_switch_whose_edges_share_one_side_is_kept():
    # d0 reaches s by two ways, and both go on over the one link from s to d1.
    links = [*both("d0", "a", 2.0), *both("a", "s", 2.0), *both("d0", "b", 2.0), *both("b", "s", 2.0)]
    topology = topology_of(cluster(2, ["a", "b", "s"], [*links, *both("s", "d1", 3.0)]))
    assert topology.names == ("d0", "d1", "s")
    assert topology.capacity[0, 2] == 4.0
    assert topology.capacity[2, 1] == 3.0


def test_parallel_links_add_up():
    drawn = cluster(2, [], [*both("d0", "d1", 2.0), *both("d0", "d1", 3.0)])
    assert paths(topology_of(drawn)) == {("d0", "d1"): 5.0, ("d1", "d0"): 5.0}


def test_devices_of_others_pass_nothing_on():
    drawn = cluster(3, [], [*both("d0", "d1", 1.0), *both("d1", "d2", 1.0)])
    with pytest.raises(DisconnectedError, match="d0 cannot reach d2"):
        topology_of(drawn, ["d0", "d2"])


def test_a_way_there_without_a_way_back_is_not_joined():
    drawn = cluster(2, [], [("d0", "d1", 1.0)])
    with pytest.raises(DisconnectedError, match="d1 cannot reach d0"):
        topology_of(drawn)


@pytest.mark.parametrize(
    ("devices", "said"),
    [(["node0/gpu9"], "node0/gpu9"), (["node0/gpu0", "node0/gpu0"], "twice"), ([], "no devices")],
)
def test_devices_that_cannot_be_chosen_are_refused(devices, said):
    with pytest.raises(ClusterError, match=said):
        topology_of(load_cluster("dgx-1v"), devices)


def test_kinds_of_links_can_be_chosen():
    topology = topology_of(load_cluster("dgx-1v"), ["node0/gpu0", "node0/gpu1"], kinds={"pcie", "socket"})
    assert next(iter(paths(topology))) == ("node0/gpu0", "node0/pcie0", "node0/gpu1")
    with pytest.raises(DisconnectedError):
        topology_of(load_cluster("dgx-1v"), kinds={"no such kind"})


def test_nics_of_two_machines_are_paths_to_the_network():
    topology = topology_of(load_cluster("dgx-a100:2"))
    assert topology.ranks == 16
    assert not any("nic" in name for name in topology.names)
    assert ("node0/pcie0", "node0/nic0", "network") in paths(topology)


def test_a_single_device_has_a_topology_without_edges():
    topology = topology_of(load_cluster("dgx-1v"), ["node0/gpu4"])
    assert topology.names == ("node0/gpu4",)
    assert topology.edges == ()


def test_a_topology_survives_json():
    topology = topology_of(load_cluster("dgx-a100"))
    assert Topology.from_json(topology.to_json()) == topology
