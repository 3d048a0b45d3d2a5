"""Caches of others that are only read: what is complete there is used, nothing is written there."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace

import pytest

from mistral_fetch.config import Settings
from mistral_fetch.errors import UsageError
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.store.derived import Product, Recipe, write_derived
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.snapshots import RefRecord, list_refs, write_ref, write_snapshot
from mistral_fetch.transfer.derive import Form, Work, derive
from tests.cli.test_lock_sync import publish
from tests.store.conftest import add_blobs


@pytest.fixture
def shared(program, tmp_path, environment):
    """A cache with one model, which the user's own one has beside it."""
    publish(tmp_path, "one", w=b"one" * 20_000)
    publish(tmp_path, "two", w=b"two" * 20_000)
    home = tmp_path / "shared"
    assert program("pull", "one.meta4", "--home", home, "--quiet").code == 0
    environment.setenv("MISTRAL_FETCH_SHARED_HOMES", f"{tmp_path / 'not-mounted'}:{home}")
    return home


def state_of(home):
    return {path: path.lstat().st_mtime_ns for path in [home, *home.rglob("*")]}


def test_what_is_complete_there_is_used_as_it_is(program, shared, tmp_path):
    (tmp_path / "one" / "w.bin").unlink()  # nothing could be fetched
    before = state_of(shared)
    pulled = program("pull", "one.meta4", "--json", "--offline")
    assert (pulled.code, pulled.json["was_complete"]) == (0, True)
    directory = pulled.json["directory"]
    assert directory.startswith(f"{shared}/snapshots/")
    assert program("path", "one.meta4").out.strip() == directory
    assert program("verify", "one.meta4", "--quiet").code == 0
    assert program("env", "one.meta4", "--json").json["MISTRAL_FETCH_MODEL"] == directory
    assert directory in program("show", f"{program('list', '--json').json['models'][0]['ref']}").out
    assert f"complete, in {shared}" in program("list").out
    assert program("prune", "--older-than", "0s", "--high", "0", "--yes", "--json").json["items"] == []
    assert state_of(shared) == before
    assert not list(program.home.glob("blobs/*/*/*"))


def test_what_is_missing_goes_into_the_own_cache(program, shared):
    before = state_of(shared)
    assert program("pull", "two.meta4", "--json", "--quiet").json["directory"].startswith(f"{program.home}/")
    assert state_of(shared) == before


def test_a_damaged_snapshot_there_is_fetched_into_the_own_cache(program, shared):
    next(shared.glob("blobs/*/*/*")).unlink()
    before = state_of(shared)
    shown = program("pull", "one.meta4", "--json", "--quiet")
    assert (shown.code, shown.json["was_complete"]) == (0, False)
    assert shown.json["directory"].startswith(f"{program.home}/")
    assert state_of(shared) == before


def test_a_cache_of_another_layout_is_left_alone(program, shared):
    (shared / "VERSION").write_text("99\n")
    assert program("path", "one.meta4").code == 3
    assert program("list").code == 0


def test_what_is_shared_cannot_be_removed_from_here(program, shared):
    assert program("rm", "one.meta4").code == 3
    assert program("pin", "one.meta4").code == 3
    assert program("path", "one.meta4").code == 0


def test_a_sync_is_content_with_it(program, shared, tmp_path):
    (tmp_path / "mistral-fetch.toml").write_text('[[model]]\nref = "one.meta4"\n')
    program("lock", "--quiet")
    before = state_of(shared)
    shown = program("sync", "--frozen", "--offline", "--json")
    assert (shown.code, shown.json["changed"]) == (0, False)
    assert state_of(shared) == before


def test_settings_name_it_too(program, shared, environment, tmp_path):
    environment.delenv("MISTRAL_FETCH_SHARED_HOMES")
    config = tmp_path / "config" / "mistral-fetch" / "config.toml"
    config.parent.mkdir(parents=True)
    config.write_text(f'shared_homes = ["{shared}"]\n')
    assert program("path", "one.meta4").code == 0


def test_verify_keeps_what_it_learns_in_the_own_cache_only(program, shared):
    """A snapshot whose manifest has no piece hashes would get them by a verification of one's own cache."""
    files = {"w.bin": b"without pieces" * 1000}
    manifest = PublisherSimulator(files).manifest(piece_length=None)
    for home in (program.home, shared):
        layout = Layout(home)
        layout.prepare()
        add_blobs(layout, files)
        directory = write_snapshot(layout, manifest, {"name": "bare", "files": []})
        write_ref(layout, RefRecord(f"bare in {home.name}", "hub", directory.name, 1_700_000_000))
        before = state_of(home)
        assert program("verify", f"bare in {home.name}", "--quiet").code == 0
        assert (state_of(home) == before) is (home == shared)


def test_a_converted_copy_is_used_from_there_and_never_touched(program, shared, tmp_path):
    layout = Layout(shared)
    (record,) = list_refs(layout)

    def make(draft):
        (draft / "made.bin").write_bytes(b"made")
        return Product("made.bin", 4, hashlib.sha256(b"made").hexdigest())

    recipe = Recipe("test-1", "made", {"w.bin"})
    made = write_derived(layout, recipe, record.content_digest, make)
    os.utime(made / "made.bin")  # its stamp is another now, so it is hashed, and would be noted
    form = Form("test-1", "made.bin", "made", "make", "made weights", lambda _name, _manifest: Work((), 4))
    settings = Settings(home=program.home, shared_homes=(shared,))
    before = state_of(shared)

    def ask(chosen):
        return derive(
            chosen, "one", record.content_digest, settings, lambda _e: None, StopSignal(), lambda _s, d: make(d)
        )

    assert ask(form).directory == made
    assert state_of(shared) == before
    with pytest.raises(UsageError, match="shared cache, which is only read"):
        ask(replace(form, key="test-2"))
    assert state_of(shared) == before
