"""The house stands: no import runs upward, no two rooms of one floor know each other, no import goes in circles."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOUSE = ROOT / "src" / "headway"


def floors() -> list[set[str]]:
    """The rooms of each floor, from the top, as the import contract in pyproject.toml lists them."""
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = configuration["tool"]["importlinter"]["contracts"]
    return [{room.strip("() ") for room in floor.replace(":", "|").split("|")} for floor in contract["layers"]]


def test_every_import_goes_down():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_room_stands_on_a_floor():
    rooms = {path.stem for path in HOUSE.glob("*.py")} | {path.parent.name for path in HOUSE.glob("*/__init__.py")}
    rooms = {room for room in rooms if not room.startswith("_")}
    assert rooms == set().union(*floors())


def test_errors_are_the_ground_that_everything_stands_on():
    assert floors()[-1] == {"errors"}
