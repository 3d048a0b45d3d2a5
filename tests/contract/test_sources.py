"""One suite that every source passes, so that tests built on the one in memory may be believed.

To add a source: a context manager in ``SOURCES`` that publishes ``files`` (content by path, already described by
``entries``) and gives back the source and the entries it can fetch, addresses included.
"""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mistral_fetch.digest import Assurance, Digest
from mistral_fetch.errors import IntegrityError, Interrupted, MistralFetchError
from mistral_fetch.events import Event, SourceLied
from mistral_fetch.manifest import FileEntry, MirrorUrl, PieceHashes
from mistral_fetch.simulators.mirror import MirrorSimulator
from mistral_fetch.sources.archive import ArchiveSource
from mistral_fetch.sources.base import Source, StopSignal, Target
from mistral_fetch.sources.http import HttpSource
from mistral_fetch.sources.http_client import HttpClient
from mistral_fetch.sources.local import LocalSource
from mistral_fetch.sources.memory import MemorySource
from mistral_fetch.sources.retry import RetryPolicy
from mistral_fetch.sources.tar_index import TarIndex
from mistral_fetch.store.partials import Partial

PIECE = 64 * 1024
FILES = {
    "config.json": b'{"a": 1}',
    "empty.txt": b"",
    "weights/model.bin": random.Random(7).randbytes(9 * PIECE + 12_345),
}
Published = tuple[Source, list[FileEntry]]
Publish = Callable[[Mapping[str, bytes], list[FileEntry], Path], AbstractContextManager[Published]]


def describe(files: Mapping[str, bytes], *, has_pieces: bool = True) -> list[FileEntry]:
    """Return the truth about ``files``."""
    entries = []
    for path, data in files.items():
        hashes = tuple(hashlib.sha256(data[at : at + PIECE]).hexdigest() for at in range(0, len(data), PIECE))
        digest = Digest("sha256", hashlib.sha256(data).hexdigest())
        pieces = PieceHashes(PIECE, hashes) if has_pieces else None
        entries.append(FileEntry(path, len(data), (digest,), pieces))
    return entries


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write content by path."""
    for path, data in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(data)


@contextmanager
def publish_in_memory(files: Mapping[str, bytes], entries: list[FileEntry], _: Path) -> Iterator[Published]:
    yield MemorySource(files), entries


@contextmanager
def publish_on_disk(files: Mapping[str, bytes], entries: list[FileEntry], directory: Path) -> Iterator[Published]:
    write_files(directory, files)
    yield LocalSource(), [replace(e, mirrors=(MirrorUrl((directory / e.path).as_uri()),)) for e in entries]


@contextmanager
def publish_over_http(files: Mapping[str, bytes], entries: list[FileEntry], _: Path) -> Iterator[Published]:
    with MirrorSimulator(files) as mirror, HttpClient() as client:
        source = HttpSource(client, RetryPolicy(attempts=2, first_delay_seconds=0.01))
        yield source, [replace(entry, mirrors=(MirrorUrl(mirror.url(entry.path)),)) for entry in entries]


@contextmanager
def publish_in_an_archive(files: Mapping[str, bytes], entries: list[FileEntry], _: Path) -> Iterator[Published]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, data in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    md5 = Digest("md5", hashlib.md5(buffer.getvalue()).hexdigest())
    with MirrorSimulator({"m.tar": buffer.getvalue()}) as mirror, HttpClient() as client:
        index = TarIndex(client)
        inner = HttpSource(client, RetryPolicy(attempts=2, first_delay_seconds=0.01), archives=index)
        source = ArchiveSource(inner, index, mirror.url("m.tar"), md5)
        yield source, [replace(e, mirrors=(MirrorUrl(mirror.url("m.tar"), member=e.path),)) for e in entries]


@contextmanager
def publish_to_a_swarm(files: Mapping[str, bytes], entries: list[FileEntry], directory: Path) -> Iterator[Published]:
    from mistral_fetch.bittorrent.create import TorrentAddresses, hybrid_torrent, tree_order
    from mistral_fetch.bittorrent.metainfo import parse_metainfo
    from mistral_fetch.bittorrent.seed import Seeder
    from mistral_fetch.bittorrent.settings import SwarmSettings
    from mistral_fetch.publish.hashing import SourceFile, hash_files
    from mistral_fetch.sources.swarm import SwarmSource

    # A torrent is its own description. So a seed that lies has the true torrent and wrong bytes; one that has other
    # files has a torrent of those.
    is_alike = {path: len(data) for path, data in files.items()} == {path: len(data) for path, data in FILES.items()}
    write_files(directory / "described", FILES if is_alike else files)
    write_files(directory / "seeded", files)
    described = [SourceFile(path, len(data), directory / "described" / path) for path, data in files.items()]
    hashed = hash_files(described, PIECE, max(files, key=tree_order), lambda _path, _done: None)
    torrent = parse_metainfo(hybrid_torrent("m", PIECE, [f.torrent for f in hashed.files], TorrentAddresses()))
    settings = SwarmSettings(listen_interfaces="127.0.0.1:0", use_trackers=False, no_peers_timeout_seconds=5)
    seeder = Seeder(torrent, directory / "seeded", replace(settings, uploads=True), skips_checks=True)
    try:
        seeder.wait_until_seeding(10)
        peers = (f"127.0.0.1:{seeder.port}",)
        yield SwarmSource(torrent, replace(settings, peers=peers), directory / "state"), entries
    finally:
        seeder.close()


SOURCES: dict[str, Publish] = {
    "memory": publish_in_memory,
    "local": publish_on_disk,
    "http": publish_over_http,
    "archive": publish_in_an_archive,
    "swarm": publish_to_a_swarm,
}
MARKS = {"swarm": [pytest.mark.swarm, pytest.mark.timeout(60)]}


class Workplace:
    """Publishes files through one kind of source and opens partials for them."""

    def __init__(self, kind: str, directory: Path, stack: ExitStack) -> None:
        self._kind, self._publish, self._directory, self._stack = kind, SOURCES[kind], directory, stack
        self.events: list[Event] = []

    def publish(self, served: Mapping[str, bytes], entries: list[FileEntry]) -> Published:
        """Serve ``served`` as if it were what ``entries`` say."""
        return self._stack.enter_context(self._publish(served, entries, self._directory / "published"))

    def targets(self, entries: list[FileEntry]) -> list[Target]:
        """Open the partials anew, as a later process does."""
        partials = self._directory / "partials"
        return [Target(e, Partial(partials / e.path, e.size or 0, e.pieces)) for e in entries]

    def needs_records(self) -> None:
        """End a test that asks the partial's record, for a source with an engine and a record of its own."""
        if self._kind == "swarm":
            pytest.skip("the swarm proves its pieces by itself: a second fetch that takes nothing shows it")

    def content(self, target: Target) -> bytes:
        """Return what lies on disk."""
        return target.partial.data_path.read_bytes()


