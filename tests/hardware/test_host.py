"""What control groups leave is seen however they nest; the allocator is told once, a user's own word goes before."""

import subprocess
import sys
from pathlib import Path

import pytest

from headway.hardware.host import available_bytes, control_group_left, memory_bytes

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


def machine(root: Path, groups: str, files: dict[str, float | str]) -> Path:
    """A root folder with /proc/meminfo, these control groups of the process, and files below /sys/fs/cgroup."""
    written = {f"sys/fs/cgroup/{path}": str(content) for path, content in files.items()}
    written |= {"proc/self/cgroup": groups, "proc/meminfo": "MemTotal: 100 kB\nMemAvailable:   8 kB\n"}
    for path, content in written.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{content}\n")
    return root


def second(group: str, limit: float | str, used: float) -> dict[str, float | str]:
    return {f"{group}memory.max": limit, f"{group}memory.current": used}


def first(group: str, limit: float, used: float) -> dict[str, float | str]:
    return {f"memory/{group}memory.limit_in_bytes": limit, f"memory/{group}memory.usage_in_bytes": used}


UNLIMITED = 9223372036854771712  # as version 1 says it


@pytest.mark.parametrize(
    ("groups", "files", "left"),
    [
        ("0::/", {}, float("inf")),
        ("0::/", second("", 900, 400), 500),
        ("0::/job/step", second("job/step/", 5000, 100) | second("job/", 6000, 2000), 4000),
        ("0::/job/step", second("job/step/", "max", 100) | second("job/", 6000, 5000), 1000),
        ("0::/job/step", second("job/step/", 300, 100) | second("job/", "max", 100) | second("other/", 10, 10), 200),
        ("0::/docker/abc", second("", 900, 400), 500),
        ("0::/../elsewhere", second("", 900, 400), 500),
        ("5:cpu:/\n4:memory:/slurm/job", first("", UNLIMITED, 0) | first("slurm/job/", 5000, 4000), 1000),
        ("4:memory,hugetlb:/slurm/job\n0::/", first("slurm/", 5000, 4900) | first("slurm/job/", UNLIMITED, 0), 100),
    ],
)
def test_the_tightest_control_group_around_this_process_counts(tmp_path, groups, files, left):
    root = machine(tmp_path, groups, files)
    assert control_group_left(root) == left
    assert available_bytes(root) == min(8 * 1024, left)


def test_memory_is_read_where_there_is_a_proc_and_asked_of_the_system_elsewhere(tmp_path):
    assert memory_bytes("MemTotal") == memory_bytes("MemTotal", tmp_path)
    root = machine(tmp_path, "0::/", {})
    assert memory_bytes("MemTotal", root) == 100 * 1024
    assert memory_bytes("Mlocked", root) == 0
