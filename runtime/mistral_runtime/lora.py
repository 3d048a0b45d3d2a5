"""What is done with a LoRA adapter: its pairs are merged into the weights while loading, or computed beside them.

Merged, the model costs what it did before, but every changed weight is a copy. Apart, weights stay as they are, mapped
or quantised, and each changed matrix costs two small products more. Both are W·x + scale · B·(A·x), up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mistral_runtime.adapter import Adapter, LowRankPair
from mistral_runtime.transformer import Transformer
from mistral_runtime.weights import WeightTransform

# Rows merged at a time: 16 MiB of float32 at 4,096 columns, however large the matrix is.
_ROWS = 1024


@dataclass(frozen=True)
class LoraOptions:
    """What the command line asked for: the adapter, a scale that wins over its own, and not to merge it."""

    path: Path
    scale: float | None = None
    apart: bool = False


def describe(adapter: Adapter, *, apart: bool) -> str:
    """Return one line for people."""
    scale = f"scale {adapter.scale.value:g} ({adapter.scale.reason})"
    how = "computed apart" if apart else "merged while loading"
    return f"lora: {adapter.path} · rank {adapter.rank} · {scale} · {len(adapter.pairs)} matrices · {how}"


def result_fields(adapter: Adapter, *, apart: bool) -> dict[str, Any]:
    """Return what `--json` says of it; documented in docs/runtime.md."""
    return {
        "path": str(adapter.path),
        "layout": adapter.layout,
        "rank": adapter.rank,
        "scale": adapter.scale.value,
        "matrices": len(adapter.pairs),
        "merged": not apart,
    }


def merging(adapter: Adapter, *, dtype: torch.dtype) -> WeightTransform:
    """Return the step of `load_model` that adds the adapter's pairs; changed weights come out in `dtype`."""

    def merge(name: str, weight: Tensor) -> Tensor:
        pair = adapter.pairs.get(name.removesuffix(".weight"))
        return weight if pair is None else merged_weight(weight, pair, scale=adapter.scale.value, dtype=dtype)

    return merge


def merged_weight(weight: Tensor, pair: LowRankPair, *, scale: float, dtype: torch.dtype) -> Tensor:
    """Return weight + scale · B · A, (out, in): computed in float32 and rounded to `dtype` once."""
    merged = torch.empty(weight.shape, dtype=dtype)
    a = pair.a.float()
    for begin in range(0, len(weight), _ROWS):
        rows = slice(begin, begin + _ROWS)
        merged[rows] = torch.addmm(weight[rows].float(), pair.b[rows].float(), a, alpha=scale)
    return merged


class LoraLinear(nn.Module):
    """A linear map and what an adapter adds to it: base(x) + scale · B(A(x)).

    `base` may be anything that takes (…, in) to (…, out), a quantised matrix for example.
    """

    lora_a: Tensor
    lora_b: Tensor

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor) -> None:
        """Take the pair A (r, in) and scale · B (out, r) in the type and on the device of the activations."""
        super().__init__()
        self.base = base
        self.register_buffer("lora_a", a)
        self.register_buffer("lora_b", b)

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, out) for `x` (…, in)."""
        based: Tensor = self.base(x)
        return based + linear(linear(x, self.lora_a), self.lora_b)


def set_apart(model: Transformer, adapter: Adapter) -> None:
    """Wrap the matrices that the adapter changes, as they are now, in place."""
    for name, pair in adapter.pairs.items():
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        a = pair.a.to(device=model.device, dtype=model.dtype)
        b = (pair.b.float() * adapter.scale.value).to(device=model.device, dtype=model.dtype)
        setattr(owner, child, LoraLinear(owner.get_submodule(child), a, b))
