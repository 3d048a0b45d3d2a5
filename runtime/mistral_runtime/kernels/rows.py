"""Calling the compiled kernels with tensors, after checking everything that C does not."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mistral_runtime.kernels.build import BuildFailed, load_library
from mistral_runtime.recipe import GROUPS

# From here on oneDNN's product of many rows is faster, though it may have to be given expanded weights: measured on
# Zen 4, three shapes of a 7B, 16 to 32 rows. At 24 the kernels need 0.74 to 0.99 of its time; at 32 some lose.
MAX_ROWS = 24
BLOCK = 128  # inputs that four-bit weights are laid out by
DISABLE_VARIABLE = "MISTRAL_RUNTIME_KERNELS"

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class RowKernels:
    """y = x Wᵀ for up to `MAX_ROWS` rows of x, bfloat16 in, bfloat16 or (``wide``) float32 out.

    N outputs, K inputs, M rows, groups of G inputs. All tensors lie on the CPU and are contiguous.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._bf16 = _entry(library, "rows_bf16", [_POINTER] * 3 + [_INT, _LONG, _LONG, _INT, _INT])
        quantized = [_POINTER] * 4 + [_INT, _LONG, _LONG, _LONG, _INT, _INT]
        self._int8 = _entry(library, "rows_int8", quantized)
        self._int4 = _entry(library, "rows_int4", quantized)
        expanding = [_POINTER] * 3 + [_LONG] * 4 + [_INT]
        self._expand_int8 = _entry(library, "expand_int8", expanding)
        self._expand_int4 = _entry(library, "expand_int4", expanding)

    def bf16(self, weight: Tensor, x: Tensor, *, wide: bool = False) -> Tensor:
        """Multiply by weights (N, K) in bfloat16, bit for bit as published."""
        outputs, inputs = _matrix(weight, torch.bfloat16)
        rows = _rows(x, inputs)
        y = _result(rows, outputs, wide)
        self._bf16(weight.data_ptr(), x.data_ptr(), y.data_ptr(), wide, outputs, inputs, rows, torch.get_num_threads())
        return y

    def int8(self, values: Tensor, scales: Tensor, x: Tensor, *, wide: bool = False) -> Tensor:
        """Multiply by weights that are values (N, K) int8 times scales (N, K/G) bfloat16."""
        outputs, inputs = _matrix(values, torch.int8)
        return self._quantized(self._int8, values, scales, x, outputs, inputs, wide=wide)

    def int4(self, values: Tensor, scales: Tensor, x: Tensor, *, wide: bool = False) -> Tensor:
        """Multiply by weights of four bits, values (N, K/2) uint8 laid out as rows.c says, times scales (N, K/G)."""
        outputs, pairs = _matrix(values, torch.uint8)
        inputs = 2 * pairs
        return self._quantized(self._int4, values, scales, x, outputs, inputs, wide=wide)

    def expand(self, values: Tensor, scales: Tensor, first: int, count: int) -> Tensor:
        """Return the outputs first..first+count of quantised weights as bfloat16, (count, K)."""
        is_int4 = values.dtype == torch.uint8
        outputs, columns = _matrix(values, torch.uint8 if is_int4 else torch.int8)
        inputs = columns * (2 if is_int4 else 1)
        if not 0 <= first <= first + count <= outputs:
            raise ValueError(f"outputs {first} to {first + count} of {outputs}")
        group = _group(scales, outputs, inputs)
        out = torch.empty(count, inputs, dtype=torch.bfloat16)
        call = self._expand_int4 if is_int4 else self._expand_int8
        call(values.data_ptr(), scales.data_ptr(), out.data_ptr(), first, count, inputs, group, torch.get_num_threads())
        return out

    def _quantized(
        self,
        call: Any,
        values: Tensor,
        scales: Tensor,
        x: Tensor,
        outputs: int,
        inputs: int,
        *,
        wide: bool,
    ) -> Tensor:
        group = _group(scales, outputs, inputs)
        rows = _rows(x, inputs)
        y = _result(rows, outputs, wide)
        pointers = (values.data_ptr(), scales.data_ptr(), x.data_ptr(), y.data_ptr())
        if call(*pointers, wide, outputs, inputs, group, rows, torch.get_num_threads()):
            raise MemoryError(f"no room for {rows} rows of {inputs} activations")
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
    if os.environ.get(DISABLE_VARIABLE) == "off":
        return None, f"{DISABLE_VARIABLE}=off"
    try:
        kernels = RowKernels(load_library())
    except BuildFailed as error:
        return None, str(error)
    wrong = _self_check(kernels)
    return (None, wrong) if wrong else (kernels, "compiled for this machine")


def _self_check(kernels: RowKernels) -> str:
    """Hold the library against torch on small numbers: a compiler can be wrong, and a cached file damaged."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 256, generator=generator).to(torch.bfloat16)
    weight = torch.randn(7, 256, generator=generator).to(torch.bfloat16)
    int8 = torch.randint(-127, 128, (7, 256), generator=generator, dtype=torch.int8)
    int4 = torch.randint(0, 256, (7, 128), generator=generator, dtype=torch.uint8)
    scales = torch.rand(7, 4, generator=generator).to(torch.bfloat16)
    pairs = [
        ("bf16", kernels.bf16(weight, x, wide=True), weight),
        ("int8", kernels.int8(int8, scales, x, wide=True), kernels.expand(int8, scales, 0, 7)),
        ("int4", kernels.int4(int4, scales, x, wide=True), kernels.expand(int4, scales, 0, 7)),
    ]
    for name, found, weights in pairs:
        expected = x.float() @ weights.float().T
        if not torch.allclose(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max())):
            return f"the compiled {name} kernel computes something else than torch"
    return ""


def _entry(library: ctypes.CDLL, name: str, arguments: Sequence[Any]) -> Any:
    function = getattr(library, name)
    function.argtypes = list(arguments)
    function.restype = _INT if name.startswith("rows") else None
    return function


def _matrix(tensor: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """Return the shape of a plain matrix on the CPU; ValueError for anything else: C would not notice."""
    is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype == dtype
    if tensor.dim() != 2 or not is_plain or not tensor.is_contiguous():
        raise ValueError(
            f"expected a contiguous matrix of {dtype} on the CPU, "
            f"found {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )
    return tensor.shape[0], tensor.shape[1]


def _rows(x: Tensor, inputs: int) -> int:
    rows, columns = _matrix(x, torch.bfloat16)
    if columns != inputs or not 1 <= rows <= MAX_ROWS:
        raise ValueError(f"expected 1 to {MAX_ROWS} rows of {inputs} inputs, found {rows} of {columns}")
    return rows


def _group(scales: Tensor, outputs: int, inputs: int) -> int:
    rows, groups = _matrix(scales, torch.bfloat16)
    group = inputs // groups if groups else 0
    if rows != outputs or group not in GROUPS or group * groups != inputs or inputs % BLOCK:
        raise ValueError(f"expected scales of {outputs} outputs in groups of {GROUPS}, found {rows} x {groups}")
    return group


def _result(rows: int, outputs: int, wide: bool) -> Tensor:
    return torch.empty(rows, outputs, dtype=torch.float32 if wide else torch.bfloat16)
