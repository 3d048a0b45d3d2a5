"""Products with quantised weights, by the compiled tiles.c."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from mistral_runtime.kernels.build import TILES_SOURCE
from mistral_runtime.kernels.calling import INT, LONG, POINTER, entry, is_close, new_result, plain_shape, try_to_load
from mistral_runtime.recipe import GROUPS

TILE = 16  # outputs whose weights lie together
BLOCK = 128  # what the number of inputs is a multiple of
# What is multiplied here where the processor has no instructions for it: more rows go to torch with expanded weights.
MAX_ROWS_WITHOUT_VNNI = 24


class TileKernels:
    """y = x Wᵀ with weights of 8 or 4 bits in tiles (see tiles.c); bfloat16 in, bfloat16 or (``wide``) float32 out.

    T tiles of 16 outputs, K inputs, groups of G inputs, M rows. Values are (T, K·bits/32, 16, 4) in uint8 and scales
    (T, K/G, 16) in bfloat16. All tensors lie on the CPU and are contiguous.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        numbers = [INT, LONG, LONG, LONG, INT, INT, INT]
        self._multiply = entry(library, "tiles_multiply", [POINTER] * 4 + numbers, INT)
        self._expand = entry(library, "tiles_expand", [POINTER] * 3 + [LONG] * 3 + [INT] * 2)
        takes_many = bool(entry(library, "tiles_take_many", [], INT)())
        self.max_rows: int | None = None if takes_many else MAX_ROWS_WITHOUT_VNNI
        """Beyond these, expanded weights are faster here; None where they never are."""

    def multiply(
        self, values: Tensor, scales: Tensor, x: Tensor, *, bits: int, outputs: int, wide: bool = False
    ) -> Tensor:
        """Multiply rows x (M, K) by the first so many outputs.

        Raises:
            ValueError: A shape, type or layout that C would misread, or too many rows.
            MemoryError: No room for the activations.
        """
        rows, inputs = plain_shape(x, torch.bfloat16, 2)
        group = _group(values, scales, inputs, bits)
        if not 1 <= rows <= (self.max_rows or rows) or not 0 <= values.shape[0] * TILE - outputs < TILE:
            raise ValueError(f"{rows} rows of at most {self.max_rows}, {outputs} outputs in {values.shape[0]} tiles")
        y = new_result(rows, outputs, wide=wide)
        pointers = (values.data_ptr(), scales.data_ptr(), x.data_ptr(), y.data_ptr())
        sizes = (outputs, inputs, group, bits, rows)
        if self._multiply(*pointers, wide, *sizes, torch.get_num_threads()):
            raise MemoryError(f"no room for {rows} rows of {inputs} activations")
        return y

    def expand(self, values: Tensor, scales: Tensor, *, bits: int) -> Tensor:
        """Return the weights of all tiles as bfloat16, (16 T, K)."""
        inputs = values.shape[1] * 32 // bits if values.dim() == 4 else 0
        group = _group(values, scales, inputs, bits)
        out = torch.empty(values.shape[0] * TILE, inputs, dtype=torch.bfloat16)
        sizes = (values.shape[0], inputs, group, bits)
        self._expand(values.data_ptr(), scales.data_ptr(), out.data_ptr(), *sizes, torch.get_num_threads())
        return out


def _group(values: Tensor, scales: Tensor, inputs: int, bits: int) -> int:
    """Return how many inputs share a scale of weights; ValueError unless everything fits."""
    tiles, *line = plain_shape(values, torch.uint8, 4)
    found, groups, lanes = plain_shape(scales, torch.bfloat16, 3)
    group = inputs // groups if groups else 0
    fits = (found, lanes) == (tiles, TILE) and group in GROUPS and group * groups == inputs and inputs % BLOCK == 0
    if bits not in (4, 8) or line != [inputs * bits // 32, TILE, 4] or not fits:
        raise ValueError(
            f"values {tuple(values.shape)} and scales {tuple(scales.shape)} are no {bits} bits of {inputs} inputs"
        )
    return group


@lru_cache(maxsize=1)
def tile_kernels() -> TileKernels | None:
    """Return the kernels, built and checked, or None where they cannot be had; `tiles_reason` says why."""
    return _try_to_load()[0]


def tiles_reason() -> str:
    """Return why the kernels are, or are not, used."""
    return _try_to_load()[1]


@lru_cache(maxsize=1)
def _try_to_load() -> tuple[TileKernels | None, str]:
    return try_to_load(TILES_SOURCE, TileKernels, _self_check)


def _self_check(kernels: TileKernels) -> str:
    """Hold the library against torch on small numbers: a compiler can be wrong, and a cached file damaged."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(MAX_ROWS_WITHOUT_VNNI + 3, 256, generator=generator).to(torch.bfloat16)
    scales = torch.rand(2, 4, TILE, generator=generator).to(torch.bfloat16)
    for bits in (8, 4):
        values = torch.randint(0, 256, (2, 8 * bits, TILE, 4), generator=generator, dtype=torch.uint8)
        weights = kernels.expand(values, scales, bits=bits)[:23]
        for rows in (x[:5], x[: kernels.max_rows]):
            found = kernels.multiply(values, scales, rows, bits=bits, outputs=23, wide=True)
            if not is_close(found, rows, weights):
                return f"the compiled int{bits} kernel computes something else than torch"
    return ""
