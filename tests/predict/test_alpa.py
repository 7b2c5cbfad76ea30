"""Files of measured times: Alpa's, vTrain's and our own; what is wrong in them is named by line and column."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.errors import FieldError, FileError, InputError
from headway.predict.alpa import import_profile, read_measurements, write_measurements
from headway.predict.database import Database, Measurement

HEADER = "cluster_key,mesh,op,dtype,group_size,n_groups,stride,crosses_node,size,unit,bytes,time_s\n"
LINES = (
    "default,2x8,all_reduce,f16,16,1,1,1,0,elements,0,2e-04\n"
    "default,2x8,all_reduce,f16,16,1,1,1,512,elements,1024,3e-04\n"
    "default,4x8,all_reduce,f16,4,8,8,1,512,elements,1024,inf\n"
    "default,1x1,dot,f32,,,,,4194304,flop,,2.9e-05\n"
    "default,2x8,dot,f32,,,,,4194304,flop,,2.9e-05\n"
)
DATA = Path(__file__).parents[2].parent / "shared" / "data" / "planning" / "alpa_prof_database.csv"


def alpa(folder: Path, text: str = HEADER + LINES) -> Path:
    path = folder / "alpa.csv"
    path.write_text(text)
    return path


def test_alpa_is_read_in_bytes_and_flop_with_failures_and_fixed_costs_listed(tmp_path):
    database = Database(tmp_path / "profile.sqlite")
    report = import_profile(alpa(tmp_path), device="v100", database=database)
    assert report.kind == "alpa"
    assert report.devices == ("V100-SXM2-16GB",)
    assert report.read == report.added == 4  # the product, given for two meshes, counts once
    assert report.failed == ("all_reduce of 1024 bytes float16 on 4x8, 8 groups of 4, stride 8",)
    assert report.fixed_costs == 1
    reduced = database.measurements(operation="all_reduce")
    assert [(row.nodes, row.group_size, row.size, row.seconds) for row in reduced] == [
        (2, 16, 0.0, 2e-4), (2, 16, 1024.0, 3e-4), (4, 4, 1024.0, None)
    ]  # fmt: skip
    (product,) = database.measurements(unit="flop")
    assert (product.operation, product.dtype, product.size) == ("dot", "float32", 4194304.0)


def test_importing_twice_adds_nothing(tmp_path):
    database = Database(tmp_path / "profile.sqlite")
    import_profile(alpa(tmp_path), device="v100", database=database)
    before = database.measurements()
    assert import_profile(alpa(tmp_path), device="v100", database=database).added == 0
    assert database.measurements() == before


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("1024,3e-04", "1024,fast", 3, "time_s is 'fast'"),
        ("1024,3e-04", "1024,nan", 3, "time_s is 'nan'"),
        ("1024,3e-04", "1024,-1", 3, "time_s is '-1'"),
        ("1024,3e-04", "many,3e-04", 3, "bytes is 'many'"),
        ("2x8,all_reduce,f16,16,1,1,1,512", "2x,all_reduce,f16,16,1,1,1,512", 3, "mesh is '2x'"),
        ("2x8,all_reduce,f16,16,1,1,1,512", "2x8,all_reduce,f16,1.5,1,1,1,512", 3, "group_size is '1.5'"),
        ("2x8,all_reduce,f16,16,1,1,1,512", "2x8,all_mix,f16,16,1,1,1,512", 3, "op is 'all_mix'"),
        ("2x8,all_reduce,f16,16,1,1,1,512", "2x8,all_reduce,f16,64,1,1,1,512", 3, "groups of 64"),
        ("512,elements,1024,inf", "512,elements,1024", 4, "11 cells"),
        ("flop,,2.9e-05", "hours,,2.9e-05", 5, "unit is 'hours'"),
    ],
)
def test_garbage_is_named_by_line_and_column_and_nothing_is_taken_in(tmp_path, old, new, line, said):
    database = Database(tmp_path / "profile.sqlite")
    path = alpa(tmp_path, (HEADER + LINES).replace(old, new, 1))
    with pytest.raises(FieldError) as caught:
        import_profile(path, device="v100", database=database)
    assert caught.value.place == f"{path}, line {line}"
    assert said in caught.value.message
    assert database.measurements() == []


def test_missing_columns_are_named(tmp_path):
    path = alpa(tmp_path, (HEADER + LINES).replace("time_s", "time", 1).replace("stride", "step", 1))
    with pytest.raises(FieldError, match="stride, time_s") as caught:
        read_measurements(path, device="v100")
    assert "line 1" in caught.value.place


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "\x00\x01", "{}", "[{]", '[{"device": "x"}]'])
def test_what_is_no_profile_is_refused(tmp_path, text):
    with pytest.raises(FieldError) as caught:
        read_measurements(alpa(tmp_path, text))
    assert str(tmp_path) in caught.value.place


def test_alpa_does_not_say_its_device_so_somebody_must(tmp_path):
    with pytest.raises(InputError, match="which device") as caught:
        read_measurements(alpa(tmp_path))
    assert "V100" in caught.value.remedy


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(FileError):
        import_profile(tmp_path / "nowhere.csv", device="v100", database=Database(tmp_path / "profile.sqlite"))


def test_tables_of_vtrain_are_read(tmp_path):
    path = tmp_path / "lut.csv"
    path.write_text("gpu,n_gpus,bytes,oop_time_us,oop_busbw_gbs\na100,4,1048576,44.21,23.72\n")
    (row,) = read_measurements(path)
    assert (row.device, row.group_size, row.size, row.seconds) == (
        "A100-SXM-80GB",
        4,
        1048576.0,
        pytest.approx(44.21e-6),
    )


text = st.text(st.characters(codec="ascii", categories=("L", "N", "P", "Zs")), min_size=1).map(str.strip).filter(bool)
number = st.floats(0, 1e18)


@given(
    st.lists(
        st.builds(
            Measurement, device=text, operation=text, dtype=text, shape=text, size=number,
            unit=st.sampled_from(["flop", "samples"]), seconds=st.none() | number, count=st.integers(1, 99),
            flop=number, moved_bytes=number, source=text, date=text,
        ),
        min_size=1, max_size=5, unique=True,
    ),
    st.sampled_from([".csv", ".json"]),
)  # fmt: skip
def test_what_is_exported_is_imported_as_it_was(tmp_path_factory, rows, ending):
    path = tmp_path_factory.mktemp("export") / f"profile{ending}"
    write_measurements(rows, path)
    assert read_measurements(path) == rows


def test_an_export_goes_to_csv_or_json_only(tmp_path):
    with pytest.raises(InputError, match="neither"):
        write_measurements([], tmp_path / "profile.txt")


@pytest.mark.skipif(not DATA.exists(), reason="Alpa's profile is not here: it is no part of the repository")
def test_alpas_own_profile_is_read_whole():
    rows = read_measurements(DATA, device="V100-SXM2-16GB")
    failed = [row for row in rows if row.seconds is None]
    assert len(failed) == 65
    assert {(row.operation, row.nodes, row.group_size, row.stride) for row in failed} == {("all_reduce", 4, 4, 8)}
    assert len([row for row in rows if row.unit == "flop"]) == 2 * 64
    assert {(row.nodes, row.devices_per_node) for row in rows if row.unit == "bytes"} == {
        (1, 1), (1, 2), (1, 4), (1, 8), (2, 8), (4, 8)
    }  # fmt: skip
