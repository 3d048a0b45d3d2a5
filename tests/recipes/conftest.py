"""A publisher on loopback, the two files that lock its model, a wheel, and machines to provision."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mistral_fetch.manifest import ModelInfo
from mistral_fetch.simulators.publisher import PublisherSimulator
from tests.recipes.appliers import build_tool
from tests.recipes.sandbox import Sandbox

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "mistral_fetch" / "demo_model"
FILES = ("consolidated.00.pth", "params.json", "tokenizer.model", "RELEASE")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The program as it is installed, built by the build backend itself."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def mirror():
    """The demo model, published with piece hashes every 64 KiB; it counts what it sends."""
    files = {name: (DEMO / name).read_bytes() for name in FILES}
    with PublisherSimulator(files, name="demo", info=ModelInfo(name="demo", chat_template="demo")).serve() as serving:
        yield serving


@pytest.fixture(scope="module")
def models(mirror, tmp_path_factory):
    """A directory with mistral-fetch.toml and the lock that the program wrote for it."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "mistral-fetch.toml").write_text(f'[[model]]\nref = "{mirror.url("demo.meta4")}"\n')
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MISTRAL_FETCH_HOME": str(folder / "home")}
    command = [sys.executable, "-m", "mistral_fetch", "lock", "--quiet"]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=60)
    return folder


@pytest.fixture(scope="session")
def tool(tmp_path_factory, wheel):
    """The environment of the image without weights, made as the Dockerfile says."""
    return build_tool(Sandbox(tmp_path_factory.mktemp("image") / "machine", "no model", wheel))


@pytest.fixture
def sandbox(tmp_path, mirror, wheel, tool):
    """A machine with nothing on it."""
    return Sandbox(tmp_path / "machine", mirror.url("demo.meta4"), wheel, tool)


@pytest.fixture
def prepared(sandbox, models):
    """A machine that has the two files in /etc/mistral-fetch, and nothing else."""
    for name in ("mistral-fetch.toml", "mistral-fetch.lock"):
        sandbox.path(f"/etc/mistral-fetch/{name}").write_bytes((models / name).read_bytes())
    sandbox.path("/etc/mistral-fetch/model.env").write_text(f"MODEL={sandbox.model}\n")
    return sandbox
