"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864, equation 34), in Mistral's interleaved form.

Dimension pairs are (2i, 2i+1): what the published `consolidated` files are laid out for. Hugging Face's files pair
(i, i + D/2) instead; `weights.py` puts those back, so only this form exists here. Knows nothing of attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mistral_runtime.kernels.rowwise import kernels_for

# Angles are made for so many positions at once: a decode step then takes a view instead of making its own.
_BLOCK = 512


def rope_cos_sin(
    positions: range, *, head_dim: int, theta: float, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return what `apply_rope` multiplies x and its swapped pairs by, both (T, 1, D) in float32.

    For the pair (2i, 2i+1) turned by the angle a: (cos a, cos a) and (−sin a, sin a). Angles are computed in float64:
    position 30000 in float32 is already off by about 0.002 radian.
    """
    first, last = positions.start // _BLOCK, (positions.stop - 1) // _BLOCK
    blocks = [_block(index, head_dim, theta, torch.device(device)) for index in range(first, last + 1)]
    cos, sin = blocks[0]
    if len(blocks) > 1:
        cos, sin = torch.cat([block[0] for block in blocks]), torch.cat([block[1] for block in blocks])
    start = positions.start - first * _BLOCK
    return cos[start : start + len(positions)], sin[start : start + len(positions)]


def rope_of_all(
    sequences: Sequence[range], *, head_dim: int, theta: float, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return `rope_cos_sin` of several sequences' positions, one behind the other, (T, 1, D) with T in all."""
    parts = [rope_cos_sin(positions, head_dim=head_dim, theta=theta, device=device) for positions in sequences]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([cos for cos, _ in parts]), torch.cat([sin for _, sin in parts])


@lru_cache(maxsize=16)  # 512 KiB each at D = 128; more than a few are in use only where many sequences take turns
@torch.inference_mode(False)  # a tensor made in inference mode could not be used outside of it
def _block(index: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    pair = torch.arange(0, head_dim, 2, dtype=torch.float64)
    inverse_frequency = theta ** (-pair / head_dim)  # (D/2)
    position = torch.arange(index * _BLOCK, (index + 1) * _BLOCK, dtype=torch.float64)
    angle = torch.outer(position, inverse_frequency)  # (T, D/2)
    cos, sin = angle.cos(), angle.sin()
    cos_twice = torch.stack((cos, cos), dim=-1).flatten(-2)  # (T, D)
    sin_twice = torch.stack((-sin, sin), dim=-1).flatten(-2)
    return cos_twice.float().to(device)[:, None], sin_twice.float().to(device)[:, None]


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the pairs of q (B, T, H, D) and k (B, T, K, D) by the angles behind `cos` and `sin` (T, 1, D).

    The arithmetic is in float32 whatever the type of q and k: in bfloat16 a rotation would lose half its digits.
    """
    if (kernels := kernels_for(q)) is not None:
        return kernels.rope(q, k, cos, sin)
    # Turned together: at one position the number of operations is what takes the time.
    turned = _rotate(torch.cat((q, k), dim=2), cos, sin)
    return turned[:, :, : q.shape[2]], turned[:, :, q.shape[2] :]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    swapped = wide.reshape(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)  # (B, T, H, D): odd, even, odd, even, …
    return torch.addcmul(wide * cos, swapped, sin).to(x.dtype)
