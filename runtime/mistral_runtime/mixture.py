"""A layer's mixture of experts: several feed-forward networks, of which each token goes through a few.

Jiang et al. 2024, "Mixtral of Experts", arXiv 2401.04088, section 2.1. Owns the routing. Knows nothing of what an
expert computes, nor of how its weights are kept.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mistral_runtime.config import MoeConfig


class MixtureOfExperts(nn.Module):
    """Σ softmax(TopK(x · gate))ᵢ · expertᵢ(x), with the names of Mistral's checkpoints.

    Only experts that some token was sent to are called. A decoding step of one sequence therefore reads the weights of
    `num_experts_per_tok` experts a layer and no others: mapped from a file, the rest need not even be in memory.
    """

    def __init__(self, config: MoeConfig, *, dim: int, experts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.experts_per_token = config.num_experts_per_tok
        self.gate = nn.Linear(dim, config.num_experts, bias=False)
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted sum of what each token's experts make of it, for `x` (B, T, dim).

        Shares and sums are float32 and rounded once. Each token's experts are added up in the order of their numbers,
        whatever its neighbours were sent to.
        """
        tokens = x.reshape(-1, x.shape[-1])  # (N, dim) with N = B·T
        scores, chosen = self.gate(tokens).float().topk(self.experts_per_token, dim=-1)  # (N, k)
        shares = scores.softmax(dim=-1)  # over the chosen ones alone
        mixed = torch.zeros(tokens.shape, dtype=torch.float32, device=x.device)
        for number in chosen.unique().tolist():
            rows, rank = torch.where(chosen == number)  # a token has an expert once, so `rows` are distinct
            made = self.experts[number](tokens[rows]).float() * shares[rows, rank, None]  # (n, dim)
            mixed.index_add_(0, rows, made)
        return mixed.to(x.dtype).view(x.shape)
