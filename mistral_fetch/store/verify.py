"""Proving a snapshot again, offline: every byte is hashed, and what is wrong is named by its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mistral_fetch.errors import IntegrityError, ManifestError, StoreError
from mistral_fetch.events import BytesVerified, Report
from mistral_fetch.manifest import DEFAULT_PIECE_LENGTH, FileEntry, Manifest, PieceHashes
from mistral_fetch.spans import Span
from mistral_fetch.store.hashing import find_bad_pieces, hash_file
from mistral_fetch.store.snapshots import MANIFEST_NAME, load_manifest


@dataclass(frozen=True)
class FileVerdict:
    """Whether one file is what the manifest says; ``problem`` is empty when it is."""

    path: str
    size: int
    problem: str = ""
    bad_spans: tuple[Span, ...] = ()
    learnt: PieceHashes | None = None
    """Piece hashes that the manifest did not have, of a file that is right."""

    @property
    def is_good(self) -> bool:
        """Return whether every byte matched."""
        return not self.problem


def verify_snapshot(
    directory: Path, report: Report, check_stop: Callable[[], None]
) -> tuple[Manifest | None, list[FileVerdict]]:
    """Hash a snapshot against its own manifest; one that cannot be believed gets a verdict, and None is returned.

    Raises:
        Interrupted: ``check_stop`` raised it.
    """
    try:
        manifest = load_manifest(directory)
    except (StoreError, IntegrityError, ManifestError) as error:
        return None, [FileVerdict(MANIFEST_NAME, 0, f"{error.what}: {error.detail}")]
    return manifest, verify_directory(directory, manifest, report, check_stop)


def verify_directory(
    directory: Path, manifest: Manifest, report: Report, check_stop: Callable[[], None]
) -> list[FileVerdict]:
    """Hash every file of a manifest in a directory and return a verdict for each.

    Files with piece hashes are checked piece by piece on all cores, which also says where a file is wrong;
    the others by their whole-file digests.

    Raises:
        Interrupted: ``check_stop`` raised it.
    """
    return [_verify_file(directory / entry.path, entry, report, check_stop) for entry in manifest.files]


def _verify_file(path: Path, entry: FileEntry, report: Report, check_stop: Callable[[], None]) -> FileVerdict:
    size = entry.size or 0
    try:
        actual_size = path.stat().st_size
        if not path.is_file():
            return FileVerdict(entry.path, size, "expected a regular file, got something else")
        if entry.size is not None and actual_size != entry.size:
            return FileVerdict(entry.path, size, f"expected {entry.size} bytes, got {actual_size}")
        if entry.pieces is not None:
            return _verify_pieces(path, entry, report, check_stop)
        return _verify_whole(path, entry, report, check_stop)
    except OSError as error:
        return FileVerdict(entry.path, size, f"expected a readable file, got: {error.strerror or error}")


def _verify_pieces(path: Path, entry: FileEntry, report: Report, check_stop: Callable[[], None]) -> FileVerdict:
    assert entry.pieces is not None
    size, done = entry.size or 0, 0

    def advance(length: int) -> None:
        nonlocal done
        check_stop()
        done += length
        report(BytesVerified(entry.path, done, size))

    bad = find_bad_pieces(path, size, entry.pieces, advance)
    if not bad:
        return FileVerdict(entry.path, size)
    problem = f"{len(bad)} of {len(entry.pieces.sha256)} pieces differ, the first at bytes {bad[0]}"
    return FileVerdict(entry.path, size, problem, tuple(bad))


def _verify_whole(path: Path, entry: FileEntry, report: Report, check_stop: Callable[[], None]) -> FileVerdict:
    def advance(done: int) -> None:
        check_stop()
        report(BytesVerified(entry.path, done, entry.size or 0))

    algorithms = [digest.algorithm for digest in entry.checks] or ["sha256"]
    hashes = hash_file(path, algorithms, DEFAULT_PIECE_LENGTH, advance)
    for expected in entry.checks:
        actual = hashes.digest(expected.algorithm)
        if actual != expected:
            return FileVerdict(entry.path, entry.size or 0, f"expected {expected}, got {actual}")
    learnt = hashes.pieces if entry.checks and hashes.pieces.sha256 else None
    return FileVerdict(entry.path, entry.size or 0, learnt=learnt)
