"""Many connections to many mirrors: that they are used, bounded, broken off and never waited for in vain."""

from __future__ import annotations

import hashlib
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mistral_fetch.digest import Digest
from mistral_fetch.errors import AllSourcesFailed, Interrupted, StoreError
from mistral_fetch.events import BytesReceived, Event, Progress, SourceFailed, SourceLied
from mistral_fetch.manifest import FileEntry, MirrorUrl, PieceHashes
from mistral_fetch.simulators.mirror import Content, Fault, MirrorSimulator, SeenRequest
from mistral_fetch.sources import http, http_engine, schedule
from mistral_fetch.sources.base import StopSignal, Target
from mistral_fetch.sources.file_job import FileJob
from mistral_fetch.sources.http import HttpSource, Politeness
from mistral_fetch.sources.http_client import HttpClient, HttpSettings
from mistral_fetch.sources.http_engine import ParallelFetch
from mistral_fetch.sources.limit import RateLimit
from mistral_fetch.sources.mirror_state import Growth, MirrorState
from mistral_fetch.sources.retry import Backoff, RetryPolicy
from mistral_fetch.sources.tar_index import TarIndex
from mistral_fetch.sources.urls import origin_of
from mistral_fetch.spans import PieceGrid
from mistral_fetch.store.partials import MAX_PIECE_LENGTH, Partial
from mistral_fetch.units import MIB

NAME = "weights.bin"
PIECE = 64 * 1024
DATA = random.Random(51).randbytes(47 * PIECE + 321)
SHA256 = Digest("sha256", hashlib.sha256(DATA).hexdigest())
HASHES = PieceHashes(
    PIECE, tuple(hashlib.sha256(DATA[at : at + PIECE]).hexdigest() for at in range(0, len(DATA), PIECE))
)
PATIENCE = RetryPolicy(attempts=3, first_delay_seconds=0.01, longest_delay_seconds=0.02)


@pytest.fixture(autouse=True)
def small_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many connections at once and short runs, as a large file has them after some seconds."""
    monkeypatch.setattr(http, "FIRST_CONNECTIONS", 6)
    monkeypatch.setattr(schedule, "FIRST_RUN_BYTES", 4 * PIECE)
    monkeypatch.setattr(schedule, "SETTLE_SECONDS", 0.1)


@pytest.fixture(scope="module")
def client() -> Iterator[HttpClient]:
    """A client that is patient: nothing here may end by a read timeout."""
    with HttpClient(HttpSettings(read_timeout_seconds=60, retry=PATIENCE)) as client:
        yield client


@dataclass
class Fetch:
    """One file over many connections."""

    directory: Path
    client: HttpClient
    connections: int = 16
    limit: RateLimit = field(default_factory=lambda: RateLimit(None))
    has_pieces: bool = True
    events: list[Event] = field(default_factory=list)
    elapsed: float = 0.0

    def partial(self) -> Partial:
        partial = Partial(self.directory, len(DATA), HASHES)
        if not self.has_pieces:
            partial.known_pieces = None
        return partial

    def run(self, *mirrors: MirrorSimulator, stop: StopSignal | None = None) -> HttpSource:
        return self.run_urls(*(mirror.url(NAME) for mirror in mirrors), stop=stop)

    def run_urls(self, *urls: str, stop: StopSignal | None = None) -> HttpSource:
        addresses = tuple(MirrorUrl(url, priority) for priority, url in enumerate(urls))
        entry = FileEntry(NAME, len(DATA), (SHA256,), HASHES if self.has_pieces else None, addresses)
        source = HttpSource(self.client, PATIENCE, politeness=Politeness(self.connections, self.limit))
        partial = self.partial()
        began = time.monotonic()
        try:
            source.fetch([Target(entry, partial)], self.events.append, stop or StopSignal())
        finally:
            self.elapsed = time.monotonic() - began
            partial.close()
        return source

    def assert_complete(self) -> None:
        assert (self.directory / "data").read_bytes() == DATA
        assert self.partial().missing_pieces() == []

    def of_kind(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def fetch(tmp_path: Path, client: HttpClient) -> Fetch:
    return Fetch(tmp_path / "partial", client)


@contextmanager
def mirrors(*rates: float | None, **options: int) -> Iterator[list[MirrorSimulator]]:
    """Give mirrors, each of whose connections brings so many bytes per second."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(MirrorSimulator({NAME: DATA}, rate_bytes_per_second=rate, **options))  # type: ignore[arg-type]
            for rate in rates
        ]


def only_once(mirror: MirrorSimulator, fault: Fault) -> None:
    mirror.script(NAME, [fault])


