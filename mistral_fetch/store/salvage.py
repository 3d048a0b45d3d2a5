"""A damaged blob becomes a partial that has all of it but the damage, so that only the bad pieces are fetched again.

Its good pieces are those whose hashes are the manifest's. Whether the whole is right is asked again, as of every
partial, before it becomes a blob once more.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from mistral_fetch import system
from mistral_fetch.errors import PieceMismatch
from mistral_fetch.events import Notice, Report
from mistral_fetch.manifest import FileEntry
from mistral_fetch.store.adopt import ADOPTED_PREFIX, clone_file
from mistral_fetch.store.blobs import discard_blob
from mistral_fetch.store.durable import disk_errors, fsync_directory, make_directory, rename_durably
from mistral_fetch.store.hashing import FileHashes, find_bad_pieces
from mistral_fetch.store.journal import JournalWriter
from mistral_fetch.store.partials import Partial


def salvage_blob(
    path: Path,
    entry: FileEntry,
    partial: Partial,
    hashes: FileHashes | None,
    report: Report,
    check_stop: Callable[[], None],
) -> bool:
    """Turn a damaged blob into the file's partial, or discard it where nothing of it can be told to be right.

    Args:
        path: The blob; its name is free afterwards.
        entry: What it should be.
        partial: The file's partial; bytes it has are kept. It must be opened anew to see the others.
        hashes: What the blob was found to be, if it was read; it is not where its size is wrong.
        report: Told how much is kept.
        check_stop: Called between reads; may raise, and then the blob is still there.

    Returns:
        Whether there is anything new in the partial.

    Raises:
        StoreError: The disk refused.
        Interrupted: ``check_stop`` raised it.
    """
    with disk_errors("keeping what is right of a damaged file", path):
        good = _good_pieces(path, partial, hashes, check_stop)
        if not good:
            discard_blob(path, entry, report)
            return False
        if partial.has_bytes or not _become_data(path, partial, good):
            _copy_pieces(path, partial, good, check_stop)
            _forget(path)
    report(
        Notice(f"{entry.path}: the cache's copy is damaged; {len(good)} of its {partial.grid.count} pieces are right")
    )
    return True


def _good_pieces(
    path: Path, partial: Partial, hashes: FileHashes | None, check_stop: Callable[[], None]
) -> dict[int, str]:
    known = partial.known_pieces
    if known is None:
        return {}
    if hashes is None:
        found = find_bad_pieces(path, partial.grid.size, known, lambda _: check_stop())
        bad = {span.start // known.length for span in found}
        return {index: sha256 for index, sha256 in enumerate(known.sha256) if index not in bad}
    pairs = zip(known.sha256, hashes.pieces.sha256, strict=True)
    good = {index: expected for index, (expected, actual) in enumerate(pairs) if expected == actual}
    # All of them, in a file that is wrong as a whole: the pieces belong to another file than the sha256.
    return good if len(good) < len(known.sha256) else {}


def _become_data(path: Path, partial: Partial, good: dict[int, str]) -> bool:
    """Let the blob's own file, or a clone of it, be the partial's data; false where that would touch the user's.

    The record comes before the name, so that a crash in between leaves a blob that is salvaged again. It is not
    believed until then: there is no data of the right size beside it.
    """
    partial.reset()
    make_directory(partial.directory)
    status = path.lstat()
    source = path
    if status.st_nlink > 1 or path.is_symlink():
        source = partial.directory / f"{ADOPTED_PREFIX}{secrets.token_hex(4)}"
        with path.open("rb") as file:
            if not clone_file(file.fileno(), source):
                return False
    source.chmod(0o644)
    descriptor = os.open(source, os.O_RDWR | system.BINARY)
    try:
        os.ftruncate(descriptor, partial.grid.size)
        system.sync_file(descriptor)
    finally:
        os.close(descriptor)
    journal = JournalWriter(partial.directory, partial.grid)
    try:
        journal.append(good)
    finally:
        journal.close()
    rename_durably(source, partial.data_path)
    if source != path:
        _forget(path)
    return True


def _forget(path: Path) -> None:
    """Take the blob's name away; the user's own file keeps its name and its bytes."""
    path.unlink(missing_ok=True)
    fsync_directory(path.parent)


def _copy_pieces(path: Path, partial: Partial, good: dict[int, str], check_stop: Callable[[], None]) -> None:
    missing = set(partial.missing_pieces())
    try:
        with path.open("rb", buffering=0) as file:
            for index in sorted(missing & set(good)):
                check_stop()
                _copy_piece(file.fileno(), index, partial)
    finally:
        partial.close()


def _copy_piece(descriptor: int, index: int, partial: Partial) -> None:
    span = partial.grid.span(index)
    data = system.read_at(descriptor, span.length, span.start)
    if len(data) != span.length:
        return  # cut short since it was hashed: then this piece is fetched
    try:
        partial.put(index, data, "this cache")
    except PieceMismatch:
        return  # somebody is writing to it right now: then this piece is fetched
