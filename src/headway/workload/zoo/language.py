"""Transformers as ordinary PyTorch: GPT, Llama (and Mixtral, which is Llama with experts), BERT.

Legend: B samples, T tokens of a sample, D width, H heads, K key-value heads, E head width, V vocabulary, N = B·T
tokens, X experts, C tokens that one expert takes. Queries, keys and values have a Linear each (GPT-2's own code fuses
them), which changes no count and lets tensor parallelism split them by heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GPT", "Bert", "Llama"]


def _initialize(module: nn.Module) -> None:
    # GPT-2's initialization: torch's default embeddings, N(0, 1), make a tied head start at a loss in the hundreds.
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class SelfAttention(nn.Module):
    """Multi-head attention with biases (Vaswani et al., NeurIPS 2017, section 3.2)."""

    def __init__(self, width: int, heads: int, *, causal: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q_BHTE, k_BHTE, v_BHTE = (
            project(x_BTD).view(B, T, self.heads, D // self.heads).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        dropout = self.dropout if self.training else 0.0
        y_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, is_causal=self.causal, dropout_p=dropout)
        return self.output(y_BHTE.transpose(1, 2).reshape(B, T, D))


class FeedForward(nn.Module):
    """Two Linears with a GELU in between: the tanh approximation in GPT-2, exact in BERT."""

    def __init__(self, width: int, hidden: int, *, approximate: str) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.activation = nn.GELU(approximate=approximate)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.contract(self.activation(self.expand(x_BTD)))


class GPTBlock(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal=True, dropout=dropout)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, 4 * width, approximate="tanh")
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD)))
        return x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))


class GPT(nn.Module):
    """GPT-2 and GPT-3: pre-norm decoder, learned positions, head tied to the token embedding.

    Takes tokens (B, T), T at most `context`, and returns logits (B, T, V). GPT-3 alternates dense with banded
    attention; here all of it is dense, which changes no parameter.
    """

    def __init__(
        self,
        *,
        layers: int = 12,
        width: int = 768,
        heads: int = 12,
        vocabulary: int = 50257,
        context: int = 1024,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(GPTBlock(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.apply(_initialize)
        self.head.weight = self.token_embedding.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.dropout(self.token_embedding(tokens_BT) + self.position_embedding(positions_T))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD))


class RMSNorm(nn.Module):
    """Zhang and Sennrich, NeurIPS 2019; computed in float32 whatever the input's dtype."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        wide_BTD = x_BTD.float()
        scale_BT1 = torch.rsqrt(wide_BTD.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide_BTD * scale_BT1).to(x_BTD.dtype)


