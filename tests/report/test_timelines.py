"""A timeline's picture: each span where its times say, in its own words, and how much of the time is waiting."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.report import timelines
from headway.timeline import Span, Timeline

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '<script>alert(1)</script> & "x" \' $x$ \x00\x1b 模型'


def span(name="work", lane="rank 0/compute", start=0.0, duration=1.0, kind="forward", **detail) -> Span:
    return Span(name=name, lane=lane, start_seconds=start, duration_seconds=duration, kind=kind, detail=detail)


def test_every_span_of_a_timeline_is_a_bar_with_its_name_and_duration_as_title():
    timeline = Timeline(
        name="t",
        spans=(
            span("first", duration=0.0123, micro_batch=3),
            span("second", lane="rank 1/compute", start=0.0123, duration=0.002, kind="backward"),
            span("unheard of", start=0.5, duration=0.1, kind="new kind"),
        ),
    )
    root = ElementTree.fromstring(timelines.timeline_svg(timeline))
    titles = [title.text or "" for title in root.iter(SVG + "title")]
    assert [title.splitlines()[0] for title in titles] == ["first", "second", "unheard of"]
    assert "12.3 ms" in titles[0]
    assert "micro_batch: 3" in titles[0]
    assert "rank 1/compute" in titles[1]


def test_names_of_spans_and_lanes_are_text_and_nothing_else():
    timeline = Timeline(name="t", spans=(span(HOSTILE, lane=f"{HOSTILE}/{HOSTILE}", note=HOSTILE),))
    root = ElementTree.fromstring(timelines.timeline_svg(timeline))
    assert not list(root.iter(SVG + "script"))
    title = next(root.iter(SVG + "title")).text or ""
    assert title.startswith('<script>alert(1)</script> & "x" \' $x$    模型')


def test_bars_lie_where_their_times_say():
    timeline = Timeline(name="t", spans=(span(start=1.0, duration=1.0), span(start=3.0, duration=2.0)))
    root = ElementTree.fromstring(timelines.timeline_svg(timeline, start_seconds=0.0, window_seconds=10.0))
    left, right = float(root.attrib["data-left"]), float(root.attrib["data-right"])
    assert float(root.attrib["data-seconds"]) == 10.0
    bars = [path for path in root.iter(SVG + "path") if path.find(SVG + "title") is not None]
    for bar, (start, stop) in zip(bars, [(1.0, 2.0), (3.0, 5.0)], strict=True):
        # "M x y  L x y  …": every second number is an x.
        numbers = [float(word) for word in bar.attrib["d"].split() if word not in ("M", "L", "z")]
        assert min(numbers[::2]) == pytest.approx(left + start / 10 * (right - left), abs=1e-3)
        assert max(numbers[::2]) == pytest.approx(left + stop / 10 * (right - left), abs=1e-3)


def test_a_timeline_of_too_many_spans_is_merged_and_loses_no_time():
    count = 20_000
    timeline = Timeline(name="t", spans=tuple(span(start=i * 1e-4, duration=0.9e-4) for i in range(count)))
    svg = timelines.timeline_svg(timeline)
    root = ElementTree.fromstring(svg)
    titles = [title.text or "" for title in root.iter(SVG + "title")]
    assert len(titles) < 3000
    assert len(svg) < 1_000_000
    assert titles[0].startswith(f"{count} x forward")


def test_an_empty_timeline_is_an_empty_picture():
    ElementTree.fromstring(timelines.timeline_svg(Timeline(name="nothing")))


def test_ranks_sort_as_numbers_and_compute_comes_first():
    lanes = ["rank 10/compute", "rank 2/communication", "rank 2/compute", "rank 2/a"]
    assert sorted(lanes, key=timelines.lane_order) == [
        "rank 2/compute",
        "rank 2/a",
        "rank 2/communication",
        "rank 10/compute",
    ]


def test_bubble_share_is_the_time_without_work():
    timeline = Timeline(
        name="t",
        spans=(
            span(start=0.0, duration=4.0),
            span(start=2.0, duration=4.0, lane="rank 0/communication", kind="communication"),  # overlaps
            span(start=0.0, duration=10.0, lane="rank 1/compute"),
            span(start=6.0, duration=4.0, lane="rank 0/communication", kind="idle"),
        ),
    )
    assert timelines.bubble_share(timeline) == pytest.approx(4 / 20)
    assert timelines.bubble_share(Timeline(name="nothing")) == 0.0


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 10), st.integers(0, 2)), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_bubble_share_agrees_with_counting_seconds(pieces):
    spans = tuple(
        span(start=float(start), duration=float(length), lane=f"rank {rank}/compute") for start, length, rank in pieces
    )
    timeline = Timeline(name="t", spans=spans)
    stop = int(timeline.stop_seconds)
    ranks = {rank for _, _, rank in pieces}
    idle = sum(
        not any(rank == other and start <= second < start + length for start, length, other in pieces)
        for rank in ranks
        for second in range(stop)
    )
    assert timelines.bubble_share(timeline) == pytest.approx(idle / (len(ranks) * stop))
