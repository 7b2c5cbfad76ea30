"""Code that several processes keep at once is found again, each version under its own key."""

from __future__ import annotations

import subprocess
import sys
import textwrap

KERNELS = """
from headway.compiled import compiled

def times(factor):
    @compiled()
    def product(number):
        return number * factor
    return product
"""
# Between reading the index and writing it back each process waits, as it might on a slow disk.
KEEP = """
import sys, time
from pathlib import Path
from numba.core.caching import IndexDataCacheFile
from headway import compiled
import kernels

factor, ready = int(sys.argv[1]), [Path(name) for name in sys.argv[2:]]
load, save = IndexDataCacheFile._load_index, compiled._Cache.save_overload

def slow(self):
    found = load(self)
    time.sleep(0.5)
    return found

def together(self, sig, data):
    ready[0].touch()
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in ready) and time.monotonic() < deadline:
        time.sleep(0.01)
    IndexDataCacheFile._load_index = slow
    save(self, sig, data)

compiled._Cache.save_overload = together
assert kernels.times(factor)(10) == 10 * factor
"""
LOOK = """
import kernels

for factor in (2, 3):
    product = kernels.times(factor)
    assert product(10) == 10 * factor
    assert sum(product.stats.cache_hits.values()) == 1, f"the product by {factor} was not kept"
"""


def test_versions_that_two_processes_keep_at_once_are_both_kept(tmp_path):
    (tmp_path / "kernels.py").write_text(textwrap.dedent(KERNELS))
    ready = [str(tmp_path / f"ready-{factor}") for factor in (2, 3)]

    def run(program: str, *arguments: list[str]) -> None:
        processes = [
            subprocess.Popen([sys.executable, "-c", program, *each], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
            for each in arguments
        ]
        for process in processes:
            assert process.communicate(timeout=120)[1] == ""
            assert process.returncode == 0

    run(KEEP, ["2", *ready], ["3", *reversed(ready)])
    run(LOOK, [])


def test_machine_code_is_made_anew_when_what_it_calls_or_reads_in_another_file_has_changed(tmp_path):
    (tmp_path / "outer.py").write_text(
        "from headway.compiled import compiled\nfrom inner import twice, OFFSET\n\n"
        "@compiled()\ndef both(number):\n    return twice(number) + OFFSET\n"
    )

    def answer(factor: int, offset: int) -> tuple[int, int]:
        """The answer, and how often kept code was found, with an inner file that says so."""
        inner = f"from headway.compiled import compiled\n\nOFFSET = {offset}\n\n"
        inner += f"@compiled()\ndef twice(number):\n    return {factor} * number\n"
        (tmp_path / "inner.py").write_text(inner)
        program = "from outer import both; print(both(10), sum(both.stats.cache_hits.values()))"
        command = [sys.executable, "-c", program]
        result, hits = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, check=True).stdout.split()
        return int(result), int(hits)

    assert answer(2, 1) == (21, 0)
    assert answer(2, 1)[0] == 21
    assert answer(3, 1) == (31, 0)
    assert answer(3, 5) == (35, 0)
