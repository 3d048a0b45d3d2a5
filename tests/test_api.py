"""``from mistral_fetch import ensure``: what a program gets, and that it gets nothing it did not ask for."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import mistral_fetch
from mistral_fetch import Model, Stop, ensure, path, verify
from mistral_fetch.api import _Listener
from mistral_fetch.errors import (
    AssuranceTooLow,
    ConfigError,
    Interrupted,
    MistralFetchError,
    NotInCache,
    OfflineRefused,
)
from mistral_fetch.events import Notice, SnapshotReady
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.version import __version__

WEIGHTS = bytes(range(256)) * 2000
PUBLISHER = PublisherSimulator({"weights.bin": WEIGHTS, "params.json": b"{}"})
SIZE = sum(map(len, PUBLISHER.files.values()))
PATIENCE = {"connect_timeout": 2, "read_timeout": 2, "lock_timeout": 30}


@pytest.fixture
def mirror():
    with PUBLISHER.serve() as serving:
        yield serving


def test_a_model_is_fetched_once_and_then_found(mirror, tmp_path):
    ref = mirror.url("model.meta4")
    model = ensure(ref, home=tmp_path / "elsewhere", **PATIENCE)
    assert isinstance(model, Model)
    assert (model.directory / "weights.bin").read_bytes() == WEIGHTS
    assert model.directory.is_relative_to(tmp_path / "elsewhere")
    assert (model.ref, model.assurance, model.channel) == (ref, "sha256", "manifest")
    assert (model.was_complete, model.received_bytes) == (False, SIZE)
    again = ensure(ref, home=str(tmp_path / "elsewhere"), offline=True)
    assert (again.was_complete, again.received_bytes) == (True, 0)
    assert (again.directory, again.content_digest) == (model.directory, model.content_digest)
    assert path(ref, home=tmp_path / "elsewhere") == model.directory


def test_settings_are_those_of_the_command_line(mirror, own_home, monkeypatch):
    monkeypatch.setenv("MISTRAL_FETCH_OFFLINE", "1")
    with pytest.raises(OfflineRefused):
        ensure(mirror.url("model.meta4"))
    model = ensure(mirror.url("model.meta4"), offline=False)
    assert model.directory.is_relative_to(own_home)


def test_errors_are_the_tree_of_the_command_line(mirror, tmp_path):
    ref = mirror.url("model.meta4")
    with pytest.raises(NotInCache):
        path(ref)
    with pytest.raises(NotInCache):
        verify(ref)
    with pytest.raises(AssuranceTooLow) as caught:
        ensure(ref, min_assurance="signed")
    assert isinstance(caught.value, mistral_fetch.MistralFetchError)
    assert all(caught.value.lines())
    with pytest.raises(ConfigError):
        ensure(ref, min_assurance="certain")
    with pytest.raises(TypeError, match="no setting called 'colour'"):
        ensure(ref, colour="red")


def test_progress_is_two_numbers_that_never_go_back(mirror):
    told: list[tuple[int, int]] = []
    events = []
    model = ensure(mirror.url("model.meta4"), progress=lambda *now: told.append(now), on_event=events.append)
    assert told == sorted(told)
    assert told[-1] == (SIZE, SIZE)
    assert {total for _, total in told} == {SIZE}
    assert SnapshotReady(str(model.directory), model.content_digest) in events


def test_callbacks_come_one_at_a_time():
    """While one is told something, a second thread that has something to tell waits."""
    seen = []

    def tell(event):
        seen.append(event.text)
        if event.text == "first":
            second.start()
            second.join(0.2)
            assert second.is_alive()

    listener = _Listener(None, tell, Stop())
    second = threading.Thread(target=listener, args=(Notice("second"),))
    with listener:
        listener(Notice("first"))
        second.join()
    assert seen == ["first", "second"]


def test_what_a_callback_raises_ends_the_transfer_and_comes_out(mirror, own_home):
    def fail(_done, _total):
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        ensure(mirror.url("model.meta4"), progress=fail)
    assert not list(own_home.glob("snapshots/*"))
    assert ensure(mirror.url("model.meta4")).directory.is_dir()


def test_a_stop_from_another_thread_ends_it(mirror):
    stop = Stop()
    stop.set()
    with pytest.raises(Interrupted):
        ensure(mirror.url("model.meta4"), stop=stop)


def test_threads_that_want_the_same_model_share_one_transfer(mirror):
    ref = mirror.url("model.meta4")
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: ensure(ref, **PATIENCE), range(4)))
    assert len({model.directory for model in models}) == 1
    assert sum(model.received_bytes for model in models) == SIZE
    assert sum(not model.was_complete for model in models) == 1


def test_verify_names_the_file_that_is_wrong(mirror):
    ref = mirror.url("model.meta4")
    model = ensure(ref)
    assert verify(ref).is_good
    blob = (model.directory / "weights.bin").resolve()
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.seek(1000)
        file.write(b"!")
    found = verify(ref)
    assert not found.is_good
    assert (found.ref, found.directory) == (model.ref, model.directory)
    (wrong,) = [file for file in found.files if not file.is_good]
    assert wrong.path == "weights.bin"
    assert 1000 in range(wrong.bad_spans[0].start, wrong.bad_spans[0].end)


QUIET = """
import json, signal, sys, threading
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
import mistral_fetch
light = sorted(sys.modules)
mistral_fetch.ensure(sys.argv[1])
assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
assert threading.active_count() == 1, threading.enumerate()
json.dump(light, sys.stderr)
"""


def test_it_prints_nothing_and_leaves_the_process_as_it_was(mirror, tmp_path):
    argv = [sys.executable, "-c", QUIET, mirror.url("model.meta4")]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60, cwd=Path(__file__).parents[1])
    assert done.stdout == ""
    loaded = set(json.loads(done.stderr))
    assert not loaded & {"httpx", "libtorrent", "torch", "typer", "rich", "mistral_fetch.api", "mistral_fetch.config"}


def test_the_front_door_names_what_there_is():
    assert set(mistral_fetch.__all__) <= set(dir(mistral_fetch))
    assert [name for name in mistral_fetch.__all__ if not hasattr(mistral_fetch, name)] == []
    assert mistral_fetch.__version__ == __version__
    assert mistral_fetch.MistralFetchError is MistralFetchError
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        mistral_fetch.frobnicate  # noqa: B018


def test_the_page_about_it_is_true(mirror, own_home):
    """The examples of docs/fetch-api.md, against a mirror on loopback."""
    page = Path(__file__).parents[1] / "docs" / "fetch-api.md"
    names = {"address": mirror.url("model.meta4"), "home": own_home}
    examples = doctest.DocTestParser().get_doctest(page.read_text(), names, page.name, str(page), 0)
    assert len(examples.examples) > 8
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.DocTestRunner(optionflags=flags).run(examples).failed == 0
