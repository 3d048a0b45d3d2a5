"""TAB: driven as the shells drive it, through the program's own protocol and through a real bash."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"httpx", "libtorrent", "torch", "rich", "ssl", "http", "asyncio"}

WATCHED = """
import json, sys
from mistral_fetch.cli.app import main
try:
    main()
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def protocol(line: str) -> dict[str, str]:
    """Return the variables in which bash asks about a line."""
    words = line.split() + ([""] if line.endswith(" ") else [])
    return {"_MISTRAL_FETCH_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}


@pytest.fixture
def ask(program, environment):
    """Return what bash would be offered for a line."""

    def offered(line: str) -> list[str]:
        with environment.context() as asking:
            for name, value in protocol(line).items():
                asking.setenv(name, value)
            answer = program()
        assert (answer.code, answer.err) == (0, "")
        return answer.out.split()

    return offered


@pytest.fixture
def ask_anew(program, environment):
    """The same in a new process, as a shell does it; also return which modules that took."""

    def offered(line: str) -> tuple[list[str], set[str]]:
        environment.setenv("PYTHONPATH", str(ROOT))
        argv, env = [sys.executable, "-c", WATCHED], {**os.environ, **protocol(line)}
        answer = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=True)
        return answer.stdout.split(), set(json.loads(answer.stderr.splitlines()[-1]))

    return offered


def test_names_of_the_catalog_and_of_the_cache(ask, ask_anew, pulled):
    names, loaded = ask_anew("mistral-fetch pull mis")
    assert {"mistral-7b", "mistral-7b-instruct", "mistral-7b@v0.3"} <= set(names)
    assert loaded & HEAVY == set()
    (held,) = [name for name in ask("mistral-fetch pull ") if name.startswith("tiny.meta4#")]
    assert ask("mistral-fetch verify ") == [held]
    assert ask("mistral-fetch path tiny") == [held]
    assert ask("mistral-fetch path --home nowhere ") == []


def test_an_answer_costs_little(ask_anew, pulled):
    """Processor time, for a busy machine's wall time says nothing; most of this is room for slow machines."""
    ask_anew("mistral-fetch pull mis")
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ask_anew("mistral-fetch pull mis")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.8, spent


def test_commands_their_second_words_and_options(ask):
    assert ask("mistral-fetch pu") == ["pull", "publish"]
    assert ask("mistral-fetch config ") == ["path", "get", "set", "unset", "explain"]
    assert ask("mistral-fetch config ex") == ["explain"]
    assert ask("mistral-fetch mirror c") == ["check"]
    assert ask("mistral-fetch show --d") == ["--details"]
    assert set(ask("mistral-fetch pull --via ")) == {"auto", "http", "torrent"}


def test_what_cannot_be_read_offers_nothing(ask, environment, tmp_path):
    environment.setenv("MISTRAL_FETCH_CATALOG", str(tmp_path / "none.json"))
    assert ask("mistral-fetch pull mis") == []
    environment.setenv("MISTRAL_FETCH_VIA", "pigeon")
    assert ask("mistral-fetch pull mis") == []


def test_a_name_that_a_shell_could_run_is_not_offered(ask, program):
    refs = program.home / "refs" / "x"
    refs.mkdir(parents=True)
    record = {"ref": "https://h/$(touch x)", "snapshot": "0" * 64, "pulled_at": 1}
    (refs / "manifest").write_text(json.dumps(record))
    assert [name for name in ask("mistral-fetch path ") if "touch" in name] == []
    (refs / "manifest").write_text(json.dumps({**record, "ref": "https://h/x.meta4"}))
    assert ask("mistral-fetch path ") == ["https://h/x.meta4"]


BASH_ASKS = """
set -eu
source <(mistral-fetch completion bash)
COMP_LINE="$1"; COMP_POINT=${#COMP_LINE}; COMP_WORDS=(); COMP_CWORD=0
[[ ${2-} ]] && COMP_WORDBREAKS=$2
_mistral_fetch_complete mistral-fetch
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    "line, breaks, offered",
    [
        ("mistral-fetch pull mistral-7b-i", "", ["mistral-7b-instruct", "mistral-7b-instruct@v0.1"]),
        ("mistral-fetch pull mistral-7b@v0", " @:=", ["v0.1", "v0.2", "v0.3"]),
        ("mistral-fetch pull mistral-7b@", " @:=", ["v0.1", "v0.2", "v0.3"]),
        ("mistral-fetch pull mistral-7b@v0", " ", ["mistral-7b@v0.1", "mistral-7b@v0.2", "mistral-7b@v0.3"]),
        ("mistral-fetch config ge", "", ["get"]),
        ("mistral-fetch ver", "", ["verify"]),
    ],
    ids=str,
)
def test_bash_itself(program, environment, tmp_path, line, breaks, offered):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "mistral-fetch").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mistral_fetch "$@"\n')
    (folder / "mistral-fetch").chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    argv = ["bash", "--norc", "-c", BASH_ASKS, "bash", line, breaks]
    answer = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.splitlines()[: len(offered)] == offered


def test_zsh_and_fish_get_what_their_scripts_ask_for(program, environment):
    asked = {"_TYPER_COMPLETE_ARGS": "mistral-fetch pull mistral-7b@v0.3", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    for shell, answer in (("zsh", "_arguments '*: :((\"mistral-7b@v0.3\"))'"), ("fish", "mistral-7b@v0.3")):
        script = program("completion", shell).out
        assert f"_MISTRAL_FETCH_COMPLETE=complete_{shell}" in script
        assert all(name in script for name in asked if shell in name.lower() or name.endswith("ARGS"))
        for name, value in {**asked, "_MISTRAL_FETCH_COMPLETE": f"complete_{shell}"}.items():
            environment.setenv(name, value)
        assert program().out.strip() == answer
        environment.delenv("_MISTRAL_FETCH_COMPLETE")


def test_another_shell_is_refused(program):
    shown = program("completion", "tcsh")
    assert (shown.code, shown.out) == (2, "")
    assert "'bash', 'zsh', 'fish'" in shown.err
