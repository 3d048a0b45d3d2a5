"""A decode step of a batch whose shapes and addresses depend on two powers of two alone.

B rows (batch bucket) look at the first S columns of their slots (length bucket). What differs from step to step is the
content of one small buffer: each row's token, position, and slot. Rows of the bucket that nobody needs write to the
pool's scratch slot. So there are few programs, and each can be captured as a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mistral_runtime.gpu.graphs import Runner
from mistral_runtime.gpu.static_cache import SlotCache, SlotPool
from mistral_runtime.transformer import Transformer

BATCH_BUCKETS = (1, 2, 4, 8, 16, 32)
MAX_BATCH = BATCH_BUCKETS[-1]
# Below this many columns attention costs nothing beside the weights, and each bucket costs a graph.
MIN_LENGTH_BUCKET = 256


@dataclass(frozen=True)
class Bucket:
    """Which program a step is.

    Attributes:
        rows: B, a member of BATCH_BUCKETS.
        columns: S, a power of two, or the pool's capacity where that is less.
        in_order: Whether row i is slot i, so that keys are looked at where they lie and not gathered first.
    """

    rows: int
    columns: int
    in_order: bool


def batch_bucket(count: int) -> int:
    """Return the smallest bucket that holds so many rows.

    Raises:
        ValueError: None does.
    """
    for rows in BATCH_BUCKETS:
        if count <= rows:
            return rows
    raise ValueError(f"a static step has at most {MAX_BATCH} rows, not {count}")


def length_bucket(filled: int, capacity: int) -> int:
    """Return how many columns to look at where `filled` of `capacity` hold a position: a power of two, or all."""
    return min(capacity, max(MIN_LENGTH_BUCKET, 1 << (filled - 1).bit_length()))


def visible_columns(positions: Tensor, columns: int, *, capacity: int, window: int | None) -> Tensor:
    """Return which of the first columns each row may see once its own position is stored, (B, S) of bool.

    Column s holds the newest position congruent to it: p − (p − s) mod C. Negative means never written; what an older
    sequence left there, or what was taken back, is labelled so or as older than the window.
    """
    column = torch.arange(columns, device=positions.device)
    behind = torch.remainder(positions[:, None] - column, capacity)  # (B, S)
    visible = behind <= positions[:, None]
    return visible if window is None else visible & (behind < window)


class StaticAttention:
    """What `Attention` asks, for B rows that are each one position of one slot."""

    def __init__(self, pool: SlotPool, bucket: Bucket, *, positions: Tensor, slots: Tensor) -> None:
        self._pool, self._bucket, self._slots = pool, bucket, slots
        self._columns = torch.remainder(positions, pool.capacity)
        visible = visible_columns(positions, bucket.columns, capacity=pool.capacity, window=pool.config.sliding_window)
        self._mask = visible[:, None, None]  # (B, 1, 1, S)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the keys and values (1, B, K, D) and return what q (1, B, H, D) gathers, (1, B, H·D)."""
        keys = self._stored(self._pool.keys[layer], k)
        values = self._stored(self._pool.values[layer], v)
        rows, kv_heads, head_dim = k.shape[1:]
        # Heads that share a key head are rows of it, so that keys are read once; see `attention.grouped_attention`.
        grouped = q.reshape(rows, kv_heads, -1, head_dim)  # (B, K, H/K, D)
        mixed = scaled_dot_product_attention(grouped, keys, values, attn_mask=self._mask)
        return mixed.reshape(1, rows, -1)

    def _stored(self, buffer: Tensor, new: Tensor) -> Tensor:
        """Write one row per slot, and return the columns that may be seen, (B, K, S, D)."""
        buffer[self._slots, :, self._columns] = new[0]
        seen = buffer[:, :, : self._bucket.columns]
        if self._bucket.in_order:
            return seen[: self._bucket.rows]
        return seen.index_select(0, self._slots)


