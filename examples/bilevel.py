"""Choosing how to train while training: a strategy matrix learned together with the weights of the model.

The two levels of pipeDejavu's notes, on a real training: theta, the weights, goes down the gradient of the training
loss; A, a row of logits for each choice, goes down the measured time of a step. At every step a strategy is drawn from
the softmax of A's rows, the step is run and timed, and A is changed by the score function (REINFORCE: the gradient of
log p(strategy), times how much slower than usual the step was). All strategies compute the same gradients, so no step
is lost to trying. The choices, which change the time and not the result:

- micro-batches: the batch at once, or in 2, 4 or 8 parts whose gradients are added;
- attention of each block: one fused operator, or scores, softmax and product written out;
- recomputation of each block: activations kept, or computed again in backward;
- threads: of the processor, one or all.

A is compared with measuring every strategy, and with coordinate search, which tries one change at a time.

    python examples/bilevel.py                 two minutes on two cores
    python examples/bilevel.py --blocks 3      four times as many strategies
"""

import argparse
import itertools
import math
import os
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt import GPT, Block, loss_function


class Switchable(nn.Module):
    """A block of the GPT whose attention and recomputation can be chosen anew at each step."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block
        self.fused = True
        self.recompute = False

    def forward(self, x_BTC: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._run, x_BTC, use_reentrant=False)
        return self._run(x_BTC)

    def _run(self, x_BTC: Tensor) -> Tensor:
        if self.fused:
            return self.block(x_BTC)
        block = self.block
        batch, tokens, channels = x_BTC.shape
        y_BTC = block.norm_attention(x_BTC)
        heads = (batch, tokens, block.heads, channels // block.heads)
        q, k, v = (linear(y_BTC).view(heads).transpose(1, 2) for linear in (block.query, block.key, block.value))
        scores_BHTT = q @ k.transpose(2, 3) / math.sqrt(channels // block.heads)
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        a_BHTD = scores_BHTT.masked_fill(future, -torch.inf).softmax(-1) @ v
        x_BTC = x_BTC + block.output(a_BHTD.transpose(1, 2).reshape(batch, tokens, channels))
        return x_BTC + block.down(F.gelu(block.up(block.norm_mlp(x_BTC))))


@dataclass
class Choice:
    """One row of A: what can be chosen, and its logits."""

    name: str
    values: tuple
    logits: Tensor


class Training:
    """A small GPT, and its steps under any strategy: one position for each choice."""

    def __init__(self, blocks: int, batch: int, tokens: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = GPT(layers=blocks, channels=64, heads=4, context=tokens)
        self.blocks = [Switchable(block) for block in self.model.blocks]  # type: ignore[arg-type]
        self.model.blocks = nn.ModuleList(self.blocks)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.text = torch.tensor(list((__doc__ or "").encode() * 20))
        self.batch, self.tokens = batch, tokens
        threads = os.cpu_count() or 1
        rows: list[tuple[str, tuple]] = [("micro-batches", (1, 2, 4, 8)), ("threads", tuple(sorted({1, threads})))]
        for at in range(blocks):
            rows += [
                (f"block {at} attention", ("fused", "unfused")),
                (f"block {at} activations", ("kept", "recomputed")),
            ]
        self.choices = [Choice(name, values, torch.zeros(len(values))) for name, values in rows]

    def step(self, strategy: tuple[int, ...]) -> tuple[float, float]:
        """One step of training: (loss, seconds). The loss does not depend on the strategy, rounding aside."""
        values = [choice.values[at] for choice, at in zip(self.choices, strategy, strict=True)]
        parts, threads, *of_blocks = values
        torch.set_num_threads(threads)
        for at, block in enumerate(self.blocks):
            block.fused = of_blocks[2 * at] == "fused"
            block.recompute = of_blocks[2 * at + 1] == "recomputed"
        starts = torch.randint(len(self.text) - self.tokens - 1, (self.batch,))
        windows = torch.stack([self.text[start : start + self.tokens + 1] for start in starts.tolist()])
        began = time.perf_counter()
        self.optimizer.zero_grad()
        total = 0.0
        for part in windows.chunk(parts):
            loss = loss_function(self.model(part[:, :-1]), part[:, 1:]) / parts
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        return total, time.perf_counter() - began

    def describe(self, strategy: tuple[int, ...]) -> str:
        values = [choice.values[at] for choice, at in zip(self.choices, strategy, strict=True)]
        per_block = " ".join(f"{values[2 + 2 * at]}/{values[3 + 2 * at]}" for at in range(len(self.blocks)))
        return f"{values[0]} micro-batches, {values[1]} threads, {per_block}"

    def measure(self, strategy: tuple[int, ...], repeat: int) -> float:
        """The median of some steps."""
        return statistics.median(self.step(strategy)[1] for _ in range(repeat))


def learn(training: Training, steps: int, rate: float) -> tuple[tuple[int, ...], float, float]:
    """Train theta and A together; (the most probable strategy, first and last loss)."""
    usual, spread = None, 0.1
    first = last = 0.0
    for step in range(steps):
        chances = [choice.logits.softmax(0) for choice in training.choices]
        strategy = tuple(int(torch.multinomial(chance, 1)) for chance in chances)
        loss, seconds = training.step(strategy)
        first, last = (loss if step == 0 else first), loss
        # Times have outliers that are the machine's, not the strategy's: logarithms, and a bound.
        figure = math.log(seconds)
        if usual is None:
            usual = figure
            continue
        advantage = max(-2.0, min(2.0, (figure - usual) / spread))
        for choice, chance, at in zip(training.choices, chances, strategy, strict=True):
            chosen = F.one_hot(torch.tensor(at), len(chance))
            choice.logits -= rate * advantage * (chosen - chance)
        spread += 0.05 * (abs(figure - usual) - spread)
        usual += 0.05 * (figure - usual)
    return tuple(int(choice.logits.argmax()) for choice in training.choices), first, last


def coordinate_search(training: Training, steps: int) -> tuple[int, ...]:
    """One choice after another, every value of it tried equally often, the best median kept; as many steps."""
    best = tuple(0 for _ in training.choices)
    tries = max(1, steps // sum(len(choice.values) for choice in training.choices))
    for at, choice in enumerate(training.choices):
        found = {value: (*best[:at], value, *best[at + 1 :]) for value in range(len(choice.values))}
        times = {value: training.measure(strategy, tries) for value, strategy in found.items()}
        best = found[min(times, key=times.__getitem__)]
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300, help="of training with A")
    parser.add_argument("--rate", type=float, default=0.15, help="of A")
    parser.add_argument("--repeat", type=int, default=3, help="steps with which each strategy is measured")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    training = Training(arguments.blocks, arguments.batch, arguments.tokens, arguments.seed)
    everything = list(itertools.product(*(range(len(choice.values)) for choice in training.choices)))
    for strategy in everything[:: max(1, len(everything) // 8)]:
        training.step(strategy)  # the first calls allocate

    chosen, first, last = learn(training, arguments.steps, arguments.rate)
    print(f"{arguments.steps} steps: loss {first:.3f} to {last:.3f}, {len(everything)} strategies\n")
    for choice in training.choices:
        shares = ", ".join(f"{value} {share:.0%}" for value, share in zip(choice.values, choice.logits.softmax(0)))
        print(f"  {choice.name:22} {shares}")
    coordinate = coordinate_search(training, arguments.steps)

    # All strategies in turn, several times over: what else the machine does then hits all alike.
    times: dict[tuple[int, ...], list[float]] = {strategy: [] for strategy in everything}
    for _ in range(arguments.repeat):
        for strategy in everything:
            times[strategy].append(training.step(strategy)[1])
    ranked = sorted(everything, key=lambda strategy: statistics.median(times[strategy]))
    medians = {strategy: statistics.median(times[strategy]) for strategy in ranked}
    fastest = medians[ranked[0]]
    print(f"\nEvery strategy, median of {arguments.repeat} steps:")
    rows = [
        ("fastest of all", ranked[0]),
        ("A (score function)", chosen),
        ("coordinate search", coordinate),
        ("the median one", ranked[len(ranked) // 2]),
        ("slowest of all", ranked[-1]),
    ]
    for name, strategy in rows:
        place, seconds = ranked.index(strategy) + 1, medians[strategy]
        said = f"{1e3 * seconds:6.1f} ms, {seconds / fastest:.2f}x, number {place:3}"
        print(f"  {name:19} {said}: {training.describe(strategy)}")
    print(
        f"\nSteps spent: A {arguments.steps} (all of them training), coordinate search as many, "
        f"enumeration {len(everything) * arguments.repeat}."
    )


if __name__ == "__main__":
    main()
