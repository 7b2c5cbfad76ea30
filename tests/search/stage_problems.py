"""Drawn stage problems that are small enough to try everything, and everything."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, pairwise, product

import numpy as np
from hypothesis import strategies as st

from headway.search.problem import Assignment, Option, StageProblem


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
        send_seconds=rng.choice([0.0, 0.2, 1.0, *([math.inf] if draw(st.booleans()) else [])], layers + 1),
        exactly=draw(st.booleans()),
        most_stages=draw(st.integers(0, 4)),
    )


def all_stages(problem: StageProblem) -> Iterator[tuple[Assignment, ...]]:
    """Every way to cut the layers, with every option for each stage, allowed or not."""
    for count in range(1, problem.layers + 1):
        for inner in combinations(range(1, problem.layers), count - 1):
            spans = tuple(pairwise((0, *inner, problem.layers)))
            for picks in product(range(len(problem.options)), repeat=count):
                yield tuple(Assignment(*span, option) for span, option in zip(spans, picks, strict=True))
