"""The wheel: what is in it, and that it runs where nothing of this checkout can be seen.

Dependencies are not installed again: the new environment borrows them from the one that runs the tests, by a
``.pth`` file. Such a folder's own ``.pth`` files are not read, so an editable install there does not leak in.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from mistral_fetch import __version__

ROOT = Path(__file__).parents[1]
MAX_WHEEL_BYTES = 6_000_000
MANUAL = f"mistral_fetch-{__version__}.data/data/share/man/man1/mistral-fetch.1"
MUST_HOLD = (
    "mistral_fetch/__init__.py",
    "mistral_fetch/py.typed",
    "mistral_fetch/data/catalog.json",
    "mistral_fetch/licences/Apache-2.0.txt",
    "mistral_fetch/demo_model/RELEASE",
    "mistral_fetch/demo_model/consolidated.00.pth",
    "mistral_fetch/demo_model/params.json",
    "mistral_fetch/demo_model/tokenizer.model",
    "mistral_fetch/simulators/mirror.py",
    "mistral_fetch/simulators/seeder.py",
    "mistral_runtime/__main__.py",
    "mistral_runtime/py.typed",
    "mistral_runtime/serve/page/index.html",
)


def run(*argv, **options):
    return subprocess.run([*map(str, argv)], check=True, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built by the build backend itself: nothing is downloaded."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out, cwd=ROOT)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A new environment that has the wheel; returns a function that runs its programs."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel)
    (packages,) = folder.glob("lib/python*/site-packages")
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "borrowed.pth").write_text("".join(f"{path}\n" for path in sorted(borrowed)))
    # Nothing of ours from outside: neither variables nor the current directory.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MISTRAL_FETCH_"))}
    env["MISTRAL_FETCH_HOME"] = str(folder / "home")

    def execute(program, *arguments):
        return run(folder / "bin" / program, *arguments, cwd=folder, env=env).stdout

    execute.packages, execute.folder = packages, folder
    return execute


def test_holds_exactly_two_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names} == {
        "mistral_fetch",
        "mistral_runtime",
        f"mistral_fetch-{__version__}.dist-info",
        f"mistral_fetch-{__version__}.data",  # the manual page alone
    }
    assert [name for name in names if ".data/" in name] == [MANUAL]
    assert [name for name in MUST_HOLD if name not in names] == []
    assert [name for name in names if re.search(r"__pycache__|\.pyc$|/tests?/|\.so$", name)] == []


def test_every_module_of_the_checkout_is_in_it(wheel):
    folders = {"mistral_fetch": ROOT / "mistral_fetch", "mistral_runtime": ROOT / "runtime/mistral_runtime"}
    ours = {f"{name}/{path.relative_to(folder)}" for name, folder in folders.items() for path in folder.rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.endswith(".py")}
    assert held == ours


def test_is_small_and_says_what_it_is(wheel):
    assert wheel.stat().st_size < MAX_WHEEL_BYTES
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"mistral_fetch-{__version__}.dist-info/METADATA").decode()
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert licences
    base = re.findall(r"^Requires-Dist: ([a-z-]+)(?!.*extra ==)", metadata, re.MULTILINE)
    assert sorted(base) == ["httpx", "libtorrent", "platformdirs", "rich", "tomli", "typer"]


def test_what_runs_is_what_was_installed(environment):
    for package in ("mistral_fetch", "mistral_runtime"):
        where = environment("python", "-c", f"import {package}; print({package}.__file__)")
        assert Path(where.strip()) == environment.packages / package / "__init__.py"


def test_version_and_help(environment):
    assert environment("mistral-fetch", "--version") == f"mistral-fetch {__version__}\n"
    assert environment("mistral-fetch", "--help").startswith("Usage: mistral-fetch ")
    assert environment("python", "-m", "mistral_fetch", "--version") == f"mistral-fetch {__version__}\n"
    assert "generate" in environment("python", "-m", "mistral_runtime", "--help")


def test_the_manual_page_lies_where_man_looks(environment):
    page = environment.folder / "share" / "man" / "man1" / "mistral-fetch.1"
    assert page.read_bytes() == (ROOT / "docs" / "mistral-fetch.1").read_bytes()


def test_the_catalog_came_along(environment):
    assert "mistral-7b@v0.1" in environment("mistral-fetch", "list", "--catalog")
    assert "Apache-2.0" in environment("mistral-fetch", "show", "mistral-7b")


def test_doctor_finds_the_runtime(environment):
    report = environment("mistral-fetch", "doctor")
    assert f"ok   program       mistral-fetch {__version__}" in report
    assert "can run models" in report
