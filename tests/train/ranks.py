"""Models to train, the truth to compare with, and a pool of ranks that stays up while many plans are tried."""

from __future__ import annotations

import contextlib
import datetime
import os
import pickle
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from headway.plan.plan import Plan


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class MLP(nn.Module):
    """Residual blocks, and two parameters that no operator reads or no optimizer may change."""

    def __init__(self, width: int = 8, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual(width) for _ in range(depth))
        self.head = nn.Linear(width, 4)
        self.unread = nn.Linear(3, 3)
        self.layers[1].down.bias.requires_grad_(False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Shared(MLP):
    """The first and the third block have a weight in common."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[2].up.weight = self.layers[0].up.weight


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GELU()) for _ in range(3)))
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (
            linear(x).view(b, t, self.heads, c // self.heads).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, c))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A tiny GPT whose head is the transposed embedding."""

    def __init__(self, vocabulary: int = 17, width: int = 16, heads: int = 4, depth: int = 3, length: int = 6) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def cross_entropy(output, targets):
    output = output if isinstance(output, torch.Tensor) else output.logits
    return F.cross_entropy(output.flatten(0, -2), targets.flatten())


def make_model(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(7)
    return {"mlp": MLP, "shared": Shared, "cnn": CNN, "gpt": GPT, "llama": make_llama}[kind]().to(dtype)


def make_llama() -> nn.Module:
    """A model that nobody here wrote: grouped-query attention, rotary embeddings, an output that is no tensor."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=17, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=8,
        )
    )  # fmt: skip


def make_batch(kind: str, size: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    if kind in ("gpt", "llama"):
        ids = torch.randint(17, (size, 7), generator=generator)
        return ids[:, :-1], ids[:, 1:].contiguous()
    shape = (size, 2, 5, 5) if kind == "cnn" else (size, 8)
    inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(4, (size,), generator=generator)


def make_optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed, plain = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    return torch.optim.AdamW(groups, lr=0.01)


@dataclass
class Case:
    """What to train and how; `plan` None is plain PyTorch in one process."""

    kind: str
    plan: Plan | None
    graph: Any = None
    batch: int = 8
    steps: int = 3
    optimizer: str = "adamw"
    clip_norm: float | None = 0.5
    dtype: torch.dtype = torch.float64
    save: str = ""  # checkpoint here at the end
    load: str = ""  # begin from the checkpoint here
    first_step: int = 0


@dataclass
class Outcome:
    losses: list[float] = field(default_factory=list)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)


def train_plainly(case: Case) -> Outcome:
    """The truth: the ordinary loop, with no Headway in it."""
    model = make_model(case.kind, case.dtype)
    optimizer = make_optimizer(case.optimizer, model)
    losses = []
    for step in range(case.steps):
        inputs, targets = make_batch(case.kind, case.batch, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == torch.float32):
            loss = cross_entropy(model(inputs), targets)
        loss.backward()
        if case.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), case.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Outcome(losses, {name: p.detach().clone() for name, p in model.named_parameters()})


def train_under_plan(case: Case) -> Outcome:
    """The same under a plan, on this rank."""
    import torch.distributed as dist

    from headway.train.data import slice_batch, split_batch
    from headway.train.parallel import parallelise

    assert case.plan is not None
    plan, rank = case.plan, dist.get_rank() if dist.is_initialized() else 0
    model = make_model(case.kind, case.dtype)
    if rank:
        with torch.no_grad():  # a script that seeds its ranks differently must not matter
            next(model.parameters()).add_(1.0)
    optimizer = make_optimizer(case.optimizer, model)
    parallel = parallelise(model, optimizer, plan, case.graph, rank=rank, loss=cross_entropy, clip_norm=case.clip_norm)
    if case.load:
        from headway.train.checkpoint import load

        load(Path(case.load), parallel)
    # Pieces under way are few in a store because all its stages share them.
    assert len({id(infinity._staging) for infinity in parallel.infinities}) <= 1
    outcome = Outcome()
    _, replica, _ = plan.coordinates(rank)
    share = case.batch // plan.data
    for step in range(case.first_step, case.steps):
        batch = make_batch(case.kind, case.batch, step)
        mine = slice_batch(batch, replica * share, (replica + 1) * share, case.batch)
        loss = parallel.step(split_batch(mine, plan.micro_batches))
        value = torch.zeros(2, dtype=torch.float64)
        if loss is not None:
            value += torch.tensor([loss.item(), 1.0], dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(value)
        outcome.losses.append((value[0] / value[1]).item())
    if parallel.offload is not None:
        parallel.offload.settle()
    if case.save:
        from headway.train.checkpoint import save

        save(Path(case.save), parallel, step=case.steps)
    with parallel.present():
        outcome.parameters = whole_parameters(parallel)
    parallel.close()
    return outcome


def whole_parameters(parallel: Any) -> dict[str, torch.Tensor]:
    """Every parameter that this rank holds a part of, put together."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    found = {}
    for name, parameter in parallel.parameters():
        whole = parameter.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        if name in parallel.tensor_dims:
            parts = [torch.empty_like(whole) for _ in range(parallel.plan.tensor)]
            dist.all_gather(parts, whole.contiguous(), group=parallel.group("tensor"))
            whole = torch.cat(parts, parallel.tensor_dims[name])
        found[name] = whole.clone()
    return found


class Pool:
    """Up to four ranks that wait for cases. A case with n ranks is run by ranks 0 to n-1 of a pool of n."""

    def __init__(self, size: int, exchange: str = "torch") -> None:
        self._folder = tempfile.TemporaryDirectory()
        environment = {
            **os.environ,
            "BACKEND": "gloo" if exchange == "torch" else exchange,
            "WORLD_SIZE": str(size),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": str(Path(__file__).parent),
            "RENDEZVOUS": f"file://{self._folder.name}/store",
        }
        self._ranks = [
            subprocess.Popen(
                [sys.executable, "-c", "import ranks; ranks.serve()"],
                env={**environment, "RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for rank in range(size)
        ]

    def run(self, case: Case) -> list[Outcome]:
        """The outcome of every rank. Raises what the first failing rank raised."""
        for rank in self._ranks:
            assert rank.stdin is not None
            pickle.dump(case, rank.stdin)
            rank.stdin.flush()
        outcomes = []
        for rank in self._ranks:
            assert rank.stdout is not None
            outcomes.append(pickle.load(rank.stdout))
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return outcomes

    def close(self) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.wait()
            for stream in (rank.stdin, rank.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()
        self._folder.cleanup()


def serve() -> None:
    """Be one rank: read cases from standard input, a pickle each, and answer on standard output."""
    import traceback

    import torch.distributed as dist

    # Whatever libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if size > 1:
        # A rank that fails leaves the others waiting: not for long.
        patience = datetime.timedelta(seconds=60)
        dist.init_process_group(
            os.environ["BACKEND"],
            init_method=os.environ["RENDEZVOUS"],
            rank=rank,
            world_size=size,
            timeout=patience,
        )
    while True:
        try:
            case = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: Any
        try:
            answer = train_under_plan(case)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test shall see it
            traceback.print_exc()
            answer = RuntimeError(f"rank {rank}: {type(error).__name__}: {error}")
        pickle.dump(answer, answers)
        answers.flush()
