"""The picture of a run: the measured step above the predicted one, on one time axis."""

import pytest

from headway.errors import FileError, InputError
from headway.report.picture import write_picture


def test_an_svg_names_measured_and_predicted_ranks(finished_run, tmp_path):
    text = write_picture(finished_run, tmp_path / "pictures" / "step.svg").read_text()
    assert "measured, rank 0" in text
    assert "predicted, rank 0" in text


def test_a_png_is_a_png(finished_run, tmp_path):
    assert write_picture(finished_run, tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_another_kind_of_picture_is_refused_by_its_ending(finished_run, tmp_path):
    with pytest.raises(InputError, match="gif"):
        write_picture(finished_run, tmp_path / "step.gif")


def test_a_run_without_a_step_has_no_picture(finished_run, tmp_path):
    (finished_run / "timeline.json").unlink()
    for name in ("predicted_timeline.json", "predicted-timeline.json"):
        (finished_run / name).unlink(missing_ok=True)
    with pytest.raises(FileError, match="no timeline"):
        write_picture(finished_run, tmp_path / "step.png")
