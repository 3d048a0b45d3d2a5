"""`quantized.safetensors`: which tensors it holds, what it must say about itself, and the model made from it.

Every matrix `NAME.weight` that is quantised is stored as `NAME.values` and `NAME.scales`; embeddings, norms and routers
stay in bfloat16. The file says by which recipe it was made, by which torch and on which kind of processor: another
one's is refused, not converted, since it can be made anew from the weights as published.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mistral_runtime.config import ModelConfig
from mistral_runtime.errors import MalformedCheckpoint, StaleWeights
from mistral_runtime.linear_rows import QuantizedLinear
from mistral_runtime.quantized import QuantizedWeight, stored_shapes
from mistral_runtime.recipe import DEFAULT_GROUPS, GROUPS, RECIPES, Recipe
from mistral_runtime.safetensors_header import BYTES_PER_VALUE, HINT, encode_header, load_header
from mistral_runtime.transformer import Transformer

_AGAIN = "quantise the published weights again"
ERRORS_NAME = "quality.relative_error"


def stored_tensors(config: ModelConfig, recipe: Recipe) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return (safetensors type, shape) of every tensor of the file, in its order."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    count = 0
    for name, shape in config.tensor_shapes().items():
        bits = recipe.bits_of(name, shape)
        if bits is None:
            tensors[name] = ("BF16", shape)
            continue
        values, scales = stored_shapes(shape[0], shape[1], bits=bits, group=group_of(recipe, bits))
        stem = name.removesuffix(".weight")
        tensors[f"{stem}.values"], tensors[f"{stem}.scales"] = ("U8", values), ("BF16", scales)
        count += 1
    tensors[ERRORS_NAME] = ("F32", (count,))
    return tensors


def group_of(recipe: Recipe, bits: int) -> int:
    """Return the group of matrices of so many bits: the recipe's own, or the usual one of its exceptions."""
    return recipe.group if bits == RECIPES[recipe.kind] else DEFAULT_GROUPS[bits]


def stored_bytes(config: ModelConfig, recipe: Recipe) -> int:
    """Return the size of all tensors of the file."""
    return sum(BYTES_PER_VALUE[dtype] * math.prod(shape) for dtype, shape in stored_tensors(config, recipe).values())


def build_header(config: ModelConfig, recipe: Recipe, *, source: str) -> bytes:
    """Return everything before the data. ``source`` is what the file says of the weights it was made from."""
    fields: dict[str, object] = {
        "__metadata__": {
            "format": "pt", "recipe": recipe.name, "kind": recipe.kind, "group": str(recipe.group), "key": recipe.key,
            "source": source,
        }
    }  # fmt: skip
    position = 0
    for name, (dtype, shape) in stored_tensors(config, recipe).items():
        end = position + BYTES_PER_VALUE[dtype] * math.prod(shape)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    return encode_header(fields)


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A validated file that has not been read yet."""

    path: Path
    recipe: Recipe
    weight_bytes: int
    read: Callable[[str], Tensor]


def open_quantized(path: Path, config: ModelConfig) -> QuantizedCheckpoint:
    """Validate the file against the configuration and this machine, from its header alone.

    Raises:
        MalformedCheckpoint: It is not what `quantize` writes for this configuration.
        StaleWeights: Another version, another torch or another kind of processor made it.
    """
    entries = load_header(path)
    try:
        handle: Any = safe_open(path, framework="pt")
        said = dict(handle.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _malformed(path, "a readable safetensors file", str(error)) from error
    recipe = _recipe_of(path, said)
    if said.get("key") != recipe.key or said.get("recipe") != recipe.name:
        raise StaleWeights(
            f"{path} was made for another runtime or another machine",
            detail=f"expected {recipe.key}, found {said.get('recipe')} as {said.get('key')}"[:300],
            hint=_AGAIN,
        )
    expected = stored_tensors(config, recipe)
    found = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    if found != expected:
        name = next(name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name))
        raise _malformed(path, f"{name} as {expected.get(name)}", f"{found.get(name)}")

    def read(name: str) -> Tensor:
        try:
            tensor: Tensor = handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _malformed(path, f"a readable tensor {name}", str(error)) from error
        return tensor

    return QuantizedCheckpoint(path, recipe, stored_bytes(config, recipe), read)


def _recipe_of(path: Path, said: dict[str, str]) -> Recipe:
    kind, group = said.get("kind", ""), said.get("group", "")
    if kind not in RECIPES or group not in map(str, GROUPS):
        raise _malformed(path, "a recipe of int8 or int4", f"{kind[:20]!r} in groups of {group[:20]!r}")
    return Recipe(kind, int(group))


def load_quantized(checkpoint: QuantizedCheckpoint, config: ModelConfig) -> Transformer:
    """Build the model on the CPU around the mapped file."""

    def tensors() -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        for name, shape in config.tensor_shapes().items():
            stem = name.removesuffix(".weight")
            if checkpoint.recipe.bits_of(name, shape) is None:
                yield name, checkpoint.read(name)
            else:
                values, scales = checkpoint.read(f"{stem}.values"), checkpoint.read(f"{stem}.scales")
                yield name, QuantizedWeight(values, scales, shape[0], shape[1])

    return build_quantized(config, tensors())


def build_quantized(config: ModelConfig, tensors: Iterable[tuple[str, Tensor | QuantizedWeight]]) -> Transformer:
    """Build the model on the CPU from each tensor by its name, quantised ones in place of their Linears."""
    with torch.device("meta"):
        model = Transformer(config)
    for name, tensor in tensors:
        parent, leaf = _parent_of(model, name)
        if isinstance(tensor, Tensor):
            setattr(parent, leaf, nn.Parameter(tensor, requires_grad=False))
            continue
        assert isinstance(parent, nn.Linear)
        holder, attribute = _parent_of(model, name.removesuffix(".weight"))
        holder.register_module(attribute, QuantizedLinear(tensor))
    return model.requires_grad_(False).eval()


def _parent_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    holder, _, attribute = name.rpartition(".")
    return model.get_submodule(holder), attribute


def _malformed(path: Path, expected: str, found: str) -> MalformedCheckpoint:
    return MalformedCheckpoint(
        f"{path} is not a file of quantised weights for this model",
        detail=f"expected {expected}, found {found}",
        hint=f"{_AGAIN}; {HINT}",
    )
