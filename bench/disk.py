"""How much of a disk does the tiered store reach? Against a bare loop of direct reads and writes, on the same blocks.

    python bench/disk.py                                 2 GiB in tensors of 64 MiB
    python bench/disk.py --total 256MiB --rounds 2 --directory /somewhere

The bare loop is what `fio --direct=1 --bs=4M --numjobs=4` does: as many threads as the store has requests, each of
which takes the next 4 MiB and transfers it with O_DIRECT, without checksum, name or order, out of and into memory as
large as the store's, in huge pages as well. It goes through the store's own files, where the store's tensors lie, and
writes the same bytes: two files on one disk may differ by a quarter and more, depending on where they lie, so a file
beside them would compare places. A second bare loop computes the checksum of each block besides, with the store's own
function: what it loses is the price of the checksums alone, and what the store loses beyond that is the store's.

The store writes and reads tensors of the given size: checksums on the way, read into its pool as they are waited for,
one after the other, with the next ones prefetched. Persistent tensors are replaced crash-safely (an fdatasync for each)
besides, and a version that has been replaced is one of the files that the next tensors are written over.

All take turns in each round, in an order that changes. After each turn the file systems are synchronised, which is not
counted: to throw away the blocks of a file that has been replaced would otherwise slow down whoever comes next. Figures
are medians over the rounds, shares those within a round. A virtual disk may be faster for a while than it stays: see
the spread.
"""

import argparse
import contextlib
import itertools
import os
import random
import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from headway.memory.blocks import BLOCK_BYTES
from headway.memory.buffers import AlignedMemory
from headway.memory.checksum import crc32c
from headway.memory.tiers import Store
from headway.units import format_bytes, parse_bytes
from record import new_record, save_record

HERE = Path(__file__).parent
SEED = 0
THREADS = 4
IN_FLIGHT = 4  # tensors that are written at a time, as when states stream through buffers
KINDS = ("bare", "checksummed", "store")


class Bare:
    """Threads that go through blocks of files with O_DIRECT."""

    def __init__(self, data: torch.Tensor, threads: int) -> None:
        self.source = data.numpy()
        self.target = AlignedMemory(4 * data.numel()).tensor.zero_().numpy()
        self.workers = ThreadPoolExecutor(threads)
        self.threads = threads

    def write(self, blocks: list[tuple[int, int]], *, checksums: bool) -> None:
        def transfer(file: int, offset: int, at: int) -> int:
            block = self.source[at % self.source.size :][:BLOCK_BYTES]
            if checksums:
                crc32c(block)
            return os.pwritev(file, [block], offset)  # type: ignore[list-item]

        self._run(blocks, transfer)

    def read(self, blocks: list[tuple[int, int]], *, checksums: bool) -> None:
        def transfer(file: int, offset: int, at: int) -> int:
            block = self.target[at % self.target.size :][:BLOCK_BYTES]
            count = os.preadv(file, [block], offset)  # type: ignore[list-item]
            if checksums:
                crc32c(block)
            return count

        self._run(blocks, transfer)

    def close(self) -> None:
        self.workers.shutdown()

    def _run(self, blocks: list[tuple[int, int]], transfer: Callable[[int, int, int], int]) -> None:
        turns = itertools.count()

        def work() -> None:
            while (turn := next(turns)) < len(blocks):
                if transfer(*blocks[turn], turn * BLOCK_BYTES) != BLOCK_BYTES:
                    raise OSError("a short transfer")

        for done in [self.workers.submit(work) for _ in range(self.threads)]:
            done.result()


