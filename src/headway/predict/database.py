"""The database of measured times: operators and collectives, on this machine and on others', in one SQLite file.

A `Measurement` says what ran (an operator with its shapes, or a collective with its group and mesh), on which device,
how much of it, and how long it took. `Database` keeps them; several processes may write at once. It is empty until
something is measured (`headway probe --profile`) or imported (`headway profile import`).
"""

from __future__ import annotations

import math
import os
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from headway.errors import FieldError, FileError
from headway.value import Value

__all__ = ["COLLECTIVES", "Database", "Group", "Measurement", "Unit", "default_database"]

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send")

Unit = Literal["bytes", "flop", "samples"]

# Stored in the file's header: another number, another table.
_SCHEMA = 1
_BUSY_SECONDS = 30


class Group(NamedTuple):
    """A collective and where it runs: which members communicate, and how many such groups do so at once.

    The mesh has `nodes` x `devices_per_node` devices, numbered node by node. A group has `group_size` members, `stride`
    apart; all `groups` of them are at work together.
    """

    kind: str
    dtype: str
    nodes: int
    devices_per_node: int
    group_size: int
    groups: int
    stride: int

    @property
    def members_per_node(self) -> int:
        """Members of one group in each node that it touches."""
        return max(1, min(self.group_size, self.devices_per_node // max(1, self.stride)))

    @property
    def spans(self) -> int:
        """Nodes that one group touches."""
        return math.ceil(self.group_size / self.members_per_node)

    @property
    def sharing(self) -> int:
        """Groups at work in each node that must leave it: they share its network."""
        if self.spans == 1:
            return 1
        return max(1, round(self.groups * self.group_size / (self.nodes * self.members_per_node)))


class Measurement(Value, kw_only=True):
    """One measured time.

    `size` counts `unit`: bytes of the whole tensor for a collective (for all-gather and reduce-scatter the gathered
    one), FLOP for products known by nothing else, samples for an operator of a traced model, whose shapes are then in
    `shape`; a size of 0 is the fixed cost. `seconds` None: it was tried and failed. `count`: samples that the time is
    the mean or median of. `flop` and `moved_bytes` say what an operator computes and moves, 0 where that is not known.
    """

    device: str
    operation: str
    dtype: str = ""
    shape: str = ""
    nodes: int = 1
    devices_per_node: int = 1
    group_size: int = 1
    groups: int = 1
    stride: int = 1
    size: float
    unit: Unit
    seconds: float | None = None
    count: int = 1
    flop: float = 0.0
    moved_bytes: float = 0.0
    source: str = ""
    date: str = ""

    @property
    def group(self) -> Group:
        """The collective that was measured, its size aside."""
        return Group(
            self.operation, self.dtype, self.nodes, self.devices_per_node, self.group_size, self.groups, self.stride
        )

    def check(self, *, place: str = "") -> Measurement:
        """This measurement. Raises FieldError naming the first field with a value that no measurement can have."""
        for field in ("device", "operation"):
            if not getattr(self, field):
                raise FieldError(f"{field} is empty", place=place)
        for field in ("size", "flop", "moved_bytes"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise FieldError(f"{field} is {value}", place=place, remedy="give a number, 0 or larger")
        for field in ("nodes", "devices_per_node", "group_size", "groups", "count"):
            if getattr(self, field) < 1:
                raise FieldError(f"{field} is {getattr(self, field)}", place=place, remedy="it is at least 1")
        if self.stride < 0:
            raise FieldError(f"stride is {self.stride}", place=place, remedy="it is at least 0")
        if self.seconds is not None and not (math.isfinite(self.seconds) and self.seconds >= 0):
            raise FieldError(f"seconds is {self.seconds}", place=place, remedy="leave it out if the measurement failed")
        if self.unit == "bytes" and self.operation not in COLLECTIVES:
            raise FieldError(
                f"operation is {self.operation!r}, which is no collective",
                place=place,
                remedy=f"sizes in bytes are of: {', '.join(COLLECTIVES)}",
            )
        if self.unit == "bytes" and self.group_size * self.groups > self.nodes * self.devices_per_node:
            raise FieldError(
                f"{self.groups} groups of {self.group_size} do not fit on {self.nodes}x{self.devices_per_node} devices",
                place=place,
            )
        return self


_COLUMNS = Measurement.__struct_fields__
_KEY = (
    "device", "operation", "dtype", "shape", "nodes", "devices_per_node", "group_size", "groups", "stride", "unit",
    "size", "source",
)  # fmt: skip
_TYPES = {"size": "real", "seconds": "real", "flop": "real", "moved_bytes": "real"}
_INTEGERS = ("nodes", "devices_per_node", "group_size", "groups", "stride", "count")


def default_database() -> Path:
    """Where measurements are kept: `profile.sqlite` in $XDG_CACHE_HOME/headway, or ~/.cache/headway."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "headway" / "profile.sqlite"


class Database:
    """Measurements in an SQLite file that processes may share; the file is made when something is first written.

    Every method raises FileError if the file is not such a database, or of another version, or cannot be used. It is
    never repaired and never replaced: what somebody measured is not ours to throw away.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path is not None else default_database()

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=_BUSY_SECONDS)) as connection, connection:
                self._prepare(connection)
                yield connection
        except (sqlite3.Error, OSError) as error:
            raise FileError(
                f"the database of measured times cannot be used: {error}",
                place=str(self.path),
                remedy="move the file away, free some space, or set XDG_CACHE_HOME to a folder you can write to",
            ) from error

    def _prepare(self, connection: sqlite3.Connection) -> None:
        version = connection.execute("pragma user_version").fetchone()[0]
        if version == _SCHEMA:
            return
        if version:
            raise FileError(
                f"a database of version {version}, and this is version {_SCHEMA}",
                place=str(self.path),
                remedy="use the Headway that wrote it, or move the file away and measure again",
            )
        columns = ", ".join(
            f'"{name}" {_TYPES.get(name) or ("integer" if name in _INTEGERS else "text")}' for name in _COLUMNS
        )
        # Another process may be doing the same: whoever comes second waits, and finds everything there.
        connection.execute("begin immediate")
        connection.execute(
            f"create table if not exists measurements ({columns}, primary key ({', '.join(_KEY)})) without rowid"
        )
        connection.execute(f"pragma user_version = {_SCHEMA}")

    def add(self, measurements: Iterable[Measurement]) -> int:
        """Keep measurements, all of them or (on an error) none; how many were not there before.

        One that is there already, from the same source, is replaced. Raises FieldError for one that cannot be true.
        """
        rows = [msgspec.structs.astuple(measurement.check()) for measurement in measurements]
        marks = ", ".join("?" * len(_COLUMNS))
        with self._open() as connection:
            before = connection.execute("select count(*) from measurements").fetchone()[0]
            connection.executemany(f"insert or replace into measurements values ({marks})", rows)
            return connection.execute("select count(*) from measurements").fetchone()[0] - before

    def measurements(
        self,
        device: str | None = None,
        *,
        operation: str | None = None,
        unit: Unit | None = None,
        source: str | None = None,
    ) -> list[Measurement]:
        """What was measured, by key and size; only of this device, operation, unit and source where they are given."""
        wanted = {"device": device, "operation": operation, "unit": unit, "source": source}
        given = {name: value for name, value in wanted.items() if value is not None}
        where = " and ".join(f"{name} = ?" for name in given) or "1"
        query = f"select * from measurements where {where} order by {', '.join(_KEY)}"
        with self._open() as connection:
            return [
                Measurement(**dict(zip(_COLUMNS, row, strict=True)))
                for row in connection.execute(query, tuple(given.values()))
            ]

    def devices(self) -> dict[str, int]:
        """Measurements of each device."""
        with self._open() as connection:
            query = "select device, count(*) from measurements group by device order by device"
            return dict(connection.execute(query).fetchall())

    def remove(self, device: str, *, source: str | None = None) -> int:
        """Forget what was measured on a device (by one source); how many measurements that were."""
        with self._open() as connection:
            condition, values = ("device = ?", (device,))
            if source is not None:
                condition, values = "device = ? and source = ?", (device, source)
            return connection.execute(f"delete from measurements where {condition}", values).rowcount

    # What `Profile` keeps of the machine at hand: seconds by operator key and samples, under one source.

    def seconds_by_key(self, source: str) -> dict[str, dict[int, float]]:
        """Key of an operator ("name shape") → samples → seconds, of one source."""
        found: dict[str, dict[int, float]] = defaultdict(dict)
        query = (
            "select operation, shape, size, seconds from measurements "
            "where source = ? and unit = 'samples' and seconds is not null"
        )
        with self._open() as connection:
            for operation, shape, size, seconds in connection.execute(query, (source,)):
                found[f"{operation} {shape}" if shape else operation][int(size)] = seconds
        return dict(found)
