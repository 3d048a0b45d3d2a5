"""Complete models of the cache as what a bundle is made of: documents in memory, contents by path. Nothing is written.

The same snapshots give the same bundle: whatever depends on a moment or a machine stays out of it, but for what
``PROVENANCE.json`` recorded when the model came.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mistral_fetch.bundle.contents import (
    CHANNELS,
    LICENCE_DOCUMENT,
    MANIFEST_DOCUMENT,
    MAX_PIECE_LENGTH,
    MIN_PIECE_LENGTH,
    PROVENANCE_DOCUMENT,
    Document,
    ModelRecord,
    Plan,
    begin,
    describe_contents,
    each_document,
    parse_contents,
    plan_bundle,
)
from mistral_fetch.bundle.naming import check_name
from mistral_fetch.bundle.tar import member
from mistral_fetch.errors import IntegrityError, UsageError
from mistral_fetch.manifest import DEFAULT_PIECE_LENGTH, FileEntry, Manifest, PieceHashes
from mistral_fetch.metalink import serialise_metalink
from mistral_fetch.publish.model import publication_name
from mistral_fetch.spans import PieceGrid
from mistral_fetch.store.durable import disk_errors
from mistral_fetch.store.hashing import hash_pieces
from mistral_fetch.store.snapshots import PROVENANCE_NAME, RefRecord, load_manifest, load_provenance, load_signed
from mistral_fetch.transfer.local import LocalModel


@dataclass(frozen=True)
class Packed:
    """A bundle about to be written: its beginning, then contents with frames; where each content lies on this disk."""

    beginning: bytes
    plan: Plan
    records: tuple[ModelRecord, ...]
    places: Mapping[str, Path]
    """By sha256."""


@dataclass(frozen=True)
class _Model:
    record: RefRecord
    directory: Path
    manifest: Manifest
    papers: Mapping[str, Any]


def pack(models: Sequence[LocalModel], check_stop: Callable[[], None]) -> Packed:
    """Return what a bundle of these models consists of.

    Args:
        models: Complete models; each name once is enough.
        check_stop: Called between files whose pieces have to be hashed first; may raise.

    Raises:
        StoreError, IntegrityError: A snapshot's papers are damaged.
        UsageError: A model came by a channel that bundles do not know.
    """
    loaded = [_load(model, check_stop) for model in {m.record.key: m for m in models}.values()]
    loaded.sort(key=lambda model: (_folder(model), model.record.key))
    documents = [_documents(model) for model in loaded]
    folders = _unique([_folder(model) for model in loaded])
    rows = zip(loaded, folders, documents, strict=True)
    records = [_describe(model, folder, papers) for model, folder, papers in rows]
    contents = describe_contents(records)
    for record in parse_contents(contents):  # a reader's limits are ours
        check_name(record)
    content = {f"{f}/{path}": data for f, d in zip(folders, documents, strict=True) for path, data in d.items()}
    beginning = begin(contents) + b"".join(member(path, content[path]) for path, _ in each_document(records))
    plan = plan_bundle(contents, records, [model.manifest for model in loaded])
    places = {e.sha256 or "": model.directory / e.path for model in reversed(loaded) for e in model.manifest.files}
    return Packed(beginning, plan, tuple(records), places)


def _load(model: LocalModel, check_stop: Callable[[], None]) -> _Model:
    manifest, papers = load_manifest(model.directory), load_provenance(model.directory)
    if model.record.channel not in CHANNELS:
        raise UsageError(
            f"{model.record.key} cannot be bundled",
            detail=f"expected a model that was pulled, got one by {model.record.channel}",
            hint="mistral-fetch list shows the channel of each model",
        )
    entries = [_with_pieces(model.directory, entry, check_stop) for entry in manifest.files]
    return _Model(model.record, model.directory, manifest.with_files(entries), papers)


def _with_pieces(directory: Path, entry: FileEntry, check_stop: Callable[[], None]) -> FileEntry:
    """Add piece hashes where a pull left them out, or where they are too fine or too coarse to stream by."""
    check_stop()
    size = entry.size or 0
    if not size:
        return replace(entry, pieces=None)  # a pull may have noted that it has none
    if entry.pieces is not None and MIN_PIECE_LENGTH <= entry.pieces.length <= MAX_PIECE_LENGTH:
        return entry
    with disk_errors("reading what the cache holds", directory / entry.path):
        hashes = hash_pieces(directory / entry.path, list(PieceGrid(size, DEFAULT_PIECE_LENGTH).spans()))
    return replace(entry, pieces=PieceHashes(DEFAULT_PIECE_LENGTH, tuple(hashes)))


def _folder(model: _Model) -> str:
    info = model.manifest.info
    name = info.name or str(model.papers.get("name") or "model")
    return publication_name(replace(info, name=name, version=info.version or str(model.papers.get("version") or "")))


def _unique(names: Sequence[str]) -> list[str]:
    taken: list[str] = []
    for name in names:
        candidates = (name if number == 1 else f"{name}.{number}" for number in range(1, len(names) + 1))
        taken.append(next(one for one in candidates if one.casefold() not in {t.casefold() for t in taken}))
    return taken


def _documents(model: _Model) -> dict[str, bytes]:
    """Return a model's papers by their place in its folder, in the bundle's order."""
    found = {MANIFEST_DOCUMENT: serialise_metalink(model.manifest)}
    with disk_errors("reading what the cache holds", model.directory):
        found[PROVENANCE_DOCUMENT] = (model.directory / PROVENANCE_NAME).read_bytes()
        licence = model.directory / LICENCE_DOCUMENT
        has_own = any(e.path.partition("/")[0].casefold() == "license" for e in model.manifest.files)
        if licence.is_file() and not has_own:
            found[LICENCE_DOCUMENT] = licence.read_bytes()
    signed = load_signed(model.directory, model.papers)
    if signed is not None:
        found[f".signed/{signed.sha256}"] = signed.document
        found[f".signed/{signed.sha256}.sig"] = signed.bundle
    return found


def _describe(model: _Model, folder: str, documents: Mapping[str, bytes]) -> ModelRecord:
    signature = model.papers.get("signature")
    listed = (Document(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in documents.items())
    return ModelRecord(
        folder,
        model.record.key,
        model.record.channel,
        str(model.papers.get("identity", "")),
        model.record.content_digest,
        str(signature["kind"]) if isinstance(signature, Mapping) else "",
        tuple(listed),
    )


def damaged(ref: str, path: str, detail: str) -> IntegrityError:
    """Return the error for a file of the cache that is not what its manifest says."""
    return IntegrityError(
        f"{path} of {ref} is damaged in this cache",
        detail=detail,
        hint=f"mend it with: mistral-fetch repair {ref}; no bundle was made",
    )
