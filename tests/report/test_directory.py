"""What is read of a run directory, apart from how a page shows it."""

from __future__ import annotations

import json
import string

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_directory import STEPS, synthetic_plan, synthetic_workload

from headway.errors import FieldError
from headway.report.directory import Reference, read_directory, steps_to_show
from headway.timeline import Span, Timeline

words = st.text(string.ascii_letters + " <&\u00e9", min_size=1, max_size=8)
spans = st.builds(
    Span,
    name=words,
    lane=st.builds("{}/{}".format, words, st.just("work")),
    start_seconds=st.floats(0, 100),
    duration_seconds=st.floats(0, 10),
    kind=st.sampled_from(["", "forward", "communication"]),
    detail=st.dictionaries(words, st.integers() | words, max_size=2),
)


def test_everything_a_finished_run_leaves_is_read(finished_run):
    run = read_directory(finished_run)
    assert run.gaps == []
    assert run.name == "synthetic-run"
    assert run.plan == synthetic_plan()
    assert run.metrics is not None
    assert run.metrics.steps == list(range(1, STEPS + 1))
    assert run.model is not None
    assert [layer.name for layer in run.model.graph.layers] == [x.name for x in synthetic_workload().graph.layers]
    assert run.ranking is not None
    assert run.ranking.best[0].plan == run.plan


def test_a_record_with_more_fields_than_are_known_is_still_read(finished_run):
    path = finished_run / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"something new": [1, 2]}))
    run = read_directory(finished_run)
    assert run.gaps == []
    assert run.record is not None
    assert run.record.outcome == "finished"


def test_a_line_of_the_metrics_may_bring_a_loss_to_compare_with(finished_run):
    line = {"step": 1, "loss": 2.0, "reference_loss": {"label": "entropy", "value": 3.5}}
    (finished_run / "metrics.jsonl").write_text(json.dumps(line))
    metrics = read_directory(finished_run).metrics
    assert metrics is not None
    assert metrics.reference_loss == Reference("entropy", 3.5)


@given(st.lists(spans, max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_timeline_comes_back_from_its_chrome_trace(spans):
    before = Timeline(name="t", spans=tuple(spans))
    after = Timeline.from_chrome(before.to_chrome(), name="t")
    assert len(after.spans) == len(before.spans)
    for new, old in zip(after.spans, before.spans, strict=True):
        assert (new.name, new.lane, new.kind, new.detail) == (old.name, old.lane, old.kind, old.detail)
        assert new.start_seconds == pytest.approx(old.start_seconds, abs=1e-9)
        assert new.duration_seconds == pytest.approx(old.duration_seconds, abs=1e-9)


@pytest.mark.parametrize("text", ["{", "[1]", "3", "{}", '{"traceEvents": [{"ph": "X", "ts": "soon"}]}'])
def test_what_is_no_trace_is_refused_with_its_place(text):
    with pytest.raises(FieldError) as caught:
        Timeline.from_chrome(text, place="timeline.json")
    assert caught.value.place == "timeline.json"


def test_the_last_whole_step_is_shown():
    spans = [
        Span(name="f", lane="r/c", start_seconds=float(step), duration_seconds=0.5, detail={"step": step})
        for step in range(5)
    ]
    assert steps_to_show(Timeline(name="", spans=tuple(spans))) == ("step 4", 4.0, 4.5)
    assert steps_to_show(Timeline(name="", spans=tuple(spans)), steps=2) == ("steps 3 to 4", 3.0, 4.5)
    bare = Timeline(name="", spans=tuple(msgspec.structs.replace(span, detail={}) for span in spans))
    assert steps_to_show(bare) == ("the recording", 0.0, 4.5)
    assert steps_to_show(bare, step_seconds=1.0) == ("the end of the recording", 3.5, 4.5)
    assert steps_to_show(Timeline(name="")) is None
