"""The hash tree of BitTorrent v2 (BEP 52): SHA-256 over 16 KiB leaves. Pure functions over digests.

Worked example with four leaves a piece, for a file of six leaves: piece 0 is ``root(L0 L1 L2 L3)``, piece 1 is
``root(L4 L5 Z Z)`` where ``Z`` is 32 zero bytes, and the file's root is ``H(piece 0, piece 1)``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from mistral_fetch.units import KIB

LEAF_LENGTH = 16 * KIB
_ZERO = bytes(32)


def leaves(data: bytes | bytearray | memoryview) -> list[bytes]:
    """Return the digests of the 16 KiB blocks of ``data``; the last block may be shorter and is not padded."""
    view = memoryview(data)
    return [hashlib.sha256(view[at : at + LEAF_LENGTH]).digest() for at in range(0, len(view), LEAF_LENGTH)]


def root(digests: Sequence[bytes], width: int, padding: bytes = _ZERO) -> bytes:
    """Return the root over ``digests``, filled up with ``padding`` to ``width`` nodes (a power of two)."""
    level = list(digests)
    while width > 1:
        if len(level) % 2:
            level.append(padding)
        level = [hashlib.sha256(level[i] + level[i + 1]).digest() for i in range(0, len(level), 2)]
        padding = hashlib.sha256(padding + padding).digest()
        width //= 2
    return level[0] if level else padding


def file_root(layer: Sequence[bytes], piece_length: int) -> bytes:
    """Return a file's ``pieces root`` from its piece layer (more than one piece)."""
    empty_piece = root((), piece_length // LEAF_LENGTH)
    return root(layer, next_power_of_two(len(layer)), empty_piece)


def next_power_of_two(count: int) -> int:
    """Return the smallest power of two that is at least ``count``."""
    return 1 << max(count - 1, 0).bit_length()
