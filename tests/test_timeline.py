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


def meeting(one: Span, other: Span) -> float:
    """How long two spans share."""
    return min(one.stop_seconds, other.stop_seconds) - max(one.start_seconds, other.start_seconds)


# Whole seconds: sums are exact.
whole_spans = st.lists(
    st.builds(
        Span,
        name=st.sampled_from(["ALLREDUCE", "NEGOTIATE_ALLREDUCE", "NCCL_ALLREDUCE"]),
        lane=st.sampled_from(["layer1.weight", "layer1.bias", "layer2.weight"]),
        start_seconds=st.integers(0, 20).map(float),
        duration_seconds=st.integers(0, 8).map(float),
        detail=st.dictionaries(st.just("bytes"), st.integers(0, 100)),
    ),
    max_size=12,
).map(tuple)


@given(whole_spans)
def test_overlaps_are_found_where_two_spans_of_a_lane_share_time(spans):
    found = Timeline(name="step", spans=spans).overlaps()
    for first, second in found:
        assert first.lane == second.lane
        assert first.start_seconds <= second.start_seconds
        assert meeting(first, second) > 0
    exists = any(
        one.lane == other.lane and meeting(one, other) > 0
        for position, one in enumerate(spans)
        for other in spans[:position]
    )
    assert bool(found) == exists


@given(whole_spans)
def test_further_lanes_take_what_overlaps_and_nothing_else_changes(spans):
    before = Timeline(name="step", spans=spans)
    after = before.disjoint()
    assert after.overlaps() == []
    for old, new in zip(before.spans, after.spans, strict=True):
        assert new.lane.split(" (")[0] == old.lane
        assert (new.name, new.start_seconds, new.duration_seconds) == (
            old.name,
            old.start_seconds,
            old.duration_seconds,
        )
    if not before.overlaps():
        assert after == before
    # No more lanes than spans of one lane go on at the same moment.
    for lane in before.lanes():
        own = [span for span in spans if span.lane == lane]
        most = max(
            1
            + sum(other is not span and other.start_seconds <= span.start_seconds < other.stop_seconds for other in own)
            for span in own
        )
        assert len({span.lane for span in after.spans if span.lane.split(" (")[0] == lane}) <= most


def replayed(events):
    """What a viewer makes of Horovod's events: (process, name, start, stop, depth) of each activity."""
    names = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    stacks: dict[int, list] = {process: [] for process in names}
    times: dict[int, float] = dict.fromkeys(names, 0.0)
    seen = []
    for event in events:
        if event["ph"] == "M":
            continue
        process, at = event["pid"], event["ts"]
        assert at >= times[process], "events of a process must be in the order of time"
        times[process] = at
        if event["ph"] == "B":
            stacks[process].append((event["name"], at))
        elif event["ph"] == "E":
            name, start = stacks[process].pop()
            seen.append((names[process], name, start, at, len(stacks[process])))
        else:
            assert (event["ph"], event["dur"]) == ("X", 0)
            seen.append((names[process], event["name"], at, at, len(stacks[process])))
    assert not any(stacks.values()), "an activity never ends"
    return seen


@given(whole_spans)
def test_horovods_layout_has_every_span_once_in_a_process_for_its_tensor(spans):
    events = json.loads(Timeline(name="step", spans=spans).to_horovod())
    assert isinstance(events, list)
    seen = sorted((tensor.split(" (")[0], name, start, stop) for tensor, name, start, stop, _ in replayed(events))
    assert seen == sorted((span.lane, span.name, span.start_seconds * 1e6, span.stop_seconds * 1e6) for span in spans)
    processes = [event["pid"] for event in events if event.get("name") == "process_name"]
    assert processes == list(range(1, len(processes) + 1))
    assert processes == [event["pid"] for event in events if event.get("name") == "process_sort_index"]


def test_horovods_activities_stand_inside_the_operation_of_their_tensor(tmp_path):
    def span(name, start, stop, **detail):
        return Span(
            name=name,
            lane="grad",
            start_seconds=start,
            duration_seconds=stop - start,
            kind="communication",
            detail=detail,
        )

    timeline = Timeline(
        name="exchange",
        spans=(
            span("NCCL_ALLREDUCE", 4.0, 8.0),
            span("NEGOTIATE_ALLREDUCE", 0.0, 2.0),
            span("0", 0.0, 0.0),
            span("1", 1.0, 1.0),
            span("ALLREDUCE", 3.0, 9.0, dtype="float32"),
            span("MEMCPY_IN_FUSION_BUFFER", 3.0, 4.0),
            span("MEMCPY_OUT_FUSION_BUFFER", 8.0, 9.0),
        ),
    )
    path = tmp_path / "horovod.json"
    timeline.save_horovod(str(path))
    events = json.loads(path.read_text())
    assert {event["args"]["name"] for event in events if event.get("name") == "process_name"} == {"grad"}
    assert {(name, depth) for _, name, _, _, depth in replayed(events)} == {
        ("NEGOTIATE_ALLREDUCE", 0),
        ("0", 1),
        ("1", 1),
        ("ALLREDUCE", 0),
        ("MEMCPY_IN_FUSION_BUFFER", 1),
        ("NCCL_ALLREDUCE", 1),
        ("MEMCPY_OUT_FUSION_BUFFER", 1),
    }
    begin = next(event for event in events if event["ph"] == "B" and event["name"] == "ALLREDUCE")
    assert begin["args"] == {"dtype": "float32"}
