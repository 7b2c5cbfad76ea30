"""How fast is AdamW on the host, beside torch's fused step with its casts, and beside what memory allows?

    python bench/host_optimizer.py                       32 M parameters, all cores and one
    python bench/host_optimizer.py --elements 4000000 --rounds 3

One step takes a bfloat16 gradient to a bfloat16 parameter by way of the float32 master and both moments: 14 bytes in
and 14 out for each parameter. The peer does it with torch: gradient to float32, fused AdamW, copy into the bfloat16
parameter. The bound is the quicker, in each round, of two compiled loops that read and write the same arrays (all at
once, or one after the other by blocks that stay in the cache), in the same pieces on the same threads, and add one to
each number: an Adam-shaped stream without the Adam. What moves fewer bytes is compared by its rate in bytes.

All ways work on the same arrays, in huge pages as those of a `Store` are, and take turns in each round in an order that
changes, so that whatever else the machine does falls on all. Ratios are medians over the rounds of the ratio in one.
"""

import argparse
import itertools
import os
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from headway.memory.buffers import AlignedMemory, as_tensor
from headway.memory.optimizer import HostOptimizer, Rule
from headway.plan.plan import Moments
from record import new_record, save_record

HERE = Path(__file__).parent
SEED = 0
PIECE = 128 << 10
BLOCK = 1024
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
SGD: dict[str, Any] = {**ADAMW, "lr": 0.1, "momentum": 0.9, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0}
BOUNDS = ("stream, all arrays at once", "stream, by blocks")
PEER = "torch: cast, fused step, copy"


@numba.njit(nogil=True)
def stream_at_once(gradient, master, first, second, out):
    for i in range(len(master)):
        master[i] += np.float32(1)
        first[i] += np.float32(1)
        second[i] += np.float32(1)
        out[i] = gradient[i] + np.uint16(1)


@numba.njit(nogil=True)
def add_one(numbers):
    for i in range(len(numbers)):
        numbers[i] += np.float32(1)


@numba.njit(nogil=True)
def add_one_into(gradient, out):
    for i in range(len(gradient)):
        out[i] = gradient[i] + np.uint16(1)


@numba.njit(nogil=True)
def stream_by_blocks(gradient, master, first, second, out):
    for a in range(0, len(master), BLOCK):
        b = min(a + BLOCK, len(master))
        add_one(master[a:b])
        add_one(first[a:b])
        add_one(second[a:b])
        add_one_into(gradient[a:b], out[a:b])


@dataclass(frozen=True)
class Way:
    """A step, and the bytes that it has to move for each parameter."""

    run: Callable[[], None]
    moved_bytes: float


class Subject:
    """The arrays of one model, and what can be done with them on so many threads."""

    def __init__(self, elements: int, threads: int) -> None:
        generator = torch.Generator().manual_seed(SEED)
        torch.set_num_threads(threads)
        self.elements, self.threads = elements, threads
        self.gradient = self.new(torch.bfloat16)
        self.gradient.copy_(torch.randn(elements, generator=generator).mul_(1e-3))
        self.out = self.new(torch.bfloat16)
        self.wide_gradient = self.new(torch.float32)
        self.master = torch.nn.Parameter(self.new(torch.float32).normal_(generator=generator))
        self.master.grad = self.wide_gradient
        self.moments = [self.new(torch.float32), self.new(torch.float32)]
        self.number = 0
        self.workers = ThreadPoolExecutor(threads)
        at_once, by_blocks = BOUNDS
        self.ways = {
            at_once: Way(lambda: self.stream(stream_at_once), 28),
            by_blocks: Way(lambda: self.stream(stream_by_blocks), 28),
            PEER: Way(self.torch_step(fused=True), 28),
            "torch: cast, default step, copy": Way(self.torch_step(foreach=False), 28),
        }
        ours: tuple[tuple[str, Rule, dict[str, Any], Moments, bool], ...] = (
            ("adamw, as torch's fused", "adamw", ADAMW, "float32", True),
            ("adamw, as torch's default", "adamw", ADAMW, "float32", False),
            ("adamw, bfloat16 moments", "adamw", ADAMW, "bfloat16", False),
            ("adamw, int8 moments", "adamw", ADAMW, "int8", False),
            ("sgd with momentum", "sgd", SGD, "float32", False),
            ("sgd, int8 momentum", "sgd", SGD, "int8", False),
        )
        for name, rule, group, moments, is_fused in ours:
            optimizer = HostOptimizer(rule, group, moments=moments, is_fused=is_fused)
            self.ways[f"headway: {name}"] = Way(self.step_of(optimizer), 12 + 2 * optimizer.state_bytes_per_element)

    def new(self, dtype: torch.dtype, elements: int | None = None) -> torch.Tensor:
        elements = elements or self.elements
        return as_tensor(AlignedMemory(elements * dtype.itemsize).tensor, (elements,), dtype)

    def step_of(self, optimizer: HostOptimizer) -> Callable[[], None]:
        if optimizer.moments == "float32":
            states = self.moments[: len(optimizer.states)]
        else:
            states = [self.new(each.dtype, each.count(self.elements)) for each in optimizer.states]
            for name in optimizer.moment_names:
                optimizer.write_moment(states, name, torch.zeros(self.elements))

        def step() -> None:
            self.number += 1
            optimizer.step(self.number, self.gradient, self.master, states, self.out)

        return step

    def torch_step(self, **options: Any) -> Callable[[], None]:
        optimizer = torch.optim.AdamW([self.master], **{**ADAMW, **options})
        first, second = self.moments
        optimizer.state[self.master] = {"step": torch.tensor(0.0), "exp_avg": first, "exp_avg_sq": second}

        def step() -> None:
            self.wide_gradient.copy_(self.gradient)
            optimizer.step()
            self.out.copy_(self.master.detach())

        return step

    def stream(self, loop: Callable[..., None]) -> None:
        arrays = [
            self.gradient.view(torch.uint16).numpy(),
            self.master.detach().numpy(),
            *(moment.numpy() for moment in self.moments),
            self.out.view(torch.uint16).numpy(),
        ]
        turns = itertools.count()

        def work() -> None:
            while (a := next(turns) * PIECE) < self.elements:
                loop(*(array[a : a + PIECE] for array in arrays))

        others = [self.workers.submit(work) for _ in range(self.threads - 1)]
        work()
        for done in others:
            done.result()

    def reset(self) -> None:
        """Adding one makes moments that no training has: from time to time they begin anew."""
        for moment in self.moments:
            moment.zero_()
        with torch.no_grad():
            self.master.clamp_(-3, 3)


