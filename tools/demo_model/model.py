"""A small Mistral in plain PyTorch, for training the demo model: whole sequences at once, no cache.

Owns the forward pass and nothing else. Parameter names are those of Mistral's `consolidated.00.pth`, so that the state
dict is the checkpoint; rotary pairs are interleaved (2i, 2i+1), as in that file. The runtime has its own, cached,
model: that the two agree is a test of both.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROPE_THETA = 10_000.0  # what a checkpoint with a sliding window and no `rope_theta` means


@dataclass(frozen=True)
class Params:
    """The fields of `params.json`, under Mistral's names."""

    dim: int = 256
    n_layers: int = 4
    head_dim: int = 32
    hidden_dim: int = 256
    n_heads: int = 8
    n_kv_heads: int = 2
    norm_eps: float = 1e-5
    sliding_window: int = 32
    vocab_size: int = 1024

    def to_json(self) -> dict[str, int | float]:
        """Return the content of `params.json`, without `rope_theta`, as Mistral 7B v0.1 has it."""
        return asdict(self)


class RMSNorm(nn.Module):
    """Scale by the root mean square (Zhang and Sennrich 2019, equation 4), in float32 whatever the input."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed.type_as(x) * self.weight


class Attention(nn.Module):
    """Grouped-query attention with rotary positions under a sliding-window mask."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = params.n_heads, params.n_kv_heads, params.head_dim
        self.wq = nn.Linear(params.dim, self.heads * self.head_dim, bias=False)
        self.wk = nn.Linear(params.dim, self.kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(params.dim, self.kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(self.heads * self.head_dim, params.dim, bias=False)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query = rotate(self.wq(x).view(batch, length, self.heads, self.head_dim), rotation)  # (B, T, H, D)
        key = rotate(self.wk(x).view(batch, length, self.kv_heads, self.head_dim), rotation)  # (B, T, K, D)
        value = self.wv(x).view(batch, length, self.kv_heads, self.head_dim)
        group = self.heads // self.kv_heads
        key, value = key.repeat_interleave(group, dim=2), value.repeat_interleave(group, dim=2)  # (B, T, H, D)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
        )  # (B, H, T, D)
        output: Tensor = self.wo(mixed.transpose(1, 2).reshape(batch, length, -1))
        return output


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): `w2(silu(w1 x) * w3 x)`."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.w1 = nn.Linear(params.dim, params.hidden_dim, bias=False)
        self.w2 = nn.Linear(params.hidden_dim, params.dim, bias=False)
        self.w3 = nn.Linear(params.dim, params.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return output


class Block(nn.Module):
    """One pre-norm layer; dropout acts on what is added to the residual stream, in training only."""

    def __init__(self, params: Params, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(params)
        self.feed_forward = FeedForward(params)
        self.attention_norm = RMSNorm(params.dim, params.norm_eps)
        self.ffn_norm = RMSNorm(params.dim, params.norm_eps)
        self.dropout = dropout

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor) -> Tensor:
        x = x + F.dropout(self.attention(self.attention_norm(x), rotation, mask), self.dropout, self.training)
        return x + F.dropout(self.feed_forward(self.ffn_norm(x)), self.dropout, self.training)


class Transformer(nn.Module):
    """Token ids (B, T) to logits (B, T, V)."""

    def __init__(self, params: Params, dropout: float = 0.0) -> None:
        super().__init__()
        self.params = params
        self.dropout = dropout
        self.tok_embeddings = nn.Embedding(params.vocab_size, params.dim)
        self.layers = nn.ModuleList([Block(params, dropout) for _ in range(params.n_layers)])
        self.norm = RMSNorm(params.dim, params.norm_eps)
        self.output = nn.Linear(params.dim, params.vocab_size, bias=False)

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw the weights; what writes to the residual stream starts smaller, by the root of its writers."""
        residual_scale = (2 * self.params.n_layers) ** -0.5
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                writes_residual = name.endswith(("wo.weight", "w2.weight"))
                is_embedding = name == "tok_embeddings.weight"
                std = 0.02 if is_embedding else weight.shape[1] ** -0.5 * (residual_scale if writes_residual else 1.0)
                nn.init.normal_(weight, std=std, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        rotation = rotation_table(length, self.params.head_dim)
        mask = window_mask(length, self.params.sliding_window)
        x = F.dropout(self.tok_embeddings(tokens), self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, rotation, mask)
        logits: Tensor = self.output(self.norm(x))
        return logits


def rotation_table(length: int, head_dim: int) -> Tensor:
    """Return the complex rotations (T, D/2) of positions 0 to length - 1 (Su et al. 2021, equation 15)."""
    frequencies = ROPE_THETA ** -(torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the interleaved pairs of x (B, T, heads, D) by their positions, in float32."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))  # (B, T, heads, D/2)
    return torch.view_as_real(pairs * rotation[:, None, :]).flatten(-2).type_as(x)


def window_mask(length: int, window: int) -> Tensor:
    """Return (T, T), true where position i may look at j: i - window < j <= i."""
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    return (distance >= 0) & (distance < window)