def test_several_connections_to_several_mirrors_are_used(fetch: Fetch) -> None:
    with mirrors(500_000, 500_000) as (a, b):
        fetch.run(a, b)
        fetch.assert_complete()
        assert min(a.most_requests_at_once, b.most_requests_at_once) >= 3
        assert min(a.bytes_sent(), b.bytes_sent()) > len(DATA) // 4
    assert fetch.elapsed < len(DATA) / 500_000 / 2


@pytest.mark.parametrize("connections", [1, 3])
def test_the_cap_on_connections_holds_for_all_mirrors_together(fetch: Fetch, connections: int) -> None:
    fetch.connections = connections
    with mirrors(4_000_000, 4_000_000) as (a, b):
        a.gate = b.gate  # counted together
        fetch.run(a, b)
        fetch.assert_complete()
        assert b.most_requests_at_once <= connections


def test_every_range_lies_on_the_grid_of_pieces(fetch: Fetch) -> None:
    with mirrors(800_000) as (mirror,):
        fetch.run(mirror)
        ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", request.range) for request in mirror.requests()]
    assert len(ranges) > 3
    for match in ranges:
        assert match is not None
        start, end = int(match[1]), int(match[2]) + 1
        assert start % PIECE == 0
        assert end % PIECE == 0 or end == len(DATA)


def test_a_busy_mirror_gets_fewer_connections_and_does_not_fail(fetch: Fetch) -> None:
    with mirrors(1_500_000, max_connections=2) as (mirror,):
        source = fetch.run(mirror)
        fetch.assert_complete()
        refused = [entry for entry in mirror.served if entry.status == 429]
    (state,) = source._mirrors.values()
    assert 1 <= state.growth.limit <= 2
    assert len(refused) <= 8, "it is not asked again and again"
    assert all(event.will_retry for event in fetch.of_kind(SourceFailed))  # type: ignore[attr-defined]


def test_refusals_of_connections_that_came_together_are_one_line(fetch: Fetch) -> None:
    with mirrors(2_500_000, max_connections=1) as (mirror,):
        fetch.run(mirror)
        refused = [entry for entry in mirror.served if entry.status == 429]
    assert len(refused) >= 4
    assert len(fetch.of_kind(SourceFailed)) < len(refused)


def test_retry_after_is_honoured_by_the_only_connection(fetch: Fetch) -> None:
    fetch.connections = 1
    with mirrors(None) as (mirror,):
        only_once(mirror, Fault(status=429, headers={"Retry-After": "1"}))
        fetch.run(mirror)
    fetch.assert_complete()
    assert fetch.elapsed >= 1.0


def test_retry_after_keeps_further_connections_away(fetch: Fetch) -> None:
    asked: list[float] = []

    def note(_: SeenRequest) -> None:
        asked.append(time.monotonic())

    with mirrors(3_000_000, max_connections=1, retry_after_seconds=1) as (mirror,):
        mirror.rule = note  # asked for each request that is let in
        fetch.run(mirror)
        moments = sorted(asked)
        refused = [entry for entry in mirror.served if entry.status == 429]
    fetch.assert_complete()
    assert moments[-1] - moments[0] > 1
    assert len(refused) <= 10


def test_a_slow_mirror_does_not_hold_up_the_end(fetch: Fetch) -> None:
    with mirrors(2_000_000, 1_000) as (fast, slow):
        fetch.run(fast, slow)
        assert slow.requests(), "it was given something"
    fetch.assert_complete()
    assert fetch.elapsed < 6


def test_a_stalled_connection_is_raced_by_another_one_to_the_same_mirror(fetch: Fetch) -> None:
    with mirrors(1_000_000) as (mirror,):
        only_once(mirror, Fault(hang_at=PIECE + 5))
        fetch.run(mirror)
    fetch.assert_complete()
    assert fetch.elapsed < schedule.SILENT_SECONDS + 4
    assert fetch.of_kind(SourceFailed) == [], "nobody waited for the timeout"


def test_a_connection_that_never_gets_an_answer_does_not_hold_up_the_end(fetch: Fetch) -> None:
    with mirrors(1_000_000, None) as (honest, mute):
        mute.always(NAME, Fault(hang_at=-1))
        fetch.run(honest, mute)
        assert mute.connections_made
        time.sleep(0.2)
        assert [thread for thread in threading.enumerate() if thread.name == "connection"] == []
    fetch.assert_complete()
    assert fetch.elapsed < 6


