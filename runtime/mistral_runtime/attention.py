"""Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245) under a sliding causal window.

Shapes: B batch, T new positions, S visible positions, H query heads, K key heads, D head dimension. Owns the mask
and the choice of kernel. Where keys are kept is `kv_cache.py`'s affair, and whose they are `step_attention.py`'s.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mistral_runtime.config import ModelConfig
from mistral_runtime.kernels.attention import attention_kernel, rows_side_by_side, takes
from mistral_runtime.rope import apply_rope


def window_mask(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Return which key positions (S,) each query position (T,) may see, (T, S) of bool: i−W < j ≤ i."""
    i, j = queries[:, None], keys[None, :]
    visible = j <= i
    return visible if window is None else visible & (j > i - window)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend with q (B, T, H, D) to k and v (B, K, S, D) under mask (T, S), or to everything without one.

    On the CPU, bfloat16 goes through a kernel of our own, which gives each position what it would get
    alone. A compiler of steps cannot look into it, and gets torch's attention.

    The H/K query heads that share a key head are laid out as extra query rows of that head, so that keys and
    values are read once and never expanded. Returns (B, T, H·D).
    """
    if not torch.compiler.is_compiling() and takes(q) and (kernel := attention_kernel()) is not None:
        return kernel(q.contiguous(), *rows_side_by_side(k, v), mask)
    batch, count, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    rows = q.reshape(batch, count, kv_heads, groups, head_dim).permute(0, 2, 3, 1, 4)  # (B, K, H/K, T, D)
    rows = rows.reshape(batch, kv_heads, groups * count, head_dim)  # (B, K, H/K·T, D)
    if mask is not None and count > 1:  # one position's mask is the same for all its rows, and is broadcast
        mask = mask.repeat(groups, 1)  # (H/K·T, S)
    mixed = scaled_dot_product_attention(rows, k, v, attn_mask=mask)  # (B, K, H/K·T, D)
    mixed = mixed.reshape(batch, kv_heads, groups, count, head_dim).permute(0, 3, 1, 2, 4)  # (B, T, K, H/K, D)
    return mixed.reshape(batch, count, heads * head_dim)


class Sequences(Protocol):
    """Those that a step goes on with. They know what was there before and what may be seen; see `step_attention.py`."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store one layer's new keys and values (B, T, K, D) and return what q (B, T, H, D) gathers, (B, T, H·D)."""


class Attention(nn.Module):
    """One layer's attention, named as in Mistral's checkpoints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, sequences: Sequences, layer: int) -> Tensor:
        """Return what each of the T positions of `x` (B, T, dim) gathers from those it may see."""
        per_head = (*x.shape[:2], -1, self.head_dim)
        q, k = apply_rope(self.wq(x).view(per_head), self.wk(x).view(per_head), cos, sin)  # (B, T, H or K, D)
        v: Tensor = self.wv(x).view(per_head)  # (B, T, K, D)
        gathered: Tensor = self.wo(sequences.attend(layer, q, k, v))  # (B, T, dim)
        return gathered
