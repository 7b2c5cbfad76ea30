"""Cuts of a pipeline, against trying all of them."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.search.stages import balanced_cuts, stage_costs

weights = st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 7.0]), min_size=1, max_size=8)


def all_cuts(layers: int, stages: int):
    for inner in combinations(range(1, layers), stages - 1):
        yield (0, *inner, layers)


@given(weights, st.data())
@settings(deadline=None)
def test_no_other_cut_has_a_faster_slowest_stage_nor_evener_others(layers, data):
    stages = data.draw(st.integers(1, len(layers)))

    def figures(cut):
        sums = [sum(layers[start:stop]) for start, stop in pairwise(cut)]
        return round(max(sums), 6), round(sum(value**2 for value in sums), 6)

    found = balanced_cuts([stage_costs(layers)] * stages)
    assert found is not None
    assert len(found) == stages + 1
    assert all(start < stop for start, stop in pairwise(found))
    assert figures(found) == min(figures(cut) for cut in all_cuts(len(layers), stages))


@given(weights, st.data())
@settings(deadline=None)
def test_stages_on_devices_of_different_speed_and_with_forbidden_ones(layers, data):
    stages = data.draw(st.integers(1, len(layers)))
    speeds = data.draw(st.lists(st.sampled_from([1.0, 3.0]), min_size=stages, max_size=stages))
    most = data.draw(st.lists(st.integers(1, len(layers)), min_size=stages, max_size=stages))
    lengths = stage_costs([1.0] * len(layers))
    costs = [
        np.where(lengths <= limit, stage_costs(layers) * speed, np.inf)
        for speed, limit in zip(speeds, most, strict=True)
    ]

    def slowest(cut):
        return max(costs[stage][start, stop] for stage, (start, stop) in enumerate(pairwise(cut)))

    best = min(slowest(cut) for cut in all_cuts(len(layers), stages))
    found = balanced_cuts(costs)
    if np.isinf(best):
        assert found is None
    else:
        assert found is not None
        assert slowest(found) <= best * (1 + 1e-6)


def test_of_equal_cuts_the_first_stages_are_the_lighter_ones():
    assert balanced_cuts([stage_costs([1.0] * 10)] * 4) == (0, 2, 4, 7, 10)
