"""Programs carried out by real processes end with what the collective promises, and no failure goes unnoticed."""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.collective.algorithms import generate
from headway.collective.program import Builder, Program, even_chunks
from headway.errors import InputError, MismatchError, ProgramError, RunError
from headway.exchange import executor, interpreter
from headway.exchange.choice import cluster_of
from headway.exchange.executor import Communicator

HERE = Path(__file__).parent
pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("executor")]


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ranks = _load("program_ranks")


def run_case(case: str, size: int, folder: Path, **options) -> list:
    before = set(os.listdir("/dev/shm"))
    results = ranks.run_case(case, size, folder, **options)
    assert set(os.listdir("/dev/shm")) <= before
    return results


def test_all_programs_dtypes_and_sizes_end_with_what_the_collective_promises(tmp_path):
    """Every generator; every dtype; random programs without a pause; two machines; and the bits of the results."""
    results = run_case("all", 4, tmp_path)
    assert [wrong for wrong, _ in results] == [[]] * 4
    # The same bits on every rank, run after run, and however the vector is sliced.
    assert len({digest for _, digests in results for digest in digests}) == 1


@pytest.mark.parametrize("case", ["killed", "killed_elsewhere"])
def test_survivors_of_a_killed_rank_name_it_soon(case, tmp_path):
    results = run_case(case, 3, tmp_path, killed=1)
    killed_at = float((tmp_path / "killed").read_text())
    for rank in (0, 2):
        kind, text, raised_at = results[rank]
        assert kind == "RankFailedError"
        assert "rank 1" in text
        assert "died" in text
        assert raised_at - killed_at < 5  # it takes a tenth of that when the machine is not busy


def in_threads(size: int, work, **options) -> list:
    """What `work(communicator)` returns for each rank of a group of threads; shared memory works for them as well."""
    store = dist.HashStore()
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            communicator = Communicator(rank=rank, size=size, store=store, timeout_seconds=30, **options)
            results[rank] = work(communicator)
            communicator.close()
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


def test_a_rank_that_does_not_come_is_named_by_all_others():
    def work(communicator: Communicator) -> tuple:
        communicator.timeout_seconds = 0.5
        if communicator.rank == 1:
            time.sleep(2)
        return ranks.until_it_fails(communicator, 100)

    for rank, (kind, text, _) in enumerate(in_threads(3, work)):
        assert kind == "StalledError"  # rank 1 is told as well, when it comes
        assert "rank 1 did not come" in text, rank


def test_a_rank_that_left_is_named():
    def work(communicator: Communicator) -> tuple:
        return ("", "", 0) if communicator.rank == 1 else ranks.until_it_fails(communicator, 100)

    for kind, text, _ in in_threads(3, work)[::2]:
        assert kind == "RankFailedError"
        assert "rank 1 has left" in text


def test_an_abort_reaches_every_rank_with_its_reason():
    def work(communicator: Communicator) -> tuple:
        if communicator.rank == 1:
            threading.Timer(0.2, communicator.abort, ("the user wants to",)).start()
        return ranks.until_it_fails(communicator, 1 << 16)

    for kind, text, _ in in_threads(3, work):
        assert kind == "RankFailedError"
        assert "rank 1 gave up: the user wants to" in text


def test_an_error_in_the_middle_of_a_run_reaches_every_rank():
    class Broken:
        failure = None

        def send(self, target, array):
            time.sleep(0.2)
            raise ValueError("the cable is cut")

        def receive(self, source, array):
            time.sleep(0.4)

        def close(self, error=None): ...

    def work(communicator: Communicator) -> tuple:
        return ranks.until_it_fails(communicator, 100)

    for kind, text, _ in in_threads(3, work, machines=["a", "a", "b"], transport=Broken())[:2]:
        assert kind in ("RankFailedError", "ValueError")
        assert "the cable is cut" in text


def test_ranks_that_bring_different_sizes_are_told_what_each_runs():
    def work(communicator: Communicator) -> tuple:
        return ranks.until_it_fails(communicator, 101 if communicator.rank == 1 else 100)

    for kind, text, _ in in_threads(3, work):
        assert kind == "MismatchError"
        assert "rank 0 runs all_reduce (direct), float32[100], sum, and rank 1 " in text or "rank 1 runs" in text
        assert "float32[101]" in text


