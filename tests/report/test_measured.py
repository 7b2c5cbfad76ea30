"""The picture of a measured curve."""

from __future__ import annotations

import pytest

from headway.errors import InputError
from headway.predict.inspection import MeasuredCurve, ProfileEntry
from headway.report.measured import measured_figure, write_measured_picture


@pytest.fixture
def curve() -> MeasuredCurve:
    entry = ProfileEntry(
        device="V100", operation="all_reduce", dtype="float32", mesh="1x8", group_size=8, unit="bytes", points=4,
        failed=1, smallest=0.0, largest=4096.0, source="test",
    )  # fmt: skip
    return MeasuredCurve(
        entry=entry,
        sizes=(0.0, 64.0, 512.0, 4096.0),
        seconds=(1e-6, 1e-5, None, 4e-5),
        fitted={"linear": (1e-6, -1e-6, 2e-5, 4e-5), "learned": (1e-6, 1e-5, 2e-5, 4e-5)},
        error={"linear": 1.1, "learned": 0.0},
        low_seconds=(1e-6, 9e-6, 1e-5, 3e-5),
        high_seconds=(1e-6, 2e-5, 3e-5, 5e-5),
    )


def test_points_and_fits_are_drawn_and_what_failed_is_not(curve):
    axes = measured_figure(curve).axes[0]
    drawn = {line.get_label(): list(line.get_xdata()) for line in axes.get_lines()}
    assert drawn["measured"] == [64.0, 4096.0]
    assert drawn["linear, 110.0% off"] == [512.0, 4096.0]  # below zero at 64 bytes
    assert drawn["learned, 0.0% off"] == [64.0, 512.0, 4096.0]


@pytest.mark.parametrize(("ending", "begins"), [(".png", b"\x89PNG"), (".svg", b"<")])
def test_pictures_are_written_as_their_ending_says(curve, tmp_path, ending, begins):
    write_measured_picture(curve, tmp_path / f"curve{ending}")
    assert (tmp_path / f"curve{ending}").read_bytes().startswith(begins)


def test_another_ending_is_refused(curve, tmp_path):
    with pytest.raises(InputError):
        write_measured_picture(curve, tmp_path / "curve.gif")
