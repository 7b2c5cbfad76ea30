"""In-network aggregation over real sockets, by real processes that are really killed, and threads for the rest."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from headway.collective.aggregation_worker import Worker
from headway.collective.packets import Kind, Packet, encode
from headway.errors import FieldError, InputError, MismatchError, RankFailedError, RunError, StalledError
from headway.exchange.aggregation import AggregationClient, AggregationServer, main
from headway.exchange.datagrams import is_supported

HERE = Path(__file__).parent
SCRIPT = HERE / "aggregation_workers.py"
LONG_SECONDS = 120.0
pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("aggregation")]


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("aggregation_workers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


workers_script = _load()


# Processes -----------------------------------------------------------------------------------------------------------


@contextmanager
def server_process(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen, int]]:
    (folder / "token").write_bytes(workers_script.TOKEN + b"\n")
    command = [sys.executable, "-W", "ignore", "-m", "headway.exchange.aggregation", "--port", "0", "--token-file"]
    process = subprocess.Popen(
        [*command, str(folder / "token"), *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process, int(process.stdout.readline().rpartition(":")[2])
    finally:
        process.kill()
        process.communicate(timeout=LONG_SECONDS)


@contextmanager
def worker_processes(case: str, port: int, count: int, folder: Path) -> Iterator[list[subprocess.Popen]]:
    command = [sys.executable, "-W", "ignore", str(SCRIPT), case, str(port)]
    processes = [subprocess.Popen([*command, str(rank), str(count), str(folder)]) for rank in range(count)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait(LONG_SECONDS)


def finish(processes: list[subprocess.Popen], folder: Path) -> list[dict]:
    found = []
    for rank, process in enumerate(processes):
        process.wait(LONG_SECONDS)
        path = folder / f"{rank}.json"
        found.append(json.loads(path.read_text()) if path.exists() else {"exit": process.returncode})
    return found


def wait_for(*paths: Path) -> None:
    end = time.monotonic() + LONG_SECONDS
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize(("case", "count"), [("bad_network", 3), ("bad_relays", 2)])
def test_all_ways_types_and_sizes_are_bit_exact_under_loss_duplication_and_reordering(tmp_path, case, count):
    # In the second case, one worker's packets pass the interpreter, and the other's compiled code: they must agree.
    with (
        server_process(tmp_path) as (server, port),
        worker_processes(case, port, count, tmp_path) as processes,
    ):
        found = finish(processes, tmp_path)
        assert [each.get("wrong", each) for each in found] == [[]] * count
        assert len({each["digest"] for each in found}) == 1
        assert all(each["asked"] > 0 for each in found)
        server.send_signal(signal.SIGINT)
        _, said = server.communicate(timeout=LONG_SECONDS)
        assert server.returncode == 130
        assert "stopped after" in said
        assert re.search(r"duplicates [1-9]", said)


def test_survivors_of_a_killed_worker_name_it_after_the_time_out(tmp_path):
    with server_process(tmp_path) as (_, port), worker_processes("killed", port, 3, tmp_path) as processes:
        found = finish(processes, tmp_path)
    assert found[1] == {"exit": -signal.SIGKILL}
    number = (tmp_path / "number").read_text()
    for rank in (0, 2):
        assert found[rank]["error"] == "StalledError"
        # Perhaps with the other survivor, if that had not come so far when it was last asked about.
        assert re.search(rf"worker (\d+, )*{number}(, \d+)* is late", found[rank]["message"])


def test_workers_notice_that_the_server_was_killed(tmp_path):
    with server_process(tmp_path) as (server, port), worker_processes("forever", port, 2, tmp_path) as processes:
        wait_for(tmp_path / "ready0", tmp_path / "ready1")
        server.kill()
        found = finish(processes, tmp_path)
    assert [each["error"] for each in found] == ["RankFailedError"] * 2
    assert all("the aggregator is gone" in each["message"] for each in found)


# Threads -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[AggregationServer]:
    server = AggregationServer(workers=3).start()
    yield server
    server.stop()


def together(*functions) -> list:
    """Call them in threads, and give what each returned or raised."""
    results: list = [None] * len(functions)

    def call(index: int) -> None:
        try:
            results[index] = functions[index]()
        except Exception as error:  # noqa: BLE001 - given to the test
            results[index] = error

    threads = [threading.Thread(target=call, args=(index,), daemon=True) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_SECONDS)
        assert not thread.is_alive()
    return results


def join(server: AggregationServer, count: int, **options) -> list[AggregationClient]:
    options = {"timeout_seconds": 30.0, "patience_seconds": 0.005, **options}
    clients = together(
        *[lambda: AggregationClient(server.address, job=1, workers=count, **options) for _ in range(count)]
    )
    assert all(isinstance(client, AggregationClient) for client in clients), clients
    return sorted(clients, key=lambda client: client.number)


def close(clients: list[AggregationClient]) -> None:
    for client in clients:
        client.close()


def test_large_tiny_infinite_and_missing_numbers_each_spoil_only_their_own_segment(server):
    clients = join(server, 2, payload_bytes=16)
    one = torch.tensor([3e38, -1e30, 0, 1, 1e-40, 0, 1e-45, -1e-38, 1, 2, 3, torch.inf, 1, 2, 3, 4, 0, 0, 0, 0, 7])
    other = torch.tensor([-3e38, 1e30, 5, 1, 1e-40, 0, 0, 0, 1, 2, 3, 4, torch.nan, 2, 3, 4, 0, 0, 0, 0, -7])
    tensors = [one.clone(), other.clone()]
    outcomes = together(*[lambda c=c, t=t: c.all_reduce(t) for c, t in zip(clients, tensors, strict=True)])
    assert outcomes == [(2, 2, False, False)] * 2
    close(clients)
    assert tensors[0].numpy().tobytes() == tensors[1].numpy().tobytes()
    found, right = tensors[0].double(), one.double() + other.double()
    assert found[8:16].isnan().all()
    # 28 bits below the segment's largest, from either worker.
    assert (found[0:4] - right[0:4]).abs().max() <= 3.4e38 * 2.0**-28
    assert (found[4:8] - right[4:8]).abs().max() <= 2.0**-125 * 2.0**-28
    assert found[16:].tolist() == [0] * 5


@pytest.mark.skipif(not is_supported(), reason="needs the system calls of Linux")
def test_what_is_in_order_does_not_pass_the_interpreter(server: Any, monkeypatch):
    clients = join(server, 2, patience_seconds=10.0)
    monkeypatch.setattr(Worker, "handle", None)
    monkeypatch.setattr(server.aggregator, "handle", None)
    source = np.random.default_rng(0)
    values = source.standard_normal((2, 3_000_001)).astype(np.float32)
    ways: tuple[Any, Any] = ("integer", "ordered")
    for how in ways:
        tensors = [torch.from_numpy(one.copy()) for one in values]
        outcomes = together(
            *[lambda c=c, t=t, h=how: c.all_reduce(t, how=h) for c, t in zip(clients, tensors, strict=True)]
        )
        assert outcomes == [(2, 2, False, False)] * 2
        assert tensors[0].equal(tensors[1])
        torch.testing.assert_close(tensors[0], torch.from_numpy(values.sum(0)))
    monkeypatch.undo()
    close(clients)


def test_an_integer_sum_that_leaves_its_range_is_flagged(server):
    clients = join(server, 2)
    tensors = [torch.tensor([2**31 - 1, 5], dtype=torch.int32) for _ in clients]
    outcomes = together(*[lambda c=c, t=t: c.all_reduce(t) for c, t in zip(clients, tensors, strict=True)])
    close(clients)
    assert [outcome.overflow for outcome in outcomes] == [True, True]
    assert tensors[0].tolist() == tensors[1].tolist() == [2**31 - 1, 10]


def test_a_dead_worker_that_the_server_removes_is_no_longer_waited_for(server):
    clients = join(server, 3)
    tensors = [torch.ones(100_000) for _ in range(2)]

    def remove() -> None:
        time.sleep(0.1)
        server.remove(1, 2)

    first, second, _ = together(
        lambda: clients[0].all_reduce(tensors[0]), lambda: clients[1].all_reduce(tensors[1]), remove
    )
    assert (first.least, first.most) == (2, 2)
    assert second == first
    assert tensors[0].eq(2).all()
    assert tensors[1].eq(2).all()
    # The one that was taken for dead learns of it.
    with pytest.raises(RankFailedError, match="does not know this worker"):
        clients[2].all_reduce(torch.ones(4))
    close(clients)


def test_garbage_from_a_stranger_is_counted_and_changes_nothing(server):
    clients = join(server, 2)
    stop = threading.Event()
    source = np.random.default_rng(0)
    forged = encode(Packet(Kind.DATA, 1, segment=0, round_end=9, payload=b"\1\0\0\0"))
    leave = encode(Packet(Kind.LEAVE, 1, payload=bytes(8)))

    def pester() -> int:
        sent = 0
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            while not stop.is_set():
                for data in (
                    source.bytes(int(source.integers(0, 300))),
                    forged,
                    leave,
                    forged[:-1],
                    b"",
                    forged + b"x",
                ):
                    stranger.sendto(data, server.address)
                    sent += 1
                time.sleep(0.001)
        return sent

    def reduce(client: AggregationClient) -> list:
        found = []
        for turn in range(20):
            tensor = torch.full((30_000,), float(client.number + turn))
            client.all_reduce(tensor)
            found.append(tensor.unique().tolist())
        return found

    def reduce_all() -> list:
        try:
            return together(lambda: reduce(clients[0]), lambda: reduce(clients[1]))
        finally:
            stop.set()

    sent, results = together(pester, reduce_all)
    close(clients)
    assert results == [[[2.0 * turn + 1] for turn in range(20)]] * 2
    counters = server.aggregator.counters
    assert sent > 0
    assert counters.corrupt > 0
    assert counters.strange > 0


def test_a_wrong_token_gets_no_answer_and_no_seat():
    server = AggregationServer(token=b"right").start()
    try:
        with pytest.raises(StalledError, match="nobody has answered a Join"):
            AggregationClient(server.address, job=1, workers=1, token=b"wrong", timeout_seconds=0.3)
        assert server.aggregator.counters.strange > 0
        assert server.aggregator.members(1) == ()
        with AggregationClient(server.address, job=1, workers=1, token=b"right") as client:
            tensor = torch.tensor([1.5])
            client.all_reduce(tensor)
            assert tensor.tolist() == [1.5]
    finally:
        server.stop()


def test_a_newcomer_takes_part_from_the_next_all_reduce_on(server):
    clients = join(server, 2)
    ends = threading.Event()
    counts: list = []

    def reduce(client: AggregationClient, turns: int) -> list:
        found = []
        while len(found) < turns:
            tensor = torch.full((50_000,), 2.0**client.number)
            outcome = client.all_reduce(tensor)
            assert outcome.least == outcome.most
            (value,) = tensor.unique().tolist()
            found.append((client.machine.next_segment, outcome.most, value))
            if outcome.most == 3 and turns > 100:
                turns = len(found) + 10  # the newcomer is in: a few more, as many as it does
        ends.set()
        return found

    def come_late() -> list:
        time.sleep(0.1)
        late = AggregationClient(server.address, job=1, workers=3, timeout_seconds=30.0)
        clients.append(late)
        return reduce(late, 11)

    one, other, newcomer = together(lambda: reduce(clients[0], 10**9), lambda: reduce(clients[1], 10**9), come_late)
    close(clients)
    counts = [count for _, count, _ in one]
    assert one == other
    assert counts == sorted(counts)
    assert newcomer == one[-11:]
    assert {value for _, count, value in one if count == 2} <= {3.0}
    assert {value for _, count, value in one if count == 3} == {7.0}


def test_a_threshold_leaves_out_a_straggler_and_says_so(server):
    clients = join(server, 3)
    clients[0].set_threshold(2)
    tensors = [torch.ones(1000) for _ in range(2)]
    outcomes = together(*[lambda c=c, t=t: c.all_reduce(t) for c, t in zip(clients[:2], tensors, strict=True)])
    assert [tuple(outcome) for outcome in outcomes] == [(2, 2, True, False)] * 2
    late = torch.full((1000,), 100.0)
    outcome = clients[2].all_reduce(late)
    close(clients)
    assert outcome.partial
    assert late.tolist() == tensors[0].tolist() == [2.0] * 1000


def test_tensors_that_do_not_fit_together_are_reported_to_all(server):
    clients = join(server, 2)
    sizes = (1000, 1001)
    found = together(*[lambda c=c, n=n: c.all_reduce(torch.ones(n)) for c, n in zip(clients, sizes, strict=True)])
    assert [type(each) for each in found] == [MismatchError, MismatchError]
    # Until the job is reset, or the client closed, there is nothing to go on from.
    with pytest.raises(RunError, match="came to no end"):
        clients[0].all_reduce(torch.ones(4))
    clients[0].reset()
    time.sleep(0.1)  # the other finds word of it when it begins its next
    tensors = [torch.ones(4), torch.ones(4)]
    together(*[lambda c=c, t=t: c.all_reduce(t) for c, t in zip(clients, tensors, strict=True)])
    close(clients)
    assert [tensor.tolist() for tensor in tensors] == [[2.0] * 4] * 2


def test_a_halted_job_waits_for_a_reset_that_ends_the_round(server):
    clients = join(server, 2)
    clients[0].halt()

    def reset() -> None:
        time.sleep(0.2)
        clients[0].reset()

    found, _ = together(lambda: clients[1].all_reduce(torch.ones(10)), reset)
    close(clients)
    assert isinstance(found, RunError)
    assert "has reset the job" in found.message


def test_no_server_there():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    with pytest.raises(StalledError, match="nobody has answered a Join"):
        AggregationClient(address, job=1, workers=2, timeout_seconds=0.3)


def test_a_seat_is_given_back_by_who_waited_in_vain_for_the_others(server):
    with pytest.raises(StalledError, match="not all workers have joined"):
        AggregationClient(server.address, job=1, workers=2, timeout_seconds=0.3)
    assert server.aggregator.members(1) == ()


def test_a_server_that_was_started_anew_knows_nobody():
    server = AggregationServer().start()
    client = AggregationClient(server.address, job=1, workers=1, timeout_seconds=30.0)
    host, port = server.address
    server.stop()
    again = AggregationServer(host, port).start()
    try:
        with pytest.raises(RankFailedError, match="does not know this worker"):
            client.all_reduce(torch.ones(10))
    finally:
        client.close()
        again.stop()


def test_no_socket_and_no_thread_is_left_behind():
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    server = AggregationServer().start()
    server.stop()
    before = count()
    server = AggregationServer().start()
    client = AggregationClient(server.address, job=1, workers=1)
    client.close()
    client.close()
    server.stop()
    assert count() == before
    with pytest.raises(RunError, match="closed"):
        client.all_reduce(torch.ones(1))


def test_what_makes_no_sense_is_refused(server, tmp_path, capsys, monkeypatch):
    with pytest.raises(FieldError, match="without a token"):
        AggregationServer("0.0.0.0")
    with pytest.raises(InputError, match="cannot listen"):
        AggregationServer(*server.address)
    with pytest.raises(FieldError):
        AggregationServer(workers=0)
    with pytest.raises(FieldError):
        AggregationClient(server.address, job=1, workers=1, payload_bytes=1 << 20)
    with pytest.raises(FieldError):
        AggregationClient(server.address, job=-1, workers=1)
    with AggregationClient(server.address, job=1, workers=1) as client:
        for tensor in (torch.ones(2, dtype=torch.float64), torch.ones(4, 4).t()[1:, :]):
            with pytest.raises(FieldError, match="contiguous float32 or int32"):
                client.all_reduce(tensor)
        with pytest.raises(FieldError):
            client.all_reduce(torch.ones(2, dtype=torch.int32), operation="average")
        with pytest.raises(FieldError):
            client.all_reduce(torch.ones(2), how="fast")  # pyright: ignore
    assert main(["--port", "0", "--token-file", str(tmp_path / "none")]) == 2
    (tmp_path / "empty").write_text("\n")
    assert main(["--port", "0", "--token-file", str(tmp_path / "empty")]) == 2
    assert "is empty" in capsys.readouterr().err
    monkeypatch.delenv("HEADWAY_TOKEN", raising=False)
    for wrong, said in (
        (["--bind", "0.0.0.0"], "without a token"),
        (["--bind", "somewhere"], "'somewhere' is no address"),
        (["--port", "65536"], "0 to 65535"),
        (["--workers", "0"], "1 to 65535"),
        (["--slots", "0"], "1 to 65536"),
        (["--jobs", "0"], "1 to 65536"),
    ):
        assert main(wrong) == 2
        assert said in capsys.readouterr().err
