"""What a model consists of: files with sizes, digests, pieces and places to get them. Values, no I/O.

Names from outside are validated here, once, so that everything behind this module may join them to a
directory. The file format is :mod:`mistral_fetch.metalink`'s business.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from mistral_fetch.digest import Assurance, Digest
from mistral_fetch.errors import MalformedManifest, UnsafePath
from mistral_fetch.spans import PieceGrid
from mistral_fetch.units import MIB

DEFAULT_PIECE_LENGTH = 4 * MIB
MAX_FILES = 10_000
MAX_FILE_SIZE = 1 << 50
MAX_PIECES = 1 << 22
MAX_PATH_BYTES = 1024
MAX_NAME_BYTES = 255
MAX_DEPTH = 16

_SHA256 = re.compile(r"[0-9a-f]{64}")

# The snapshot directory's own files; a model may not bring files of these names.
RESERVED_NAMES = frozenset({"PROVENANCE.json", "manifest.meta4", ".complete", ".signed"})


@dataclass(frozen=True)
class PieceHashes:
    """sha256 digests (hex) of a file's pieces on a grid of ``length`` bytes."""

    length: int
    sha256: tuple[str, ...]


@dataclass(frozen=True)
class MirrorUrl:
    """One address of a file; a lower priority is tried first (RFC 5854, 4.2.16).

    ``member`` is the path of the file inside the uncompressed tar at ``url``; empty when ``url`` is the file itself.
    """

    url: str
    priority: int = 100
    member: str = ""


@dataclass(frozen=True)
class TorrentLink:
    """Where a torrent that contains the file lies, and the file's path inside it.

    ``needs_v2`` marks a torrent for readers that know BEP 52 alone: others would take a wrong info-hash from it.
    """

    url: str
    path: str
    needs_v2: bool = False


@dataclass(frozen=True)
class FileEntry:
    """One file. ``size`` is None until a source told it.

    ``is_signed`` says that a trusted key vouches for the sha256; no document can claim that of itself.
    """

    path: str
    size: int | None
    digests: tuple[Digest, ...] = ()
    pieces: PieceHashes | None = None
    mirrors: tuple[MirrorUrl, ...] = ()
    torrents: tuple[TorrentLink, ...] = ()
    is_signed: bool = False

    def digest(self, algorithm: str) -> Digest | None:
        """Return the whole-file digest of this algorithm, if one is known."""
        return next((digest for digest in self.digests if digest.algorithm == algorithm), None)

    @property
    def sha256(self) -> str | None:
        """Return the hexadecimal sha256, if known."""
        digest = self.digest("sha256")
        return digest.value if digest else None

    @property
    def checks(self) -> tuple[Digest, ...]:
        """Return the digests worth computing: a file that matches its sha256 needs no weaker one."""
        sha256 = self.digest("sha256")
        return self.digests if sha256 is None else (sha256,)

    @property
    def assurance(self) -> Assurance:
        """Return what a match of the strongest known whole-file digest proves."""
        if self.is_signed and self.sha256 is not None:
            return Assurance.SIGNED
        levels = [digest.assurance for digest in self.digests if digest.assurance is not None]
        return max(levels, default=Assurance.SIZE)


@dataclass(frozen=True)
class ModelInfo:
    """What people want to know beside the bytes; every field may be unknown (empty)."""

    name: str = ""
    version: str = ""
    licence: str = ""  # SPDX identifier
    credit: str = ""
    source_url: str = ""
    weight_format: str = ""  # consolidated-pth, consolidated-safetensors, hf-safetensors
    base_model: str = ""
    chat_template: str = ""  # v1, v3, demo; none for a base model; empty where nobody said
    expires: str = ""  # 2027-01-31T12:00:00Z: after this the manifest is not to be believed any more


@dataclass(frozen=True)
class Manifest:
    """A model's files, validated and sorted by path, so equal whatever order they came in.

    Raises:
        UnsafePath: A path would leave its directory, or two paths clash.
        MalformedManifest: No files, too many, an impossible size, or pieces that do not fit.
    """

    files: tuple[FileEntry, ...]
    info: ModelInfo = field(default_factory=ModelInfo)

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", tuple(sorted(self.files, key=lambda entry: entry.path)))
        validate_paths(entry.path for entry in self.files)
        for entry in self.files:
            _validate_entry(entry)

    @property
    def size(self) -> int:
        """Return the known bytes of all files together."""
        return sum(entry.size or 0 for entry in self.files)

    def entry(self, path: str) -> FileEntry:
        """Return the file at ``path``.

        Raises:
            KeyError: There is none.
        """
        for entry in self.files:
            if entry.path == path:
                return entry
        raise KeyError(path)

    @property
    def is_fully_pinned(self) -> bool:
        """Return whether every file has a size and a sha256, so that the content digest exists."""
        return all(entry.size is not None and entry.sha256 for entry in self.files)

    def content_digest(self) -> Digest:
        """Return the sha256 over one line ``sha256, two spaces, size, two spaces, path`` a file, sorted.

        The same files give the same digest, whatever channel brought them.

        Raises:
            MalformedManifest: A file has no sha256 or no size yet.
        """
        if not self.is_fully_pinned:
            missing = next(entry.path for entry in self.files if entry.size is None or not entry.sha256)
            raise MalformedManifest(
                f"{missing} has no sha256 or size yet",
                detail="expected every file pinned before a content digest is asked for",
                hint="fetch the model first",
            )
        listing = "".join(f"{entry.sha256}  {entry.size}  {entry.path}\n" for entry in self.files)
        return Digest("sha256", hashlib.sha256(listing.encode()).hexdigest())

    def with_files(self, files: Iterable[FileEntry]) -> Manifest:
        """Return the same model described by other file entries."""
        return replace(self, files=tuple(files))


