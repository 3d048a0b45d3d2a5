"""The file in which the scores of mirrors are kept from run to run. Nothing depends on it, so nothing fails by it."""

from __future__ import annotations

from contextlib import suppress

from mistral_fetch.sources.scores import ScoreBook
from mistral_fetch.store.durable import write_durably
from mistral_fetch.store.layout import Layout

MAX_BYTES = 256 * 1024


def load_scores(layout: Layout) -> ScoreBook:
    """Return what earlier runs learnt, or an empty book where the file is missing, unreadable or too large."""
    try:
        with layout.mirror_scores.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError:
        return ScoreBook()
    return ScoreBook.from_json(data) if len(data) <= MAX_BYTES else ScoreBook()


def save_scores(layout: Layout, book: ScoreBook) -> None:
    """Keep what was learnt, if anything was and the cache is there. A disk that refuses has better ways to say so."""
    if book.has_changed and layout.home.is_dir():
        with suppress(OSError):
            write_durably(layout.mirror_scores, book.to_json())
