"""What memory gives at most: the ceiling that decoding is measured against.

To decode one token every weight is read once, so tokens per second are at most memory's bytes per second over the
weights' bytes (Pope et al. 2022, arXiv 2211.05102, section 2).
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from mistral_runtime.machine import available_memory
from mistral_runtime.transformer import Transformer

_LARGEST_BYTES = 512 << 20  # past any processor's caches
_SMALLEST_BYTES = 64 << 20
_READS = 3


class MemoryProbe:
    """A large tensor, read from end to end by as many threads as torch is set to use."""

    def __init__(self, device: torch.device) -> None:
        # A quarter of what is free at most: pages of the weights must not be given up for it.
        room = (available_memory() or 4 * _LARGEST_BYTES) // 4
        size = max(_SMALLEST_BYTES, min(_LARGEST_BYTES, room))
        # Written, not only reserved: pages that were never written are all the same page of zeros.
        self._values = torch.ones(size // 4, dtype=torch.float32, device=device)

    @torch.inference_mode()
    def bytes_per_second(self) -> float:
        """Return the best rate of a few reads; a sum takes far less arithmetic than memory gives it time for."""
        return self._values.nbytes / min(self._read() for _ in range(_READS))

    def _read(self) -> float:
        started = time.perf_counter()
        self._values.sum().item()  # the number has to arrive, so a GPU has finished as well
        return time.perf_counter() - started


def bytes_read_per_token(model: Transformer) -> int:
    """Return the weight bytes that one decoding step reads: all, but of the embeddings only one row.

    Keys and values are left out: at 7B each position holds 1/100,000 of what the weights are.
    """
    embeddings = model.tok_embeddings.weight
    held = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    others = sum(_size(tensor) for tensor in held.values() if tensor is not embeddings)
    return others + _size(embeddings) // len(embeddings)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
