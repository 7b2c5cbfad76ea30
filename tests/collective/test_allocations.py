"""Allocations of a machine up to symmetry: counts of the Blink paper, and classes by brute force over renamings."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from headway.collective.allocations import allocation_classes
from headway.collective.topology import topology_of
from headway.errors import DisconnectedError
from headway.hardware.catalog import load_cluster
from headway.hardware.cluster import Cluster

NVLINK = frozenset({"nvlink"})


def matrix(cluster: Cluster, devices: tuple[str, ...]) -> list[list[float]]:
    """Bandwidth of the direct NVLinks between each two."""
    rates = {(link.source, link.target): link.bytes_per_second for link in cluster.links if link.kind == "nvlink"}
    return [[rates.get((one, other), 0.0) for other in devices] for one in devices]


def canonical(rates: list[list[float]]) -> tuple[float, ...]:
    """The largest matrix that a renaming can give: two allocations are alike where these are equal."""
    order = range(len(rates))
    return max(tuple(rates[i][j] for i in p for j in p) for p in itertools.permutations(order))


def is_joined(rates: list[list[float]]) -> bool:
    reached = {0}
    for _ in rates:
        reached |= {j for i in reached for j, rate in enumerate(rates[i]) if rate}
    return len(reached) == len(rates)


@pytest.mark.parametrize(("name", "classes"), [("dgx-1v", 46), ("dgx-1p", 14)])
def test_a_dgx_1_has_as_many_classes_of_connected_allocations_as_blink_counts(name, classes):
    # Blink (MLSys 2020): 46 kinds of 3 to 8 GPUs on a DGX-1V, 14 on a DGX-1P.
    assert len(allocation_classes(load_cluster(name))) == classes


@pytest.mark.parametrize("name", ["dgx-1v", "dgx-1p"])
def test_classes_are_those_that_renaming_devices_leaves(name):
    cluster = load_cluster(name)
    sizes = (2, 3, 4, 5)
    names = [device.name for device in cluster.devices]
    expected: dict[tuple[float, ...], tuple[str, ...]] = {}
    for size in sizes:
        for devices in itertools.combinations(names, size):
            rates = matrix(cluster, devices)
            if is_joined(rates):
                expected.setdefault(canonical(rates), devices)
    assert list(allocation_classes(cluster, sizes)) == list(expected.values())


def test_every_representative_is_connected_by_nvlink_alone():
    cluster = load_cluster("dgx-1v")
    for devices in allocation_classes(cluster):
        assert topology_of(cluster, devices, kinds=NVLINK).devices == devices


def test_over_pcie_too_every_set_is_connected():
    cluster = load_cluster("dgx-1v")
    apart = ("node0/gpu1", "node0/gpu4")
    with pytest.raises(DisconnectedError):
        topology_of(cluster, apart, kinds=NVLINK)
    assert len(allocation_classes(cluster, (2,))) == 2  # one NVLink or two
    wide = allocation_classes(cluster, (2,), kinds={link.kind for link in cluster.links})
    assert len(wide) == 3  # none, one or two, beside the path over PCIe that each pair has


def test_behind_one_switch_only_the_number_counts():
    found = allocation_classes(load_cluster("dgx-a100"))
    assert Counter(map(len, found)) == dict.fromkeys(range(3, 9), 1)


def test_more_devices_than_there_are_have_no_allocation():
    assert allocation_classes(load_cluster("dgx-1v"), (9,)) == ()
    assert len(allocation_classes(load_cluster("dgx-1v"), (1,))) == 1
