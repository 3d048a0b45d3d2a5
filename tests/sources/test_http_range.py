"""One connection's request while other connections change its run: no byte gets another piece's number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mistral_fetch.events import Event
from mistral_fetch.manifest import FileEntry, MirrorUrl
from mistral_fetch.simulators.mirror import MirrorSimulator
from mistral_fetch.sources.base import Target
from mistral_fetch.sources.http_client import HttpClient
from mistral_fetch.sources.http_range import RangeRequest
from mistral_fetch.sources.mirror_state import Growth, MirrorState
from mistral_fetch.sources.retry import Backoff, RetryPolicy
from mistral_fetch.sources.schedule import Run
from mistral_fetch.sources.tar_index import TarIndex
from mistral_fetch.store.partials import Partial
from tests.sources.conftest import DATA, HASHES, NAME, PIECE, SHA256

LAST = len(HASHES.sha256) - 1


class Taker:
    """Whoever made the request: keeps what it is given, and lets a test act in between."""

    chunk_bytes = 10_000

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self.meanwhile = meanwhile
        self.pieces: list[tuple[int, bytes]] = []

    def report(self, event: Event) -> None:
        """Take an event."""

    def is_wanted(self, run: Run) -> bool:
        """Answer that it is."""
        return True

    def received(self, run: Run, length: int) -> bool:
        """Answer that the run is wanted, and let it be lost right after that."""
        self.meanwhile()
        return True

    def piece_is_whole(self, run: Run, index: int, data: memoryview, fresh_bytes: int, seconds: float) -> None:
        """Keep a piece."""
        self.pieces.append((index, bytes(data)))


def request(client: HttpClient, mirror: MirrorSimulator, directory: Path, run: Run) -> RangeRequest:
    state = MirrorState(mirror.base_url, "mirror", Growth(1, 1), Backoff(RetryPolicy()))
    entry = FileEntry(NAME, len(DATA), (SHA256,), HASHES)
    target = Target(entry, Partial(directory, len(DATA), HASHES))
    buffer = memoryview(bytearray(PIECE))
    return RangeRequest(client, TarIndex(client), target, MirrorUrl(mirror.url(NAME)), state, run, buffer)


@pytest.mark.parametrize("index", [3, LAST])
def test_a_run_that_loses_the_race_for_its_last_piece_keeps_that_piece_s_number(
    client: HttpClient, mirror: MirrorSimulator, tmp_path: Path, index: int
) -> None:
    run = Run(0, "mirror", index, index + 1, 0.0)

    def lose() -> None:
        # What Schedule.piece_done does to the loser, from the winner's thread.
        run.is_abandoned, run.next = True, index + 1

    taker = Taker(lose)
    request(client, mirror, tmp_path / "partial", run).ask(taker)
    assert all(data == DATA[at * PIECE : (at + 1) * PIECE] for at, data in taker.pieces)


def test_a_run_that_is_lost_before_it_asks_is_not_asked_for(
    client: HttpClient, mirror: MirrorSimulator, tmp_path: Path
) -> None:
    run = Run(0, "mirror", LAST + 1, LAST + 1, 0.0, is_abandoned=True)
    request(client, mirror, tmp_path / "partial", run).ask(Taker(lambda: None))
    assert mirror.requests() == []
