"""The choice of sharding specs, against trying everything, and against Megatron's rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import DoesNotFitError
from headway.hardware.cluster import Accelerator
from headway.predict.communication import Channel
from headway.search.sharding import (
    Edge,
    Node,
    ShardingProblem,
    brute_force_sharding,
    layer_problem,
    sharded_blocks,
    solve_sharding,
)
from headway.workload.graph import Workload

pytest.importorskip("highspy", reason="the extra `solve` is not installed")

GPU = Accelerator(
    name="gpu", flop_per_second={"float32": 1e14}, memory_bytes=8e10, memory_bytes_per_second=2e12, efficiency=0.8
)
NVLINK = Channel(size=4, latency_seconds=1e-6, bytes_per_second=2e11)


@st.composite
def problems(draw):
    """Directed acyclic graphs of operators with any costs, forbidden pairs and, often, too little memory."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.integers(1, 5))
    nodes = []
    for at in range(count):
        specs = draw(st.integers(1, 3))
        scale = 10.0 ** -draw(st.integers(0, 6))
        nodes.append(
            Node(
                f"n{at}",
                tuple(f"s{one}" for one in range(specs)),
                tuple(rng.random(specs) * scale),
                tuple(rng.random(specs) * 1e9),
            )
        )
    edges = []
    for source in range(count):
        for target in range(source + 1, count):
            if draw(st.booleans()):
                cost = rng.random((len(nodes[source].specs), len(nodes[target].specs)))
                cost[rng.random(cost.shape) < 0.15] = np.inf
                edges.append(Edge(source, target, cost * 1e-3))
    capacity = math.inf if draw(st.booleans()) else count * draw(st.floats(0.1, 0.9)) * 1e9
    return ShardingProblem(tuple(nodes), tuple(edges), capacity)


@given(problems())
@settings(deadline=None, max_examples=80)
def test_the_integer_program_finds_what_trying_everything_finds(problem):
    wanted = brute_force_sharding(problem)
    if not math.isfinite(wanted.seconds):
        with pytest.raises(DoesNotFitError, match="no choice of specs"):
            solve_sharding(problem)
        return
    found = solve_sharding(problem)
    assert found.seconds == pytest.approx(wanted.seconds, rel=1e-5)
    assert found.seconds == problem.evaluate(found.choice)


WIDTH, TOKENS = 768, 128


@pytest.fixture(scope="module")
def graph():
    """Embedding, two blocks and head of GPT-2: attention of 12 heads and a feed-forward network each."""
    from headway.workload import zoo

    return zoo.trace("gpt2", sequence=TOKENS, layers=2)


QUERY = "blocks.0.attention.query + blocks.0.attention.key + blocks.0.attention.value"
OUTPUT, UP, DOWN = "blocks.0.attention.output", "blocks.0.feed_forward.expand", "blocks.0.feed_forward.contract"


def chosen(graph, samples, channel=NVLINK, **more):
    layer = graph.blocks[0].layer
    problem = layer_problem(Workload(graph=graph, global_batch=64), GPU, layer, samples=samples, tensor=channel, **more)
    found = solve_sharding(problem)
    assert found.seconds == pytest.approx(brute_force_sharding(problem).seconds)
    return found.named(problem)


def test_a_transformer_block_is_cut_by_columns_and_then_by_rows_as_megatron_cuts_it(graph):
    # Heavy weights and few samples: the weights' gradients would be dearer to reduce than activations are.
    specs = chosen(graph, samples=8)
    assert (specs[UP], specs[DOWN]) == ("column", "row")
    assert (specs[QUERY], specs[OUTPUT]) == ("column", "row")


def test_many_samples_and_light_weights_are_cut_by_samples(graph):
    assert set(chosen(graph, samples=256).values()) == {"batch"}


def test_gradients_that_are_reduced_once_for_many_micro_batches_make_samples_the_better_cut(graph):
    assert set(chosen(graph, samples=8, micro_batches=64).values()) == {"batch"}


def test_nothing_is_cut_where_talking_is_dearer_than_computing(graph):
    slow = Channel(size=4, latency_seconds=1e-2, bytes_per_second=1e6)
    assert set(chosen(graph, samples=1, channel=slow).values()) == {"replicated"}


def test_too_little_memory_for_whole_weights_divides_them(graph):
    def problem(capacity=math.inf):
        workload, layer = Workload(graph=graph, global_batch=64), graph.blocks[0].layer
        return layer_problem(workload, GPU, layer, samples=64, tensor=NVLINK, micro_batches=64, capacity_bytes=capacity)

    def size(choice):
        return sum(node.bytes[spec] for node, spec in zip(problem().nodes, choice, strict=True))

    free = solve_sharding(problem())
    assert {"column", "row"}.isdisjoint(free.named(problem()).values())
    tight = solve_sharding(problem(0.8 * size(free.choice)))
    assert {"column", "row"} & set(tight.named(problem()).values())
    assert size(tight.choice) <= 0.8 * size(free.choice)
    assert tight.seconds > free.seconds


def test_a_degree_that_does_not_divide_the_heads_leaves_attention_whole(graph):
    specs = chosen(graph, samples=5, channel=NVLINK._replace(size=8))  # nor do 8 ranks divide 5 samples
    assert (specs[QUERY], specs[OUTPUT]) == ("replicated", "replicated")
    assert (specs[UP], specs[DOWN]) == ("column", "row")


def test_blocks_are_chosen_by_what_they_cost(graph):
    workload = Workload(graph=graph, global_batch=64)
    assert sharded_blocks(workload, GPU, samples=8, tensor=NVLINK) == {0, 1, 2, 3}
    assert sharded_blocks(workload, GPU, samples=256, tensor=NVLINK) == frozenset()
