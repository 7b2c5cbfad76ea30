"""Fixtures of the report's tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# pytest's importlib mode gives test modules no package to import their neighbours from.
sys.path.insert(0, str(Path(__file__).parent))

from run_directory import write_synthetic_run


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    """A run directory with everything in it, which a test may damage."""
    return write_synthetic_run(tmp_path / "synthetic-run")
