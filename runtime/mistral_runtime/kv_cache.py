"""Keys and values of the positions that can still be seen, in a buffer that rolls.

Owns where position p is stored and which positions are there; knows nothing of how keys are made or compared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mistral_runtime.config import ModelConfig


def cache_positions(config: ModelConfig, context: int, *, slack: int = 0) -> int:
    """Return how many positions a cache needs for sequences of up to `context` positions; for `slack` see below."""
    return context if config.sliding_window is None else min(context, config.sliding_window + slack)


def cache_bytes(config: ModelConfig, context: int, *, bytes_per_head: int, slack: int = 0) -> int:
    """Return the size of such a cache, every layer, batch of one; a head's key or value takes `bytes_per_head`."""
    per_position = 2 * config.n_layers * config.n_kv_heads * bytes_per_head
    return cache_positions(config, context, slack=slack) * per_position


class RollingKVCache:
    """Hold the last C positions of one sequence; position p lives in slot p mod C.

    Worked example, W = C = 4. Six positions have been stored, `length` = 6:

        slot       0  1  2  3
        position   4  5  2  3

    Storing position 6 overwrites slot 6 mod 4 = 2, which held position 2. Query 6 may see j with 6−4 < j ≤ 6, that
    is 3, 4, 5, 6: exactly what is left. So a decode step writes first and then looks at everything.

    A chunk of several positions cannot always write first. Storing 6, 7, 8 would overwrite 2, 3, 4, while query 6
    still needs 3 and 4. Such a chunk is compared with the old slots and its own keys side by side, and stored
    afterwards; `seen_positions` says which position each of those columns is.

    Positions can be taken back with `rewind`, and then what they had overwritten is missing. A slack of S slots
    (C = W + S) makes that harmless: storing p … p+S overwrites at most position p+S−C = p−W, which no query from p on
    may see. So chunks of up to S+1 positions write first and may be taken back, whatever the window. What else lies in
    the slots is older than the window or was taken back; `seen_positions` gives both a position that the mask hides.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        context: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        batch_size: int = 1,
        slack: int = 0,
        buffers: tuple[list[Tensor], list[Tensor]] | None = None,
    ) -> None:
        self.capacity = cache_positions(config, context, slack=slack)
        self.length = 0  # positions stored so far, including those already rolled out
        self._written = 0  # the largest length there ever was: what lies below it minus C has been overwritten
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.dtype = dtype
        self.window = config.sliding_window
        self._slack = slack
        self._rolls = config.sliding_window is not None and self.capacity == config.sliding_window + slack
        shape = (batch_size, config.n_kv_heads, self.capacity, config.head_dim)
        # A buffer per layer, (B, K, C, D), and not one for all: a compiler sees which layers do not touch each other.
        # `buffers` of that shape, keys and values, belong to somebody else and outlive this sequence.
        self.keys, self.values = buffers or (self._buffers(config, shape), self._buffers(config, shape))
        # Where each layer's keys, values and their scales begin, (L, 4), for a kernel that is handed many caches.
        self.addresses = torch.tensor(
            [[k.data_ptr(), v.data_ptr(), 0, 0] for k, v in zip(self.keys, self.values, strict=True)], dtype=torch.int64
        )

    def _buffers(
        self, config: ModelConfig, shape: tuple[int, ...], *, dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        # Uninitialised on purpose: untouched pages cost no memory. Every read is cut to slots that were written.
        return [torch.empty(shape, dtype=dtype or self.dtype, device=self.device) for _ in range(config.n_layers)]

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

    def rewind(self, count: int) -> None:
        """Take back the last `count` positions, as if they had never been stored.

        Raises:
            ValueError: One of the positions that the next query may see has been overwritten.
        """
        length = self.length - count
        # The next query, `length`, sees from length−W+1 on; up to written−1−C is lost.
        is_lost = self._rolls and self._written > self.capacity and self._written - length > self._slack + 1
        if not 0 <= count <= self.length or is_lost:
            raise ValueError(f"a cache with a slack of {self._slack} at {self.length} cannot go back to {length}")
        self.length = length

    def hides_nothing(self, count: int) -> bool:
        """Say whether `count` new positions may see every column they are compared with, so that no mask is needed."""
        return count == 1 and (self.window is None or min(self.length + 1, self.capacity) <= self.window)

    def seen_positions(self, count: int) -> Tensor:
        """Return the position behind each column that a chunk of `count` new positions is compared with, (S,).

        Where the chunk can be written first: the slots after it was stored. Else: the filled slots, then the new
        positions.
        """
        if self.writes_first(count):
            return self._slot_positions(self.length + count)
        return torch.cat((self._slot_positions(self.length), torch.arange(self.length, self.length + count)))

    def writes_first(self, count: int) -> bool:
        """Say whether `count` new positions can be stored before anything is looked at."""
        return count <= self._slack + 1 or self.length + count <= self.capacity

    def _slot_positions(self, length: int) -> Tensor:
        slots = torch.arange(min(length, self.capacity))
        # The newest position congruent to the slot: length-1 minus how far behind the slot is.
        return length - 1 - (length - 1 - slots) % self.capacity

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values (B, K, T, D) and return all that the queries are compared with.

        The columns of the result (B, K, S, D) are those of `seen_positions(T)`. Call `advance(T)` after the last
        layer.
        """
        return self._update(self.keys[layer], keys), self._update(self.values[layer], values)

    def _update(self, buffer: Tensor, new: Tensor) -> Tensor:
        """Store `new` (B, K, T, …) in one buffer, and return the columns of `seen_positions(T)`."""
        count = new.shape[2]
        if self.writes_first(count):
            self._store(buffer, new)
            return buffer[:, :, : min(self.length + count, self.capacity)]
        every = torch.cat((buffer[:, :, : self.filled], new), dim=2) if self.length else new
        self._store(buffer, new)
        return every

    def _store(self, buffer: Tensor, new: Tensor) -> None:
        """Write the last C of T positions to their slots: one run of slots, or two where the buffer's end is passed."""
        count = new.shape[2]
        done = max(0, count - self.capacity)
        while done < count:
            slot = (self.length + done) % self.capacity
            run = min(count - done, self.capacity - slot)
            buffer[:, :, slot : slot + run] = new[:, :, done : done + run]
            done += run

    def advance(self, count: int) -> None:
        """Count `count` positions as stored, once every layer has been updated."""
        self.length += count
        self._written = max(self._written, self.length)
