"""What a bundle consists of, as values: a table of contents, and the sequence of bytes that follows from it. No I/O.

    bundle.json           the format, and size and sha256 of the table of contents
    contents.json         the models: their names, and size and sha256 of their documents
    <folder>/<document>   of each model: manifest.meta4, PROVENANCE.json, LICENSE, what was signed
    <folder>/<file>       of each model, sorted; the same content a second time is a hard link to the first
    bundle.end            how much that was

All of it is known once the documents are: so a reader compares every byte that is no model's content with the only one
that can stand there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mistral_fetch.bundle.tar import BLOCK, END, file_header, link_header, member, padding
from mistral_fetch.errors import MalformedBundle
from mistral_fetch.manifest import FileEntry, Manifest
from mistral_fetch.metalink import MAX_METALINK_BYTES
from mistral_fetch.signatures import MAX_BUNDLE_BYTES
from mistral_fetch.strict_json import Fields, UnexpectedJson, accepted, decode, integer, listed, matching, one_of
from mistral_fetch.trust import CATALOG, MANIFEST
from mistral_fetch.units import KIB, MIB

FORMAT = "mistral-fetch bundle"
VERSION = 1
HEADER_NAME, CONTENTS_NAME, END_NAME = "bundle.json", "contents.json", "bundle.end"
MANIFEST_DOCUMENT, PROVENANCE_DOCUMENT, LICENCE_DOCUMENT = "manifest.meta4", "PROVENANCE.json", "LICENSE"
MAX_HEADER_BYTES = 4 * KIB
MAX_CONTENTS_BYTES = MIB
MAX_MODELS = 100
# All documents are held in memory until the bundle is through.
MAX_ALL_DOCUMENTS_BYTES = 192 * MIB
MIN_PIECE_LENGTH, MAX_PIECE_LENGTH = 64 * KIB, 64 * MIB
CHANNELS = ("hub", "torrent", "archive", "manifest")

_SIGNED = re.compile(r"\.signed/[0-9a-f]{64}(\.sig)?")
_folder = matching(r"[A-Za-z0-9][A-Za-z0-9._+@-]{0,150}", "a plain folder name")
_sha256 = matching(r"[0-9a-f]{64}", "64 lower-case hexadecimal digits")
_line = accepted(lambda value: 0 < len(value) <= 64 * KIB and value.isprintable(), "one line of text")
_identity = accepted(lambda value: len(value) <= 1000 and value.isprintable(), "one line of text")
_document_name = accepted(
    lambda name: name in {MANIFEST_DOCUMENT, PROVENANCE_DOCUMENT, LICENCE_DOCUMENT} or _SIGNED.fullmatch(name),
    "the name of a document",
)


@dataclass(frozen=True)
class Document:
    """A small file about a model."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class ModelRecord:
    """A model as the table of contents has it; ``signed_as`` is empty, or says what kind of document was signed."""

    folder: str
    ref: str
    channel: str
    identity: str
    content_digest: str
    signed_as: str
    documents: tuple[Document, ...]


@dataclass(frozen=True)
class Content:
    """A file of a model: where its bytes stand in the bundle, and what precedes them."""

    model: int
    entry: FileEntry
    frame_offset: int
    frame: bytes
    """Everything since the content before: zeros, links and headers."""

    @property
    def offset(self) -> int:
        """Return where the file's first byte is."""
        return self.frame_offset + len(self.frame)


@dataclass(frozen=True)
class Plan:
    """The whole sequence: contents with their frames, and what follows the last one."""

    contents: tuple[Content, ...]
    tail_offset: int
    tail: bytes
    by_sha256: Mapping[str, Content] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Return the bundle's size in bytes."""
        return self.tail_offset + len(self.tail)


def describe_contents(models: Sequence[ModelRecord]) -> bytes:
    """Return ``contents.json``."""
    fields = [
        {
            "folder": model.folder,
            "ref": model.ref,
            "channel": model.channel,
            "identity": model.identity,
            "content_digest": model.content_digest,
            "signed_as": model.signed_as,
            "documents": [{"path": d.path, "size": d.size, "sha256": d.sha256} for d in model.documents],
        }
        for model in models
    ]
    return _json({"models": fields})


