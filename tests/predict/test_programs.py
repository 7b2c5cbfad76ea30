"""Collectives by named algorithms: predicted as their programs are, and the search takes the best."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from headway.collective.algorithms import generate
from headway.errors import PlanError
from headway.predict.collective import predict_program
from headway.predict.communication import Communication, all_gather_seconds, all_reduce_seconds
from headway.predict.programs import Programs, choices
from headway.predict.step import Predictor
from headway.search.find import find
from headway.search.ranking import Constraints
from headway.simulate.step import simulate_step


@pytest.mark.parametrize("algorithm", ["ring", "direct", "halving-doubling", "tree"])
@pytest.mark.parametrize("size", [10**4, 10**6, 10**8])
def test_a_group_alone_takes_what_its_program_takes(make, algorithm, size):
    cluster, graph = make.cluster(1, 4), make.graph()
    plan = make.plan(graph, cluster, 16, 2, data=4, exchange="headway", collectives={"data": algorithm})
    communication = Communication(cluster)
    channel = Programs(communication).channel(plan, "data", 0, communication.group(plan.devices))
    expected = predict_program(generate(algorithm, cluster, "all_reduce", plan.devices), cluster, size).seconds
    assert all_reduce_seconds(size, channel) == pytest.approx(expected, rel=1e-9)


def test_groups_that_share_links_take_longer_than_one_alone(make):
    cluster, graph = make.cluster(2, 4), make.graph()
    communication = Communication(cluster)
    fields = {"exchange": "headway", "collectives": {"data": "ring"}}
    four = make.plan(graph, cluster, 16, 2, data=2, tensor=4, **fields)
    channels = communication.channels(four.devices, 1, 2, 4, "data")
    crowded = Programs(communication).channel(four, "data", 0, channels[0])
    alone = Programs(communication).channel(four, "data", 0, communication.group((four.devices[0], four.devices[4])))
    assert all_reduce_seconds(1e8, crowded) == pytest.approx(4 * all_reduce_seconds(1e8, alone), rel=0.05)


def test_what_an_algorithm_does_not_do_keeps_the_formula_and_other_exchanges_know_of_none(make):
    cluster, graph = make.cluster(1, 4), make.graph()
    communication = Communication(cluster)
    plan = make.plan(graph, cluster, 16, 2, data=4, exchange="headway", collectives={"data": "tree"})
    plain = communication.group(plan.devices)
    channel = Programs(communication).channel(plan, "data", 0, plain)
    assert all_gather_seconds(1e7, channel) == all_gather_seconds(1e7, plain)
    predictor = Predictor(make.workload(graph), cluster)
    torch_own = msgspec.structs.replace(plan, exchange="torch")
    nothing_named = msgspec.structs.replace(torch_own, collectives={})
    assert predictor.predict(torch_own) == predictor.predict(nothing_named)
    with pytest.raises(PlanError, match="rign"):
        predictor.predict(msgspec.structs.replace(plan, collectives={"data": "rign"}))


@pytest.mark.parametrize("degrees", [{"data": 4}, {"data": 2, "tensor": 2}])
def test_the_search_names_the_fastest_of_all_algorithms_for_each_axis(make, degrees):
    graph, cluster = make.graph(layers=2), make.cluster(1, 4, latency=1e-4)
    workload = make.workload(graph, global_batch=16)
    constraints = Constraints(exchange="headway", zero_stage=0, pipeline=1, **degrees)
    best = find(workload, cluster, constraints=constraints, keep=1).best[0]
    predictor = Predictor(workload, cluster)
    axes = dict(choices(best.plan))
    assert set(axes) == set(degrees)
    everything = [
        predictor.step_time(
            msgspec.structs.replace(
                best.plan, collectives={axis: name for axis, name in zip(axes, names, strict=True) if name}
            )
        ).step_seconds
        for names in itertools.product(*axes.values())
    ]
    assert best.prediction.time.step_seconds == pytest.approx(min(everything), rel=1e-9)
    assert best.plan.collectives  # with 100 µs for each hop fewer steps are better than what the exchange does
    simulated = simulate_step(predictor, best.plan).step_seconds
    assert simulated == pytest.approx(best.prediction.time.step_seconds, rel=0.03)


def test_torchs_exchange_gets_no_algorithms(make):
    graph, cluster = make.graph(layers=2), make.cluster(1, 4, latency=1e-4)
    best = find(make.workload(graph), cluster, constraints=Constraints(data=4), keep=1).best[0]
    assert best.plan.collectives == {}


def test_what_an_algorithm_does_not_do_takes_what_was_measured(make):
    class Measured:
        def __init__(self, taken):
            self.taken = taken

        def seconds(self, kind, size_bytes):
            return self.taken if kind == "all_gather" else None

    cluster, graph = make.cluster(1, 4), make.graph()
    communication = Communication(cluster)
    plan = make.plan(graph, cluster, 16, 2, data=4, exchange="headway", collectives={"data": "tree"})
    plain = communication.group(plan.devices)
    programs = Programs(communication)
    alone = programs.channel(plan, "data", 0, plain)
    for taken in (7.0, 8.0):  # two places of one speed keep their own
        channel = programs.channel(plan, "data", 0, plain._replace(known=Measured(taken)))
        assert all_gather_seconds(1e7, channel) == taken
        assert all_reduce_seconds(1e7, channel) == all_reduce_seconds(1e7, alone)
