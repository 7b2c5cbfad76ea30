"""Tables of a validation fit the terminal and say its figures; the scatter is a picture of every row."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree

import numpy
import pytest
from rich.console import Console

from headway.errors import InputError
from headway.predict.validation import Comparison, PlanGroup, Validation
from headway.report.validation import scatter_figure, validation_tables, write_scatter


def comparison(line: int, measured: float | None = 10.0, predicted: float = 11.0, **fields) -> Comparison:
    values = {
        "source": "somewhere/with-a-very-long-name docs/and/an/even/longer/path-to-the-document.md @1234567",
        "model": "Model-with-a-name-that-does-not-end-soon-1234567890 (and more)",
        "hardware": "H100-SXM-96GB-HBM2e-500W",
        "devices": 1024,
        "scope": "several nodes",
        "kind": "tensor+pipeline+context+expert+ZeRO-3",
        "plan": "data 8 x tensor 8 x context 2 x pipeline 8x8, sequence parallel, ZeRO-1, 192 x 1 (interleaved)",
        "fitted": line % 2 == 0,
    }
    return Comparison(
        **{**values, "line": line, "measured_seconds": measured, "predicted_seconds": predicted, **fields}
    )


@pytest.fixture
def validation() -> Validation:
    rows = (
        comparison(2),
        comparison(3, 8.0, 4.0, hardware="T4"),
        comparison(4, 3.0, 3.0, measured_bytes=4e10, predicted_bytes=5e10, kind="data"),
        comparison(5, None, 3.0, ran_out_of_memory=True, predicted_to_fit=False),
        comparison(6, None, failed="plan: cannot be\nsaid"),
    )
    group = PlanGroup(
        model="m" * 60, source="s", hardware="H100-SXM-96GB-HBM2e-500W", devices=1024, global_batch=64, fitted=False,
        plans=3, chosen="one", best="another", rank_correlation=0.5, regret=0.125,
    )  # fmt: skip
    return Validation(rows=rows, groups=(group,), skipped=((9, "s", ("hidden: missing",)),))


def printed(validation: Validation) -> str:
    console = Console(file=io.StringIO(), width=100, highlight=False)
    for table in validation_tables(validation, worst=2):
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_tables_fit_a_hundred_columns_and_say_the_figures(validation):
    text = printed(validation)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    for figure in ("50.0%", "+10.0%", "+25.0%", "12.5%", "0.50", "1 of 1", "hidden: missing", "plan: cannot be"):
        assert figure in text, figure


def test_only_as_many_worst_rows_are_listed_as_asked_and_the_worst_is_first(validation):
    text = printed(validation)
    worst = text[text.index("Worst rows: step time") : text.index("Error of peak memory")]
    assert worst.index("-50.0%") < worst.index("+10.0%")
    assert "+0.0%" not in worst


def test_an_empty_validation_has_a_table_and_no_picture():
    empty = Validation(rows=())
    assert "rows" in printed(empty)
    with pytest.raises(InputError, match="step time"):
        scatter_figure(empty)


def test_a_scatter_names_every_kind_of_hardware(validation, tmp_path):
    path = write_scatter(validation, tmp_path / "scatter.svg")
    text = "".join(ElementTree.parse(path).getroot().itertext())
    for word in ("T4", "H100-SXM-96GB-HBM2e-500W", "measured step time", "predicted step time", "held out"):
        assert word in text
    assert "memory" in "".join(
        ElementTree.parse(write_scatter(validation, tmp_path / "m.svg", "memory")).getroot().itertext()
    )


def test_a_scatter_has_a_point_for_each_row_with_both_figures(validation):
    points = [numpy.shape(found.get_offsets())[0] for found in scatter_figure(validation).axes[0].collections[1:]]
    assert sum(points) == 3


def test_pictures_are_written_by_the_ending_of_the_file(validation, tmp_path):
    assert write_scatter(validation, tmp_path / "scatter.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="no kind of picture"):
        write_scatter(validation, tmp_path / "scatter.gif")
