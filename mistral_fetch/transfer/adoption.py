"""Which files may be adopted instead of fetched, and the first candidate of theirs that is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mistral_fetch.digest import Assurance
from mistral_fetch.events import Report
from mistral_fetch.manifest import FileEntry
from mistral_fetch.store.adopt import adopt_file
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.partial_notes import CommittedBlob
from mistral_fetch.store.partials import Partial
from mistral_fetch.transfer.shelves import Shelf


@dataclass(frozen=True)
class Adopted:
    """A blob made of bytes that were here already, and where they were found."""

    blob: CommittedBlob
    label: str


@dataclass(frozen=True)
class Adopter:
    """Where to look, and under which conditions what is found may be used."""

    shelves: Sequence[Shelf]
    floor: Assurance
    reserve_bytes: int

    def find(self, entry: FileEntry) -> list[tuple[Shelf, Path]]:
        """Return what may be this file, the likeliest first; nothing is read.

        A file without a whole-file digest that reaches the floor has no candidates: nobody could say it is right.
        """
        if entry.assurance is Assurance.SIZE or entry.assurance < self.floor:
            return []
        return [(shelf, path) for shelf in self.shelves for path in shelf.candidates(entry)]

    def adopt(
        self, layout: Layout, entry: FileEntry, partial: Partial, report: Report, check_stop: Callable[[], None]
    ) -> Adopted | None:
        """Return the blob made of the first candidate that is right, or None.

        Raises:
            StoreError: The cache's disk refused.
            Interrupted: ``check_stop`` raised it.
        """
        for shelf, path in self.find(entry):
            blob = adopt_file(layout, entry, partial, path, self.reserve_bytes, report, check_stop)
            if blob is not None:
                return Adopted(blob, shelf.label)
        return None
