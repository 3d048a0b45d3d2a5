"""Every example on the page about the simulators runs as it is printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "simulators.md"


def examples() -> list[tuple[str, str]]:
    """Return each block of Python with the heading above it."""
    sections = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    blocks = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(heading, block) for heading, text in sections for block in blocks.findall(text)]


def test_each_simulator_has_an_example() -> None:
    assert [heading for heading, _ in examples()] == ["A mirror that lies", "A publisher", "A hub", "A seeder"]


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=heading, marks=[pytest.mark.swarm] if "seeder" in heading else [])
        for heading, block in examples()
    ],
)
def test_an_example_runs_as_it_is_printed(block: str, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore::ResourceWarning"}
    ended = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=90
    )
    assert ended.returncode == 0, ended.stderr
