"""Half-open byte ranges and the piece grid. Pure arithmetic; pieces and segments are built on it.

Worked example, a 10-byte file on a grid of 4: pieces are ``[0,4) [4,8) [8,10)``. With ``[2,9)`` present,
only piece 1 is wholly there, and ``[0,2) [9,10)`` are missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Span:
    """The bytes from ``start`` up to, not including, ``end``."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise ValueError(f"not a span: [{self.start}, {self.end})")

    @property
    def length(self) -> int:
        """Return the number of bytes."""
        return self.end - self.start

    def __str__(self) -> str:
        return f"[{self.start}, {self.end})"


def merge(spans: Iterable[Span]) -> list[Span]:
    """Return the same bytes as sorted, disjoint, non-touching, non-empty spans."""
    merged: list[Span] = []
    for span in sorted(span for span in spans if span.length):
        if merged and span.start <= merged[-1].end:
            merged[-1] = Span(merged[-1].start, max(merged[-1].end, span.end))
        else:
            merged.append(span)
    return merged


def subtract(whole: Span, taken: Iterable[Span]) -> list[Span]:
    """Return the parts of ``whole`` that no span of ``taken`` covers."""
    rest: list[Span] = []
    position = whole.start
    for span in merge(taken):
        if span.end <= position:
            continue
        if span.start >= whole.end:
            break
        if span.start > position:
            rest.append(Span(position, span.start))
        position = span.end
    if position < whole.end:
        rest.append(Span(position, whole.end))
    return rest


def total_length(spans: Iterable[Span]) -> int:
    """Return how many bytes the spans cover, overlaps counted once."""
    return sum(span.length for span in merge(spans))


@dataclass(frozen=True)
class PieceGrid:
    """A file of ``size`` bytes cut into pieces of ``piece_length``; the last one may be shorter."""

    size: int
    piece_length: int

    def __post_init__(self) -> None:
        if self.size < 0 or self.piece_length <= 0:
            raise ValueError(f"not a grid: {self.size} bytes in pieces of {self.piece_length}")

    @property
    def count(self) -> int:
        """Return the number of pieces; an empty file has none."""
        return -(-self.size // self.piece_length)

    def span(self, index: int) -> Span:
        """Return where piece ``index`` lies."""
        start = index * self.piece_length
        if not 0 <= start < self.size:
            raise IndexError(f"piece {index} of {self.count}")
        return Span(start, min(start + self.piece_length, self.size))

    def spans(self) -> Iterator[Span]:
        """Yield every piece's span in order."""
        return (self.span(index) for index in range(self.count))

    def whole_pieces(self, present: Iterable[Span]) -> list[int]:
        """Return the indices of the pieces that lie wholly within ``present``."""
        indices: list[int] = []
        for span in merge(present):
            first = -(-span.start // self.piece_length)
            last = self.count if span.end >= self.size else span.end // self.piece_length
            indices.extend(range(first, last))
        return indices
