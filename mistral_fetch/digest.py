"""Digests as values, how far each one can be trusted, and hashers that stream.

Owns the algorithm names and their order of assurance. Knows nothing of files or networks.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

_HEX_LENGTH = {"sha256": 64, "sha1": 40, "gitsha1": 40, "md5": 32}


class Assurance(IntEnum):
    """What vouches for a file, strongest last so that ``max`` and ``>=`` read naturally.

    ``GITSHA1`` is the git blob id that Hugging Face gives for small files: SHA-1 over a header with the
    length and the whole content. It ranks just above ``BTV1`` (SHA-1 pieces, BEP 3), which it equals in
    strength. ``BTV2`` is a SHA-256 Merkle root per file (BEP 52).
    """

    SIZE = 10
    MD5 = 20
    BTV1 = 30
    GITSHA1 = 31
    BTV2 = 40
    SHA256 = 50
    SIGNED = 60

    @property
    def label(self) -> str:
        """Return the name used on the command line and in ``PROVENANCE.json``."""
        return self.name.lower()

    @classmethod
    def parse(cls, label: str) -> Assurance:
        """Return the level called ``label``.

        Raises:
            ValueError: There is no such level.
        """
        try:
            return cls[label.upper()]
        except KeyError:
            names = ", ".join(level.label for level in cls)
            raise ValueError(f"unknown assurance {label!r}; one of {names}") from None


_ASSURANCE = {"sha256": Assurance.SHA256, "gitsha1": Assurance.GITSHA1, "md5": Assurance.MD5}


@dataclass(frozen=True, order=True)
class Digest:
    """An algorithm and a lower-case hexadecimal value. ``str()`` gives ``sha256:9f86…``.

    Raises:
        ValueError: Unknown algorithm, or a value of the wrong length or alphabet.
    """

    algorithm: str
    value: str

    def __post_init__(self) -> None:
        length = _HEX_LENGTH.get(self.algorithm)
        if length is None:
            raise ValueError(f"unknown digest algorithm {self.algorithm!r}")
        if not re.fullmatch(rf"[0-9a-f]{{{length}}}", self.value):
            raise ValueError(f"not a {self.algorithm} value: {self.value[:80]!r}")

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.value}"

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Return the digest written as ``algorithm:hex``."""
        algorithm, _, value = text.partition(":")
        return cls(algorithm, value.lower())

    @property
    def assurance(self) -> Assurance | None:
        """Return what a match of this digest over a whole file proves, or None for a piece algorithm."""
        return _ASSURANCE.get(self.algorithm)


class Hash(Protocol):
    """The part of :mod:`hashlib` objects that is used here."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        """Feed more bytes."""

    def hexdigest(self) -> str:
        """Return the value so far."""


def new_hash(algorithm: str, size: int) -> Hash:
    """Return a hash object for a file of ``size`` bytes (the git blob id begins with the length).

    Raises:
        ValueError: Unknown algorithm.
    """
    if algorithm not in _HEX_LENGTH:
        raise ValueError(f"unknown digest algorithm {algorithm!r}")
    if algorithm == "gitsha1":
        hasher = hashlib.sha1(usedforsecurity=False)
        hasher.update(b"blob %d\0" % size)
        return hasher
    return hashlib.new(algorithm, usedforsecurity=algorithm == "sha256")


def sha256_of(data: bytes | memoryview) -> Digest:
    """Return the sha256 digest of bytes in memory."""
    return Digest("sha256", hashlib.sha256(data).hexdigest())
