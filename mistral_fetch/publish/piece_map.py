"""Which pieces of a model are here and who sent them, drawn together into a bounded number of cells."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mistral_fetch.events import PieceView
from mistral_fetch.sources.urls import host_of

MAX_CELLS = 960
ON_DISK = "on this disk"
# A letter for each source in a cell; the last one stands for all that are left.
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_MISSING = "."


class PieceMap:
    """The pieces of the files under way. Thread-safe.

    A view takes a lock of its own, and who reports to us may hold it: so nothing is looked at under our lock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._views: Sequence[PieceView] = ()
        self._verified: set[str] = set()
        self._last: dict[str, Mapping[int, str]] = {}
        self._names: list[str] = []

    def open(self, views: Sequence[PieceView]) -> None:
        """Draw these files from now on."""
        with self._lock:
            self._clear()
            self._views = views

    def verified(self, path: str) -> None:
        """Note that a file is complete, whatever becomes of its pieces' record."""
        looks = [(view, view.senders()) for view in self._views if view.path == path]
        with self._lock:
            for view, senders in looks:
                self._take_in(view, senders)
            self._verified.add(path)

    def told(self) -> dict[str, Any]:
        """Return the picture: for each cell the letter of who sent most of it, and how full it is, from 0 to 9."""
        looks = [(view, view.senders()) for view in self._views]
        with self._lock:
            for view, seen in looks:
                self._take_in(view, seen)
            return self._drawn()

    def _drawn(self) -> dict[str, Any]:
        pieces = sum(view.count for view in self._views)
        per_cell = max(1, -(-pieces // MAX_CELLS))
        senders, filled = [], []
        cell: list[str] = []
        for sender in self._pieces():
            cell.append(sender)
            if len(cell) == per_cell:
                senders.append(self._letter(cell))
                filled.append(_level(cell))
                cell = []
        if cell:
            senders.append(self._letter(cell))
            filled.append(_level(cell))
        return {
            "pieces": pieces,
            "pieces_per_cell": per_cell,
            "senders": "".join(senders),
            "filled": "".join(filled),
            "legend": dict(zip(_LETTERS, self._names[: len(_LETTERS)], strict=False)),
        }

    def _pieces(self) -> Iterator[str]:
        """Yield for each piece of each file who sent it, '' where it is missing."""
        for view in self._views:
            senders = self._last.get(view.path, {})
            otherwise = ON_DISK if view.path in self._verified else ""
            for index in range(view.count):
                yield senders.get(index, otherwise)

    def _take_in(self, view: PieceView, senders: Mapping[int, str]) -> None:
        """Keep who sent what: as it is, or as it was before the record of a complete file was given up."""
        if view.path not in self._verified:
            self._last[view.path] = {index: source_name(sender) for index, sender in senders.items()}

    def _letter(self, cell: Sequence[str]) -> str:
        present = Counter(filter(None, cell))
        if not present:
            return _MISSING
        name = present.most_common(1)[0][0]
        if name not in self._names:
            self._names.append(name)
        return _LETTERS[min(self._names.index(name), len(_LETTERS) - 1)]


def _level(cell: Sequence[str]) -> str:
    present = sum(map(bool, cell))
    # A cell that is not empty is never 0, and one that is not full never 9.
    return "9" if present == len(cell) else str(min(8, -(-present * 9 // len(cell))))


def source_name(label: str) -> str:
    """Return what people call a source: a host, a torrent, or this disk; never a path or an address with a query."""
    if label.startswith(("http://", "https://")):
        return host_of(label)
    return ON_DISK if not label or label.startswith("/") else label
