"""The inter-operator dynamic programme, against trying everything."""

from __future__ import annotations

import math
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import InputError
from headway.search.dynamic import dapple, minimise_slowest, pipedream, solve
from headway.search.problem import Assignment, Option, StageProblem, brute_force


@st.composite
def problems(draw, most_layers: int = 4, most_options: int = 4):
    """Tables without any structure: no monotony, holes, memory that binds, several pools, few or many micro-batches."""
    layers = draw(st.integers(1, most_layers))
    pools = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    options = draw(
        st.lists(
            st.builds(Option, pool=st.integers(0, len(pools) - 1), devices=st.integers(1, 3)),
            min_size=1,
            max_size=most_options,
        )
    )
    shape = (len(options), layers + 1, layers + 1)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    uneven = draw(st.booleans())
    seconds = rng.choice([0.1, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.1, np.inf], shape) if uneven else rng.random(shape)
    seconds[:, *np.tril_indices(layers + 1)] = np.inf
    roomy = draw(st.booleans())
    return StageProblem(
        layers=layers,
        options=tuple(options),
        pools=pools,
        micro_batches=draw(st.sampled_from([1, 2, 3, 8, 100])),
        seconds=seconds,
        fixed_bytes=rng.integers(0, 5, shape).astype(float),
        kept_bytes=rng.integers(0, 3, shape).astype(float),
        capacity_bytes=np.full(len(options), math.inf) if roomy else rng.integers(2, 9, len(options)).astype(float),
        send_seconds=rng.choice([0.0, 0.2, 1.0], layers + 1),
        exactly=draw(st.booleans()),
        most_stages=draw(st.integers(0, 4)),
    )


@given(problems())
@settings(deadline=None, max_examples=150)
def test_it_finds_what_trying_everything_finds(problem):
    found, wanted = solve(problem), brute_force(problem)
    assert found.seconds == pytest.approx(wanted.seconds, rel=1e-9)
    assert found.proven
    assert bool(found.stages) == math.isfinite(wanted.seconds)
    assert found.seconds == problem.evaluate(found.stages)


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


def all_stages(problem: StageProblem):
    for count in range(1, problem.layers + 1):
        for inner in combinations(range(1, problem.layers), count - 1):
            spans = tuple(pairwise((0, *inner, problem.layers)))
            for picks in product(range(len(problem.options)), repeat=count):
                yield tuple(Assignment(*span, option) for span, option in zip(spans, picks, strict=True))


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
