"""One picture of a run, for a README or a slide: a step as measured above the same step as predicted."""

from __future__ import annotations

from pathlib import Path

import msgspec

from headway.errors import FileError
from headway.report import timelines
from headway.report.directory import read_directory, steps_to_show
from headway.report.saving import picture_path, save
from headway.timeline import Span, Timeline

__all__ = ["write_picture"]


def write_picture(run_directory: str | Path, path: str | Path) -> Path:
    """Draw the run's last measured step and the predicted one on one time axis, as PNG or SVG by the file's ending.

    Raises FileError if the folder holds no run or no timeline, InputError for another kind of file.
    """
    path = picture_path(path)
    run = read_directory(run_directory)
    spans: list[Span] = []
    for name, timeline, prediction in (
        ("measured", run.timeline, run.measured),
        ("predicted", run.predicted_timeline, run.prediction),
    ):
        seconds = prediction.time.step_seconds if prediction and prediction.time else 0.0
        found = steps_to_show(timeline, step_seconds=seconds) if timeline else None
        if timeline is not None and found is not None:
            spans.extend(_within(timeline, *found[1:], name))
    if not spans:
        raise FileError(
            "has no timeline to draw", place=str(run_directory), remedy="give a run that trained some steps"
        )
    figure = timelines.timeline_figure(Timeline(name="step", spans=tuple(spans)))
    return save(figure, path)


def _within(timeline: Timeline, start: float, stop: float, name: str) -> list[Span]:
    """The spans that touch a window, cut to it and moved to its beginning, on lanes of `name`."""
    found = []
    for span in timeline.spans:
        first, last = max(span.start_seconds, start), min(span.stop_seconds, stop)
        if last > first:
            found.append(
                msgspec.structs.replace(
                    span, lane=f"{name}, {span.lane}", start_seconds=first - start, duration_seconds=last - first
                )
            )
    return found
