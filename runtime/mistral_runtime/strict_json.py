"""Read small JSON objects from files that somebody else wrote.

Owns the caps and the strictness (size, duplicate keys, NaN, nesting); knows nothing of what the keys mean.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, NoReturn

from mistral_runtime.errors import CheckpointError, MissingFile

MAX_CONFIG_BYTES = 1 << 20  # params.json and config.json are below 1 KB
MAX_INDEX_BYTES = 16 << 20  # Mistral 7B's index is 25 KB, Mixtral 8x22B's about 200 KB


def require_regular_file(path: Path, *, hint: str) -> int:
    """Return the size of `path` in bytes, following links.

    Raises:
        MissingFile: It is absent, or a directory, pipe or device (which could block or never end).
    """
    try:
        status = path.stat()
    except OSError as error:
        raise MissingFile(
            f"cannot read {path}", detail=f"expected a file, found: {error.strerror or error}", hint=hint
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise MissingFile(f"cannot read {path}", detail="expected a regular file, found something else", hint=hint)
    return status.st_size


def parse_object(data: bytes) -> dict[str, Any]:
    """Return the JSON object in `data`.

    Raises:
        ValueError: Not UTF-8, not JSON, not an object, a duplicate key, NaN or Infinity, or nested absurdly.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"an object was expected, not {type(value).__name__}")
    return value


def load_object(path: Path, *, max_bytes: int, error_class: type[CheckpointError], hint: str) -> dict[str, Any]:
    """Read the JSON object in `path`; every failure is an `error_class` or `MissingFile` that names the file."""
    size = require_regular_file(path, hint=hint)
    if size > max_bytes:
        raise error_class(f"{path} is too large", detail=f"expected at most {max_bytes} bytes, found {size}", hint=hint)
    try:
        with path.open("rb") as stream:
            data = stream.read(max_bytes + 1)
    except OSError as error:
        raise MissingFile(
            f"cannot read {path}", detail=f"expected a readable file, found: {error.strerror or error}", hint=hint
        ) from error
    try:
        return parse_object(data)
    except ValueError as error:
        raise error_class(
            f"{path} is not valid", detail=f"expected one JSON object, found: {error}", hint=hint
        ) from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Two readers may pick different ones of two equal keys; what was checked must be what is used.
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key[:80]!r} appears twice")
        result[key] = value
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