def measure(elements: int, threads: int, rounds: int, patience_seconds: float) -> dict[str, dict[str, float]]:
    subject = Subject(elements, threads)
    ways = subject.ways
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    order = random.Random(SEED)
    began = time.perf_counter()
    for turn in range(rounds + 1):
        for name in order.sample(list(ways), len(ways)):
            started = time.perf_counter()
            ways[name].run()
            if turn:  # the first one compiles
                seconds[name].append(time.perf_counter() - started)
        subject.reset()
        if turn > 1 and time.perf_counter() - began > patience_seconds:
            break
    bounds = [min(both) for both in zip(*(seconds[name] for name in BOUNDS), strict=True)]

    def ratio(ours: list[float], theirs: list[float]) -> float:
        return statistics.median(other / own for own, other in zip(ours, theirs, strict=True))

    return {
        name: {
            "seconds": statistics.median(each),
            "best_seconds": min(each),
            "bytes_per_parameter": ways[name].moved_bytes,
            "parameters_per_second": elements / statistics.median(each),
            "bytes_per_second": elements * ways[name].moved_bytes / statistics.median(each),
            "speedup_over_torch": ratio(each, seconds[PEER]),
            "share_of_bound": ratio(each, bounds) * ways[name].moved_bytes / 28,
            "share_of_bound_at_best": min(bounds) / min(each) * ways[name].moved_bytes / 28,
            "rounds": len(each),
        }
        for name, each in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=32_000_000)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--patience", type=float, default=80.0, help="seconds for each number of threads")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "host_optimizer.json")
    options = parser.parse_args()
    record = new_record(SEED, torch=torch.__version__, numba=numba.__version__, cores=torch.get_num_threads())
    record |= {"elements": options.elements, "results": {}}
    console = Console(width=100)
    for threads in sorted({torch.get_num_threads(), 1}, reverse=True):
        results = measure(options.elements, threads, options.rounds, options.patience)
        record["results"][f"{threads} threads"] = results
        table = Table(box=SIMPLE_HEAD, title=f"{options.elements / 1e6:g} M parameters, {threads} threads")
        for title in ("", "ms", "best", "G parameters/s", "GB/s", "over torch", "of the stream", "(at best)"):
            table.add_column(title, justify="right" if title else "left")
        for way, each in results.items():
            table.add_row(
                way,
                f"{each['seconds'] * 1e3:.1f}",
                f"{each['best_seconds'] * 1e3:.1f}",
                f"{each['parameters_per_second'] / 1e9:.2f}",
                f"{each['bytes_per_second'] / 1e9:.1f}",
                f"{each['speedup_over_torch']:.2f}x",
                f"{each['share_of_bound']:.0%}",
                f"{each['share_of_bound_at_best']:.0%}",
            )
        console.print(table)
    record["load_after"] = round(os.getloadavg()[0], 2)
    save_record(record, options.output)
    console.print(f"written to {options.output}; load {record['load_before']} before, {record['load_after']} after")


if __name__ == "__main__":
    main()
