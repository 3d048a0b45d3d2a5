"""`--quantize` on CUDA: weights of 8 or 4 bits by torchao's `quantize_`, activations as they are.

Owns which matrices become what, and what a GPU must be able to do. The products are torchao's. The CPU has kernels and
recipes of its own (`quantize.py`), which make other numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mistral_runtime.errors import BadRequest, DeviceUnavailable, MissingDependency

KINDS = ("int8", "int4", "fp8")
# CUDA's compute capability: the products of packed 4 bits need Ampere, those of 8-bit floats Ada.
LEAST_CAPABILITY = {"int8": (7, 5), "int4": (8, 0), "fp8": (8, 9)}
INT4_GROUP = 128


def require_kind(kind: str, device: torch.device) -> None:
    """Check that weights can be quantised so on this device, before any is loaded.

    Raises:
        BadRequest: The device is no CUDA device.
        DeviceUnavailable: The GPU is too old.
        MissingDependency: torchao is not installed, or lacks what is needed.
    """
    if device.type != "cuda":
        raise BadRequest(
            f"--quantize {kind} is not computed on {device}",
            detail=f"expected int8 or int4 with --device cpu, or a CUDA device, found {kind} on {device}",
            hint="take --quantize int8" + ("" if device.type == "cpu" else " with --device cpu"),
        )
    found, least = torch.cuda.get_device_capability(device), LEAST_CAPABILITY[kind]
    if found < least:
        raise DeviceUnavailable(
            f"this GPU is too old for --quantize {kind}",
            detail=f"expected compute capability {_dotted(least)} or later, found {_dotted(found)}",
            hint="take another --quantize: " + _fitting(found),
        )
    _torchao()


def quantize_on_device(model: nn.Module, kind: str) -> None:
    """Replace the weights of every matrix but the embeddings and the routers of experts; they must be in bfloat16.

    The projection to the vocabulary decides every token: it never takes fewer than eight bits.
    """
    torchao = _torchao()
    for wanted in {kind, _kind_of("output", kind)}:

        def is_wanted(module: nn.Module, name: str, wanted: str | None = wanted) -> bool:
            return isinstance(module, nn.Linear) and _kind_of(name, kind) == wanted

        torchao.quantize_(model, _config(torchao, wanted), filter_fn=is_wanted)


def _config(torchao: Any, kind: str | None) -> Any:
    if kind == "int8":
        return torchao.Int8WeightOnlyConfig(set_inductor_config=False)
    if kind == "fp8":
        return torchao.Float8WeightOnlyConfig(set_inductor_config=False)
    # The layout whose products come with torch; torchao's own default needs one more library.
    return torchao.Int4WeightOnlyConfig(
        group_size=INT4_GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )


def _kind_of(name: str, kind: str) -> str | None:
    if name.endswith(".gate"):
        return None
    return "int8" if name == "output" and kind == "int4" else kind


def _torchao() -> Any:
    try:
        from torchao import quantization as module
    except ImportError as error:
        raise _missing(f"found none ({type(error).__name__})") from error
    needed = ("quantize_", "Int8WeightOnlyConfig", "Int4WeightOnlyConfig", "Float8WeightOnlyConfig")
    if lacking := [name for name in needed if not hasattr(module, name)]:
        raise _missing(f"found one without {', '.join(lacking)}")
    return module


def _missing(found: str) -> MissingDependency:
    return MissingDependency(
        "the library torchao, which quantises on a GPU, cannot be used",
        detail=f"expected torchao 0.18 or later, {found}",
        hint='install it: pip install "mistral-fetch[runtime,gpu]"',
    )


def _fitting(capability: tuple[int, int]) -> str:
    fitting = [kind for kind in KINDS if LEAST_CAPABILITY[kind] <= capability]
    return ", ".join(fitting) or "none fits; leave it out, or add --device cpu"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
