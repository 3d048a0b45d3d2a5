"""Every change of the disk that a pull makes is struck once; after each, one question: is what has a name right?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Return a place for hundreds of small caches: in memory where there is such a place."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else tmp_path) as name:
        yield Path(name)


def strike(mode: str, pins: str, folder: Path, stride: int = 1) -> list[dict[str, Any]]:
    """Return what became of the pull that was struck at its first change, at its second, and so on."""
    argv = [sys.executable, str(Path(__file__).with_name("faults.py")), mode, pins, str(folder), str(stride)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(argv, env=environment, check=True, stdout=subprocess.PIPE, timeout=170)
    return [json.loads(line) for line in ended.stdout.splitlines()]


def assert_nothing_wrong_and_the_next_pull_ends_exact(outcomes: list[dict[str, Any]]) -> None:
    assert outcomes[-1]["first"] == "not reached"
    assert [o for o in outcomes if o["wrong"] or o["wrong_later"]] == []
    assert [o for o in outcomes if o["second"] != "exact"] == []
    # A killed writer's temporary file of a few bytes may stay in VERSION's or a ref's folder; nobody reads it.
    left = {path for outcome in outcomes for path in outcome["left"]}
    assert {path for path in left if not path.startswith((".VERSION.", "refs/model/.manifest."))} == set()


@pytest.mark.parametrize("pins", ["pinned", "unpinned"])
def test_a_kill_at_any_change_leaves_nothing_wrong(folder: Path, pins: str) -> None:
    outcomes = strike("kill", pins, folder, stride=1 if pins == "pinned" else 3)
    assert {outcome["first"] for outcome in outcomes} == {"cut", "not reached"}
    assert len(outcomes) > 30
    assert_nothing_wrong_and_the_next_pull_ends_exact(outcomes)


@pytest.mark.parametrize("pins", ["unpinned", "pinned"])
def test_a_power_cut_at_any_change_leaves_nothing_wrong(folder: Path, pins: str) -> None:
    outcomes = strike("power", pins, folder, stride=1 if pins == "unpinned" else 3)
    assert {outcome["first"] for outcome in outcomes} == {"cut", "not reached"}
    assert len(outcomes) > 30
    assert_nothing_wrong_and_the_next_pull_ends_exact(outcomes)


@pytest.mark.parametrize("pins", ["linked", "copied", "damaged"])
@pytest.mark.parametrize("mode", ["kill", "power"])
def test_a_cut_while_bytes_of_this_machine_are_taken_up_leaves_nothing_wrong(
    folder: Path, mode: str, pins: str
) -> None:
    outcomes = strike(mode, pins, folder, stride=2)
    assert {outcome["first"] for outcome in outcomes} == {"cut", "not reached"}
    assert len(outcomes) > 20
    assert_nothing_wrong_and_the_next_pull_ends_exact(outcomes)


@pytest.mark.parametrize("pins", ["http-pieces", "http-sha256"])
@pytest.mark.parametrize("mode", ["kill", "power"])
def test_a_cut_of_a_pull_over_several_connections_leaves_nothing_wrong_and_costs_nothing_recorded(
    folder: Path, mode: str, pins: str
) -> None:
    outcomes = strike(mode, pins, folder, stride=9)
    assert {outcome["first"] for outcome in outcomes} == {"cut", "not reached"}
    assert len(outcomes) > 15
    assert_nothing_wrong_and_the_next_pull_ends_exact(outcomes)


@pytest.mark.parametrize(
    "mode, kind", [("ENOSPC", "out-of-space 9"), ("EROFS", "store-not-writable 9"), ("EIO", "store-error 9")]
)
def test_a_disk_that_refuses_at_any_change_is_explained_and_leaves_nothing_wrong(
    folder: Path, mode: str, kind: str
) -> None:
    outcomes = strike(mode, "pinned", folder, stride=4)
    # "complete": a refused link becomes a hard link.
    assert {outcome["first"] for outcome in outcomes} <= {kind, "complete", "not reached"}
    assert sum(outcome["first"] == kind for outcome in outcomes) > 25
    assert_nothing_wrong_and_the_next_pull_ends_exact(outcomes)
