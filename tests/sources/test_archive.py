"""One archive as a source: files by ranges, then the archive's own digest over server and disk."""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from mistral_fetch.digest import Assurance, Digest
from mistral_fetch.errors import (
    ContentChanged,
    DigestMismatch,
    Interrupted,
    MirrorStatus,
    NotAModelFile,
    SizeMismatch,
    StoreError,
)
from mistral_fetch.events import BytesVerified, Event, Notice, Report, SourceLied
from mistral_fetch.manifest import FileEntry, MirrorUrl
from mistral_fetch.simulators.mirror import Fault, MirrorSimulator
from mistral_fetch.sources import archive as archive_module
from mistral_fetch.sources.archive import ArchiveSource
from mistral_fetch.sources.base import StopSignal, Target
from mistral_fetch.sources.failover import mirror_urls
from mistral_fetch.sources.http_client import HttpClient
from mistral_fetch.sources.memory import MemorySource
from mistral_fetch.sources.tar_index import TarIndex
from mistral_fetch.sources.tar_walk import WINDOW_BYTES
from mistral_fetch.store.partials import Partial

NAME = "mistral.tar"
FILES = {
    "consolidated.00.pth": random.Random(5).randbytes(500_000),
    "empty": b"",
    "params.json": b"{}",
    "tokenizer.model": random.Random(6).randbytes(100_000),
}


def make_tar() -> bytes:
    """Return the archive, all files in one folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, data in FILES.items():
            info = tarfile.TarInfo(f"m/{path}")
            info.size, info.mtime = len(data), 1695800000.5
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


TAR = make_tar()
MD5 = Digest("md5", hashlib.md5(TAR).hexdigest())


class Mirrors(MemorySource):
    """Stands in for the source for mirrors: what its archive holds, by the names in the targets' mirrors."""

    calls = 0

    def fetch(self, targets: Sequence[Target], report: Report, stop: StopSignal) -> None:
        """Fill every target's partial."""
        self.calls += 1
        super().fetch([t for t in targets if t.partial.missing_pieces()], report, stop)
        for target in targets:
            target.partial.prepare()


@dataclass
class Workplace:
    """One archive on a mirror, and partials for its files that outlive a source."""

    mirror: MirrorSimulator
    client: HttpClient
    directory: Path
    files: dict[str, bytes] = field(default_factory=lambda: dict(FILES))
    expected: Digest | None = MD5
    events: list[Event] = field(default_factory=list)
    inner: Mirrors = field(default_factory=lambda: Mirrors(FILES))

    @property
    def url(self) -> str:
        """Return the archive's address."""
        return self.mirror.url(NAME)

    def source(self) -> ArchiveSource:
        """Return a source as a new process makes it."""
        self.inner.files = self.files
        return ArchiveSource(self.inner, TarIndex(self.client), self.url, self.expected)

    def targets(self, *paths: str) -> list[Target]:
        """Open the partials anew."""
        targets = []
        for path in paths or FILES:
            entry = FileEntry(path, len(FILES[path]), mirrors=(MirrorUrl(self.url, member=f"m/{path}"),))
            targets.append(Target(entry, Partial(self.directory / path, len(FILES[path]))))
        return targets

    def fetch(self, *paths: str, stop: StopSignal | None = None, report: Callable[[Event], None] | None = None) -> None:
        """Fetch some files, or all."""
        self.source().fetch(self.targets(*paths), report or self.events.append, stop or StopSignal())

    def assert_complete(self) -> None:
        """Check every byte and record."""
        for target in self.targets():
            assert target.partial.missing_pieces() == []
            assert target.partial.data_path.read_bytes() == FILES[target.entry.path]

    def assert_nothing_kept(self) -> None:
        """Check that no byte and no proof of it is left."""
        for target in self.targets():
            assert target.partial.present == []
            assert not target.partial.data_path.exists()
            assert not (target.partial.directory / "proved").exists()


@pytest.fixture
def work(client: HttpClient, tmp_path: Path) -> Iterator[Workplace]:
    with MirrorSimulator({NAME: TAR}) as mirror:
        yield Workplace(mirror, client, tmp_path)


