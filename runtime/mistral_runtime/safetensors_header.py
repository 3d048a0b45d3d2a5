"""Validate a safetensors file's header before anything else looks at the file.

The format on one screen: 8 bytes little-endian N, then N bytes of JSON mapping each tensor's name to
`{"dtype", "shape", "data_offsets": [begin, end]}`, then the data those half-open offsets point into. Example: a
file of 8 + 96 + 12 bytes with one tensor `[0, 12]` of F32 and shape [3].

Owns every rule about that header (attacks it answers: a length beyond the file or absurdly long, offsets out of
range, overlapping or leaving bytes unaccounted for, a size that is not shape times dtype). Reads no tensor data.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_runtime.errors import MalformedCheckpoint
from mistral_runtime.strict_json import parse_object, require_regular_file

MAX_HEADER_BYTES = 100_000_000  # the cap of the reference implementation; Mistral 7B's header is 33 KB
# Data that begins on a page can be mapped, and read past the page cache, as it lies.
DATA_ALIGNMENT = 4096
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
HINT = "the file is damaged or hostile; verify the snapshot, or fetch it again"

BYTES_PER_VALUE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `begin` and `end` are offsets into the data after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def load_header(path: Path) -> dict[str, TensorEntry]:
    """Return the validated header of a safetensors file.

    Raises:
        MalformedCheckpoint: Any rule is broken; the message gives expected and actual.
        MissingFile: There is no such regular file.
    """
    size = require_regular_file(path, hint=HINT)
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _malformed(
                path,
                f"a header of at most {min(max(size - 8, 0), MAX_HEADER_BYTES)} bytes",
                f"a claimed length of {length} bytes in a file of {size}",
            )
        header = stream.read(length)
    try:
        return parse_header(header, data_bytes=size - 8 - length)
    except ValueError as error:
        raise _malformed(path, "a header that accounts for every byte of the file", str(error)) from error


def encode_header(fields: dict[str, Any]) -> bytes:
    """Return everything before a file's data: the length, the JSON, and spaces up to the alignment."""
    encoded = json.dumps(fields, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % DATA_ALIGNMENT)
    return len(encoded).to_bytes(8, "little") + encoded


def parse_header(header: bytes, *, data_bytes: int) -> dict[str, TensorEntry]:
    """Return the tensors that `header` lists in a file with `data_bytes` bytes after it.

    Raises:
        ValueError: Any rule is broken.
    """
    values = parse_object(header)
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not a map from text to text")
    if len(values) > MAX_TENSORS:
        raise ValueError(f"{len(values)} tensors, more than {MAX_TENSORS}")
    entries = {name: _parse_entry(name, value) for name, value in values.items()}
    _require_exact_cover(entries, data_bytes)
    return entries


def _parse_entry(name: str, value: Any) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES_PER_VALUE:
        raise ValueError(f"{name!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name!r} has the impossible shape {str(shape)[:80]}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name!r} has the impossible data_offsets {str(offsets)[:80]}")
    begin, end = offsets
    expected = math.prod(shape) * BYTES_PER_VALUE[dtype]
    if end - begin != expected:
        raise ValueError(f"{name!r} spans {end - begin} bytes where its shape and dtype need {expected}")
    return TensorEntry(dtype, tuple(shape), begin, end)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _require_exact_cover(entries: dict[str, TensorEntry], data_bytes: int) -> None:
    """Raise unless the tensors lie end to end: an overlap or a hole is how one file shows two faces."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            kind = "overlaps its neighbour" if entry.begin < position else "leaves a hole before it"
            raise ValueError(f"{name!r} {kind}: begins at {entry.begin}, expected {position}")
        position = entry.end
    if position != data_bytes:
        raise ValueError(f"the tensors end at byte {position} of {data_bytes} bytes of data")


def _malformed(path: Path, expected: str, found: str) -> MalformedCheckpoint:
    return MalformedCheckpoint(
        f"{path} is not a valid safetensors file", detail=f"expected {expected}, found {found}", hint=HINT
    )
