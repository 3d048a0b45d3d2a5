"""Keys and values of the positions that can still be seen, in a buffer that rolls.

Owns where position p is stored and which positions are there; knows nothing of how keys are made or compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_runtime.config import ModelConfig


def cache_positions(config: ModelConfig, context: int) -> int:
    """Return how many positions a cache needs for sequences of up to `context` positions."""
    return context if config.sliding_window is None else min(context, config.sliding_window)


def cache_bytes(config: ModelConfig, context: int, *, bytes_per_value: int) -> int:
    """Return the size of such a cache: keys and values, every layer, batch of one."""
    per_position = 2 * config.n_layers * config.n_kv_heads * config.head_dim * bytes_per_value
    return cache_positions(config, context) * per_position


class RollingKVCache:
    """Hold the last C positions of one sequence; position p lives in slot p mod C.

    Worked example, W = C = 4. Six positions have been stored, `length` = 6:

        slot       0  1  2  3
        position   4  5  2  3

    Storing position 6 overwrites slot 6 mod 4 = 2, which held position 2. Query 6 may see j with 6−4 < j ≤ 6, that
    is 3, 4, 5, 6: exactly what is left. So a decode step writes first and then looks at everything.

    A chunk of several positions cannot write first. Storing 6, 7, 8 would overwrite 2, 3, 4, while query 6 still
    needs 3 and 4. So a chunk is compared with the old slots and its own keys side by side, and stored
    afterwards; `seen_positions` says which position each of those columns is.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        context: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        batch_size: int = 1,
    ) -> None:
        self.capacity = cache_positions(config, context)
        self.length = 0  # positions stored so far, including those already rolled out
        self._rolls = config.sliding_window is not None and self.capacity == config.sliding_window
        shape = (batch_size, config.n_kv_heads, self.capacity, config.head_dim)
        # Uninitialised on purpose: untouched pages cost no memory. Every read is cut to slots that were written.
        # A buffer per layer, (B, K, C, D), and not one for all: a compiler sees which layers do not touch each other.
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]

    @property
    def filled(self) -> int:
        """How many slots hold a position."""
        return min(self.length, self.capacity)

    def require_room(self, count: int) -> None:
        """Raise ValueError unless `count` more positions can be stored without losing one that is still visible."""
        if not self._rolls and self.length + count > self.capacity:
            raise ValueError(
                f"a cache of {self.capacity} positions cannot take {self.length + count}; the caller checks the context"
            )

    def seen_positions(self, count: int) -> Tensor:
        """Return the position behind each column that a chunk of `count` new positions is compared with, (S,).

        One new position: the slots after it was stored. Several: the filled slots, then the new positions.
        """
        if count == 1:
            return self._slot_positions(self.length + 1)
        return torch.cat((self._slot_positions(self.length), torch.arange(self.length, self.length + count)))

    def _slot_positions(self, length: int) -> Tensor:
        slots = torch.arange(min(length, self.capacity))
        # The newest position congruent to the slot: length-1 minus how far behind the slot is.
        return length - 1 - (length - 1 - slots) % self.capacity

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values (B, K, T, D) and return all that the queries are compared with.

        The columns of the result (B, K, S, D) are those of `seen_positions(T)`. Call `advance(T)` after the last
        layer.
        """
        count = keys.shape[2]
        if count == 1:
            slot = self.length % self.capacity
            self.keys[layer][:, :, slot] = keys[:, :, 0]
            self.values[layer][:, :, slot] = values[:, :, 0]
            filled = min(self.length + 1, self.capacity)
            return self.keys[layer][:, :, :filled], self.values[layer][:, :, :filled]
        all_keys, all_values = keys, values
        if self.length:
            all_keys = torch.cat((self.keys[layer][:, :, : self.filled], keys), dim=2)  # (B, K, S, D)
            all_values = torch.cat((self.values[layer][:, :, : self.filled], values), dim=2)
        kept = min(count, self.capacity)
        slots = torch.arange(self.length + count - kept, self.length + count, device=keys.device) % self.capacity
        self.keys[layer].index_copy_(2, slots, keys[:, :, count - kept :])
        self.values[layer].index_copy_(2, slots, values[:, :, count - kept :])
        return all_keys, all_values

    def advance(self, count: int) -> None:
        """Count `count` positions as stored, once every layer has been updated."""
        self.length += count
