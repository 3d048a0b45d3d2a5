"""One buffer of keys and one of values per layer for all sequences, at addresses that never change.

A graph replays what it was captured with, addresses included. So sequences come and go in slots of buffers that stay.
Owns the slots; how positions lie within one is `kv_cache.py`'s affair, and the two agree: position p in column p mod C.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from mistral_runtime.kv_cache import RollingKVCache, cache_positions
from mistral_runtime.transformer import Transformer


class SlotCache(RollingKVCache):
    """A sequence's cache that is one slot of a pool; the slot is free again once nobody refers to this."""

    def __init__(self, pool: SlotPool, slot: int, *, context: int) -> None:
        buffers = [[layer[slot : slot + 1] for layer in layers] for layers in (pool.keys, pool.values)]
        super().__init__(
            pool.config,
            context=context,
            dtype=pool.keys[0].dtype,
            device=pool.keys[0].device,
            slack=pool.slack,
            buffers=(buffers[0], buffers[1]),
        )
        self.slot = slot
        self.pool = pool


class SlotPool:
    """Keys and values (rows, K, C, D) per layer: a row per slot, and one that the padded rows of a batch write to.

    Args:
        model: Whose keys and values they are.
        slots: How many sequences there can be at once.
        context: The longest of them, in positions.
        slack: What each can take back; see `RollingKVCache`.
    """

    def __init__(self, model: Transformer, *, slots: int, context: int, slack: int = 0) -> None:
        self.config, self.slots, self.context, self.slack = model.config, slots, context, slack
        self.capacity = cache_positions(model.config, context, slack=slack)
        self.rows = _rows(slots)
        shape = (self.rows, model.config.n_kv_heads, self.capacity, model.config.head_dim)
        self.keys, self.values = _buffers(model, shape), _buffers(model, shape)
        self._free = list(reversed(range(slots)))

    @property
    def scratch(self) -> int:
        """The row that belongs to no sequence."""
        return self.rows - 1

    @property
    def free_slots(self) -> int:
        """How many sequences can still begin."""
        return len(self._free)

    def new_cache(self, context: int) -> SlotCache | None:
        """Return an empty cache for a sequence of up to `context` positions, or None where no slot is free or fits."""
        if context > self.context or not self._free:
            return None
        slot = self._free.pop()
        cache = SlotCache(self, slot, context=self.context)
        weakref.finalize(cache, self._free.append, slot)
        return cache


def pool_bytes(model: Transformer, *, slots: int, context: int, slack: int = 0) -> int:
    """Return what a pool takes, the scratch row included."""
    config = model.config
    positions = cache_positions(config, context, slack=slack)
    return 2 * config.n_layers * _rows(slots) * config.n_kv_heads * positions * config.head_dim * model.dtype.itemsize


def _rows(slots: int) -> int:
    return slots + (slots > 1)  # a batch of one is never padded


def _buffers(model: Transformer, shape: tuple[int, ...]) -> list[Tensor]:
    # Zeros, since columns that were never written are read and weighted with nothing: 0 times NaN would be NaN.
    return [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(model.config.n_layers)]
