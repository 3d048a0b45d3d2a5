"""Weights of 8 or 4 bits: how they are made, laid out and undone. Pure arithmetic, no files.

Symmetric and group-wise: a weight is an integer times the scale of its group of G inputs, a bfloat16. Eight bits take
−127..127, with the scale that just holds the group's largest. Four bits take −8..7, with the scale among a few
candidates that gives the least squared error, as clipping a group's largest weight often serves the rest. An input
dimension that is no multiple of 128 is padded with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from mistral_runtime.errors import NonFiniteWeights
from mistral_runtime.kernels.rows import BLOCK
from mistral_runtime.recipe import check_group

# Of the scale that would just hold the largest weight at −8: from cutting a fifth off to leaving it whole at +7. Just
# holding it comes first, so that it wins where the squares are too small to tell a difference.
_CANDIDATES = (1.0, 0.80, 0.87, 0.94, 8 / 7)
# The inverse of a smaller scale may overflow; a group of such weights is a group of zeros.
_LEAST_SCALE = 2.0**-120
# A block's numbers stay in the cache, and its temporaries in memory that is used again: with large ones, three quarters
# of the time went to the kernel for new pages.
_VALUES_AT_ONCE = 1 << 19


@dataclass(frozen=True)
class QuantizedWeight:
    """One matrix (N, K): ``values`` (N, K) int8 or (N, K/2) uint8 as rows.c lays them out, ``scales`` (N, K/G)."""

    values: Tensor
    scales: Tensor
    inputs: int

    @property
    def bits(self) -> int:
        """8 or 4."""
        return 4 if self.values.dtype == torch.uint8 else 8

    @property
    def outputs(self) -> int:
        """N."""
        return self.values.shape[0]

    @property
    def padded_inputs(self) -> int:
        """K rounded up to whole blocks."""
        return self.values.shape[1] * (2 if self.bits == 4 else 1)


def quantize(weight: Tensor, *, bits: int, group: int, name: str) -> QuantizedWeight:
    """Return `weight` (N, K) of any float type in 8 or 4 bits.

    Raises:
        NonFiniteWeights: It has a NaN or an infinity.
        BadRequest: The group size is not supported.
    """
    check_group(group)
    inputs = weight.shape[1]
    blocks = torch.split(weight, max(1, _VALUES_AT_ONCE // inputs))
    parts = [_quantize_rows(rows, bits=bits, group=group, name=name) for rows in blocks]
    return QuantizedWeight(torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), inputs)


def _quantize_rows(weight: Tensor, *, bits: int, group: int, name: str) -> tuple[Tensor, Tensor]:
    rows = pad(weight.float(), (0, -weight.shape[1] % BLOCK))
    if not bool(torch.isfinite(rows).all()):
        raise NonFiniteWeights(
            f"the tensor {name} holds a value that is not a number",
            detail=f"expected finite weights, found {int((~torch.isfinite(rows)).sum())} that are not",
            hint="verify the snapshot; if it is intact, its publisher has to mend it",
        )
    groups = rows.view(rows.shape[0], -1, group)  # (N, K/G, G)
    if bits == 8:
        scales = _as_bf16(groups.abs().amax(-1) / 127)
        return _integers(groups, scales, -127, 127).to(torch.int8).flatten(1), scales.to(torch.bfloat16)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    # Where squares overflow, no candidate is better than leaving the largest as it is.
    best, least = _as_bf16(largest / -8), torch.full_like(largest, torch.inf)
    for fraction in _CANDIDATES:
        scales = _as_bf16(largest * fraction / -8)
        error = (_integers(groups, scales, -8, 7) * scales[..., None] - groups).square().sum(-1)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return _pack4(_integers(groups, best, -8, 7).flatten(1)), best.to(torch.bfloat16)


def _as_bf16(scales: Tensor) -> Tensor:
    rounded = scales.to(torch.bfloat16).float()
    return torch.where(rounded.abs() < _LEAST_SCALE, 0, rounded)


def _integers(groups: Tensor, scales: Tensor, least: int, most: int) -> Tensor:
    """Return the nearest integers; a group of zeros has the scale 0 and stays 0."""
    inverse = torch.where(scales == 0, 0, 1 / scales)
    return (groups * inverse[..., None]).round().clamp(least, most)


def _pack4(values: Tensor) -> Tensor:
    """Lay −8..7 (N, K) out in bytes (N, K/2): of 128 weights, byte i holds weight i low and weight 64 + i high."""
    halves = (values + 8).to(torch.uint8).view(values.shape[0], -1, 2, BLOCK // 2)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).flatten(1)


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """Return the weights that values and scales stand for, (N, K padded) in bfloat16."""
    if values.dtype == torch.uint8:
        blocks = values.view(values.shape[0], -1, BLOCK // 2)
        integers = torch.stack((blocks & 15, blocks >> 4), dim=2).flatten(1).float() - 8
    else:
        integers = values.float()
    groups = integers.view(values.shape[0], scales.shape[1], -1)
    return (groups * scales.float()[..., None]).to(torch.bfloat16).flatten(1)
