"""From spans that are right on the disk to recorded pieces of the partials: two grids that need not agree.

A torrent's pieces run over its files; a partial's begin with its file. A piece of a partial is recorded when the last
of its bytes was proved. Knows no torrent.
"""

from __future__ import annotations

from collections.abc import Mapping

from mistral_fetch.spans import Span
from mistral_fetch.store.partials import Partial


class SpanRecorder:
    """Records pieces as their bytes are proved; each byte is proved once.

    Args:
        partials: By the file's index in the torrent.
        label: Who sent the bytes.
    """

    def __init__(self, partials: Mapping[int, Partial], label: str) -> None:
        self._partials = partials
        self._label = label
        self._left: dict[tuple[int, int], int] = {}

    def proved(self, index: int, span: Span) -> None:
        """Note that a span of a file is right on the disk.

        Raises:
            StoreError: The disk refused.
        """
        grid = self._partials[index].grid
        for piece in range(span.start // grid.piece_length, (span.end - 1) // grid.piece_length + 1):
            whole = grid.span(piece)
            overlap = min(span.end, whole.end) - max(span.start, whole.start)
            left = self._left.pop((index, piece), whole.length) - overlap
            if left:
                self._left[index, piece] = left
            else:
                self._partials[index].record_written(piece, self._label)

    def forget(self) -> None:
        """Take everything back: a file is not what was proved."""
        self._left.clear()
        for partial in self._partials.values():
            partial.keep_only(())

    def flush(self) -> None:
        """Make what was recorded durable.

        Raises:
            StoreError: The disk refused.
        """
        for partial in self._partials.values():
            partial.flush()
