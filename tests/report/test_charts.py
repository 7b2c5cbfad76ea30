"""Pictures are valid SVG, say what they show, and carry their colours as roles."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_directory import MEASURED, PREDICTED, synthetic_memory, synthetic_timeline

from headway.report import charts, timelines

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '<script>alert(1)</script> & "x" \' $x$ \x00\x1b 模型'

PICTURES = {
    "timeline": lambda width: timelines.timeline_svg(synthetic_timeline("t"), width=width),
    "loss": lambda width: charts.loss_svg([1, 2, 3], [3.0, 2.0, 1.5], reference=(HOSTILE, 2.5), width=width),
    "throughput": lambda width: charts.throughput_svg([1, 2], [10.0, 12.0], reference=("predicted", 13.0), width=width),
    "comparison": lambda width: charts.comparison_svg(PREDICTED, MEASURED, width=width),
    "memory": lambda width: charts.memory_svg({0: synthetic_memory(0)}, {0: 2.3e8, 1: 1e8}, width=width),
}


@pytest.mark.parametrize("width", [charts.WIDE, charts.NARROW])
@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_valid_xml_and_refers_to_nothing_outside(name, width):
    svg = PICTURES[name](width)
    root = ElementTree.fromstring(svg)
    assert root.tag == SVG + "svg"
    assert float(root.attrib["width"]) == pytest.approx(width)
    for element in root.iter():
        for key, value in element.attrib.items():
            assert "://" not in value, (key, value)
    assert "url(http" not in svg


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_the_same_each_time(name):
    assert PICTURES[name](charts.WIDE) == PICTURES[name](charts.WIDE)


@pytest.mark.parametrize("name", PICTURES)
def test_an_inlined_picture_has_prefixed_identifiers_and_no_literal_colours(name):
    inlined = charts.inline_svg(PICTURES[name](charts.WIDE), label='says "so" <now>', prefix="p-")
    root = ElementTree.fromstring(inlined)
    assert root.get("role") == "img"
    assert root.get("aria-label") == 'says "so" <now>'
    identifiers = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(set(identifiers)) == len(identifiers)
    assert all(identifier.startswith("p-") for identifier in identifiers)
    assert not list(root.iter("style"))
    for element in root.iter():
        style = element.get("style", "")
        for colour in style.split("#")[1:]:
            assert colour[6] == ")", f"{style}: a colour that the dark page cannot change"


def test_palettes_give_every_role_a_colour_of_its_own():
    assert set(charts.PALETTE) == set(charts.PALETTE_DARK)
    assert len(set(charts.PALETTE.values())) == len(charts.PALETTE)
    roles = {role for role, _ in (*charts.KINDS.values(), *charts.TIME_PARTS.values(), *charts.MEMORY_KINDS.values())}
    assert roles <= set(charts.PALETTE)


def test_curves_of_nothing_and_of_one_point_can_be_drawn():
    for steps, values in (([], []), ([1], [2.0]), ([1, 2], [math.nan, math.inf])):
        ElementTree.fromstring(charts.loss_svg(steps, values))


def test_a_long_curve_stays_small():
    steps = list(range(100_000))
    assert len(charts.loss_svg(steps, [1 / (1 + step) for step in steps])) < 300_000


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=300))
@settings(max_examples=60, deadline=None)
def test_smoothing_keeps_constants_and_stays_within_the_values(values):
    smooth = charts.smoothed(values)
    assert len(smooth) == len(values)
    assert min(values) - 1e-6 <= min(smooth)
    assert max(smooth) <= max(values) + 1e-6
    assert charts.smoothed([values[0]] * len(values)) == pytest.approx([values[0]] * len(values))


def test_a_picture_can_be_saved_as_png(tmp_path):
    path = tmp_path / "timeline.png"
    charts.save_png(timelines.timeline_figure(synthetic_timeline("t"), width=600), path, scale=1.0)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") == 600
