"""Calling the compiled attention with tensors, after checking everything that C does not."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mistral_runtime.kernels.build import ATTENTION_SOURCE
from mistral_runtime.kernels.calling import try_to_load

_MOST_DIMENSIONS = 512  # as in attention.c

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long


class SequenceTable:
    """The sequences of a step as the kernel reads them: a row of numbers for each, and for each layer such rows.

    Holds addresses: whoever made it keeps caches and masks alive for as long as it is used.
    """

    def __init__(self, addresses: Tensor, fields: Sequence[tuple[int, ...]]) -> None:
        """Take what differs between layers and what does not, each as the fields of `Sequence` in attention.c.

        Args:
            addresses: Of keys, values and their scales (0 without any), (L, N, 4).
            fields: The others of each of the N sequences.
        """
        rows = torch.tensor(fields, dtype=torch.int64).expand(addresses.shape[0], -1, -1)
        self._rows = torch.cat((addresses, rows), dim=2)  # (L, N, 4 + fields)
        self._bytes_per_layer = self._rows[0].nbytes
        self._address = self._rows.data_ptr()
        self.count = len(fields)

    def address(self, layer: int) -> int:
        """Return where one layer's rows begin."""
        return self._address + layer * self._bytes_per_layer


class AttentionKernel:
    """softmax(q kᵀ / √D) v in bfloat16 on the CPU, for the rows of one or of many sequences.

    B batch, T new positions, S visible ones, H query heads, K key heads, D head dimension.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._attend = library.attend_bf16
        self._attend.argtypes = [_POINTER, _LONG, *[_POINTER] * 4, *[_LONG] * 3, ctypes.c_float, ctypes.c_int]
        self._attend.restype = ctypes.c_int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Return what q (B, T, H, D) gathers from k and v (B, K, S, D) under mask (T, S) of bool, (B, T, H·D).

        Each position gets bit for bit what it would get alone. Keys and values may be cut from a longer buffer.

        Raises:
            ValueError: A shape, type or layout that the kernel would misread; see `rows_side_by_side`.
            MemoryError: No room for partial sums.
        """
        batch, count, heads, head_dim = q.shape
        seen = k.shape[2]
        _require_layout(q, k, v, mask)
        visible = 0 if mask is None else mask.data_ptr()
        addresses = [[[*(t[b].data_ptr() for t in (k, v)), 0, 0] for b in range(batch)]]
        fields = [(visible, b * count, count, seen, k.stride(1), -1, 1) for b in range(batch)]
        out = torch.empty(batch, count, heads * head_dim, dtype=torch.bfloat16)
        self._call(SequenceTable(torch.tensor(addresses), fields), 0, q, None, None, out, k.shape[1])
        return out

    def step(self, table: SequenceTable, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Store the new keys and values (1, T, K, D) of all sequences in a table, and attend with q (1, T, H, D).

        Writes to the rows of `out` (1, T, H·D) that belong to one of the sequences.

        Raises:
            ValueError: A type or layout that the kernel would misread.
            MemoryError: No room for partial sums.
        """
        for t in (q, k, v, out):
            if t.dtype != torch.bfloat16 or not t.is_cpu or not t.is_contiguous():
                raise ValueError("expected plain queries, keys and values in bfloat16 on the CPU")
        self._call(table, layer, q, k, v, out, k.shape[2])

    def _call(
        self,
        table: SequenceTable,
        layer: int,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        out: Tensor,
        kv_heads: int,
    ) -> None:
        heads, head_dim = q.shape[2:]
        failed = self._attend(
            table.address(layer),
            table.count,
            q.data_ptr(),
            None if k is None else k.data_ptr(),
            None if v is None else v.data_ptr(),
            out.data_ptr(),
            *(heads, kv_heads, head_dim),
            1 / math.sqrt(head_dim),
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no room for attention of {q.shape[1]} positions")


def takes(q: Tensor) -> bool:
    """Say whether the kernel is made for such queries (B, T, H, D)."""
    return (
        q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[3] <= _MOST_DIMENSIONS and not q.requires_grad
    )


def rows_side_by_side(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return k and v (B, K, S, D) as the kernel reads them: a cache's slots as they are, anything else as a copy."""
    if k.stride() == v.stride() and k.stride()[2:] == (k.shape[3], 1):
        return k, v
    # A clone, since what torch calls contiguous may still have any stride where a dimension is 1.
    return k.clone(memory_format=torch.contiguous_format), v.clone(memory_format=torch.contiguous_format)


def _require_layout(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    batch, count, heads, head_dim = q.shape
    kv_heads, seen = k.shape[1:3]
    if any(t.dtype != torch.bfloat16 or t.device.type != "cpu" for t in (q, k, v)) or not q.is_contiguous():
        raise ValueError("expected plain queries, keys and values in bfloat16 on the CPU")
    if k.shape != (batch, kv_heads, seen, head_dim) or v.shape != k.shape or heads % kv_heads or not seen:
        raise ValueError(f"queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)} do not fit")
    if k.stride() != v.stride() or k.stride()[2:] != (head_dim, 1) or head_dim > _MOST_DIMENSIONS:
        raise ValueError(f"keys and values lie in steps of {k.stride()} and {v.stride()}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (count, seen) or not mask.is_contiguous()):
        raise ValueError(f"expected a plain mask {(count, seen)} of bool, found {mask.dtype} {tuple(mask.shape)}")


@lru_cache(maxsize=1)
def attention_kernel() -> AttentionKernel | None:
    """Return the kernel, built and checked, or None where it cannot be had."""
    return try_to_load(ATTENTION_SOURCE, AttentionKernel, _self_check)[0]


def _self_check(kernel: AttentionKernel) -> str:
    """Hold the library against torch on small numbers: a compiler can be wrong, and a cached file damaged."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(shape, generator=generator).bfloat16() for shape in ((1, 2, 4, 64), *[(1, 2, 261, 64)] * 2))
    mask = torch.arange(261)[None] <= torch.tensor([[259], [260]])
    scores = torch.einsum("btkgd,bksd->bkgts", q.float().view(1, 2, 2, 2, 64), k.float()) / 8
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    expected = torch.einsum("bkgts,bksd->btkgd", weights, v.float()).flatten(2)
    is_right = torch.allclose(kernel(q, k, v, mask).float(), expected, atol=0.01)
    return "" if is_right else "the compiled attention computes something else than torch"
