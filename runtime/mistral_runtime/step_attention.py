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
from mistral_runtime.kernels.attention import SequenceTable, attention_kernel
from mistral_runtime.kv_cache import RollingKVCache


@dataclass(frozen=True, eq=False)
class _Part:
    """One sequence's rows of a step, and what they may see: `mask` (T, S), or None where they see everything."""

    cache: RollingKVCache
    rows: slice
    mask: Tensor | None

    @property
    def count(self) -> int:
        return len(range(self.rows.stop)[self.rows])

    @property
    def is_for_kernel(self) -> bool:
        """Whether keys are stored by the kernel that looks at them."""
        cache = self.cache
        is_plain = cache.dtype == torch.bfloat16 and cache.device.type == "cpu" and cache.batch_size == 1
        return is_plain and cache.writes_first(self.count)

    def fields(self) -> tuple[int, ...]:
        """Return what a `SequenceTable` says of it."""
        cache, visible = self.cache, 0 if self.mask is None else self.mask.data_ptr()
        seen, slot = min(cache.length + self.count, cache.capacity), cache.length % cache.capacity
        return visible, self.rows.start, self.count, seen, cache.keys[0].stride(1), slot, cache.capacity

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
        self._kernel = attention_kernel()
        together = [part for part in self._parts if self._kernel is not None and part.is_for_kernel]
        self._apart = [part for part in self._parts if part not in together]
        self._table = _table(together) if together else None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the keys and values (B, T, K, D) and return what q (B, T, H, D) gathers, (B, T, H·D).

        In bfloat16 on the CPU one call of the kernel serves all sequences but those that begin a stretch longer than
        what a window leaves behind (`RollingKVCache.writes_first`).
        """
        if self._table is None and len(self._parts) == 1:
            return self._parts[0].attend(layer, q, k, v)
        mixed = q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3])
        if self._table is not None and self._kernel is not None:
            self._kernel.step(self._table, layer, q.contiguous(), k.contiguous(), v.contiguous(), mixed)
        for part in self._apart:
            mixed[:, part.rows] = part.attend(layer, q, k, v)
        return mixed

    def advance(self) -> None:
        """Count the new positions as stored, once every layer has asked."""
        for part in self._parts:
            part.cache.advance(part.count)


def _table(parts: Sequence[_Part]) -> SequenceTable:
    addresses = torch.stack([part.cache.addresses for part in parts], dim=1)  # (L, N, 2)
    return SequenceTable(addresses, [part.fields() for part in parts])


def _mask(cache: RollingKVCache, count: int) -> Tensor | None:
    if cache.hides_nothing(count):
        return None
    queries = torch.arange(cache.length, cache.length + count)
    return window_mask(queries, cache.seen_positions(count), cache.window).to(cache.device)
