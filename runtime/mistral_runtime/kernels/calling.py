"""What every caller of a compiled kernel does first: declare its arguments, and refuse tensors that C would misread."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mistral_runtime.kernels.build import BuildFailed, load_library

DISABLE_VARIABLE = "MISTRAL_RUNTIME_KERNELS"
POINTER, LONG, INT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int

Kernels = TypeVar("Kernels")


def try_to_load(
    source: Path, kind: Callable[[ctypes.CDLL], Kernels], self_check: Callable[[Kernels], str]
) -> tuple[Kernels | None, str]:
    """Return the kernels of a source, built and held against torch, or None; and the reason for either."""
    if os.environ.get(DISABLE_VARIABLE) == "off":
        return None, f"{DISABLE_VARIABLE}=off"
    try:
        kernels = kind(load_library(source))
    except BuildFailed as error:
        return None, str(error)
    wrong = self_check(kernels)
    return (None, wrong) if wrong else (kernels, "compiled for this machine")


def entry(library: ctypes.CDLL, name: str, arguments: Sequence[Any], result: Any = None) -> Any:
    """Return a function of the library that checks the types of its arguments."""
    function = getattr(library, name)
    function.argtypes = list(arguments)
    function.restype = result
    return function


def plain_shape(tensor: Tensor, dtype: torch.dtype, dimensions: int) -> tuple[int, ...]:
    """Return the shape of a tensor whose numbers lie one after the other on the CPU.

    Raises:
        ValueError: Anything else, which C would not notice.
    """
    is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype == dtype
    if tensor.dim() != dimensions or not is_plain or not tensor.is_contiguous():
        raise ValueError(
            f"expected a contiguous tensor of {dimensions} dimensions of {dtype} on the CPU, "
            f"found {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )
    return tuple(tensor.shape)


def new_result(rows: int, outputs: int, *, wide: bool) -> Tensor:
    """Return room for a product (rows, outputs), in float32 where it is ``wide``."""
    return torch.empty(rows, outputs, dtype=torch.float32 if wide else torch.bfloat16)


def is_close(found: Tensor, x: Tensor, weights: Tensor) -> bool:
    """Say whether a product is x weightsᵀ to within what any kernel here may round away."""
    expected = x.float() @ weights.float().T
    return torch.allclose(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
