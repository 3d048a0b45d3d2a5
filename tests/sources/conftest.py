"""A small file, a mirror that can lie, and a fetch of it, for the tests of the HTTP side."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mistral_fetch.digest import Digest
from mistral_fetch.events import Event
from mistral_fetch.manifest import FileEntry, MirrorUrl, PieceHashes
from mistral_fetch.simulators.mirror import MirrorSimulator
from mistral_fetch.sources.base import StopSignal, Target
from mistral_fetch.sources.http import HttpSource, Politeness
from mistral_fetch.sources.http_client import HttpClient, HttpSettings
from mistral_fetch.sources.retry import RetryPolicy
from mistral_fetch.store.partials import Partial

OPENSSL = shutil.which("openssl")
PIECE = 64 * 1024
DATA = random.Random(11).randbytes(10 * PIECE + 4321)
NAME = "model.safetensors"
PATIENCE = RetryPolicy(attempts=3, first_delay_seconds=0.01, longest_delay_seconds=0.02)
SHA256 = Digest("sha256", hashlib.sha256(DATA).hexdigest())
HASHES = PieceHashes(
    PIECE, tuple(hashlib.sha256(DATA[at : at + PIECE]).hexdigest() for at in range(0, len(DATA), PIECE))
)


@dataclass
class Download:
    """One file fetched from mirrors into one partial, as often as a test likes."""

    directory: Path
    client: HttpClient
    pins: str = "pieces"  # pieces, sha256 or nothing
    events: list[Event] = field(default_factory=list)
    source: HttpSource | None = None
    connections: int = 1  # so that requests have an order; many at once are for tests of their own

    def entry(self, *urls: str) -> FileEntry:
        """Return the truth about the file."""
        return FileEntry(
            NAME,
            len(DATA),
            () if self.pins == "nothing" else (SHA256,),
            HASHES if self.pins == "pieces" else None,
            tuple(MirrorUrl(url, priority) for priority, url in enumerate(urls)),
        )

    def partial(self) -> Partial:
        """Open the partial anew, on a fine grid whatever is pinned, so that resuming has somewhere to begin."""
        partial = Partial(self.directory, len(DATA), HASHES)
        if self.pins != "pieces":
            partial.known_pieces = None
        return partial

    def run(self, *mirrors: MirrorSimulator, stop: StopSignal | None = None) -> None:
        """Fetch the file from these mirrors, in this order."""
        self.run_urls(*(mirror.url(NAME) for mirror in mirrors), stop=stop)

    def run_urls(self, *urls: str, stop: StopSignal | None = None) -> None:
        """Fetch the file from these addresses, in this order."""
        self.source = self.source or HttpSource(self.client, PATIENCE, politeness=Politeness(self.connections))
        partial = self.partial()
        try:
            self.source.fetch([Target(self.entry(*urls), partial)], self.events.append, stop or StopSignal())
        finally:
            partial.close()

    def begin_with(self, *indices: int) -> None:
        """Put some right pieces on disk, as an earlier run did."""
        partial = self.partial()
        for index in indices:
            partial.put(index, DATA[index * PIECE : (index + 1) * PIECE], "an earlier run")
        partial.close()

    def content(self) -> bytes:
        """Return what lies on disk."""
        return (self.directory / "data").read_bytes()

    def of_kind(self, kind: type[Event]) -> list[Event]:
        """Return the events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    def assert_complete(self) -> None:
        """Check that every byte is right and recorded."""
        assert self.content() == DATA
        assert self.partial().missing_pieces() == []

    def assert_nothing_wrong_recorded(self) -> None:
        """Check that every piece that counts as present is right."""
        partial = self.partial()
        for span in partial.present:
            assert self.content()[span.start : span.end] == DATA[span.start : span.end]


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 with its key, in one file."""
    if OPENSSL is None:
        pytest.skip("needs the openssl program to make a certificate")
    directory = tmp_path_factory.mktemp("tls")
    key, cert = directory / "key.pem", directory / "cert.pem"
    command = f"{OPENSSL} req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True, timeout=60)
    both = directory / "both.pem"
    both.write_bytes(cert.read_bytes() + key.read_bytes())
    return both


@pytest.fixture(scope="session")
def client() -> Iterator[HttpClient]:
    """One client for all tests: loading the certificates of the web takes longer than most of them."""
    with HttpClient(HttpSettings(retry=PATIENCE)) as client:
        yield client


@pytest.fixture(scope="session")
def impatient_client() -> Iterator[HttpClient]:
    """A client that waits half a second for a byte: for mirrors that fall silent."""
    with HttpClient(HttpSettings(read_timeout_seconds=0.5, retry=PATIENCE)) as client:
        yield client


@pytest.fixture
def mirror() -> Iterator[MirrorSimulator]:
    with MirrorSimulator({NAME: DATA}) as mirror:
        yield mirror


@pytest.fixture
def honest() -> Iterator[MirrorSimulator]:
    """A second mirror, which only ever tells the truth."""
    with MirrorSimulator({NAME: DATA}) as mirror:
        yield mirror


@pytest.fixture
def download(tmp_path: Path, client: HttpClient) -> Download:
    return Download(tmp_path / "partial", client)


@pytest.fixture
def impatient(tmp_path: Path, impatient_client: HttpClient) -> Download:
    """A download that notices soon when a mirror falls silent, and is not asked a third time."""
    patience = RetryPolicy(attempts=2, first_delay_seconds=0.01)
    source = HttpSource(impatient_client, patience, politeness=Politeness(connections=1))
    return Download(tmp_path / "partial", impatient_client, source=source)
