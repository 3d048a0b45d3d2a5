"""How a source that brings whole pieces in an order of its own helps to fill files: the two sides' contract.

A mirror is asked for bytes from one place on. A swarm brings pieces as its peers have them, and only such as are
right. So it says which pieces it could bring, is told which of them are wanted now, and hands them over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from mistral_fetch.events import Report
from mistral_fetch.sources.base import StopSignal, Target

PieceKey = tuple[int, int]
"""The number of the file among the targets, and that of the piece on the grid of its partial."""


class PieceAsker(Protocol):
    """Whoever wants pieces; safe to call from the giver's thread."""

    @property
    def is_over(self) -> bool:
        """Return whether nothing is wanted any more."""

    @property
    def is_alone(self) -> bool:
        """Return whether nobody else brings anything at present, so that silence has to end some time."""

    def choose(self, has: Callable[[int, int], bool]) -> set[PieceKey]:
        """Return which pieces to bring now, given which ones can be had; replaces what was wanted before."""

    def advanced(self, received_bytes: Mapping[PieceKey, int]) -> None:
        """Note how much has come so far of pieces that are not whole yet."""

    def bring(self, key: PieceKey, data: bytes | bytearray | memoryview) -> None:
        """Verify and keep a whole piece.

        Raises:
            TorrentMismatch: It is right for the giver and wrong for the manifest.
            StoreError: The disk refused.
        """


class PieceGiver(Protocol):
    """Brings pieces until nothing is wanted any more; used from one thread."""

    @property
    def label(self) -> str:
        """Return the name shown to people."""

    def give(self, targets: Sequence[Target], asker: PieceAsker, report: Report, stop: StopSignal) -> None:
        """Bring what is asked for, or raise why that is impossible.

        Raises:
            TransferError, IntegrityError, ManifestError: Nothing can be had here any more.
            StoreError, Interrupted: See :class:`~mistral_fetch.sources.base.Source`.
        """
