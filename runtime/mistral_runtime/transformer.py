"""The whole model: token ids in, logits out (Jiang et al. 2023, "Mistral 7B", arXiv 2310.06825).

Owns the order of the parts and what is computed once per step for all layers (the angles). Knows nothing of
files, sampling or text.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mistral_runtime.config import ModelConfig
from mistral_runtime.kv_cache import RollingKVCache
from mistral_runtime.kv_int8 import Int8KVCache, KvKind
from mistral_runtime.layers import RMSNorm, TransformerBlock
from mistral_runtime.rope import rope_of_all
from mistral_runtime.step_attention import StepAttention


class Transformer(nn.Module):
    """A Mistral model. Its `state_dict` has exactly the names of a `consolidated` checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.kv: KvKind = "exact"  # how the caches of `new_cache` keep keys and values
        # Given a weight: its own random start, on the meta device, makes torch import a second's worth of compiler.
        self.tok_embeddings = nn.Embedding(
            config.vocab_size, config.dim, _weight=torch.empty(config.vocab_size, config.dim)
        )
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.tok_embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type the weights and the activations between layers have."""
        return self.tok_embeddings.weight.dtype

    def new_cache(self, context: int, *, batch_size: int = 1, slack: int = 0) -> RollingKVCache:
        """Return an empty cache for sequences of up to `context` positions, `slack` of which can be taken back."""
        kind = Int8KVCache if self.kv == "int8" else RollingKVCache
        return kind(
            self.config,
            context=context,
            dtype=self.dtype,
            device=self.device,
            batch_size=batch_size,
            slack=slack,
        )

    def forward(self, tokens: Tensor, cache: RollingKVCache, *, last_only: bool = False) -> Tensor:
        """Append `tokens` (B, T) to the sequence in `cache` and return their logits, (B, T, V) in float32.

        With `last_only` the vocabulary projection is done for the last position alone: (B, 1, V). A prompt needs no
        other, and at 32,000 columns in float32 the rest would be the largest activation of all.
        """
        x = self.hidden(tokens, StepAttention([(cache, tokens.shape[1])]))
        return self.project(x[:, -1:] if last_only else x)

    def hidden(self, tokens: Tensor, sequences: StepAttention) -> Tensor:
        """Append `tokens` (B, T) to the sequences of a step; return the stream behind the last layer, (B, T, dim)."""
        cos, sin = rope_of_all(
            sequences.positions, head_dim=self.config.head_dim, theta=self.config.rope_theta, device=self.device
        )
        x: Tensor = self.tok_embeddings(tokens)  # (B, T, dim)
        for index, layer in enumerate(self.layers):
            x = layer(x, cos, sin, sequences, index)
        sequences.advance()
        return x

    def project(self, x: Tensor) -> Tensor:
        """Return the logits of some rows of the stream, (B, T, V) in float32."""
        logits: Tensor = self.output(self.norm(x))
        return logits.float()
