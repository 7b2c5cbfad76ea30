"""Spans on lanes, and the trace that Perfetto opens."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.timeline import Span, Timeline

spans = st.lists(
    st.builds(
        Span,
        name=st.sampled_from(["forward", "backward", "all_reduce"]),
        lane=st.sampled_from(["rank 0/compute", "rank 0/communication", "rank 1/compute", "disk"]),
        start_seconds=st.floats(0, 1e3),
        duration_seconds=st.floats(0, 1e3),
        detail=st.dictionaries(st.sampled_from(["layer", "bytes"]), st.integers(0, 100)),
    ),
    max_size=20,
).map(tuple)


def test_an_empty_timeline_ends_at_zero():
    assert Timeline(name="empty").stop_seconds == 0.0
    assert Timeline(name="empty").lanes() == ()


@given(spans)
def test_a_shift_moves_every_span_and_nothing_else(spans):
    before = Timeline(name="step", spans=spans)
    after = before.shifted(2.0)
    assert after.lanes() == before.lanes()
    for old, new in zip(before.spans, after.spans, strict=True):
        assert new.start_seconds == old.start_seconds + 2.0
        assert (new.name, new.lane, new.duration_seconds) == (old.name, old.lane, old.duration_seconds)


@given(spans)
def test_the_chrome_trace_holds_each_span_once_in_microseconds_on_its_own_thread(spans):
    timeline = Timeline(name="step", spans=spans)
    events = json.loads(timeline.to_chrome())["traceEvents"]
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) == len(spans)
    assert len(threads) == len(timeline.lanes())
    for span, event in zip(spans, complete, strict=True):
        assert event["ts"] == pytest.approx(span.start_seconds * 1e6)
        assert event["dur"] == pytest.approx(span.duration_seconds * 1e6)
        assert processes[event["pid"]] == span.lane.split("/")[0]
        assert threads[event["tid"]] == span.lane.split("/")[-1]
        assert event["args"] == span.detail


def test_a_trace_is_saved_as_one_json_file(tmp_path):
    span = Span(name="forward", lane="rank 0/compute", start_seconds=1, duration_seconds=2, kind="forward")
    path = tmp_path / "timeline.json"
    Timeline(name="step", spans=(span,)).save_chrome(str(path))
    assert json.loads(path.read_text())["displayTimeUnit"] == "ms"
    assert span.stop_seconds == 3.0