def test_the_whole_archive_is_proved_though_only_headers_are_read_again(work: Workplace) -> None:
    work.fetch()
    work.assert_complete()
    assert work.mirror.bytes_sent() <= 12 * WINDOW_BYTES
    verified = [event for event in work.events if isinstance(event, BytesVerified)]
    assert [verified[-1].verified_bytes, verified[-1].total_bytes] == [len(TAR), len(TAR)]
    assert verified[-1].path == NAME


@pytest.mark.parametrize("path, at", [("consolidated.00.pth", 499_999), ("params.json", 0), ("tokenizer.model", 5)])
def test_one_wrong_byte_in_a_file_is_an_integrity_error_and_nothing_stays(work: Workplace, path: str, at: int) -> None:
    wrong = bytearray(FILES[path])
    wrong[at] ^= 1
    work.files[path] = bytes(wrong)
    with pytest.raises(DigestMismatch) as caught:
        work.fetch()
    assert caught.value.exit_code == 32
    assert str(MD5) in caught.value.detail
    work.assert_nothing_kept()
    (lie,) = [event for event in work.events if isinstance(event, SourceLied)]
    assert (lie.path, lie.expected) == (NAME, str(MD5))
    work.files[path] = FILES[path]
    work.fetch()
    work.assert_complete()


def with_another_mode(tar: bytes) -> bytes:
    """Return the tar with other permissions in one header, whose own checksum is right again."""
    at = tar.index(b"m/params.json\0")
    block = bytearray(tar[at : at + 512])
    block[100:107] = b"0000600"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return tar[:at] + bytes(block) + tar[at + 512 :]


BETWEEN = {
    "a header": with_another_mode(TAR),
    "a padding": TAR[: TAR.index(b"{}" + bytes(510)) + 2] + b"\1" + TAR[TAR.index(b"{}" + bytes(510)) + 3 :],
    "the end": TAR[:-1] + b"\1",
}


@pytest.mark.parametrize("place", BETWEEN)
def test_one_wrong_byte_between_the_files_is_an_integrity_error(work: Workplace, place: str) -> None:
    assert len(BETWEEN[place]) == len(TAR)
    work.mirror.files[NAME] = BETWEEN[place]  # type: ignore[index]
    with pytest.raises(DigestMismatch):
        work.fetch()
    work.assert_nothing_kept()


def test_without_a_digest_only_the_sizes_vouch(work: Workplace) -> None:
    work.expected = None
    assert work.source().assurance is Assurance.SIZE
    work.fetch()
    work.assert_complete()
    assert work.mirror.requests() == []
    assert not any(isinstance(event, BytesVerified) for event in work.events)


def test_it_says_who_it_is_and_what_it_proves(work: Workplace) -> None:
    assert work.source().assurance is Assurance.MD5
    assert work.source().label.startswith("127.0.0.1:")
    secret = ArchiveSource(work.inner, TarIndex(work.client), "https://user:secret@host.example/x.tar?key=1", MD5)
    assert secret.label == "host.example"


def test_what_was_proved_once_is_not_asked_or_hashed_again(work: Workplace) -> None:
    work.fetch()
    asked = len(work.mirror.requests())
    # As after a kill between two commits: the first file is a blob now, and its bytes are not here any more.
    (work.directory / "consolidated.00.pth" / "data").unlink()
    work.events.clear()
    work.fetch("params.json", "tokenizer.model", "empty")
    assert len(work.mirror.requests()) == asked
    assert work.inner.calls == 1


def test_a_proof_of_another_digest_is_no_proof(work: Workplace) -> None:
    work.fetch()
    work.expected = Digest("md5", "0" * 32)
    with pytest.raises(DigestMismatch):
        work.fetch()
    work.assert_nothing_kept()


def test_a_proof_counts_only_while_no_piece_is_missing(work: Workplace) -> None:
    work.fetch()
    (target,) = work.targets("tokenizer.model")
    with target.partial.data_path.open("r+b") as file:
        file.write(b"\0" * 100)
    assert target.partial.recheck()
    work.fetch()
    work.assert_complete()


