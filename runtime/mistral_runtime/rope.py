"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864, equation 34), in Mistral's interleaved form.

Dimension pairs are (2i, 2i+1): what the published `consolidated` files are laid out for. Hugging Face's files pair
(i, i + D/2) instead; `weights.py` puts those back, so only this form exists here. Knows nothing of attention.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_cos_sin(
    positions: range, *, head_dim: int, theta: float, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines that turn each pair at each position, both (T, D/2) in float32.

    Angles are computed in float64: position 30000 in float32 is already off by about 0.002 radian.
    """
    pair = torch.arange(0, head_dim, 2, dtype=torch.float64)
    inverse_frequency = theta ** (-pair / head_dim)  # (D/2)
    position = torch.arange(positions.start, positions.stop, dtype=torch.float64)
    angle = torch.outer(position, inverse_frequency)  # (T, D/2)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of `x` (B, T, H, D) by the angles in `cos` and `sin` (T, D/2).

    The arithmetic is in float32 whatever the type of `x`: in bfloat16 a rotation would lose half its digits.
    """
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)  # (B, T, H, D/2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, None], sin[:, None]  # (T, 1, D/2)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)  # (B, T, H, D)
