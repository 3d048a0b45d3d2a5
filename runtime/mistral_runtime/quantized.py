"""Weights of 8 or 4 bits: how they are made, laid out and undone. Pure arithmetic, no files.

Symmetric and group-wise: a weight is an integer times the scale of its group of G inputs, a bfloat16. Eight bits take
−127..127, with the scale that just holds the group's largest. Four bits take −8..7, with the scale among a few
candidates that gives the least squared error, as clipping a group's largest weight often serves the rest. An input
dimension that is no multiple of 128 is padded with zeros, and outputs to a multiple of 16.

Integers are stored as unsigned bytes, 128 or 8 added, in tiles of 16 outputs: tiles.c says how, and why.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from mistral_runtime.errors import NonFiniteWeights
from mistral_runtime.kernels.tiles import BLOCK, TILE
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
    """One matrix (N, K): ``values`` (T, K·bits/32, 16, 4) uint8 and ``scales`` (T, K/G, 16), in T tiles of outputs."""

    values: Tensor
    scales: Tensor
    outputs: int
    inputs: int

    @property
    def bits(self) -> int:
        """8 or 4."""
        return self.values.shape[1] * 32 // self.padded_inputs

    @property
    def padded_inputs(self) -> int:
        """K rounded up to whole blocks."""
        return padded_inputs(self.inputs)


def padded_inputs(inputs: int) -> int:
    """Return K rounded up to whole blocks."""
    return -(-inputs // BLOCK) * BLOCK


def stored_shapes(outputs: int, inputs: int, *, bits: int, group: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the values and the scales of a matrix (N, K)."""
    tiles, padded = -(-outputs // TILE), padded_inputs(inputs)
    return (tiles, padded * bits // 32, TILE, 4), (tiles, padded // group, TILE)


def quantize(weight: Tensor, *, bits: int, group: int, name: str) -> QuantizedWeight:
    """Return `weight` (N, K) of any float type in 8 or 4 bits.

    Raises:
        NonFiniteWeights: It has a NaN or an infinity.
        BadRequest: The group size is not supported.
    """
    check_group(group)
    outputs, inputs = weight.shape
    blocks = torch.split(weight, max(1, _VALUES_AT_ONCE // (inputs * TILE)) * TILE)
    parts = [_quantize_rows(rows, bits=bits, group=group, name=name) for rows in blocks]
    values, scales = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return QuantizedWeight(values, scales, outputs, inputs)


def _quantize_rows(weight: Tensor, *, bits: int, group: int, name: str) -> tuple[Tensor, Tensor]:
    rows = pad(weight.float(), (0, -weight.shape[1] % BLOCK, 0, -weight.shape[0] % TILE))
    if not bool(torch.isfinite(rows).all()):
        raise NonFiniteWeights(
            f"the tensor {name} holds a value that is not a number",
            detail=f"expected finite weights, found {int((~torch.isfinite(rows)).sum())} that are not",
            hint="verify the snapshot; if it is intact, its publisher has to mend it",
        )
    groups = rows.view(rows.shape[0], -1, group)  # (N, K/G, G)
    if bits == 8:
        scales = _as_bf16(groups.abs().amax(-1) / 127)
        return _tiles(_bytes(_integers(groups, scales, -127, 127)) + 128), _tiled_scales(scales)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    # Where squares overflow, no candidate is better than leaving the largest as it is.
    best, least = _as_bf16(largest / -8), torch.full_like(largest, torch.inf)
    for fraction in _CANDIDATES:
        scales = _as_bf16(largest * fraction / -8)
        error = (_integers(groups, scales, -8, 7) * scales[..., None] - groups).square().sum(-1)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return _tiles(_pairs(_bytes(_integers(groups, best, -8, 7)) + 8)), _tiled_scales(best)


def _as_bf16(scales: Tensor) -> Tensor:
    rounded = scales.to(torch.bfloat16).float()
    return torch.where(rounded.abs() < _LEAST_SCALE, 0, rounded)


def _integers(groups: Tensor, scales: Tensor, least: int, most: int) -> Tensor:
    """Return the nearest integers; a group of zeros has the scale 0 and stays 0."""
    inverse = torch.where(scales == 0, 0, 1 / scales)
    return (groups * inverse[..., None]).round().clamp(least, most)


def _bytes(integers: Tensor) -> Tensor:
    """Return integers (N, K/G, G) as bytes modulo 256, (N, K); to add to bytes takes a sixth of the time."""
    return integers.to(torch.int8).view(torch.uint8).flatten(1)


def _pairs(values: Tensor) -> Tensor:
    """Put two of 0..15 (N, K) into a byte, (N, K/2): of 8 weights, byte j holds weight j low and weight 4 + j high."""
    halves = values.view(values.shape[0], -1, 2, 4)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).flatten(1)


def _tiles(bytes_: Tensor) -> Tensor:
    """Lay bytes (N, B) out as tiles (N/16, B/4, 16, 4): four of each output in turn."""
    fours = bytes_.view(torch.int32).view(-1, TILE, bytes_.shape[1] // 4)
    return fours.transpose(1, 2).contiguous().view(torch.uint8).view(fours.shape[0], -1, TILE, 4)


def _tiled_scales(scales: Tensor) -> Tensor:
    """Lay scales (N, K/G) out as (N/16, K/G, 16) in bfloat16."""
    return scales.to(torch.bfloat16).view(-1, TILE, scales.shape[1]).transpose(1, 2).contiguous()


def dequantize(weight: QuantizedWeight, first: int = 0, count: int | None = None) -> Tensor:
    """Return the weights that so many tiles from the first one stand for, (16 count, K padded) in bfloat16.

    The last tile is given whole: the caller cuts off what lies beyond the outputs.
    """
    values, scales = weight.values[first:][:count], weight.scales[first:][:count]
    # Shaped (T, K/8, 16, 8) for four bits, (T, K/4, 16, 4) for eight.
    integers = torch.cat((values & 15, values >> 4), dim=-1) if weight.bits == 4 else values
    rows = (
        (integers.float() - (1 << (weight.bits - 1)))
        .transpose(1, 2)
        .reshape(values.shape[0], TILE, scales.shape[1], -1)
    )
    return (rows * scales.transpose(1, 2).float()[..., None]).to(torch.bfloat16).flatten(2).flatten(0, 1)
