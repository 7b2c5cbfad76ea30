"""The JSON that a benchmark leaves: what was run, when and on what, and then what came out."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

from headway.value import write_atomically

__all__ = ["new_record", "save_record"]


def new_record(seed: int | str, **versions: Any) -> dict[str, Any]:
    """What is known before: the command, the day, the processor, `versions` and numbers of it, the load, the seed."""
    return {
        "command": " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "hardware": {"processor": _processor(), **versions},
        "load_before": round(os.getloadavg()[0], 2),
        "seed": seed,
    }


def save_record(record: dict[str, Any], path: Path) -> None:
    """Write a record; what holds numbers and words alone, and is not long, is one line."""
    text = json.dumps(record, indent=1)
    text = re.sub(r"([\[{])\n([^\[\]{}]*?)\n *([\]}])", _on_one_line, text)
    write_atomically(path, text + "\n")


def _on_one_line(found: re.Match[str]) -> str:
    line = found[1] + re.sub(r"\n *", " ", found[2].strip()) + found[3]
    return line if len(line) <= 600 else found[0]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
