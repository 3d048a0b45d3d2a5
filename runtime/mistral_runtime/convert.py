"""`consolidated.00.pth` into `consolidated.safetensors`: the same tensors under the same names, without the pickle.

Owns the safetensors file that is written and the order in which it becomes real: header, data, sync, name. The bytes
are those of the source, so the result is what any reader of the source would have got. Peak memory does not
depend on the size of the model.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_runtime.errors import BadRequest, DiskFull, WriteFailed
from mistral_runtime.machine import peak_resident_bytes
from mistral_runtime.snapshot import find_weights, load_config
from mistral_runtime.tensor_bytes import stream_bytes
from mistral_runtime.weights import Checkpoint, dtype_label, open_checkpoint

# Names everything that decides the result's bytes; another number where they change.
RECIPE = "safetensors-1"
OUTPUT_NAME = "consolidated.safetensors"
# Data that begins on a page can be mapped, and read past the page cache, as it lies.
DATA_ALIGNMENT = 4096
# So much is left unsynced at a time: the disk works from the start, and the last sync is short.
_SYNC_BYTES = 256 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Converted:
    """The file that was written, and what it took."""

    path: Path
    size: int
    sha256: str
    tensors: int
    dtype: str
    seconds: float

    def fields(self) -> dict[str, Any]:
        """Return what `--json` prints; documented in docs/runtime.md."""
        return {
            "file": self.path.name,
            "size": self.size,
            "sha256": self.sha256,
            "recipe": RECIPE,
            "tensors": self.tensors,
            "dtype": self.dtype,
            "seconds": round(self.seconds, 6),
            "peak_rss_bytes": peak_resident_bytes(),
        }


def convert(snapshot: Path, out: Path, *, reserve_bytes: int = 0) -> Converted:
    """Write the safetensors copy of a snapshot's `.pth` into the directory `out`, which must exist.

    Nothing has the result's name before all of it is on the disk.

    Args:
        snapshot: A snapshot in the torrent's layout; see docs/runtime.md.
        out: Where to write.
        reserve_bytes: How much of the disk to leave free.

    Raises:
        BadRequest: The snapshot's weights are no pickle, or the result is there already.
        CheckpointError: The weights are damaged, hostile or not those of the configuration.
        DiskFull: There is no room for the result.
        WriteFailed: The disk refused.
    """
    started = time.perf_counter()
    checkpoint = _open_source(snapshot)
    header = build_header(checkpoint)
    target = out / OUTPUT_NAME
    if target.exists():
        raise BadRequest(f"{target} is there already", detail="expected no such file", hint="name another directory")
    size = len(header) + checkpoint.weight_bytes
    try:
        _require_room(out, size, reserve_bytes)
        sha256 = _write_durably(target, header, checkpoint)
    except OSError as error:
        raise _explain(error, target) from error
    dtype = dtype_label(checkpoint.dtype)
    return Converted(target, size, sha256, len(checkpoint.tensors), dtype, time.perf_counter() - started)


def _open_source(snapshot: Path) -> Checkpoint:
    files = find_weights(snapshot)
    if files.layout != "consolidated.pth":
        raise BadRequest(
            f"{snapshot} has nothing to convert",
            detail=f"expected consolidated.00.pth alone, found {files.paths[0].name}, which holds no pickle",
            hint="use the directory as it is",
        )
    return open_checkpoint(files, load_config(snapshot, files.layout), allow_views=True)


def build_header(checkpoint: Checkpoint) -> bytes:
    """Return everything before the data: the length, the JSON, and spaces up to the alignment.

    Source: the section "Format" of the safetensors README. The tensors lie in the order of the checkpoint.
    """
    fields: dict[str, Any] = {"__metadata__": {"format": "pt", "recipe": RECIPE}}
    position = 0
    for name, info in checkpoint.tensors.items():
        end = position + info.nbytes
        fields[name] = {
            "dtype": dtype_label(checkpoint.dtype),
            "shape": list(info.shape),
            "data_offsets": [position, end],
        }
        position = end
    encoded = json.dumps(fields, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % DATA_ALIGNMENT)
    return len(encoded).to_bytes(8, "little") + encoded


def _require_room(out: Path, size: int, reserve_bytes: int) -> None:
    free = shutil.disk_usage(out).free
    if free < size + reserve_bytes:
        raise DiskFull(
            f"not enough space in {out}",
            detail=f"expected {size + reserve_bytes} bytes free ({size} to write, {reserve_bytes} in reserve), "
            f"found {free}",
            hint="free some space, or convert to another disk",
        )


def _write_durably(target: Path, header: bytes, checkpoint: Checkpoint) -> str:
    """Write the file under a hidden name, sync it, then name it; return its sha256."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        with _Writer(temporary) as writer:
            writer.write(memoryview(header))
            for info in checkpoint.tensors.values():
                for chunk in stream_bytes(checkpoint.read(info)):
                    writer.write(chunk)
            sha256 = writer.finish()
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(target.parent)
    return sha256


class _Writer:
    """Writes a new file from front to back, hashing each chunk and syncing the earlier ones meanwhile."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._hasher = hashlib.sha256()
        self._position = self._synced = 0
        # One thread each, so that a sync never delays a hash; hashlib and the disk let Python go on.
        self._hash_thread, self._sync_thread = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._sync: Future[None] | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_details: object) -> None:
        self._hash_thread.shutdown()
        self._sync_thread.shutdown()
        os.close(self._descriptor)

    def write(self, chunk: memoryview) -> None:
        """Append a chunk; it may change once this returns."""
        hashed = self._hash_thread.submit(self._hasher.update, chunk)
        while chunk:
            written = os.pwrite(self._descriptor, chunk, self._position)
            self._position += written
            chunk = chunk[written:]
        hashed.result()
        if self._position - self._synced >= _SYNC_BYTES:
            self._await_sync()
            self._synced = self._position
            self._sync = self._sync_thread.submit(os.fsync, self._descriptor)

    def finish(self) -> str:
        """Make all of the file durable and return its sha256."""
        self._await_sync()
        os.fsync(self._descriptor)
        return self._hasher.hexdigest()

    def _await_sync(self) -> None:
        # Its errors are ours: a failed sync is reported to one caller only.
        if self._sync is not None:
            self._sync.result()
            self._sync = None


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: OSError, target: Path) -> DiskFull | WriteFailed:
    kind = DiskFull if error.errno in _FULL else WriteFailed
    return kind(
        f"cannot write {target}",
        detail=f"expected room and permission, found: {error.strerror or error}",
        hint="free some space, check the directory, or convert to another disk",
    )
