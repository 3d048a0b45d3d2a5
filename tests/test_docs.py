"""Documentation that repeats the program must agree with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from mistral_fetch.config import ENVIRONMENT_PREFIX, Settings
from mistral_fetch.errors import ExitCode
from mistral_fetch.units import MIB

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GENERATOR = ROOT / "tools" / "generate_cli_reference.py"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


def check_reference():
    command = [sys.executable, str(GENERATOR), "--check"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}  # this checkout's program, whatever is installed
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60)


def test_the_command_line_reference_is_what_the_program_says():
    answer = check_reference()
    assert answer.returncode == 0, answer.stderr


def test_exit_codes_are_listed_exactly():
    rows = re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", (DOCS / "exit-codes.md").read_text(), re.MULTILINE)
    assert [(int(code), name) for code, name in rows] == [(code.value, code.name) for code in ExitCode]


def test_every_setting_is_explained():
    text = (DOCS / "configuration.md").read_text()
    named = set(re.findall(rf"{ENVIRONMENT_PREFIX}[A-Z_]+\b", text)) - {ENVIRONMENT_PREFIX + "CONFIG"}
    assert named >= {ENVIRONMENT_PREFIX + field.name.upper() for field in fields(Settings)}
    assert {name.removeprefix(ENVIRONMENT_PREFIX).lower() for name in named} <= {
        field.name for field in fields(Settings)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_inside_the_repository_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [t for t in targets if "://" not in t and not t.startswith("mailto:") and not (page.parent / t).exists()]
    assert missing == []


def shown_commands(text):
    """Give the command lines in a page's code: after ``$`` in transcripts, whole lines in other blocks."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    for language, block in fence.findall(text):
        lines = block.splitlines()
        yield from [line[2:] for line in lines if line.startswith("$ ")] if language == "console" else lines
    yield from re.findall("`([^`\n]+)`", fence.sub("", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_are_shown_exist(page):
    """A command line in a page begins with a command of this program, not of a wish."""
    known = re.findall(r"^\| \[`([a-z]+)[` ]", (DOCS / "cli.md").read_text(), re.MULTILINE)
    found = [re.match(r"mistral-fetch ([a-z]+)\b", line) for line in shown_commands(page.read_text())]
    assert {match[1] for match in found if match} <= set(known)


def test_defaults_are_the_programs_own():
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|[^|]*\| ([^|]*) \|", (DOCS / "configuration.md").read_text(), re.MULTILINE)
    told = dict(rows)
    settings = Settings(home=Path())
    assert told["dht"] == str(settings.dht).lower()
    assert told["offline"] == str(settings.offline).lower()
    assert told["via"] == settings.via
    assert told["min_assurance"] == settings.min_assurance.label
    assert told["disk_reserve"] == f"{settings.disk_reserve // MIB} MiB"
    for name in ("lock_timeout", "connect_timeout", "read_timeout", "peer_timeout", "stall_timeout"):
        assert told[name] == f"{getattr(settings, name):g} s"
