"""The record that lets the next process trust what this one wrote, without reading it again.

libtorrent believes its resume data blindly. So the record is written only after a clean stop (flush, fsync, then
save), names size and time of change of every data file and the boot it was made in, and is deleted before the first
byte of the next run. Where anything differs there is no record, and every piece is hashed from the disk again.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from pathlib import Path

from mistral_fetch.bittorrent.metainfo import Metainfo
from mistral_fetch.store.durable import boot_id, disk_errors, fsync_directory, make_directory, write_durably
from mistral_fetch.units import MIB

RECORD_NAME = "clean-stop.json"
MAX_RECORD_BYTES = 64 * MIB


def save_record(state_directory: Path, metainfo: Metainfo, data_paths: Mapping[int, Path], resume_data: bytes) -> None:
    """Make the data files durable, then the record of them.

    Raises:
        StoreError: The disk refused.
    """
    sync_files(data_paths)
    record = {
        "resume_data": base64.b64encode(resume_data).decode(),
        **_circumstances(metainfo, data_paths),
    }
    with disk_errors("recording a download", state_directory):
        write_durably(state_directory / RECORD_NAME, json.dumps(record).encode())


def take_record(state_directory: Path, metainfo: Metainfo, data_paths: Mapping[int, Path]) -> bytes | None:
    """Return the resume data of the last clean stop if nothing changed since, and delete the record.

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
    if record is None:
        return None
    try:
        resume_data = base64.b64decode(str(record.pop("resume_data", "")), validate=True)
    except binascii.Error:
        return None
    return resume_data if resume_data and record == _circumstances(metainfo, data_paths) else None


def sync_files(data_paths: Mapping[int, Path]) -> None:
    """Make the bytes of the files durable. libtorrent must have been flushed before.

    Raises:
        StoreError: The disk refused.
    """
    for path in data_paths.values():
        with disk_errors("syncing a download", path):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _read(path: Path) -> dict[str, object] | None:
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            return None
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _circumstances(metainfo: Metainfo, data_paths: Mapping[int, Path]) -> dict[str, object]:
    return {
        "format": 1,
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