class Stored:
    """Tensors of a store, all with the same bytes."""

    def __init__(
        self, directory: Path, total: int, data: torch.Tensor, threads: int, *, persistent: bool, aligned: bool
    ) -> None:
        size = data.numel()
        self.directory = directory
        self.size = size
        self.persistent = persistent
        self.store = Store(
            directory=directory, persistent=persistent, buffer_bytes=max(4 * size, 64 << 20), disk_threads=threads
        )
        self.names = [f"{i}" for i in range(total // size)]
        if aligned:
            self.store.create("source", (size,), torch.uint8, "host")
            self.source = self.store.resident("source")
        else:
            self.source = torch.empty(size + 1, dtype=torch.uint8)[1:]
        self.source.copy_(data)
        for name in self.names:
            self.store.create(name, (size,), torch.uint8, "disk")

    def write(self) -> None:
        pending = deque()
        for name in self.names:
            if len(pending) == IN_FLIGHT:
                pending.popleft().wait()
            pending.append(self.store.write(name, self.source))
        self.store.flush()

    def read(self) -> None:
        for i, name in enumerate(self.names):
            for following in self.names[i + 1 : i + 3]:
                self.store.prefetch(following)
            self.store.release(self.store.read(name).wait())

    @contextlib.contextmanager
    def blocks(self) -> Iterator[list[tuple[int, int]]]:
        """Where its tensors lie: a descriptor and a place in that file for each block."""
        with contextlib.ExitStack() as stack:
            flags = os.O_RDWR | getattr(os, "O_DIRECT", 0)
            if self.persistent:
                paths = [next(self.directory.glob(f"{name}.*.tensor")) for name in self.names]
            else:  # one file, without a name, in which the tensors lie one after the other
                opened = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
                here = f"{os.path.realpath(self.directory)}/"
                paths = [path for path in opened if os.path.realpath(path).startswith(here)]
            found = []
            for path in paths:
                file = os.open(path, flags)
                stack.callback(os.close, file)
                stop = os.fstat(file).st_size
                start = stop - self.size if self.persistent else stop - self.size * len(self.names)
                found += [(file, at) for at in range(start, stop, BLOCK_BYTES)]
            assert len(found) * BLOCK_BYTES == self.size * len(self.names)
            yield found

    def close(self) -> None:
        self.store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--total", type=parse_bytes, default=2 << 30)
    parser.add_argument("--tensor", type=parse_bytes, default=64 << 20)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--patience", type=float, default=180.0, help="seconds, after which no new round begins")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--output", type=Path, default=HERE / "results" / "disk.json")
    options = parser.parse_args()
    size = int(options.tensor)
    if size % BLOCK_BYTES:
        parser.error(f"tensors are of whole blocks of {format_bytes(BLOCK_BYTES)} here")
    total = int(options.total) // size * size
    record = new_record(SEED, torch=torch.__version__, cores=os.cpu_count())
    folder = Path(tempfile.mkdtemp(prefix="headway-bench-", dir=options.directory))
    data = AlignedMemory(size).tensor
    data.random_(0, 256, generator=torch.Generator().manual_seed(SEED))
    seconds: dict[tuple[str, str, str], list[float]] = {}
    settling: dict[tuple[str, str, str], list[float]] = {}
    try:
        bare = Bare(data, options.threads)
        ways: dict[str, Stored] = {}
        for name, persistent, aligned in (
            ("scratch", False, True),
            ("unaligned source", False, False),  # scratch, too
            ("persistent", True, True),
        ):
            (folder / name).mkdir()
            ways[name] = Stored(folder / name, total, data, options.threads, persistent=persistent, aligned=aligned)
        refusal = next(iter(ways.values())).store.direct_io_refusal
        for way in ways.values():  # the first time files get their blocks, the second time those written over do
            way.write()
            way.write()
            way.read()
            os.sync()
        order = random.Random(SEED)
        began = time.perf_counter()
        for turn in range(options.rounds):
            for name in order.sample(list(ways), len(ways)):
                for direction in order.sample(("write", "read"), 2):
                    for kind in order.sample(KINDS, len(KINDS)):
                        with ways[name].blocks() as blocks:
                            started = time.perf_counter()
                            if kind == "store":
                                getattr(ways[name], direction)()
                            else:
                                getattr(bare, direction)(blocks, checksums=kind == "checksummed")
                            ended = time.perf_counter()
                        os.sync()
                        seconds.setdefault((name, direction, kind), []).append(ended - started)
                        settling.setdefault((name, direction, kind), []).append(time.perf_counter() - ended)
            if turn and time.perf_counter() - began > options.patience:
                break
        for way in ways.values():
            way.close()
        bare.close()
    finally:
        shutil.rmtree(folder)
    results = {}
    for (name, direction, kind), each in seconds.items():
        baseline = seconds[name, direction, "bare"]
        rates = sorted(total / one for one in each)
        results[f"{direction}, {name}: {kind}"] = {
            "bytes_per_second": statistics.median(rates),
            "lowest": rates[0],
            "highest": rates[-1],
            "settling_seconds": statistics.median(settling[name, direction, kind]),
            "share_of_bare_at_best": min(baseline) / min(each),
            "share_of_bare": statistics.median(b / own for b, own in zip(baseline, each, strict=True)),
        }
    record |= {
        "total_bytes": total, "tensor_bytes": size, "block_bytes": BLOCK_BYTES, "threads": options.threads,
        "rounds": len(next(iter(seconds.values()))), "load_after": round(os.getloadavg()[0], 2),
        "direct_io_refusal": refusal, "results": results,
    }  # fmt: skip
    table = Table(box=SIMPLE_HEAD, title=f"{format_bytes(total)} in tensors of {format_bytes(size)}")
    for title in ("", "GB/s", "lowest to highest", "of the bare loop", "(at best)", "settling, s"):
        table.add_column(title, justify="right" if title else "left")
    for name in sorted(results, key=lambda name: (name.rsplit(":", 1)[0], KINDS.index(name.rsplit(": ", 1)[1]))):
        each = results[name]
        table.add_row(
            name,
            f"{each['bytes_per_second'] / 1e9:.2f}",
            f"{each['lowest'] / 1e9:.2f} to {each['highest'] / 1e9:.2f}",
            f"{each['share_of_bare']:.0%}",
            f"{each['share_of_bare_at_best']:.0%}",
            f"{each['settling_seconds']:.2f}",
        )
    console = Console(width=100)
    console.print(table)
    if refusal:
        console.print(f"through the page cache: {refusal}")
    save_record(record, options.output)
    console.print(f"written to {options.output}")


if __name__ == "__main__":
    main()
