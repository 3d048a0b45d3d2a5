"""The two position-wise building blocks and the layer that joins them with attention.

RMSNorm: Zhang and Sennrich 2019, arXiv 1910.07467, equation 4. SwiGLU: Shazeer 2020, arXiv 2002.05202, equation 6.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from mistral_runtime.attention import Attention, Sequences
from mistral_runtime.config import ModelConfig
from mistral_runtime.kernels.rowwise import kernels_for
from mistral_runtime.mixture import MixtureOfExperts


class RMSNorm(nn.Module):
    """Scale each vector to unit root mean square, then by a learned weight."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of `x`; the mean square is taken in float32."""
        if (kernels := kernels_for(x)) is not None:
            return kernels.norm(x, self.weight, self.eps)
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight

    def after_adding(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + added, and that normalised."""
        if (kernels := kernels_for(x)) is not None:
            return kernels.add_and_norm(x, added, self.weight, self.eps)
        x = x + added
        return x, self(x)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the gated projection of `x` (…, dim)."""
        gate, value = self.w1(x), self.w3(x)  # (…, hidden_dim)
        kernels = kernels_for(x)
        gated = silu(gate) * value if kernels is None else kernels.gate(gate, value)
        projected: Tensor = self.w2(gated)
        return projected


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, each added to the stream it read."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = _feed_forward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, sequences: Sequences, layer: int) -> Tensor:
        """Return `x` (B, T, dim) after this layer."""
        attended = self.attention(self.attention_norm(x), cos, sin, sequences, layer)
        x, normed = self.ffn_norm.after_adding(x, attended)
        fed: Tensor = x + self.feed_forward(normed)
        return fed


def _feed_forward(config: ModelConfig) -> nn.Module:
    if config.moe is None:
        return FeedForward(config)
    experts = (FeedForward(config) for _ in range(config.moe.num_experts))
    return MixtureOfExperts(config.moe, dim=config.dim, experts=experts)