class StaticStep:
    """Decode steps of the sequences in a pool."""

    def __init__(self, model: Transformer, pool: SlotPool, runner: Runner) -> None:
        if model.config.moe is not None:
            raise ValueError("which experts a token goes to is decided on the host; such a step has no static shape")
        self.model, self.pool, self.runner = model, pool, runner
        device = model.device
        self._inputs = torch.zeros(3, MAX_BATCH, dtype=torch.int64, device=device)
        # Rows, as the graph reads them: writing to `tokens` is choosing what comes next.
        self.tokens, self.positions, self.slots = self._inputs
        config = model.config
        pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64)
        self._frequency = (config.rope_theta ** (-pairs / config.head_dim)).to(device)  # (D/2)

    def place(self, rows: Sequence[tuple[SlotCache, int]]) -> Bucket:
        """Write each sequence's newest token, the position it gets and its slot into the inputs.

        Raises:
            ValueError: No row, too many, a sequence that is there twice, is full, or lies in another pool.
        """
        slots = [cache.slot for cache, _ in rows]
        if not rows or len(set(slots)) < len(slots) or any(cache.pool is not self.pool for cache, _ in rows):
            raise ValueError("a static step needs different sequences of its own pool")
        for cache, _ in rows:
            cache.require_room(1)
        bucket = batch_bucket(len(rows))
        padding = bucket - len(rows)
        inputs = torch.tensor(
            [
                [token for _, token in rows] + [0] * padding,
                [cache.length for cache, _ in rows] + [0] * padding,
                slots + [self.pool.scratch] * padding,
            ]
        )
        # From pageable memory: it has been read when this returns, and yet nothing waits for the device.
        self._inputs[:, :bucket].copy_(inputs, non_blocking=True)
        return self.bucket_of([cache.length for cache, _ in rows], slots)

    def bucket_of(self, lengths: Sequence[int], slots: Sequence[int]) -> Bucket:
        """Return the program for sequences of these lengths, before the step, in these slots."""
        filled = max(min(length + 1, self.pool.capacity) for length in lengths)
        rows = batch_bucket(len(slots))
        in_order = list(slots) == list(range(len(slots))) and rows <= self.pool.rows
        return Bucket(rows, length_bucket(filled, self.pool.capacity), in_order)

    @torch.inference_mode()
    def launch(self, bucket: Bucket) -> Tensor:
        """Compute what the inputs say and return logits (B, V) in float32 on the device, good until the next launch."""
        return self.runner.run(bucket, lambda: self._compute(bucket))

    def decode(self, rows: Sequence[tuple[SlotCache, int]]) -> Tensor:
        """Append one token to each sequence and return its logits (N, V) in float32 on the device.

        They are good until the next step. Raises what `place` raises, and has then changed no sequence.
        """
        logits = self.launch(self.place(rows))
        for cache, _ in rows:
            cache.advance(1)
        return logits[: len(rows)]

    def _compute(self, bucket: Bucket) -> Tensor:
        """Everything between the inputs and the logits. Running it again writes the same keys to the same places."""
        model, positions = self.model, self.positions[: bucket.rows]
        attention = StaticAttention(self.pool, bucket, positions=positions, slots=self.slots[: bucket.rows])
        cos, sin = self._angles(positions)
        x: Tensor = model.tok_embeddings(self.tokens[None, : bucket.rows])  # (1, B, dim)
        for index, layer in enumerate(model.layers):
            x = layer(x, cos, sin, attention, index)
        return model.project(x)[0]

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `rope.rope_cos_sin` does, (B, 1, D), for positions that only the device knows."""
        angle = positions[:, None] * self._frequency  # (B, D/2), float64
        cos, sin = angle.cos(), angle.sin()
        cos_twice = torch.stack((cos, cos), dim=-1).flatten(-2)
        sin_twice = torch.stack((-sin, sin), dim=-1).flatten(-2)
        return cos_twice.float()[:, None], sin_twice.float()[:, None]
