"""Small models with sharp attention, for tests of the device path."""

from __future__ import annotations

import torch

from mistral_runtime.config import ModelConfig
from mistral_runtime.transformer import Transformer

CONFIG = ModelConfig(
    dim=64, n_layers=2, head_dim=16, hidden_dim=96, n_heads=8, n_kv_heads=2, vocab_size=300, norm_eps=1e-5,
    rope_theta=1e4, sliding_window=None,
)  # fmt: skip


def make_model(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Transformer:
    """Return a model whose logits depend strongly on what attention sees."""
    torch.manual_seed(3)
    model = Transformer(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(std=0.15)
        if weight.dim() == 1:
            weight.add_(1)
    return model.to(dtype).to(device)
