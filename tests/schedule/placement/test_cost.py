"""What a placement costs, predicted for the nodes themselves: by hand, and against SpreadCost."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import InputError
from headway.hardware.catalog import Machine, Network, Part, assemble
from headway.schedule.fleet import fleet_of_cluster, uniform_fleet
from headway.schedule.job import Job
from headway.schedule.pace import Pace
from headway.schedule.placement.cost import ModelStep, PlacementCost
from headway.schedule.placement.prediction import predict_placement_cost, tiresias_testbed
from headway.schedule.placement.rules import Placement
from headway.schedule.placement.spread import SpreadCost
from headway.schedule.policies.fifo import Fifo
from headway.schedule.replay import play

# Of four servers the first has 48 bytes, the second 16, the others none.
STEPS = {"m": ModelStep((12, 4), {"": 2.0})}


class Apart(Placement):
    """So many devices on each of the first nodes."""

    def __init__(self, each: int) -> None:
        self.each = each

    def place(self, job, devices, free, fleet, turn):
        return tuple((node, self.each) for node in range(devices // self.each))


@pytest.mark.parametrize(
    ("each", "finish"),
    [
        # One node: 2 s of compute. Two: the first has all 64 bytes, and sends them to two workers elsewhere; push and
        # pull take 2 x 128 / 10 s. Four: 48 bytes to three workers, 2 x 144 / 10 s.
        (4, 100.0),
        (2, 100.0 * (2 + 25.6) / 2),
        (1, 100.0 * (2 + 28.8) / 2),
    ],
)
def test_the_same_job_on_one_two_and_four_nodes_ends_when_predicted(each, finish):
    fleet = uniform_fleet(4, 4)
    pace = Pace(fleet, costs=PlacementCost(fleet, STEPS, ports=[10.0] * 4))
    job = Job(name="a", submit_seconds=0.0, devices=4, duration_seconds=100.0, model="m")
    assert play([job], fleet, Fifo(), Apart(each), pace=pace).completions == [pytest.approx(finish)]
    unknown = Job(name="b", submit_seconds=0.0, devices=4, duration_seconds=100.0, model="other")
    assert play([unknown], fleet, Fifo(), Apart(each), pace=pace).completions == [100.0]


def test_an_uplink_that_binds_slows_what_crosses_it_and_nothing_else():
    fleet = uniform_fleet(4, 4, rack=2)
    cost = PlacementCost(fleet, STEPS, ports=[10.0] * 4, uplinks={"r0": 2.5, "r1": 2.5})
    assert cost.slowdown("m", [0, 1], [2, 2]) == pytest.approx((2 + 2 * 128 / 10) / 2)
    assert cost.slowdown("m", [1, 2], [2, 2]) == pytest.approx((2 + 2 * 128 / 2.5) / 2)
    # Both racks have two workers, however these are dealt out within them: the uplink carries 64 bytes to two workers.
    assert cost.slowdown("m", [0, 1, 2], [1, 1, 2]) == pytest.approx((2 + 2 * 128 / 2.5) / 2)


def p100(name: str, nodes: int, **network):
    machine = Machine(
        parts=(Part(accelerator="P100-SXM2-16GB", count=4),), wiring="none", pcie_bytes_per_second=15.75e9,
        nics=1, nic_bytes_per_second=12.5e9, nic_latency_seconds=2e-6,
    )  # fmt: skip
    joined = Network(**network) if network else None
    return assemble(name, [(f"n{node}", machine) for node in range(nodes)], network=joined)


def test_rates_and_racks_are_those_of_the_clusters_links():
    open_cluster = p100("open", 6)
    predicted = predict_placement_cost(fleet_of_cluster(open_cluster), ["alexnet"], open_cluster)
    assert predicted is not None
    assert predicted.by_traffic
    assert (predicted.ports, predicted.uplinks) == ((10e9,) * 6, {})  # 12.5 GB/s, of which 80 % are reached
    narrow = p100("narrow", 6, oversubscription=4.0, nodes_per_switch=2)
    fleet = fleet_of_cluster(narrow)
    assert [node.rack for node in fleet.nodes] == ["r0", "r0", "r1", "r1", "r2", "r2"]
    found = predict_placement_cost(fleet, ["alexnet"], narrow)
    assert found is not None
    # Each leaf's link to the spine is a quarter of its two nodes' 20 GB/s.
    assert (found.ports, found.uplinks) == ((10e9,) * 6, pytest.approx(dict.fromkeys(("r0", "r1", "r2"), 5e9)))
    assert found.slowdown("alexnet", [0, 1], [2, 2]) == predicted.slowdown("alexnet", [0, 1], [2, 2])
    assert found.slowdown("alexnet", [1, 2], [2, 2]) > predicted.slowdown("alexnet", [1, 2], [2, 2])


@pytest.fixture(scope="module")
def both():
    fleet = uniform_fleet(5, 4)
    made = {}
    for architecture in ("parameter-server", "all-reduce"):
        cost = predict_placement_cost(fleet, ["alexnet", "nobody-knows"], architecture=architecture)
        assert cost is not None
        assert set(cost.models) == {"alexnet"}
        spread = SpreadCost("alexnet", tiresias_testbed(fleet), samples=32, architecture=architecture)
        made[architecture] = pickle.loads(pickle.dumps(cost)), spread  # other processes are handed it
    return made


@pytest.mark.parametrize("architecture", ["parameter-server", "all-reduce"])
@given(counts=st.lists(st.integers(1, 4), min_size=2, max_size=5))
@settings(max_examples=25, deadline=None)
def test_a_placement_costs_what_spread_cost_says_of_it(both, architecture, counts):
    cost, spread = both[architecture]
    full, rest = divmod(sum(counts), 4)
    together = spread.step_seconds([4] * full + [rest] * (rest > 0))
    ordered = sorted(counts, reverse=True)
    expected = max(1.0, spread.step_seconds(ordered) / together)
    assert cost.slowdown("alexnet", range(len(counts)), counts) == pytest.approx(expected)


@pytest.mark.parametrize("asked_first", [(0, 1), (1, 2)])
def test_an_all_reduce_costs_more_across_a_narrow_spine_whichever_was_asked_first(asked_first):
    narrow = p100("narrow", 6, oversubscription=16.0, nodes_per_switch=2)
    cost = predict_placement_cost(fleet_of_cluster(narrow), ["alexnet"], narrow, architecture="all-reduce")
    assert cost is not None
    cost.slowdown("alexnet", asked_first, [2, 2])
    assert cost.slowdown("alexnet", [0, 1], [2, 2]) < 0.5 * cost.slowdown("alexnet", [1, 2], [2, 2])


def test_there_is_nothing_to_say_of_one_node_or_of_unknown_models():
    assert predict_placement_cost(uniform_fleet(1, 8), ["vgg16"]) is None
    assert predict_placement_cost(uniform_fleet(2, 8), ["", "mine"]) is None
    with pytest.raises(InputError, match="one rate above 0 for each node"):
        PlacementCost(uniform_fleet(2, 8), STEPS, ports=[1.0])
