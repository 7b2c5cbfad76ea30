"""What `headway plan --export` leaves: files in a folder, and the text that says how to use them."""

from __future__ import annotations

import shlex
from pathlib import Path

from headway.plan.export import Exported
from headway.value import write_atomically

__all__ = ["exported_text", "write_exported"]


def write_exported(exported: Exported, folder: str | Path) -> tuple[Path, ...]:
    """Write the files of a plan in another framework's words into `folder`. Raises FileError."""
    paths = []
    for name, text in exported.files.items():
        path = Path(folder) / name
        write_atomically(path, text)
        paths.append(path)
    return tuple(paths)


def exported_text(exported: Exported, folder: str | Path) -> str:
    """The best plan for the framework: its flags, where its files are, and what is left to the user."""
    lines = [f"For {exported.framework}:"]
    if exported.flags:
        lines.append(shlex.join(exported.flags))
    lines += [str(Path(folder) / name) for name in exported.files]
    lines += [f"- {note}" for note in exported.notes]
    return "\n".join(lines)
