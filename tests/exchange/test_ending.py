"""The last collectives of a process: every rank learns every value, and nothing is torn down too early."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from headway.exchange.ending import _await_release

RANKS = textwrap.dedent("""
    import sys
    import torch, torch.distributed as dist
    from headway.exchange.ending import gather_bytes, leave_group

    rank, store = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    values = gather_bytes(b"x" * rank + bytes([rank]) * rank, torch.device("cpu"))
    assert values == [b"x" * other + bytes([other]) * other for other in range(3)], values
    leave_group(torch.device("cpu"))
    assert not dist.is_initialized()
""")


@pytest.mark.processes
def test_values_of_unequal_length_reach_every_rank_and_all_leave(tmp_path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(rank), str(tmp_path / "store")],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        for rank in ranks:
            _, said = rank.communicate(timeout=120)
            assert rank.returncode == 0, said
    finally:
        for rank in ranks:
            rank.kill()


def test_a_tensor_is_waited_for_while_something_else_holds_it() -> None:
    tensor = torch.zeros(3)
    held = [tensor.view(3)]  # as gloo's thread holds it: a second reference beside Python's
    released = threading.Event()

    def release() -> None:
        time.sleep(0.1)
        released.set()
        held.clear()

    thread = threading.Thread(target=release)
    thread.start()
    _await_release([tensor])
    assert released.is_set()
    thread.join()
