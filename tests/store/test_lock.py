from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mistral_fetch.errors import Interrupted, StoreLocked, StoreNotWritable
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.store.lock import describe_owner, locked

HOLDER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from mistral_fetch.store.lock import locked
with locked(Path({path!r}), "pull mistral-7b", 1.0, print, lambda: None):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_another_process(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    script = HOLDER.format(root=str(Path(__file__).parents[2]), path=str(path))
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def take(path: Path, timeout: float = 0.3, told: list[str] | None = None, stop: StopSignal | None = None) -> None:
    waited = told if told is not None else []
    with locked(path, "test", timeout, waited.append, (stop or StopSignal()).check):
        pass


def test_a_free_lock_is_taken_at_once(tmp_path: Path) -> None:
    told: list[str] = []
    take(tmp_path / "locks" / "m", told=told)
    take(tmp_path / "locks" / "m", told=told)
    assert told == []


def test_waiting_is_bounded_and_names_the_owner(tmp_path: Path) -> None:
    path = tmp_path / "m"
    told: list[str] = []
    with held_by_another_process(path) as owner:
        began = time.monotonic()
        with pytest.raises(StoreLocked) as caught:
            take(path, 0.5, told)
        assert 0.5 <= time.monotonic() - began < 5
    assert caught.value.exit_code == 11
    assert f"process {owner.pid} on " in caught.value.detail
    assert "(pull mistral-7b)" in caught.value.detail
    assert len(told) == 1
    assert "pull mistral-7b" in told[0]


def test_a_killed_owner_s_lock_is_free(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with held_by_another_process(path) as owner:
        owner.kill()
        owner.wait()
        take(path)


def test_a_lock_that_is_let_go_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "m"

    class LetGo(list[str]):
        def append(self, text: str) -> None:
            super().append(text)
            assert owner.stdin is not None
            owner.stdin.close()

    told = LetGo()
    with held_by_another_process(path) as owner:
        take(path, 30, told)
    assert len(told) == 1


def test_a_stop_ends_the_wait(tmp_path: Path) -> None:
    stop = StopSignal()
    stop.set()
    with held_by_another_process(tmp_path / "m"), pytest.raises(Interrupted):
        take(tmp_path / "m", 60, stop=stop)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_where_locks_are_not_supported_the_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    take(tmp_path / "m")


def test_a_read_only_cache_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(StoreNotWritable) as caught:
        take(tmp_path / "m")
    assert "--home" in caught.value.hint


@pytest.mark.parametrize(
    "note", [b"", b"{", b"[]", b"\xff", b'{"pid": 1}', b'{"pid":1,"host":"h","doing":"d","since":"x"}']
)
def test_a_torn_note_of_the_owner_is_no_problem(tmp_path: Path, note: bytes) -> None:
    (tmp_path / "m").write_bytes(note)
    assert describe_owner(tmp_path / "m") == "a process that left no name"
    take(tmp_path / "m")


def test_an_owner_s_note_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"x" * 4000)
    take(tmp_path / "m")
    assert describe_owner(tmp_path / "m").startswith(f"process {os.getpid()} on ")


def test_a_full_disk_does_not_keep_anybody_from_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    take(tmp_path / "m")
    assert describe_owner(tmp_path / "m") == "a process that left no name"
