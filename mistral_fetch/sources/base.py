"""The contract every source keeps; ``tests/contract/`` holds the suite that checks it.

A source fills partials. It never decides that a file is right as a whole: the store does that, from the
bytes on disk, before the file becomes visible.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mistral_fetch.digest import Assurance
from mistral_fetch.errors import Interrupted
from mistral_fetch.events import Report
from mistral_fetch.manifest import FileEntry
from mistral_fetch.store.partials import Partial


@dataclass(frozen=True)
class Target:
    """One file to fill: what it should be, and where its unfinished bytes lie."""

    entry: FileEntry
    partial: Partial


class StopSignal:
    """Set once from a signal handler; asked by sources between reads."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Ask everything to stop at the next safe place."""
        self._event.set()

    def is_set(self) -> bool:
        """Return whether a stop was asked for."""
        return self._event.is_set()

    def wait(self, seconds: float) -> bool:
        """Sleep up to ``seconds``; return early and true when a stop is asked for."""
        return self._event.wait(seconds)

    def check(self) -> None:
        """Raise ``Interrupted`` if a stop was asked for."""
        if self._event.is_set():
            raise Interrupted(
                "stopped before the transfer was complete",
                detail="everything verified so far is kept",
                hint="run the same command again to go on",
            )


class Source(Protocol):
    """Something that can fill partials.

    ``fetch`` returns when every target's partial holds ``entry.size`` bytes, each of them made durable and
    recorded. It may be called again on half-filled partials, by this process or a later one, and then fetches
    only what is missing (at most one batch is fetched twice after a kill). Retrying what may pass is the
    source's own business; what it raises is final for this source:

    Raises:
        TransferError: This source cannot deliver; ``is_permanent`` tells whether to ask it again later.
        IntegrityError: It sent wrong bytes; nothing wrong was recorded as present.
        AccessError: It wants credentials.
        StoreError: The disk, not the source, is at fault.
        Interrupted: ``stop`` was set; what is verified is recorded.
    """

    label: str
    """The name shown to people and kept in ``PROVENANCE.json``; never holds credentials."""

    assurance: Assurance
    """What a finished fetch proves by itself: ``SIZE`` for a mirror, ``BTV1`` or ``BTV2`` for a torrent."""

    def fetch(self, targets: Sequence[Target], report: Report, stop: StopSignal) -> None:
        """Fill every target's partial."""
