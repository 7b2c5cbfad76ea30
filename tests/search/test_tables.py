"""Tables of stages from a workload and a cluster, and plans from solutions."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headway.errors import PlanError
from headway.predict.step import Predictor
from headway.search.dynamic import solve
from headway.search.dynamic_plans import dynamic_search
from headway.search.exhaustive import exhaustive_search
from headway.search.problem import Assignment
from headway.search.ranking import Constraints
from headway.search.space import Space
from headway.search.tables import Pool, options_of, plan_of, pools_of, stage_problem
from headway.workload.graph import Workload


def names(*sizes):
    return tuple(tuple(f"n{node}d{at}" for at in range(size)) for node, size in enumerate(sizes))


def test_sub_meshes_are_parts_of_a_node_or_whole_nodes():
    assert Pool("a", names(8)).sizes == (1, 2, 4, 8)
    assert Pool("a", names(4, 4, 4)).sizes == (1, 2, 4, 8, 12)
    assert Pool("a", names(12)).sizes == (1, 3, 6, 12)


def test_pools_are_told_apart_by_device_and_by_links(toy):
    slow, fast = toy.accelerator("slow"), toy.accelerator("fast", rate=4e13)
    pools = pools_of(toy.cluster([[slow] * 2, [fast] * 2, [slow] * 2, [slow, fast]]))
    assert [(pool.accelerator, len(pool.nodes), len(pool.nodes[0])) for pool in pools] == [
        ("slow", 2, 2), ("fast", 1, 2), ("slow", 1, 1), ("fast", 1, 1)
    ]  # fmt: skip


def test_options_have_degrees_that_divide_the_sub_mesh_the_samples_and_the_heads(toy):
    options = options_of(toy.graph(4, heads=6), [Pool("a", names(4, 4))], 2, zero_stage=1)
    assert {(option.devices, option.data, option.tensor) for option in options} == {
        (1, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 2)
    }  # fmt: skip
    assert all(option.zero_stage == (option.data > 1) for option in options)


@given(
    layers=st.integers(2, 6), kinds=st.sampled_from([(4,), (2, 2), (4, 4)]), micro_batch=st.sampled_from([1, 2, 4]),
    zero=st.integers(0, 3), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_allowed_solution_becomes_a_valid_plan_with_its_stages(toy, layers, kinds, micro_batch, zero, seed):
    slow, fast = toy.accelerator("slow"), toy.accelerator("fast", rate=4e13)
    cluster = toy.cluster([[kind] * count for kind, count in zip((slow, fast), kinds)])
    workload = Workload(graph=toy.graph(layers), global_batch=16)
    problem = stage_problem(workload, cluster, Predictor(workload, cluster), micro_batch=micro_batch, zero_stage=zero)
    rng = np.random.default_rng(seed)
    # Costs drawn anew make the programme choose solutions of every shape.
    problem = replace(
        problem, seconds=np.where(np.isfinite(problem.seconds), rng.random(problem.seconds.shape), np.inf)
    )
    solution = solve(problem)
    if not solution.stages:
        return
    plan = plan_of(problem, solution.stages, workload, cluster)
    plan.validate(workload.graph, cluster)
    assert sorted(plan.devices) == sorted(device.name for device in cluster.devices)
    assert plan.micro_batches == problem.micro_batches
    kind_of = {device.name: device.accelerator for device in cluster.devices}
    pools = pools_of(cluster)
    for rank, stage in enumerate(solution.stages):
        option = problem.options[stage.option]
        assert (plan.stages[rank].start, plan.stages[rank].stop) == (stage.start, stage.stop)
        assert plan.degrees(rank) == (option.data, option.tensor)
        first = plan.first_rank(rank)
        mine = plan.devices[first : first + option.devices]
        assert {kind_of[name] for name in mine} == {pools[option.pool].accelerator}
        assert len({name.split("d")[0] for name in mine}) == 1  # parts of a node stay in it


def test_the_tables_say_what_the_predictor_says_of_uniform_plans(toy):
    cluster = toy.cluster([[toy.accelerator("gpu")] * 4] * 2)
    workload = Workload(graph=toy.graph(16), global_batch=32)
    predictor = Predictor(workload, cluster)
    problem = stage_problem(workload, cluster, predictor, micro_batch=2, zero_stage=1)
    for at, option in enumerate(problem.options):
        count = 8 // option.devices
        if 8 % option.devices or option.recompute:
            continue
        cuts = [16 * stage // count for stage in range(count + 1)]
        stages = [Assignment(start, stop, at) for start, stop in pairwise(cuts)]
        if not math.isfinite(seconds := problem.evaluate(stages)):
            continue
        predicted = predictor.predict(plan_of(problem, stages, workload, cluster)).time.step_seconds
        assert seconds == pytest.approx(predicted, rel=0.2)


def test_a_micro_batch_that_does_not_divide_the_batch_is_refused(toy, workload, node):
    with pytest.raises(PlanError, match="do not divide"):
        stage_problem(workload, node, Predictor(workload, node), micro_batch=3)


def test_what_is_no_solution_makes_no_plan(workload, node):
    problem = stage_problem(workload, node, Predictor(workload, node), micro_batch=2)
    with pytest.raises(PlanError, match="no solution"):
        plan_of(problem, [Assignment(0, 2, 0)], workload, node)


def test_the_search_fits_and_is_about_as_good_as_the_exhaustive_one(toy):
    cluster = toy.cluster([[toy.accelerator("gpu", memory=1.2e9)] * 4])
    workload = Workload(graph=toy.graph(8), global_batch=16)
    predictor = Predictor(workload, cluster)
    found = dynamic_search(workload, cluster, predictor)
    for candidate in found:
        candidate.plan.validate(workload.graph, cluster)
        assert candidate.prediction.peak_bytes <= 0.95 * 1.2e9
        assert candidate.prediction == predictor.predict(candidate.plan)
    seconds = [candidate.prediction.time.step_seconds for candidate in found]
    assert seconds == sorted(seconds)
    space = Space(workload, cluster, Constraints(), 4)
    best = exhaustive_search(space, predictor, goal="time", keep=1).best[0][1]
    assert seconds[0] <= 1.05 * best.prediction.time.step_seconds


def test_where_nothing_fits_the_search_finds_nothing(toy):
    cluster = toy.cluster([[toy.accelerator("gpu", memory=1e6)] * 2])
    workload = Workload(graph=toy.graph(4), global_batch=4)
    assert dynamic_search(workload, cluster, Predictor(workload, cluster)) == []
