"""Volumes of a bundle, in any order; missing, swapped, doubled; and what is no file at all."""

from __future__ import annotations

import os
import random
from contextlib import suppress
from pathlib import Path

import pytest

from mistral_fetch.bundle.pack import pack
from mistral_fetch.bundle.reader import BundleReader
from mistral_fetch.bundle.volumes import FileInput, PipeInput, open_input
from mistral_fetch.bundle.write import MIN_VOLUME_BYTES, write_bundle, writing_to
from mistral_fetch.errors import (
    Conflict,
    IntegrityError,
    Interrupted,
    MistralFetchError,
    NotFoundError,
    OutOfSpace,
    SizeMismatch,
    UsageError,
)
from mistral_fetch.events import ignore_events
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.transfer.local import LocalModel
from tests.bundle.conftest import Receiver


@pytest.fixture
def volumes(model: LocalModel, tmp_path: Path) -> list[Path]:
    """The bundle in pieces of the smallest size that is allowed."""
    packed = pack([model], lambda: None)
    with writing_to(tmp_path / "b.tar", MIN_VOLUME_BYTES, packed.plan.size, 0) as sink:
        write_bundle(packed, sink, ignore_events, lambda: None)
        return sink.publish()


def read(paths: list[Path]) -> BundleReader:
    """Open volumes and check their structure."""
    with open_input([str(path) for path in paths]) as source:
        return BundleReader(source)


def test_volumes_are_the_bundle_cut_into_parts(volumes: list[Path], bundle: bytes, tmp_path: Path) -> None:
    assert [path.name for path in volumes] == [f"b.tar.{number:03d}" for number in range(1, len(volumes) + 1)]
    assert b"".join(path.read_bytes() for path in volumes) == bundle
    assert {path.stat().st_size for path in volumes[:-1]} == {MIN_VOLUME_BYTES}
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == sorted(path.name for path in volumes)


def test_volumes_are_read_in_any_order(volumes: list[Path], bundle: bytes) -> None:
    random.Random(1).shuffle(volumes)
    with open_input([str(path) for path in volumes]) as source:
        BundleReader(source)
        assert source.read(0, len(bundle)) == bundle
        assert source.read(MIN_VOLUME_BYTES - 5, 10) == bundle[MIN_VOLUME_BYTES - 5 :][:10]


def test_missing_swapped_and_doubled_volumes_are_refused(volumes: list[Path]) -> None:
    with pytest.raises(NotFoundError) as missing:
        read([volumes[0], *volumes[2:]])
    assert "volume 2 of b.tar is missing" in missing.value.what
    with pytest.raises(SizeMismatch) as last:
        read(volumes[:-1])
    assert "volume" in last.value.what
    with pytest.raises(UsageError):
        read([*volumes, volumes[0]])
    with pytest.raises(UsageError):
        read([volumes[0], volumes[1].rename(volumes[1].with_name("other.tar.002"))])


def test_volumes_under_each_others_names_are_noticed(volumes: list[Path], receive: Receiver) -> None:
    first, second = volumes[0].read_bytes(), volumes[1].read_bytes()
    volumes[0].write_bytes(second)
    volumes[1].write_bytes(first)
    with pytest.raises(MistralFetchError):
        read(volumes)


def test_what_is_there_is_not_written_over(model: LocalModel, tmp_path: Path) -> None:
    packed = pack([model], lambda: None)
    (tmp_path / "b.tar").write_bytes(b"precious")
    with pytest.raises(Conflict), writing_to(tmp_path / "b.tar", None, packed.plan.size, 0):
        pass
    assert (tmp_path / "b.tar").read_bytes() == b"precious"


def test_a_bundle_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with suppress(KeyboardInterrupt), writing_to(tmp_path / "b.tar", MIN_VOLUME_BYTES, 1, 0) as sink:
        sink.write(bytes(3 * MIN_VOLUME_BYTES))
        assert list(tmp_path.glob(".b.tar.00?*")) != []
        raise KeyboardInterrupt
    with pytest.raises(OutOfSpace), writing_to(tmp_path / "b.tar", None, 1 << 60, 0):
        pass
    with pytest.raises(UsageError), writing_to(tmp_path / "b.tar", 10, 100, 0):
        pass
    assert list(tmp_path.glob("*b.tar*")) == []


def test_a_pipe_is_read_once_and_forwards() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"0123456789")
    os.close(writer)
    pipe = PipeInput("a pipe", reader, lambda: None)
    assert pipe.read(2, 3) == b"234"
    with pytest.raises(IntegrityError):
        pipe.read(1, 1)
    assert pipe.read(8, 2) == b"89"
    assert not pipe.has_more(10)
    with pytest.raises(SizeMismatch):
        pipe.read(10, 1)
    os.close(reader)


def test_who_waits_for_a_pipe_can_be_stopped() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"01")
    stop = StopSignal()
    pipe = PipeInput("a pipe", reader, stop.check)
    stop.set()
    assert pipe.read(0, 2) == b"01"
    with pytest.raises(Interrupted):
        pipe.read(2, 1)
    with pytest.raises(Interrupted):
        pipe.has_more(2)
    os.close(reader)
    os.close(writer)


def test_standard_input_that_is_a_file_is_read_as_one(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"0123")
    descriptor = os.open(tmp_path / "b", os.O_RDONLY)
    with open_input(["-"], standard_input=descriptor) as source:
        assert isinstance(source, FileInput)
        assert source.read(2, 2) == b"23"
        assert source.read(0, 2) == b"01"
    os.close(descriptor)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for place in ("fifo", ".", "none", "\0"):
        with pytest.raises(NotFoundError):
            open_input([str(tmp_path / place)])
    with pytest.raises(UsageError):
        open_input(["-", "x"])
