"""What a snapshot's tensors are, whatever the layout they are stored in: one sha256 each, by Mistral's name.

Two snapshots whose digests agree hold the same numbers in the same shapes and types: file formats, shards, order and
Hugging Face's arrangement of wq and wk are taken out. Nothing else of the snapshot takes part, and the tensors
need not be those that a configuration implies, so that it can be told which ones are missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mistral_runtime.errors import DtypeMismatch, ShapeMismatch
from mistral_runtime.machine import usable_cores
from mistral_runtime.snapshot import find_weights, load_config
from mistral_runtime.tensor_bytes import stream_bytes, stream_interleaved
from mistral_runtime.weights import DTYPES, PERMUTED_NAMES, TensorInfo, dtype_label, open_tensors

_MAX_THREADS = 8  # each holds a chunk
_HINT = "the weights are damaged or of another architecture; verify the snapshot or fetch it again"


@dataclass(frozen=True)
class TensorDigest:
    """One tensor: its number type as safetensors calls it, its shape, the sha256 of its bytes in row-major order."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    def fields(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {"dtype": self.dtype, "shape": list(self.shape), "sha256": self.sha256}


@dataclass(frozen=True)
class SnapshotDigest:
    """The tensors of one snapshot by Mistral's names, sorted."""

    directory: Path
    layout: str
    files: tuple[str, ...]
    tensor_bytes: int
    tensors: dict[str, TensorDigest]

    @property
    def sha256(self) -> str:
        """The sha256 of one line a tensor: name, type, shape and digest as a JSON list without spaces."""
        total = hashlib.sha256()
        for name, tensor in self.tensors.items():
            line = [name, tensor.dtype, list(tensor.shape), tensor.sha256]
            total.update(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        return total.hexdigest()

    def fields(self) -> dict[str, Any]:
        """Return what `--json` prints; documented in docs/runtime.md."""
        return {
            "directory": str(self.directory),
            "layout": self.layout,
            "files": list(self.files),
            "tensor_bytes": self.tensor_bytes,
            "tensors_sha256": self.sha256,
            "tensors": {name: tensor.fields() for name, tensor in self.tensors.items()},
        }


def digest_snapshot(directory: Path) -> SnapshotDigest:
    """Hash every tensor of a snapshot, on all usable cores.

    Raises:
        CheckpointError: The weights are damaged, hostile or in no layout that is known.
    """
    files = find_weights(directory)
    head_dim = load_config(directory, files.layout).head_dim if files.layout == "huggingface" else None
    stored, read = open_tensors(files, allow_views=True)
    names = sorted(stored)
    for name in names:
        _check(name, stored[name], head_dim)
    with ThreadPoolExecutor(min(usable_cores(), _MAX_THREADS)) as pool:
        found = pool.map(lambda name: _hash(name, stored[name], read, head_dim), names)
        digests = {
            name: TensorDigest(dtype_label(stored[name].dtype), stored[name].shape, sha256)
            for name, sha256 in zip(names, found, strict=True)
        }
    size = sum(info.nbytes for info in stored.values())
    return SnapshotDigest(directory, files.layout, tuple(path.name for path in files.paths), size, digests)


def _hash(name: str, info: TensorInfo, read: Callable[[TensorInfo], Tensor], head_dim: int | None) -> str:
    hasher = hashlib.sha256()
    if info.nbytes:  # sizes of an empty tensor may be beyond all bounds
        tensor = read(info)
        is_permuted = head_dim and name.endswith(PERMUTED_NAMES)
        for chunk in stream_interleaved(tensor, head_dim) if head_dim and is_permuted else stream_bytes(tensor):
            hasher.update(chunk)
    return hasher.hexdigest()


def _check(name: str, info: TensorInfo, head_dim: int | None) -> None:
    if info.dtype not in DTYPES.values():
        raise DtypeMismatch(
            f"the tensor {info.stored_name} in {info.path} has another number type",
            detail=f"expected bfloat16, float16 or float32, found {info.dtype}",
            hint=_HINT,
        )
    if head_dim and name.endswith(PERMUTED_NAMES) and (len(info.shape) != 2 or info.shape[0] % head_dim):
        raise ShapeMismatch(
            f"the tensor {info.stored_name} in {info.path} has another shape",
            detail=f"expected rows for whole heads of {head_dim}, found {info.shape}",
            hint=_HINT,
        )
