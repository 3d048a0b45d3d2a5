from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_fetch.errors import OutOfSpace, StoreError, StoreNotWritable, UnsupportedLayout
from mistral_fetch.store import durable
from mistral_fetch.store.durable import explain_os_error, make_directory, write_durably
from mistral_fetch.store.layout import Layout, quote_name, unquote_name


def test_preparing_makes_a_cache_that_says_its_version(own_home: Path) -> None:
    Layout(own_home).prepare()
    Layout(own_home).prepare()
    assert (own_home / "VERSION").read_text() == "1\n"
    assert [path.name for path in own_home.iterdir()] == ["VERSION"]


def test_asking_makes_nothing(own_home: Path) -> None:
    Layout(own_home).check_version()
    assert not own_home.exists()


@pytest.mark.parametrize("content", [b"2\n", b"", b"1.0", b"\xff\xfe", b"1" * 100_000])
def test_a_cache_of_another_version_is_refused_untouched(own_home: Path, content: bytes) -> None:
    own_home.mkdir()
    (own_home / "VERSION").write_bytes(content)
    with pytest.raises(UnsupportedLayout) as caught:
        Layout(own_home).prepare()
    assert caught.value.exit_code == 9
    assert len(caught.value.detail) < 200
    assert [path.name for path in own_home.iterdir()] == ["VERSION"]


def test_a_home_that_is_a_file_is_explained(own_home: Path) -> None:
    own_home.write_bytes(b"")
    with pytest.raises(StoreError):
        Layout(own_home).prepare()


@given(st.text(min_size=1))
def test_a_quoted_name_is_one_safe_name(key: str) -> None:
    try:
        key.encode()
    except UnicodeEncodeError:
        return
    name = quote_name(key)
    assert "/" not in name
    assert "\0" not in name
    assert name not in {"", ".", ".."}
    assert len(name.encode()) <= 255


@given(st.text(alphabet="abzé/.@+ %\\:\0", max_size=12), st.text(alphabet="abzé/.@+ %\\:\0", max_size=12))
def test_two_keys_never_share_a_name(one: str, other: str) -> None:
    assert (quote_name(one) == quote_name(other)) == (one == other)
    assert unquote_name(quote_name(one)) == one


def test_long_keys_that_begin_alike_are_told_apart() -> None:
    assert quote_name("a" * 300 + "1") != quote_name("a" * 300 + "2")


@pytest.mark.parametrize(
    "number, kind",
    [
        (errno.ENOSPC, OutOfSpace),
        (errno.EDQUOT, OutOfSpace),
        (errno.EFBIG, OutOfSpace),
        (errno.EROFS, StoreNotWritable),
        (errno.EACCES, StoreNotWritable),
        (errno.EPERM, StoreNotWritable),
        (errno.EIO, StoreError),
    ],
)
def test_every_refusal_of_the_disk_ends_in_exit_code_9_and_says_what_to_do(number: int, kind: type[StoreError]) -> None:
    error = explain_os_error(OSError(number, os.strerror(number)), "writing", Path("/cache/x"))
    assert type(error) is kind
    assert error.exit_code == 9
    assert "/cache/x" in error.what
    assert all(error.lines())


def test_a_failed_write_leaves_the_old_content_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_durably(path, b"old")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="No space"):
            write_durably(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_a_write_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(descriptor: int) -> None:
        steps.append("sync " + ("folder" if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir() else "file"))
        fsync(descriptor)

    def watch_replace(source: str, target: str) -> None:
        steps.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(Path, "replace", lambda self, target: watch_replace(str(self), str(target)))
    write_durably(tmp_path / "f", b"x")
    assert steps == ["sync file", "name", "sync folder"]


def test_short_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:3]))
    write_durably(tmp_path / "f", b"0123456789")
    assert (tmp_path / "f").read_bytes() == b"0123456789"


def test_a_folder_s_name_is_durable_in_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(durable, "fsync_directory", synced.append)
    make_directory(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]


def test_a_file_system_that_cannot_sync_folders_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def no_folders(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", no_folders)
    write_durably(tmp_path / "f", b"x")
    assert (tmp_path / "f").read_bytes() == b"x"


def test_a_cache_that_may_not_be_read_is_told_in_three_lines(tmp_path, monkeypatch):
    def refuse(*_arguments, **_options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(StoreNotWritable) as caught:
        Layout(tmp_path).check_version()
    assert caught.value.exit_code == 9
