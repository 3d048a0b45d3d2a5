"""The trash: a model that is removed is in one place or the other, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mistral_fetch.errors import NotInCache, StoreLocked
from mistral_fetch.store.crash_points import REMOVAL_POINTS, VARIABLE
from mistral_fetch.store.inventory import take_inventory
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.lock import locked
from mistral_fetch.store.snapshots import RefRecord, find_refs, find_snapshot, list_refs, write_ref
from mistral_fetch.store.trash import TrashEntry, bring_back, empty_entry, list_trash, move_to_trash
from mistral_fetch.store.use import in_use, note_use
from tests.store.conftest import Keep

ROOT = Path(__file__).parents[2]
ONE = {"w.bin": b"one" * 100, "tokenizer.model": b"shared" * 50}
TWO = {"w.bin": b"two" * 100, "tokenizer.model": b"shared" * 50}

WORK = """
import sys
from pathlib import Path
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.snapshots import find_refs
from mistral_fetch.store.trash import bring_back, empty_entry, list_trash, move_to_trash
layout, digest, what = Layout(Path(sys.argv[1])), sys.argv[2], sys.argv[3]
if what == "remove":
    move_to_trash(layout, digest, find_refs(layout, "one"))
else:
    (entry,) = list_trash(layout)
    bring_back(layout, entry) if what == "undo" else empty_entry(layout, entry.directory)
"""


def run(layout: Layout, digest: str, what: str, crash_at: str = "") -> int:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), VARIABLE: crash_at}
    command = [sys.executable, "-c", WORK, str(layout.home), digest, what]
    return subprocess.run(command, env=environment, check=False, timeout=60).returncode


def trash(layout: Layout, ref: str) -> TrashEntry:
    records = find_refs(layout, ref)
    return move_to_trash(layout, records[0].content_digest, records)


def blobs(layout: Layout) -> set[bytes]:
    return {path.read_bytes() for path in layout.blobs.glob("*/*")}


def derive(layout: Layout, digest: str) -> Path:
    made = layout.derived("safetensors-1", digest)
    made.mkdir(parents=True)
    (made / "made.bin").write_bytes(b"made")
    return made


@pytest.mark.parametrize("place", REMOVAL_POINTS)
def test_a_removal_killed_anywhere_loses_nothing_that_was_not_given_up(place: str, keep: Keep, layout: Layout) -> None:
    one = keep(ONE, "one")
    keep(TWO, "two")
    made = derive(layout, one.name)
    if place.startswith("undo") or place in {"trash-forgotten", "trash-emptied"}:
        trash(layout, "one")
    what = (
        "undo" if place.startswith("undo") else "empty" if place in {"trash-forgotten", "trash-emptied"} else "remove"
    )
    assert run(layout, one.name, what, place) == -signal.SIGKILL
    # Whatever has a name is whole, and the other model never lost anything.
    for record in list_refs(layout):
        assert find_snapshot(layout, record.content_digest)
    assert blobs(layout) >= set(TWO.values())
    if what == "empty":
        take_inventory(layout)  # half an entry is no hindrance
        for directory in layout.trash.glob("*"):
            empty_entry(layout, directory)
        assert find_refs(layout, "one") == []
        assert set(TWO.values()) <= blobs(layout) <= set(TWO.values()) | set(ONE.values())
        return
    for entry in list_trash(layout):
        bring_back(layout, entry)
    assert find_snapshot(layout, one.name) == one
    assert {path: (one / path).read_bytes() for path in ONE} == ONE
    assert [record.content_digest for record in find_refs(layout, "one")] == [one.name]
    assert (made / "made.bin").read_bytes() == b"made"
    assert list_trash(layout) == []


def test_the_blobs_of_the_trash_are_kept_until_it_is_emptied(keep: Keep, layout: Layout) -> None:
    keep(ONE, "one")
    keep(TWO, "two")
    entry = trash(layout, "one")
    assert blobs(layout) == {*ONE.values(), *TWO.values()}
    assert empty_entry(layout, entry.directory) > 0
    assert blobs(layout) == set(TWO.values())


def test_two_models_in_the_trash_hold_on_to_what_they_share(keep: Keep, layout: Layout) -> None:
    keep(ONE, "one")
    keep(TWO, "two")
    first, second = trash(layout, "one"), trash(layout, "two")
    empty_entry(layout, first.directory)
    assert blobs(layout) == set(TWO.values())
    directory = bring_back(layout, second)
    assert directory is not None
    assert (directory / "tokenizer.model").read_bytes() == TWO["tokenizer.model"]


def test_a_name_that_leads_elsewhere_by_now_stays(keep: Keep, layout: Layout) -> None:
    keep(ONE, "one")
    entry = trash(layout, "one")
    newer = keep(TWO, "one")
    bring_back(layout, entry)
    assert [record.content_digest for record in find_refs(layout, "one")] == [newer.name]


def test_a_model_that_was_pulled_again_meanwhile_is_not_doubled(keep: Keep, layout: Layout) -> None:
    one = keep(ONE, "one")
    entry = trash(layout, "one")
    assert keep(ONE, "one") == one
    assert bring_back(layout, entry) == one
    assert list_trash(layout) == []


def test_what_a_pull_holds_is_not_moved(keep: Keep, layout: Layout) -> None:
    one = keep(ONE, "one")
    held = layout.partial(f"sha256-{(one / 'w.bin').resolve().name}") / "lock"
    with locked(held, "fetch", 0.0, lambda _owner: None, lambda: None), pytest.raises(StoreLocked):
        trash(layout, "one")
    assert find_snapshot(layout, one.name) == one
    assert [record.key for record in find_refs(layout, "one")] == ["one"]


def test_an_unfinished_file_in_a_blob_s_place_survives(keep: Keep, layout: Layout) -> None:
    """A damaged model's missing file, half of which a repair has fetched."""
    one = keep(ONE, "one")
    blob = (one / "w.bin").resolve()
    blob.unlink()
    half = layout.partial(f"sha256-{blob.name}")
    half.mkdir(parents=True)
    (half / "data").write_bytes(b"x" * 8192)
    trash(layout, "one")
    assert (half / "data").read_bytes() == b"x" * 8192


