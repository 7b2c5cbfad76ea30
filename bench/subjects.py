"""What the benchmarks train: an MLP, a CNN and a GPT, as an ordinary script with Headway's lines, on random data."""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import headway

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from gpt import GPT, loss_function


class Residual(nn.Module):
    """x + W2 gelu(W1 x): what tensor parallelism splits."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(features, hidden)
        self.down = nn.Linear(hidden, features)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def mlp() -> nn.Module:
    """4 residual blocks of 1024 features and 2048 hidden ones."""
    return nn.Sequential(*(Residual(1024, 2048) for _ in range(4)), nn.Linear(1024, 10))


def cnn() -> nn.Module:
    """VGG-like, on 32 x 32 images; GroupNorm, so that a sample's result does not depend on its micro-batch."""

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.GroupNorm(8, outputs), nn.ReLU()
        )

    widths = [(3, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1)]
    blocks = [block(inputs, outputs, stride) for inputs, outputs, stride in widths]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


# GPT-2's sizes (Radford et al., 2019), with 1,024 tokens: what a GPU needs to be busy. Layers, channels, heads, batch.
GPTS = {"gpt-124m": (12, 768, 12, 32), "gpt-355m": (24, 1024, 16, 16), "gpt-774m": (36, 1280, 20, 8)}


class Random(torch.utils.data.Dataset):
    """`count` random samples, made once."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("subject", choices=["mlp", "cnn", "gpt", *GPTS])
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    layers, channels, heads, batch = GPTS.get(arguments.subject, (6, 384, 6, 16))
    context = 1024 if arguments.subject in GPTS else 128
    if arguments.subject.startswith("gpt"):
        tokens = torch.randint(256, (256, context + 1))
        dataset = Random(tokens[:, :-1], tokens[:, 1:])
        loss = loss_function
    else:
        shape, batch = ((1024,), 256) if arguments.subject == "mlp" else ((3, 32, 32), 32)
        dataset, loss = Random(torch.randn(512, *shape), torch.randint(10, (512,))), F.cross_entropy
    session = headway.start()
    made = {"mlp": mlp, "cnn": cnn}.get(arguments.subject)
    model = GPT(layers=layers, channels=channels, heads=heads, context=context) if made is None else made()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model, optimizer = session.prepare(model, optimizer, loss=loss)
    for step_batch in session.shard(dataset, batch_size=batch, steps=arguments.steps, seed=0):
        session.step(step_batch)
    session.finish()


if __name__ == "__main__":
    main()
