"""torch knows the backend by itself, and nothing is loaded for it before it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, torch
import torch.distributed as dist
assert "headway" in dist.Backend.backend_list, dist.Backend.backend_list
assert "headway.exchange.process_group" not in sys.modules
dist.init_process_group("headway", store=dist.HashStore(), rank=0, world_size=1)
x = torch.arange(3.0)
dist.all_reduce(x)
assert x.tolist() == [0.0, 1.0, 2.0]
print(type(dist.group.WORLD).__name__)
"""


@pytest.mark.processes
def test_a_script_that_imports_nothing_of_headway_can_use_the_backend(tmp_path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "HeadwayProcessGroup"
