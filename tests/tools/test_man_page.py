"""``docs/mistral-fetch.1``: it says what the program says, in roff that formatters accept."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mistral_fetch.errors import ExitCode

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "mistral-fetch.1"


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MANWIDTH": "200", "LC_ALL": "C.UTF-8"}
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def test_it_is_what_the_program_says():
    answer = run(sys.executable, "tools/generate_man_page.py", "--check")
    assert answer.returncode == 0, answer.stderr


def test_it_is_plain_roff():
    text = PAGE.read_text("ascii")
    requests = {line.split()[0] for line in text.splitlines() if line.startswith((".", "'"))}
    assert requests == {'.\\"', ".TH", ".SH", ".SS", ".TP", ".PP", ".B", ".I", ".RI"}
    codes = re.search(r"^\.SH EXIT STATUS\n(.*?)^\.SH", text, re.MULTILINE | re.DOTALL)
    assert codes
    assert [int(code) for code in re.findall(r'^\.B "(\d+)"', codes[1], re.MULTILINE)] == [int(c) for c in ExitCode]


@pytest.mark.skipif(not shutil.which("groff"), reason="needs groff")
def test_groff_has_no_complaint():
    answer = run("groff", "-man", "-ww", "-Tascii", "-z", str(PAGE))
    assert (answer.returncode, answer.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("mandoc"), reason="needs mandoc")
def test_mandoc_finds_no_error():
    answer = run("mandoc", "-Tlint", "-Werror", str(PAGE))
    assert answer.returncode == 0, answer.stdout


@pytest.mark.skipif(not (shutil.which("man") and shutil.which("groff")), reason="needs man")
def test_a_reader_sees_the_options_as_they_are_typed():
    shown = run("man", "-l", "-Tutf8", str(PAGE)).stdout
    plain = re.sub(r".\x08|\x1b\[[0-9;]*m", "", shown)
    assert "--min-assurance LEVEL" in plain
    assert "mirror check URL" in plain
