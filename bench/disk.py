"""How much of a disk does the tiered store reach? Against a bare loop of direct reads and writes, on the same disk.

    python bench/disk.py                                 2 GiB in tensors of 64 MiB
    python bench/disk.py --total 256MiB --rounds 2 --directory /somewhere

The bare loop is what `fio --direct=1 --bs=4M --numjobs=4` does: as many threads as the store has, each of which takes
the next 4 MiB of one file that is there already and transfers it with O_DIRECT, without checksum, name or order, out of
and into memory as large as the store's, in huge pages as well. The store writes and reads tensors of the given size:
checksums on the way, read into its pool as they are waited for, one after the other, with the next ones prefetched.
Persistent tensors are replaced crash-safely (an fdatasync for each) besides.

All take turns in each round, in an order that changes. After each turn the file systems are synchronised, which is not
counted: to throw away the blocks of a file that has been replaced would otherwise slow down whoever comes next. Figures
are medians over the rounds, ratios those within a round. A virtual disk may be faster for a while than it stays: see
the spread.
"""

import argparse
import itertools
import os
import random
import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from headway.memory.blocks import BLOCK_BYTES
from headway.memory.buffers import AlignedMemory
from headway.memory.tiers import Store
from headway.units import format_bytes, parse_bytes
from record import new_record, save_record

HERE = Path(__file__).parent
SEED = 0
THREADS = 4
IN_FLIGHT = 4  # tensors that are written at a time, as when states stream through buffers


class Bare:
    """A file whose blocks are all written, and threads that go through it with O_DIRECT."""

    def __init__(self, directory: Path, total: int, size: int, threads: int) -> None:
        self.total = total
        self.file = os.open(directory / "bare", os.O_RDWR | os.O_CREAT | getattr(os, "O_DIRECT", 0), 0o600)
        os.posix_fallocate(self.file, 0, total)
        self.source = AlignedMemory(size).tensor
        self.source.random_(0, 256, generator=torch.Generator().manual_seed(SEED))
        self.target = AlignedMemory(4 * size).tensor.zero_()
        self.workers = ThreadPoolExecutor(threads)
        self.threads = threads

    def run(self, transfer: Callable[[int, list, int], int], memory: np.ndarray) -> None:
        turns = itertools.count()

        def work() -> None:
            while (offset := next(turns) * BLOCK_BYTES) < self.total:
                block = memory[offset % memory.size :][:BLOCK_BYTES]
                if transfer(self.file, [block], offset) != BLOCK_BYTES:
                    raise OSError("a short transfer")

        for done in [self.workers.submit(work) for _ in range(self.threads)]:
            done.result()

    def write(self) -> None:
        self.run(os.pwritev, self.source.numpy())

    def read(self) -> None:
        self.run(os.preadv, self.target.numpy())

    def close(self) -> None:
        self.workers.shutdown()
        os.close(self.file)


class Stored:
    """The same bytes as tensors of a store."""

    def __init__(
        self, directory: Path, total: int, size: int, threads: int, *, persistent: bool, aligned: bool
    ) -> None:
        self.store = Store(
            directory=directory, persistent=persistent, buffer_bytes=max(4 * size, 64 << 20), disk_threads=threads
        )
        self.names = [f"{i}" for i in range(total // size)]
        if aligned:
            self.store.create("source", (size,), torch.uint8, "host")
            self.source = self.store.resident("source")
        else:
            self.source = torch.empty(size + 1, dtype=torch.uint8)[1:]
        self.source.random_(0, 256, generator=torch.Generator().manual_seed(SEED))
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
    seconds: dict[str, list[float]] = {}
    settling: dict[str, list[float]] = {}
    try:
        ways: dict[str, Bare | Stored] = {"bare": Bare(folder, total, size, options.threads)}
        for name, persistent, aligned in (
            ("scratch", False, True),
            ("scratch, unaligned source", False, False),
            ("persistent", True, True),
        ):
            (folder / name).mkdir()
            ways[name] = Stored(folder / name, total, size, options.threads, persistent=persistent, aligned=aligned)
        refusal = next(way.store.direct_io_refusal for way in ways.values() if isinstance(way, Stored))
        order = random.Random(SEED)
        began = time.perf_counter()
        for turn in range(options.rounds + 1):
            for name in order.sample(list(ways), len(ways)):
                for direction in ("write", "read"):
                    run = getattr(ways[name], direction)
                    started = time.perf_counter()
                    run()
                    ended = time.perf_counter()
                    os.sync()
                    if turn:  # the first round fills the files
                        seconds.setdefault(f"{name}: {direction}", []).append(ended - started)
                        settling.setdefault(f"{name}: {direction}", []).append(time.perf_counter() - ended)
            if turn > 1 and time.perf_counter() - began > options.patience:
                break
        for way in ways.values():
            way.close()
    finally:
        shutil.rmtree(folder)
    results = {}
    for name, each in seconds.items():
        bare = seconds["bare: " + name.rsplit(": ", 1)[1]]
        rates = sorted(total / one for one in each)
        results[name] = {
            "bytes_per_second": statistics.median(rates),
            "lowest": rates[0],
            "highest": rates[-1],
            "settling_seconds": statistics.median(settling[name]),
            "share_of_bare_at_best": min(bare) / min(each),
            "share_of_bare": statistics.median(b / own for b, own in zip(bare, each, strict=True)),
        }
    record |= {
        "total_bytes": total, "tensor_bytes": size, "block_bytes": BLOCK_BYTES, "threads": options.threads,
        "rounds": len(seconds["bare: read"]), "direct_io_refusal": refusal, "results": results,
    }  # fmt: skip
    table = Table(box=SIMPLE_HEAD, title=f"{format_bytes(total)} in tensors of {format_bytes(size)}")
    for title in ("", "GB/s", "lowest to highest", "of the bare loop", "(at best)", "settling, s"):
        table.add_column(title, justify="right" if title else "left")
    for name, each in sorted(results.items(), key=lambda item: (item[0].rsplit(": ", 1)[1], item[0])):
        table.add_row(
            name,
            f"{each['bytes_per_second'] / 1e9:.2f}",
            f"{each['lowest'] / 1e9:.2f} to {each['highest'] / 1e9:.2f}",
            f"{each['share_of_bare']:.0%}",
            f"{each['share_of_bare_at_best']:.0%}",
            f"{each['settling_seconds']:.2f}",
        )
    console = Console(width=110)
    console.print(table)
    if refusal:
        console.print(f"through the page cache: {refusal}")
    save_record(record, options.output)
    console.print(f"written to {options.output}")


if __name__ == "__main__":
    main()
