"""Pulls as processes of their own, with the engine at the size of a test; see ``engine.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mistral_fetch.manifest import MirrorUrl
from mistral_fetch.metalink import serialise_metalink
from mistral_fetch.simulators.mirror import MirrorSimulator
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.snapshots import find_snapshot, list_refs
from tests.transfer.engine import PIECE

ROOT = Path(__file__).parents[2]
SMALL = "from tests.transfer.engine import shrink; shrink()"
MAIN = "from mistral_fetch.cli.app import main; main()"
# A file system that grants every lock, as some network file systems do.
LYING_FLOCK = "import fcntl; fcntl.flock = lambda *_: None"


def start_pull(
    home: Path, *arguments: str, before: str = "", environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a pull in a group of its own.

    Args:
        home: The cache.
        arguments: What follows ``pull``.
        before: Python to run first.
        environment: Further variables.
    """
    argv = [sys.executable, "-c", "\n".join((SMALL, before, MAIN)), "pull", "--json", "--progress", "none"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "MISTRAL_FETCH_LOCK_TIMEOUT": "30", **(environment or {})}
    return subprocess.Popen(
        [*argv, "--home", str(home), *arguments],
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def result_of(process: subprocess.Popen[str], timeout_seconds: float = 60.0) -> tuple[int, dict[str, Any], str]:
    """Return exit code, the object printed, and standard error of a pull that nobody kills."""
    try:
        out, err = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, json.loads(out) if out.strip() else {}, err


def write_manifest(path: Path, publisher: PublisherSimulator, mirrors: list[MirrorSimulator], pins: str) -> str:
    """Write the truth, with piece hashes or without, and where it is to be had; return the path as text."""
    truth = publisher.manifest(piece_length=PIECE if pins == "pieces" else None)
    entries = []
    for entry in truth.files:
        urls = tuple(MirrorUrl(mirror.url(entry.path), number) for number, mirror in enumerate(mirrors, start=1))
        entries.append(replace(entry, mirrors=urls))
    path.write_bytes(serialise_metalink(truth.with_files(entries)))
    return str(path)


def assert_what_is_named_is_right(home: Path, publisher: PublisherSimulator) -> None:
    """Check that every complete snapshot has the right bytes, and that every ref leads to one."""
    layout = Layout(home)
    for directory in home.glob("snapshots/*"):
        complete = find_snapshot(layout, directory.name)
        if complete is not None:
            assert {path: (complete / path).read_bytes() for path in publisher.files} == publisher.files
    assert all(find_snapshot(layout, record.content_digest) for record in list_refs(layout))