class Rotary(nn.Module):
    """Cosines and sines (T, E) of rotary position embedding (Su et al., arXiv:2104.09864, section 3.2.2).

    `scaling` is the factor by which Llama 3.1 stretches the low frequencies of a model that was trained on 8,192 tokens
    (The Llama 3 Herd of Models, arXiv:2407.21783, section 3.4.2); 1 leaves all of them alone.
    """

    def __init__(self, head_width: int, base: float, scaling: float = 1.0, trained_context: int = 8192) -> None:
        super().__init__()
        self.head_width, self.base, self.scaling, self.trained_context = head_width, base, scaling, trained_context

    def forward(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        T, device = tokens_BT.shape[1], tokens_BT.device
        even = torch.arange(0, self.head_width, 2, device=device, dtype=torch.float32)
        frequency = self.base ** (-even / self.head_width)
        if self.scaling != 1.0:
            # Turns within the trained context: at most 1 → stretched, at least 4 → kept, blended in between.
            turns = frequency * self.trained_context / (2 * math.pi)
            keep = ((turns - 1.0) / (4.0 - 1.0)).clamp(0.0, 1.0)
            frequency = keep * frequency + (1.0 - keep) * frequency / self.scaling
        angle = torch.arange(T, device=device, dtype=torch.float32)[:, None] * frequency
        angle_TE = torch.cat((angle, angle), dim=-1)
        return angle_TE.cos(), angle_TE.sin()


def _rotate(x_BHTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    left, right = x_BHTE.chunk(2, dim=-1)
    return x_BHTE * cos_TE.to(x_BHTE.dtype) + torch.cat((-right, left), dim=-1) * sin_TE.to(x_BHTE.dtype)


class GroupedQueryAttention(nn.Module):
    """Heads share keys and values in groups (Ainslie et al., EMNLP 2023); rotary positions, no biases."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_width: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width
        self.query = nn.Linear(width, heads * head_width, bias=False)
        self.key = nn.Linear(width, kv_heads * head_width, bias=False)
        self.value = nn.Linear(width, kv_heads * head_width, bias=False)
        self.output = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        B, T, _ = x_BTD.shape
        H, K, E = self.heads, self.kv_heads, self.head_width
        q_BHTE = _rotate(self.query(x_BTD).view(B, T, H, E).transpose(1, 2), cos_TE, sin_TE)
        k_BKTE = _rotate(self.key(x_BTD).view(B, T, K, E).transpose(1, 2), cos_TE, sin_TE)
        v_BKTE = self.value(x_BTD).view(B, T, K, E).transpose(1, 2)
        if K < H:
            # Written out rather than `enable_gqa=True`, which leaves the fused kernels on several devices.
            k_BKTE, v_BKTE = (
                shared[:, :, None].expand(B, K, H // K, T, E).reshape(B, H, T, E) for shared in (k_BKTE, v_BKTE)
            )
        y_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BKTE, v_BKTE, is_causal=True)
        return self.output(y_BHTE.transpose(1, 2).reshape(B, T, H * E))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer, arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MixtureOfExperts(nn.Module):
    """Each token goes to `top_k` of the experts, and each expert takes a fixed number of tokens.

    Every shape is known without looking at the data, so that this traces without running, and its FLOP are those of
    `top_k` experts for each token: an expert takes C = ceil(`capacity_factor` · `top_k` · N / X) tokens, those that
    weigh it highest (batch prioritized routing, Riquelme et al., NeurIPS 2021, section 4.1), and adds nothing in the
    slots left over. A token that finds an expert full loses that expert's share. A `capacity_factor` of X / `top_k`
    drops none, and then the result is that of Mixtral (Jiang et al., arXiv:2401.04088, section 2.1).
    """

    def __init__(self, width: int, hidden: int, experts: int, top_k: int, capacity_factor: float) -> None:
        super().__init__()
        self.top_k, self.capacity_factor = top_k, capacity_factor
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(width, hidden) for _ in range(experts))

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        N, X = x_ND.shape[0], len(self.experts)
        capacity = min(N, math.ceil(self.capacity_factor * self.top_k * N / X))
        probability_NX = F.softmax(self.router(x_ND), dim=-1, dtype=torch.float32)
        weight_Nk, expert_Nk = probability_NX.topk(self.top_k, dim=-1)
        weight_Nk = weight_Nk / weight_Nk.sum(-1, keepdim=True)
        weight_NX = torch.zeros_like(probability_NX).scatter(1, expert_Nk, weight_Nk)
        weight_XC, token_XC = weight_NX.t().topk(capacity, dim=1)
        y_ND = torch.zeros_like(x_ND)
        for expert, weight_C, token_C in zip(self.experts, weight_XC.unbind(), token_XC.unbind(), strict=True):
            share_CD = expert(x_ND[token_C]) * weight_C[:, None].to(x_ND.dtype)
            y_ND = y_ND.index_add(0, token_C, share_CD.to(y_ND.dtype))
        return y_ND.view(x_BTD.shape)


class LlamaBlock(nn.Module):
    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_width: int,
        hidden: int,
        experts: int,
        top_k: int,
        capacity_factor: float,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = GroupedQueryAttention(width, heads, kv_heads, head_width)
        self.feed_forward_norm = RMSNorm(width)
        if experts:
            self.feed_forward: nn.Module = MixtureOfExperts(width, hidden, experts, top_k, capacity_factor)
        else:
            self.feed_forward = SwiGLU(width, hidden)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos_TE, sin_TE)
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))


class Llama(nn.Module):
    """Llama 2 and 3, and with `experts` above 0 Mixtral: pre-norm decoder with RMSNorm, rotary positions, SwiGLU.

    Takes tokens (B, T) and returns logits (B, T, V). `hidden` is the width inside the feed-forward layer.
    """

    def __init__(
        self,
        *,
        layers: int = 32,
        width: int = 4096,
        heads: int = 32,
        kv_heads: int = 8,
        head_width: int = 0,  # 0: width / heads
        hidden: int = 14336,
        vocabulary: int = 128256,
        rotary_base: float = 500000.0,
        rotary_scaling: float = 1.0,
        tied: bool = False,
        experts: int = 0,
        top_k: int = 2,
        capacity_factor: float = 1.0,
    ) -> None:
        super().__init__()
        head_width = head_width or width // heads
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.rotary = Rotary(head_width, rotary_base, rotary_scaling)
        self.blocks = nn.ModuleList(
            LlamaBlock(width, heads, kv_heads, head_width, hidden, experts, top_k, capacity_factor)
            for _ in range(layers)
        )
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.apply(_initialize)
        if tied:
            self.head.weight = self.token_embedding.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        cos_TE, sin_TE = self.rotary(tokens_BT)
        x_BTD = self.token_embedding(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, cos_TE, sin_TE)
        return self.head(self.norm(x_BTD))


class BertBlock(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads, causal=False, dropout=dropout)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.feed_forward = FeedForward(width, 4 * width, approximate="none")
        self.feed_forward_norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = self.attention_norm(x_BTD + self.dropout(self.attention(x_BTD)))
        return self.feed_forward_norm(x_BTD + self.dropout(self.feed_forward(x_BTD)))


class Bert(nn.Module):
    """BERT's encoder with its pooler (Devlin et al., NAACL 2019): post-norm, learned positions and segments.

    Takes tokens (B, T), all of them in the first segment and none masked, and returns the pooled embedding (B, D).
    """

    def __init__(
        self,
        *,
        layers: int = 12,
        width: int = 768,
        heads: int = 12,
        vocabulary: int = 30522,
        context: int = 512,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.segment_embedding = nn.Embedding(2, width)
        self.embedding_norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(BertBlock(width, heads, dropout) for _ in range(layers))
        self.pooler = nn.Linear(width, width)
        self.apply(_initialize)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        embedded_BTD = self.token_embedding(tokens_BT) + self.segment_embedding(torch.zeros_like(tokens_BT))
        x_BTD = self.dropout(self.embedding_norm(embedded_BTD + self.position_embedding(positions_T)))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return torch.tanh(self.pooler(x_BTD[:, 0]))
