"""A complete model: no socket, no heavy import, no wait. And two processes that want the same thing at once."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from mistral_fetch.config import Settings
from mistral_fetch.errors import MistralFetchError, OfflineRefused, OutOfSpace, StoreLocked, UnsupportedLayout
from mistral_fetch.events import Notice
from mistral_fetch.ref import parse_ref
from mistral_fetch.simulators.mirror import Fault, MirrorSimulator, SeenRequest
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.lock import locked
from mistral_fetch.transfer import execute
from mistral_fetch.transfer.local import ref_key
from tests.transfer.conftest import Puller

ROOT = Path(__file__).parents[2]
MODEL = PublisherSimulator({"w.bin": random.Random(13).randbytes(3_000_000), "config.json": b"{}"})
HEAVY = {"httpx", "httpcore", "libtorrent", "torch", "numpy", "rich", "transformers", "safetensors"}

# What python -c gets: the program, with every door to the network closed and its modules listed at the end.
SEALED = """
import json, socket, sys
class Refused(socket.socket):
    def __init__(self, *arguments, **options):
        raise AssertionError("a socket was opened")
socket.socket = socket.create_connection = socket.getaddrinfo = Refused
from mistral_fetch.cli.app import app
try:
    app()
finally:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
"""


def program(
    *arguments: str, code: str = "from mistral_fetch.cli.app import main; main()", stderr: Path | None = None
) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", code, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with stderr.open("w") if stderr else nullcontext(subprocess.PIPE) as log:
        return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("offline", [[], ["--offline"]], ids=["online", "offline"])
def test_a_second_pull_opens_no_socket_and_imports_nothing_heavy(
    puller: Puller, tmp_path: Path, offline: list[str]
) -> None:
    publication = MODEL.publish(tmp_path)
    first = puller(str(publication.manifest_path))
    code, out, err = ended(program("pull", str(publication.manifest_path), *offline, code=SEALED))
    assert (code, out.strip()) == (0, str(first.directory)), err
    assert set(json.loads(err.splitlines()[-1])) & HEAVY == set()


def test_the_seal_would_notice_a_socket(puller: Puller) -> None:
    code, _, err = ended(program("pull", "http://127.0.0.1:1/model.meta4", code=SEALED))
    assert code != 0
    assert "a socket was opened" in err


def test_a_second_pull_of_an_address_opens_no_socket(puller: Puller, monkeypatch: pytest.MonkeyPatch) -> None:
    with MODEL.serve() as mirror:
        url = mirror.url("model.meta4")
        first = puller(url)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    second = puller(url)
    assert (second.directory, second.was_complete, second.received_bytes) == (first.directory, True, 0)


@pytest.mark.parametrize(
    "ref", ["http://127.0.0.1:1/m.meta4", "hf:org/model", "mistral-7b", "magnet:?xt=urn:btih:" + "1" * 40]
)
def test_offline_is_an_error_for_what_is_missing_and_opens_no_socket(puller: Puller, ref: str) -> None:
    code, _, err = ended(program("pull", "--offline", ref, code=SEALED))
    assert "a socket was opened" not in err
    assert code == 6, err
    assert "--offline" in err
    assert not puller.home.exists()


def test_offline_is_refused_in_process_too(puller: Puller) -> None:
    with pytest.raises(OfflineRefused) as caught:
        puller("hf:org/model", offline=True)
    assert caught.value.exit_code == 6


def held(*mirrors: MirrorSimulator) -> threading.Event:
    """Make the mirrors answer requests for the weights only when the event is set."""
    released = threading.Event()

    def wait(request: SeenRequest) -> None:
        if request.path.endswith("w.bin"):
            released.wait(60)

    for mirror in mirrors:
        mirror.rule = wait
    return released


def race(logs: Path, released: threading.Event, *commands: list[str]) -> list[tuple[int, str, str]]:
    """Run the commands at once; release the weights when all but one of them said that they wait."""
    files = [logs / f"{number}.err" for number in range(len(commands))]
    processes = [program(*command, stderr=file) for command, file in zip(commands, files, strict=True)]
    deadline = time.monotonic() + 60
    while sum("waiting for process" in file.read_text() for file in files) < len(commands) - 1:
        assert time.monotonic() < deadline, [file.read_text() for file in files]
        time.sleep(0.02)
    released.set()
    return [(*ended(process)[:2], file.read_text()) for process, file in zip(processes, files, strict=True)]


def test_two_processes_that_pull_the_same_model_both_get_it(puller: Puller, tmp_path: Path) -> None:
    with MODEL.serve() as mirror:
        arguments = ["pull", "--json", mirror.url("model.meta4")]
        results = race(tmp_path, held(mirror), *[arguments] * 3)
        sent = mirror.bytes_sent("model/w.bin")
    assert [code for code, _, _ in results] == [0, 0, 0], results
    directories = {json.loads(out)["directory"] for _, out, _ in results}
    assert len(directories) == 1
    assert (Path(directories.pop()) / "w.bin").read_bytes() == MODEL.files["w.bin"]
    assert sorted(json.loads(out)["was_complete"] for _, out, _ in results) == [False, True, True]
    assert sum("waiting for process" in err for _, _, err in results) == 2
    assert sent == len(MODEL.files["w.bin"])
    assert list(puller.home.glob("partial/*")) == []


def test_two_processes_that_pull_the_same_content_by_two_names_both_get_it(puller: Puller, tmp_path: Path) -> None:
    with MODEL.serve() as mirror, MODEL.serve() as other:
        commands = [["pull", "--json", url] for url in (mirror.url("model.meta4"), other.url("model.meta4"))]
        results = race(tmp_path, held(mirror, other), *commands)
    assert [code for code, _, _ in results] == [0, 0], results
    for _, out, _ in results:
        directory = Path(json.loads(out)["directory"])
        assert {path: (directory / path).read_bytes() for path in MODEL.files} == MODEL.files
    assert sum("waiting for process" in err for _, _, err in results) == 1
    assert sorted(json.loads(out)["received_bytes"] for _, out, _ in results) == [0, MODEL.manifest().size]
    puller.assert_blobs_are_right()
    assert list(puller.home.glob("partial/*")) == []


def test_a_second_writer_of_unproven_bytes_never_reaches_what_the_first_one_published(puller: Puller) -> None:
    # No piece hashes, and the second name's mirror lies: its bytes must not land in the first one's blob.
    manifest = MODEL.manifest(piece_length=None)
    with MODEL.serve(manifest) as honest, MODEL.serve(manifest, rate_bytes_per_second=2_000_000) as liar:
        liar.always("model/w.bin", Fault(wrong_bytes_at=(2_900_000,)))
        slow = program("pull", liar.url("model.meta4"))
        while not liar.bytes_sent("model/w.bin") and slow.poll() is None:
            time.sleep(0.005)
        result = puller(honest.url("model.meta4"))
        ended(slow)
    puller.assert_blobs_are_right()
    assert (result.directory / "w.bin").read_bytes() == MODEL.files["w.bin"]


def lock_of(puller: Puller, ref: str) -> Path:
    return Layout(puller.home).lock(ref_key(parse_ref(ref), Settings(home=puller.home)))


def test_a_lock_held_too_long_is_exit_code_11_and_names_its_owner(puller: Puller) -> None:
    with MODEL.serve() as mirror:
        url = mirror.url("model.meta4")
        Layout(puller.home).prepare()
        with (
            locked(lock_of(puller, url), "test", 1, lambda _: None, lambda: None),
            pytest.raises(StoreLocked) as held,
        ):
            puller(url, lock_timeout=0.3)
    assert held.value.exit_code == 11
    assert f"process {os.getpid()}" in held.value.detail
    assert [f"process {os.getpid()}" in notice.text for notice in puller.of_kind(Notice)] == [True]


def test_a_waiting_pull_finds_the_work_done(puller: Puller, monkeypatch: pytest.MonkeyPatch) -> None:
    with MODEL.serve() as mirror:
        url = mirror.url("model.meta4")
        process = program("pull", url)
        while process.poll() is None and not lock_of(puller, url).exists():
            time.sleep(0.005)
        result = puller(url)
        assert ended(process)[0] == 0
        assert mirror.bytes_sent("model/w.bin") == len(MODEL.files["w.bin"])
    puller.assert_exact(result, MODEL)


def test_a_removed_blob_is_fetched_again_and_nothing_else(puller: Puller) -> None:
    with MODEL.serve() as mirror:
        first = puller(mirror.url("model.meta4"))
        (first.directory / "config.json").resolve().unlink()
        second = puller(mirror.url("model.meta4"))
    puller.assert_exact(second, MODEL)
    assert (second.was_complete, second.received_bytes) == (False, len(MODEL.files["config.json"]))


def test_a_cache_of_another_layout_is_refused(puller: Puller) -> None:
    puller.home.mkdir()
    (puller.home / "VERSION").write_text("99\n")
    with pytest.raises(UnsupportedLayout) as caught:
        puller("hf:org/model")
    assert caught.value.exit_code == 9


def test_too_small_a_disk_is_refused_before_a_byte_is_fetched(puller: Puller, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(execute.shutil, "disk_usage", lambda _: usage(10**7, 10**7, 2_900_000))
    with MODEL.serve() as mirror:
        with pytest.raises(OutOfSpace) as caught:
            puller(mirror.url("model.meta4"))
        assert mirror.bytes_sent("model/w.bin") == 0
    assert caught.value.exit_code == 9
    assert "to fetch" in caught.value.detail
    puller.assert_nothing_published()


def test_the_reserve_counts(puller: Puller, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(execute.shutil, "disk_usage", lambda _: usage(10**7, 10**7, 4_000_000))
    with MODEL.serve() as mirror:
        with pytest.raises(OutOfSpace):
            puller(mirror.url("model.meta4"), disk_reserve=1_000_001)
        puller.assert_exact(puller(mirror.url("model.meta4"), disk_reserve=900_000), MODEL)


def run_limited(limit_bytes: int, *arguments: str) -> tuple[int, str, str]:
    """Run the program where no file may grow beyond a limit, which is what a full disk or quota looks like."""
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, {limit_bytes}))
from mistral_fetch.cli.app import main
main()
"""
    return ended(program(*arguments, code=code))


