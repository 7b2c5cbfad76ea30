"""Quantities as people write them, to and from SI units.

Inside Headway every quantity is in seconds, bytes, bytes per second, FLOP or FLOP per second. Only this module knows
that people write `80GB`, `200Gb/s` and `12.3 ms`. Prefixes k, M, G, T, P are decimal; Ki, Mi, Gi, Ti are binary.
`b` is a bit and `B` is a byte: network vendors count bits and everybody else counts bytes.
"""

from __future__ import annotations

import math
import re

from headway.errors import QuantityError

__all__ = [
    "format_bytes",
    "format_count",
    "format_energy",
    "format_flop",
    "format_rate",
    "format_seconds",
    "parse_bandwidth",
    "parse_bytes",
    "parse_flop_rate",
    "parse_seconds",
]

_PREFIXES = {
    "": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50,
}  # fmt: skip
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|\.[0-9]+)\s*([A-Za-zµ/]*)\s*")
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0, "d": 86400.0}


def _split(text: str | float, kind: str, example: str) -> tuple[float, str]:
    if isinstance(text, int | float):
        return float(text), ""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise QuantityError(f"{text!r} is not {kind}", remedy=f"write it like {example}")
    return float(match[1]), match[2]


def parse_bytes(text: str | float) -> float:
    """`"80GB"` → 8e10, `"16 GiB"` → 2**34, `1024` → 1024.0. Raises QuantityError."""
    number, unit = _split(text, "a number of bytes", "80GB or 16GiB")
    if unit in ("", "B"):
        return number
    if unit.endswith("B") and unit[:-1] in _PREFIXES:
        return number * _PREFIXES[unit[:-1]]
    raise QuantityError(f"{text!r} is not a number of bytes", remedy="write it like 80GB or 16GiB")


def parse_bandwidth(text: str | float) -> float:
    """`"25GB/s"` → 2.5e10 and `"200Gb/s"` → 2.5e10 bytes per second. Raises QuantityError."""
    number, unit = _split(text, "a bandwidth", "25GB/s or 200Gb/s")
    if unit == "":
        return number
    if unit.endswith("bps") and unit[:-3] in _PREFIXES:
        return number * _PREFIXES[unit[:-3]] / 8
    if unit.endswith("/s"):
        body = unit[:-2]
        if body.endswith("bit") and body[:-3] in _PREFIXES:
            return number * _PREFIXES[body[:-3]] / 8
        if body.endswith("b") and body[:-1] in _PREFIXES:
            return number * _PREFIXES[body[:-1]] / 8
        if body.endswith("B") and body[:-1] in _PREFIXES:
            return number * _PREFIXES[body[:-1]]
    raise QuantityError(
        f"{text!r} is not a bandwidth", remedy="write it like 25GB/s (bytes) or 200Gb/s (bits), per second"
    )


def parse_seconds(text: str | float) -> float:
    """`"5us"` → 5e-6, `"2 h"` → 7200. Raises QuantityError."""
    number, unit = _split(text, "a duration", "5us, 10ms or 2h")
    if unit == "":
        return number
    if unit in _SECONDS:
        return number * _SECONDS[unit]
    raise QuantityError(f"{text!r} is not a duration", remedy="write it like 5us, 10ms or 2h")


def parse_flop_rate(text: str | float) -> float:
    """`"312TFLOP/s"` → 3.12e14. Raises QuantityError."""
    number, unit = _split(text, "a rate of FLOP per second", "312TFLOP/s")
    if unit == "":
        return number
    for suffix in ("FLOP/s", "FLOPS", "FLOPs/s", "flop/s"):
        if unit.endswith(suffix) and unit[: -len(suffix)] in _PREFIXES:
            return number * _PREFIXES[unit[: -len(suffix)]]
    raise QuantityError(f"{text!r} is not a rate of FLOP per second", remedy="write it like 312TFLOP/s")


def _scaled(value: float, unit: str, digits: int = 3) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}".rstrip()
    for prefix, factor in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0)):
        # 999.6 would be printed as "1000": move on to the next prefix before that happens.
        if abs(value) >= factor * (1 - 0.5 * 10**-digits):
            return f"{_significant(value / factor, digits)} {prefix}{unit}".rstrip()
    return f"{_significant(value, digits)} {unit}".rstrip()


def _significant(value: float, digits: int = 3) -> str:
    if value == 0:
        return "0"
    # The exponent of the rounded value: 0.9996 is 1.00, not 1.000.
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def format_bytes(value: float) -> str:
    """8e10 → `"80.0 GB"`."""
    return _scaled(value, "B")


def format_rate(value: float) -> str:
    """2.5e10 bytes per second → `"25.0 GB/s"`."""
    return _scaled(value, "B/s")


def format_flop(value: float, *, per_second: bool = False) -> str:
    """3.12e14 → `"312 TFLOP"` (or `"312 TFLOP/s"`)."""
    return _scaled(value, "FLOP/s" if per_second else "FLOP")


def format_count(value: float) -> str:
    """124439808 → `"124 M"`."""
    return _scaled(value, "")


def format_energy(value: float) -> str:
    """3.02e6 joules → `"3.02 MJ"`."""
    return _scaled(value, "J")


def format_seconds(value: float) -> str:
    """0.0123 → `"12.3 ms"`, 7260 → `"2 h 1 min"`."""
    if not math.isfinite(value):
        return f"{value:g} s"
    if abs(value) >= 3600:
        return f"{int(value // 3600)} h {int(value % 3600 // 60)} min"
    if abs(value) >= 100:
        return f"{int(value // 60)} min {int(value % 60)} s"
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(value) >= factor * 0.9995:
            return f"{_significant(value / factor)} {unit}"
    return f"{_significant(value / 1e-9)} ns" if value else "0 s"