def _validate_entry(entry: FileEntry) -> None:
    if entry.size is not None and not 0 <= entry.size <= MAX_FILE_SIZE:
        raise MalformedManifest(
            f"{entry.path} claims an impossible size",
            detail=f"expected 0 to {MAX_FILE_SIZE} bytes, got {entry.size}",
            hint="ask the publisher for a correct manifest",
        )
    algorithms = [digest.algorithm for digest in entry.digests]
    if len(algorithms) != len(set(algorithms)):
        raise MalformedManifest(
            f"{entry.path} has two digests of one kind",
            detail=f"expected one digest per algorithm, got {', '.join(map(str, entry.digests))}",
            hint="ask the publisher for a correct manifest",
        )
    for mirror in entry.mirrors:
        if mirror.member:
            validate_path(mirror.member)  # never joined to a directory, but compared and printed
    if entry.pieces is None:
        return
    if entry.size is None or entry.pieces.length <= 0:
        expected = None
    else:
        expected = PieceGrid(entry.size, entry.pieces.length).count
    if expected != len(entry.pieces.sha256) or len(entry.pieces.sha256) > MAX_PIECES:
        raise MalformedManifest(
            f"the pieces of {entry.path} do not fit its size",
            detail=f"expected {expected} pieces of {entry.pieces.length} bytes, got {len(entry.pieces.sha256)}",
            hint="ask the publisher for a correct manifest",
        )
    # An unreadable piece digest would match no bytes, and every honest source would look like a liar.
    unreadable = next((value for value in entry.pieces.sha256 if not _SHA256.fullmatch(value)), None)
    if unreadable is not None:
        raise MalformedManifest(
            f"a piece of {entry.path} has a digest that is none",
            detail=f"expected 64 lower-case hexadecimal digits, got {unreadable[:80]!r}",
            hint="ask the publisher for a correct manifest",
        )


def validate_paths(paths: Iterable[str]) -> None:
    """Check that file names from outside are safe to join to a directory and do not clash.

    Raises:
        UnsafePath: Absolute, with ``..``, control characters, backslashes or drive letters, too long, too deep,
            reserved, repeated (also when only case or Unicode form differs), or both a file and a folder.
        MalformedManifest: No file, or more than ``MAX_FILES``.
    """
    listed = list(paths)
    if not 1 <= len(listed) <= MAX_FILES:
        raise MalformedManifest(
            "the list of files cannot be used",
            detail=f"expected 1 to {MAX_FILES} files, got {len(listed)}",
            hint="ask the publisher for a correct manifest",
        )
    seen: dict[str, str] = {}
    folders: set[str] = set()
    for path in listed:
        validate_path(path)
        folded = _fold(path)
        if folded in seen:
            raise _unsafe(path, f"it clashes with {seen[folded]!r}")
        seen[folded] = path
        parts = folded.split("/")
        folders.update("/".join(parts[:depth]) for depth in range(1, len(parts)))
    for folded, path in seen.items():
        if folded in folders:
            raise _unsafe(path, "it is a file here and a folder for another file")


def validate_path(path: str) -> None:
    """Check one relative POSIX path.

    Raises:
        UnsafePath: See :func:`validate_paths`.
    """
    reason = _why_unsafe(path)
    if reason:
        raise _unsafe(path, reason)


def _why_unsafe(path: str) -> str | None:
    if not path or len(path.encode("utf-8", "surrogatepass")) > MAX_PATH_BYTES:
        return f"it is empty or longer than {MAX_PATH_BYTES} bytes"
    if any(unicodedata.category(character) in {"Cc", "Cs", "Cf", "Zl", "Zp"} for character in path):
        return "it holds control or invisible characters"
    if "\\" in path or ":" in path:
        return "it holds a backslash or a colon"
    parts = path.split("/")
    if len(parts) > MAX_DEPTH:
        return f"it is more than {MAX_DEPTH} folders deep"
    for part in parts:
        if part in {"", ".", ".."}:
            return "it is absolute or leaves its directory"
        if part != part.strip() or part.endswith(".") or len(part.encode()) > MAX_NAME_BYTES:
            return "a part of it begins or ends in a space, ends in a dot or is too long"
    if _fold(parts[0]) in {_fold(name) for name in RESERVED_NAMES}:
        return "the snapshot keeps a file of its own by that name"
    return None


def _fold(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _unsafe(path: str, reason: str) -> UnsafePath:
    return UnsafePath(
        f"refused the file name {path[:120]!r}",
        detail=f"expected a plain relative path, but {reason}",
        hint="do not use this manifest; tell its publisher",
    )
