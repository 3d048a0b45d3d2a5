"""Running the command line inside the test's own process: whole outputs and exit codes, as a shell would see them."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mistral_fetch.cli.app import main
from mistral_fetch.metalink import serialise_metalink
from mistral_fetch.simulators.publisher import PublisherSimulator
from tests.cli.services import Service

ROOT = Path(__file__).parents[2]
# Piece hashes every 64 KiB: five of them, the last one short.
WEIGHTS = bytes(range(256)) * 1100
FILES = {"params.json": b'{"dim": 8}\n', "weights.bin": WEIGHTS}
SIZE = sum(map(len, FILES.values()))


@dataclass(frozen=True)
class Transcript:
    """What one command left on the screen."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Return standard output as the one JSON document it must be."""
        return json.loads(self.out)


class Program:
    """Runs ``mistral-fetch`` with a cache of its own and none of the machine's settings."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.home = home
        self._monkeypatch = monkeypatch
        self._capfd = capfd

    def __call__(self, *arguments: str | Path, stdin: Any = "") -> Transcript:
        self._capfd.readouterr()
        self._monkeypatch.setattr(sys, "argv", ["mistral-fetch", *map(str, arguments)])
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        with pytest.raises(SystemExit) as ended:
            main()
        printed = self._capfd.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return Transcript(code, printed.out, printed.err)


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """Take away every variable that changes what the program does."""
    for name in list(os.environ):
        if name.startswith(("MISTRAL_FETCH_", "HF_")) or name.lower().endswith("_proxy") or name == "NO_COLOR":
            monkeypatch.delenv(name)
    monkeypatch.setenv("MISTRAL_FETCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)
    return monkeypatch


@pytest.fixture
def program(environment, tmp_path, capfd):
    """The command line, with an empty cache at ``tmp_path/home`` and ``tmp_path`` as the current directory."""
    return Program(tmp_path / "home", environment, capfd)


@pytest.fixture
def service(environment):
    """Start ``mistral-fetch`` as a service, in a process of its own that ends with the test."""
    running: list[Service] = []

    def start(*arguments: str | Path) -> Service:
        running.append(Service(environment, *arguments))
        return running[-1]

    yield start
    for one in running:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()


@pytest.fixture
def manifest(tmp_path):
    """``tiny.meta4`` in the current directory, its files beside it: a model that needs no network."""
    publisher = PublisherSimulator(FILES, name="tiny")
    for path, data in FILES.items():
        (tmp_path / "tiny").mkdir(exist_ok=True)
        (tmp_path / "tiny" / path).write_bytes(data)
    path = tmp_path / "tiny.meta4"
    path.write_bytes(serialise_metalink(publisher.manifest()))
    return path


@pytest.fixture
def pulled(program, manifest):
    """The cache's directory of that model, complete."""
    done = program("pull", "tiny.meta4", "--quiet")
    assert done.code == 0, done.err
    return Path(done.out.strip())
