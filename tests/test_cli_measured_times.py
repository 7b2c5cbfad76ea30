"""The options of measured times: written once, the same for every verb that predicts."""

from __future__ import annotations

import inspect

import pytest

from headway.cli.measured_times import Times, Timing, formulas_only, with_measured_times
from headway.errors import FieldError, HeadwayError
from headway.hardware.catalog import preset

NAMES = ["profile", "timing", "profile_device", "profile_source", "scale_profile", "profile_cluster"]


@with_measured_times
def verb(first: int, times: Times = formulas_only, last: bool = False) -> tuple[int, Times, bool]:
    """Stands for a verb."""
    return first, times, last


def test_the_options_stand_where_the_parameter_stood():
    assert list(inspect.signature(verb).parameters) == ["first", *NAMES, "last"]
    assert set(verb.__annotations__) == {"first", *NAMES, "last", "return"}


def test_without_any_of_them_there_are_no_measured_times():
    first, times, last = verb(first=1, last=True, **dict.fromkeys(NAMES))
    assert (first, last) == (1, True)
    assert times(preset("dgx-1v")) is None
    assert formulas_only(preset("dgx-1v")) is None


def test_what_they_name_reaches_the_profile(tmp_path):
    given = dict.fromkeys(NAMES) | {"profile": tmp_path / "nothing.csv", "timing": Timing.linear}
    with pytest.raises(HeadwayError, match="no such file"):
        verb(first=1, **given)[1](preset("dgx-1v"))
    given["timing"] = Timing.catalog  # the formulas: no file is read
    assert verb(first=1, **given)[1](preset("dgx-1v")) is None


@pytest.mark.parametrize("timing", [None, Timing.catalog])
@pytest.mark.parametrize(
    ("option", "value"),
    [("profile_device", "V100"), ("profile_source", "us"), ("scale_profile", True), ("profile_cluster", "dgx-1v")],
)
def test_what_says_something_about_times_that_nobody_asked_for_is_refused(timing, option, value):
    given = dict.fromkeys(NAMES) | {option: value, "timing": timing}
    with pytest.raises(FieldError) as caught:
        verb(first=1, **given)
    assert caught.value.place == f"--{option.replace('_', '-')}"
    assert "--profile" in caught.value.remedy
    verb(first=1, **given | {"timing": Timing.learned})  # of the user's own database
