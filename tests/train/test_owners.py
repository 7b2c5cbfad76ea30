"""ZeRO-1's communication: a gradient comes to its owner, and an updated parameter to everybody.

Rajbhandari et al. (SC 2020), section 7.1. How much is communicated: test_zero_formulas.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes


def test_owners_get_the_mean_of_any_gradients_in_any_buckets_and_everybody_the_update(tmp_path: Path) -> None:
    ranks = 3
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    script = Path(__file__).with_name("owner_ranks.py")
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(ranks), str(tmp_path / "store")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * ranks, "\n".join(said)
