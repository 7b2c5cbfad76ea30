"""Errors, rank correlation and regret against what can be worked out by hand or by another formula."""

from __future__ import annotations

import math
from pathlib import Path

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import PlanError
from headway.predict.published import PublishedRow, SkippedRow, is_fitted, read_rows
from headway.predict.validation import Predicted, Prophet, Validation, rank_correlation, validate

DATA = Path(__file__).parents[3] / "shared" / "data" / "planning"

GPT = {
    "source": "somebody Megatron-LM fork", "model": "GPT-8B", "layers": "32", "hidden": "4096", "heads": "32",
    "ffn": "16384", "vocab": "50257", "seq": "2048", "global_batch": "64", "micro_batch": "2", "gpu": "A100-SXM-80GB",
    "n_gpus": "16", "gpus_per_node": "8", "interconnect": "8x HDR IB 200Gbps/node", "tp": "4", "pp": "2", "dp": "2",
    "zero_stage": "1", "recompute": "full", "precision": "bf16", "iter_time_s": "10", "status": "ok",
}  # fmt: skip


def table(*rows: dict[str, str]) -> str:
    return "\n".join(",".join(line) for line in (GPT, *(row.values() for row in rows)))


# One job, four plans and a repetition of the first.
PLANS = (
    {"tp": "4", "pp": "2", "dp": "2", "iter_time_s": "10"},
    {"tp": "2", "pp": "2", "dp": "4", "iter_time_s": "8"},
    {"tp": "2", "pp": "4", "dp": "2", "iter_time_s": "16"},
    {"tp": "8", "pp": "1", "dp": "2", "iter_time_s": "20"},
    {"tp": "4", "pp": "2", "dp": "2", "iter_time_s": "14"},
)


@pytest.fixture
def rows(tmp_path) -> list[PublishedRow]:
    path = tmp_path / "job.csv"
    path.write_text(table(*({**GPT, **plan} for plan in PLANS)))
    found, skipped = read_rows(path)
    assert not skipped
    return found


def as_measured(factor: float = 1.0):
    """A method that knows the measurement of each plan, the mean of its repetitions, and says `factor` times that."""
    means = {4: 12.0, 2: 8.0, 8: 20.0}

    def method(row: PublishedRow) -> Predicted:
        seconds = 16.0 if row.plan.pipeline == 4 else means[row.plan.tensor]
        return Predicted(seconds * factor, row.memory_bytes, True)

    return method


def test_a_method_that_is_always_a_tenth_too_slow_errs_by_a_tenth_and_chooses_right(rows):
    found = validate(rows[1:4], as_measured(1.1))
    (errors,) = found.errors()
    assert (errors.rows, errors.mean, errors.worst, errors.bias) == (3, *[pytest.approx(0.1)] * 3)
    assert found.mean_regret() == 0
    assert found.mean_rank_correlation() == pytest.approx(1)


def test_repetitions_of_a_plan_are_one_plan_with_the_mean_of_their_times(rows):
    (group,) = validate(rows, as_measured()).groups
    assert group.plans == 4
    assert group.rank_correlation == pytest.approx(1)
    (errors,) = validate(rows, as_measured()).errors()
    assert errors.rows == 5
    assert errors.worst == pytest.approx(0.2)  # 12 against 10
    assert errors.median == 0


def test_a_method_that_turns_the_order_round_pays_the_worst_plan(rows):
    found = validate(rows, lambda row: Predicted(1 / (as_measured()(row).step_seconds or 1.0)))
    (group,) = found.groups
    assert group.rank_correlation == pytest.approx(-1)
    assert group.regret == pytest.approx(20 / 8 - 1)
    assert group.chosen != group.best


def test_a_plan_that_is_predicted_not_to_fit_is_not_chosen(rows):
    def method(row):
        found = as_measured()(row)
        return found._replace(fits=found.step_seconds != 8)

    (group,) = validate(rows, method).groups
    assert group.regret == pytest.approx(12 / 8 - 1)


