"""Caches of others that are only read: what is complete there is used, nothing is written there."""

from __future__ import annotations

import pytest

from tests.cli.test_lock_sync import publish


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
