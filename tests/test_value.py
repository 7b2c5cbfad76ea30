"""Values to files and back; what is wrong with a file is said with the file and the field."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.errors import FieldError, FileError
from headway.value import Value, convert, read_text, write_atomically


class Wheel(Value):
    """A part with a default."""

    radius: float = 0.5


class Wagon(Value):
    """A value with one of everything that values hold."""

    name: str
    wheels: tuple[Wheel, ...] = ()
    cargo: dict[str, int] = {}


wagons = st.builds(
    Wagon,
    name=st.text(),
    wheels=st.lists(st.builds(Wheel, radius=st.floats(allow_nan=False, allow_infinity=False))).map(tuple),
    cargo=st.dictionaries(st.text(), st.integers(-(2**62), 2**62)),
)


@given(wagons)
def test_a_value_survives_json_and_builtins(wagon):
    assert Wagon.from_json(wagon.to_json()) == wagon
    assert convert(wagon.to_builtins(), Wagon) == wagon


@given(
    st.builds(Wagon, name=st.text("abc :-#'\"é\n"), cargo=st.dictionaries(st.text("xyz ", min_size=1), st.integers()))
)
def test_a_value_survives_yaml(wagon):
    assert Wagon.from_yaml(wagon.to_yaml()) == wagon


@pytest.mark.parametrize("name", ["wagon.json", "wagon.yaml", "deep/er/wagon.yml"])
def test_a_value_survives_a_file(tmp_path, name):
    wagon = Wagon(name="tender", wheels=(Wheel(), Wheel(radius=1)), cargo={"coal": 3})
    wagon.save(tmp_path / name)
    assert Wagon.load(tmp_path / name) == wagon


def test_a_value_is_frozen():
    wheel = Wheel()
    with pytest.raises(AttributeError):
        wheel.radius = 2.0  # type: ignore[misc]
    assert msgspec.structs.replace(wheel, radius=2.0).radius == 2.0


def test_an_unknown_field_is_named_with_the_file_and_the_fields_there_are(tmp_path):
    path = tmp_path / "wagon.yaml"
    path.write_text("name: a\nwheles: []\n")
    with pytest.raises(FieldError) as caught:
        Wagon.load(path)
    assert str(path) in str(caught.value)
    assert "wheles" in str(caught.value)
    assert "name, wheels, cargo" in caught.value.remedy


def test_a_wrong_value_deep_inside_is_named_by_its_path():
    with pytest.raises(FieldError, match=r"wheels\[1\].radius"):
        Wagon.from_json('{"name": "a", "wheels": [{"radius": 1}, {"radius": "wide"}]}')
    with pytest.raises(FieldError, match="name"):
        convert({"wheels": []}, Wagon)


def test_text_that_is_neither_json_nor_yaml_is_refused():
    with pytest.raises(FieldError, match="not JSON"):
        Wagon.from_json("{", place="x.json")
    with pytest.raises(FieldError, match="not YAML"):
        Wagon.from_yaml("a: [", place="x.yaml")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileError, match="no such file"):
        Wagon.load(tmp_path / "absent.json")
    with pytest.raises(FileError, match="cannot be read"):
        read_text(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileError, match="not a text file"):
        read_text(tmp_path / "binary")


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "wagon.json"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["wagon.json"]


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written"):
        write_atomically(tmp_path / "file" / "wagon.json", "x")


def test_written_files_can_be_read_by_others(tmp_path):
    path = tmp_path / "wagon.json"
    write_atomically(path, b"bytes")
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o644
