"""A pull that is cut short at its n-th change of the disk, in a process of its own; run by test_faults.py.

``python tests/store/faults.py MODE PINS FOLDER STRIDE`` tries every change in turn (every second one for a stride
of 2, and so on) and prints one JSON line for each: what the cut process said, what was wrong with the cache right
after it, and what the next pull made of it.
Modes: ``kill`` (the process is gone), ``power`` (what was not synced is lost too, and the host was restarted),
or the name of an errno (the call fails). Pins: ``pinned`` (digests and pieces are known), ``unpinned`` (neither is),
``linked`` and ``copied`` (the weights are adopted from a directory), ``damaged`` (the cache has a blob with one wrong
piece), ``http-pieces`` and ``http-sha256`` (a larger file comes from a mirror over several connections; which change is
the n-th one is then another at each attempt). The processes are forked, one for the cut and one for what follows.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mistral_fetch.digest import Assurance
from mistral_fetch.errors import MistralFetchError
from mistral_fetch.events import ignore_events
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.sources import http_engine, schedule
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.sources.http import HttpSource
from mistral_fetch.sources.http_client import HttpClient
from mistral_fetch.sources.memory import MemorySource
from mistral_fetch.store import journal, partials
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.snapshots import find_snapshot, list_refs
from mistral_fetch.transfer.execute import Acquired, execute_offer
from mistral_fetch.transfer.offer import Offer
from mistral_fetch.transfer.shelves import DirectoryShelf
from mistral_fetch.units import MIB
from tests.transfer.engine import shrink, write_one_certificate

PIECE = 64 * 1024
FILES = {"weights/w.bin": random.Random(5).randbytes(3 * PIECE + 99), "config.json": b"{}", "empty.txt": b""}
PUBLISHER = PublisherSimulator(FILES)
LARGE = PublisherSimulator({**FILES, "weights/w.bin": random.Random(6).randbytes(24 * PIECE + 99)})
CHANGES = (
    "fsync",
    "fdatasync",
    "replace",
    "rename",
    "mkdir",
    "rmdir",
    "unlink",
    "chmod",
    "link",
    "symlink",
    "ftruncate",
    "write",
    "pwrite",
)
CUT = 77
DAMAGED = FILES["weights/w.bin"][:PIECE] + b"?" + FILES["weights/w.bin"][PIECE + 1 :]


class Disk:
    """Counts the changes of the disk below ``home``, forgets what is not synced, and strikes at the n-th.

    Changes may come from many threads. Once it struck, all but the thread it struck wait for ever: nothing that they
    would still do may happen after a power cut.
    """

    def __init__(self, home: Path, strike_at: int, strike: Callable[[Disk], None]) -> None:
        self.home, self.strike_at, self.strike = home, strike_at, strike
        self.count = 0
        self.lock = threading.RLock()
        self.struck: int | None = None
        self.unsynced: dict[int, dict[int, tuple[int, int]]] = {}
        self.renamed: list[tuple[Path, Path]] = []
        for name in CHANGES:
            setattr(os, name, self._watch(name, getattr(os, name)))

    def _watch(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            if name in {"write", "pwrite"} and not self._is_file(arguments[0]):
                return call(*arguments, **options)
            self._count()
            position = os.lseek(arguments[0], 0, os.SEEK_END) if name == "write" else 0
            # What is written while a sync is under way is not synced by it.
            covered = self._unsynced_of(arguments[0]) if name in {"fsync", "fdatasync"} else []
            result = call(*arguments, **options)
            with self.lock:
                self._remember(name, arguments, position, result, covered)
            return result

        return watched

    def _count(self) -> None:
        with self.lock:
            self.count += 1
            if self.count == self.strike_at:
                self.strike(self)
            others_go_on = self.struck in {None, threading.get_ident()}
        if not others_go_on:
            threading.Event().wait()

    def _unsynced_of(self, descriptor: int) -> list[int]:
        with self.lock:
            return list(self.unsynced.get(os.fstat(descriptor).st_ino, {}))

    def _is_file(self, descriptor: int) -> bool:
        return Path(f"/proc/self/fd/{descriptor}").resolve().is_relative_to(self.home)

    def _remember(self, name: str, arguments: tuple[Any, ...], position: int, result: Any, covered: list[int]) -> None:
        if name in {"write", "pwrite"}:
            start = arguments[2] if name == "pwrite" else position
            self.unsynced.setdefault(os.fstat(arguments[0]).st_ino, {})[next(NUMBERS)] = (start, start + result)
        elif name in {"fsync", "fdatasync"}:
            for number in covered:
                self.unsynced[os.fstat(arguments[0]).st_ino].pop(number, None)
            synced = Path(f"/proc/self/fd/{arguments[0]}").resolve()
            self.renamed = [(old, new) for old, new in self.renamed if new.parent != synced]
        elif name in {"replace", "rename"}:
            self.renamed.append((Path(arguments[0]), Path(arguments[1])))

    def lose_power(self) -> None:
        """Undo renames whose directory was not synced, and zero the bytes that were not."""
        self.struck = threading.get_ident()
        for old, new in reversed(self.renamed):
            if new.exists() and not old.exists():
                RENAME(new, old)
        for path in self.home.rglob("*"):
            if path.is_file() and not path.is_symlink():
                for start, end in self.unsynced.get(path.stat().st_ino, {}).values():
                    path.chmod(0o644)
                    with path.open("r+b") as file:
                        file.seek(start)
                        file.write(bytes(end - start))


RENAME = os.rename
NUMBERS = itertools.count()
MIRRORS: list[str] = []


def publisher_of(pins: str) -> PublisherSimulator:
    return LARGE if pins.startswith("http") else PUBLISHER


def offer(pins: str) -> Offer:
    if pins.startswith("http"):
        manifest = LARGE.manifest(MIRRORS, piece_length=PIECE if pins == "http-pieces" else None)
        return Offer("manifest", "btih-0123", manifest, (lambda: HttpSource(HttpClient()),))
    is_pinned = pins != "unpinned"
    manifest = PUBLISHER.manifest(piece_length=PIECE if is_pinned else None, has_sha256=is_pinned)
    return Offer("manifest", "btih-0123", manifest, (lambda: MemorySource(FILES),))


def pull(home: Path, pins: str) -> Acquired:
    layout = Layout(home)
    layout.prepare()
    return execute_offer(
        offer(pins),
        "model",
        layout,
        floor=Assurance.SIZE,
        disk_reserve_bytes=0,
        report=ignore_events,
        stop=StopSignal(),
        shelves=[DirectoryShelf(home.parent / "usb", ignore_events)],
    )


def set_up(home: Path, pins: str) -> None:
    """Put in place what is there before the pull: a directory to adopt from, or a damaged blob."""
    home.mkdir(parents=True)
    if pins in {"linked", "copied"}:
        theirs = home.parent / "usb/w.bin"
        theirs.parent.mkdir(exist_ok=True)
        theirs.write_bytes(FILES["weights/w.bin"])
        theirs.chmod(0o644 if pins == "linked" else 0o666)
    elif pins == "damaged":
        blob = Layout(home).blob(hashlib.sha256(FILES["weights/w.bin"]).hexdigest())
        blob.parent.mkdir(parents=True)
        blob.write_bytes(DAMAGED)


def cut_short(home: Path, pins: str, mode: str, step: int) -> str:
    """Pull with the n-th change struck; return how it ended. Runs in a child."""

    def strike(disk: Disk) -> None:
        if mode in {"kill", "power"}:
            if mode == "power":
                disk.strike_at = -1
                disk.lose_power()
            os._exit(CUT)
        raise OSError(getattr(errno, mode), os.strerror(getattr(errno, mode)))

    disk = Disk(home, step, strike)
    try:
        pull(home, pins)
    except MistralFetchError as error:
        return f"{error.kind} {int(error.exit_code)}"
    return "not reached" if disk.count < step else "complete"


def problems(home: Path, publisher: PublisherSimulator) -> list[str]:
    """Return what breaks the one rule: what has a name is right."""
    found = []
    for blob in home.glob("blobs/sha256/*/*"):
        content = blob.read_bytes()
        # One that was damaged before we came loses its name when it is met, which may be later than the cut.
        if hashlib.sha256(content).hexdigest() != blob.name and content != DAMAGED:
            found.append(f"the blob {blob.name[:8]} is wrong")
    layout = Layout(home)
    for directory in home.glob("snapshots/*"):
        complete = find_snapshot(layout, directory.name)
        if complete and any((complete / at).read_bytes() != data for at, data in publisher.files.items()):
            found.append("a complete snapshot is wrong")
    found += ["a ref names nothing" for ref in list_refs(layout) if not find_snapshot(layout, ref.content_digest)]
    return found


def leftovers(home: Path) -> list[str]:
    """Return what a finished pull should not leave."""
    return [str(path.relative_to(home)) for path in [*home.glob("partial/*"), *home.rglob("*.tmp")]]


def try_again(home: Path, pins: str, mode: str) -> str:
    """Pull once more, as the next process does; return how it ended. Runs in a child."""
    if mode == "power":
        vars(journal)["boot_id"] = lambda: "the next boot"
        # It took two minutes to come up: earlier, a writer of another boot counts as one that may be alive elsewhere.
        for path in home.glob("partial/*/journal-*"):
            os.utime(path, (time.time() - 120, time.time() - 120))
    recorded = recorded_bytes(home, pins)
    acquired = pull(home, pins)
    found = {path: (acquired.directory / path).read_bytes() for path in publisher_of(pins).files}
    wrong = [path for path, data in publisher_of(pins).files.items() if found[path] != data]
    if pins.startswith("http") and acquired.received_bytes + recorded > sum(map(len, found.values())):
        return f"{acquired.received_bytes} bytes fetched, though {recorded} were recorded"
    return f"wrong: {wrong}" if wrong else "exact"


def recorded_bytes(home: Path, pins: str) -> int:
    """Return how many bytes of the weights the journals say are there, believed as they stand."""
    entry = offer(pins).manifest.entry("weights/w.bin")
    partial = partials.Partial(Layout(home).partial(f"sha256-{entry.sha256}"), entry.size or 0, entry.pieces)
    if not partial.data_path.exists():
        return 0
    records = [journal.read_journal(path, partial.grid) for path in journal.journal_paths(partial.directory)]
    indices = {index for found in records if found for index in found.pieces}
    return sum(partial.grid.span(index).length for index in indices)


def in_child(action: Callable[[], str]) -> str:
    """Return what ``action`` returns in a forked process, or that it was cut."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = action()
        except BaseException:
            answer = traceback.format_exc()
        WRITE(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answers:
        answer = answers.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return "cut" if status == CUT else answer if status == 0 else f"exit {status}"


WRITE = os.write


@contextmanager
def mirror_process(folder: Path) -> Iterator[str]:
    """Serve the large files from a process of its own, since children that are forked have one thread only."""
    for path, data in LARGE.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    argv = [sys.executable, "-m", "mistral_fetch.simulators.mirror", "--dir", str(folder), "--rate", str(24 * MIB)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
        process.terminate()


def main(mode: str, pins: str, folder: Path, stride: int) -> None:
    if pins.startswith("http"):
        shrink()
        schedule.SETTLE_SECONDS = 30.0  # no races, so that not a byte comes twice for another reason than the cut
        write_one_certificate(folder / "one.pem")
        os.environ["SSL_CERT_FILE"] = str(folder / "one.pem")
        with mirror_process(folder / "served") as url:
            MIRRORS.append(url)
            strike_everywhere(mode, pins, folder, stride)
    else:
        strike_everywhere(mode, pins, folder, stride)


def strike_everywhere(mode: str, pins: str, folder: Path, stride: int) -> None:
    partials.BATCH_BYTES = 2 * PIECE
    http_engine.BATCH_BYTES = 4 * PIECE  # half of it is flushed by the thread that looks after the others
    for step in range(1, 1000, stride):
        home = folder / f"{mode}-{pins}-{step}"
        set_up(home, pins)
        first = in_child(lambda: cut_short(home, pins, mode, step))  # noqa: B023 - called at once
        wrong = problems(home, publisher_of(pins))
        second = in_child(lambda: try_again(home, pins, mode))  # noqa: B023
        wrong_later, left = problems(home, publisher_of(pins)), leftovers(home)
        shutil.rmtree(home)
        outcome = {"step": step, "first": first, "wrong": wrong, "second": second}
        print(json.dumps(outcome | {"wrong_later": wrong_later, "left": left}), flush=True)
        if first == "not reached":
            break


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