def test_ranks_that_run_different_programs_are_told_what_each_runs():
    def work(communicator: Communicator) -> str:
        name = "ring" if communicator.rank == 1 else "direct"
        with pytest.raises(MismatchError) as caught:
            communicator.run(generate(name, cluster_of(["here"] * 3), "all_reduce"), torch.ones(100))
        return str(caught.value)

    for text in in_threads(3, work):
        assert "all_reduce (ring)" in text


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_generator_s_program_is_right_for_any_number_of_ranks(size, monkeypatch):
    monkeypatch.setattr(executor, "_SLICE_BYTES", 16 * 2**10)

    def work(communicator: Communicator) -> list[str]:
        return ranks.every_generator(communicator, ["here"] * size, (3, 10007))

    assert in_threads(size, work) == [[]] * size


@settings(deadline=None, max_examples=40)
@given(
    st.integers(2, 5), st.integers(0, 2**32), st.integers(0, 5000), st.sampled_from([256, 1000, 4096, 1 << 30]),
    st.sampled_from(ranks.DTYPES[:-1]), st.integers(1, 4),
)  # fmt: skip
def test_any_program_of_trees_with_any_weights_and_any_slicing_is_right(size, seed, count, slice_bytes, dtype, stages):
    program = ranks.random_program(size, seed)
    operation = "sum" if dtype in (torch.bfloat16, torch.float16) else "product" if seed % 3 == 0 else "sum"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "_SLICE_BYTES", slice_bytes)
        patch.setattr(executor, "_STAGES", stages)
        assert in_threads(size, lambda one: ranks.check(one, program, count, dtype, operation)) == [[]] * size


def test_half_precision_is_rounded_once_where_one_rank_reduces_all():
    # 1 + 2^-8 + 2^-8: each step alone is rounded away in bfloat16, both together are not.
    program = generate("direct", cluster_of(["here"] * 3), "all_reduce")
    values = [1.0, 2**-8, 2**-8]

    def work(communicator: Communicator) -> list[float]:
        vector = torch.full((3,), values[communicator.rank], dtype=torch.bfloat16)
        communicator.run(program, vector)
        return vector.tolist()

    assert in_threads(3, work) == [[1.0078125] * 3] * 3


def test_a_single_rank_keeps_what_it_has():
    program = generate("direct", cluster_of(["here"]), "all_reduce")

    def work(communicator: Communicator) -> list[float]:
        vector = torch.arange(5.0)
        communicator.run(program, vector, operation="average")
        return vector.tolist()

    assert in_threads(1, work) == [[0.0, 1.0, 2.0, 3.0, 4.0]]


def test_the_interpreter_is_compiled_once_before_anybody_waits():
    vector = torch.ones(1000, dtype=torch.int64)
    in_threads(2, lambda communicator: communicator.run(_program(2), vector.clone(), operation="max"))
    assert len(interpreter.interpret.signatures) == 1


def _alone(size: int = 1) -> Communicator:
    return Communicator(rank=0, size=size, store=dist.HashStore(), timeout_seconds=5)


def _program(size: int = 1) -> Program:
    return generate("direct", cluster_of(["here"] * size), "all_reduce")


def test_misuse_is_refused_with_a_reason():
    communicator = _alone()
    with pytest.raises(ProgramError, match="is for 2 ranks"):
        communicator.run(_program(2), torch.ones(3))
    with pytest.raises(InputError, match="cannot work on"):
        communicator.run(_program(), torch.ones(4, 4))
    with pytest.raises(InputError, match="cannot work on"):
        communicator.run(_program(), torch.ones(8)[::2])
    with pytest.raises(InputError, match="no operation is called 'mean'"):
        communicator.run(_program(), torch.ones(3), operation="mean")
    with pytest.raises(InputError, match="bxor means nothing"):
        communicator.run(_program(), torch.ones(3), operation="bxor")
    with pytest.raises(InputError, match="complex64 cannot be reduced"):
        communicator.run(_program(), torch.ones(3, dtype=torch.complex64))
    communicator.close()
    communicator.close()
    with pytest.raises(RunError, match="closed"):
        communicator.run(_program(), torch.ones(3))


def test_a_group_that_cannot_be_is_refused():
    store = dist.HashStore()
    with pytest.raises(InputError, match="there is no rank 2"):
        Communicator(rank=2, size=2, store=store)
    with pytest.raises(InputError, match="1 machines are named for 2 ranks"):
        Communicator(rank=0, size=2, store=store, machines=["a"])
    with pytest.raises(InputError, match="no transport"):
        Communicator(rank=0, size=2, store=store, machines=["a", "b"])


def test_a_program_that_reads_what_is_not_there_is_refused():
    builder = Builder("wrong", "broadcast", ["a", "b", "c"], even_chunks(1))
    builder.transfer(0, 1, 2)
    errors = in_threads(3, lambda communicator: communicator.run(builder.build(), torch.ones(3)))
    assert all(isinstance(error, ProgramError) and "not at rank 1 yet" in str(error) for error in errors)
