"""What pages of pictures do: escape what users named, ask nothing of the network, name what they cannot draw."""

from __future__ import annotations

import re

from matplotlib.figure import Figure

from headway.errors import InputError
from headway.report.charts import loss_figure
from headway.report.picture_page import Drawing, write_picture_page

HOSTILE = "<script>alert(1)</script>"


def write(tmp_path, drawings: list[Drawing]) -> str:
    path = write_picture_page(
        tmp_path / "page.html", "schedule.html", drawings, title=HOSTILE, kicker="Headway test", lead=HOSTILE,
        facts=[HOSTILE], head=["a"], rows=[[HOSTILE]], legend="", problems=[],
    )  # fmt: skip
    return path.read_text(encoding="utf-8")


def test_what_a_user_named_stays_text(tmp_path):
    page = write(tmp_path, [(HOSTILE, HOSTILE, lambda width: loss_figure([1, 2], [2.0, 1.0], width=width))])
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 6
    assert page.count("<svg") == 2  # one for a desk, one for a phone


def test_nothing_is_fetched(tmp_path):
    page = write(tmp_path, [("loss", "", lambda width: loss_figure([1, 2], [2.0, 1.0], width=width))])
    assert not re.findall(r"(?:src|href)=\"(?!#)[^\"]+\"", page)
    assert "@import" not in page


def test_a_picture_that_cannot_be_drawn_is_named_and_the_others_stand(tmp_path):
    def refuse(width: float) -> Figure:
        raise InputError("too many kinds of ranks", place="picture", remedy="ask for fewer")

    page = write(tmp_path, [("a step", "", refuse), ("loss", "", lambda width: loss_figure([1], [2.0], width=width))])
    assert "a step: too many kinds of ranks." in page
    assert page.count("<figure") == 1
