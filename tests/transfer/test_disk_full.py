"""A disk that fills up at any byte of a pull over several connections: explained, nothing wrong named, and gone on."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mistral_fetch.errors import OutOfSpace
from mistral_fetch.events import BytesReceived
from mistral_fetch.simulators.mirror import MirrorSimulator, SeenRequest
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.sources import schedule
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.partials import Partial
from mistral_fetch.units import MIB
from tests.transfer.conftest import Puller
from tests.transfer.engine import BATCH, PIECE, RATE, SEND_BUFFER, shrink
from tests.transfer.processes import write_manifest

NAME = "weights.bin"
WEIGHTS = random.Random(91).randbytes(32 * PIECE + 4321)
SIZE = len(WEIGHTS)
PUBLISHER = PublisherSimulator({NAME: WEIGHTS, "config.json": b"{}"})
PINS = pytest.mark.parametrize("pins", ["pieces", "sha256"])


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch.setattr)
    # No races: no byte is to come twice for another reason than the full disk.
    monkeypatch.setattr(schedule, "SETTLE_SECONDS", 30.0)


@pytest.fixture
def mirror() -> Iterator[MirrorSimulator]:
    with MirrorSimulator(PUBLISHER.files, rate_bytes_per_second=RATE, send_buffer_bytes=SEND_BUFFER) as mirror:
        yield mirror


def recorded(home: Path, pins: str) -> int:
    """Return how many bytes of the weights the next run will find."""
    entry = PUBLISHER.manifest().entry(NAME)
    directory = Layout(home).partial(f"sha256-{entry.sha256}")
    return Partial(directory, SIZE, entry.pieces if pins == "pieces" else None).present_bytes


def assert_it_is_explained(puller: Puller, manifest: str) -> None:
    with pytest.raises(OutOfSpace) as caught:
        puller(manifest)
    what, detail, hint = caught.value.lines()
    assert caught.value.exit_code == 9
    assert what.startswith("no space left while ")
    assert str(puller.home) in what
    assert "No space left on device" in detail
    assert "--home" in hint
    puller.assert_nothing_published()
    assert [path for path in puller.home.rglob("*") if path.name.endswith(".tmp")] == []


def assert_the_next_run_goes_on(puller: Puller, manifest: str, pins: str, kept: int) -> None:
    puller.events.clear()
    puller.assert_exact(puller(manifest), PUBLISHER)
    came = sum(event.length for event in puller.of_kind(BytesReceived) if event.path == NAME)
    assert came == SIZE - kept


def full_at(limit: int, name: str, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Let files called ``name`` take ``limit`` bytes in all, written by the function ``call`` of :mod:`os`."""
    real: Callable[..., int] = getattr(os, call)
    left, lock = [limit], threading.Lock()

    def write(descriptor: int, data: Any, *offset: int) -> int:
        if not Path(f"/proc/self/fd/{descriptor}").readlink().name.startswith(name):
            return real(descriptor, data, *offset)
        with lock:
            room = min(left[0], len(data))
            left[0] -= room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, memoryview(data)[:room], *offset)

    monkeypatch.setattr(os, call, write)


@PINS
@pytest.mark.parametrize("limit", [0, 1, 5 * PIECE + 100, 20 * PIECE, SIZE - 1])
def test_a_disk_that_is_full_at_a_byte_of_the_file_costs_no_recorded_byte(
    limit: int, pins: str, puller: Puller, mirror: MirrorSimulator, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path / "model.meta4", PUBLISHER, [mirror], pins)
    with pytest.MonkeyPatch.context() as disk:
        full_at(limit, "data", disk, "pwrite")
        assert_it_is_explained(puller, manifest)
    kept = recorded(puller.home, pins)
    # What was written whole before is there: the last batch is recorded on the way out. The config's bytes count, too.
    assert kept >= limit // PIECE * PIECE - 4 * PIECE
    assert_the_next_run_goes_on(puller, manifest, pins, kept)


@PINS
@pytest.mark.parametrize("limit", [0, 30, 170, 1000])
def test_a_disk_that_is_full_at_a_byte_of_the_record_costs_a_batch_at_most(
    limit: int, pins: str, puller: Puller, mirror: MirrorSimulator, tmp_path: Path
) -> None:
    manifest = write_manifest(tmp_path / "model.meta4", PUBLISHER, [mirror], pins)
    with pytest.MonkeyPatch.context() as disk:
        full_at(limit, "journal-", disk, "write")
        assert_it_is_explained(puller, manifest)
    kept = recorded(puller.home, pins)
    assert kept <= BATCH + 8 * PIECE
    assert_the_next_run_goes_on(puller, manifest, pins, kept)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of six MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@PINS
@pytest.mark.parametrize("request_number", [1, 7])
def test_a_disk_that_somebody_else_fills_meanwhile_is_explained_and_the_next_run_goes_on(
    request_number: int, pins: str, small_disk: Path, mirror: MirrorSimulator, tmp_path: Path
) -> None:
    puller = Puller(small_disk / "cache")
    filler = small_disk / "somebody else's"
    lock = threading.Lock()

    def fill(request: SeenRequest) -> None:
        with lock:
            if len(mirror.requests(NAME)) < request_number or filler.exists():
                return
            with filler.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError as error:
                    assert error.errno == errno.ENOSPC  # noqa: PT017 - anything else is the test's own failure

    mirror.rule = fill
    manifest = write_manifest(tmp_path / "model.meta4", PUBLISHER, [mirror], pins)
    assert_it_is_explained(puller, manifest)
    assert filler.stat().st_size > MIB
    filler.unlink()
    mirror.rule = None
    kept = recorded(puller.home, pins)
    assert kept >= (0 if request_number == 1 else BATCH)
    assert_the_next_run_goes_on(puller, manifest, pins, kept)
