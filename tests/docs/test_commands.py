"""Every command line that a page shows is one that the program takes; those that need nothing are run."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from mistral_fetch.cli.app import app
from tests.docs.shown import ROOT, every_shown_line

SHOWN = [shown for shown in every_shown_line() if shown.commands()]
DEMO = ROOT / "mistral_fetch" / "demo_model"

# Lines that run here, in this order, on the demo model: it stands for the directories that pages call by other names.
DIRECTORIES = ("my-model", "mistral-tiny", "model", "mistral-7b-instruct-v0.3")
RUNNABLE = (
    "mistral-fetch publish ./my-model --out ./site",
    "mistral-fetch publish ./mistral-tiny --out out --licence Apache-2.0 --model-version v1",
    "mistral-fetch list --catalog",
    "mistral-fetch doctor",
    "mistral-fetch config",
    "mistral-fetch config explain lock_timeout",
    "mistral-fetch config set home /srv/models",
    "mistral-fetch config unset home",
    "source <(mistral-fetch completion bash)",
)
# Why the others are only parsed: the first word after mistral-fetch that explains it.
REASONS = {
    "run": "computes, or fetches 14.5 GB; tests/recipes and tests/cli run it",
    "chat": "a conversation",
    "pull": "fetches from the internet, or from machines that are made up",
    "repair": "needs a model of the internet",
    "verify": "needs a model of the internet",
    "compare": "needs a model of the internet",
    "env": "needs a model of the internet",
    "export": "needs a model of the internet",
    "bundle": "needs a model of the internet; tests/bundle runs all of them",
    "lock": "asks the internet; tests/recipes runs it",
    "sync": "fetches from the internet; tests/recipes runs it",
    "publish": "needs a model of the internet, or a key; tests/publish runs it",
    "sign": "needs a key; tests/cli runs it",
    "seed": "runs until it is stopped; tests/recipes runs it",
    "mirror": "runs until it is stopped; tests/cli runs it",
    "serve": "runs until it is stopped; tests/recipes runs it",
    "prune": "its plan differs with the cache; tests/cli runs it",
    "completion": "writes into a home directory",
}


def plain(line):
    return line.partition("  #")[0].partition(" # ")[0].strip()


@pytest.mark.parametrize("shown", SHOWN, ids=lambda shown: f"{shown.page}: {plain(shown.line)}")
def test_the_program_takes_what_is_shown(shown):
    for words in shown.commands():
        parse(words)


def parse(words):
    """Let the program's own parser take the words, without doing anything."""
    command, name = typer.main.get_command(app), "mistral-fetch"
    while hasattr(command, "resolve_command"):
        context = command.make_context(name, list(words))
        if not words:
            return
        name, command, words = command.resolve_command(context, list(words))
    command.make_context(name, list(words))


def refusal(words):
    try:
        parse(words)
    except Exception as error:
        return getattr(error, "exit_code", error)
    return None


@pytest.mark.parametrize(
    "line", ["pul x", "pull", "pull x --no-such-flag", "mirror check", "seed x --ratio much", "config explan x"]
)
def test_what_the_program_would_refuse_is_noticed(line):
    assert refusal(line.split()) == 2


def test_every_line_is_run_or_has_a_reason():
    lines = {plain(shown.line) for shown in SHOWN}
    assert set(RUNNABLE) <= lines, "a line that ran is not shown any more"
    left = {words[0] for shown in SHOWN if plain(shown.line) not in RUNNABLE for words in shown.commands()}
    assert left <= set(REASONS)


def test_what_needs_nothing_runs(tmp_path):
    for name in DIRECTORIES:
        shutil.copytree(DEMO, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    tools = tmp_path / "tools"
    tools.mkdir()
    program = tools / "mistral-fetch"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m mistral_fetch "$@"\n')
    program.chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tools}:/usr/bin:/bin", "PYTHONPATH": str(ROOT),
        "XDG_CONFIG_HOME": str(tmp_path / "config"), "MISTRAL_FETCH_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    script = "set -e\n" + "\n".join(RUNNABLE)
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "site").iterdir()} >= {"my-model.meta4", "my-model.torrent", "SHA256SUMS"}
    assert Path(tmp_path / "config/mistral-fetch/config.toml").exists()