def test_a_connection_that_cannot_be_made_does_not_hold_up_the_end(
    fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As a host that drops every packet: nothing can be broken off, for there is no connection yet.
    is_over, send = threading.Event(), HttpClient._send

    def send_slowly(self: HttpClient, method: str, url: str, *rest: object) -> object:
        if "dropping" in url:
            is_over.wait(15)
        return send(self, method, url, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(HttpClient, "_send", send_slowly)
    with mirrors(2_000_000, None) as (honest, dropping):
        try:
            fetch.run_urls(honest.url(NAME), dropping.url(NAME) + "?dropping")
        finally:
            is_over.set()
        fetch.assert_complete()
        assert fetch.elapsed < 5
        time.sleep(0.3)
        assert dropping.requests(), "the connection was made after all"
        host = dropping.base_url.removeprefix("http://")
    assert [event for event in fetch.of_kind(BytesReceived) if event.source == host] == []  # type: ignore[attr-defined]


def test_the_rate_is_within_ten_percent_of_the_limit(fetch: Fetch) -> None:
    rate = 1_300_000.0
    fetch.limit = RateLimit(rate)
    with mirrors(None, None) as (a, b):
        fetch.run(a, b)
    fetch.assert_complete()
    received = sum(event.length for event in fetch.of_kind(BytesReceived))  # type: ignore[attr-defined]
    assert fetch.elapsed >= 2.0
    assert 0.9 * rate <= received / fetch.elapsed <= 1.1 * rate
    assert received <= 1.3 * len(DATA), "hardly anything is raced: that would be paid for, too"


@pytest.mark.parametrize("how", ["slow", "limited", "mute"])
def test_a_stop_ends_within_a_second_and_keeps_what_was_verified(fetch: Fetch, how: str) -> None:
    stop, stopped = StopSignal(), []

    def stop_now() -> None:
        stopped.append(time.monotonic())
        stop.set()

    if how == "limited":
        fetch.limit, fetch.connections = RateLimit(200_000.0), 2
    with mirrors(None if how == "limited" else 150_000, None) as (mirror, other):
        if how == "mute":
            other.always(NAME, Fault(hang_at=-1))
        timer = threading.Timer(1.0, stop_now)
        timer.start()
        with pytest.raises(Interrupted):
            fetch.run(*([mirror, other] if how == "mute" else [mirror]), stop=stop)
        assert time.monotonic() - stopped[0] < 1.0
    told = max(event.present_bytes for event in fetch.of_kind(Progress))  # type: ignore[attr-defined]
    assert 0 < told < len(DATA)
    assert fetch.partial().present_bytes >= told
    assert fetch.partial().recheck() == []


def test_a_liar_s_other_connections_are_broken_off(fetch: Fetch) -> None:
    with mirrors(100_000, 200_000) as (liar, honest):
        liar.always(NAME, Fault(wrong_bytes_at=(5,)))  # all but its first piece are right
        fetch.run(liar, honest)
        fetch.assert_complete()
        assert liar.most_requests_at_once >= 3
        (lie,) = fetch.of_kind(SourceLied)
        assert isinstance(lie, SourceLied)
        assert lie.source in liar.base_url
        later = [
            event.length
            for event in fetch.events[fetch.events.index(lie) :]
            if isinstance(event, BytesReceived) and event.source == lie.source
        ]
        assert sum(later) < 2 * PIECE
        asked = len(liar.requests())
        time.sleep(0.2)
        assert len(liar.requests()) == asked


def test_pieces_of_a_file_without_piece_hashes_lie_where_they_belong(fetch: Fetch) -> None:
    # Here a piece at a wrong place would only be noticed by the digest of the whole file.
    fetch.has_pieces = False
    with mirrors(700_000, 350_000, 40_000) as three:
        only_once(three[0], Fault(hang_at=PIECE + 9))
        three[1].script(NAME, [Fault(end_at=PIECE + 100)] * 3)
        fetch.run(*three)
    fetch.assert_complete()


def engine_of(tmp_path: Path, client: HttpClient, grid: PieceGrid, limit: RateLimit | None = None) -> ParallelFetch:
    """Return an engine for one file that was not begun, with sixteen connections at most."""
    partial = Partial(tmp_path / "p", 0)
    partial.grid = grid
    partial.missing_pieces = lambda: [0]  # type: ignore[method-assign]
    target = Target(FileEntry("x", grid.size, (SHA256,), None, ()), partial)
    state = MirrorState("http://m", "m", Growth(2, 16), Backoff(PATIENCE))
    job = FileJob(target, {state: MirrorUrl("http://m/x", 1)})
    archives = TarIndex(client)
    return ParallelFetch(client, archives, [job], {}, 16, limit or RateLimit(None), lambda _: None, StopSignal())


@pytest.mark.parametrize(
    "piece, size, connections",
    [
        (4 * MIB, 1 << 40, 16),
        (16 * MIB, 1 << 40, 6),
        (MAX_PIECE_LENGTH, 1 << 40, 1),
        (MAX_PIECE_LENGTH, 3 * MIB, 16),
    ],
)
def test_buffers_are_bounded_whatever_the_pieces(
    tmp_path: Path, client: HttpClient, piece: int, size: int, connections: int
) -> None:
    engine = engine_of(tmp_path, client, PieceGrid(size, piece))
    assert engine._connections == connections
    assert engine._connections * engine._piece_bytes <= max(http_engine.BUFFER_BYTES, engine._piece_bytes)


def test_bytes_that_are_not_needed_any_more_are_not_paid_for(tmp_path: Path, client: HttpClient) -> None:
    engine = engine_of(tmp_path, client, PieceGrid(MIB, MIB), RateLimit(1.0))
    run = engine.schedule.take(engine._mirrors[0], time.monotonic())
    assert run is not None
    threading.Timer(0.2, setattr, (run, "is_abandoned", True)).start()
    began = time.monotonic()
    with pytest.raises(Interrupted):
        engine.received(run, MIB)
    assert time.monotonic() - began < 2


def test_no_more_buffers_than_connections_are_made(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def count(length: int) -> bytearray:
        made.append(length)
        return bytearray(length)

    monkeypatch.setattr(http_engine, "bytearray", count, raising=False)
    fetch.connections = 3
    with mirrors(2_000_000) as (mirror,):
        fetch.run(mirror)
        assert len(mirror.requests()) > 3
    assert 1 <= len(made) <= 3
    assert set(made) == {PIECE}


class Signed(MirrorSimulator):
    """Answers each signed address a few times; then its signature has expired."""

    def content(self, path: str) -> Content | None:
        return super().content(path.partition("/")[2])


def test_an_expired_signature_is_resolved_anew_by_every_connection(fetch: Fetch) -> None:
    lock, given, used = threading.Lock(), [0], dict[str, int]()

    def redirect(_: SeenRequest) -> Fault:
        with lock:
            given[0] += 1
            return Fault(redirect_to=signed.url(f"{given[0]}/{NAME}"))

    def expire(request: SeenRequest) -> Fault | None:
        with lock:
            used[request.path] = used.get(request.path, 0) + 1
            is_expired = used[request.path] > 1 or len(used) % 3 == 0
        return Fault(status=403) if is_expired else Fault(end_at=2 * PIECE + 5)

    with mirrors(None) as (front,), Signed({NAME: DATA}) as signed:
        front.rule, signed.rule = redirect, expire
        fetch.run(front)
        fetch.assert_complete()
        assert set(used.values()) == {1}, "an address behind a redirect is never asked twice"
        assert len(used) > 6


def test_credentials_of_one_origin_are_never_sent_to_another(tmp_path: Path) -> None:
    with mirrors(1_500_000, 1_500_000) as (ours, theirs):
        settings = HttpSettings(retry=PATIENCE, authorizations={origin_of(ours.base_url): "Bearer secret"})
        with HttpClient(settings) as client:
            fetch = Fetch(tmp_path / "p", client)
            ours.script(NAME, [Fault(redirect_to=theirs.url(NAME))] * 2)
            fetch.run(ours, theirs)
        assert {request.headers.get("authorization") for request in ours.requests()} == {"Bearer secret"}
        assert len(theirs.requests()) >= 2
        assert all("authorization" not in request.headers for request in theirs.requests())


def test_what_another_process_discards_meanwhile_is_fetched_again(
    fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Found out while the transfer runs, not only at its end.
    monkeypatch.setattr(http_engine, "_FLUSH_SECONDS", 0.0)

    def discard() -> None:
        fetch.partial().reset()

    with mirrors(300_000) as (mirror,):
        timer = threading.Timer(0.8, discard)
        timer.start()
        fetch.run(mirror)
        timer.join()
        assert mirror.bytes_sent() > len(DATA) + PIECE
    fetch.assert_complete()


def test_a_disk_that_refuses_ends_it_at_once(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr("mistral_fetch.store.partials.os.pwrite", refuse)
    with mirrors(500_000) as (mirror,), pytest.raises(StoreError):
        fetch.run(mirror)
    assert fetch.elapsed < 3


def test_when_every_mirror_fails_each_reason_is_told(fetch: Fetch) -> None:
    with mirrors(None, None) as (a, b):
        a.always(NAME, Fault(status=404))
        b.always(NAME, Fault(status=500))
        with pytest.raises(AllSourcesFailed) as caught:
            fetch.run(a, b)
    assert len(caught.value.causes) == 2
    assert fetch.elapsed < 5


def test_progress_counts_no_byte_twice(fetch: Fetch) -> None:
    with mirrors(800_000) as (mirror,):
        fetch.run(mirror)
    flying = [event for event in fetch.of_kind(Progress) if event.flying_bytes]  # type: ignore[attr-defined]
    assert len(flying) > 5
    received = 0
    for event in fetch.events:
        if isinstance(event, BytesReceived):
            received += event.length
        elif isinstance(event, Progress):
            # What a connection has not told yet is at most what comes in the tenth of a second before it tells.
            assert event.present_bytes + event.flying_bytes <= received + 16 * PIECE
            assert event.present_bytes + event.flying_bytes <= len(DATA)
