"""`consolidated.00.pth` into `consolidated.safetensors`: the same tensors under the same names, without the pickle.

Owns the safetensors file that is written. Its data are the source's bytes: the kernel copies them from file to file
where a tensor lies in one piece, and only views with strides are put together here. Peak memory does not depend on the
size of the model.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_runtime.errors import BadRequest, DiskFull, WriteFailed
from mistral_runtime.file_writer import new_file
from mistral_runtime.machine import peak_resident_bytes
from mistral_runtime.mapped_file import find_mappings, offset_of
from mistral_runtime.safetensors_header import encode_header
from mistral_runtime.snapshot import find_weights, load_config
from mistral_runtime.tensor_bytes import flat_bytes, stream_bytes
from mistral_runtime.weights import Checkpoint, dtype_label, open_checkpoint

# Names everything that decides the result's bytes; another number where they change.
RECIPE = "safetensors-1"
OUTPUT_NAME = "consolidated.safetensors"
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
        require_room(out, size, reserve_bytes)
        sha256 = _write(target, header, checkpoint)
    except OSError as error:
        raise explain_write_error(error, target) from error
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
    return encode_header(fields)


def require_room(out: Path, size: int, reserve_bytes: int) -> None:
    """Raise DiskFull unless so much, and the reserve, is free."""
    free = shutil.disk_usage(out).free
    if free < size + reserve_bytes:
        raise DiskFull(
            f"not enough space in {out}",
            detail=f"expected {size + reserve_bytes} bytes free ({size} to write, {reserve_bytes} in reserve), "
            f"found {free}",
            hint="free some space, or write to another disk",
        )


def _write(target: Path, header: bytes, checkpoint: Checkpoint) -> str:
    """Write header and tensors and return the file's sha256."""
    path = checkpoint.files.paths[0]
    source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        mappings = find_mappings(path)
        with new_file(target) as writer:
            writer.write(memoryview(header))
            for info in checkpoint.tensors.values():
                tensor = checkpoint.read(info)
                offset = offset_of(tensor.data_ptr(), tensor.nbytes, mappings) if tensor.is_contiguous() else None
                copied = 0 if offset is None else writer.copy(source, offset, tensor.nbytes)
                for chunk in stream_bytes(flat_bytes(tensor)[copied:] if copied else tensor):
                    writer.write(chunk)
            return writer.finish()
    finally:
        os.close(source)


def explain_write_error(error: OSError, target: Path) -> DiskFull | WriteFailed:
    """Return our error for one of the system's."""
    kind = DiskFull if error.errno in _FULL else WriteFailed
    return kind(
        f"cannot write {target}",
        detail=f"expected room and permission, found: {error.strerror or error}",
        hint="free some space, check the directory, or write to another disk",
    )
