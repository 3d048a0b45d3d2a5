"""Metalink 4 (RFC 5854) to :class:`~mistral_fetch.manifest.Manifest` and back. Bytes in, values out; no I/O.

What Metalink lacks (licence, credit, weight format, base model, chat template) sits in elements of our own
namespace, which other readers skip. The same manifest always gives the same bytes: no dates, sorted files.
The document is hostile until validated: size caps, no DOCTYPE (so no entities), safe paths, known URL schemes.
"""

from __future__ import annotations

import posixpath
import unicodedata
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from xml.parsers import expat

from mistral_fetch.digest import Digest
from mistral_fetch.errors import MalformedManifest
from mistral_fetch.manifest import MAX_FILES, FileEntry, Manifest, MirrorUrl, ModelInfo, PieceHashes, TorrentLink
from mistral_fetch.units import MIB, parse_utc

METALINK_NAMESPACE = "urn:ietf:params:xml:ns:metalink"
OUR_NAMESPACE = "urn:x-mistral-fetch:model:1"

# 64 MiB holds the pieces of about 2.5 TB of weights on the 4 MiB grid.
MAX_METALINK_BYTES = 64 * MIB
MAX_DEPTH = 8
MAX_MIRRORS = 200
MAX_TEXT = 64 * 1024

# Not xml.sax.saxutils: that imports an HTTP client, which every start of the program would pay for.
_IN_TEXT = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_TEXT = str.maketrans(_IN_TEXT)
_ATTRIBUTE = str.maketrans({**_IN_TEXT, '"': "&quot;", "\n": "&#10;", "\r": "&#13;", "\t": "&#9;"})

# RFC 5854 takes hash names from the IANA registry; those we can check, and our own names for them.
_HASH_NAMES = {"sha-256": "sha256", "md5": "md5"}
_IANA_NAMES = {ours: iana for iana, ours in _HASH_NAMES.items()}
_INFO_FIELDS = (
    "name",
    "version",
    "licence",
    "credit",
    "source_url",
    "weight_format",
    "base_model",
    "chat_template",
    "expires",
)


def serialise_metalink(manifest: Manifest) -> bytes:
    """Return the manifest as Metalink 4, readable by other Metalink programs unaided."""
    return "".join(line + "\n" for line in _document(manifest)).encode()


def _document(manifest: Manifest) -> Iterator[str]:
    yield '<?xml version="1.0" encoding="UTF-8"?>'
    # Attributes, not elements: aria2c takes any unknown element beside the files for a file without a name.
    yield f'<metalink xmlns="{METALINK_NAMESPACE}" xmlns:m="{OUR_NAMESPACE}"'
    for name in _INFO_FIELDS:
        value = getattr(manifest.info, name)
        if value:
            yield f'  m:{name}="{value.translate(_ATTRIBUTE)}"'
    yield ">"
    yield "  <generator>mistral-fetch</generator>"
    for entry in manifest.files:
        yield from _file_element(entry)
    yield "</metalink>"


def _file_element(entry: FileEntry) -> Iterator[str]:
    yield f'  <file name="{entry.path.translate(_ATTRIBUTE)}">'
    if entry.size is not None:
        yield f"    <size>{entry.size}</size>"
    for digest in entry.digests:
        if digest.algorithm in _IANA_NAMES:
            yield f'    <hash type="{_IANA_NAMES[digest.algorithm]}">{digest.value}</hash>'
    if entry.pieces is not None:
        yield f'    <pieces length="{entry.pieces.length}" type="sha-256">'
        for value in entry.pieces.sha256:
            yield f"      <hash>{value}</hash>"
        yield "    </pieces>"
    for link in entry.torrents:
        path, url = link.path.translate(_ATTRIBUTE), link.url.translate(_TEXT)
        if link.needs_v2:
            yield f'    <m:torrent name="{path}">{url}</m:torrent>'
        else:
            yield f'    <metaurl mediatype="torrent" name="{path}">{url}</metaurl>'
    for mirror in entry.mirrors:
        url = mirror.url.translate(_TEXT)
        if mirror.member:
            # Never a plain url: other Metalink programs would take the whole archive for the file.
            name = mirror.member.translate(_ATTRIBUTE)
            yield f'    <m:member name="{name}" priority="{mirror.priority}">{url}</m:member>'
        else:
            yield f'    <url priority="{mirror.priority}">{url}</url>'
    yield "  </file>"


