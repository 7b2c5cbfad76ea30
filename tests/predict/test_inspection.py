"""Looking into the database: a list, one curve with what is fitted to it, a file."""

from __future__ import annotations

import pytest

from headway.errors import InputError
from headway.predict.alpa import import_profile
from headway.predict.database import Database, Measurement
from headway.predict.inspection import export_profile, list_profile, show_profile

V100 = "V100-SXM2-16GB"


@pytest.fixture
def database(tmp_path):
    made = Database(tmp_path / "profile.sqlite")
    fields = {"device": V100, "operation": "all_reduce", "dtype": "float32", "devices_per_node": 8, "unit": "bytes"}
    rows = [
        Measurement(**fields, group_size=n, groups=8 // n, size=2.0**power, seconds=1e-5 * n + 2.0**power / 1e10)
        for n in (2, 8)
        for power in range(4, 30, 2)
    ]
    rows.append(Measurement(**fields, group_size=8, size=2.0**30, seconds=None))
    rows += [
        Measurement(device=V100, operation="dot", dtype="float16", size=10.0**k, unit="flop", seconds=10.0 ** (k - 13))
        for k in range(6, 13)
    ]
    rows.append(Measurement(device=V100, operation="overheads", size=0, unit="samples", seconds=1e-6))
    made.add(rows)
    return made


def test_the_list_has_a_line_for_each_key_and_counts_what_failed(database):
    lines = {(entry.operation, entry.group_size): entry for entry in list_profile(database)}
    assert set(lines) == {("all_reduce", 2), ("all_reduce", 8), ("dot", 1)}
    assert (lines["all_reduce", 8].points, lines["all_reduce", 8].failed) == (14, 1)
    assert lines["all_reduce", 8].largest == 2.0**30
    assert lines["dot", 1].mesh == ""
    assert list_profile(database, device="A100") == []


def test_a_curve_is_shown_with_every_fit_and_its_error(database):
    curve = show_profile("all_reduce", device=V100, dtype="float32", mesh=(1, 8), group_size=8, database=database)
    assert len(curve.sizes) == len(curve.seconds) == 14
    assert curve.seconds[-1] is None
    assert set(curve.fitted) == set(curve.error) == {"linear", "interpolated", "learned"}
    assert all(len(fitted) == 14 for fitted in curve.fitted.values())
    # The law is a line, so everything finds it; beyond the measured sizes too.
    assert max(curve.error.values()) < 0.02
    for fitted in curve.fitted.values():
        assert fitted[-1] == pytest.approx(8e-5 + 2.0**30 / 1e10, rel=0.05)
    assert all(low <= high for low, high in zip(curve.low_seconds, curve.high_seconds, strict=True))


def test_one_of_several_sources_has_to_be_chosen(database):
    again = {"device": V100, "operation": "dot", "dtype": "float16", "unit": "flop"}
    database.add([Measurement(**again, size=1e9, seconds=1.0, source="other")])
    with pytest.raises(InputError, match="2 sources"):
        show_profile("dot", device=V100, dtype="float16", database=database)
    curve = show_profile("dot", device=V100, dtype="float16", source="other", database=database)
    assert curve.fitted["interpolated"] == (1.0,)


def test_products_are_shown_by_flop(database):
    curve = show_profile("dot", device=V100, dtype="float16", database=database)
    assert curve.error["interpolated"] < 1e-9
    assert curve.sizes[0] == 1e6


def test_what_is_not_there_is_answered_with_what_is(database):
    with pytest.raises(InputError) as caught:
        show_profile("all_reduce", device=V100, dtype="float32", mesh=(1, 8), group_size=4, database=database)
    assert "(1, 8), 8" in caught.value.remedy
    with pytest.raises(InputError, match="nothing was measured on A100"):
        export_profile("profile.csv", device="A100", database=database)


def test_an_export_is_imported_elsewhere_as_it_was(database, tmp_path):
    count = export_profile(tmp_path / "profile.csv", database=database)
    other = Database(tmp_path / "other.sqlite")
    assert import_profile(tmp_path / "profile.csv", source="", database=other).added == count
    assert other.measurements() == database.measurements()
