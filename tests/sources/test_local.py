from __future__ import annotations

import os
from pathlib import Path

import pytest

from mistral_fetch.errors import AllSourcesFailed, MirrorUnreachable, SizeMismatch
from mistral_fetch.events import SourceLied, ignore_events
from mistral_fetch.sources.base import StopSignal, Target
from mistral_fetch.sources.local import LocalSource, local_path
from mistral_fetch.store.partials import Partial
from tests.sources.conftest import DATA, Download


@pytest.fixture
def stick(tmp_path: Path) -> Path:
    directory = tmp_path / "usb stick"
    directory.mkdir()
    return directory


def copy(download: Download, *paths: Path) -> None:
    partial = download.partial()
    entry = download.entry(*(path.as_uri() for path in paths))
    try:
        LocalSource().fetch([Target(entry, partial)], download.events.append, StopSignal())
    finally:
        partial.close()


def test_copies_a_file_whose_name_needs_quoting(download: Download, stick: Path) -> None:
    (stick / "a model%20.bin").write_bytes(DATA)
    copy(download, stick / "a model%20.bin")
    download.assert_complete()


def test_a_link_to_the_file_is_followed(download: Download, stick: Path) -> None:
    (stick / "real").write_bytes(DATA)
    (stick / "link").symlink_to("real")
    copy(download, stick / "link")
    download.assert_complete()


@pytest.mark.parametrize("kind", ["pipe", "directory", "nothing", "device"])
def test_what_is_no_file_is_refused_at_once(kind: str, download: Download, stick: Path) -> None:
    path = stick / "model.bin"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/zero")
    with pytest.raises(MirrorUnreachable) as caught:
        copy(download, path)
    assert caught.value.is_permanent
    assert str(path) in caught.value.what


@pytest.mark.parametrize("content", [DATA[:-1], DATA + b"x", b""])
def test_a_file_of_another_size_is_refused_before_it_is_read(content: bytes, download: Download, stick: Path) -> None:
    (stick / "model.bin").write_bytes(content)
    with pytest.raises(SizeMismatch):
        copy(download, stick / "model.bin")
    assert download.partial().present == []


def test_a_rotten_copy_is_named_and_the_next_one_taken(download: Download, stick: Path) -> None:
    (stick / "rotten").write_bytes(DATA[:100] + b"\0\0\0\0" + DATA[104:])
    (stick / "good").write_bytes(DATA)
    copy(download, stick / "rotten", stick / "good")
    download.assert_complete()
    assert len(download.of_kind(SourceLied)) == 1


def test_web_addresses_are_none_of_its_business(tmp_path: Path, download: Download) -> None:
    target = Target(download.entry("https://mirror.example/x"), Partial(tmp_path / "p", len(DATA)))
    with pytest.raises(AllSourcesFailed):
        LocalSource().fetch([target], ignore_events, StopSignal())


@pytest.mark.parametrize("url", ["file://host/x", "file:x", "file:", "http://h/x", "file:///a%00b"])
def test_addresses_that_are_no_local_file_are_refused(url: str) -> None:
    with pytest.raises(MirrorUnreachable):
        local_path(url)


def test_both_spellings_of_this_machine_are_fine() -> None:
    assert local_path("file:///a%20b") == local_path("file://localhost/a b") == Path("/a b")
