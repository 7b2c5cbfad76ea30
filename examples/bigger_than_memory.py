"""Train a model whose states are more than four times the memory that the process may have: the disk carries the rest.

    python examples/bigger_than_memory.py

Trains twice, each time in a process of its own, and compares the losses. The first has what memory it wants. In the
second the kernel refuses memory beyond a limit (RLIMIT_DATA: all private writable memory, so tensors, buffers, heaps
and stacks) set less than a quarter of the model's states above what the process holds with all libraries loaded, before
the model is made. On a CPU the device's memory is the host's: one limit holds for both together, so neither has more.

What is enforced: the kernel's limit on the whole process; the store's budget of 0 bytes for tensors that rest on the
host, and its pool of transfer buffers. Not counted: file-backed pages (libraries), and the disk, which is what is used.
The example fails unless the states are at least 4 times the device's budget and 2 times the host's, the disk holds the
rest, and the losses are the same, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.memory.tiers import Store
from headway.plan.plan import Plan, Stage
from headway.train.parallel import Parallel, parallelise
from headway.workload.trace import trace

VOCABULARY = 256
CONTEXT = 32
DEVICE_RATIO, HOST_RATIO = 4.0, 2.0  # the states are at least so many times what device and host may hold


class Block(nn.Module):
    """Pre-norm transformer block. Shapes: B samples, T tokens, C channels, H heads."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.query, self.key = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.value, self.out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x_BTC: Tensor) -> Tensor:
        batch, tokens, channels = x_BTC.shape
        y_BTC = self.norm1(x_BTC)
        heads = (batch, tokens, -1, 64)
        q_BHTD, k_BHTD, v_BHTD = (
            project(y_BTC).view(heads).transpose(1, 2) for project in (self.query, self.key, self.value)
        )
        a_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)
        x_BTC = x_BTC + self.out(a_BHTD.transpose(1, 2).reshape(batch, tokens, channels))
        return x_BTC + self.down(F.gelu(self.up(self.norm2(x_BTC))))


class GPT(nn.Module):
    """Bytes in, logits over the next byte out."""

    def __init__(self, layers: int, channels: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, channels), nn.Embedding(CONTEXT, channels)
        self.blocks = nn.ModuleList(Block(channels) for _ in range(layers))
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, VOCABULARY)
        for number, module in enumerate(self.modules()):
            module.number = number  # type: ignore[assignment]

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTC = self.tokens(ids_BT) + self.positions(torch.arange(ids_BT.shape[1], device=ids_BT.device))
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return self.head(self.norm(x_BTC))


def initialise(module: nn.Module) -> None:
    """Give a module's own parameters their first values: the same, whatever was initialised before."""
    generator = torch.Generator().manual_seed(int(module.number))  # type: ignore[arg-type]
    for name, parameter in module.named_parameters(recurse=False):
        if isinstance(module, nn.LayerNorm):
            nn.init.constant_(parameter, float(name == "weight"))
        else:
            nn.init.normal_(parameter, std=0.02, generator=generator)


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids_BT = torch.randint(VOCABULARY, (2, CONTEXT + 1), generator=generator)
    return ids_BT[:, :-1], ids_BT[:, 1:].contiguous()


