"""Read a publication back as strangers will: parse everything anew, and let the parts contradict each other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mistral_fetch.bittorrent.load import load_parameters
from mistral_fetch.bittorrent.metainfo import BLOCK_LENGTH, MAX_TORRENT_BYTES, Metainfo, parse_metainfo
from mistral_fetch.errors import ManifestError, PublishError
from mistral_fetch.manifest import FileEntry, Manifest
from mistral_fetch.metalink import MAX_METALINK_BYTES, parse_metalink

CHECKSUMS_NAME = "SHA256SUMS"
_CHECKSUM_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_V1_DIGEST_LENGTH = 20


@dataclass(frozen=True)
class PublishedFiles:
    """Where the parts of a publication lie in one directory."""

    manifest: Path
    torrent: Path
    plain_torrent: Path
    checksums: Path

    @classmethod
    def of(cls, out: Path, name: str) -> PublishedFiles:
        """Return the places of the publication called ``name`` in ``out``."""
        return cls(out / f"{name}.meta4", out / f"{name}.torrent", out / f"{name}.v1.torrent", out / CHECKSUMS_NAME)


@dataclass(frozen=True)
class ReadBack:
    """What a stranger finds."""

    manifest: Manifest
    hybrid: Metainfo
    plain: Metainfo


def read_back(out: Path, name: str) -> ReadBack:
    """Return the parts of a publication, after checking that all of them speak of the same bytes.

    Raises:
        PublishError: A part is missing, cannot be read by strangers, or contradicts another one.
    """
    places = PublishedFiles.of(out, name)
    try:
        found = ReadBack(
            parse_metalink(_read(places.manifest, MAX_METALINK_BYTES)),
            parse_metainfo(_read(places.torrent, MAX_TORRENT_BYTES)),
            parse_metainfo(_read(places.plain_torrent, MAX_TORRENT_BYTES)),
        )
        for torrent in (found.hybrid, found.plain):
            load_parameters(torrent)  # libtorrent's own reading; it also hashes the v2 layers up to their roots
        checksums = parse_checksums(_read(places.checksums, MAX_METALINK_BYTES).decode())
    except OSError as error:
        raise _contradiction(out, f"every part, got: {error.strerror or error} ({error.filename})") from error
    except (ManifestError, ValueError) as error:
        raise _contradiction(out, f"parts that strangers can read, got: {error}") from error
    problem = next(_contradictions(found, checksums), None)
    if problem is not None:
        raise _contradiction(out, problem)
    return found


def parse_checksums(text: str) -> dict[str, str]:
    """Return the sha256 of each file that ``sha256sum -c`` would check.

    Raises:
        ValueError: A line is none of its lines.
    """
    sums = {}
    for line in text.splitlines():
        match = _CHECKSUM_LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"not a line of sha256sum: {line[:80]!r}")
        sums[match[2]] = match[1]
    return sums


def _contradictions(found: ReadBack, checksums: Mapping[str, str]) -> Iterator[str]:
    manifest, hybrid, plain = found.manifest, found.hybrid, found.plain
    sizes = {entry.path: entry.size for entry in manifest.files}
    for torrent, label in ((hybrid, "hybrid"), (plain, "plain")):
        if {file.path: file.size for file in torrent.files} != sizes:
            yield f"the manifest's files in the {label} torrent, got others"
    if {entry.path: entry.sha256 for entry in manifest.files} != checksums:
        yield "the manifest's sha256 in SHA256SUMS, got others"
    if hybrid.info_hash_v2 is None or plain.info_hash_v2 is not None:
        yield "a hybrid and a plain v1 torrent, got other kinds"
    roots = {file.path: file.v2_root for file in hybrid.files}
    for entry in manifest.files:
        yield from _file_contradictions(entry, roots.get(entry.path))
    yield from _shared_pieces(hybrid, plain)


def _file_contradictions(entry: FileEntry, v2_root: str | None) -> Iterator[str]:
    if not entry.sha256:
        yield f"a sha256 of {entry.path}, got none"
    pieces = entry.pieces
    if entry.size and pieces is None:
        yield f"piece hashes of {entry.path}, got none"
    # Where a file is a single piece or a single leaf, two digests of different passes are of the same bytes.
    if pieces is not None and len(pieces.sha256) == 1 and pieces.sha256[0] != entry.sha256:
        yield f"the only piece of {entry.path} to hash to its sha256, got another"
    if entry.size and entry.size <= BLOCK_LENGTH and v2_root != entry.sha256:
        yield f"the v2 root of {entry.path} to be its sha256, got another"


def _shared_pieces(hybrid: Metainfo, plain: Metainfo) -> Iterator[str]:
    """Compare the SHA-1 pieces of the file that the plain torrent begins with: it lies on the grid in both."""
    first = plain.files[0]
    twin = next((file for file in hybrid.files if file.path == first.path), None)
    whole = first.size // plain.piece_length * _V1_DIGEST_LENGTH
    start = 0 if twin is None else twin.offset // hybrid.piece_length * _V1_DIGEST_LENGTH
    if plain.piece_length == hybrid.piece_length and plain.v1_pieces[:whole] != hybrid.v1_pieces[start : start + whole]:
        yield f"the same pieces of {first.path} in both torrents, got others"


def _read(path: Path, limit_bytes: int) -> bytes:
    with path.open("rb") as file:
        return file.read(limit_bytes + 1)


def _contradiction(out: Path, expected: str) -> PublishError:
    return PublishError(
        f"the publication in {out} cannot be used",
        detail=f"expected {expected}",
        hint="publish the model again; check the disk if this stays (dmesg)",
    )
