"""Sums over layers against counting the parameters of each run of layers."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.predict.memory import Sizes
from headway.predict.operators import Shards
from headway.workload.graph import Graph, dtype_bytes
from headway.workload.transformer import TransformerShape, transformer


@cache
def graph_of(tied: bool, experts: int) -> Graph:
    return transformer(
        TransformerShape(
            layers=5, hidden=48, heads=6, vocabulary=97, sequence=32, tied=tied, experts=experts,
            experts_chosen=min(experts, 1),
        )
    )  # fmt: skip


@cache
def sizes_of(tied: bool, experts: int) -> Sizes:
    return Sizes(graph_of(tied, experts))


@given(st.booleans(), st.sampled_from([0, 4]), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]), st.data())
def test_any_run_of_layers_has_what_counting_its_parameters_once_gives(tied, experts, degree, expert, data):
    graph, sizes = graph_of(tied, experts), sizes_of(tied, experts)
    shards = Shards(degree, frozenset(range(len(graph.blocks)))) if degree > 1 else Shards()
    start, stop = sorted(
        data.draw(st.lists(st.integers(0, len(graph.layers)), min_size=2, max_size=2, unique=True), label="layers")
    )
    ranks = data.draw(st.sampled_from([1, 3, 8]), label="ranks")
    divided = {name for layer in graph.layers if layer.experts is not None for name in layer.experts.parameters}
    counted, rows = {}, {}
    for name, one in graph.layer_parameters(start, stop).items():
        shape = sizes.local_shape(one, shards)
        wide = 1
        for size in shape[1:]:
            wide *= size
        rows[name] = -(-shape[0] // ranks) * wide
        counted[name] = -(-shape[0] * wide // expert) if name in divided else shape[0] * wide
    found = sizes.parameters(start, stop, shards, expert)
    assert found.elements == found.trainable_elements == sum(counted.values())
    assert found.bytes == sum(size * dtype_bytes(graph.parameter_by_name[name].dtype) for name, size in counted.items())
    assert found.tensors == len(counted)
    assert found.largest_tensor_elements == max(counted.values())
    assert found.expert_elements == sum(size for name, size in counted.items() if name in divided)
    each = [sum(counted[name] for name in graph.layer_parameters(at, at + 1)) for at in range(start, stop)]
    assert found.largest_layer_elements == max(each)
    assert sizes.sharded(start, stop, shards, ranks)[0] == sum(rows.values())


def test_a_tied_parameter_counts_once_where_its_readers_are_together():
    graph, sizes = graph_of(True, 0), sizes_of(True, 0)
    last = len(graph.layers)
    table = graph.parameter_by_name["embedding.weight"].elements
    first, rest = sizes.parameters(0, 1, Shards()), sizes.parameters(1, last, Shards())
    assert sizes.parameters(0, last, Shards()).elements == first.elements + rest.elements - table
    assert sizes.parameters(0, last, Shards()).elements == pytest.approx(graph.parameter_count)
