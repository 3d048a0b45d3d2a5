"""What the new positions of one step gather, each from its own sequence.

Owns what is the same for all layers of a step: which rows belong to which sequence, and the masks. Where keys are kept
is `kv_cache.py`'s affair, and how they are compared is `attention.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mistral_runtime.attention import grouped_attention, window_mask
from mistral_runtime.kv_cache import RollingKVCache


@dataclass(frozen=True)
class _Part:
    """One sequence's rows of a step, and what they may see: `mask` (T, S), or None where they see everything."""

    cache: RollingKVCache
    rows: slice
    mask: Tensor | None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k[:, self.rows].transpose(1, 2), v[:, self.rows].transpose(1, 2)  # (B, K, T, D)
        return grouped_attention(q[:, self.rows], *self.cache.update(layer, k, v), self.mask)


class StepAttention:
    """The sequences of one step, for `Attention` to ask; nothing is stored before the first layer asks.

    The rows of all sequences stand side by side in one dimension, T in all. Several sequences are possible for caches
    of batch size 1; a cache of another batch size stands alone.
    """

    def __init__(self, parts: Sequence[tuple[RollingKVCache, int]]) -> None:
        """Take each sequence's cache and how many positions it adds.

        Raises:
            ValueError: A cache has no room for its positions, or is there twice.
        """
        if len({id(cache) for cache, _ in parts}) < len(parts):
            raise ValueError("one sequence cannot be in a step twice")
        for cache, count in parts:
            cache.require_room(count)
        self.positions = [range(cache.length, cache.length + count) for cache, count in parts]
        self._parts: list[_Part] = []
        first = 0
        for cache, count in parts:
            self._parts.append(_Part(cache, slice(first, first + count), _mask(cache, count)))
            first += count

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the keys and values (B, T, K, D) and return what q (B, T, H, D) gathers, (B, T, H·D)."""
        mixed = [part.attend(layer, q, k, v) for part in self._parts]
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1)

    def advance(self) -> None:
        """Count the new positions as stored, once every layer has asked."""
        for part in self._parts:
            part.cache.advance(part.rows.stop - part.rows.start)


def _mask(cache: RollingKVCache, count: int) -> Tensor | None:
    if cache.hides_nothing(count):
        return None
    queries = torch.arange(cache.length, cache.length + count)
    return window_mask(queries, cache.seen_positions(count), cache.window).to(cache.device)
