"""``doctor``: one paste-able report on this machine, with no secrets in it and no network used."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import typer

from mistral_fetch.cli.options import FrontEnd, command
from mistral_fetch.errors import MistralFetchError
from mistral_fetch.units import format_size
from mistral_fetch.version import __version__

_PACKAGES = ("httpx", "libtorrent", "torch", "safetensors", "sentencepiece", "mistral-common")
# Whether these are set is worth knowing; their values may hold credentials.
_VARIABLES = (
    "HF_TOKEN",
    "HF_ENDPOINT",
    "HF_HOME",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "SSL_CERT_FILE",
)


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(app, "doctor", epilog="Exit codes: 0 a model can be fetched and run here, 1 something is missing.")(doctor)


def doctor(front: FrontEnd) -> int:
    """Report on this machine: cache, disk, packages, runtime, threads. Opens no socket and prints no secret."""
    checks = {
        "program": _program,
        "cache": lambda: _cache(front.settings.home),
        "disk": lambda: _disk(front.settings.home, front.settings.disk_reserve),
        "links": lambda: _links(front.settings.home),
        "locks": lambda: _locks(front.settings.home),
        "packages": _packages,
        "runtime": lambda: _runtime(front.settings.python),
        "threads": _threads,
        "environment": _environment,
    }
    report = {name: _run(check) for name, check in checks.items()}
    width = max(map(len, report))
    lines = [f"{'ok ' if good else 'BAD'} {name.ljust(width)}  {text}" for name, (good, text) in report.items()]
    fields = {name: {"ok": good, "detail": text} for name, (good, text) in report.items()}
    front.result(fields, "\n".join(lines))
    return 0 if all(good for good, _ in report.values()) else 1


def _run(check: Callable[[], str]) -> tuple[bool, str]:
    try:
        return True, check()
    except MistralFetchError as error:
        return False, f"{error.what}; {error.detail}; {error.hint}"
    except OSError as error:
        return False, str(error)


def _program() -> str:
    return f"mistral-fetch {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"


def _cache(home: Path) -> str:
    from mistral_fetch.cli.render import count
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.snapshots import list_refs

    layout = Layout(home)
    layout.check_version()
    if home.exists() and not home.is_dir():
        raise NotADirectoryError(f"{home} is not a directory; choose another cache with --home DIR")
    return f"{home}, {count(len(list_refs(layout)), 'model')}" if home.is_dir() else f"{home}, not made yet"


def _existing(home: Path) -> Path:
    return next(path for path in (home, *home.parents) if path.is_dir())


def _disk(home: Path, reserve_bytes: int) -> str:
    directory = _existing(home)
    if not os.access(directory, os.W_OK):
        raise PermissionError(f"{directory} is not writable; choose another cache with --home DIR")
    free = shutil.disk_usage(directory).free
    if free < reserve_bytes:
        needed = format_size(reserve_bytes)
        raise OSError(f"{format_size(free)} free in {directory}, less than the reserve of {needed}; free some space")
    return f"{format_size(free)} free"


def _links(home: Path) -> str:
    """Try what snapshots need: symbolic links, else hard links, else copies."""
    with tempfile.TemporaryDirectory(dir=_existing(home), prefix=".mistral-fetch-doctor-") as folder:
        target = Path(folder, "target")
        target.write_bytes(b"x")
        link = Path(folder, "link")
        for name, make in (("symbolic links", link.symlink_to), ("hard links", link.hardlink_to)):
            try:
                make(target)
            except OSError:
                continue
            return name
    return "neither symbolic nor hard links: files will be copied"


def _locks(home: Path) -> str:
    from mistral_fetch.store.lock import locked

    with tempfile.TemporaryDirectory(dir=_existing(home), prefix=".mistral-fetch-doctor-") as folder:
        path = Path(folder, "lock")
        with locked(path, "doctor", 1.0, lambda _owner: None, lambda: None):
            try:
                with locked(path, "doctor", 0.0, lambda _owner: None, lambda: None):
                    return "flock does not exclude here (a network file system?); pulls stay correct without it"
            except MistralFetchError:
                return "flock works"


def _packages() -> str:
    import importlib.metadata  # brings the whole email package along

    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} missing")
    return ", ".join(found)


def _runtime(configured: str) -> str:
    from mistral_fetch.launch.locate import find_interpreter

    return f"{find_interpreter(configured).executable} can run models"


def _threads() -> str:
    from mistral_fetch.launch.cpu import usable_threads

    return f"{usable_threads()} usable of {os.cpu_count()} cores"


def _environment() -> str:
    names = [name for name in _VARIABLES if os.environ.get(name) or os.environ.get(name.lower())]
    ours = sorted(name for name in os.environ if name.startswith("MISTRAL_FETCH_"))
    inside = "in a virtual environment" if sys.prefix != sys.base_prefix else "outside a virtual environment"
    return f"{inside}; set: {', '.join([*names, *ours]) or 'nothing'}"
