"""An import killed at each named place, or beside a pull of the same files: the next one ends exact."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from mistral_fetch.config import Settings
from mistral_fetch.events import BytesReceived, Event
from mistral_fetch.metalink import serialise_metalink
from mistral_fetch.ref import parse_ref
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.store.crash_points import CRASH_POINTS, VARIABLE
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.snapshots import list_refs
from mistral_fetch.transfer.pull import pull
from tests.bundle.conftest import FILES, INFO, PIECE, Receiver

ROOT = Path(__file__).parents[2]
BATCH = PIECE
SIZE = sum(map(len, set(FILES.values())))
PROGRAM = f"""
from mistral_fetch.store import partials
partials.BATCH_BYTES = {BATCH}
from mistral_fetch.cli.app import main
main()
"""


def import_in_a_process(home: Path, data: bytes, path: Path, *, piped: bool, crash_at: str = "") -> tuple[int, Any]:
    """Import with the program itself, which dies at a place; return its exit code and what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MISTRAL_FETCH_DISK_RESERVE": "0", VARIABLE: crash_at}
    name = "-" if piped else str(path)
    argv = [
        sys.executable,
        "-c",
        PROGRAM,
        "bundle",
        "import",
        name,
        "--home",
        str(home),
        "--json",
        "--progress",
        "none",
    ]
    options: dict[str, Any] = {"input": data} if piped else {"stdin": subprocess.DEVNULL}
    done = subprocess.run(argv, env=environment, capture_output=True, timeout=60, check=False, **options)
    return done.returncode, json.loads(done.stdout) if done.stdout.strip() else done.stderr.decode()


# In the middle of the first file's pieces, between the files, and after everything: the others lie between these.
PLACES = ("data-synced:4", "blob-named", "ref-written")
LATER = ("piece-written:2", "journal-appended:4", "commit-noted:2", *(p for p in CRASH_POINTS if p not in PLACES))


@pytest.mark.parametrize("piped", [False, True], ids=["file", "pipe"])
@pytest.mark.parametrize("place", [*PLACES, *(pytest.param(place, marks=pytest.mark.slow) for place in LATER)])
def test_an_import_killed_anywhere_is_continued(
    place: str, piped: bool, bundle: bytes, receive: Receiver, tmp_path: Path
) -> None:
    path = tmp_path / "b.tar"
    path.write_bytes(bundle)
    code, said = import_in_a_process(receive.home, bundle, path, piped=piped, crash_at=place)
    assert code == -signal.SIGKILL, f"{place} was never reached: {said}"
    for blob in receive.home.glob("blobs/sha256/*/*"):
        assert blob.read_bytes() in FILES.values()
    code, result = import_in_a_process(receive.home, bundle, path, piped=piped)
    assert code == 0, result
    (model,) = result["models"]
    assert {name: (Path(model["directory"]) / name).read_bytes() for name in FILES} == FILES
    assert list(receive.home.glob("partial/*")) == []
    assert len(list_refs(Layout(receive.home))) == 1
    recorded = {"data-synced:4": PIECE, "journal-appended:4": PIECE, "ref-written": SIZE}.get(place, 0)
    assert model["read_bytes"] <= SIZE - recorded


@pytest.mark.parametrize("piped", [False, True], ids=["file", "pipe"])
def test_an_import_beside_a_pull_of_the_same_files_ends_well_for_both(
    piped: bool, bundle: bytes, receive: Receiver, tmp_path: Path
) -> None:
    publisher = PublisherSimulator(FILES, name="tiny", info=INFO)
    for path, data in FILES.items():
        (tmp_path / "tiny" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tiny" / path).write_bytes(data)
    manifest = tmp_path / "tiny.meta4"
    manifest.write_bytes(serialise_metalink(publisher.manifest()))
    settings = Settings(home=receive.home, disk_reserve=0, lock_timeout=20.0)
    has_begun, results = threading.Event(), list[Any]()

    def look(event: Event) -> None:
        if isinstance(event, BytesReceived):
            has_begun.set()

    def run() -> None:
        results.append(pull(parse_ref(str(manifest)), settings, look, StopSignal()))

    beside = threading.Thread(target=run)

    def meet(event: Event) -> None:
        if isinstance(event, BytesReceived) and not beside.is_alive() and not results:
            beside.start()

    imported = receive.all(bundle, piped=piped, report=meet)[0]
    beside.join(30)
    assert has_begun.is_set() or results
    receive.assert_exact(imported)
    assert results[0].content_digest == imported.content_digest
    assert {record.key for record in list_refs(Layout(receive.home))} == {imported.key, results[0].key}