@pytest.fixture(params=[pytest.param(name, marks=MARKS.get(name, [])) for name in SOURCES])
def workplace(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Workplace]:
    with ExitStack() as stack:
        yield Workplace(request.param, tmp_path, stack)


def test_fills_every_partial_exactly(workplace: Workplace) -> None:
    source, entries = workplace.publish(FILES, describe(FILES))
    targets = workplace.targets(entries)
    source.fetch(targets, workplace.events.append, StopSignal())
    assert {t.entry.path: workplace.content(t) for t in targets} == FILES


def test_works_without_piece_hashes(workplace: Workplace) -> None:
    source, entries = workplace.publish(FILES, describe(FILES, has_pieces=False))
    targets = workplace.targets(entries)
    source.fetch(targets, workplace.events.append, StopSignal())
    assert {t.entry.path: workplace.content(t) for t in targets} == FILES


def test_everything_is_recorded_when_fetch_returns(workplace: Workplace) -> None:
    workplace.needs_records()
    source, entries = workplace.publish(FILES, describe(FILES))
    source.fetch(workplace.targets(entries), workplace.events.append, StopSignal())
    reopened = workplace.targets(entries)
    assert [t.partial.missing_pieces() for t in reopened] == [[], [], []]
    assert sum(t.partial.present_bytes for t in reopened) == sum(map(len, FILES.values()))


def test_a_second_fetch_takes_nothing(workplace: Workplace) -> None:
    source, entries = workplace.publish(FILES, describe(FILES))
    source.fetch(workplace.targets(entries), workplace.events.append, StopSignal())
    again: list[Event] = []
    source.fetch(workplace.targets(entries), again.append, StopSignal())
    assert received(again) == 0