def test_readers_share_and_the_last_one_lets_go(keep: Keep, layout: Layout) -> None:
    one = keep(ONE, "one")
    with in_use(layout, one, "run one"):
        with in_use(layout, one, "run it again"):
            pass
        with pytest.raises(StoreLocked):
            trash(layout, "one")
    trash(layout, "one")
    with pytest.raises(NotInCache), in_use(layout, one, "too late"):
        pass


def test_a_reader_that_comes_while_it_is_removed_is_told(keep: Keep, layout: Layout) -> None:
    one = keep(ONE, "one")
    told: list[BaseException] = []
    begun = threading.Event()

    def read() -> None:
        begun.set()
        try:
            with in_use(layout, one, "run one"):
                told.append(AssertionError("it is gone"))
        except NotInCache as error:
            told.append(error)

    reader = threading.Thread(target=read)
    with locked(layout.use_lock(one.name), "prune", 0.0, lambda _owner: None, lambda: None):
        reader.start()
        begun.wait(10)
        one.rename(layout.home / "elsewhere")
    reader.join(30)
    assert [type(error) for error in told] == [NotInCache]


def test_a_cache_that_may_only_be_read_is_used_all_the_same(
    keep: Keep, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = keep(ONE, "one")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr("mistral_fetch.store.use.os.open", refuse)
    monkeypatch.setattr("mistral_fetch.store.use.os.utime", refuse)
    note_use(layout, one)
    with in_use(layout, one, "run one"):
        assert (one / "w.bin").read_bytes() == ONE["w.bin"]


HOSTILE = {
    "a way out": {"content_digest": "../../elsewhere"},
    "no digest": {"content_digest": 7},
    "a table for a list": {"refs": {"a": 1}},
    "a time that is none": {"removed_at": "yesterday"},
}


@pytest.mark.parametrize("reason", HOSTILE)
def test_an_entry_that_was_tampered_with_is_not_brought_back(reason: str, keep: Keep, layout: Layout) -> None:
    keep(ONE, "one")
    entry = trash(layout, "one")
    path = entry.directory / "entry.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **HOSTILE[reason]}))
    assert list_trash(layout) == []


def test_a_ref_that_leads_out_of_the_cache_is_no_model(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    write_ref(layout, RefRecord("evil", "hub", "../../precious", 1))
    held = take_inventory(layout)
    assert held.models == ()
    assert (tmp_path / "precious").is_dir()


def test_age_goes_by_the_machine_s_uptime_while_it_is_up() -> None:
    entry = TrashEntry(Path("x"), "0" * 64, (), removed_at=1000.0, boot="this", uptime=50.0)
    assert entry.age(now=10**9, boot="this", uptime=60.0) == 10.0
    assert entry.age(now=1500.0, boot="another", uptime=1.0) == 500.0
    assert entry.age(now=10.0, boot="another", uptime=1.0) < 0
