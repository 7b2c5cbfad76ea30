"""Every algorithm, on whatever cluster and whatever part of it, is proven right and adds up like numpy."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.collective.algorithms import ALGORITHMS, generate, names
from headway.collective.program import Collective, Program
from headway.collective.reference import evaluate, expected
from headway.collective.topology import topology_of
from headway.collective.verify import verify
from headway.errors import ClusterError, DisconnectedError, ProgramError
from headway.hardware.catalog import load_cluster
from headway.hardware.cluster import Accelerator, Cluster, Device, Link, Switch

PRESETS = [
    load_cluster(spec)
    for spec in ("dgx-1v", "dgx-1p", "mi300x-8", "aws-g4dn.12xlarge:2", "dgx-a100:2", "dgx-a100:2+dgx-1v:1")
]
KIND = Accelerator(name="any", flop_per_second={"float32": 1e12}, memory_bytes=1e9, memory_bytes_per_second=1e11)


@st.composite
def handmade_clusters(draw) -> Cluster:
    """Nodes of different sizes; devices wired to each other, to switches, or both; links of different widths."""
    devices, switches = [], []
    for node in range(draw(st.integers(1, 3))):
        for number in range(draw(st.integers(1, 3))):
            devices.append(Device(name=f"n{node}/d{number}", accelerator="any", node=f"n{node}"))
    for number in range(draw(st.integers(0, 2))):
        switches.append(Switch(name=f"switch{number}"))
    things = [*devices, *switches]
    rates = st.sampled_from([1e9, 2e9, 3e9, 2.5e9])
    links = []
    # A random tree joins everything; further links go one way each.
    for position in range(1, len(things)):
        other = things[draw(st.integers(0, position - 1))].name
        for source, target in ((things[position].name, other), (other, things[position].name)):
            links.append(Link(source=source, target=target, bytes_per_second=draw(rates), kind="wire"))
    for _ in range(draw(st.integers(0, 8))):
        source, target = draw(st.tuples(*[st.integers(0, len(things) - 1)] * 2))
        if source != target:
            links.append(
                Link(
                    source=things[source].name,
                    target=things[target].name,
                    bytes_per_second=draw(rates),
                    kind=draw(st.sampled_from(["wire", "pcie"])),
                )
            )
    return Cluster(
        name="handmade",
        accelerators={"any": KIND},
        devices=tuple(devices),
        switches=tuple(switches),
        links=tuple(links),
    ).validate()


@st.composite
def allocations(draw) -> tuple[Cluster, list[str]]:
    cluster = draw(st.one_of(st.sampled_from(PRESETS), handmade_clusters()))
    known = [device.name for device in cluster.devices]
    size = draw(st.integers(1, min(7, len(known))))
    return cluster, draw(st.permutations(known))[:size]


def check_by_hand(program: Program, seed: int) -> None:
    rng = np.random.default_rng(seed)
    length = 2 * program.unit // (program.size if program.collective in ("all_gather", "gather") else 1)
    vectors = [rng.integers(-1000, 1000, length) for _ in range(program.size)]
    for found, right in zip(evaluate(program, vectors), expected(program, vectors), strict=True):
        assert (found is None) == (right is None)
        if found is not None and right is not None:
            np.testing.assert_array_equal(found, right)


def check_paths(program: Program, cluster: Cluster) -> None:
    """Each two neighbours on a path are joined by a link."""
    joined = {(link.source, link.target) for link in cluster.links}
    for path in program.paths:
        assert all(hop in joined for hop in pairwise(path))


@settings(deadline=None, max_examples=150)
@given(allocation=allocations(), data=st.data())
def test_every_program_is_proven_right_and_adds_up_like_numpy(allocation, data):
    cluster, devices = allocation
    name = data.draw(st.sampled_from(sorted(ALGORITHMS)))
    collective = data.draw(st.sampled_from(ALGORITHMS[name].collectives))
    root = data.draw(st.integers(0, len(devices) - 1))
    try:
        program = generate(name, cluster, collective, devices, root=root)
    except DisconnectedError:
        # Only for algorithms that use nobody else's devices, and only where that cannot be done.
        assert name not in ("direct", "ring", "tree", "binomial", "halving-doubling", "hierarchical", "torus")
        if name != "blink-three-phase":
            with pytest.raises(DisconnectedError):
                topology_of(cluster, devices)
        return
    assert program.devices == tuple(devices)
    assert program.collective == collective
    assert program.is_in_order
    assert not program.has_root or program.root == root
    verify(program, slots=1)
    check_paths(program, cluster)
    check_by_hand(program, seed=len(devices))
    if len(devices) == 1:
        assert program.transfers == ()


@settings(deadline=None, max_examples=60)
@given(allocation=allocations(), collective=st.sampled_from(get_args(Collective)))
def test_each_collective_is_done_by_some_algorithm_on_any_part_of_any_cluster(allocation, collective):
    cluster, devices = allocation
    assert "direct" in names(collective)
    verify(generate("direct", cluster, collective, devices))


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"blink", "blink-three-phase"}))
@pytest.mark.parametrize("cluster", PRESETS, ids=lambda cluster: cluster.name)
def test_whole_clusters(name, cluster):
    for collective in ALGORITHMS[name].collectives:
        program = generate(name, cluster, collective)
        verify(program)
        check_paths(program, cluster)


def test_the_same_call_gives_the_same_program():
    for name, algorithm in ALGORITHMS.items():
        devices = ["node0/gpu0", "node0/gpu1", "node0/gpu2", "node0/gpu3"]
        one, other = (generate(name, PRESETS[0], algorithm.collectives[-1], devices) for _ in range(2))
        assert one == other, name


def test_a_misspelt_name_gets_a_hint():
    with pytest.raises(ProgramError) as caught:
        generate("rign", PRESETS[0], "all_reduce")
    assert "'ring'" in caught.value.remedy
    with pytest.raises(ProgramError) as caught:
        generate("ring", PRESETS[0], "allreduce")  # type: ignore[arg-type]
    assert "'all_reduce'" in caught.value.remedy
    with pytest.raises(ProgramError):
        names("sum")


def test_a_pair_that_does_not_go_together_says_which_would():
    with pytest.raises(ProgramError) as caught:
        generate("ring", PRESETS[0], "all_to_all")
    assert "direct" in caught.value.remedy


def _cluster_of_two_islands() -> Cluster:
    return Cluster(
        name="islands",
        accelerators={"any": KIND},
        devices=tuple(Device(name=name, accelerator="any", node=name) for name in "ab"),
        links=(Link(source="a", target="b", bytes_per_second=1e9),),
    )


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_bad_devices_and_roots_are_refused(name):
    collective = ALGORITHMS[name].collectives[0]
    with pytest.raises(ClusterError, match="nowhere"):
        generate(name, PRESETS[0], collective, ["node0/gpu0", "nowhere"])
    with pytest.raises(ClusterError, match="twice"):
        generate(name, PRESETS[0], collective, ["node0/gpu0", "node0/gpu0"])
    with pytest.raises(ClusterError, match="no devices"):
        generate(name, PRESETS[0], collective, [])
    with pytest.raises(DisconnectedError):
        generate(name, _cluster_of_two_islands(), "all_reduce")
    if "server" not in name and name != "blink-three-phase":
        for root in (-1, 8):
            with pytest.raises(ProgramError, match="no rank"):
                generate(name, PRESETS[0], collective, root=root)
