"""From weights as published to `quantized.safetensors`, one matrix at a time: memory does not grow with the model.

Owns the order of work, the progress that people see and the result's fields. The arithmetic is `quantized.py`'s, the
file that of `quantized_file.py` and `file_writer.py`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral_runtime.config import ModelConfig
from mistral_runtime.convert import explain_write_error, require_room
from mistral_runtime.errors import BadRequest
from mistral_runtime.file_writer import new_file
from mistral_runtime.kernels.tiles import TILE
from mistral_runtime.machine import peak_resident_bytes
from mistral_runtime.quantized import QuantizedWeight, dequantize, quantize
from mistral_runtime.quantized_file import build_header, build_quantized, group_of, stored_bytes
from mistral_runtime.recipe import Recipe, check_group
from mistral_runtime.snapshot import QUANTIZED_NAME, find_weights, load_config
from mistral_runtime.tensor_bytes import flat_bytes
from mistral_runtime.transformer import Transformer
from mistral_runtime.weights import (
    PERMUTED_NAMES,
    Checkpoint,
    WeightTransform,
    open_checkpoint,
    release_file_pages,
    to_interleaved,
)

Progress = Callable[[int, int], None]
"""Told how many of the model's weights are done, and of how many."""


@dataclass(frozen=True)
class Quantized:
    """The file that was written, and what it took."""

    path: Path
    size: int
    sha256: str
    recipe: Recipe
    tensors: int
    relative_error: float
    seconds: float

    def fields(self) -> dict[str, Any]:
        """Return what `--json` prints; documented in docs/runtime.md."""
        return {
            "file": self.path.name,
            "size": self.size,
            "sha256": self.sha256,
            "recipe": self.recipe.name,
            "key": self.recipe.key,
            "tensors": self.tensors,
            "quality": {"relative_error": round(self.relative_error, 6)},
            "seconds": round(self.seconds, 6),
            "peak_rss_bytes": peak_resident_bytes(),
        }


def quantize_snapshot(
    snapshot: Path, out: Path, recipe: Recipe, *, reserve_bytes: int, progress: Progress
) -> Quantized:
    """Write the quantised copy of a snapshot's weights into the directory `out`, which must exist.

    Raises:
        BadRequest: The result is there already, the weights are quantised, or the group size is not supported.
        CheckpointError: The weights are damaged, hostile, not finite or not those of the configuration.
        DiskFull: There is no room for the result.
        WriteFailed: The disk refused.
    """
    started = time.perf_counter()
    check_group(recipe.group)
    files = find_weights(snapshot)
    if files.layout == "quantized":
        raise BadRequest(
            f"{snapshot} is quantised already",
            detail=f"expected weights as published, found {QUANTIZED_NAME}",
            hint="name the snapshot that it was made from",
        )
    config = load_config(snapshot, files.layout)
    checkpoint = open_checkpoint(files, config)
    target = out / QUANTIZED_NAME
    if target.exists():
        raise BadRequest(f"{target} is there already", detail="expected no such file", hint="name another directory")
    header = build_header(config, recipe, source=json.dumps([path.name for path in files.paths]))
    size = len(header) + stored_bytes(config, recipe)
    errors: list[float] = []
    try:
        require_room(out, size, reserve_bytes)
        with new_file(target) as writer:
            writer.write(memoryview(header))
            for tensor in _tensors(checkpoint, config, recipe, errors, progress):
                writer.write(flat_bytes(tensor).numpy().data)
            sha256 = writer.finish()
    except OSError as error:
        raise explain_write_error(error, target) from error
    mean = sum(errors) / max(1, len(errors))
    return Quantized(target, size, sha256, recipe, len(errors), mean, time.perf_counter() - started)


def _tensors(
    checkpoint: Checkpoint, config: ModelConfig, recipe: Recipe, errors: list[float], progress: Progress
) -> Iterator[Tensor]:
    """Give the file's tensors in order; the errors of the matrices come last."""
    for _, weight, made in _quantize_each(read_weights(checkpoint, config), config, recipe, progress):
        if isinstance(made, QuantizedWeight):
            errors.append(relative_error(weight, made))
            yield made.values
            yield made.scales
        else:
            yield made
    yield torch.tensor(errors, dtype=torch.float32)


def _quantize_each(
    weights: Iterator[tuple[str, Tensor]], config: ModelConfig, recipe: Recipe, progress: Progress
) -> Iterator[tuple[str, Tensor, Tensor | QuantizedWeight]]:
    """Give every tensor's name, its published value, and what the recipe makes of it."""
    done, total = 0, config.parameter_count()
    for name, weight in weights:
        bits = recipe.bits_of(name, tuple(weight.shape))
        if bits is None:
            yield name, weight, weight.to(torch.bfloat16)
        else:
            yield name, weight, quantize(weight, bits=bits, group=group_of(recipe, bits), name=name)
        done += weight.numel()
        progress(done, total)


def read_weights(
    checkpoint: Checkpoint, config: ModelConfig, transforms: Sequence[WeightTransform] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Give every tensor in Mistral's order of rows, after `transforms`.

    Its file pages are given back when the next one is asked for.
    """
    for name in config.tensor_shapes():
        mapped = tensor = checkpoint.read(checkpoint.tensors[name])
        if checkpoint.files.layout == "huggingface" and name.endswith(PERMUTED_NAMES):
            tensor = to_interleaved(mapped, config.head_dim)
        for transform in transforms:
            tensor = transform(name, tensor)
        yield name, tensor
        release_file_pages(mapped)


def load_quantizing(
    checkpoint: Checkpoint,
    config: ModelConfig,
    recipe: Recipe,
    *,
    transforms: Sequence[WeightTransform] = (),
    progress: Progress,
) -> Transformer:
    """Build the model that the quantised file would make, one matrix at a time: no second model is ever in memory.

    Raises:
        BadRequest: The group size is not supported.
        NonFiniteWeights: A weight is not a number.
    """
    weights = read_weights(checkpoint, config, transforms)
    each = _quantize_each(weights, config, recipe, progress)
    return build_quantized(config, ((name, made) for name, _, made in each))


def relative_error(weight: Tensor, quantized: QuantizedWeight) -> float:
    """Return the root mean square of what changed, over that of the weights; of some tiles of a large matrix."""
    step = max(1, quantized.values.shape[0] // 16)
    differences, sizes = [], []
    for tile in range(0, quantized.values.shape[0], step):
        kept = weight[tile * TILE : (tile + 1) * TILE].float()
        restored = dequantize(quantized, tile, 1)[: kept.shape[0], : kept.shape[1]].float()
        differences.append((restored - kept).square().sum())
        sizes.append(kept.square().sum())
    size = float(torch.stack(sizes).sum())
    return (float(torch.stack(differences).sum()) / size) ** 0.5 if size else 0.0


def show_progress(what: str) -> Progress:
    """Return a progress bar on a terminal, or one line every tenth elsewhere, both on stderr."""

    def show(done: int, total: int) -> None:
        percent = 100 * done // total
        bar = "#" * (percent * 30 // 100)
        sys.stderr.write(f"\r{what} [{bar:<30}] {percent:3d} %" + ("\n" if done == total else ""))
        sys.stderr.flush()

    return show if sys.stderr.isatty() else report_progress(what, lambda line: print(line, file=sys.stderr, flush=True))


def report_progress(what: str, report: Callable[[str], None]) -> Progress:
    """Return what reports one line every tenth."""
    shown = 0

    def show(done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // total
        if percent // 10 > shown:
            shown = percent // 10
            report(f"{what}: {percent} %")

    return show
