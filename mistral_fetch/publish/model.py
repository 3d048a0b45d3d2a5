"""What is to be published or served: its files, where they lie, and what is known of the model. Values and paths.

Two kinds: a directory of a person's own, and a complete model of a cache, whose files are links into its blobs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mistral_fetch.errors import PublishError
from mistral_fetch.manifest import Manifest, ModelInfo
from mistral_fetch.publish.hashing import SourceFile

_MAX_VERSION_IN_NAME = 20
_FROM_PAPERS = ("name", "version", "licence", "credit", "source_url", "weight_format")


@dataclass(frozen=True)
class ModelFiles:
    """A model on this disk.

    ``content_digest`` (hexadecimal) is known for a cache's model alone: nobody has read a person's directory yet.
    ``files`` is None for a directory, which is walked when it is published.
    """

    name: str
    directory: Path
    info: ModelInfo
    files: tuple[SourceFile, ...] | None = None
    content_digest: str = ""


def model_of_directory(directory: Path) -> ModelFiles:
    """Return a directory of a person's own as a model; nothing is known of it but its name."""
    name = directory.resolve().name
    return ModelFiles(name, directory, ModelInfo(name=name))


def model_of_snapshot(directory: Path, blobs: Path, manifest: Manifest, papers: Mapping[str, Any]) -> ModelFiles:
    """Return a complete model of a cache; the cache's own papers beside the files are no part of it.

    Args:
        directory: The snapshot.
        blobs: The directory of that cache's blobs, where its links may lead.
        manifest: The snapshot's own.
        papers: What ``PROVENANCE.json`` says; it wins where the manifest knows less.

    Raises:
        PublishError: A file is missing, has another size, or is a link to anywhere else.
    """
    info = _info(manifest.info, papers)
    files = tuple(_linked_file(directory, blobs, entry.path, entry.size) for entry in manifest.files)
    return ModelFiles(publication_name(info), directory, info, files, manifest.content_digest().value)


def publication_name(info: ModelInfo) -> str:
    """Return a file name for a model: ``mistral-7b-v0.1``; a commit is no version that people would type."""
    name = info.name.rpartition("/")[2]
    if info.version and len(info.version) <= _MAX_VERSION_IN_NAME and info.version not in name:
        name = f"{name}-{info.version}"
    return re.sub(r"[^A-Za-z0-9._+@-]+", "-", name).strip("-. ")[:120] or "model"


def _info(known: ModelInfo, papers: Mapping[str, Any]) -> ModelInfo:
    told = {field: str(papers[field]) for field in _FROM_PAPERS if isinstance(papers.get(field), str)}
    merged = replace(known, **{field: text for field, text in told.items() if text})
    if known.chat_template or "chat_template" not in papers:
        return merged
    return replace(merged, chat_template=str(papers["chat_template"] or "none"))


def _linked_file(directory: Path, blobs: Path, path: str, size: int | None) -> SourceFile:
    location = directory / path
    try:
        target = location.resolve(strict=True)
        actual = target.stat().st_size
    except (OSError, RuntimeError) as error:
        raise _damaged(path, str(getattr(error, "strerror", None) or error)) from error
    if not target.is_relative_to(blobs.resolve()) and target != directory.resolve() / path:
        raise _damaged(path, f"a link out of the cache, to {target}")
    if actual != size:
        raise _damaged(path, f"{actual} bytes instead of {size}")
    return SourceFile(path, actual, target)


def _damaged(path: str, got: str) -> PublishError:
    return PublishError(
        f"cannot publish {path} from the cache",
        detail=f"expected the model's own file, got: {got}",
        hint="mistral-fetch verify finds what is wrong, mistral-fetch repair REF mends it",
    )
