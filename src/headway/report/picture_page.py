"""A page of tables and pictures: what the pages of a plan and of a study of policies have in common."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from headway.errors import InputError
from headway.report import charts
from headway.report.page import packaged, variables
from headway.value import write_atomically

__all__ = ["Drawing", "write_picture_page"]

Drawing = tuple[str, str, Callable[[float], Figure]]
"""A title, a caption, and what draws the picture at a width in CSS pixels."""


def write_picture_page(
    path: str | Path, template: str, drawings: Sequence[Drawing], *, title: str, kicker: str, **fields: Any
) -> Path:
    """Write one self-contained HTML page from a packaged `template` that extends `pictures.html`; returns its path.

    `kicker`: the verb, above the title. `fields`: what the template's own tables show. Pictures that cannot be drawn
    (InputError) are named on the page. Raises FileError.
    """
    pictures, notes = _drawn(drawings)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FunctionLoader(packaged),
    )  # fmt: skip
    page = environment.get_template(template).render(
        style=Markup(variables() + packaged("page.css")),
        title=title,
        kicker=kicker,
        pictures=pictures,
        notes=notes,
        version=metadata.version("headway"),
        written=f"{datetime.datetime.now(datetime.UTC):%d %B %Y}",
        **fields,
    )
    write_atomically(path, page)
    return Path(path)


def _drawn(drawings: Sequence[Drawing]) -> tuple[list[dict[str, Any]], list[str]]:
    pictures: list[dict[str, Any]] = []
    notes: list[str] = []
    for number, (title, caption, draw) in enumerate(drawings):
        try:
            made = {
                size: Markup(charts.inline_svg(charts.to_svg(draw(width)), label=title, prefix=f"p{number}-{size}-"))
                for size, width in (("wide", charts.WIDE), ("narrow", charts.NARROW))
            }
        except InputError as error:
            notes.append(f"{title}: {error.message}.")
        else:
            pictures.append({"title": title, "caption": caption, **made})
    return pictures, notes
