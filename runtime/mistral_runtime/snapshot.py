"""Which files of a snapshot directory are read, and in which order of preference.

Owns the directory contract (documented in docs/runtime.md); opens nothing but small JSON files. Links are
followed: a snapshot is a folder of links into a store.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_runtime.config import ModelConfig, load_config_json, load_params_json
from mistral_runtime.errors import MalformedCheckpoint, MalformedConfig, MissingFile, MissingShard, UnsupportedModel
from mistral_runtime.strict_json import MAX_CONFIG_BYTES, MAX_INDEX_BYTES, load_object

INDEX_NAME = "model.safetensors.index.json"
_FETCH_AGAIN = "fetch the whole model again, or name the directory that holds it"
# v2 and later put the version into the file's name; the plain name comes last because it hides the version.
TOKENIZER_NAMES = ("tokenizer.model.v3", "tokenizer.model.v2", "tokenizer.model.v1", "tokenizer.model")


@dataclass(frozen=True)
class WeightFiles:
    """The weight files that were chosen.

    `layout` is "quantized", "consolidated.safetensors", "huggingface" or "consolidated.pth". `index` maps a tensor to
    its shard where there is an index. `passed_over` names weight files that are there but not used.
    """

    layout: str
    paths: tuple[Path, ...]
    index: dict[str, str] | None = None
    passed_over: tuple[str, ...] = ()


def find_weights(directory: Path) -> WeightFiles:
    """Choose among the layouts: quantised before published, safetensors before pickle, Mistral's own names first.

    0. `quantized.safetensors`, which `quantize` made
    1. `consolidated.safetensors`  2. `model.safetensors.index.json` and its shards  3. `model.safetensors`
    4. `consolidated.00.pth`

    Raises:
        MissingFile: No directory, or none of these in it.
        MissingShard: The index names a file that is not there.
        UnsupportedModel: The weights are split for several devices.
    """
    if not directory.is_dir():
        raise MissingFile(f"no snapshot at {directory}", detail="expected a directory", hint=_FETCH_AGAIN)
    found = [name for name in _CANDIDATES if (directory / name).exists()]
    if not found:
        raise MissingFile(
            f"no weights in {directory}", detail=f"expected one of {', '.join(_CANDIDATES)}", hint=_FETCH_AGAIN
        )
    name, passed_over = found[0], tuple(found[1:])
    if name == INDEX_NAME:
        index = load_index(directory / name)
        shards = tuple(directory / shard for shard in sorted(set(index.values())))
        return WeightFiles("huggingface", shards, index, passed_over)
    if name == "consolidated.00.pth" and (directory / "consolidated.01.pth").exists():
        raise UnsupportedModel(
            f"{directory} holds weights split over several files",
            detail="expected consolidated.00.pth alone, found consolidated.01.pth as well",
            hint="this runtime reads models published in one part, such as Mistral 7B",
        )
    return WeightFiles(_LAYOUT_OF[name], (directory / name,), None, passed_over)


QUANTIZED_NAME = "quantized.safetensors"
_LAYOUT_OF = {
    QUANTIZED_NAME: "quantized",
    "consolidated.safetensors": "consolidated.safetensors",
    INDEX_NAME: "huggingface",
    "model.safetensors": "huggingface",
    "consolidated.00.pth": "consolidated.pth",
}
_CANDIDATES = tuple(_LAYOUT_OF)


def load_index(path: Path) -> dict[str, str]:
    """Return the map from tensor to shard in `model.safetensors.index.json`.

    Raises:
        MalformedCheckpoint: Not an index, or a shard's name could lead out of the directory.
        MissingShard: A shard is not there.
    """
    hint = "the index is damaged or hostile; fetch the model again"
    index = load_object(path, max_bytes=MAX_INDEX_BYTES, error_class=MalformedCheckpoint, hint=hint)
    weight_map: Any = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MalformedCheckpoint(
            f"{path} is not an index", detail="expected a map called weight_map, found none", hint=hint
        )
    for shard in dict.fromkeys(str(value) for value in weight_map.values()):
        _require_plain_shard(path, shard, hint)
    return {str(name): str(shard) for name, shard in weight_map.items()}


def _require_plain_shard(index: Path, shard: str, hint: str) -> None:
    if "/" in shard or "\\" in shard or "\0" in shard or not shard.endswith(".safetensors"):
        raise MalformedCheckpoint(
            f"{index} names an unsafe shard",
            detail=f"expected a .safetensors file in the same directory, found {shard[:120]!r}",
            hint=hint,
        )
    if not (index.parent / shard).is_file():
        raise MissingShard(
            f"{index.parent / shard} is missing",
            detail=f"expected every shard named in {index.name}",
            hint=_FETCH_AGAIN,
        )


def load_config(directory: Path, layout: str) -> ModelConfig:
    """Read the configuration that belongs to the layout, or the other one where only that is there.

    Raises:
        MissingFile: Neither `params.json` nor `config.json`.
    """
    loaders = {"params.json": load_params_json, "config.json": load_config_json}
    names = ("config.json", "params.json") if layout == "huggingface" else ("params.json", "config.json")
    for name in names:
        if (directory / name).exists():
            return loaders[name](directory / name)
    raise MissingFile(
        f"no configuration in {directory}", detail="expected params.json or config.json", hint=_FETCH_AGAIN
    )


def find_tokenizer(directory: Path) -> Path:
    """Return the sentencepiece file.

    Raises:
        MissingFile: None of the known names.
        UnsupportedModel: Only a `tekken.json`, another kind of tokenizer.
    """
    for name in TOKENIZER_NAMES:
        if (directory / name).is_file():
            return directory / name
    if (directory / "tekken.json").exists():
        raise UnsupportedModel(
            f"{directory} has a tekken tokenizer",
            detail="expected a sentencepiece file such as tokenizer.model, found tekken.json",
            hint="this runtime reads sentencepiece models, such as every Mistral 7B",
        )
    raise MissingFile(
        f"no tokenizer in {directory}", detail=f"expected one of {', '.join(TOKENIZER_NAMES)}", hint=_FETCH_AGAIN
    )


def declared_chat_template(directory: Path) -> tuple[bool, str | None]:
    """Return (whether the directory says, what it says) about the chat template.

    `PROVENANCE.json`, written by whoever fetched the snapshot, decides where it has the key `chat_template`: null
    means a base model. Otherwise a `chat_template` in `tokenizer_config.json` shows an instruct model whose
    version the tokenizer tells, reported as "auto".
    """
    provenance = _small_object(directory / "PROVENANCE.json")
    if "chat_template" in provenance:
        template = provenance["chat_template"]
        return True, template if isinstance(template, str) else None
    return (True, "auto") if _small_object(directory / "tokenizer_config.json").get("chat_template") else (False, None)


def declared_licence(directory: Path) -> str | None:
    """Return the licence that `PROVENANCE.json` names, for people to read."""
    licence = _small_object(directory / "PROVENANCE.json").get("licence")
    return licence if isinstance(licence, str) else None


def _small_object(path: Path) -> dict[str, Any]:
    """Return an optional JSON object; absence is normal, damage is not."""
    if not path.is_file():
        return {}
    # tokenizer_config.json of v0.3 is 137 KB: it lists every control token.
    return load_object(
        path, max_bytes=4 * MAX_CONFIG_BYTES, error_class=MalformedConfig, hint="fetch the file again, or remove it"
    )