def make(layers: int, channels: int, store: Store | None) -> Parallel:
    """The model ready to train: all in memory, or parameters and optimizer on the disk of `store`."""
    with torch.device("meta"):
        model = GPT(layers, channels)
    inputs, targets = batch_of(0)
    graph = trace(model, inputs, name="gpt", loss=cross_entropy, target=targets)
    if store is None:
        model.to_empty(device="cpu")
        for module in model.modules():
            initialise(module)
    plan = Plan(
        model="gpt",
        devices=("cpu",),
        global_batch=2,
        micro_batch=2,
        stages=(Stage(start=0, stop=len(graph.layers), recompute=tuple(range(len(graph.layers)))),),
        parameters_on="device" if store is None else "disk",
        optimizer_on="device" if store is None else "disk",
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return parallelise(model, optimizer, plan, graph, loss=cross_entropy, store=store, initialise=initialise)


def train(layers: int, channels: int, steps: int, store: Store | None) -> tuple[list[float], float]:
    """The loss of each step, and the most bytes that rested on the disk."""
    parallel = make(layers, channels, store)
    losses = []
    for step in range(steps):
        loss = parallel.step([batch_of(step)])
        assert loss is not None
        losses.append(loss.item())
    on_disk = parallel.tier_bytes().get("disk", 0.0)
    parallel.close()
    return losses, on_disk


def open_disk(directory: str, buffer_bytes: int) -> Store:
    return Store(directory=directory, buffer_bytes=buffer_bytes, budgets={"host": 0}, block_bytes=2**20, disk_threads=2)


def private_bytes() -> int:
    """Private writable memory of this process, which RLIMIT_DATA limits."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
    return int(line.split()[1]) * 1024


def restricted(arguments: argparse.Namespace, states_bytes: int) -> dict[str, object]:
    """Train with less than a quarter of the states' bytes above what the libraries hold."""
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        threading.stack_size(2**20)  # the default of 8 MiB for each thread would count in full
        # A tiny model first: threads and compiled functions are there before memory is counted.
        train(2, 64, 2, open_disk(directory, 2**20))
        budget = int(states_bytes / arguments.ratio)
        limit = private_bytes() + budget
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        try:
            torch.empty(budget + 2**26, dtype=torch.uint8)
        except RuntimeError:
            pass  # as it should be
        else:
            raise SystemExit("the kernel does not enforce RLIMIT_DATA here")
        started = time.perf_counter()
        losses, on_disk = train(
            arguments.layers, arguments.channels, arguments.steps, open_disk(directory, budget // 8)
        )
        seconds = time.perf_counter() - started
    return {
        "losses": losses,
        "budget_bytes": budget,
        "on_disk_bytes": on_disk,
        "limit_bytes": limit,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--ratio", type=float, default=4.5, help="states / memory; below 4 the example refuses")
    parser.add_argument("--directory", default=None, help="where the disk tier lies; by default among temporary files")
    parser.add_argument("--role", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in GPT(arguments.layers, arguments.channels).parameters())
    # On disk: float32 parameters, masters and two moments. In memory the parameters are their own masters, and there
    # are gradients: 16 bytes a parameter either way.
    states_bytes = 16 * count
    if arguments.role == "restricted":
        print(json.dumps(restricted(arguments, states_bytes)))
        return
    if arguments.role == "unrestricted":
        print(json.dumps({"losses": train(arguments.layers, arguments.channels, arguments.steps, None)[0]}))
        return
    outcomes = {}
    for role in ("unrestricted", "restricted"):
        command = [sys.executable, __file__, *sys.argv[1:], "--role", role]
        # What is freed goes back to the kernel, and is not kept in a heap for each thread.
        environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        outcomes[role] = json.loads(done.stdout.splitlines()[-1])
    first, second = outcomes["unrestricted"], outcomes["restricted"]
    budget, on_disk = second["budget_bytes"], second["on_disk_bytes"]
    ratio = states_bytes / budget
    print(f"{count / 1e6:.1f} M parameters, {states_bytes / 1e6:.0f} MB of states (16 bytes a parameter)")
    print(f"enforced by the kernel: {budget / 1e6:.0f} MB for device and host together (RLIMIT_DATA)")
    print(f"states / device budget: {ratio:.2f}  (at least {DEVICE_RATIO:g})")
    print(f"states / host budget:   {ratio:.2f}  (at least {HOST_RATIO:g})")
    print(f"on the disk at most:    {on_disk / 1e6:.0f} MB, {on_disk / states_bytes:.0%} of the states")
    print(f"losses without a limit: {first['losses']}")
    print(f"losses within it:       {second['losses']}  ({second['seconds']:.1f} s)")
    failures = [
        text
        for failed, text in (
            (ratio < max(DEVICE_RATIO, HOST_RATIO), "the budget is too large for what is claimed"),
            (on_disk < states_bytes - budget, "the disk does not hold the rest"),
            (first["losses"] != second["losses"], "the losses differ"),
        )
        if failed
    ]
    if failures:
        raise SystemExit("; ".join(failures))
    print("the same, bit for bit")


if __name__ == "__main__":
    main()
