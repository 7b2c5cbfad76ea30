"""Machines that nobody has yet: a cluster with some of its figures changed.

    what_if(load_cluster("dgx-a100:8"), "network=400Gb/s,memory=141GB")

Each change is `what=value` (the figure itself) or `what=2x` (that many times as much). What can be changed:

- `network`, `nvlink`, `pcie`: bandwidth of every link of that kind, in one direction;
- `network-latency`, `nvlink-latency`, `pcie-latency`: latency of every link of that kind;
- `memory`, `memory-bandwidth`: of every device;
- `flops`: peak rate; a figure is taken for bfloat16, and the other dtypes grow in proportion;
- `power`, `price`: watts, and dollars per hour, of every device.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable

import msgspec

from headway.errors import FieldError, HeadwayError
from headway.hardware.cluster import Accelerator, Cluster, Link
from headway.units import parse_bandwidth, parse_bytes, parse_flop_rate, parse_seconds

__all__ = ["what_if"]

_LINKS = ("network", "nvlink", "pcie")
_TIMES = re.compile(r"([0-9]*\.?[0-9]+)\s*[x×]")


def what_if(cluster: Cluster, changes: str) -> Cluster:
    """`cluster` with the comma-separated `changes` made (see the module's text).

    Raises FieldError naming the change that means nothing here: an unknown name, a quantity that is none, a kind of
    link that the cluster does not have.
    """
    named: list[str] = []
    for change in changes.split(","):
        name, equals, value = (part.strip() for part in change.partition("="))
        place = f"what-if: {change.strip() or changes!r}"
        if not equals or not value:
            raise FieldError("is no change", place=place, remedy="write it like network=400Gb/s or memory=2x")
        if name not in _CHANGES:
            close = difflib.get_close_matches(name, _CHANGES, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"one of: {', '.join(_CHANGES)}"
            raise FieldError(f"{name!r} cannot be changed", place=place, remedy=remedy)
        try:
            cluster = _CHANGES[name](cluster, value)
        except FieldError as error:
            raise FieldError(str(error.message), place=place, remedy=error.remedy) from None
        except HeadwayError as error:
            raise FieldError(error.message, place=place, remedy=error.remedy) from None
        named.append(f"{name}={value}")
    return msgspec.structs.replace(cluster, name=f"{cluster.name} with {', '.join(named)}", fingerprint="").validate()


def _number(value: str, parse: Callable[[str], float]) -> Callable[[float], float]:
    """What becomes of a figure: `value` itself, or that many times as much."""
    times = _TIMES.fullmatch(value)
    new = float(times[1]) if times else parse(value)
    if not 0 < new < math.inf:
        raise FieldError("must be above zero")
    return (lambda old: old * new) if times else (lambda old: new)


def _link_change(kind: str, field: str, parse: Callable[[str], float]) -> Callable[[Cluster, str], Cluster]:
    def change(cluster: Cluster, value: str) -> Cluster:
        if not any(link.kind == kind for link in cluster.links):
            kinds = ", ".join(sorted({link.kind for link in cluster.links})) or "none"
            raise FieldError(f"{cluster.name} has no {kind} links", remedy=f"its links: {kinds}")
        to = _number(value, parse)

        def changed(link: Link) -> Link:
            return msgspec.structs.replace(link, **{field: to(getattr(link, field))}) if link.kind == kind else link

        return msgspec.structs.replace(cluster, links=tuple(map(changed, cluster.links)))

    return change


def _device_change(change: Callable[[Accelerator, str], dict[str, object]]) -> Callable[[Cluster, str], Cluster]:
    def changed(cluster: Cluster, value: str) -> Cluster:
        kinds = {
            name: msgspec.structs.replace(kind, **change(kind, value)) for name, kind in cluster.accelerators.items()
        }
        return msgspec.structs.replace(cluster, accelerators=kinds)

    return changed


def _field(field: str, parse: Callable[[str], float]) -> Callable[[Cluster, str], Cluster]:
    return _device_change(lambda kind, value: {field: _number(value, parse)(getattr(kind, field))})


def _flops(kind: Accelerator, value: str) -> dict[str, object]:
    factor = _number(value, parse_flop_rate)(kind.flop_rate("bfloat16")) / kind.flop_rate("bfloat16")
    return {"flop_per_second": {dtype: rate * factor for dtype, rate in kind.flop_per_second.items()}}


def _plain(value: str) -> float:
    try:
        return float(value.removesuffix("W").removeprefix("$"))
    except ValueError:
        raise FieldError(f"{value!r} is no number") from None


_CHANGES: dict[str, Callable[[Cluster, str], Cluster]] = {
    **{kind: _link_change(kind, "bytes_per_second", parse_bandwidth) for kind in _LINKS},
    **{f"{kind}-latency": _link_change(kind, "latency_seconds", parse_seconds) for kind in _LINKS},
    "memory": _field("memory_bytes", parse_bytes),
    "memory-bandwidth": _field("memory_bytes_per_second", parse_bandwidth),
    "flops": _device_change(_flops),
    "power": _field("power_watts", _plain),
    "price": _field("dollars_per_hour", _plain),
}
