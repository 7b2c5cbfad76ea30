"""A byte-level GPT on the documentation that ships inside CPython: ordinary PyTorch, and six lines of Headway.

Runs in three ways, and learns the same in each::

    python examples/gpt.py                                  one process
    torchrun --nproc-per-node 2 examples/gpt.py             data parallel
    headway run examples/gpt.py                             under the best plan for this machine
"""

import argparse
import math
import pydoc_data.topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import headway


class Block(nn.Module):
    """Pre-norm transformer block. Shapes: B samples, T tokens, C channels, H heads."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(channels)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        self.norm_mlp = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, 4 * channels)
        self.down = nn.Linear(4 * channels, channels)

    def forward(self, x_BTC: Tensor) -> Tensor:
        batch, tokens, channels = x_BTC.shape
        y_BTC = self.norm_attention(x_BTC)
        heads = (batch, tokens, self.heads, channels // self.heads)
        q_BHTD = self.query(y_BTC).view(heads).transpose(1, 2)
        k_BHTD = self.key(y_BTC).view(heads).transpose(1, 2)
        v_BHTD = self.value(y_BTC).view(heads).transpose(1, 2)
        a_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)
        x_BTC = x_BTC + self.output(a_BHTD.transpose(1, 2).reshape(batch, tokens, channels))
        return x_BTC + self.down(F.gelu(self.up(self.norm_mlp(x_BTC))))


class GPT(nn.Module):
    """Bytes in, logits over the next byte out."""

    def __init__(self, layers: int = 4, channels: int = 192, heads: int = 6, context: int = 128) -> None:
        super().__init__()
        self.token = nn.Embedding(256, channels)
        self.position = nn.Embedding(context, channels)
        self.blocks = nn.ModuleList(Block(channels, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, 256, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTC = self.token(tokens_BT) + self.position(positions_T)
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return self.head(self.norm(x_BTC))


class Bytes(torch.utils.data.Dataset):
    """Windows of `context` bytes, each with the same window one byte later as its target."""

    def __init__(self, text: bytes, context: int) -> None:
        self.data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.context = context

    def __len__(self) -> int:
        return (len(self.data) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.context
        return self.data[start : start + self.context], self.data[start + 1 : start + self.context + 1]


def unigram_entropy(data: Tensor) -> float:
    """Nats per byte of the best guesser that knows only how often each byte occurs."""
    shares = torch.bincount(data, minlength=256).double() / len(data)
    return -sum(share * math.log(share) for share in shares.tolist() if share > 0)


def loss_function(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="samples in a step, over all ranks")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--channels", type=int, default=192)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--context", type=int, default=128)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    text = "".join(pydoc_data.topics.topics.values()).encode()
    dataset = Bytes(text, arguments.context)

    session = headway.start()
    model = GPT(arguments.layers, arguments.channels, arguments.heads, arguments.context)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model, optimizer = session.prepare(model, optimizer, loss=loss_function, clip_norm=1.0)
    entropy = unigram_entropy(dataset.data)
    if arguments.steps >= 200:  # a shorter run is a trial, and proves nothing
        session.expect_loss_below(0.75 * entropy, "three quarters of the byte-unigram entropy")
    for batch in session.shard(dataset, batch_size=arguments.batch, steps=arguments.steps, seed=0):
        session.step(batch)
    session.finish()


if __name__ == "__main__":
    main()
