"""The oracle: the same model in float32, without cache, chunks or batches, as plainly as it can be written.

It shares no arithmetic with the other modules, on purpose. Slow; for tests and for doubt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mistral_runtime.config import ModelConfig, MoeConfig

Weights = dict[str, Tensor]


def reference_logits(weights: Weights, config: ModelConfig, tokens: Sequence[int]) -> Tensor:
    """Return the logits at every position, (T, V).

    Args:
        weights: By the names of a `consolidated` checkpoint, any float type.
        config: Its configuration.
        tokens: The whole sequence so far, T ids.
    """
    w = {name: tensor.float() for name, tensor in weights.items()}
    x = torch.stack([w["tok_embeddings.weight"][token] for token in tokens])  # (T, dim)
    for layer in range(config.n_layers):
        prefix = f"layers.{layer}."
        x = x + _attention(_norm(x, w[prefix + "attention_norm.weight"], config), w, prefix, config)
        normed = _norm(x, w[prefix + "ffn_norm.weight"], config)
        if config.moe is None:
            x = x + _feed_forward(normed, w, prefix + "feed_forward.")
        else:
            x = x + _mixture(normed, w, prefix + "feed_forward.", config.moe)
    return _norm(x, w["norm.weight"], config) @ w["output.weight"].T  # (T, V)


def reference_generate(weights: Weights, config: ModelConfig, prompt: Sequence[int], count: int) -> list[int]:
    """Return the `count` most likely next tokens, computing everything anew for each."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(reference_logits(weights, config, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def _norm(x: Tensor, weight: Tensor, config: ModelConfig) -> Tensor:
    return x / ((x**2).mean(dim=1, keepdim=True) + config.norm_eps) ** 0.5 * weight


def _feed_forward(x: Tensor, w: Weights, prefix: str) -> Tensor:
    gate = x @ w[prefix + "w1.weight"].T
    up = x @ w[prefix + "w3.weight"].T
    return (gate * gate.sigmoid() * up) @ w[prefix + "w2.weight"].T


def _mixture(x: Tensor, w: Weights, prefix: str, moe: MoeConfig) -> Tensor:
    """Send one token at a time to its best experts, in proportion to e^score (arXiv 2401.04088, section 2.1)."""
    rows = []
    for token in x:
        scores = [float(token @ gate) for gate in w[prefix + "gate.weight"]]
        best = sorted(range(moe.num_experts), key=lambda expert: -scores[expert])[: moe.num_experts_per_tok]
        shares = [math.exp(scores[expert] - scores[best[0]]) for expert in best]
        outputs = [_feed_forward(token, w, f"{prefix}experts.{expert}.") for expert in best]
        rows.append(sum((s / sum(shares) * made for s, made in zip(shares, outputs, strict=True)), torch.zeros(())))
    return torch.stack(rows)


def _attention(x: Tensor, w: Weights, prefix: str, config: ModelConfig) -> Tensor:
    q = x @ w[prefix + "attention.wq.weight"].T
    k = x @ w[prefix + "attention.wk.weight"].T
    v = x @ w[prefix + "attention.wv.weight"].T
    d = config.head_dim
    heads = []
    for head in range(config.n_heads):
        shared = head // (config.n_heads // config.n_kv_heads)  # the key head that this query head reads
        query = _rotate(q[:, head * d : (head + 1) * d], config.rope_theta)
        key = _rotate(k[:, shared * d : (shared + 1) * d], config.rope_theta)
        scores = query @ key.T / math.sqrt(d)  # (T, T)
        for i in range(len(x)):
            for j in range(len(x)):
                past_window = config.sliding_window is not None and j <= i - config.sliding_window
                if j > i or past_window:
                    scores[i, j] = -math.inf
        heads.append(torch.softmax(scores, dim=1) @ v[:, shared * d : (shared + 1) * d])
    return torch.cat(heads, dim=1) @ w[prefix + "attention.wo.weight"].T


def _rotate(x: Tensor, theta: float) -> Tensor:
    """Multiply the complex number (x[2i], x[2i+1]) at position m by e^(i·m·theta^(−2i/D))."""
    count, d = x.shape
    numbers = torch.view_as_complex(x.reshape(count, d // 2, 2).contiguous())
    turns = torch.tensor([[m * theta ** (-2 * i / d) for i in range(d // 2)] for m in range(count)])
    return torch.view_as_real(numbers * torch.polar(torch.ones_like(turns), turns)).reshape(count, d)
