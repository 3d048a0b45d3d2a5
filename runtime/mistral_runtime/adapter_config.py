"""How strongly a LoRA adapter is to be added, from the JSON file beside it.

Owns the keys of PEFT's `adapter_config.json` and of what mistral-finetune adds to `params.json`. As with a model's
configuration, a setting that may change the maths is refused rather than ignored. Knows nothing of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_runtime.errors import MalformedConfig, ShapeMismatch, UnexpectedTensor, UnknownConfigKey, UnsupportedModel
from mistral_runtime.strict_json import MAX_CONFIG_BYTES, load_object

# finetune/args.py and model/args.py of mistral-finetune: LoraArgs.scaling; lora.py of mistral-inference: load_lora.
FINETUNE_SCALE = 2.0
MAX_SCALE = 1000.0  # a sane factor is below 100; a slip of the decimal point is told and not computed
_MAX_ALPHA = 1e6

_HINT = "check the file against its publisher's copy, or give the scale with --lora-scale"
_PEFT_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "init_lora_weights", "bias"}
# Of training and bookkeeping, or of the choice which matrices to change, which the tensors' names tell.
_PEFT_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "megatron_config", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type", "loftq_config", "corda_config", "eva_config", "lora_ga_config",
}  # fmt: skip
# These leave the model as it was published; others (pissa, olora, loftq…) subtract from its weights before training.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", None)


@dataclass(frozen=True)
class AdapterScale:
    """The factor in W + scale · B · A, and who says so."""

    value: float
    reason: str


def finetune_scale(params: Path, *, rank: int) -> AdapterScale:
    """Return the scale of a mistral-finetune adapter from the `params.json` beside it, else the default.

    Raises:
        MalformedConfig: The file is there and damaged, or its `lora` is.
        ShapeMismatch: It tells another rank than the tensors have.
    """
    if not params.exists():
        return AdapterScale(FINETUNE_SCALE, "the default of mistral-finetune")
    lora = _load(params).get("lora")
    if lora is None:  # a model's own params.json
        return AdapterScale(FINETUNE_SCALE, "the default of mistral-finetune")
    if not isinstance(lora, dict):
        raise _bad_value(params, "lora", "an object", lora)
    _require_rank(lora.get("rank", rank), rank, params)
    return AdapterScale(_positive(lora.get("scaling", FINETUNE_SCALE), "lora.scaling", params), params.name)


def load_peft_config(path: Path, *, rank: int, names: Sequence[str]) -> AdapterScale:
    """Return the scale that PEFT's `adapter_config.json` comes to.

    Args:
        path: The file beside the adapter.
        rank: That of the tensors.
        names: The modules that the adapter changes, by Hugging Face's names.

    Raises:
        UnsupportedModel: Another method than plain LoRA.
        UnknownConfigKey: A setting that is on and not known here.
        MalformedConfig: A value missing or out of range.
        ShapeMismatch: It tells another rank than the tensors have.
        UnexpectedTensor: It and the tensors do not agree on which modules are changed.
    """
    config = _load(path)
    _require_plain_lora(config, path)
    _require_rank(config.get("r"), rank, path)
    _require_targets(config.get("target_modules"), names, path)
    alpha = _positive(config.get("lora_alpha"), "lora_alpha", path, at_most=_MAX_ALPHA)
    root = config.get("use_rslora") is True
    value = _positive(alpha / (math.sqrt(rank) if root else rank), "lora_alpha", path)
    return AdapterScale(value, f"lora_alpha / {'√r' if root else 'r'} of {path.name}")


def _load(path: Path) -> dict[str, Any]:
    return load_object(path, max_bytes=MAX_CONFIG_BYTES, error_class=MalformedConfig, hint=_HINT)


def _require_plain_lora(config: dict[str, Any], path: Path) -> None:
    plain = {"peft_type": ("LORA",), "bias": ("none", None), "init_lora_weights": _PLAIN_INITS}
    for key, accepted in plain.items():
        value = config.get(key)
        if not any(value == known and type(value) is type(known) for known in accepted):
            raise UnsupportedModel(
                f"{path} sets {key} to something this runtime does not compute",
                detail=f"expected {accepted[0]!r}, found {str(value)[:120]!r}",
                hint="merge the adapter into the model with PEFT, and run the result",
            )
    if not isinstance(config.get("use_rslora", False), (bool, type(None))):
        raise _bad_value(path, "use_rslora", "true or false", config["use_rslora"])
    # PEFT writes out every setting of its version; what is null, false or empty is off, known or not.
    on = sorted(key for key in set(config) - _PEFT_READ - _PEFT_IGNORED if config[key] not in (None, False, "", [], {}))
    if on:
        raise UnknownConfigKey(
            f"{path} turns on {', '.join(on[:5])}",
            detail=f"expected plain LoRA, found {len(on)} settings that may change what the model computes",
            hint="merge the adapter into the model with PEFT, and run the result",
        )


def _require_rank(told: Any, rank: int, path: Path) -> None:
    if type(told) is not int or told != rank:
        raise ShapeMismatch(
            f"{path} tells another rank than the adapter has",
            detail=f"expected {rank} as in the tensors, found {str(told)[:40]}",
            hint="the two files do not belong together; fetch the adapter again",
        )


def _require_targets(told: Any, names: Sequence[str], path: Path) -> None:
    """Hold a list of modules against the tensors, both ways; a text is a pattern, and the tensors' names decide."""
    if not isinstance(told, list):
        return

    def hits(name: str, module: object) -> bool:
        return isinstance(module, str) and f".{name}".endswith(f".{module}")

    unused = [module for module in told if not any(hits(name, module) for name in names)]
    unasked = [name for name in names if not any(hits(name, module) for module in told)]
    if unused or unasked:
        found = f"no tensor for {str(unused[0])[:80]!r}" if unused else f"tensors for {unasked[0]} as well"
        raise UnexpectedTensor(
            f"{path} and the adapter name different modules",
            detail=f"expected tensors for target_modules alone, found {found}",
            hint="the two files do not belong together, or the adapter is of another model",
        )


def _positive(value: Any, key: str, path: Path, *, at_most: float = MAX_SCALE) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= at_most:
        raise _bad_value(path, key, f"a number above 0 and up to {at_most:g}", value)
    return float(value)


def _bad_value(path: Path, key: str, expected: str, found: object) -> MalformedConfig:
    return MalformedConfig(
        f"{path} has a bad value for {key}", detail=f"expected {expected}, found {str(found)[:120]}", hint=_HINT
    )
