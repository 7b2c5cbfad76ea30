"""Quantities as people write them, and back."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.errors import QuantityError
from headway.units import (
    format_bytes,
    format_count,
    format_energy,
    format_flop,
    format_rate,
    format_seconds,
    parse_bandwidth,
    parse_bytes,
    parse_flop_rate,
    parse_seconds,
)

sizes = st.floats(min_value=1e-3, max_value=1e18, allow_nan=False)


@pytest.mark.parametrize(
    ("text", "value"),
    [("80GB", 80e9), ("16 GiB", 16 * 2**30), ("1024", 1024), (" .5kB ", 500), ("1e3MB", 1e9), (7, 7), ("3B", 3)],
)
def test_bytes_are_read_in_decimal_and_binary_prefixes(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("25GB/s", 25e9), ("200Gb/s", 25e9), ("200Gbit/s", 25e9), ("200Gbps", 25e9), ("100", 100), (3.5, 3.5)],
)
def test_a_small_b_is_a_bit_and_a_capital_one_a_byte(text, value):
    assert parse_bandwidth(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("5us", 5e-6), ("5µs", 5e-6), ("10ms", 1e-2), ("2 h", 7200), ("3min", 180), ("1d", 86400), (2, 2), ("2", 2)],
)
def test_durations_are_read_in_their_units(text, value):
    assert parse_seconds(text) == pytest.approx(value)


@pytest.mark.parametrize(("text", "value"), [("312TFLOP/s", 312e12), ("1 PFLOPS", 1e15), ("5e9", 5e9), ("2 flop/s", 2)])
def test_flop_rates_are_read_with_their_prefixes(text, value):
    assert parse_flop_rate(text) == value


@pytest.mark.parametrize("parse", [parse_bytes, parse_bandwidth, parse_seconds, parse_flop_rate])
@pytest.mark.parametrize("text", ["", "fast", "-3GB", "3 parsecs", "80GBit", "GB", "1 2 GB", "nan"])
def test_anything_else_is_refused_with_an_example_of_what_would_be_right(parse, text):
    with pytest.raises(QuantityError) as caught:
        parse(text)
    assert repr(text) in caught.value.message
    assert "write it like" in caught.value.remedy


@given(sizes)
def test_formatted_bytes_read_back_to_three_digits(value):
    assert parse_bytes(format_bytes(value)) == pytest.approx(value, rel=6e-3)


@given(sizes)
def test_formatted_rates_read_back_to_three_digits(value):
    assert parse_bandwidth(format_rate(value)) == pytest.approx(value, rel=6e-3)
    assert parse_flop_rate(format_flop(value, per_second=True)) == pytest.approx(value, rel=6e-3)


@given(st.floats(min_value=1e-8, max_value=99, allow_nan=False))
def test_formatted_durations_read_back_to_three_digits(value):
    assert parse_seconds(format_seconds(value)) == pytest.approx(value, rel=6e-3)


@given(sizes)
def test_never_more_than_three_digits_before_the_unit(value):
    assert float(format_bytes(value).split()[0]) < 1000


def test_quantities_print_as_people_write_them():
    assert format_bytes(80e9) == "80.0 GB"
    assert format_bytes(999.6) == "1.00 kB"
    assert format_bytes(0) == "0 B"
    assert format_count(124439808) == "124 M"
    assert format_flop(312e12) == "312 TFLOP"
    assert format_seconds(0.0123) == "12.3 ms"
    assert format_seconds(7260) == "2 h 1 min"
    assert format_seconds(125) == "2 min 5 s"
    assert format_seconds(0) == "0 s"
    assert format_seconds(3e-9) == "3.00 ns"
    assert format_seconds(math.inf) == "inf s"


def test_energy_is_written_in_joules():
    assert format_energy(3_021_944.8) == "3.02 MJ"
    assert format_energy(0) == "0 J"
