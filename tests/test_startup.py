"""Starting is cheap: help and a complete ``pull`` load no heavy library and open no socket."""

from __future__ import annotations

import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mistral_fetch.errors import ExitCode
from mistral_fetch.publish.build import publish

HEAVY = ("torch", "numpy", "libtorrent", "httpx", "httpcore", "rich", "pydantic", "asyncio", "http", "ssl")
HEAVY += ("model_signing", "cryptography", "sigstore")
RUNS = 5
# Processor time, since a busy machine's wall time says nothing. The program itself needs about a quarter of this on
# the machine in the README; the rest is room for slow ones.
LIMIT_SECONDS = 0.4

# Runs the program, then tells on its last line of output what it loaded and which sockets it touched.
WATCHED = """
import json, sys
sockets = []
sys.addaudithook(lambda event, _: sockets.append(event) if event.startswith("socket.") else None)
from mistral_fetch.cli.app import main
try:
    main()
except SystemExit as ended:
    code = ended.code or 0
print(json.dumps({"code": code, "modules": sorted(sys.modules), "sockets": sockets}))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that holds one small model, and the manifest it was pulled by."""
    folder = tmp_path_factory.mktemp("startup")
    model = folder / "out" / "tiny"
    model.mkdir(parents=True)
    (model / "weights.bin").write_bytes(bytes(100_000))
    made = publish(model, folder / "out", name="tiny")
    home = folder / "home"
    run([*program(), "pull", str(made.manifest_path), "--home", str(home)])
    return home, made.manifest_path


def program():
    return [sys.executable, "-m", "mistral_fetch"]


def run(argv):
    env = {name: value for name, value in os.environ.items() if not name.startswith("MISTRAL_FETCH_")}
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    return subprocess.run(argv, check=True, capture_output=True, text=True, env=env, timeout=60)


def commands(cache):
    home, manifest = cache
    return {
        "version": ["--version"],
        "help": ["--help"],
        "pull of a complete model": ["pull", str(manifest), "--home", str(home)],
        "path": ["path", str(manifest), "--home", str(home)],
    }


NAMES = ("version", "help", "pull of a complete model", "path")


def watch(*arguments):
    """Run the program under watch; return what it printed and what it did."""
    *printed, told = run([sys.executable, "-c", WATCHED, *arguments]).stdout.splitlines()
    return printed, json.loads(told)


@pytest.mark.parametrize("name", NAMES)
def test_loads_no_heavy_library_and_opens_no_socket(cache, name):
    printed, told = watch(*commands(cache)[name])
    assert (told["code"], told["sockets"]) == (0, [])
    assert [module for module in HEAVY if module in told["modules"]] == []
    assert printed


def test_the_watch_sees_sockets_and_libraries(cache, tmp_path):
    """The same command with work to do needs an HTTP client; nobody listens on port 1."""
    _, manifest = cache
    other = tmp_path / "other.meta4"
    other.write_text(re.sub(">[^<]*/weights.bin<", ">http://127.0.0.1:1/weights.bin<", manifest.read_text()))
    _, told = watch("pull", str(other), "--home", str(tmp_path / "home"), "--quiet", "--via", "http")
    assert told["code"] == ExitCode.NO_SOURCE
    assert {"httpx", "ssl"} <= set(told["modules"])
    assert "socket.connect" in told["sockets"]


@pytest.mark.parametrize("name", NAMES)
def test_starts_fast(cache, name, record_property):
    argv = [*program(), *commands(cache)[name]]
    run(argv)  # warm: byte code and file cache
    processor, wall = [], []
    for _ in range(RUNS):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        run(argv)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall.append(time.perf_counter() - started)
        processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    median = statistics.median(processor)
    line = f"{name}: {median * 1000:.0f} ms of processor time, {statistics.median(wall) * 1000:.0f} ms on the clock"
    record_property("startup", line)
    print(line)
    assert median < LIMIT_SECONDS, line
