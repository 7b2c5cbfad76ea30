"""The inter-operator dynamic programme, against trying everything."""

from __future__ import annotations

import dataclasses
import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_problems import all_stages, problems

from headway.errors import InputError
from headway.search.dynamic import dapple, minimise_slowest, pipedream, solve
from headway.search.problem import Assignment, Option, StageProblem, brute_force
from headway.search.synthetic import synthetic_problem


@given(problems())
@settings(deadline=None, max_examples=150)
def test_it_finds_what_trying_everything_finds(problem):
    found, wanted = solve(problem), brute_force(problem)
    assert found.seconds == pytest.approx(wanted.seconds, rel=1e-9)
    assert found.proven
    assert bool(found.stages) == math.isfinite(wanted.seconds)
    assert found.seconds == problem.evaluate(found.stages)


def better(problem: StageProblem, bar: float) -> list[tuple[float, float]]:
    """(sum, slowest) of all solutions below a bar that no other beats in both: without limits, bounds or prices.

    From the last layer on, what can be left for it of each (stages so far, devices taken), as long as the fastest that
    the layers before could be leaves it below the bar.
    """
    behind, layers = problem.micro_batches - 1, problem.layers
    fastest = [0.0] + [math.inf] * layers  # of the layers before each, whatever is in flight
    for stop in range(1, layers + 1):
        fastest[stop] = min(
            fastest[start]
            + float(problem.seconds[:, start, stop].min())
            + float(problem.send_seconds[start] * (start > 0))
            for start in range(stop)
        )
    known: list[dict[tuple[int, ...], list[tuple[float, float]]]] = [{} for _ in range(layers + 1)]
    known[layers] = {(0, *(0 for _ in problem.pools)): [(0.0, 0.0)]}
    for start in reversed(range(layers)):
        send = float(problem.send_seconds[start]) if start else 0.0
        for stop, (at, option) in product(range(start + 1, layers + 1), enumerate(problem.options)):
            seconds = float(problem.seconds[at, start, stop])
            for (count, *taken), values in known[stop].items():
                taken[option.pool] += option.devices
                if taken[option.pool] > problem.pools[option.pool]:
                    continue
                if count == (problem.most_stages or layers) or not problem.stage_fits(
                    Assignment(start, stop, at), count
                ):
                    continue
                front = known[start].setdefault((count + 1, *taken), [])
                for total, slowest in values:
                    new = total + seconds + send, max(slowest, seconds)
                    if fastest[start] + new[0] + behind * new[1] >= bar or any(
                        one[0] <= new[0] and one[1] <= new[1] for one in front
                    ):
                        continue
                    front[:] = [one for one in front if one[0] < new[0] or one[1] < new[1]] + [new]
    return [
        value
        for (_, *taken), values in known[0].items()
        if not problem.exactly or tuple(taken) == problem.pools
        for value in values
    ]


larger = st.builds(
    synthetic_problem,
    st.integers(0, 10**6),
    layers=st.integers(8, 14),
    pools=st.sampled_from([(12,), (6, 3), (5, 4), (3, 2, 2)]),
    micro_batches=st.sampled_from([2, 8, 16, 200]),
    memory=st.floats(0.75, 1.4),
    rugged=st.sampled_from([0.05, 0.3, 0.8]),
    exactly=st.booleans(),
)


@given(larger, st.sampled_from([0, 0, 4, 7]))
@settings(deadline=None, max_examples=60)
def test_nothing_beats_it_where_trying_everything_takes_too_long(problem, most_stages):
    problem = dataclasses.replace(problem, most_stages=most_stages)
    found = solve(problem)
    assert found.proven
    assert found.seconds == problem.evaluate(found.stages)
    # Without a solution a bar is needed that any would be below: all layers on the slowest options, one after another.
    bar = found.seconds * (1 - 1e-9) if found.stages else problem.seconds[np.isfinite(problem.seconds)].sum()
    assert better(problem, bar) == []
    if found.stages:
        assert better(problem, found.seconds * (1 + 1e-9))


@pytest.mark.parametrize(
    ("seed", "size", "seconds"),
    [
        (
            755585,
            {"layers": 13, "pools": (16, 4), "micro_batches": 16, "memory": 0.7451812497021457},
            21.604480205685327,
        ),
        (182191, {"layers": 30, "pools": (16, 4), "micro_batches": 8, "memory": 1.118223129533955}, 24.147277249127004),
        (1, {"layers": 128, "pools": (25, 25), "micro_batches": 64, "memory": 1.5}, 343.42309049792175),
    ],
)
def test_it_finds_what_tables_of_all_devices_found_for_every_limit(seed, size, seconds):
    # By a programme that fills the tables of all runs for each limit, where an earlier bound was wrong by a little.
    problem = synthetic_problem(seed, **size)
    problem = dataclasses.replace(problem, most_stages=7 if seed == 755585 else 0)
    assert solve(problem).seconds == pytest.approx(seconds, rel=1e-9)


@given(problems(), st.sampled_from([0.05, 0.5]))
@settings(deadline=None, max_examples=60)
def test_with_an_epsilon_it_is_no_farther_away_than_that(problem, epsilon):
    found, wanted = solve(problem, epsilon=epsilon), brute_force(problem)
    if math.isfinite(wanted.seconds):
        assert wanted.seconds * (1 - 1e-9) <= found.seconds <= wanted.seconds * (1 + epsilon) * (1 + 1e-9)
        assert found.bound_seconds <= wanted.seconds * (1 + 1e-9)
    else:
        assert not found.stages


