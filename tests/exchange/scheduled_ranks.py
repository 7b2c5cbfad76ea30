"""Cases of training with `PriorityExchange`, run by `gloo_ranks.run_case` in real processes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))

import gloo_ranks

from headway.collective.priority import SubTensor
from headway.errors import HeadwayError, InputError, RunError
from headway.exchange import process_group
from headway.exchange.scheduled import PriorityExchange

STEPS = 6
SMALL = {"partition_bytes": 256, "credit_bytes": 600}

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, amsgrad=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


class Awkward(nn.Module):
    """What makes it hard to say when a parameter is read: weights in common, weights read by other modules (attention
    reads its output projection itself), a branch that not every rank takes, a layer that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.sometimes = nn.Linear(8, 8)
        self.never = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, tokens: torch.Tensor, branch: bool) -> torch.Tensor:
        x = self.embedding(tokens)
        x = self.norm(self.convolution(x.transpose(1, 2))).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        if branch:
            x = x + self.sometimes(x)
        return self.head(self.frozen(x) * self.scale)


def batch(rank: int, step: int) -> tuple[torch.Tensor, bool]:
    tokens = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(100 * step + rank))
    return tokens, (step + rank) % 2 == 0 and step % 3 != 2


def loss_of(model: nn.Module, rank: int, step: int) -> torch.Tensor:
    tokens, branch = batch(rank, step)
    return nn.functional.cross_entropy(model(tokens, branch).flatten(0, 1), tokens.flatten())


