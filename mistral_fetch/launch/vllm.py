"""Handing a verified snapshot to an installed vLLM: the arguments that make it compute the same model.

Owns what vLLM has to be told because a directory does not say it, or says it where vLLM does not look. It fetches
nothing and never falls back: what vLLM cannot read is refused here, by name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mistral_fetch.errors import RuntimeFailed, RuntimeMissing, UsageError
from mistral_fetch.launch.process import runtime_environment
from mistral_fetch.strict_json import UnexpectedJson, decode

MAX_CONFIG_BYTES = 1 << 20
MAX_KEY_BYTES = 4096
# Mistral's params.json is silent about theta: v0.1, which has a window, was trained with the first.
_THETA_WITH_WINDOW = 1e4
_THETA_WITHOUT_WINDOW = 1e6
_HF_THETA = {"mistral": 1e4, "mixtral": 1e6}
_HF_WINDOW = {"mistral": 4096, "mixtral": None}
_VERSIONED_TOKENIZERS = ("tokenizer.model.v1", "tokenizer.model.v2", "tokenizer.model.v3", "tekken.json")


@dataclass(frozen=True)
class VllmOptions:
    """What the command line asked for."""

    host: str
    port: int
    model_names: tuple[str, ...]
    api_key_file: Path | None = None
    context: int | None = None
    dtype: str | None = None
    ranks: int | None = None
    more: tuple[str, ...] = ()


def find_vllm() -> str:
    """Return the installed ``vllm``.

    Raises:
        RuntimeMissing: There is none on the PATH.
    """
    found = shutil.which("vllm")
    if found is None:
        raise RuntimeMissing(
            "vLLM is not installed",
            detail="expected a program called vllm on the PATH, got none",
            hint="install it as https://docs.vllm.ai says, or leave --engine out for the built-in engine",
        )
    return found


def vllm_arguments(directory: Path, options: VllmOptions) -> list[str]:
    """Return what to start vLLM with, from ``serve`` on.

    Raises:
        UsageError: The directory is in a layout that vLLM does not read.
        RuntimeFailed: Its configuration cannot be understood.
    """
    arguments = ["serve", str(directory), f"--host={options.host}", f"--port={options.port}"]
    if options.model_names:
        arguments += ["--served-model-name", *options.model_names]
    arguments += [*_layout_arguments(directory), f"--hf-overrides={json.dumps(_overrides(directory))}"]
    for flag, value in (
        ("--max-model-len", options.context),
        ("--dtype", options.dtype),
        ("--tensor-parallel-size", options.ranks),
    ):
        arguments += [] if value is None else [f"{flag}={value}"]
    return [*arguments, *options.more]


def exec_vllm(program: str, arguments: Sequence[str], key: str | None) -> NoReturn:
    """Become vLLM. The key goes through its environment, where other users of the machine do not see it.

    Raises:
        RuntimeFailed: It cannot be started.
    """
    environment = runtime_environment(os.environ)
    if key is not None:
        environment["VLLM_API_KEY"] = key
    try:
        os.execve(program, [program, *arguments], environment)  # noqa: S606 - no shell, and it is ours to become
    except OSError as error:
        raise RuntimeFailed(
            f"vLLM could not be started with {program}",
            detail=f"expected a program that runs, got: {error}",
            hint="type: vllm --version",
        ) from error


def read_key(path: Path) -> str:
    """Return the one key of a file that nobody else can read.

    Raises:
        UsageError: Others can read it, or it does not hold exactly one key.
    """
    try:
        mode = path.stat().st_mode & 0o777
        lines = path.read_bytes()[:MAX_KEY_BYTES].decode("ascii", "replace").splitlines()
    except OSError as error:
        raise _bad_keys(path, f"expected a file, got: {error.strerror}") from error
    if mode & 0o077:
        raise UsageError(
            f"the key file {path} can be read by others",
            detail=f"expected mode 600 or stricter, got {mode:o}",
            hint=f"type: chmod 600 {path}",
        )
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if len(keys) != 1 or not keys[0].isprintable():
        raise _bad_keys(path, f"expected exactly one key, as vLLM takes no more, got {len(keys)}")
    return keys[0]


def _bad_keys(path: Path, detail: str) -> UsageError:
    return UsageError(f"the key file {path} cannot be used", detail=detail, hint="write one key into it, on one line")


def _layout_arguments(directory: Path) -> list[str]:
    has_version = any((directory / name).exists() for name in _VERSIONED_TOKENIZERS)
    tokenizer = f"--tokenizer-mode={'mistral' if has_version else 'auto'}"
    if (directory / "consolidated.safetensors").exists() and (directory / "params.json").exists():
        return [tokenizer, "--config-format=mistral", "--load-format=mistral"]
    if (directory / "config.json").exists() and any(directory.glob("model*.safetensors")):
        return [tokenizer, "--config-format=hf", "--load-format=safetensors"]
    raise UsageError(
        f"vLLM does not read the weights in {directory}",
        detail="expected consolidated.safetensors and params.json, or model*.safetensors and config.json, got neither",
        hint="type: mistral-fetch pull REF --convert safetensors, then serve the directory it prints",
    )


def _overrides(directory: Path) -> dict[str, Any]:
    """Return theta and window, written out: defaults differ from reader to reader, and a wrong one is not noticed."""
    path = directory / "params.json"
    if not ((directory / "consolidated.safetensors").exists() and path.exists()):
        return _hf_overrides(directory / "config.json")
    params = _read(path)
    window = params.get("sliding_window")
    theta = params.get("rope_theta") or (_THETA_WITHOUT_WINDOW if window is None else _THETA_WITH_WINDOW)
    return _checked(path, theta, window)


def _hf_overrides(path: Path) -> dict[str, Any]:
    config = _read(path)
    kind = config.get("model_type")
    if kind not in _HF_THETA:
        raise _malformed(path, f"expected model_type mistral or mixtral, got {str(kind)[:60]!r}")
    nested = config.get("rope_parameters")
    theta = config.get("rope_theta") or (nested.get("rope_theta") if isinstance(nested, dict) else None)
    return _checked(path, theta or _HF_THETA[kind], config.get("sliding_window", _HF_WINDOW[kind]))


def _checked(path: Path, theta: Any, window: Any) -> dict[str, Any]:
    if type(theta) not in (int, float) or not 0 < theta <= 1e12:
        raise _malformed(path, f"expected a positive rope_theta, got {str(theta)[:60]!r}")
    if window is not None and (type(window) is not int or not 0 < window <= 1 << 24):
        raise _malformed(path, f"expected a positive sliding_window or null, got {str(window)[:60]!r}")
    return {"rope_theta": float(theta), "sliding_window": window}


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            found = decode(stream.read(MAX_CONFIG_BYTES + 1), MAX_CONFIG_BYTES)
    except (OSError, UnexpectedJson) as error:
        raise _malformed(path, f"expected a JSON object, got: {error}") from error
    if not isinstance(found, dict):
        raise _malformed(path, "expected a JSON object, got something else")
    return found


def _malformed(path: Path, detail: str) -> RuntimeFailed:
    return RuntimeFailed(f"{path} cannot be used", detail=detail, hint="verify the model: mistral-fetch verify")
