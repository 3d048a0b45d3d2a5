"""Bencoding (BEP 3), strict on the way in: hostile bytes end in an error, never in memory or recursion without end.

Owns the encoding alone; what a torrent means is :mod:`mistral_fetch.bittorrent.metainfo`'s business. Values
are ``int``, ``bytes``, ``list`` and ``dict`` with ``bytes`` keys.
"""

from __future__ import annotations

from typing import Any

MAX_DEPTH = 40  # folders of a v2 file tree nest; manifests stop at 16 folders, each of them one level
MAX_VALUES = 400_000  # ten thousand files need about twenty values each
MAX_INTEGER_DIGITS = 19


class BencodeError(ValueError):
    """The bytes are not what BEP 3 calls bencoding, or larger than any honest torrent."""


class Decoder:
    """Reads one value from ``data``; ``spans`` then holds where each top-level dictionary value lay."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0
        self._values = 0
        self.spans: dict[bytes, tuple[int, int]] = {}

    def decode(self) -> Any:
        """Return the value.

        Raises:
            BencodeError: Malformed, cut short, followed by other bytes, too deep or too many values.
        """
        value = self._value(0)
        if self._position != len(self._data):
            raise BencodeError(f"{len(self._data) - self._position} bytes follow the end")
        return value

    def _value(self, depth: int) -> Any:
        self._values += 1
        if depth > MAX_DEPTH or self._values > MAX_VALUES:
            raise BencodeError(f"nested deeper than {MAX_DEPTH} or more than {MAX_VALUES} values")
        first = self._data[self._position : self._position + 1]
        if first == b"i":
            return self._integer()
        if first == b"l":
            return self._list(depth)
        if first == b"d":
            return self._dictionary(depth)
        return self._string()

    def _integer(self) -> int:
        end = self._data.find(b"e", self._position, self._position + MAX_INTEGER_DIGITS + 3)
        text = self._data[self._position + 1 : end] if end > 0 else b""
        digits = text[1:] if text.startswith(b"-") else text
        # One spelling per number: no leading zeros, no minus zero, nothing but digits.
        if not digits.isdigit() or (digits.startswith(b"0") and text != b"0"):
            raise BencodeError(f"not an integer at byte {self._position}")
        self._position = end + 1
        return int(text)

    def _string(self) -> bytes:
        colon = self._data.find(b":", self._position, self._position + 11)
        text = self._data[self._position : colon] if colon > 0 else b""
        if not text.isdigit() or (text.startswith(b"0") and text != b"0"):
            raise BencodeError(f"not a value at byte {self._position}")
        end = colon + 1 + int(text)
        if end > len(self._data):
            raise BencodeError(f"the string at byte {self._position} goes beyond the end")
        self._position = end
        return self._data[colon + 1 : end]

    def _list(self, depth: int) -> list[Any]:
        self._position += 1
        values: list[Any] = []
        while not self._at_end():
            values.append(self._value(depth + 1))
        return values

    def _dictionary(self, depth: int) -> dict[bytes, Any]:
        self._position += 1
        values: dict[bytes, Any] = {}
        while not self._at_end():
            key = self._string()
            # Two readers could each believe another one of two equal keys.
            if key in values:
                raise BencodeError(f"the key {key[:40]!r} is there twice")
            start = self._position
            values[key] = self._value(depth + 1)
            if depth == 0:
                self.spans[key] = (start, self._position)
        return values

    def _at_end(self) -> bool:
        following = self._data[self._position : self._position + 1]
        if not following:
            raise BencodeError("cut short")
        if following == b"e":
            self._position += 1
            return True
        return False


def decode(data: bytes) -> Any:
    """Return the one value that ``data`` holds.

    Raises:
        BencodeError: See :class:`Decoder`.
    """
    return Decoder(data).decode()


def encode(value: Any) -> bytes:
    """Return ``value`` in its one canonical form: keys sorted as bytes, shortest integers.

    Raises:
        TypeError: A value is neither ``int``, ``bytes``, ``list`` nor a ``dict`` with ``bytes`` keys.
    """
    parts: list[bytes] = []
    _encode_into(value, parts)
    return b"".join(parts)


def _encode_into(value: Any, parts: list[bytes]) -> None:
    if isinstance(value, bool) or not isinstance(value, int | bytes | list | dict):
        raise TypeError(f"cannot bencode {type(value).__name__}")
    if isinstance(value, int):
        parts.append(b"i%de" % value)
    elif isinstance(value, bytes):
        parts += (b"%d:" % len(value), value)
    elif isinstance(value, list):
        parts.append(b"l")
        for item in value:
            _encode_into(item, parts)
        parts.append(b"e")
    else:
        parts.append(b"d")
        for key in sorted(value):
            _encode_into(key, parts)
            _encode_into(value[key], parts)
        parts.append(b"e")
