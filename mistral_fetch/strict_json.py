"""Read JSON from strangers: every key and every value has to be expected.

Owns decoding with limits and small readers that compose (``listed(integer(0, 9))``). A reader takes a JSON
value and where it stands, and returns a checked value or raises ``UnexpectedJson``. It refuses to know what
any document means, and nothing here does I/O.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

MAX_ITEMS = 1000  # entries of any one list or table
MAX_TEXT = 1000  # characters of any one text
MAX_URL = 2048

T = TypeVar("T")
Read = Callable[[Any, str], T]


class UnexpectedJson(ValueError):
    """A value is not what its place demands; callers turn this into an error of their own."""

    def __init__(self, where: str, expected: str, actual: str) -> None:
        super().__init__(f"{where}: expected {expected}, got {actual}")
        self.where = where
        self.expected = expected
        self.actual = actual


def refuse(where: str, expected: str, actual: Any) -> NoReturn:
    """Raise ``UnexpectedJson``; ``actual`` is shown by its ``repr``, so nothing in it reaches a terminal raw."""
    shown = f"{type(actual).__name__} of {len(actual)}" if isinstance(actual, list | dict) else repr(actual)[:80]
    raise UnexpectedJson(where, expected, shown)


def decode(data: bytes, max_bytes: int) -> Any:
    """Return the JSON document in ``data``: UTF-8, finite numbers, no key twice in one table.

    Raises:
        UnexpectedJson: It is larger than ``max_bytes``, or not such a document.
    """
    if len(data) > max_bytes:
        refuse("the file", f"at most {max_bytes} bytes", len(data))
    try:
        return json.loads(data.decode(), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except UnexpectedJson:
        raise
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise UnexpectedJson("the file", "JSON in UTF-8", str(error)[:200] or type(error).__name__) from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            refuse("the file", "every key once in its table", key)
        table[key] = value
    return table


def _refuse_constant(name: str) -> NoReturn:
    refuse("the file", "finite numbers", name)


def text(value: Any, where: str) -> str:
    """Read one line of text; nothing in it can move a terminal's cursor."""
    if not isinstance(value, str) or not value or len(value) > MAX_TEXT or not value.isprintable():
        refuse(where, f"1 to {MAX_TEXT} printable characters", value)
    return value


def integer(low: int, high: int) -> Read[int]:
    """Return a reader of whole numbers from ``low`` to ``high``."""

    def read(value: Any, where: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            refuse(where, f"a whole number from {low} to {high}", value)
        return value

    return read


def number_or_null(value: Any, where: str) -> float | None:
    """Read a number, or null for a thing that is known to be absent."""
    return None if value is None else number(value, where)


def number(value: Any, where: str) -> float:
    """Read a number of sane size; a whole one stays whole."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= 1e12:
        refuse(where, "a number", value)
    return value


def accepted(test: Callable[[str], object], expected: str) -> Read[str]:
    """Return a reader of strings that pass ``test``."""

    def read(value: Any, where: str) -> str:
        if not isinstance(value, str) or not test(value):
            refuse(where, expected, value)
        return value

    return read


def matching(pattern: str, expected: str) -> Read[str]:
    """Return a reader of strings that match a whole regular expression."""
    return accepted(re.compile(pattern, re.ASCII).fullmatch, expected)


def one_of(*values: str) -> Read[str]:
    """Return a reader of a closed set of strings."""
    return accepted(frozenset(values).__contains__, "one of " + ", ".join(repr(value) for value in sorted(values)))


def url(*schemes: str) -> Read[str]:
    """Return a reader of addresses: one of ``schemes``, a host, plain ASCII, no credentials."""

    def is_url(value: str) -> bool:
        if len(value) > MAX_URL or not value.isascii() or not value.isprintable() or " " in value:
            return False
        try:
            parts = urlsplit(value)
            return parts.scheme in schemes and bool(parts.hostname) and "@" not in parts.netloc and parts.port != 0
        except ValueError:
            return False

    return accepted(is_url, f"an address with the scheme {' or '.join(schemes)}, a host and no credentials")


def listed(read: Read[T]) -> Read[tuple[T, ...]]:
    """Return a reader of lists."""

    def read_list(value: Any, where: str) -> tuple[T, ...]:
        if not isinstance(value, list) or len(value) > MAX_ITEMS:
            refuse(where, f"a list of at most {MAX_ITEMS} entries", value)
        return tuple(read(item, f"{where}[{index}]") for index, item in enumerate(value))

    return read_list


def table(read: Read[T], read_key: Read[str]) -> Read[dict[str, T]]:
    """Return a reader of tables whose keys are data."""

    def read_table(value: Any, where: str) -> dict[str, T]:
        if not isinstance(value, dict) or len(value) > MAX_ITEMS:
            refuse(where, f"a table of at most {MAX_ITEMS} entries", value)
        return {read_key(key, where): read(item, f"{where}.{key}") for key, item in value.items()}

    return read_table


class Fields:
    """A table whose keys are known, taken apart key by key; what is left at the end is refused by name."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            refuse(where, "a table", value)
        self._rest: dict[str, Any] = dict(value)
        self.where = where

    def required(self, key: str, read: Read[T]) -> T:
        """Take the value of ``key``, which must be there."""
        if key not in self._rest:
            raise UnexpectedJson(self.where, f"the key {key!r}", "none")
        return read(self._rest.pop(key), f"{self.where}.{key}")

    def optional(self, key: str, read: Read[T], default: T) -> T:
        """Take the value of ``key``, or ``default`` when it is absent."""
        return self.required(key, read) if key in self._rest else default

    def maybe(self, key: str, read: Read[T]) -> T | None:
        """Take the value of ``key``, or None when it is absent."""
        return self.required(key, read) if key in self._rest else None

    def entries(self, key: str, read: Read[T]) -> tuple[T, ...]:
        """Take a list, empty when it is absent."""
        return self.optional(key, listed(read), ())

    def done(self) -> None:
        """Refuse whatever was not taken."""
        if self._rest:
            names = ", ".join(repr(key)[:80] for key in list(self._rest)[:5])
            raise UnexpectedJson(self.where, "only known keys", names)
