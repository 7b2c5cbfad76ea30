"""The report is one self-contained page, true to the run directory, and says what a run did not leave."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from run_directory import MEASURED, PREDICTED, RANKS, synthetic_memory, synthetic_peaks, write_synthetic_run

from headway.errors import FileError
from headway.plan.plan import Plan
from headway.report.directory import read_directory
from headway.report.page import write_report
from headway.timeline import Span, Timeline
from headway.units import format_bytes, format_seconds

HOSTILE = "<img src=x onerror=alert(1)></script><script>alert('2')</script>\"&amp;"
VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Parses a page, and refuses tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.script = self.visible = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            self.script += data
        elif "style" not in self.open:
            self.visible += data
        if {"h1", "h2", "h3"} & set(self.open):
            self.headings[-1] += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        """The cells after the one that says `name`."""
        return next(row[1:] for row in self.rows if row and row[0].replace("\xa0", " ") == name)


def report(directory: Path) -> Page:
    return Page(write_report(directory).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with everything in it and its report, for tests that only read."""
    directory = write_synthetic_run(tmp_path_factory.mktemp("runs") / "synthetic-run")
    assert write_report(directory) == directory / "report.html"
    return directory


@pytest.fixture(scope="module")
def page(run) -> Page:
    """The report of a run with everything in it."""
    return Page((run / "report.html").read_text(encoding="utf-8"))


def test_the_report_is_one_small_file_that_asks_for_nothing(run, page):
    text = (run / "report.html").read_text(encoding="utf-8")
    assert len(text) < 2_000_000
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        for name in ("src", "srcset", "data", "action"):
            assert name not in attributes, (tag, attributes)
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert not re.search(r"https?://|@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(", text)


def test_every_part_is_there_and_in_order(page):
    assert page.headings[0] == "synthetic-run"
    expected = [
        "Predicted and measured",
        "A step, rank by rank",
        "Loss",
        "Throughput",
        "Memory of each rank",
        "Plans considered",
        "Model",
        "Machine",
        "The plan",
    ]
    assert [heading for heading in page.headings if heading in expected] == expected
    assert "Not everything is here" not in page.headings
    assert "finished after step 240" in page.visible
    assert "data 2" in page.visible


def test_the_page_can_be_used_without_seeing_it(run, page):
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) == 12  # six pictures, each at two widths
    assert all(picture.get("role") == "img" and picture.get("aria-label") for picture in pictures)
    assert ("html", {"lang": "en"}) in page.tags
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    labels = {attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes}
    assert labels <= set(identifiers)
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")
    for reference in re.findall(r"url\(#([^)]+)\)", (run / "report.html").read_text(encoding="utf-8")):
        assert reference in identifiers


def test_predicted_measured_and_error_are_those_of_the_files(page):
    for name, field in (
        ("Step", "step_seconds"),
        ("compute", "compute_seconds"),
        ("exposed communication", "communication_seconds"),
        ("bubble", "bubble_seconds"),
        ("optimizer", "optimizer_seconds"),
    ):
        predicted, measured = getattr(PREDICTED, field), getattr(MEASURED, field)
        error = (predicted - measured) / measured
        assert page.row(name) == [
            format_seconds(predicted),
            format_seconds(measured),
            f"{100 * error:+.1f} %".replace("-", "−"),
        ]
    peaks = synthetic_peaks()
    for rank in range(RANKS):
        predicted = synthetic_memory(rank).total_bytes
        cells = page.row(f"Memory, rank {rank}")
        assert cells[:2] == [format_bytes(predicted), format_bytes(peaks[rank])]


def test_layers_that_are_alike_share_a_line_and_the_sum_is_right(page):
    assert page.row("blocks.0 … blocks.5") == ["6", "4,718,592", "1.20 GFLOP", "2.40 GFLOP", "11.4 MB"]
    assert page.row("Together")[:2] == ["8", "4,849,664"]


def test_the_plan_on_the_page_is_the_plan_that_ran(run, page):
    begin = page.visible.index("{", page.visible.index("plan.json"))
    end = page.visible.rindex("}") + 1
    assert Plan.from_json(page.visible[begin:end]) == Plan.load(run / "plan.json")


def test_left_out_plans_come_with_their_reasons(page):
    assert page.row("one device, 1 x 32") == ["needs 512 MB on a device of 320 MB"]
    assert [row[0] for row in page.rows if "this run" in row[0]] != []


def test_both_timelines_are_drawn_on_one_scale(page):
    windows = [attributes["data-seconds"] for tag, attributes in page.tags if "data-seconds" in attributes]
    assert len(windows) == 4
    assert len(set(windows)) == 1


