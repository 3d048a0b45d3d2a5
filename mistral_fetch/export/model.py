"""A complete model of the cache as what is to be laid out elsewhere: files with their blobs, and what is known."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_fetch.errors import UsageError
from mistral_fetch.manifest import ModelInfo
from mistral_fetch.publish.model import model_of_snapshot
from mistral_fetch.store.derived import find_derived
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.snapshots import load_manifest, load_provenance
from mistral_fetch.transfer.convert import SAFETENSORS
from mistral_fetch.transfer.local import LocalModel

_PICKLE = re.compile(r"consolidated\.[0-9]{2}\.pth")
_MAX_LICENCE_BYTES = 1 << 20
_LICENCE = "LICENSE"


@dataclass(frozen=True)
class ModelFile:
    """A file of a model; ``location`` is the blob, or a file of the cache's own that was made from one."""

    path: str
    size: int
    sha256: str
    location: Path


@dataclass(frozen=True)
class Model:
    """What an export is made of. ``licence`` is where the licence's text lies, if the model brings none."""

    key: str
    channel: str
    name: str
    info: ModelInfo
    files: tuple[ModelFile, ...]
    papers: Mapping[str, Any]
    content_digest: str
    licence: Path | None

    @property
    def paths(self) -> set[str]:
        """Return the paths of the model's files."""
        return {file.path for file in self.files}

    def licence_text(self) -> str:
        """Return the licence's text, or '' where there is none that is plain text."""
        own = next((file.location for file in self.files if file.path == _LICENCE), self.licence)
        if own is None or own.stat().st_size > _MAX_LICENCE_BYTES:
            return ""
        try:
            return own.read_text("utf-8")
        except UnicodeDecodeError:
            return ""


def load_model(layout: Layout, local: LocalModel, *, prefers_converted: bool = False) -> Model:
    """Return a complete model of the cache.

    Args:
        layout: The cache.
        local: The model.
        prefers_converted: Take the safetensors copy of a pickle, where one was made.

    Raises:
        StoreError, IntegrityError, PublishError: It is damaged.
    """
    content_digest = local.record.content_digest
    converted = find_derived(layout, SAFETENSORS.key, content_digest) if prefers_converted else None
    directory = converted or local.directory
    manifest, papers = load_manifest(directory), load_provenance(local.directory)
    told = model_of_snapshot(directory, layout.blobs, manifest, papers)
    sha256 = {entry.path: entry.sha256 or "" for entry in manifest.files}
    files = tuple(ModelFile(f.path, f.size, sha256[f.path], f.location) for f in told.files or ())
    licence = directory / _LICENCE
    own = licence if licence.is_file() and _LICENCE not in sha256 else None
    record = local.record
    return Model(record.key, record.channel, told.name, told.info, files, papers, content_digest, own)


def require_hugging_face_layout(model: Model, program: str) -> None:
    """Refuse a model whose files are not named as Hugging Face's programs look for them.

    Raises:
        UsageError: With what is missing.
    """
    missing = [] if "config.json" in model.paths else ["config.json"]
    missing += [] if any(map(_is_hub_weights, model.paths)) else ["weights as model*.safetensors"]
    has_tokenizer = model.paths & {"tokenizer.json", "tokenizer.model"}
    missing += [] if has_tokenizer else ["tokenizer.json or tokenizer.model"]
    if missing:
        own = "params.json" in model.paths or any(path.startswith("consolidated") for path in model.paths)
        found = "Mistral's own layout" if own else "another layout"
        raise UsageError(
            f"{program} cannot load {model.key} as it is",
            detail=f"expected {', '.join(missing)}, got {found}: {', '.join(sorted(model.paths))[:200]}",
            hint="pull the same release from a hub (--via http; mistral-fetch show lists channels), and export that",
        )


def require_mistral_layout(model: Model, program: str) -> None:
    """Refuse a model in Mistral's own layout that a program cannot read as it is.

    Raises:
        UsageError: With what is missing.
    """
    pickles = [path for path in model.paths if _PICKLE.fullmatch(path)]
    if pickles:
        raise UsageError(
            f"{program} does not read {pickles[0]}",
            detail="expected consolidated.safetensors, got a pickle",
            hint=f"make the safe copy first, it is found then: mistral-fetch pull {model.key} --convert safetensors",
        )
    has_weights = any(p.startswith("consolidated") and p.endswith(".safetensors") for p in model.paths)
    missing = [] if has_weights else ["consolidated.safetensors"]
    missing += [] if "params.json" in model.paths else ["params.json"]
    missing += [] if any(p.startswith(("tokenizer.model", "tekken.json")) for p in model.paths) else ["tokenizer.model"]
    if missing:
        raise UsageError(
            f"{program} cannot read {model.key}",
            detail=f"expected {', '.join(missing)}, got {', '.join(sorted(model.paths))[:200]}",
            hint="export a complete model: mistral-fetch list --catalog",
        )


def is_hugging_face_layout(model: Model) -> bool:
    """Return whether the weights are named as Hugging Face's programs look for them."""
    return "config.json" in model.paths and any(map(_is_hub_weights, model.paths))


def _is_hub_weights(path: str) -> bool:
    return path.startswith("model") and path.endswith(".safetensors")