@pytest.mark.parametrize("limit_bytes", [0, 2000, 1_000_000])
def test_a_disk_that_fills_up_is_exit_code_9_and_the_next_run_succeeds(puller: Puller, limit_bytes: int) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    with MODEL.serve() as mirror:
        code, out, err = run_limited(limit_bytes, "pull", "--quiet", mirror.url("model.meta4"))
        assert (code, out) == (9, ""), err
        assert err.startswith("error: no space left while ")
        assert len(err.splitlines()) == 3
        puller.assert_nothing_published()
        puller.assert_exact(puller(mirror.url("model.meta4")), MODEL)


@pytest.fixture
def read_only(tmp_path: Path) -> object:
    """Return a function that makes a directory read-only, by a mount of its own, and undo it afterwards."""
    mounted: list[Path] = []

    def make(directory: Path) -> None:
        if os.geteuid() != 0 or not shutil.which("mount"):
            pytest.skip("only root may mount, and only without root does mode 0555 bind")
        for options in (["--bind", str(directory), str(directory)], ["-o", "remount,bind,ro", str(directory)]):
            done = subprocess.run(["mount", *options], capture_output=True, check=False)
            if done.returncode:
                pytest.skip(f"mounting is not allowed here: {done.stderr.decode().strip()}")
            mounted[:] = [directory]

    yield make
    for directory in mounted:
        subprocess.run(["umount", str(directory)], check=True)


def test_a_read_only_cache_serves_what_is_complete_and_refuses_the_rest(
    puller: Puller, read_only: Callable[[Path], None]
) -> None:
    other = PublisherSimulator({"x": b"x"}, name="other")
    with MODEL.serve() as mirror, other.serve() as second:
        first = puller(mirror.url("model.meta4"))
        read_only(puller.home)
        assert puller(mirror.url("model.meta4")).directory == first.directory
        with pytest.raises(MistralFetchError) as caught:
            puller(second.url("other.meta4"))
    assert (caught.value.exit_code, caught.value.kind) == (9, "store-not-writable")
    assert "--home" in caught.value.hint