@given(problems(), st.sampled_from([0.5, 1.0, 1.5]))
@settings(deadline=None, max_examples=60)
def test_a_known_solution_is_only_beaten_or_left(problem, factor):
    wanted = brute_force(problem)
    bar = wanted.seconds * factor if math.isfinite(wanted.seconds) else 10.0
    found = solve(problem, better_than=bar)
    assert found.seconds == (pytest.approx(wanted.seconds) if wanted.seconds < bar else math.inf)


@given(problems())
@settings(deadline=None, max_examples=80)
def test_the_slowest_stage_or_send_is_as_fast_as_can_be(problem):
    def slowest(stages):
        return max(
            *(problem.seconds[one.option, one.start, one.stop] for one in stages),
            *(problem.send_seconds[one.start] for one in stages[1:]),
            0.0,
        )

    wanted = min((slowest(one) for one in all_stages(problem) if math.isfinite(problem.evaluate(one))), default=None)
    found = minimise_slowest(problem)
    if wanted is None:
        assert not found.stages
    else:
        assert found.seconds == pytest.approx(wanted) == slowest(found.stages)
        assert math.isfinite(problem.evaluate(found.stages))


layer = st.tuples(*[st.floats(0.1, 5.0)] * 3)


@given(st.lists(layer, min_size=1, max_size=4), st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_pipedream_by_its_own_recursion(each, devices):
    compute, weights, outputs = (tuple(column) for column in zip(*each, strict=True))
    bandwidth = 3.0

    def stage(j, i, m):  # T of the paper
        return max(sum(compute[j:i]), 2 * (m - 1) * sum(weights[j:i]) / bandwidth) / m

    def best(i, m):  # A of the paper: layers before i on m devices
        found = stage(0, i, m)
        for s in range(1, i):
            for last in range(1, m):
                found = min(found, max(best(s, m - last), 2 * outputs[s - 1] / bandwidth, stage(s, i, last)))
        return found

    assert pipedream(compute, weights, outputs, devices, bandwidth).seconds == pytest.approx(best(len(each), devices))


def test_a_light_and_heavy_model_is_cut_as_pipedream_cuts_vgg():
    # Convolutions compute and weigh little, the dense layers the other way round: replicate the former.
    compute, weights, outputs = [4.0, 4.0, 4.0, 1.0], [0.1, 0.1, 0.1, 50.0], [1.0, 1.0, 0.5, 0.0]
    found = pipedream(compute, weights, outputs, 4, 10.0)
    assert found.stages == (Assignment(0, 3, 2), Assignment(3, 4, 0))  # 3 replicas, then 1
    assert found.seconds == pytest.approx(4.0)


def test_dapple_replicates_rather_than_pipelines_where_gradients_are_cheap():
    compute, outputs = [1.0] * 4, [1.0] * 4
    cheap = dapple(compute, [0.01] * 4, outputs, 4, 10.0, micro_batches=4)
    dear = dapple(compute, [1000.0] * 4, outputs, 4, 10.0, micro_batches=4)
    assert cheap.stages == (Assignment(0, 4, 3),)
    assert len(dear.stages) == 4


def chain(layers: int, devices: int, options: int = 1, sizes: tuple[int, ...] = (), **fields) -> StageProblem:
    rng = np.random.default_rng(3)
    before = np.concatenate(([0.0], np.cumsum(rng.uniform(0.5, 1.5, layers))))
    seconds = before[None, :] - before[:, None]
    seconds[np.tril_indices(layers + 1)] = np.inf
    tables = np.stack([seconds / (2**at) ** 0.9 for at in range(options)])
    none = np.zeros_like(tables)
    values = {
        "options": tuple(Option(0, size) for size in sizes or (2**at for at in range(options))),
        "pools": (devices,),
        "micro_batches": 32,
        "fixed_bytes": none,
        "kept_bytes": none,
        "capacity_bytes": np.ones(options),
        "send_seconds": np.full(layers + 1, 0.01),
    }
    return StageProblem(layers=layers, seconds=tables, **{**values, **fields})


def test_out_of_time_it_returns_the_best_so_far_and_says_that_nothing_is_proven():
    problem = chain(40, 16, 3)
    hurried = solve(problem, budget_seconds=0.0)
    patient = solve(problem)
    assert not hurried.proven
    assert hurried.evaluated == 1
    assert math.isfinite(hurried.seconds)
    assert hurried.bound_seconds <= patient.seconds <= hurried.seconds


def test_few_limits_are_tried():
    problem = chain(60, 32, 4)
    assert solve(problem).evaluated < 100 < len(np.unique(problem.seconds))


def test_a_pool_that_no_sub_meshes_fill_has_no_solution():
    assert not solve(chain(4, 3, 2, sizes=(2, 4))).stages
    assert solve(chain(4, 3, 2, sizes=(2, 4), exactly=False)).stages


def test_more_states_of_the_devices_than_memory_holds_are_refused():
    with pytest.raises(InputError, match="too much"):
        solve(chain(120, 10**7))


def test_a_negative_epsilon_is_refused():
    with pytest.raises(InputError, match="epsilon"):
        solve(chain(2, 1), epsilon=-0.1)