def test_choosing_a_plan_that_ran_out_of_memory_has_no_regret_but_is_told(tmp_path):
    path = tmp_path / "job.csv"
    failed = {**GPT, **PLANS[1], "iter_time_s": "", "status": "OOM"}
    path.write_text(table({**GPT, **PLANS[0]}, failed, {**GPT, **PLANS[2]}))
    rows, _ = read_rows(path)
    (group,) = validate(rows, as_measured()).groups
    assert group.regret is None
    assert group.rank_correlation is None  # two plans ran
    assert validate(rows, as_measured()).out_of_memory() == (1, 0, 2, 0)
    wary = validate(rows, lambda row: as_measured()(row)._replace(fits=row.plan.tensor != 2))
    assert wary.out_of_memory() == (1, 1, 2, 1)
    assert wary.groups[0].regret == 0


def test_rows_of_other_jobs_are_no_group(tmp_path):
    path = tmp_path / "jobs.csv"
    changes = ({"seq": "1024"}, {"global_batch": "128"}, {"precision": "fp16"}, {"gpu": "H100-SXM-80GB"}, {})
    path.write_text(table(*({**GPT, **change} for change in changes)))
    assert validate(read_rows(path)[0], lambda row: Predicted(1.0)).groups == ()


def test_a_row_that_the_method_refuses_is_kept_with_the_reason(rows):
    def method(row):
        raise PlanError("cannot be said", place="plan")

    found = validate(rows[:1], method, [SkippedRow(7, "somebody", ("hidden: missing",))])
    assert "cannot be said" in found.rows[0].failed
    assert found.errors() == ()
    assert found.mean_regret() is None
    assert found.skipped == ((7, "somebody", ("hidden: missing",)),)


def test_a_validation_goes_to_json_and_back(rows):
    found = validate(rows, as_measured(1.3))
    assert Validation.from_json(found.to_json()) == found


def test_parts_are_the_fitted_and_the_held_out_rows(rows):
    found = validate(rows, as_measured())
    fitted = is_fitted(rows[0])
    assert len(found.part(fitted)) == 5
    assert found.part(not fitted) == ()
    assert found.errors(fitted=not fitted) == ()
    assert found.groups_of(not fitted) == ()
    assert found.mean_rank_correlation(not fitted) is None


def test_the_worst_rows_come_first(rows):
    found = validate(rows, as_measured())
    assert [row.line for row in found.worst(2)] == [2, 6]
    assert len(found.worst(99)) == 5


def test_headways_own_prediction_is_the_predictors(rows):
    own = validate(rows)
    assert all(row.failed == "" and row.predicted_seconds and row.predicted_bytes for row in own.rows)
    assert own.rows[0].predicted_seconds == own.rows[4].predicted_seconds
    assert own.rows[0].predicted_to_fit is True
    again = Prophet()(rows[0])
    assert again.step_seconds == own.rows[0].predicted_seconds


values = st.lists(st.sampled_from([0.0, 1.0, 1.5, 2.0, 3.0, 7.0]), min_size=2, max_size=9)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_rank_correlation_is_pearsons_of_the_ranks_counted_one_by_one(data):
    one = data.draw(values)
    other = data.draw(st.lists(st.floats(0, 9), min_size=len(one), max_size=len(one)))
    found = rank_correlation(one, other)
    ranks = [[sum(x < y for x in side) + (sum(x == y for x in side) - 1) / 2 for y in side] for side in (one, other)]
    if len(set(one)) == 1:
        assert found is None
    elif len(set(other)) == 1:
        assert found == 0
    else:
        assert found == pytest.approx(numpy.corrcoef(ranks[0], ranks[1])[0, 1], abs=1e-9)
        assert rank_correlation(one, [math.exp(x) for x in map(float, ranks[1])]) == pytest.approx(found)


@pytest.mark.skipif(not DATA.is_dir(), reason="the published measurements are not here")
@pytest.mark.parametrize("name", ["published_throughput.csv", "vtrain_single_node.csv", "measured_memory.csv"])
def test_every_published_row_is_predicted_and_none_absurdly(name):
    rows, skipped = read_rows(DATA / name)
    found = validate(rows, skipped=skipped)
    assert not [row.failed for row in found.rows if row.failed]
    for row in found.rows:
        assert row.predicted_seconds is not None
        assert 0 < row.predicted_seconds < math.inf
        if row.step_error is not None:
            assert -0.95 < row.step_error < 4
        if row.memory_error is not None:
            assert -0.8 < row.memory_error < 2
