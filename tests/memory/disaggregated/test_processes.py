"""The same stores on shared memory: the same round trips, and real processes that are killed."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time

import pytest

from headway.memory.disaggregated.central import Central, CentralLayout, Coordinator
from headway.memory.disaggregated.clover import Clover
from headway.memory.disaggregated.clover_layout import CloverLayout
from headway.memory.disaggregated.clover_metadata import MetadataServer
from headway.memory.disaggregated.direct import Direct, DirectLayout
from headway.memory.disaggregated.linearizability import Operation, check
from headway.memory.remote import Blocking
from headway.memory.remote_shared import SharedVerbs, is_supported, start_memory_node

pytestmark = [pytest.mark.skipif(not is_supported(), reason="memory nodes need Linux"), pytest.mark.processes]


@pytest.mark.parametrize("store", ["direct", "central", "clover"])
def test_the_same_programs_cost_the_same_round_trips_on_shared_memory(store):
    with start_memory_node(2**16) as node:
        verbs = SharedVerbs([node.address])
        server = Blocking(verbs, name="server")
        if store == "direct":
            client, own = Blocking(verbs), Direct(DirectLayout(keys=2, value_bytes=64), 1, lease_seconds=60.0)
            reads, writes = 1, 4
        elif store == "central":
            coordinator = Coordinator(CentralLayout(keys=2, value_bytes=64, buffers=8))
            client = Blocking(verbs, lambda _, request: server.carry_out(coordinator.handle("c", list(request))))
            own, reads, writes = Central(), 1, 1
        else:
            metadata = MetadataServer(CloverLayout(keys=2, value_bytes=64, buffers=40, lease_seconds=60.0))
            server.carry_out(metadata.load())
            client = Blocking(verbs, lambda _, request: server.carry_out(metadata.handle("c", list(request))))
            own, reads, writes = Clover(metadata.layout, "c"), 1, 2
            client.carry_out(own.open())
        client.carry_out(own.write(1, b"first"))
        for number in range(60):
            value = b"value %d" % number
            client.carry_out(own.write(1, value))
            assert client.round_trips == writes
            assert client.carry_out(own.read(1)) == value
            assert client.round_trips == reads
        assert client.carry_out(own.read(0)) is None
        verbs.close()


WORKER = """
import random, sys, time
from headway.memory.disaggregated.central import Central
from headway.memory.disaggregated.clover import Clover
from headway.memory.disaggregated.clover_layout import CloverLayout
from headway.memory.disaggregated.direct import Direct, DirectLayout
from headway.memory.remote import Blocking
from headway.memory.remote_calls import CallClient
from headway.memory.remote_shared import NodeAddress, SharedVerbs
address, number = NodeAddress.from_json(sys.argv[1]), int(sys.argv[2])
client = Blocking(SharedVerbs([address]), CallClient({"coordinator": sys.argv[5], "metadata": sys.argv[5]}))
if sys.argv[4] == "direct":
    layout = DirectLayout(keys=2, value_bytes=2048)
    store = Direct(layout, number, lease_seconds=0.25, guard_seconds=0.1, backoff_seconds=1e-4)
elif sys.argv[4] == "central":
    store = Central()
else:
    store = Clover(CloverLayout.from_json(sys.argv[6]), f"c{number}")
chance = random.Random(number)
print("ready", flush=True)
sys.stdin.readline()
for turn in range(int(sys.argv[3])):
    key = chance.randrange(2)
    if chance.random() < 0.5:
        name = number << 32 | turn
        print("write", key, name, time.monotonic(), flush=True)
        client.carry_out(store.write(key, name.to_bytes(8, "little") * 256))
        print("done", time.monotonic(), flush=True)
    else:
        begin = time.monotonic()
        value = client.carry_out(store.read(key))
        print("read", key, value.hex() if value else "-", begin, time.monotonic(), flush=True)
"""


SERVER = """
import sys
from headway.memory.disaggregated.central import CentralLayout, Coordinator
from headway.memory.disaggregated.clover_layout import CloverLayout
from headway.memory.disaggregated.clover_metadata import MetadataServer
from headway.memory.remote import Blocking
from headway.memory.remote_calls import CallServer
from headway.memory.remote_shared import NodeAddress, SharedVerbs
verbs = SharedVerbs([NodeAddress.from_json(sys.argv[1])])
if sys.argv[2] == "central":
    server = CallServer(verbs, Coordinator(CentralLayout(keys=2, value_bytes=2048, buffers=8)).handle)
else:
    metadata = MetadataServer(CloverLayout.from_json(sys.argv[3]))
    Blocking(verbs).carry_out(metadata.load())
    server = CallServer(verbs, metadata.handle, idle=metadata.sweep, idle_seconds=0.01)
print(server.address, flush=True)
server.serve_for_ever()
"""

CLOVER = CloverLayout(
    keys=2, value_bytes=2048, buffers=200, recycle_seconds=5e-3, lease_seconds=0.5, guard_seconds=0.1, version_bits=16
)


def calls_of(number: int, output: str) -> list[Operation]:
    calls = []
    for line in output.splitlines():
        kind, *fields = line.split()
        if kind == "write" and len(fields) == 3:
            value = int(fields[1]).to_bytes(8, "little") * 256
            calls.append(
                Operation(client=f"c{number}", kind=kind, key=int(fields[0]), value=value, begin=float(fields[2]))
            )
        elif kind == "done" and len(fields) == 1:
            last = calls.pop()
            calls.append(
                Operation(**{**{f: getattr(last, f) for f in last.__struct_fields__}, "end": float(fields[0])})
            )
        elif kind == "read" and len(fields) == 4:
            value = None if fields[1] == "-" else bytes.fromhex(fields[1])
            calls.append(
                Operation(client=f"c{number}", kind=kind, key=int(fields[0]), value=value, begin=float(fields[2]),
                          end=float(fields[3]))
            )  # fmt: skip
    return calls


@pytest.mark.parametrize("store", ["direct", "central", "clover"])
def test_real_processes_are_linearizable_though_some_are_killed(tmp_path, store):
    """One is killed in a write: Direct keeps its lock until the lease ends, Clover its buffers, Central nothing."""
    with start_memory_node(2**20) as node:
        server, calls_to = None, ""
        if store != "direct":
            command = [sys.executable, "-c", SERVER, node.address.to_json(), store, CLOVER.to_json()]
            server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert server.stdout is not None
            calls_to = server.stdout.readline().strip()
        outputs = [tmp_path / f"{number}" for number in range(1, 4)]
        workers = []
        for number, path in enumerate(outputs, start=1):
            turns = "500" if number > 1 else "100000"  # the first does not get that far
            command = [sys.executable, "-c", WORKER, node.address.to_json(), str(number), turns, store, calls_to]
            command.append(CLOVER.to_json())
            with path.open("w") as file:
                workers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file))
        while not all(path.read_text().startswith("ready\n") for path in outputs):
            assert all(worker.poll() is None for worker in workers)
            time.sleep(0.02)
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write(b"go\n")
            worker.stdin.close()
        time.sleep(0.05)
        workers[0].send_signal(signal.SIGKILL)
        ended = [worker.wait(100) for worker in workers]
        if server is not None:
            assert server.poll() is None
            server.kill()
            server.wait()
            assert server.stdout is not None
            server.stdout.close()
    assert ended == [-9, 0, 0]
    history = [one for number, path in enumerate(outputs, 1) for one in calls_of(number, path.read_text())]
    assert len(history) >= 1000
    assert all(one.end < math.inf for one in history if one.client in ("c2", "c3"))
    violation = check(history)
    assert violation is None
