"""What autocast keeps for backward, against what it really saves, storage by storage."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.predict.memory import Sizes
from headway.predict.operators import WHOLE
from headway.workload.trace import trace


class Attention(nn.Module):
    """Pre-norm attention with three projections of one normalised input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.query, self.key, self.value, self.output = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x_BTC: Tensor) -> Tensor:
        batch, tokens, channels = x_BTC.shape
        y_BTC = self.norm(x_BTC)
        heads = (batch, tokens, 4, channels // 4)
        q, k, v = (part(y_BTC).view(heads).transpose(1, 2) for part in (self.query, self.key, self.value))
        a_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x_BTC + self.output(a_BHTD.transpose(1, 2).reshape(batch, tokens, channels))


class Gated(nn.Module):
    """Pre-norm gated MLP: two projections of one normalised input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.up, self.gate = (nn.Linear(channels, 4 * channels, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * channels, channels, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        y_BTC = self.norm(x_BTC)
        return x_BTC + self.down(F.silu(self.gate(y_BTC)) * self.up(y_BTC))


def plain() -> nn.Module:
    """No residual: only what the norm returns is in float32."""
    return nn.Sequential(
        nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64)
    )


def saved_bytes(model: nn.Module, inputs: Tensor) -> int:
    """Bytes of the storages that backward will need under autocast, those of parameters and of the batch left out."""
    outside = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), inputs)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in outside:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        loss = model(inputs).float().square().mean()
    del loss
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(*(Attention(64) for _ in range(3))),
        lambda: nn.Sequential(*(Gated(64) for _ in range(3))),
        plain,
    ],
    ids=["attention", "gated", "plain"],
)
def test_what_autocast_keeps_is_what_it_saves(make):
    torch.manual_seed(0)
    inputs = torch.randn(32, 16, 64)
    graph = trace(make(), inputs, name="model", loss=lambda output: output.float().square().mean())
    kept = Sizes(graph).activations(0, len(graph.layers), (), 32, WHOLE, "bfloat16").kept
    assert kept == pytest.approx(saved_bytes(make(), inputs), rel=0.06)
