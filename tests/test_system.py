"""Other systems, by taking away what Linux has or putting their way of it in its place.

This proves that our side of each difference does what their documentation asks for; not that they do.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest

from mistral_fetch import ensure, system, verify
from mistral_fetch.errors import UnsafePath
from mistral_fetch.simulators.publisher import PublisherSimulator

CONTENT = bytes(range(256)) * 3000
PUBLISHER = PublisherSimulator({"weights.bin": CONTENT, "config.json": b"{}\r\n\x1a\n"})


class Locking:
    """msvcrt's locks: of one byte at the file's position, one holder alone, EACCES for everybody else (LK_NBLCK)."""

    LK_NBLCK = 2

    def __init__(self):
        self.held: dict[tuple[int, int], int] = {}

    def locking(self, descriptor, mode, length):
        assert (mode, length) == (self.LK_NBLCK, 1)
        where = (os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR))
        if self.held.setdefault(where, descriptor) != descriptor:
            raise OSError(errno.EACCES, "Permission denied")


@pytest.fixture
def windows(monkeypatch):
    """Windows as far as this program asks: its answers, its locks, and what its os module lacks."""
    locks = Locking()
    monkeypatch.setitem(sys.modules, "msvcrt", locks)
    monkeypatch.setattr(system, "is_windows", lambda: True)
    monkeypatch.setattr(system, "_is_alive_on_windows", lambda process: process == os.getpid())
    for name in ("preadv", "pread", "pwrite", "fdatasync", "sched_getaffinity", "geteuid"):
        monkeypatch.delattr(os, name)
    return locks


@pytest.fixture
def macos(monkeypatch):
    """macOS: no fdatasync, no affinity, and a sync of its own; returns the descriptors it was asked for."""
    synced = []

    def control(descriptor, command):
        assert command == 51  # F_FULLFSYNC, sys/fcntl.h
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))

    monkeypatch.setattr(system, "is_macos", lambda: True)
    monkeypatch.setattr(fcntl, "fcntl", control)
    for name in ("fdatasync", "sched_getaffinity"):
        monkeypatch.delattr(os, name)
    return synced


def pulled_and_proved(tmp_path):
    with PUBLISHER.serve() as mirror:
        ref = mirror.url("model.meta4")
        model = ensure(ref, home=tmp_path / "home")
    assert {path: (model.directory / path).read_bytes() for path in PUBLISHER.files} == PUBLISHER.files
    assert verify(ref, home=tmp_path / "home").is_good
    return model


def test_a_pull_and_a_verify_where_windows_is_played(windows, tmp_path):
    pulled_and_proved(tmp_path)


def test_a_pull_where_macos_is_played_reaches_the_drive(macos, tmp_path):
    model = pulled_and_proved(tmp_path)
    # Every file's bytes, before they got their name: the partials' data files.
    assert sum("/partial/" in path and path.endswith("/data") for path in macos) >= len(PUBLISHER.files)
    assert any(path.startswith(str(model.directory.parent)) for path in macos)


def test_a_network_file_system_on_macos_gets_a_plain_fsync(macos, monkeypatch, tmp_path):
    synced = []

    def refuse(_descriptor, _command):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    monkeypatch.setattr(os, "fsync", synced.append)
    with (tmp_path / "x").open("wb") as file:
        system.sync_file(file.fileno(), data_only=True)
        assert synced == [file.fileno()]
        monkeypatch.setattr(fcntl, "fcntl", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
        with pytest.raises(OSError, match="I/O error"):
            system.sync_file(file.fileno())


@pytest.mark.parametrize("missing", [(), ("preadv",), ("preadv", "pread", "pwrite")], ids=str)
def test_reading_and_writing_at_offsets_from_many_threads(monkeypatch, tmp_path, missing):
    for name in missing:
        monkeypatch.delattr(os, name)
    path = tmp_path / "data"
    with path.open("w+b", buffering=0) as file:
        offsets = range(0, len(CONTENT), 4096)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda at: system.write_at(file.fileno(), CONTENT[at : at + 4096], at), offsets))
            read = list(pool.map(lambda at: system.read_at(file.fileno(), 4096, at), offsets))
            buffers = [bytearray(4096) for _ in offsets]
            filled = list(
                pool.map(lambda at: system.read_into(file.fileno(), memoryview(buffers[at // 4096]), at), offsets)
            )
    assert path.read_bytes() == CONTENT == b"".join(read)
    assert b"".join(bytes(buffer[:n]) for buffer, n in zip(buffers, filled, strict=True)) == CONTENT
    assert filled[-1] == len(CONTENT) % 4096 or 4096


def test_locks_exclude_on_either_system(windows, monkeypatch, tmp_path):
    path = tmp_path / "lock"
    path.write_bytes(b"who")
    for plays_windows in (True, False):
        monkeypatch.setattr(system, "is_windows", lambda plays=plays_windows: plays)
        with path.open("r+b") as first, path.open("r+b") as second:
            assert system.try_lock(first.fileno()) is True
            assert system.try_lock(second.fileno()) is False
            assert system.try_lock(second.fileno(), is_shared=True) is False
    with path.open("r+b") as first, path.open("r+b") as second:
        assert system.try_lock(first.fileno(), is_shared=True) is True
        assert system.try_lock(second.fileno(), is_shared=True) is True
    assert path.read_bytes() == b"who"


def test_where_there_are_no_locks_that_is_said(monkeypatch, tmp_path):
    with (tmp_path / "lock").open("wb") as file:
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks")))
        assert system.try_lock(file.fileno()) is None
        monkeypatch.setitem(sys.modules, "fcntl", None)
        assert system.try_lock(file.fileno()) is None


def test_a_rename_waits_for_a_virus_scanner_but_not_for_ever(windows, monkeypatch, tmp_path):
    source, target = tmp_path / "new", tmp_path / "old"
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    target.chmod(0o444)
    rename, refusals, pauses = Path.replace, [2], []

    def windows_rename(self, other):
        if refusals[0]:
            refusals[0] -= 1
            raise PermissionError(errno.EACCES, "The process cannot access the file")
        return rename(self, other)

    monkeypatch.setattr(Path, "replace", windows_rename)
    system.replace(source, target, pauses.append)
    assert (target.read_bytes(), len(pauses)) == (b"new", 2)
    source.write_bytes(b"newer")
    refusals[0] = 1000
    with pytest.raises(PermissionError):
        system.replace(source, target, pauses.append)
    assert target.read_bytes() == b"new"
    assert sum(pauses) < 2


def test_a_process_is_alive_or_not(windows, monkeypatch):
    assert system.is_alive(os.getpid())
    assert not system.is_alive(os.getpid() + 1)
    monkeypatch.setattr(system, "is_windows", lambda: False)
    assert system.is_alive(os.getpid())
    assert not system.is_alive(1 << 22)
    monkeypatch.setattr(os, "kill", lambda *_: (_ for _ in ()).throw(PermissionError()))
    assert system.is_alive(1)


@pytest.mark.parametrize(
    "handle, error, waited, alive", [(7, 0, 0x102, True), (7, 0, 0, False), (0, 5, 0, True), (0, 87, 0, False)]
)
def test_windows_is_asked_about_a_process_without_a_signal(monkeypatch, handle, error, waited, alive):
    import ctypes

    closed = []
    kernel = SimpleNamespace(
        OpenProcess=lambda *_: handle,
        GetLastError=lambda: error,
        WaitForSingleObject=lambda *_: waited,
        CloseHandle=closed.append,
    )
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setattr(system, "is_windows", lambda: True)
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("signal 0 is Ctrl-C there"))
    assert system.is_alive(4242) is alive
    assert closed == ([handle] if handle else [])


def test_nobody_owns_a_file_where_owners_are_not_known(windows, tmp_path):
    (tmp_path / "x").touch()
    assert not system.is_ours_alone((tmp_path / "x").stat())


@pytest.mark.parametrize(
    "name",
    ["CON", "con.bin", "a/NUL", "aux.tar.gz", "COM1", "lpt9.txt", "com²", "what?", "a:b", "tail.", "tail ", "a\x01"],
)
def test_names_that_windows_cannot_keep(name):
    assert system.windows_objection(name)


@pytest.mark.parametrize("name", ["console.bin", "a/b.c", "com0x", "COM", "weights-00001-of-00002.safetensors", ".x"])
def test_names_that_windows_keeps(name):
    assert system.windows_objection(name) == ""


def test_a_model_that_cannot_be_kept_is_refused_before_its_first_byte(windows, tmp_path):
    device = PublisherSimulator({"aux.bin": CONTENT})
    with device.serve() as mirror:
        with pytest.raises(UnsafePath, match=r"aux\.bin") as caught:
            ensure(mirror.url("model.meta4"), home=tmp_path / "home")
        assert "the name of a device" in caught.value.detail
        assert mirror.bytes_sent("model/aux.bin") == 0


def test_a_path_that_is_too_long_there_is_refused(windows, tmp_path):
    assert "260" in system.objection("a" * 200, Path("x" * 59))
    assert system.objection("a" * 199, Path("x" * 59)) == ""


def test_linux_has_no_objection(tmp_path):
    assert system.objection("aux.bin" + "x" * 300, tmp_path) == ""


def test_directories_are_not_opened_on_windows(windows, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("a directory cannot be opened there"))
    system.sync_directory(tmp_path)


def test_a_lock_is_free_again_once_its_file_is_closed(tmp_path):
    path = tmp_path / "lock"
    with path.open("wb") as first:
        assert system.try_lock(first.fileno())
    with path.open("wb") as second:
        assert system.try_lock(second.fileno())


def test_what_a_file_takes_of_the_disk(tmp_path):
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.truncate(10**6)
    assert system.bytes_on_disk(sparse.stat()) < 10**5
    assert system.bytes_on_disk(SimpleNamespace(st_size=7)) == 7


# What some system lacks, and who may use it nevertheless.
NOT_EVERYWHERE = re.compile(
    r"\bos\.(pread|preadv|pwrite|fdatasync|sched_getaffinity|geteuid|getuid|kill|fork|O_CLOEXEC|O_NONBLOCK|O_NOFOLLOW"
    r"|O_NOCTTY)\b|\bst_blocks\b|\bfcntl\.\w+|\bsocket\.SOCK_CLOEXEC"
)
ALLOWED = {
    "system.py": "owns the differences",
    "store/adopt.py": "shares blocks on Linux alone, and says so",
    "store/crash_points.py": "kills itself in tests",
    "bundle/*": "POSIX only so far",
    "export/*": "POSIX only so far",
    "simulators/*": "for tests",
}


def test_what_some_system_lacks_is_called_in_one_place():
    package = Path(system.__file__).parent
    found = [
        f"{name}: {match[0]}"
        for path in sorted(package.rglob("*.py"))
        if not any(fnmatch(name := path.relative_to(package).as_posix(), pattern) for pattern in ALLOWED)
        for match in NOT_EVERYWHERE.finditer(path.read_text())
    ]
    assert found == []
