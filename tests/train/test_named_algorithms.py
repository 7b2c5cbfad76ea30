"""The algorithm that a plan names for an axis is the one that carries its collectives out, and changes no number."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from ranks import Case
from test_parallel import Pools, assert_learns_the_same, graph_of, make_plan

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    pools = Pools()
    yield pools
    pools.close()


@pytest.mark.parametrize(
    ("fields", "collectives"),
    [
        ({"data": 2}, {"data": "ring"}),
        ({"data": 2, "tensor": 2}, {"data": "binomial", "tensor": "halving-doubling"}),
        ({"data": 2, "zero_stage": 3}, {"data": "direct"}),
    ],
    ids=["data", "data and tensor", "ZeRO-3"],
)
def test_training_under_named_algorithms_learns_the_same(pools, fields, collectives):
    plan = make_plan("gpt", exchange="headway", collectives=collectives, **fields)
    assert_learns_the_same(Case("gpt", plan, graph_of("gpt"), steps=2), pools)


def test_an_algorithm_that_nobody_knows_is_named(pools):
    plan = make_plan("gpt", exchange="headway", collectives={"data": "rign"}, data=2)
    with pytest.raises(Exception, match="rign"):
        pools.run(Case("gpt", plan, graph_of("gpt"), steps=1))
