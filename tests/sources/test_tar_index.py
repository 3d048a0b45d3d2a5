"""Walking a tar, with the standard library as the oracle, and doing so over HTTP. Hostile tars: tests/attacks."""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_fetch.errors import (
    ContentChanged,
    Interrupted,
    MalformedManifest,
    MirrorError,
    MirrorStatus,
    MirrorTimeout,
    MirrorUnreachable,
    NotAModelFile,
    RangeRefused,
)
from mistral_fetch.simulators.mirror import Fault, MirrorSimulator
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.sources.http_client import HttpClient, HttpSettings
from mistral_fetch.sources.retry import RetryPolicy
from mistral_fetch.sources.tar_index import Member, TarIndex, walk_tar
from mistral_fetch.sources.tar_walk import WINDOW_BYTES

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
FILES = {
    "model/consolidated.00.pth": random.Random(3).randbytes(400_000),
    "model/empty": b"",
    "model/params.json": b"{}",
    "model/tokenizer.model": random.Random(4).randbytes(70_000),
}
NAME = "model.tar"


def make_tar(files: Mapping[str, bytes], kind: int = tarfile.GNU_FORMAT) -> bytes:
    """Return a tar of these files, a directory before them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        folder = tarfile.TarInfo("model")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for path, data in files.items():
            info = tarfile.TarInfo(path)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def walk(data: bytes) -> tuple[Member, ...]:
    """Walk a tar in memory."""
    return walk_tar(lambda offset, length: data[offset : offset + length], len(data))


parts = st.text("abcXYZ019-_é", min_size=1, max_size=60).filter(lambda part: part == part.strip())
paths = st.lists(parts, min_size=1, max_size=6).map("/".join)


@given(
    st.dictionaries(paths, st.binary(max_size=2000), min_size=1, max_size=6),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
@settings(deadline=None)
def test_files_lie_where_the_standard_library_finds_them(files: dict[str, bytes], kind: int) -> None:
    files = {f"{number}/{path}": data for number, (path, data) in enumerate(files.items())}
    data = make_tar(files, kind)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = tuple(Member(i.name, i.offset_data, i.size) for i in archive if i.isreg())
    assert walk(data) == expected
    assert {m.path: data[m.offset : m.end] for m in walk(data)} == files


@pytest.mark.parametrize("kind", FORMATS)
def test_every_common_format_is_walked(kind: str) -> None:
    data = make_tar(FILES, FORMATS[kind])
    assert {m.path: data[m.offset : m.end] for m in walk(data)} == FILES


def test_a_file_beyond_8_gib_is_walked_in_both_ways_to_write_its_size() -> None:
    size = (8 << 30) + 5
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("big")
        info.size = size
        head, tail = info.tobuf(kind), bytes(1024)
        whole = len(head) + -(-size // 512) * 512 + len(tail)

        def read(offset: int, length: int, head: bytes = head) -> bytes:
            return (head[offset:] if offset < len(head) else b"").ljust(length, b"\0")[:length]

        assert walk_tar(read, whole) == (Member("big", len(head), size),)


def test_a_leading_dot_is_no_part_of_a_name() -> None:
    assert [m.path for m in walk(make_tar({"./a": b"1", "./b/c": b"2"}))] == ["a", "b/c"]


def test_small_neighbours_cost_one_read_and_large_files_are_not_read() -> None:
    data = make_tar({f"model/{n}": b"x" * 100 for n in range(40)} | {"model/large": bytes(10_000_000), "model/z": b"z"})
    reads: list[tuple[int, int]] = []

    def read(offset: int, length: int) -> bytes:
        reads.append((offset, length))
        return data[offset : offset + length]

    assert len(walk_tar(read, len(data))) == 42
    assert len(reads) == 2
    assert all(length <= WINDOW_BYTES for _, length in reads)


PATIENCE = RetryPolicy(attempts=3, first_delay_seconds=0.01, longest_delay_seconds=0.02)


@pytest.fixture
def archive() -> Iterator[MirrorSimulator]:
    with MirrorSimulator({NAME: make_tar(FILES)}) as mirror:
        yield mirror


@pytest.fixture
def index(client: HttpClient) -> TarIndex:
    return TarIndex(client)


def test_a_file_in_a_remote_archive_is_found_by_ranges(archive: MirrorSimulator, index: TarIndex) -> None:
    url, data = archive.url(NAME), make_tar(FILES)
    found = index.locate(url, "model/params.json")
    assert data[found.offset : found.end] == FILES["model/params.json"]
    assert index.whole_size(url) == len(data)
    assert index.validator(url) == f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    assert [member.path for member in index.members(url)] == list(FILES)
    assert all(request.range for request in archive.requests())
    assert archive.bytes_sent() < 4 * WINDOW_BYTES


def test_an_archive_is_walked_once_whoever_asks(archive: MirrorSimulator, index: TarIndex) -> None:
    url = archive.url(NAME)
    found: list[Member] = []
    threads = [threading.Thread(target=lambda: found.append(index.locate(url, "model/params.json"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 8
    assert len(archive.requests()) == 3  # the beginning, and what follows each file that is larger than a window


def test_what_failed_in_passing_is_asked_again(archive: MirrorSimulator, index: TarIndex) -> None:
    archive.script(NAME, [Fault(status=503), Fault(reset_at=1000), Fault(end_at=1000, no_length=True)])
    with pytest.raises(MirrorUnreachable):
        index.locate(archive.url(NAME), "model/empty")
    assert index.locate(archive.url(NAME), "model/empty").size == 0


def test_a_file_that_is_not_there_is_told(archive: MirrorSimulator, index: TarIndex) -> None:
    with pytest.raises(NotAModelFile, match="does not hold model/none"):
        index.locate(archive.url(NAME), "model/none")


def test_headers_that_cannot_be_used_are_not_asked_for_again(index: TarIndex) -> None:
    damaged = make_tar({"model/large": bytes(200_000)})[: -10 * 512] + b"no header".ljust(5120)
    with MirrorSimulator({NAME: damaged}) as mirror:
        url = mirror.url(NAME)
        for _ in range(3):
            with pytest.raises(NotAModelFile, match=r"model\.tar.*damaged"):
                index.locate(url, "model/empty")
            with pytest.raises(MalformedManifest, match=r"model\.tar.*damaged"):
                index.members(url)
        assert len(mirror.requests()) == 2


USELESS: Mapping[str, tuple[Fault, type[MirrorError]]] = {
    "no ranges": (Fault(ignores_range=True), RangeRefused),
    "another range": (Fault(shift_range=512), RangeRefused),
    "no Content-Range": (Fault(content_range=""), RangeRefused),
    "an unknown size": (Fault(content_range="bytes 0-65535/*"), RangeRefused),
    "a size beyond all": (Fault(content_range=f"bytes 0-65535/{10**17}"), RangeRefused),
    "more than announced": (Fault(content_range="bytes 0-99/100"), RangeRefused),
    "an empty file": (Fault(size=0), RangeRefused),
    "a web page": (Fault(body=b"<html>", headers={"Content-Type": "text/html"}), NotAModelFile),
    "a gzip body": (Fault(is_gzipped=True), NotAModelFile),
    "not found": (Fault(status=404), MirrorStatus),
}


@pytest.mark.parametrize("name", USELESS)
def test_a_server_that_is_no_use_is_a_mirror_s_error(archive: MirrorSimulator, index: TarIndex, name: str) -> None:
    fault, kind = USELESS[name]
    archive.always(NAME, fault)
    with pytest.raises(kind) as caught:
        index.locate(archive.url(NAME), "model/empty")
    assert all(caught.value.lines())
    assert "127.0.0.1" in caught.value.what
    assert len(archive.requests()) == 1


@pytest.mark.parametrize("fault", [Fault(etag='"another"'), Fault(size=600_000)], ids=["version", "size"])
def test_an_archive_that_changes_between_two_reads_is_told(
    archive: MirrorSimulator, index: TarIndex, fault: Fault
) -> None:
    archive.script(NAME, [None, fault])
    with pytest.raises(ContentChanged) as caught:
        index.locate(archive.url(NAME), "model/params.json")
    assert all(caught.value.lines())
    assert len(archive.requests()) == 2


def test_a_server_that_trickles_is_given_up_in_time() -> None:
    patience = HttpSettings(metadata_timeout_seconds=0.5, retry=PATIENCE)
    with HttpClient(patience) as client, MirrorSimulator({NAME: make_tar(FILES)}) as mirror:
        mirror.always(NAME, Fault(rate_bytes_per_second=4000))
        with pytest.raises(MirrorTimeout):
            TarIndex(client).members(mirror.url(NAME))


def test_a_stop_ends_the_wait_for_a_silent_server(client: HttpClient, archive: MirrorSimulator) -> None:
    stop = StopSignal()
    archive.always(NAME, Fault(hang_at=100))
    timer = threading.Timer(0.2, stop.set)
    timer.start()
    began = time.monotonic()
    with pytest.raises(Interrupted):
        TarIndex(client, stop).members(archive.url(NAME))
    assert time.monotonic() - began < client.settings.read_timeout_seconds / 3
    timer.join()
