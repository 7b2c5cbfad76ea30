"""The base of every value that crosses a file or a wire.

A `Value` is frozen, compares by content, and goes to and from JSON and YAML; a field that it does not know is refused
with the file and the field in the error. Files are written atomically: a reader sees the old content or the new one.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Self, dataclass_transform

import msgspec

from headway.errors import FieldError, FileError

__all__ = ["Value", "convert", "read_text", "write_atomically"]


@dataclass_transform(frozen_default=True)  # what msgspec does anyway, said so that type checkers know
class Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):  # for cached_property
    """A frozen, serialisable value. Subclass it and annotate the fields."""

    def to_json(self) -> str:
        """This value as JSON, indented, fields in the order of their declaration."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()

    def to_builtins(self) -> Any:
        """This value as dicts, lists, strings and numbers."""
        return msgspec.to_builtins(self)

    @classmethod
    def from_json(cls, text: str | bytes, *, place: str = "") -> Self:
        """The value that `text` describes. Raises FieldError naming the field; `place` says where the text is from."""
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.ValidationError as error:
            raise FieldError(str(error), place=place, remedy=_fields(cls)) from None
        except msgspec.DecodeError as error:
            raise FieldError(f"not JSON: {error}", place=place) from None

    @classmethod
    def from_yaml(cls, text: str | bytes, *, place: str = "") -> Self:
        """The value that the YAML `text` describes. Raises FieldError naming the field."""
        try:
            return msgspec.yaml.decode(text, type=cls)
        except msgspec.ValidationError as error:
            raise FieldError(str(error), place=place, remedy=_fields(cls)) from None
        except msgspec.DecodeError as error:
            raise FieldError(f"not YAML: {error}", place=place) from None

    def to_yaml(self) -> str:
        """This value as YAML."""
        return msgspec.yaml.encode(self).decode()

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The value in a `.json`, `.yaml` or `.yml` file. Raises FileError or FieldError."""
        text = read_text(path)
        if str(path).endswith((".yaml", ".yml")):
            return cls.from_yaml(text, place=str(path))
        return cls.from_json(text, place=str(path))

    def save(self, path: str | Path) -> None:
        """Write this value to a `.json`, `.yaml` or `.yml` file, atomically. Raises FileError."""
        is_yaml = str(path).endswith((".yaml", ".yml"))
        write_atomically(path, self.to_yaml() if is_yaml else self.to_json() + "\n")


def convert(data: Any, kind: type, *, place: str = "") -> Any:
    """Builtins (parsed YAML, say) to a value of `kind`. Raises FieldError naming the field."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise FieldError(str(error), place=place, remedy=_fields(kind)) from None


def _fields(kind: type) -> str:
    names = getattr(kind, "__struct_encode_fields__", ())
    return f"the fields of {kind.__name__} are: {', '.join(names)}" if names else ""


def read_text(path: str | Path) -> str:
    """The text of a file. Raises FileError naming it."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileError("no such file", place=str(path), remedy="check the path") from None
    except UnicodeDecodeError:
        raise FileError("not a text file", place=str(path), remedy="give a JSON or YAML file in UTF-8") from None
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror}", place=str(path)) from None


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Replace the file at `path` by `content`; whoever reads sees the old content or the new. Raises FileError."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise FileError(
            f"cannot be written: {error.strerror}", place=str(path), remedy="free some space or choose another folder"
        ) from error