def test_hostile_names_stay_text(tmp_path):
    directory = write_synthetic_run(tmp_path / "run", model=HOSTILE)
    plan = Plan.load(directory / "plan.json")
    msgspec.structs.replace(plan, model=HOSTILE, devices=(HOSTILE, "b", "c", "d")).save(directory / "plan.json")
    record = json.loads((directory / "run.json").read_text())
    record |= {"outcome": "failed", "message": HOSTILE, "script": HOSTILE}
    record["reference_loss"]["label"] = HOSTILE
    (directory / "run.json").write_text(json.dumps(record))
    span = Span(name=HOSTILE, lane=f"{HOSTILE}/compute", start_seconds=0.0, duration_seconds=1.0, kind=HOSTILE)
    Timeline(name="", spans=(span,)).save_chrome(str(directory / "timeline.json"))
    page = report(directory)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not any(tag == "img" for tag, _ in page.tags)
    assert "onerror" not in page.script
    assert HOSTILE in page.visible
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


FILES = [
    "plan.json",
    "prediction.json",
    "metrics.jsonl",
    "measured.json",
    "timeline.json",
    "workload.json",
    "cluster.json",
]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(finished_run, name):
    (finished_run / name).unlink()
    page = report(finished_run)
    assert f"{name}: missing" in page.visible


@pytest.mark.parametrize("name", [*FILES, "ranking.json", "run.json", "predicted_timeline.json"])
def test_a_file_that_ends_in_the_middle_is_named_and_the_rest_is_shown(finished_run, name):
    path = finished_run / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 if name != "metrics.jsonl" else 30])
    page = report(finished_run)
    assert "Not everything is here" in page.headings
    assert f"{name}: " in page.visible


@pytest.mark.parametrize("name", FILES)
def test_one_file_alone_makes_a_page(finished_run, name):
    for path in finished_run.iterdir():
        if path.name != name:
            path.unlink()
    page = report(finished_run)
    assert page.visible.count(": missing") == len(FILES) - 1


def test_a_line_cut_short_costs_only_itself(finished_run):
    path = finished_run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:100]) + "\n" + lines[100][:20])
    page = report(finished_run)
    assert "metrics.jsonl: line 101 cannot be read" in page.visible
    assert read_directory(finished_run).metrics.steps == list(range(1, 101))


def test_a_resumed_run_counts_the_later_of_two_equal_steps(finished_run):
    lines = [{"step": step, "loss": float(step)} for step in (1, 2, 3)] + [{"step": 2, "loss": 9.0}]
    (finished_run / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    metrics = read_directory(finished_run).metrics
    assert metrics.steps == [1, 2, 3]
    assert metrics.loss == [1.0, 9.0, 3.0]


def test_losses_that_are_not_numbers_are_counted(finished_run):
    values = ["NaN", "2.0", "null", "Infinity", "1.0"]
    lines = [f'{{"step": {step}, "loss": {value}}}' for step, value in enumerate(values)]
    (finished_run / "metrics.jsonl").write_text("\n".join(lines))
    assert "In 3 steps the loss was missing or not a finite number." in report(finished_run).visible


def test_an_interrupted_run_says_so(finished_run):
    for name in ("measured.json", "timeline.json"):
        (finished_run / name).unlink()
    record = json.loads((finished_run / "run.json").read_text()) | {"outcome": "interrupted"}
    (finished_run / "run.json").write_text(json.dumps(record))
    page = report(finished_run)
    assert "interrupted after step 240" in page.visible
    assert page.row("Step")[1:] == ["–", "–"]


def test_a_folder_that_is_no_run_directory_is_refused_with_a_remedy(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FileError, match="not a run directory") as caught:
        write_report(tmp_path)
    assert caught.value.remedy
    with pytest.raises(FileError, match="no such folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(FileError, match="not a folder"):
        write_report(tmp_path / "notes.txt")
    assert not (tmp_path / "report.html").exists()


def test_a_folder_with_nothing_usable_is_refused_naming_the_files(tmp_path):
    (tmp_path / "plan.json").write_text('{"model": "x", "tensr": 2')
    (tmp_path / "timeline.json").write_text("[1]")
    with pytest.raises(FileError, match=r"plan\.json.*timeline\.json"):
        write_report(tmp_path)


def test_many_ranks_stay_readable(finished_run):
    ranks = 512
    prediction = json.loads((finished_run / "prediction.json").read_text())
    prediction["memory"] = prediction["memory"] * (ranks // RANKS)
    (finished_run / "prediction.json").write_text(json.dumps(prediction))
    spans = tuple(
        Span(name="f", lane=f"rank {rank}/compute", start_seconds=0.0, duration_seconds=1.0, kind="forward")
        for rank in range(ranks)
    )
    Timeline(name="", spans=spans).save_chrome(str(finished_run / "timeline.json"))
    path = write_report(finished_run)
    assert path.stat().st_size < 2_000_000
    visible = Page(path.read_text(encoding="utf-8")).visible
    assert "480 more ranks" in visible
    assert "416 more ranks not drawn" in visible
