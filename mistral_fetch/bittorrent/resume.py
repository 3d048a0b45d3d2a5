"""The record that lets the next process trust what this one wrote, without reading it again.

libtorrent believes what it is told to have. So the record is written only after a clean stop (flush, fsync, then
save), names size and time of change of every data file and the boot it was made in, and is deleted before the first
byte of the next run. Where anything differs there is no record, and every piece is hashed from the disk again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mistral_fetch import system
from mistral_fetch.bittorrent.metainfo import Metainfo
from mistral_fetch.store.durable import boot_id, disk_errors, fsync_directory, make_directory, write_durably
from mistral_fetch.units import MIB

RECORD_NAME = "clean-stop.json"
MAX_RECORD_BYTES = 64 * MIB


@dataclass(frozen=True)
class PieceRecord:
    """Which pieces are verified, and which blocks of the pieces that were begun are there."""

    have: tuple[bool, ...]
    unfinished: Mapping[int, tuple[bool, ...]]


def save_record(state_directory: Path, metainfo: Metainfo, data_paths: Mapping[int, Path], pieces: PieceRecord) -> None:
    """Make the data files durable, then the record of them.

    Raises:
        StoreError: The disk refused.
    """
    sync_files(data_paths)
    record = {
        **_circumstances(metainfo, data_paths),
        "have": _to_text(pieces.have),
        "unfinished": {str(index): _to_text(blocks) for index, blocks in sorted(pieces.unfinished.items())},
    }
    with disk_errors("recording a download", state_directory):
        write_durably(state_directory / RECORD_NAME, json.dumps(record).encode())


def take_record(state_directory: Path, metainfo: Metainfo, data_paths: Mapping[int, Path]) -> PieceRecord | None:
    """Return the record of the last clean stop if nothing changed since, and delete it.

    Raises:
        StoreError: The disk refused.
    """
    path = state_directory / RECORD_NAME
    with disk_errors("reading the state of a download", state_directory):
        make_directory(state_directory)
        record = _read(path)
        # Deleted durably before anything is written: after a kill there must be no record that looks valid.
        path.unlink(missing_ok=True)
        fsync_directory(state_directory)
    have, unfinished = record.pop("have", None), record.pop("unfinished", None)
    if record != _circumstances(metainfo, data_paths) or not isinstance(unfinished, dict):
        return None
    pieces = PieceRecord(_from_text(have), {int(index): _from_text(blocks) for index, blocks in unfinished.items()})
    return pieces if len(pieces.have) == metainfo.piece_count else None


def sync_files(data_paths: Mapping[int, Path]) -> None:
    """Make the bytes of the files durable. libtorrent must have been flushed before.

    Raises:
        StoreError: The disk refused.
    """
    for path in data_paths.values():
        with disk_errors("syncing a download", path):
            system.sync_path(path)


def _read(path: Path) -> dict[str, object]:
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            return {}
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _to_text(flags: Iterable[bool]) -> str:
    return "".join("1" if flag else "0" for flag in flags)


def _from_text(text: object) -> tuple[bool, ...]:
    return tuple(digit == "1" for digit in str(text))


def _circumstances(metainfo: Metainfo, data_paths: Mapping[int, Path]) -> dict[str, object]:
    return {
        "format": 2,
        "boot": boot_id(),
        "info_hash_v1": metainfo.info_hash_v1,
        "info_hash_v2": metainfo.info_hash_v2,
        "files": {str(index): _fingerprint(path) for index, path in sorted(data_paths.items())},
    }


def _fingerprint(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return [status.st_ino, status.st_size, status.st_mtime_ns]
