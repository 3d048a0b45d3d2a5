"""``demo``: the whole product at once, ending in right answers and leaving nothing behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.swarm]


def processes_of(session):
    """Return the command lines of all processes in a session, from /proc."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
            command = (status.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, IndexError):
            continue  # it has just ended
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(command)
    return found


@dataclass(frozen=True)
class Outcome:
    """One run, and what was left of it in its temporary folder and among the processes."""

    code: int
    out: str
    err: str
    files_left: list[str]
    processes_left: list[str]


def run_demo(folder, *options):
    scratch = folder / "scratch"
    scratch.mkdir()
    env = {name: value for name, value in os.environ.items() if not name.startswith("MISTRAL_FETCH_")}
    env |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "runtime")]),
        "TMPDIR": str(scratch),
        "MISTRAL_FETCH_HOME": str(folder / "home"),
    }
    argv = [sys.executable, "-m", "mistral_fetch", "demo", *options]
    process = subprocess.Popen(
        argv, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, start_new_session=True
    )
    out, err = process.communicate(timeout=170)
    left = [path.name for path in (*scratch.iterdir(), *folder.iterdir()) if path != scratch]
    return Outcome(process.returncode, out, err, left, processes_of(process.pid))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("demo"))


def test_it_ends_well(demo):
    assert demo.code == 0, demo.err


def test_it_fetches_both_ways_and_shows_it(demo):
    assert "Fetching it by http:" in demo.err
    assert "Fetching it by torrent:" in demo.err
    assert demo.err.count(": complete and verified (") == 2
    assert len(re.findall(r"^demo-mistral: 100 %, 4\.\d MB of 4\.\d MB, .* from ", demo.err, re.MULTILINE)) == 2


def check_answers(answers):
    assert list(answers) == [
        "What licence is Mistral 7B under?",
        "How large is Mistral 7B?",
        "What does mistral-fetch verify?",
    ]
    licence, size, verified = answers.values()
    assert "Apache" in licence
    assert "7.24 billion" in size
    assert "every byte" in verified


def test_it_answers_three_questions(demo):
    check_answers(dict(re.findall(r"^> (.+)\n(.+)$", demo.out, re.MULTILINE)))


def test_it_says_in_six_lines_what_happened(demo):
    *_, summary = demo.out.rstrip().partition("\n1. ")
    lines = ("1. " + summary).splitlines()
    assert [line[:3] for line in lines] == [f"{number}. " for number in range(1, 7)]
    assert re.fullmatch(r"2\. It was fetched by HTTP and by torrent, in \d+s; both brought the same bytes\.", lines[1])
    assert lines[5].startswith('6. The real model: mistral-fetch run mistral-7b "')


def test_it_leaves_nothing_behind(demo):
    assert (demo.files_left, demo.processes_left) == ([], [])


def test_it_speaks_json(tmp_path):
    done = run_demo(tmp_path, "--json", "--quiet")
    assert (done.code, done.files_left, done.processes_left) == (0, [], []), done.err
    told = json.loads(done.out)
    check_answers({answer["question"]: answer["answer"] for answer in told["answers"]})
    assert told["http"]["content_digest"] == told["torrent"]["content_digest"]
    assert told["http"]["assurance"] == "sha256"
