"""A picture as a file, SVG or PNG by its ending."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from headway.errors import InputError
from headway.report import charts
from headway.value import write_atomically

__all__ = ["picture_path", "save"]


def picture_path(path: str | Path) -> Path:
    """The path, if it ends like a picture: to be asked before anything is drawn. Raises InputError if not."""
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise InputError(
            f"{path.suffix or 'no ending'!r} is no kind of picture", place=str(path), remedy=".png or .svg"
        )
    return path


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as `.svg` or `.png`. Raises InputError for another ending, FileError."""
    path = picture_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        charts.save_png(figure, path)
    else:
        write_atomically(path, charts.to_svg(figure))
    return path
