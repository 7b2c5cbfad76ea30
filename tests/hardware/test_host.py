"""The allocator is told once, and a user's own word goes before."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
from headway.hardware.host import keep_freed_memory
print(keep_freed_memory())
import torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(2_000_000).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def run(**variables: str) -> list[str]:
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_freed_memory_is_used_again_without_touching_the_kernel():
    told, faults = run()
    if told == "False":
        pytest.skip("the C library here is not glibc")
    assert int(faults) < 200  # 20 tensors of 8 MB are 39,000 pages


def test_the_users_own_thresholds_go_before():
    told, faults = run(MALLOC_MMAP_THRESHOLD_="1048576", MALLOC_TRIM_THRESHOLD_="1048576")
    assert told == "False"
    assert int(faults) > 20  # freed memory went back, as asked for
