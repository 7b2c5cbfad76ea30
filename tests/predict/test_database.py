"""The database of measured times: what goes in comes out, from several processes, and a broken file stays as it is."""

from __future__ import annotations

import math
import sqlite3
import subprocess
import sys

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headway.errors import FieldError, FileError
from headway.predict.database import COLLECTIVES, Database, Group, Measurement


def collective(size=1024.0, seconds=1e-3, **changes) -> Measurement:
    fields = {
        "device": "V100", "operation": "all_reduce", "dtype": "float32", "nodes": 2, "devices_per_node": 8,
        "group_size": 16, "size": size, "unit": "bytes", "seconds": seconds, "source": "test",
    }  # fmt: skip
    return Measurement(**fields | changes)


names = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12)
positive = st.floats(1e-9, 1e15)
measurements = st.builds(
    Measurement,
    device=names,
    operation=names,
    dtype=names,
    shape=names,
    size=positive,
    unit=st.sampled_from(["flop", "samples"]),
    seconds=st.none() | positive,
    count=st.integers(1, 1000),
    flop=positive,
    moved_bytes=positive,
    source=names,
    date=names,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(measurements, max_size=8))
def test_what_goes_in_comes_out(tmp_path_factory, rows):
    database = Database(tmp_path_factory.mktemp("database") / "profile.sqlite")
    keyed = {(row.device, row.operation, row.dtype, row.shape, row.unit, row.size, row.source): row for row in rows}
    assert database.add(rows) == len(keyed)
    assert {msgspec.json.encode(row) for row in database.measurements()} == {
        msgspec.json.encode(row) for row in keyed.values()
    }
    assert sum(database.devices().values()) == len(keyed)
    assert database.add(rows) == 0


def test_a_measurement_is_replaced_by_its_own_source_only(tmp_path):
    database = Database(tmp_path / "profile.sqlite")
    assert database.add([collective(seconds=1e-3), collective(seconds=2e-3, source="other")]) == 2
    assert database.add([collective(seconds=3e-3)]) == 0
    assert {row.source: row.seconds for row in database.measurements("V100")} == {"test": 3e-3, "other": 2e-3}
    assert database.remove("V100", source="other") == 1
    assert [row.source for row in database.measurements()] == ["test"]


def test_a_failed_measurement_is_kept_as_failed(tmp_path):
    database = Database(tmp_path / "profile.sqlite")
    database.add([collective(seconds=None)])
    assert database.measurements()[0].seconds is None


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"size": math.nan}, "size"),
        ({"size": -1.0}, "size"),
        ({"seconds": math.inf}, "seconds"),
        ({"seconds": -1e-6}, "seconds"),
        ({"group_size": 0}, "group_size"),
        ({"group_size": 32}, "groups of 32"),
        ({"operation": "mm"}, "operation"),
        ({"device": ""}, "device"),
    ],
)
def test_what_cannot_be_true_is_refused_and_nothing_is_written(tmp_path, changes, field):
    database = Database(tmp_path / "profile.sqlite")
    with pytest.raises(FieldError) as caught:
        database.add([collective(), collective(**{"source": "wrong"} | changes)])
    assert field in caught.value.message
    assert database.measurements() == []


def test_processes_write_at_once_and_nothing_is_lost(tmp_path):
    path = tmp_path / "profile.sqlite"
    script = (
        "import sys\n"
        "from headway.predict.database import Database, Measurement\n"
        "for number in range(40):\n"
        "    Database(sys.argv[1]).add([Measurement(device=sys.argv[2], operation='mm', size=number, unit='flop',"
        " seconds=1.0)])\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, str(path), name]) for name in ("first", "second")]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    assert Database(path).devices() == {"first": 40, "second": 40}


def test_a_database_of_another_version_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "profile.sqlite"
    Database(path).add([collective()])
    connection = sqlite3.connect(path)
    connection.execute("pragma user_version = 99")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(FileError, match="version 99") as caught:
        Database(path).measurements()
    assert caught.value.place == str(path)
    assert caught.value.remedy
    assert path.read_bytes() == before


def test_a_broken_file_is_reported_and_left_alone(tmp_path):
    path = tmp_path / "profile.sqlite"
    Database(path).add([collective(size) for size in range(500)])
    content = bytearray(path.read_bytes())
    content[100:8000] = b"\xff" * 7900
    path.write_bytes(content)
    for use in (Database(path).measurements, lambda: Database(path).add([collective()])):
        with pytest.raises(FileError) as caught:
            use()
        assert caught.value.place == str(path)
        assert path.read_bytes() == bytes(content)


def test_a_table_of_the_time_before_this_database_is_kept(tmp_path):
    path = tmp_path / "profile.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("create table seconds (context text, key text)")
    connection.execute("insert into seconds values ('a', 'b')")
    connection.commit()
    connection.close()
    Database(path).add([collective()])
    connection = sqlite3.connect(path)
    assert connection.execute("select * from seconds").fetchall() == [("a", "b")]
    connection.close()


@given(
    st.sampled_from(COLLECTIVES),
    st.integers(0, 2),
    st.integers(0, 3),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_the_nodes_that_a_group_touches_are_those_of_its_members(kind, nodes_log, per_node_log, size_log, stride_log):
    """Against the groups written out, for the groups that tile a mesh."""
    nodes, per_node, size, stride = 2**nodes_log, 2**per_node_log, 2**size_log, 2**stride_log
    world = nodes * per_node
    if size * stride > world:
        return
    ranks = [
        [block * size * stride + offset + member * stride for member in range(size)]
        for block in range(world // (size * stride))
        for offset in range(stride)
    ]
    assert sorted(rank for group in ranks for rank in group) == list(range(world))
    group = Group(kind, "float32", nodes, per_node, size, len(ranks), stride)
    touched = [{rank // per_node for rank in members} for members in ranks]
    assert {len(found) for found in touched} == {group.spans}
    assert group.members_per_node * group.spans == size
    if group.spans > 1:
        assert {sum(node in found for found in touched) for node in range(nodes)} == {group.sharing}