def with_ddp(optimizer: str, rank: int, group: Any, *, clip: float = 0.0, passes: int = 1) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = Awkward()
    wrapped = DistributedDataParallel(model, process_group=group, find_unused_parameters=True)
    updates = OPTIMIZERS[optimizer](model.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(updates, 0.8)
    for step in range(STEPS):
        for number in range(passes - 1):
            with wrapped.no_sync():
                loss_of(wrapped, rank, STEPS * (number + 1) + step).backward()
        loss_of(wrapped, rank, step).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        updates.step()
        schedule.step()
        updates.zero_grad()
    return [tensor.detach().clone() for tensor in model.parameters()]


def with_priority(
    optimizer: str, rank: int, group: Any, *, clip: float = 0.0, passes: int = 1, look: bool = False, **options: Any
) -> list[torch.Tensor]:
    # Rank 0's parameters are the ones that count, as in DistributedDataParallel.
    torch.manual_seed(rank)
    model = Awkward()
    updates = OPTIMIZERS[optimizer](model.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(updates, 0.8)
    with PriorityExchange(model, updates, group, backward_passes_per_step=passes, **{**SMALL, **options}) as exchange:
        for step in range(STEPS):
            for number in range(passes - 1):
                loss_of(model, rank, STEPS * (number + 1) + step).backward()
            loss_of(model, rank, step).backward()
            if clip:
                exchange.wait_for_gradients()
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            exchange.step()
            schedule.step()
            updates.zero_grad()
            if look:
                model.state_dict()
                updates.state_dict()
                with torch.inference_mode():
                    model.eval()(batch(rank, step)[0], True)
                model.train()
    assert all(parameter.grad is None for parameter in model.parameters())
    return [tensor.detach().clone() for tensor in model.parameters()]


def everything(rank: int, size: int) -> dict:
    """All cases that end well, one after the other: starting processes takes longer than any of them."""
    before = threading.active_count()
    pair: Any = dist.new_group([0, 1])
    results: dict[Any, Any] = training(rank, pair) if rank < 2 else {}
    results.update(order(rank))
    results["misuse"] = misuse(dist.new_group([rank], use_local_synchronization=True))
    results["threads"] = threading.active_count() - before
    process_group.register()
    own: Any = dist.new_group([0, 1], backend="headway")
    everybody: Any = dist.new_group(backend="headway")
    results["on headway"] = training(rank, own) if rank < 2 else {}
    results["on headway"].update(order(rank, everybody))
    for group in (own, everybody) if rank < 2 else (everybody,):
        dist.destroy_process_group(group)
    return results


def training(rank: int, group: Any) -> dict:
    results: dict[Any, Any] = {}
    for optimizer in OPTIMIZERS:
        results["ddp", optimizer] = with_ddp(optimizer, rank, group)
        results["priority", optimizer] = with_priority(optimizer, rank, group)
    results["clipped"] = [with_ddp("sgd", rank, group, clip=0.1), with_priority("sgd", rank, group, clip=0.1)]
    results["accumulated"] = [with_ddp("adam", rank, group, passes=3), with_priority("adam", rank, group, passes=3)]
    results["awaited"] = with_priority("sgd", rank, group, across_steps=False)
    results["looked at"] = with_priority("adam", rank, group, look=True)
    results["whole"] = with_priority("adam", rank, group, partition_bytes=float("inf"), credit_bytes=float("inf"))
    return results


def order(rank: int, group: Any = None) -> dict:
    """What is started, and in which order, is written down."""
    source = random.Random(rank)
    started: list[tuple[str, int]] = []
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    updates = torch.optim.SGD(model.parameters(), lr=0.1)

    # With gradients that are all ready before the second part starts, the first layer's go first.
    hurried: list[int] = []
    produced = threading.Event()

    def start_slowly(part: SubTensor) -> None:
        hurried.append(int(part.tensor))
        produced.wait(60)

    exchange = PriorityExchange(model, updates, group, partition_bytes=256, credit_bytes=256, on_start=start_slowly)
    model(torch.randn(4, 16)).sum().backward()
    exchange.step()
    produced.set()
    exchange.close()

    # Gradients get ready at other times on each rank.
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: time.sleep(source.choice((0.0, 0.0, 0.003, 0.01))))
    exchange = PriorityExchange(
        model,
        updates,
        group,
        partition_bytes=256,
        credit_bytes=512,
        on_start=lambda part: started.append((part.tensor, part.part)),
    )
    for _ in range(5):
        model(torch.randn(4, 16)).square().sum().mul(0.01).backward()
        exchange.step()
        # What the loop itself sends must not get in between.
        dist.all_reduce(torch.ones(3))
    exchange.close()
    return {"hurried": hurried, "started": started, "parameters": [p.detach().clone() for p in model.parameters()]}


def misuse(alone: Any) -> dict:
    messages = {}

    def told(name: str, kind: type[Exception], action: Any) -> None:
        try:
            action()
        except kind as error:
            messages[name] = str(error)

    model = nn.Linear(2, 2)
    inputs = torch.ones(1, 2)
    updates = torch.optim.SGD(model.parameters(), lr=0.1)
    told("unsplit", InputError, lambda: PriorityExchange(model, torch.optim.LBFGS(model.parameters()), alone))
    foreign = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    told("foreign", InputError, lambda: PriorityExchange(model, foreign, alone))
    with PriorityExchange(model, updates, alone) as exchange:
        model(inputs).sum().backward()
        told("twice", RunError, lambda: model(inputs).sum().backward())
        exchange.step()
        # Read before its update, without its module: found out when the gradient comes.
        told("outside", RunError, lambda: (inputs @ model.weight).sum().backward())
        exchange.synchronize()
    told("closed", RunError, exchange.step)
    hurt = torch.nn.Embedding(3, 2, sparse=True)
    with PriorityExchange(hurt, torch.optim.SGD(hurt.parameters(), lr=0.1), alone):
        told("sparse", InputError, lambda: hurt(torch.tensor([1])).sum().backward())
    return messages


def killed_on_headway(rank: int, size: int) -> dict:
    """The same, on Headway's own backend."""
    process_group.register()
    return killed(rank, size, dist.new_group(backend="headway"))


def killed(rank: int, size: int, group: Any = None) -> dict:
    """Rank 1 dies in mid-step; the others must hear of it."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    updates = torch.optim.SGD(model.parameters(), lr=0.01)
    exchange = PriorityExchange(model, updates, group, partition_bytes=1024, credit_bytes=4096, timeout_seconds=20)
    begun = time.monotonic()
    try:
        for step in range(50):
            loss = model(torch.randn(2, 64)).sum()
            if rank == 1 and step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            loss.backward()
            exchange.step()
    except HeadwayError as error:
        failure = error
    else:
        failure = None
    seconds = time.monotonic() - begun
    with contextlib.suppress(HeadwayError):
        exchange.close()
    return {"failure": type(failure).__name__, "text": str(failure), "seconds": seconds}


if __name__ == "__main__":
    gloo_ranks.main(globals())
