"""Where a process can be told to die, and that it does so there and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mistral_fetch.store.crash_points import CRASH_POINTS, VARIABLE

VISITS = """
from mistral_fetch.store.crash_points import reached
for number in range(1, 5):
    print(number, flush=True)
    reached("piece-written")
    reached("data-synced")
"""


def visiting(value: str | None) -> subprocess.CompletedProcess[str]:
    """Run a process that passes two places four times each."""
    environment = {name: text for name, text in os.environ.items() if name != VARIABLE}
    if value is not None:
        environment[VARIABLE] = value
    return subprocess.run(
        [sys.executable, "-c", VISITS], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("value, visits", [("data-synced", 1), ("data-synced:1", 1), ("piece-written:3", 3)])
def test_the_process_is_killed_at_the_named_visit(value: str, visits: int) -> None:
    ended = visiting(value)
    assert ended.returncode == -9
    assert ended.stdout.split() == [str(number) for number in range(1, visits + 1)]


@pytest.mark.parametrize("value", [None, "", "journal-synced", "piece-written:5"])
def test_nobody_dies_who_was_not_told_to(value: str | None) -> None:
    ended = visiting(value)
    assert (ended.returncode, ended.stdout.split()) == (0, ["1", "2", "3", "4"])


@pytest.mark.parametrize(
    "value", ["data-sync", "DATA-SYNCED", ":2", "data-synced:0", "data-synced:x", "data-synced:-1"]
)
def test_a_place_that_does_not_exist_is_refused_with_those_that_do(value: str) -> None:
    # A test that waits for a crash at a misspelt place would pass without one.
    ended = visiting(value)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert f"{VARIABLE}={value}" in ended.stderr
    assert all(name in ended.stderr for name in CRASH_POINTS)
    assert "Traceback" not in ended.stderr
