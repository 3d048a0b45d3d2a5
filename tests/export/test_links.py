"""Second names for blobs: which way, across which borders, and directories that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mistral_fetch.errors import Conflict, UsageError
from mistral_fetch.export import links
from mistral_fetch.export.links import LinkMode, new_directory
from tests.export.conftest import placer


@pytest.fixture
def blob(tmp_path: Path) -> Path:
    path = tmp_path / "blob"
    path.write_bytes(b"content")
    path.chmod(0o444)
    return path


def test_no_second_copy_is_made_unless_it_is_asked_for(blob: Path, tmp_path: Path) -> None:
    shared, linked, copied = placer(), placer(LinkMode.SYMBOLIC), placer(LinkMode.COPY)
    shared.place(blob, tmp_path / "shared")
    linked.place(blob, tmp_path / "linked")
    copied.place(blob, tmp_path / "copied")
    assert {(tmp_path / name).read_bytes() for name in ("shared", "linked", "copied")} == {b"content"}
    assert set(shared.ways) <= {"reflink", "hard link"}
    assert "hard link" not in shared.ways or (tmp_path / "shared").samefile(blob)
    assert (tmp_path / "linked").readlink() == blob
    assert not (tmp_path / "copied").samefile(blob)
    assert copied.told() == "1 by copy"
    assert (tmp_path / "copied").stat().st_mode & 0o222 == 0


def test_another_file_system_is_refused_with_the_ways_that_are_left(
    blob: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(links, "clone_file", lambda *_: False)
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(UsageError) as refused:
        placer().place(blob, tmp_path / "there")
    assert "--copy" in refused.value.hint
    assert "--symlink" in refused.value.hint
    placer(LinkMode.COPY).place(blob, tmp_path / "there")


def test_a_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "out" / "model"
    with new_directory(final, {"a": 1}) as draft:
        assert draft is not None
        assert not final.exists()
        (draft / "a").write_bytes(b"a")
    assert (final / "a").read_bytes() == b"a"
    with new_directory(final, {"a": 1}) as again:
        assert again is None
    for other in ({"a": 2}, {"a": 1, "b": 1}, {}):
        with pytest.raises(Conflict), new_directory(final, other):
            pass
    assert list((tmp_path / "out").iterdir()) == [final]


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with new_directory(tmp_path / "model", {"a": 1}) as draft:
            assert draft is not None
            (draft / "a").write_bytes(b"a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_may_be_filled_and_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with new_directory(tmp_path / "empty", {"a": 1}) as draft:
        assert draft is not None
        (draft / "a").write_bytes(b"a")
    assert (tmp_path / "empty" / "a").is_file()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    with pytest.raises(Conflict), new_directory(tmp_path / "link", {"a": 1}):
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []
