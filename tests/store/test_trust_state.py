"""The memory of accepted catalogs: durable, whole or old after a crash, and never quietly forgotten."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from mistral_fetch.errors import StoreError
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.trust_state import (
    TrustRecord,
    change_record,
    forget_other_copies,
    keep_copy,
    load_copy,
    load_record,
)
from mistral_fetch.trust import SeenVersion

ADDRESS = "https://models.example/catalog.json"
KEY, SHA = "a" * 64, hashlib.sha256(b"one").hexdigest()
RECORD = TrustRecord({KEY: SeenVersion(5, SHA)}, SHA, KEY)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "home")


def write(layout: Layout, record: TrustRecord) -> None:
    change_record(layout, ADDRESS, lambda _before: record)


def test_nothing_is_remembered_at_first(layout: Layout) -> None:
    assert load_record(layout, ADDRESS) == TrustRecord()
    assert load_copy(layout, ADDRESS, TrustRecord()) is None
    assert not layout.home.exists()


def test_a_record_comes_back_and_belongs_to_its_address(layout: Layout) -> None:
    write(layout, RECORD)
    assert load_record(layout, ADDRESS) == RECORD
    assert load_record(layout, ADDRESS + ".old") == TrustRecord()


def test_the_newest_record_is_what_a_change_starts_from(layout: Layout) -> None:
    write(layout, RECORD)
    seen = []
    change_record(layout, ADDRESS, lambda before: seen.append(before) or before)
    assert seen == [RECORD]


def test_an_unchanged_record_is_not_written_again(layout: Layout) -> None:
    write(layout, RECORD)
    path = layout.trust(ADDRESS) / "seen.json"
    before = path.stat().st_ino
    write(layout, RECORD)
    assert path.stat().st_ino == before
    write(layout, replace(RECORD, accepted=""))
    assert path.stat().st_ino != before


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b'{"schema": 1',
        b"[" * 50_000,
        b'{"schema": 2, "address": "x", "seen": {}, "accepted": "", "fingerprint": ""}',
        b'{"schema": 1, "address": "x", "seen": {"a": {"version": 5}}, "accepted": "", "fingerprint": ""}',
        b'{"schema": 1, "address": "x", "seen": {}, "accepted": "../../blobs", "fingerprint": ""}',
        b'{"schema": 1, "address": "x", "seen": {}, "accepted": "", "fingerprint": "", "more": 1}',
    ],
)
def test_a_damaged_record_is_an_error_and_not_an_empty_one(layout: Layout, data: bytes) -> None:
    write(layout, RECORD)
    (layout.trust(ADDRESS) / "seen.json").write_bytes(data)
    with pytest.raises(StoreError, match="cannot be read") as refused:
        load_record(layout, ADDRESS)
    assert "remove that file" in refused.value.hint
    with pytest.raises(StoreError):
        write(layout, RECORD)


def test_a_copy_counts_once_the_record_names_it(layout: Layout) -> None:
    keep_copy(layout, ADDRESS, b"one", b"signature")
    assert load_copy(layout, ADDRESS, load_record(layout, ADDRESS)) is None
    write(layout, RECORD)
    assert load_copy(layout, ADDRESS, RECORD) == (b"one", b"signature")


def test_a_crash_between_copy_and_record_leaves_the_old_catalog(layout: Layout) -> None:
    keep_copy(layout, ADDRESS, b"one", b"signature")
    write(layout, RECORD)
    keep_copy(layout, ADDRESS, b"two", b"its signature")  # and the power fails here
    assert load_copy(layout, ADDRESS, load_record(layout, ADDRESS)) == (b"one", b"signature")
    forget_other_copies(layout, ADDRESS, RECORD)
    assert sorted(path.name for path in layout.trust(ADDRESS).iterdir()) == sorted([SHA, f"{SHA}.sig", "seen.json"])


def test_a_copy_that_was_changed_is_none(layout: Layout) -> None:
    keep_copy(layout, ADDRESS, b"one", None)
    (layout.trust(ADDRESS) / SHA).write_bytes(b"two")
    assert load_copy(layout, ADDRESS, RECORD) is None


def test_the_record_is_replaced_as_a_whole(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    write(layout, RECORD)

    def fail(_self: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(StoreError, match="no space left"):
        write(layout, TrustRecord())
    assert load_record(layout, ADDRESS) == RECORD
    assert json.loads((layout.trust(ADDRESS) / "seen.json").read_bytes())["address"] == ADDRESS
