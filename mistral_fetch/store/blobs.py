"""Verified bytes, named by their sha256. A blob gets its name only after its whole content matched.

The order of a commit, so that a power cut at any line leaves nothing wrong and loses nothing verified:

1. fsync the data, so that what is hashed is what will be there.
2. Hash the file from disk; compare size and every digest the manifest gave.
3. Write ``committed.json`` in the partial: which blob this is about to become.
4. Rename it to its digest, fsync both directories, make it read-only (last, so that a crash never leaves a
   partial that the next run may not write).

The partial's directory stays, holding only that note, until the snapshot is complete: a crash in between
finds the blob again even when the manifest knew no sha256 beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mistral_fetch import system
from mistral_fetch.digest import Digest
from mistral_fetch.errors import DigestMismatch, IntegrityError, SizeMismatch, StoreError
from mistral_fetch.events import BytesVerified, Notice, Report
from mistral_fetch.manifest import DEFAULT_PIECE_LENGTH, FileEntry
from mistral_fetch.store.crash_points import reached
from mistral_fetch.store.durable import disk_errors, fsync_directory, rename_durably
from mistral_fetch.store.hashing import FileHashes, hash_file
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.partial_notes import CommittedBlob
from mistral_fetch.store.partials import Partial


def find_blob(layout: Layout, sha256: str, size: int) -> Path | None:
    """Return the blob's path if it is there with its full size."""
    path = layout.blob(sha256)
    try:
        return path if path.stat().st_size == size else None
    except OSError:
        return None


def adopt_blob(
    layout: Layout,
    entry: FileEntry,
    report: Report,
    check_stop: Callable[[], None],
    on_damage: Callable[[Path, FileHashes | None], object] | None = None,
) -> CommittedBlob | None:
    """Take a blob that another model or an earlier pull brought, after reading all of it again.

    A blob that does not have the content it is named by loses its name: it is handed to ``on_damage`` with what it
    was found to be (None where its size is wrong), or else discarded. Whoever links to it gets it anew by pulling.

    Raises:
        StoreError: The disk refused.
        Interrupted: ``check_stop`` raised it.
    """
    path = layout.blob(entry.sha256 or "-")
    if not path.is_file():
        return None

    def lose(hashes: FileHashes | None) -> None:
        if on_damage is None:
            discard_blob(path, entry, report)
        else:
            on_damage(path, hashes)

    def advance(done: int) -> None:
        check_stop()
        report(BytesVerified(entry.path, done, entry.size or 0))

    algorithms = {"sha256", *(digest.algorithm for digest in entry.checks)}
    piece_length = entry.pieces.length if entry.pieces else DEFAULT_PIECE_LENGTH
    with disk_errors("reading what the cache holds", path):
        if path.stat().st_size != entry.size:
            lose(None)
            return None
        hashes = hash_file(path, sorted(algorithms), piece_length, advance)
        if hashes.digest("sha256").value != entry.sha256:
            lose(hashes)
            return None
    compare(entry, hashes)
    return CommittedBlob(hashes.digest("sha256").value, hashes.size, hashes.pieces)


def discard_blob(path: Path, entry: FileEntry, report: Report) -> None:
    """Delete a blob that is not what its name says."""
    path.unlink(missing_ok=True)
    fsync_directory(path.parent)
    report(Notice(f"{entry.path}: the cache's copy was damaged and is discarded"))


def commit_partial(
    layout: Layout,
    entry: FileEntry,
    partial: Partial,
    report: Report,
    check_stop: Callable[[], None],
    hashes: FileHashes | None = None,
) -> CommittedBlob:
    """Verify a filled partial as a whole and turn it into a blob.

    Args:
        layout: The cache.
        entry: What was promised of the file.
        partial: Its bytes, all of them present.
        report: Told how far the file is hashed.
        check_stop: Called meanwhile; may raise.
        hashes: What reading the whole file gave, if that was done while it was filled.

    Raises:
        SizeMismatch, DigestMismatch: The bytes are not the promised ones; the partial is left as it was.
        StoreError: The disk refused, or another process took the bytes away.
        Interrupted: ``check_stop`` raised it; the partial is left as it was.
    """
    begun = partial.generation
    partial.prepare()
    partial.close()
    if partial.generation != begun:  # whatever was hashed, it is not what has the name now
        raise StoreError(
            f"another process took the bytes of {entry.path} away before they were verified",
            detail=f"expected the file that was filled at {partial.data_path}, got another one",
            hint="run the same command again",
        )
    with disk_errors("verifying a download", partial.data_path):
        system.sync_path(partial.data_path)
        hashes = hashes or _hash_reporting(entry, partial, report, check_stop)
    compare(entry, hashes)
    reached("commit-hashed")
    blob = CommittedBlob(hashes.digest("sha256").value, hashes.size, hashes.pieces)
    with disk_errors("publishing a verified file", layout.blob(blob.sha256)):
        partial.set_committed(blob)
        reached("commit-noted")
        rename_durably(partial.data_path, layout.blob(blob.sha256))
        reached("blob-named")
        seal_blob(layout.blob(blob.sha256))
        reached("blob-sealed")
    return blob


def seal_blob(path: Path) -> None:
    """Make a blob read-only, unless it is a hard link: its mode may be that of the user's own file."""
    status = path.stat()
    if status.st_mode & 0o222 and status.st_nlink == 1:
        path.chmod(0o444)


def compare(entry: FileEntry, hashes: FileHashes) -> None:
    """Check a file's hashes against everything the manifest says about it.

    Raises:
        SizeMismatch, DigestMismatch: With expected and actual.
    """
    if entry.size is not None and hashes.size != entry.size:
        raise SizeMismatch(
            f"{entry.path} has the wrong size",
            detail=f"expected {entry.size} bytes, got {hashes.size}",
            hint=_REFETCH,
        )
    for expected in entry.checks:
        actual = hashes.digest(expected.algorithm)
        if actual != expected:
            raise digest_mismatch(entry.path, expected, actual)
    if entry.pieces is not None and entry.pieces.length == hashes.pieces.length and entry.pieces != hashes.pieces:
        raise IntegrityError(
            f"the piece hashes of {entry.path} contradict its sha256",
            detail="expected pieces that belong to the file, got others",
            hint="the manifest is inconsistent: do not use it, and tell its publisher",
        )


_REFETCH = "run the command again to fetch it anew; if it persists, the source serves another file"


def digest_mismatch(path: str, expected: Digest, actual: Digest) -> DigestMismatch:
    """Return the error for a whole file that differs."""
    return DigestMismatch(
        f"{path} is not the file that was promised", detail=f"expected {expected}, got {actual}", hint=_REFETCH
    )


def _hash_reporting(entry: FileEntry, partial: Partial, report: Report, check_stop: Callable[[], None]) -> FileHashes:
    def advance(done: int) -> None:
        check_stop()
        report(BytesVerified(entry.path, done, partial.grid.size))

    algorithms = {"sha256", *(digest.algorithm for digest in entry.checks)}
    piece_length = entry.pieces.length if partial.known_pieces and entry.pieces else DEFAULT_PIECE_LENGTH
    return hash_file(partial.data_path, sorted(algorithms), piece_length, advance)