def parse_metalink(data: bytes, base_url: str = "") -> Manifest:
    """Return the manifest in a Metalink 4 document.

    Args:
        data: The document.
        base_url: Where it was read from; relative addresses in it are resolved against this. ``file:``
            addresses are believed only when the document itself came from a ``file:`` address, and only
            within its own directory.

    Raises:
        MalformedManifest: Not Metalink 4, too large, or with impossible values.
        UnsafePath: A file name would leave its directory or clashes with another.
    """
    if len(data) > MAX_METALINK_BYTES:
        raise _malformed(f"expected at most {MAX_METALINK_BYTES} bytes, got {len(data)}")
    reader = _Reader(base_url)
    try:
        reader.read(data)
    except expat.ExpatError as error:
        raise _malformed(f"expected well-formed XML, got: {error}") from error
    except ValueError as error:
        raise _malformed(str(error)) from error
    return Manifest(tuple(reader.files), ModelInfo(**reader.info))


def _malformed(detail: str) -> MalformedManifest:
    return MalformedManifest(
        "the manifest is not a usable Metalink 4 document (RFC 5854)",
        detail=detail,
        hint="check the address: it may be a web page or an older .metalink; then ask its publisher",
    )


@dataclass
class _FileDraft:
    """The file element being read."""

    path: str
    size: int | None = None
    digests: list[Digest] = field(default_factory=list)
    piece_length: int = 0
    pieces: list[str] | None = None
    mirrors: list[MirrorUrl] = field(default_factory=list)
    torrents: list[TorrentLink] = field(default_factory=list)

    def add_digest(self, digest: Digest) -> None:
        known = next((other for other in self.digests if other.algorithm == digest.algorithm), None)
        if known is None:
            self.digests.append(digest)
        elif known != digest:
            # At once: a document may hold a million of them, and each would be compared with all before it.
            raise ValueError(f"expected one {digest.algorithm} of {self.path[:120]!r}, got two that differ")

    def entry(self) -> FileEntry:
        pieces = PieceHashes(self.piece_length, tuple(self.pieces)) if self.pieces is not None else None
        return FileEntry(self.path, self.size, tuple(self.digests), pieces, tuple(self.mirrors), tuple(self.torrents))


