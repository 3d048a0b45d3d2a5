"""From weight files of any layout to a model: as published, quantised beforehand, or quantised while loading.

Owns the choice between them; each way is another module's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from mistral_runtime.config import ModelConfig
from mistral_runtime.device import Compute, choose_compute, dtype_name
from mistral_runtime.errors import BadRequest
from mistral_runtime.gpu.torchao_weights import quantize_on_device, require_kind
from mistral_runtime.linear_rows import use_row_kernels
from mistral_runtime.quantize import load_quantizing, report_progress
from mistral_runtime.quantized_file import QuantizedCheckpoint, load_quantized, open_quantized, stored_bytes
from mistral_runtime.recipe import RECIPES, Recipe
from mistral_runtime.snapshot import WeightFiles
from mistral_runtime.transformer import Transformer
from mistral_runtime.weights import Checkpoint, WeightTransform, load_model, open_checkpoint


@dataclass(frozen=True)
class Weights:
    """Validated weights that have not been read yet; ``recipe`` says how they are, or will be, quantised."""

    source: Checkpoint | QuantizedCheckpoint
    config: ModelConfig
    recipe: Recipe | None
    on_device: str | None = None  # the kind that torchao is to make of them after loading

    @property
    def dtype(self) -> torch.dtype:
        """The type the model computes in by default."""
        return torch.bfloat16 if self.recipe or self.on_device else self.published.dtype

    @property
    def published(self) -> Checkpoint:
        """The weights as published.

        Raises:
            BadRequest: There are only quantised ones.
        """
        if isinstance(self.source, Checkpoint):
            return self.source
        raise BadRequest(
            "quantised weights cannot be changed or spread",
            detail=f"expected weights as published, found {self.source.path.name}",
            hint="use the snapshot that they were made from",
        )

    def resident_bytes(self, compute: Compute) -> int:
        """Return what the model's tensors take once they are loaded."""
        if self.recipe is not None:
            return stored_bytes(self.config, self.recipe)
        return self.config.parameter_count() * compute.dtype.itemsize

    def savings(self, compute: Compute) -> dict[str, int]:
        """Return how many bytes each `--quantize` that is smaller than these weights would save."""
        if not isinstance(self.source, Checkpoint) or compute.device.type != "cpu":
            return {}
        taken = self.resident_bytes(compute)
        saved = {kind: taken - stored_bytes(self.config, Recipe.of(kind)) for kind in RECIPES}
        return {kind: count for kind, count in saved.items() if count > 0}

    def load(
        self,
        compute: Compute,
        *,
        transforms: Sequence[WeightTransform] = (),
        has_row_kernels: bool = True,
        report: Callable[[str], None] = lambda _text: None,
    ) -> Transformer:
        """Build the model.

        Args:
            compute: Where and in which type.
            transforms: What to change in the weights as published, in this order.
            has_row_kernels: Whether to use kernels that a compiler of steps cannot look into.
            report: Told how far quantising is, which takes about a minute for a 7B.

        Raises:
            CheckpointError: The files are damaged.
        """
        if isinstance(self.source, QuantizedCheckpoint):
            model = load_quantized(self.source, self.config)
        elif self.recipe is not None:
            progress = report_progress(f"quantising to {self.recipe.kind}", report)
            model = load_quantizing(self.source, self.config, self.recipe, transforms=transforms, progress=progress)
        else:
            model = load_model(
                self.source, self.config, device=compute.device, dtype=compute.dtype, transforms=transforms
            )
        if self.on_device is not None:
            report(f"weights: quantising to {self.on_device} on {compute.device}")
            quantize_on_device(model, self.on_device)
        if has_row_kernels:
            use_row_kernels(model)
        return model


def open_weights(files: WeightFiles, config: ModelConfig, *, quantize: str | None) -> Weights:
    """Validate the weight files from their headers.

    Args:
        files: The weight files.
        config: The model they are to make.
        quantize: "int8" or "int4" to have matrices of so many bits, "fp8" for a GPU, None to have them as they are.

    Raises:
        CheckpointError: One of its kinds, naming the file and the tensor.
        BadRequest: The weights are quantised, but not in the way that is wanted.
    """
    wanted = Recipe.of(quantize) if quantize in RECIPES else None
    if files.layout != "quantized":
        return Weights(open_checkpoint(files, config), config, wanted, quantize if wanted is None else None)
    source = open_quantized(files.paths[0], config)
    if quantize is not None and wanted != source.recipe:
        raise BadRequest(
            f"{files.paths[0]} is not {quantize}",
            detail=f"expected {wanted.name if wanted else quantize}, found {source.recipe.name}",
            hint="leave --quantize out, or use the snapshot that it was made from",
        )
    return Weights(source, config, source.recipe)


def choose_for(weights: Weights, *, device: str, dtype: str, threads: int | None) -> tuple[Weights, Compute]:
    """Choose where and in which type to compute these weights, and how they are quantised there.

    Raises:
        DeviceUnavailable: What was asked for is not here.
        BadRequest: Quantised weights were asked for where there are no kernels for them.
    """
    # A quantised file lies as this processor reads it: "auto" takes that, whatever else torch finds.
    is_for_cpu = device == "auto" and isinstance(weights.source, QuantizedCheckpoint)
    wanted = "cpu" if is_for_cpu else device
    compute = choose_compute(device=wanted, dtype=dtype, threads=threads, stored=weights.dtype)
    if is_for_cpu:
        compute = replace(compute, device_reason="which the weights were quantised for")
    weights = _for_device(weights, compute)
    quantized_as = weights.on_device or (weights.recipe and weights.recipe.kind)
    if quantized_as is None:
        return weights, compute
    if dtype == "auto":
        # Also where the processor does not multiply bfloat16: the kernels multiply integers.
        compute = replace(compute, dtype=torch.bfloat16, dtype_reason=f"between matrices of {quantized_as}")
    if (weights.on_device is None and compute.device.type != "cpu") or compute.dtype != torch.bfloat16:
        raise BadRequest(
            f"quantised weights are not computed in {dtype_name(compute.dtype)} on {compute.device}",
            detail="expected bfloat16" + (" on the cpu" if weights.on_device is None else ""),
            hint="add --device cpu, leave --dtype out, or use the weights as published",
        )
    return weights, compute


def _for_device(weights: Weights, compute: Compute) -> Weights:
    """Return them as they are to be quantised there: by torchao on CUDA, by recipes of our own elsewhere."""
    kind = weights.on_device
    if compute.device.type == "cuda" and weights.recipe and isinstance(weights.source, Checkpoint):
        kind = weights.recipe.kind
    if kind is None:
        return weights
    require_kind(kind, compute.device)
    return replace(weights, recipe=None, on_device=kind)