def test_an_archive_is_no_address_of_a_file_in_it() -> None:
    mirrors = (MirrorUrl("https://a.example/m.tar", 1, "m/f"), MirrorUrl("https://a.example/f", 2))
    assert mirror_urls(FileEntry("f", 1, mirrors=mirrors), {"https"}) == ["https://a.example/f"]


def test_a_proof_does_not_outlive_its_bytes(work: Workplace) -> None:
    work.fetch()
    (target,) = work.targets("params.json")
    target.partial.reset()
    stop = StopSignal()
    stop.set()
    with pytest.raises(Interrupted):
        work.fetch(stop=stop)
    assert list(work.directory.glob("*/proved")) == []
    work.fetch()
    work.assert_complete()


def test_a_file_that_is_not_wanted_is_hashed_from_the_server(work: Workplace) -> None:
    work.fetch("params.json")
    (target,) = work.targets("params.json")
    assert target.partial.missing_pieces() == []
    assert work.mirror.bytes_sent() >= len(TAR)


def test_memory_stays_bounded_whatever_is_between_the_files(work: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "_ASK_BYTES", 70_000)
    work.fetch("params.json")
    lengths = [int(r.range.partition("-")[2]) - int(r.range[6:].partition("-")[0]) for r in work.mirror.requests()]
    assert max(lengths) < 70_000


def test_bytes_that_changed_on_this_disk_are_fetched_again_and_nobody_is_blamed(work: Workplace) -> None:
    work.inner.fetch(work.targets(), work.events.append, StopSignal())
    data = work.directory / "tokenizer.model" / "data"
    with data.open("r+b") as file:
        file.write(b"\0" * 100)
    work.fetch()
    work.assert_complete()
    assert any(isinstance(event, Notice) and "tokenizer.model" in event.text for event in work.events)
    assert not any(isinstance(event, SourceLied) for event in work.events)


def test_a_stop_while_the_archive_is_proved_keeps_the_bytes(work: Workplace) -> None:
    stop = StopSignal()

    def report(event: Event) -> None:
        if isinstance(event, BytesVerified):
            stop.set()

    with pytest.raises(Interrupted):
        work.fetch(stop=stop, report=report)
    work.assert_complete()
    assert list(work.directory.glob("*/proved")) == []


def test_a_server_that_fails_while_the_archive_is_proved_costs_no_bytes(work: Workplace) -> None:
    work.mirror.rule = lambda request: None if request.range == "bytes=0-65535" else Fault(status=404)
    with pytest.raises(MirrorStatus):
        work.fetch()
    work.assert_complete()
    work.mirror.rule = None
    work.fetch()
    assert len(list(work.directory.glob("*/proved"))) == len(FILES)


def test_an_archive_that_is_replaced_meanwhile_is_told(work: Workplace) -> None:
    source, targets = work.source(), work.targets()
    work.inner.fetch(targets, work.events.append, StopSignal())
    source._index.members(work.url)
    work.mirror.files[NAME] = TAR + bytes(512)  # type: ignore[index]
    with pytest.raises(ContentChanged):
        source.fetch(targets, work.events.append, StopSignal())


def test_data_that_another_process_discarded_is_no_lie_of_the_server(work: Workplace) -> None:
    source, targets = work.source(), work.targets()
    work.inner.fetch(targets, work.events.append, StopSignal())
    data = work.directory / "tokenizer.model" / "data"
    data.write_bytes(b"")
    with pytest.raises(StoreError, match="shorter"):
        source.fetch(targets, work.events.append, StopSignal())
    data.unlink()
    with pytest.raises(StoreError):
        source.fetch(targets, work.events.append, StopSignal())


def test_a_target_that_is_no_file_of_the_archive_is_refused(work: Workplace) -> None:
    (target,) = work.targets("params.json")
    elsewhere = replace(target.entry, mirrors=(MirrorUrl(work.url),))
    with pytest.raises(NotAModelFile, match=r"params\.json is no file of"):
        work.source().fetch([Target(elsewhere, target.partial)], work.events.append, StopSignal())
    other = replace(target.entry, mirrors=(MirrorUrl(work.url, member="m/tokenizer.model"),))
    with pytest.raises(SizeMismatch):
        work.source().fetch([Target(other, target.partial)], work.events.append, StopSignal())
