"""Where a mapped file's bytes lie: an address of this process to an offset in the file, as the kernel tells it.

With it the kernel can copy a tensor from file to file without its bytes passing through this process. Linux only;
elsewhere, and wherever something does not fit, the answer is that it is not known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# address range, permissions, offset, device, inode, path; see proc_pid_maps(5)
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ ([0-9]+) +(/.*)")


@dataclass(frozen=True)
class Mapping:
    """A span of addresses, half-open, and the offset in the file that its first byte has."""

    begin: int
    end: int
    offset: int


def find_mappings(path: Path, maps: Path = Path("/proc/self/maps")) -> list[Mapping]:
    """Return the mappings of a file in this process; none where that cannot be told."""
    try:
        real, inode = str(path.resolve()), path.stat().st_ino
        lines = maps.read_text("utf-8", "surrogateescape").splitlines()
    except (OSError, RuntimeError):
        return []
    matches = [match for match in map(_LINE.fullmatch, lines) if match]
    return [
        Mapping(int(match[1], 16), int(match[2], 16), int(match[3], 16))
        for match in matches
        if (match[5], int(match[4])) == (real, inode)
    ]


def offset_of(address: int, length: int, mappings: list[Mapping]) -> int | None:
    """Return the offset in the file of `length` bytes at an address, or None where no mapping holds them all."""
    for mapping in mappings:
        if mapping.begin <= address and address + length <= mapping.end:
            return mapping.offset + address - mapping.begin
    return None