class _Reader:
    """A small event-driven reader: it never builds a tree, so a hostile document cannot make it large."""

    def __init__(self, base_url: str) -> None:
        self.files: list[FileEntry] = []
        self.info: dict[str, str] = {}
        self._base_url = base_url
        self._path: list[str] = []
        self._attributes: dict[str, str] = {}
        self._text: list[str] = []
        self._text_length = 0
        self._file: _FileDraft | None = None
        self._in_sha256_pieces = False

    def read(self, data: bytes) -> None:
        # UTF-8, whatever the document claims: nobody outside chooses which of Python's codecs runs.
        parser = expat.ParserCreate("utf-8", namespace_separator=" ")
        parser.buffer_text = True
        parser.StartDoctypeDeclHandler = self._refuse_doctype
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._characters
        parser.Parse(data, True)

    def _refuse_doctype(self, *_details: object) -> None:
        raise ValueError("expected no DOCTYPE (entities could grow without bound), got one")

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        namespace, _, name = tag.rpartition(" ")
        if not self._path:
            if (namespace, name) != (METALINK_NAMESPACE, "metalink"):
                raise ValueError(f"expected a metalink element of {METALINK_NAMESPACE}, got {tag[:120]!r}")
            self.info = _info_attributes(attributes)
        self._path.append(
            name if namespace == METALINK_NAMESPACE else f"m:{name}" if namespace == OUR_NAMESPACE else "?"
        )
        if len(self._path) > MAX_DEPTH:
            raise ValueError(f"expected at most {MAX_DEPTH} nested elements")
        self._attributes, self._text, self._text_length = attributes, [], 0
        if self._path == ["metalink", "file"]:
            if len(self.files) >= MAX_FILES:
                raise ValueError(f"expected at most {MAX_FILES} files, got more")
            self._file = _FileDraft(attributes.get("name", ""))
        elif self._path == ["metalink", "file", "pieces"] and self._file is not None:
            self._start_pieces(self._file, attributes)

    def _start_pieces(self, file: _FileDraft, attributes: dict[str, str]) -> None:
        self._in_sha256_pieces = attributes.get("type") == "sha-256"
        if self._in_sha256_pieces:
            file.piece_length = _parse_count(attributes.get("length", ""), "a piece length")
            file.pieces = []

    def _characters(self, text: str) -> None:
        self._text_length += len(text)
        if self._text_length > MAX_TEXT:
            raise ValueError(f"expected at most {MAX_TEXT} characters in one element")
        self._text.append(text)

    def _end(self, _tag: str) -> None:
        text = "".join(self._text).strip()
        self._text, self._text_length = [], 0
        path = "/".join(self._path)
        self._path.pop()
        if path == "metalink/file" and self._file is not None:
            self.files.append(self._file.entry())
            self._file = None
        elif self._file is not None and path.startswith("metalink/file/"):
            self._end_in_file(self._file, path.removeprefix("metalink/file/"), text)

    def _end_in_file(self, file: _FileDraft, name: str, text: str) -> None:
        if name == "size":
            file.size = _parse_count(text, "a size")
        elif name == "hash":
            algorithm = _HASH_NAMES.get(self._attributes.get("type", ""))
            if algorithm:
                file.add_digest(Digest(algorithm, text.lower()))
        elif name == "pieces/hash" and self._in_sha256_pieces and file.pieces is not None:
            file.pieces.append(Digest("sha256", text.lower()).value)
        elif name == "url":
            self._add_mirror(file, text, "")
        elif name == "m:member":
            self._add_mirror(file, text, self._attributes.get("name") or file.path)
        elif name == "m:torrent" or (name == "metaurl" and self._attributes.get("mediatype") == "torrent"):
            address = _resolve(text, self._base_url)
            if address and len(file.torrents) < MAX_MIRRORS:
                path = self._attributes.get("name", file.path)
                file.torrents.append(TorrentLink(address, path, needs_v2=name == "m:torrent"))

    def _add_mirror(self, file: _FileDraft, text: str, member: str) -> None:
        address = _resolve(text, self._base_url)
        if address is None or len(file.mirrors) >= MAX_MIRRORS:
            return
        priority = self._attributes.get("priority", "999999")
        if all((known.url, known.member) != (address, member) for known in file.mirrors):
            file.mirrors.append(MirrorUrl(address, _parse_count(priority, "a priority"), member))


def _info_attributes(attributes: dict[str, str]) -> dict[str, str]:
    info = {}
    for name in _INFO_FIELDS:
        value = attributes.get(f"{OUR_NAMESPACE} {name}", "").strip()
        # These are printed: a control character could move the terminal's cursor (XML itself allows some).
        if len(value) > MAX_TEXT or any(unicodedata.category(character) == "Cc" for character in value):
            raise ValueError(f"expected one line of plain text as {name}, got {value[:80]!r}")
        info[name] = value
    if info["expires"]:
        parse_utc(info["expires"])
    return info


def _parse_count(text: str, what: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise ValueError(f"expected {what}, got {text[:40]!r}")
    return int(text)


def _resolve(address: str, base_url: str) -> str | None:
    """Return the absolute form of an address, or None where it is no business of ours."""
    absolute = urllib.parse.urljoin(base_url, address) if base_url else address
    scheme = urllib.parse.urlsplit(absolute).scheme
    if scheme in {"http", "https"}:
        return absolute
    if scheme == "file" and base_url.startswith("file:") and _is_within(absolute, base_url):
        return absolute
    return None


def _is_within(address: str, base_url: str) -> bool:
    def path_of(url: str) -> str:
        return posixpath.normpath(urllib.parse.unquote(urllib.parse.urlsplit(url).path))

    directory = posixpath.dirname(path_of(base_url))
    is_here = urllib.parse.urlsplit(address).netloc in {"", "localhost"}
    return is_here and path_of(address).startswith(directory.rstrip("/") + "/")
