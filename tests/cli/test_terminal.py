"""Standard streams that are closed, full or deserted, and text from outside that would drive a terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mistral_fetch.cli.choices import ProgressMode
from mistral_fetch.cli.options import FrontEnd, stop_on_signals
from mistral_fetch.cli.render import open_reporter
from mistral_fetch.cli.terminal import UnfailingStream
from mistral_fetch.config import Settings
from mistral_fetch.events import BytesVerified, Notice, TransferPlanned

ROOT = Path(__file__).parents[2]
HOSTILE = "\x1b]0;owned\x07\x9b2J\r\u202e"


def run_in_shell(line):
    """Run a line of shell with ``$FETCH`` as the program."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FETCH": f"{sys.executable} -m mistral_fetch"}
    return subprocess.run(
        ["bash", "-c", line],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


BROKEN = {
    "closed": "$FETCH pull tiny.meta4 2>&-",
    "all but the output closed": "$FETCH pull tiny.meta4 <&- 2>&-",
    "full": "$FETCH pull tiny.meta4 2>/dev/full",
    "full, with bars": "$FETCH pull tiny.meta4 --progress rich 2>/dev/full",
    "full, with lines for programs": "$FETCH pull tiny.meta4 --progress json 2>/dev/full",
    "deserted": "set -o pipefail; { $FETCH pull tiny.meta4 2>&1 >&3 | true; } 3>&1",
    "deserted, with bars": "set -o pipefail; { $FETCH pull tiny.meta4 --progress rich 2>&1 >&3 | true; } 3>&1",
}


@pytest.mark.parametrize("line", BROKEN.values(), ids=BROKEN)
def test_a_pull_needs_no_standard_error(program, manifest, line):
    done = run_in_shell(line)
    directory = program("path", "tiny.meta4").out
    assert (done.returncode, done.stdout) == (0, directory)
    assert done.stderr == ""


def test_an_error_that_nobody_hears_keeps_its_exit_code(environment):
    assert run_in_shell("$FETCH path mistral-7b 2>/dev/full").returncode == 3
    assert run_in_shell("$FETCH path mistral-7b 2>&-").returncode == 3
    assert run_in_shell("$FETCH frobnicate 2>/dev/full").returncode == 2


def test_a_closed_output_is_not_taken_by_another_file(program, manifest):
    done = run_in_shell("$FETCH pull tiny.meta4 --quiet >&- 2>&- <&-")
    assert done.returncode == 0
    assert program("verify", "--quiet").code == 0


def test_an_interrupt_that_the_shell_had_us_ignore_is_ignored():
    """What a shell without job control does for ``command &``."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        undo = stop_on_signals(lambda: None)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        undo()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("mode", [ProgressMode.PLAIN, ProgressMode.RICH])
def test_text_from_outside_cannot_drive_the_terminal(capsys, monkeypatch, mode):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    with open_reporter(mode, is_quiet=False, has_color=False) as report:
        report(TransferPlanned(HOSTILE, 10, 1, 1))
        report(Notice(f"the tracker says {HOSTILE}"))
        report(BytesVerified(HOSTILE, 5, 10))
    printed = capsys.readouterr().err
    assert r"the tracker says \x1b]0;owned\x07\x9b2J\r\u202e" in printed
    for code in ("\x1b]", "\x07", "\x9b", "\u202e"):
        assert code not in printed


def test_programs_get_it_escaped_and_whole(capsys):
    with open_reporter(ProgressMode.JSON, is_quiet=False, has_color=False) as report:
        report(Notice("é"))
        report(Notice(HOSTILE))
    readable, escaped = capsys.readouterr().err.splitlines()
    assert "é" in readable
    assert escaped.isprintable()
    assert json.loads(escaped)["text"] == HOSTILE


@pytest.mark.parametrize("mode", [ProgressMode.PLAIN, ProgressMode.JSON])
def test_a_note_cannot_either(capsys, tmp_path, mode):
    front = FrontEnd(Settings(tmp_path), {}, is_json=False, progress=mode, is_quiet=False, has_color=False)
    front.note(HOSTILE)
    line = capsys.readouterr().err.rstrip("\n")
    assert line.isprintable()
    assert "owned" in line
    assert mode is ProgressMode.PLAIN or json.loads(line)["text"] == HOSTILE


def test_a_stream_for_bars_fails_silently_once_and_for_all():
    with Path("/dev/full").open("w") as full:
        stream = UnfailingStream(full)
        stream.write("x")
        stream.flush()
        stream.write("y" * 100_000)
        stream.flush()
        assert Path(f"/proc/self/fd/{full.fileno()}").readlink() == Path("/dev/null")
