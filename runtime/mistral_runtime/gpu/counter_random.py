"""Random numbers that are a function of a seed and a position: no state, no order, the same alone and in a batch.

SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 17), twice: once over
the seed, so that neighbouring seeds share nothing, and once over the position. int64 wraps around as it needs to.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FACTORS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Return one number in [0, 1) per pair of int64, of 53 random bits, in float64; the shape is theirs."""
    bits = _mix(_mix(seeds + _GAMMA) + positions * _GAMMA)
    return _shifted(bits, 11).to(torch.float64) * 2.0**-53


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _FACTORS[0]
    z = (z ^ _shifted(z, 27)) * _FACTORS[1]
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, count: int) -> Tensor:
    """Shift right and fill with zeros; `>>` alone would repeat the sign."""
    return (z >> count) & ((1 << (64 - count)) - 1)
