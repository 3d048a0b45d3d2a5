"""Keys and values in 8 bits: half the memory, and half of what a step at the end of a long text reads.

Each position's key, and value, of each head is integers of −127 to 127 times one float32. Owns that form; where it is
stored is `kv_cache.py`'s affair. On the CPU the kernel of `kernels/attention.c` reads it as it is.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mistral_runtime.config import ModelConfig
from mistral_runtime.kv_cache import RollingKVCache

KvKind = Literal["exact", "int8"]
"""How keys and values are kept: as they were computed, or in 8 bits."""

_SCALE_BYTES = 4


def bytes_per_head(config: ModelConfig, kind: KvKind, dtype: torch.dtype) -> int:
    """Return what one head's key, or value, of one position takes."""
    return config.head_dim + _SCALE_BYTES if kind == "int8" else config.head_dim * dtype.itemsize


def to_int8(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers (…, D) and scales (…, 1) whose product is nearest to `vectors` (…, D).

    A vector with NaN or infinity has a scale that is one, and integers of 0: their product is NaN.
    """
    wide = vectors.float()
    scales = wide.abs().amax(-1, keepdim=True) / 127
    integers = (wide / scales).round().nan_to_num(0.0, 0.0, 0.0)
    return integers.to(torch.int8), scales


class Int8KVCache(RollingKVCache):
    """A rolling cache that keeps 8 bits of each number, and gives back the type it is given."""

    def __init__(self, config: ModelConfig, *, context: int, dtype: torch.dtype, **options: Any) -> None:
        """Take the arguments of `RollingKVCache`; `dtype` is what it is given and gives back."""
        super().__init__(config, context=context, dtype=dtype, **options)
        of_scales = (self.batch_size, config.n_kv_heads, self.capacity, 1)
        self.key_scales, self.value_scales = (self._buffers(config, of_scales, dtype=torch.float32) for _ in range(2))
        self.addresses[:, 2] = torch.tensor([scales.data_ptr() for scales in self.key_scales])
        self.addresses[:, 3] = torch.tensor([scales.data_ptr() for scales in self.value_scales])

    def _buffers(
        self, config: ModelConfig, shape: tuple[int, ...], *, dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        return super()._buffers(config, shape, dtype=dtype or torch.int8)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values and return all that can be seen; see `RollingKVCache.update`."""
        return (
            self._update_int8(self.keys[layer], self.key_scales[layer], keys),
            self._update_int8(self.values[layer], self.value_scales[layer], values),
        )

    def _update_int8(self, buffer: Tensor, scales: Tensor, new: Tensor) -> Tensor:
        integers, own_scales = to_int8(new)
        return (self._update(buffer, integers).float() * self._update(scales, own_scales)).to(new.dtype)
