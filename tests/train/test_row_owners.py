"""The communication of replicas whose optimizer is off the device: a gradient's rows come to who updates them.

ZeRO-Offload (Ren et al., ATC 2021), section 4.2. How much is communicated: test_zero_formulas.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes


@pytest.mark.parametrize(("ranks", "backend"), [(3, "gloo"), (2, "headway")])
def test_each_replica_gets_the_mean_of_its_rows_of_any_gradients_in_any_buckets_and_pieces(
    tmp_path: Path, ranks: int, backend: str
) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    script = Path(__file__).with_name("row_owner_ranks.py")
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(ranks), str(tmp_path / "store"), backend],
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
