"""Matrices whose product with a few rows goes at the speed of the memory, and with many rows at that of the arithmetic.

They take the place of `nn.Linear` after loading, on the CPU. Which way a product is computed depends on its number of
rows alone, so a prompt's chunks and a batch's steps are each repeatable. Weights stay what they were, mapped pages.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from mistral_runtime.kernels.rows import MAX_ROWS, RowKernels, row_kernels
from mistral_runtime.kernels.tiles import TILE, tile_kernels
from mistral_runtime.quantized import QuantizedWeight, dequantize

# Expanded at once for a product of many rows: 1,024 outputs of 4,096 inputs in bfloat16 make 8 MB.
EXPANDED_TILES = 64


class RowLinear(nn.Module):
    """x Wᵀ with bfloat16 weights as they lie in the file."""

    def __init__(self, weight: Tensor, kernels: RowKernels) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.weight: Tensor
        self._kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, out) for (…, in) in bfloat16."""
        rows = x.reshape(-1, x.shape[-1])
        if 0 < rows.shape[0] <= MAX_ROWS:
            product = self._kernels.bf16(self.weight, rows.contiguous())
            return product.view(*x.shape[:-1], self.weight.shape[0])
        return linear(x, self.weight)


class QuantizedLinear(nn.Module):
    """x Wᵀ with weights of 8 or 4 bits in groups; see `quantized.py`.

    Rows are multiplied with the integers themselves, as integers. Without kernels, or for many rows on a processor that
    has no fast products of bytes, the weights are expanded to bfloat16 a block at a time.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.register_buffer("values", weight.values)
        self.register_buffer("scales", weight.scales)
        self._weight = weight
        self._kernels = tile_kernels()

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, out) for (…, in), in the type of x."""
        inputs, outputs = x.shape[-1], self._weight.outputs
        rows = x.reshape(-1, inputs).to(torch.bfloat16)
        padding = self._weight.padded_inputs - inputs
        rows = (pad(rows, (0, padding)) if padding else rows).contiguous()
        product = self._multiply(rows) if len(rows) else rows.new_empty(0, outputs)
        return product.view(*x.shape[:-1], outputs).to(x.dtype)

    def _multiply(self, rows: Tensor) -> Tensor:
        weight, kernels = self._weight, self._kernels
        if kernels is None or len(rows) > (kernels.max_rows or len(rows)):
            return self._multiply_expanded(rows)
        return kernels.multiply(weight.values, weight.scales, rows, bits=weight.bits, outputs=weight.outputs)

    def _multiply_expanded(self, rows: Tensor) -> Tensor:
        outputs = self._weight.outputs
        product = torch.empty(len(rows), outputs, dtype=torch.bfloat16)
        for first in range(0, outputs, EXPANDED_TILES * TILE):
            part = product[:, first : first + EXPANDED_TILES * TILE]
            part[:] = linear(rows, self._expanded(first // TILE)[: part.shape[1]])
        return product

    def _expanded(self, first: int) -> Tensor:
        if self._kernels is None:
            return dequantize(self._weight, first, EXPANDED_TILES)
        tiles = slice(first, first + EXPANDED_TILES)
        return self._kernels.expand(self._weight.values[tiles], self._weight.scales[tiles], bits=self._weight.bits)


def use_row_kernels(model: nn.Module) -> int:
    """Replace every bfloat16 matrix on the CPU by one that is read at the memory's speed; return how many were."""
    kernels = row_kernels()
    if kernels is None:
        return 0
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and _is_plain_bf16(child.weight)
    ]
    for parent, name, child in found:
        parent.register_module(name, RowLinear(child.weight.detach(), kernels))
    return len(found)


def _is_plain_bf16(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous()
