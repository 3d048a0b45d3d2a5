"""Products of a few rows with weights in bfloat16, by the compiled rows.c."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from mistral_runtime.kernels.build import SOURCE
from mistral_runtime.kernels.calling import (
    INT,
    LONG,
    POINTER,
    entry,
    is_close,
    new_result,
    plain_shape,
    try_to_load,
)

# From here on oneDNN's product of many rows is faster: measured on Zen 4, three shapes of a 7B, 16 to 32 rows. At 24
# the kernel needs 0.74 to 0.99 of its time; at 32 some lose.
MAX_ROWS = 24


class RowKernels:
    """y = x Wᵀ for up to `MAX_ROWS` rows of x, bfloat16 in, bfloat16 or (``wide``) float32 out.

    N outputs, K inputs, M rows. All tensors lie on the CPU and are contiguous.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._bf16 = entry(library, "rows_bf16", [POINTER] * 3 + [INT, LONG, LONG, INT, INT])

    def bf16(self, weight: Tensor, x: Tensor, *, wide: bool = False) -> Tensor:
        """Multiply by weights (N, K) in bfloat16, bit for bit as published."""
        outputs, inputs = plain_shape(weight, torch.bfloat16, 2)
        rows, columns = plain_shape(x, torch.bfloat16, 2)
        if columns != inputs or not 1 <= rows <= MAX_ROWS:
            raise ValueError(f"expected 1 to {MAX_ROWS} rows of {inputs} inputs, found {rows} of {columns}")
        y = new_result(rows, outputs, wide=wide)
        self._bf16(weight.data_ptr(), x.data_ptr(), y.data_ptr(), wide, outputs, inputs, rows, torch.get_num_threads())
        return y


@lru_cache(maxsize=1)
def row_kernels() -> RowKernels | None:
    """Return the kernels, built and checked, or None where they cannot be had; `kernels_reason` says why."""
    return _try_to_load()[0]


def kernels_reason() -> str:
    """Return why the kernels are, or are not, used."""
    return _try_to_load()[1]


@lru_cache(maxsize=1)
def _try_to_load() -> tuple[RowKernels | None, str]:
    return try_to_load(SOURCE, RowKernels, _self_check)


def _self_check(kernels: RowKernels) -> str:
    """Hold the library against torch on small numbers: a compiler can be wrong, and a cached file damaged."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 256, generator=generator).to(torch.bfloat16)
    weight = torch.randn(7, 256, generator=generator).to(torch.bfloat16)
    is_right = is_close(kernels.bf16(weight, x, wide=True), x, weight)
    return "" if is_right else "the compiled bf16 kernel computes something else than torch"
