"""One rank of a probe: `python -m headway.hardware.probe_worker '<Task as JSON>'`.

Prints one JSON object a line to stdout: `{"progress": …}` as it goes (rank 0 only) and `{"result": Report}` at the end.
It ends at once when its stdin is closed, so a parent that dies, however it dies, leaves no worker behind.
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections.abc import Callable

import msgspec
import torch
import torch.distributed as dist

from headway.hardware.host import keep_freed_memory
from headway.value import Value

__all__ = ["Point", "Report", "Task", "main"]

# Bytes of the whole tensor; all-reduce decides the fit, the other operations are compared with it.
_ALL_REDUCE_BYTES = (4 * 2**10, 64 * 2**10, 2**20, 4 * 2**20, 16 * 2**20, 64 * 2**20)
_OTHER_BYTES = (4 * 2**10, 256 * 2**10, 4 * 2**20, 16 * 2**20)


class Task(Value):
    """What one rank is to measure. `seconds` is the time for all measuring together, start-up not counted."""

    rank: int
    count: int
    threads: int
    device: str  # "cpu" or "cuda"
    rendezvous: str  # file:// address
    memory_bytes: float  # of one rank: bounds the arrays it streams
    seconds: float
    backend: str  # of torch.distributed


class Point(Value):
    """One measured operation: its size, the median time of one, and over how many ranks."""

    operation: str  # "all_reduce", "all_gather", "reduce_scatter" or "send"
    bytes: int  # of the whole tensor
    seconds: float
    ranks: int


class Report(Value):
    """What one rank measured; rates in FLOP per second and bytes per second. Empty or 0: not measured by this rank."""

    rank: int
    device_name: str
    memory_bytes: float = 0.0
    flop_per_second: dict[str, float] = {}  # alone
    flop_per_second_together: float = 0.0  # float32, while all ranks compute
    memory_bytes_per_second: float = 0.0  # alone
    memory_bytes_per_second_together: float = 0.0
    launch_seconds: float = 0.0
    points: tuple[Point, ...] = ()


class _Rank:
    """Measures on one device."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.device = torch.device("cuda", task.rank) if task.device == "cuda" else torch.device("cpu")
        if task.device == "cuda":
            torch.cuda.set_device(self.device)

    def say(self, text: str) -> None:
        if self.task.rank == 0:
            _emit({"progress": text})

    def settle(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def once(self, work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        self.settle()
        return time.perf_counter() - start

    def median(self, work: Callable[[], object], seconds: float) -> float:
        """Median time of `work` over about `seconds`, at least three times, after one warm-up."""
        self.once(work)
        times = []
        stop = time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < stop:
            times.append(self.once(work))
        return statistics.median(times)

    def matmul(self, dtype: torch.dtype, seconds: float) -> float:
        """FLOP per second of a square matrix product, as large as takes some milliseconds.

        Sizes grow from small, so that a dtype which this device only emulates costs little to find out.
        """
        largest = 8192 if self.device.type == "cuda" else 1024
        size = 128
        while True:
            left, right = (torch.rand(size, size, device=self.device).to(dtype) for _ in range(2))
            out = torch.empty(size, size, dtype=dtype, device=self.device)

            def work(left=left, right=right, out=out) -> None:
                torch.matmul(left, right, out=out)

            self.once(work)
            took = self.once(work)
            if size >= largest or took > 0.01:
                break
            size *= 2
        return 2 * size**3 / self.median(work, seconds)

    def stream(self, seconds: float) -> float:
        """Bytes read and written per second by an elementwise addition far larger than the caches."""
        size = int(min(2**26, self.task.memory_bytes / 32)) if self.device.type == "cpu" else 2**28
        one, other, out = (torch.ones(size // 4, device=self.device) for _ in range(3))
        return 3 * size / self.median(lambda: torch.add(one, other, out=out), seconds)

    def launch(self, seconds: float) -> float:
        """Seconds to start one operator: half of a chain of tiny ones in forward, half in backward."""
        length = 32
        start = torch.ones(16, device=self.device, requires_grad=True)

        def work() -> None:
            value = start
            for _ in range(length):
                value = value * 1.001
            torch.autograd.grad(value, start, torch.ones_like(value))

        return self.median(work, seconds) / (2 * length)

    def points(self, operation: str, sizes: tuple[int, ...], seconds: float) -> list[Point]:
        """Median times of a collective, or of a message between ranks 0 and 1 (half of there and back)."""
        found = []
        for size in sizes:
            work, passes = self.communication(operation, size)
            dist.barrier()
            self.once(work)
            # All ranks repeat equally often, as rank 0 decides.
            agreed = torch.tensor([seconds / len(sizes) / max(self.once(work), 1e-6)], device=self.device)
            dist.broadcast(agreed, src=0)
            repeats = min(50, max(3, int(agreed.item())))
            times = [self.once(work) / passes for _ in range(repeats)]
            found.append(
                Point(operation=operation, bytes=size, seconds=statistics.median(times), ranks=self.task.count)
            )
        return found

    def communication(self, operation: str, size: int) -> tuple[Callable[[], object], int]:
        count, rank = self.task.count, self.task.rank
        part = torch.ones(max(1, size // 4 // count), device=self.device)
        whole = torch.ones(part.numel() * count, device=self.device)
        if operation == "all_reduce":
            # Averaging zeros would do as well; ones would overflow only after 2**127 sums.
            whole.zero_()
            return lambda: dist.all_reduce(whole), 1
        if operation == "all_gather":
            return lambda: dist.all_gather_into_tensor(whole, part), 1
        if operation == "reduce_scatter":
            return lambda: dist.reduce_scatter_tensor(part, whole), 1

        def there_and_back() -> None:
            if rank == 0:
                dist.send(whole, 1)
                dist.recv(whole, 1)
            elif rank == 1:
                dist.recv(whole, 0)
                dist.send(whole, 0)

        return there_and_back, 2

    def report(self) -> Report:
        task, seconds = self.task, self.task.seconds
        cuda = self.device.type == "cuda"
        measured: dict = {}
        if task.count > 1:
            # First of all: a rank that is still loading torch would disturb the one that measures alone.
            self.join()
            dist.barrier()
        if cuda:
            properties = torch.cuda.get_device_properties(self.device)
            measured["memory_bytes"] = float(properties.total_memory)
        if task.rank == 0 or cuda:
            dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
            rates = {}
            for name, dtype in dtypes.items():
                self.say(f"matrix products in {name}")
                rates[name] = self.matmul(dtype, 0.06 * seconds)
            measured["flop_per_second"] = rates
            self.say("streaming memory")
            measured["memory_bytes_per_second"] = self.stream(0.06 * seconds)
            self.say("tiny operators")
            measured["launch_seconds"] = self.launch(0.04 * seconds)
        if task.count > 1:
            self.say("all ranks computing at once")
            # Every rank computes for the same time, so that each is disturbed by all others throughout.
            dist.barrier()
            measured["flop_per_second_together"] = self.matmul(torch.float32, 0.1 * seconds)
            dist.barrier()
            measured["memory_bytes_per_second_together"] = self.stream(0.08 * seconds)
            points: list[Point] = []
            for operation, sizes, share in (
                ("all_reduce", _ALL_REDUCE_BYTES, 0.3),
                ("send", _OTHER_BYTES, 0.08),
                ("all_gather", _OTHER_BYTES, 0.08),
                ("reduce_scatter", _OTHER_BYTES, 0.08),
            ):
                self.say(f"{operation} between {task.count} ranks")
                points += self.points(operation, sizes, share * seconds)
            measured["points"] = tuple(points)
            dist.barrier()
            dist.destroy_process_group()
        return Report(
            rank=task.rank, device_name=torch.cuda.get_device_name(self.device) if cuda else "cpu", **measured
        )

    def join(self) -> None:
        dist.init_process_group(
            self.task.backend, init_method=self.task.rendezvous, rank=self.task.rank, world_size=self.task.count
        )


def _emit(line: dict) -> None:
    # One write a line: lines of other threads or libraries cannot come between.
    os.write(1, msgspec.json.encode(line) + b"\n")


def _end_with_parent() -> None:
    # os.read, not sys.stdin: a thread inside a buffered read would break the interpreter's own ending.
    while os.read(0, 4096):
        pass
    os._exit(1)


def main(text: str) -> None:
    """Measure what the Task in `text` asks for, and print it."""
    task = Task.from_json(text, place="task of a probe worker")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(task.threads)
    keep_freed_memory()
    _emit({"result": _Rank(task).report().to_builtins()})


if __name__ == "__main__":
    main(sys.argv[1])
