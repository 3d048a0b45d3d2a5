"""Pulls in this process, as the command line makes them, and the one question asked after each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mistral_fetch.bittorrent.metainfo import parse_metainfo
from mistral_fetch.bittorrent.seed import Seeder
from mistral_fetch.bittorrent.settings import SwarmSettings
from mistral_fetch.config import Settings
from mistral_fetch.errors import MirrorError
from mistral_fetch.events import Event
from mistral_fetch.ref import parse_ref
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.sources.retry import Backoff
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.snapshots import find_snapshot, list_refs
from mistral_fetch.transfer.channels import PullResult
from mistral_fetch.transfer.pull import pull


@dataclass
class Puller:
    """One cache, and what was reported while it was filled."""

    home: Path
    events: list[Event] = field(default_factory=list)
    stop: StopSignal = field(default_factory=StopSignal)

    def __call__(
        self, ref: str, *, refresh: bool = False, adopt_from: Sequence[Path] = (), **settings: Any
    ) -> PullResult:
        """Pull, with patience for a test only."""
        patience: dict[str, Any] = {
            "connect_timeout": 2.0,
            "read_timeout": 1.0,
            "peer_timeout": 1.0,
            "stall_timeout": 5.0,
            "lock_timeout": 20.0,
            "dht": False,
            "disk_reserve": 0,
        }
        chosen = Settings(home=self.home, **(patience | settings))
        return pull(parse_ref(ref), chosen, self.report, self.stop, refresh=refresh, adopt_from=adopt_from)

    def report(self, event: Event) -> None:
        """Remember what happened."""
        self.events.append(event)

    def of_kind(self, kind: type[Any]) -> list[Any]:
        """Return the events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    def assert_nothing_published(self) -> None:
        """Check that no name exists, and that whatever has a digest for a name is right."""
        layout = Layout(self.home)
        assert list_refs(layout) == []
        assert [path for path in self.home.glob("snapshots/*") if find_snapshot(layout, path.name)] == []
        self.assert_blobs_are_right()

    def assert_blobs_are_right(self) -> None:
        """Check the one rule: published means that the digest matches."""
        for blob in self.home.glob("blobs/sha256/*/*"):
            assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name

    def assert_exact(self, result: PullResult, publisher: PublisherSimulator) -> None:
        """Check that every byte arrived, and that nothing unfinished is left."""
        found = {path: (result.directory / path).read_bytes() for path in publisher.files}
        assert found == publisher.files
        self.assert_blobs_are_right()
        assert list(self.home.glob("partial/*")) == []


@pytest.fixture
def puller(own_home: Path) -> Puller:
    return Puller(own_home)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait a moment only before a mirror is asked again."""
    delay_after = Backoff.delay_after

    def shortly(self: Backoff, error: MirrorError) -> float | None:
        delay = delay_after(self, error)
        return None if delay is None else min(delay, 0.01)

    monkeypatch.setattr(Backoff, "delay_after", shortly)


Seed = Callable[[Path, Path], str]


@pytest.fixture
def seed() -> Iterator[Seed]:
    """Return a function that seeds a torrent's directory in this process and gives the peer's ``host:port``."""
    running: list[Seeder] = []

    def start(torrent: Path, directory: Path) -> str:
        settings = SwarmSettings(listen_interfaces="127.0.0.1:0", use_trackers=False, uploads=True)
        seeder = Seeder(parse_metainfo(torrent.read_bytes()), directory, settings)
        running.append(seeder)
        seeder.wait_until_seeding(30)
        return f"127.0.0.1:{seeder.port}"

    yield start
    for seeder in running:
        seeder.close()
