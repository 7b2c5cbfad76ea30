"""Measuring a model's operators into the database, and finding them there again."""

from __future__ import annotations

import pytest

from headway.errors import DoesNotFitError, InputError
from headway.hardware.catalog import preset
from headway.predict import measure
from headway.predict.database import Database
from headway.predict.measure import measure_workload, spanning_samples
from headway.predict.operators import operator_name
from headway.predict.timing import Interpolated, time_operator


@pytest.fixture
def here(make):
    """One probed CPU device."""
    kind = make.accelerator("this machine", torch_device="cpu", threads=1)
    return make.cluster(1, 1, accelerators=(kind,), fingerprint="here")


def test_operators_of_a_model_are_in_the_database_with_what_they_compute(make, here, tmp_path):
    path = tmp_path / "profile.sqlite"
    workload = make.workload(make.graph(layers=2), 4)
    profile = measure_workload(workload, here, samples=(1, 4), budget_seconds=30, database=path)
    rows = [row for row in Database(path).measurements("this machine") if row.dtype]
    assert {row.operation for row in rows} == {operator_name(operator) for operator in workload.graph.operators}
    assert {row.size for row in rows} == {1.0, 4.0}
    assert all(row.seconds and row.moved_bytes > 0 and row.date for row in rows)
    products = [row for row in rows if row.operation == "mm"]
    assert {row.flop / row.size for row in products} == {
        operator.flop.at(1) for operator in workload.graph.operators if operator_name(operator) == "mm"
    }
    way = Interpolated(rows)
    for operator in workload.graph.operators:
        measured = profile.measured_seconds(operator, 4, 1, "float32")
        assert time_operator(way, operator, 4, 1, "float32").seconds == pytest.approx(measured)


def test_what_is_in_the_database_is_not_measured_again(make, here, tmp_path):
    workload = make.workload(make.graph(layers=1), 4)
    first = measure_workload(workload, here, samples=(2,), budget_seconds=30, database=tmp_path / "profile.sqlite")
    again = measure_workload(workload, here, samples=(2,), budget_seconds=0, database=tmp_path / "profile.sqlite")
    assert again == first


def test_a_machine_that_is_only_described_cannot_be_measured(make, tmp_path):
    workload = make.workload(make.graph(layers=1), 4)
    with pytest.raises(InputError, match="description") as caught:
        measure_workload(workload, preset("dgx-1v"), database=tmp_path / "profile.sqlite")
    assert caught.value.remedy


def test_a_model_with_layers_larger_than_the_memory_is_refused_before_it_is_allocated(
    make, here, tmp_path, monkeypatch
):
    monkeypatch.setattr(measure, "_free_bytes", lambda torch_device: 1000.0)
    with pytest.raises(DoesNotFitError, match=r"1\.00 kB are free"):
        measure_workload(make.workload(make.graph(layers=1), 4), here, database=tmp_path / "profile.sqlite")
    assert not (tmp_path / "profile.sqlite").exists()


@pytest.mark.parametrize(("largest", "sizes"), [(1, [1]), (4, [1, 4]), (32, [1, 4, 16, 32])])
def test_samples_span_up_to_the_batch(largest, sizes):
    assert spanning_samples(largest) == sizes