def describe_header(contents: bytes) -> bytes:
    """Return ``bundle.json``, which vouches for the table of contents."""
    digest = {"size": len(contents), "sha256": hashlib.sha256(contents).hexdigest()}
    return _json({"format": FORMAT, "version": VERSION, "contents": digest})


def parse_header(data: bytes) -> tuple[int, str]:
    """Return size and sha256 of the table of contents.

    Raises:
        MalformedBundle: It is no such header, or of another version.
    """
    try:
        fields = Fields(decode(data, MAX_HEADER_BYTES), HEADER_NAME)
        fields.required("format", one_of(FORMAT))
        fields.required("version", integer(VERSION, VERSION))
        contents = Fields(fields.required("contents", lambda value, _where: value), "contents")
        fields.done()
        size = contents.required("size", integer(1, MAX_CONTENTS_BYTES))
        sha256 = contents.required("sha256", _sha256)
        contents.done()
    except UnexpectedJson as error:
        raise malformed(f"{error.where}: expected {error.expected}, got {error.actual}") from error
    canonical = _json({"format": FORMAT, "version": VERSION, "contents": {"size": size, "sha256": sha256}})
    if canonical != data:
        raise malformed(f"expected {HEADER_NAME} as this format writes it, got it written otherwise")
    return size, sha256


def parse_contents(data: bytes) -> tuple[ModelRecord, ...]:
    """Return the models in a table of contents.

    Raises:
        MalformedBundle: A value is not what its place demands, or two models share a folder.
    """
    try:
        fields = Fields(decode(data, MAX_CONTENTS_BYTES), CONTENTS_NAME)
        models = fields.required("models", listed(_read_model))
        fields.done()
    except UnexpectedJson as error:
        raise malformed(f"{error.where}: expected {error.expected}, got {error.actual}") from error
    if not 1 <= len(models) <= MAX_MODELS:
        raise malformed(f"expected 1 to {MAX_MODELS} models, got {len(models)}")
    folders = {model.folder.casefold() for model in models}
    if len(folders) < len(models) or folders & {HEADER_NAME, CONTENTS_NAME, END_NAME}:
        raise malformed("expected a folder of its own for every model, got one name twice")
    total = sum(document.size for model in models for document in model.documents)
    if total > MAX_ALL_DOCUMENTS_BYTES:
        raise malformed(f"expected at most {MAX_ALL_DOCUMENTS_BYTES} bytes of documents, got {total}")
    return models


def _read_model(value: Any, where: str) -> ModelRecord:
    fields = Fields(value, where)
    model = ModelRecord(
        fields.required("folder", _folder),
        fields.required("ref", _line),
        fields.required("channel", one_of(*CHANNELS)),
        fields.required("identity", _identity),
        fields.required("content_digest", _sha256),
        fields.required("signed_as", one_of("", MANIFEST, CATALOG)),
        fields.required("documents", listed(_read_document)),
    )
    fields.done()
    names = [document.path for document in model.documents]
    signed = [name for name in names if name.startswith(".signed/")]
    wanted = [MANIFEST_DOCUMENT, PROVENANCE_DOCUMENT]
    wanted += [LICENCE_DOCUMENT] if LICENCE_DOCUMENT in names else []
    wanted += [signed[0], f"{signed[0]}.sig"] if model.signed_as and signed else []
    if names != wanted or bool(signed) != bool(model.signed_as):
        raise UnexpectedJson(f"{where}.documents", "the documents in their order", ", ".join(names)[:200])
    return model