def test_fetches_only_what_is_missing(workplace: Workplace) -> None:
    source, entries = workplace.publish(FILES, describe(FILES))
    targets = workplace.targets(entries)
    data = FILES["weights/model.bin"]
    weights = next(t for t in targets if t.entry.path == "weights/model.bin").partial
    for index in (0, 3, 4, 9):
        span = weights.grid.span(index)
        weights.put(index, data[span.start : span.end], "earlier")
    source.fetch(targets, workplace.events.append, StopSignal())
    assert {t.entry.path: workplace.content(t) for t in targets} == FILES
    assert received(workplace.events) <= sum(map(len, FILES.values())) - 3 * PIECE


def test_a_wrong_piece_is_never_recorded_and_its_source_is_named(workplace: Workplace) -> None:
    wrong = bytearray(FILES["weights/model.bin"])
    wrong[5 * PIECE + 17] ^= 1
    source, entries = workplace.publish({**FILES, "weights/model.bin": bytes(wrong)}, describe(FILES))
    with pytest.raises(IntegrityError):
        source.fetch(workplace.targets(entries), workplace.events.append, StopSignal())
    lies = [event for event in workplace.events if isinstance(event, SourceLied)]
    assert [lie.path for lie in lies] == ["weights/model.bin"]
    assert "piece" in lies[0].where
    assert lies[0].expected != lies[0].actual
    weights = next(t for t in workplace.targets(entries) if t.entry.path == "weights/model.bin").partial
    assert 5 in weights.missing_pieces()
    assert_recorded_pieces_are_right(weights)


def test_a_file_of_another_size_is_refused(workplace: Workplace) -> None:
    longer = {**FILES, "weights/model.bin": FILES["weights/model.bin"] + b"x"}
    source, entries = workplace.publish(longer, describe(FILES))
    with pytest.raises(IntegrityError):
        source.fetch(workplace.targets(entries), workplace.events.append, StopSignal())


def test_a_missing_file_is_an_error_of_this_source(workplace: Workplace) -> None:
    served = {path: data for path, data in FILES.items() if path != "config.json"}
    source, entries = workplace.publish(served, describe(FILES))
    with pytest.raises(MistralFetchError) as caught:
        source.fetch(workplace.targets(entries), workplace.events.append, StopSignal())
    assert caught.value.exit_code in {6, 32}  # it has no such file, or it is not the right source at all
    assert all(caught.value.lines())


def test_a_stop_keeps_what_is_verified(workplace: Workplace) -> None:
    workplace.needs_records()
    source, entries = workplace.publish(FILES, describe(FILES))
    stop = StopSignal()

    def stop_half_way(event: Event) -> None:
        if getattr(event, "present_bytes", 0) >= 3 * PIECE:
            stop.set()

    with pytest.raises(Interrupted):
        source.fetch(workplace.targets(entries), stop_half_way, stop)
    weights = next(t for t in workplace.targets(entries) if t.entry.path == "weights/model.bin").partial
    assert weights.present_bytes >= 3 * PIECE
    assert_recorded_pieces_are_right(weights)


def test_a_stop_before_the_start_stops(workplace: Workplace) -> None:
    source, entries = workplace.publish(FILES, describe(FILES))
    stop = StopSignal()
    stop.set()
    with pytest.raises(Interrupted):
        source.fetch(workplace.targets(entries), workplace.events.append, stop)


def test_progress_ends_at_the_size(workplace: Workplace) -> None:
    source, entries = workplace.publish(FILES, describe(FILES))
    source.fetch(workplace.targets(entries), workplace.events.append, StopSignal())
    last = {e.path: e.present_bytes for e in workplace.events if hasattr(e, "present_bytes") and hasattr(e, "path")}
    assert last["weights/model.bin"] == len(FILES["weights/model.bin"])


def test_says_who_it_is_without_secrets(workplace: Workplace) -> None:
    source, _ = workplace.publish(FILES, describe(FILES))
    assert source.label
    assert "@" not in source.label
    assert isinstance(source.assurance, Assurance)


def received(events: list[Event]) -> int:
    """Return how many bytes events say came."""
    return sum(event.length for event in events if type(event).__name__ == "BytesReceived")


def assert_recorded_pieces_are_right(partial: Partial) -> None:
    """Compare every piece that counts as present with the truth."""
    data = FILES["weights/model.bin"]
    on_disk = partial.data_path.read_bytes()
    for span in partial.present:
        assert on_disk[span.start : span.end] == data[span.start : span.end]
