"""The index against its definition, worked out the long way, and against distributions whose index is known."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.errors import FileError, InputError
from headway.schedule.policies.gittins import GittinsIndex, read_history
from headway.schedule.policies.tiresias import DiscretisedGittins

DATA = Path(__file__).parents[4] / "shared" / "data" / "scheduling" / "tiresias"

histories = st.lists(st.integers(1, 60), min_size=1, max_size=12)


def by_definition(history: list[float], attained: float, quantum: float) -> float:
    """P(S - a <= D | S > a) / E[min(S - a, D) | S > a], job by job."""
    left = [service - attained for service in history if service > attained]
    if not left:
        return 0.0
    return sum(rest <= quantum for rest in left) / sum(min(rest, quantum) for rest in left)


@given(histories, st.floats(0, 70), st.floats(0.5, 80))
def test_with_a_fixed_quantum_it_is_the_definition(history, attained, quantum):
    found = GittinsIndex(history).index(attained, quantum)
    # The end of the quantum may fall on a service to the last bit, on either side of it.
    near = [by_definition(history, attained, quantum * scale) for scale in (1 - 1e-12, 1, 1 + 1e-12)]
    assert any(found == pytest.approx(value, rel=1e-9, abs=1e-15) for value in near)


@given(histories, st.floats(0, 70))
def test_the_best_quantum_is_the_best_of_all_that_end_at_a_service(history, attained):
    best = max((by_definition(history, attained, s - attained) for s in history if s > attained), default=0.0)
    assert GittinsIndex(history).index(attained) == pytest.approx(best, rel=1e-9, abs=1e-15)


@given(histories, st.floats(0, 70), st.floats(0.5, 80))
def test_no_quantum_does_better_than_the_best(history, attained, quantum):
    index = GittinsIndex(history)
    assert by_definition(history, attained, quantum) <= index.index(attained) * (1 + 1e-9)


@given(histories, st.floats(0, 70), st.integers(2, 50))
def test_in_other_units_of_service_it_is_scaled(history, attained, factor):
    scaled = GittinsIndex([service * factor for service in history]).index(attained * factor)
    assert scaled * factor == pytest.approx(GittinsIndex(history).index(attained), rel=1e-9)


@given(histories)
def test_weights_say_the_same_as_repetition(history):
    distinct = sorted(set(history))
    weighted = GittinsIndex(distinct, [float(history.count(service)) for service in distinct])
    for attained in (0.0, 3.5, 20.0):
        assert weighted.index(attained) == pytest.approx(GittinsIndex(history).index(attained), rel=1e-9)


def test_where_all_jobs_are_alike_the_index_is_one_over_what_is_left():
    index = GittinsIndex([10.0] * 5)
    assert index.table([0.0, 5.0, 9.0]) == pytest.approx([1 / 10, 1 / 5, 1.0])
    assert index.index(10.0) == 0.0  # the history knows of none that needed more
    assert index.mean == 10


def test_of_a_heavy_tailed_history_the_index_falls_with_attained_service():
    """The hazard rate of a Pareto distribution falls, so Gittins is LAS (Aalto et al. 2009, section 3)."""
    services = [100 / (1 - (k + 0.5) / 4000) ** (1 / 1.5) for k in range(4000)]
    table = GittinsIndex(services).table([100, 200, 400, 800, 1600])
    assert all(later < earlier for earlier, later in pairwise(table))


def test_the_history_of_tiresias_can_be_read_and_tabulated():
    if not DATA.exists():
        pytest.skip("Tiresias's histories are not at hand")
    for name, rows in (("yarn-gput1000", 1001), ("yarn-gput5000", 5000), ("yarn-gput10000", 9999)):
        history = read_history(DATA / f"{name}.csv")
        assert len(history) == rows
        index = GittinsIndex(history)
        for attained in (0.0, 3250.0, 1e5):
            best = max(
                by_definition(history, attained, quantum - attained)
                for quantum in sorted(set(history))[:: max(1, rows // 60)]
                if quantum > attained
            )
            assert index.index(attained) >= best * (1 - 1e-9)
        assert DiscretisedGittins(history, (3250.0, 7200.0)).ranks[0] == pytest.approx(
            by_definition(history, 0.0, 3250.0)
        )


def test_a_history_with_wrong_lines_is_refused_with_all_of_them(tmp_path):
    path = tmp_path / "history.csv"
    path.write_text("duration\n10\nabc\n-3\n5\ninf\n")
    with pytest.raises(FileError, match="line 3, 4, 6"):
        read_history(path)
    path.write_text("seconds\n10\n")
    with pytest.raises(FileError, match="is no history"):
        read_history(path)
    path.write_text("duration\n")
    with pytest.raises(FileError, match="no jobs"):
        read_history(path)


@pytest.mark.parametrize(
    ("services", "weights"), [([], None), ([1.0], [1.0, 2.0]), ([1.0], [0.0]), ([0.0], None), ([math.inf], None)]
)
def test_impossible_histories_are_refused(services, weights):
    with pytest.raises(InputError):
        GittinsIndex(services, weights)
