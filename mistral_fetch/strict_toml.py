"""Read TOML from strangers: with limits, and with the line where something is wrong.

Owns decoding and finding lines; what the tables mean is read with the readers of :mod:`mistral_fetch.strict_json`,
which say where a value stands as ``.model[0].ref``.
"""

from __future__ import annotations

import re
import sys
from typing import Any

from mistral_fetch.strict_json import UnexpectedJson

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_HEADER = re.compile(r"\s*(\[\[?)\s*([\w.-]+)\s*\]")
_KEY = re.compile(r"""\s*["']?([\w.-]+)["']?\s*=""")


def decode_toml(data: bytes, max_bytes: int) -> dict[str, Any]:
    """Return the TOML document in ``data``.

    Raises:
        UnexpectedJson: It is larger than ``max_bytes``, or not such a document.
    """
    if len(data) > max_bytes:
        raise UnexpectedJson("the file", f"at most {max_bytes} bytes", "more")
    try:
        document: dict[str, Any] = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and TOMLDecodeError are ValueErrors
        raise UnexpectedJson("the file", "TOML in UTF-8", str(error)[:200] or type(error).__name__) from None
    return document


def toml_text(text: str) -> str:
    """Return a text as a basic string of TOML, which is also one of JSON; control characters are escaped."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'


def explain(data: bytes, error: UnexpectedJson) -> str:
    """Return what was expected and what came, with the line it stands in where that can be found."""
    unknown = re.match(r"'([\w.-]+)'", error.actual) if error.expected == "only known keys" else None
    where = f"{error.where}.{unknown[1]}" if unknown else error.where
    line = find_line(data.decode("utf-8", "replace"), where)
    place = f"line {line}, {where.lstrip('.')}" if line else where.lstrip(".") or "the file"
    return f"{place}: expected {error.expected}, got {error.actual}"


def find_line(text: str, where: str) -> int | None:
    """Return the line of ``model[1].file[0].size`` in a document whose tables have headers; else its table's line."""
    wanted, table, nearest = where.lstrip("."), "", None
    counts: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if header := _HEADER.match(line):
            table = _resolve(header[2].split("."), header[1] == "[[", counts)
            if wanted == table or wanted.startswith(f"{table}."):
                nearest = number  # a table within comes after the one around it
        elif key := _KEY.match(line):
            full = f"{table}.{key[1]}".lstrip(".")
            if wanted == full or wanted.startswith((f"{full}[", f"{full}.")):
                return number
    return nearest


def _resolve(parts: list[str], is_list: bool, counts: dict[str, int]) -> str:
    """Return a header's full place; ``counts`` has the index of the last entry of every list so far."""
    path = ""
    for depth, part in enumerate(parts, 1):
        path = f"{path}.{part}".lstrip(".")
        if is_list and depth == len(parts):
            counts[path] = counts.get(path, -1) + 1
        if path in counts:
            path = f"{path}[{counts[path]}]"
    return path
