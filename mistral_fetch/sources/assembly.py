"""From a stream of bytes at known offsets to whole missing pieces, through one reusable buffer.

A piece cut off by a broken connection keeps what came: the next answer continues within it.
"""

from __future__ import annotations

from mistral_fetch.spans import Span
from mistral_fetch.store.partials import Partial


class PieceAssembler:
    """Fills one partial from one source; memory is one piece.

    Args:
        partial: Where whole pieces go.
        source: Who is blamed for a wrong piece; printed.
    """

    def __init__(self, partial: Partial, source: str) -> None:
        self._partial = partial
        self._source = source
        grid = partial.grid
        self._buffer = memoryview(bytearray(min(grid.piece_length, grid.size)))
        self._index = -1
        self._filled = 0
        self._missing: set[int] = set()
        self.refresh()

    def refresh(self) -> None:
        """Ask the partial anew what is missing."""
        self._missing = set(self._partial.missing_pieces())
        if self._index not in self._missing:
            self._index, self._filled = -1, 0

    def forget(self) -> int:
        """Drop the unfinished piece and return how many bytes of it are lost."""
        lost, self._index, self._filled = self._filled, -1, 0
        return lost

    @property
    def index(self) -> int:
        """Return which piece is in the buffer, -1 for none."""
        return self._index

    @property
    def buffered(self) -> memoryview:
        """Return the bytes of the unfinished (or just refused) piece."""
        return self._buffer[: self._filled]

    @property
    def is_complete(self) -> bool:
        """Return whether nothing is missing."""
        return not self._missing

    def next_span(self) -> Span | None:
        """Return the first run of missing bytes, after what the buffer holds already; None when complete."""
        if not self._missing:
            return None
        grid = self._partial.grid
        first = last = min(self._missing)
        while last + 1 in self._missing:
            last += 1
        start = grid.span(first).start + (self._filled if first == self._index else 0)
        return Span(start, grid.span(last).end)

    def feed(self, offset: int, chunk: bytes) -> bool:
        """Take the file's bytes from ``offset`` on, skip those that are here; return whether a piece became whole.

        Raises:
            PieceMismatch: A piece that became whole is wrong; it stays in the buffer for the report.
            StoreError: The disk refused.
        """
        view = memoryview(chunk)
        grid = self._partial.grid
        count_before = len(self._missing)
        while view:
            index = offset // grid.piece_length
            span = grid.span(index)
            part = view[: span.end - offset]
            if index in self._missing:
                self._take(index, offset - span.start, part, span.length)
            offset += len(part)
            view = view[len(part) :]
        return len(self._missing) < count_before

    def _take(self, index: int, position: int, part: memoryview, piece_length: int) -> None:
        if index != self._index:
            if position != 0:
                return  # the answer began inside a piece whose first bytes we do not have
            self._index, self._filled = index, 0
        overlap = self._filled - position
        if not 0 <= overlap < len(part):
            return
        fresh = part[overlap:]
        self._buffer[self._filled : self._filled + len(fresh)] = fresh
        self._filled += len(fresh)
        if self._filled == piece_length:
            self._partial.put(index, self.buffered, self._source)
            self._missing.discard(index)
            self._index, self._filled = -1, 0