def _read_document(value: Any, where: str) -> Document:
    fields = Fields(value, where)
    path = fields.required("path", _document_name)
    limit = MAX_BUNDLE_BYTES if path.endswith(".sig") else MIB if path == LICENCE_DOCUMENT else MAX_METALINK_BYTES
    document = Document(path, fields.required("size", integer(0, limit)), fields.required("sha256", _sha256))
    fields.done()
    if path.startswith(".signed/") and not path.endswith(".sig") and path != f".signed/{document.sha256}":
        raise UnexpectedJson(f"{where}.path", "a signed document named by its sha256", path)
    return document


def check_manifest(model: ModelRecord, manifest: Manifest) -> None:
    """Check that a model's manifest is the one the table of contents speaks of, and can be verified as it streams.

    Raises:
        MalformedBundle: It is of other files, or a file lacks a size, a sha256 or pieces of a usable length.
    """
    if not manifest.is_fully_pinned or manifest.content_digest().value != model.content_digest:
        raise malformed(f"expected the files of {model.content_digest} in {model.folder}, got others")
    for entry in manifest.files:
        length = entry.pieces.length if entry.pieces else 0
        if entry.size and not MIN_PIECE_LENGTH <= length <= MAX_PIECE_LENGTH:
            raise malformed(f"expected pieces of 64 KiB to 64 MiB of {entry.path}, got {length} bytes")
    has_licence = any(document.path == LICENCE_DOCUMENT for document in model.documents)
    if has_licence and any(entry.path.partition("/")[0].casefold() == "license" for entry in manifest.files):
        raise malformed(f"expected one LICENSE in {model.folder}, got two")


def begin(contents: bytes) -> bytes:
    """Return the bundle's first bytes, up to the documents."""
    return member(HEADER_NAME, describe_header(contents)) + member(CONTENTS_NAME, contents)


def plan_bundle(contents: bytes, models: Sequence[ModelRecord], manifests: Sequence[Manifest]) -> Plan:
    """Return every byte that follows the documents, or where it comes from.

    Args:
        contents: ``contents.json``.
        models: What it says.
        manifests: The models' manifests, in the same order.
    """
    position = documents_end(contents, models)
    frame, planned = b"", list[Content]()
    found: dict[str, Content] = {}
    for number, (model, manifest) in enumerate(zip(models, manifests, strict=True)):
        for entry in manifest.files:
            path, sha256, size = f"{model.folder}/{entry.path}", entry.sha256 or "", entry.size or 0
            first = found.get(sha256)
            if first is not None:
                frame += link_header(path, f"{models[first.model].folder}/{first.entry.path}")
                continue
            content = Content(number, entry, position, frame + file_header(path, size))
            planned.append(content)
            found[sha256] = content
            position, frame = content.offset + size, padding(size)
    tail = frame + member(END_NAME, _describe_end(contents, models, planned)) + END
    return Plan(tuple(planned), position, tail, found)


def documents_end(contents: bytes, models: Sequence[ModelRecord]) -> int:
    """Return where the documents end and the models' files begin."""
    sizes = (_member_size(place, document.size) for place, document in each_document(models))
    return len(begin(contents)) + sum(sizes)


def each_document(models: Sequence[ModelRecord]) -> Iterator[tuple[str, Document]]:
    """Yield every document with its path in the bundle."""
    for model in models:
        for document in model.documents:
            yield f"{model.folder}/{document.path}", document


def _member_size(path: str, size: int) -> int:
    return len(file_header(path, size)) + size + -size % BLOCK


def _describe_end(contents: bytes, models: Sequence[ModelRecord], planned: Sequence[Content]) -> bytes:
    fields = {
        "contents_sha256": hashlib.sha256(contents).hexdigest(),
        "models": len(models),
        "contents": len(planned),
        "content_bytes": sum(content.entry.size or 0 for content in planned),
    }
    return _json(fields)


def _json(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=1, ensure_ascii=False) + "\n").encode()


def malformed(detail: str) -> MalformedBundle:
    """Return the error for a bundle that is not written as it must be."""
    return MalformedBundle(
        "the bundle is not one that this program could have written",
        detail=detail,
        hint="do not use it; copy it again, and compare its sha256 with that of whoever made it (docs/air-gap.md)",
    )
