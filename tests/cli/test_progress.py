"""Progress: the numbers, and how bars, lines and silence show them."""

from __future__ import annotations

import json
import re

import pytest

from mistral_fetch.cli import render
from mistral_fetch.cli.choices import ProgressMode
from mistral_fetch.cli.progress import TransferView
from mistral_fetch.cli.render import open_reporter
from mistral_fetch.events import (
    BytesReceived,
    BytesVerified,
    FileVerified,
    Notice,
    Progress,
    SnapshotReady,
    SourceFailed,
    SourceLied,
    TransferPlanned,
)

MB = 1_000_000
HALF_WAY = [
    TransferPlanned("mistral-7b@v0.1", 100 * MB, 10 * MB, 2),
    BytesReceived("mirror.example", "a.bin", 30 * MB),
    BytesReceived("swarm", "a.bin", 10 * MB),
    Progress("a.bin", 50 * MB),
]
DONE = [
    BytesReceived("mirror.example", "a.bin", 50 * MB),
    Progress("a.bin", 100 * MB),
    BytesVerified("a.bin", 50 * MB, 100 * MB),
    BytesVerified("a.bin", 100 * MB, 100 * MB),
    FileVerified("a.bin", 100 * MB, "ab" * 32, "sha256"),
    SnapshotReady("/home/x", "ab" * 32),
]


def view_of(*events, seconds_apart=1.0):
    view = TransferView()
    for number, event in enumerate(events):
        view.apply(event, number * seconds_apart)
    return view


def test_the_numbers_half_way():
    view = view_of(*HALF_WAY)
    assert view.fraction() == 0.5
    assert view.rate(2.0) == 20 * MB  # thirty and ten megabytes in the two seconds since the transfer was planned
    assert view.eta(2.0) == "2s"
    assert view.split() == "mirror.example 75 %, swarm 25 %"
    assert view.line(2.0) == (
        "mistral-7b@v0.1: 50 %, 50.0 MB of 100.0 MB, 20.0 MB/s, 2s left, from mirror.example 75 %, swarm 25 %"
    )


def test_one_source_needs_no_share():
    assert view_of(HALF_WAY[0], HALF_WAY[1]).split() == "mirror.example"


def test_a_rate_is_forgotten_when_nothing_comes():
    view = view_of(*HALF_WAY)
    assert view.rate(60.0) == 0
    assert view.eta(60.0) == ""


def test_shown_bytes_never_go_backwards_nor_beyond_the_end():
    view = view_of(*HALF_WAY)
    view.apply(Progress("a.bin", 5 * MB), 3.0)
    assert view.shown_bytes == 50 * MB
    view.apply(Progress("a.bin", 500 * MB), 4.0)
    assert view.shown_bytes == 100 * MB


def test_bytes_that_are_sent_again_are_received_but_not_shown():
    """A mirror that cannot resume begins anew: the bar waits until it is past what was there."""
    view = view_of(*HALF_WAY)
    view.apply(BytesReceived("mirror.example", "a.bin", 40 * MB), 3.0)
    assert view.shown_bytes == 50 * MB
    assert view.received_by_source["mirror.example"] == 70 * MB


def test_bytes_that_a_swarm_finds_on_disk_count():
    view = view_of(HALF_WAY[0], Progress("a.bin", 60 * MB))
    assert view.shown_bytes == 60 * MB


def test_an_empty_transfer_is_done():
    assert view_of(TransferPlanned("x", 0, 0, 1)).fraction() == 1.0


def show(capsys, mode, events, monkeypatch, *, quiet=False, seconds_apart=1.0, color=True):
    """Return what a reporter leaves on standard error, with a clock of its own; stdout stays empty."""
    now = [0.0]
    monkeypatch.setattr(render.time, "monotonic", lambda: now[0])
    with open_reporter(mode, is_quiet=quiet, has_color=color) as report:
        for event in events:
            report(event)
            now[0] += seconds_apart
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_plain_lines(capsys, monkeypatch):
    assert show(capsys, ProgressMode.PLAIN, HALF_WAY + DONE, monkeypatch).splitlines() == [
        "mistral-7b@v0.1: 10 %, 10.0 MB of 100.0 MB",
        "mistral-7b@v0.1: 50 %, 50.0 MB of 100.0 MB, 13.3 MB/s, 4s left, from mirror.example 75 %, swarm 25 %",
        "mistral-7b@v0.1: 100 %, 100.0 MB of 100.0 MB, 18.0 MB/s, from mirror.example 89 %, swarm 11 %",
        "verifying a.bin",
    ]


def test_plain_lines_are_few(capsys, monkeypatch):
    small = [Progress("a.bin", 10 * MB + number * 90_000) for number in range(1, 1001)]
    lines = show(capsys, ProgressMode.PLAIN, [HALF_WAY[0], *small], monkeypatch, seconds_apart=0.01).splitlines()
    assert len(lines) == 1 + 18  # one for every 5 % of the ninety that came
    slow = [BytesReceived("m", "a.bin", 10)] * 100
    lines = show(capsys, ProgressMode.PLAIN, [HALF_WAY[0], *slow], monkeypatch, seconds_apart=1.0).splitlines()
    assert len(lines) == 1 + 3  # one every 30 of its hundred seconds


def test_a_long_verification_is_seen_to_move(capsys, monkeypatch):
    events = [BytesVerified("a.bin", number * MB, 100 * MB) for number in range(70)]
    lines = show(capsys, ProgressMode.PLAIN, events, monkeypatch).splitlines()
    assert lines == ["verifying a.bin", "verifying a.bin: 30 %", "verifying a.bin: 60 %"]


TOLD = {
    Notice("the magnet's trackers were repaired"): "the magnet's trackers were repaired",
    SourceFailed("m.example", "it stalled", will_retry=True): "m.example: it stalled; trying again",
    SourceFailed("m.example", "it answered 404", will_retry=False): "m.example: it answered 404",
    SourceLied("m.example", "a.bin", "piece 3", "ab", "cd"): (
        "m.example sent wrong bytes for a.bin (piece 3) and was dropped: expected ab, got cd"
    ),
}


@pytest.mark.parametrize("mode", [ProgressMode.PLAIN, ProgressMode.RICH])
@pytest.mark.parametrize("event", TOLD, ids=lambda event: type(event).__name__)
def test_what_people_should_know_is_said(capsys, monkeypatch, mode, event):
    assert TOLD[event] in show(capsys, mode, [*HALF_WAY, event], monkeypatch)


def test_json_lines_carry_totals(capsys, monkeypatch):
    lines = [json.loads(line) for line in show(capsys, ProgressMode.JSON, HALF_WAY + DONE, monkeypatch).splitlines()]
    assert lines[0] == {
        "event": "transfer-planned",
        "label": "mistral-7b@v0.1",
        "total_bytes": 100 * MB,
        "present_bytes": 10 * MB,
        "file_count": 2,
    }
    counted = [line for line in lines if line["event"] in {"bytes-received", "progress"}]
    assert counted[-1]["done_bytes"] == 100 * MB
    assert counted[-1]["received_by_source"] == {"mirror.example": 80 * MB, "swarm": 10 * MB}
    assert lines[-1] == {"event": "snapshot-ready", "directory": "/home/x", "content_digest": "ab" * 32}


def test_json_lines_are_thinned_out(capsys, monkeypatch):
    events = [HALF_WAY[0], *[BytesReceived("m", "a.bin", 1000)] * 500]
    lines = show(capsys, ProgressMode.JSON, events, monkeypatch, seconds_apart=0.01).splitlines()
    assert 5 <= len(lines) <= 12


@pytest.mark.parametrize("mode", list(ProgressMode))
def test_quiet_is_silent_in_every_mode(capsys, monkeypatch, mode):
    events = [*HALF_WAY, *TOLD, *DONE]
    assert show(capsys, mode, events, monkeypatch, quiet=True) == ""


def test_none_is_silent(capsys, monkeypatch):
    assert show(capsys, ProgressMode.NONE, HALF_WAY + DONE, monkeypatch) == ""


def test_auto_means_lines_off_a_terminal(capsys, monkeypatch):
    assert show(capsys, ProgressMode.AUTO, HALF_WAY, monkeypatch).startswith("mistral-7b@v0.1: 10 %")


def frames(text):
    """Return what each redraw of a bar left on the screen."""
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame).strip("\n") for frame in re.split(r"\r(?:\x1b\[2K)?", text)]


@pytest.fixture(params=[50, 80, 120])
def terminal(request, monkeypatch):
    """A terminal of some width, as rich sees it."""
    monkeypatch.setenv("COLUMNS", str(request.param))
    monkeypatch.setenv("LINES", "24")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    return request.param


def test_bars_fit_and_say_the_most_important_first(capsys, monkeypatch, terminal):
    drawn = frames(show(capsys, ProgressMode.RICH, HALF_WAY, monkeypatch))
    last = drawn[-1].splitlines()[0]
    assert last.startswith("mistral-7b@v0.1 ━")
    assert " 50 % 50.0 MB of 100.0 MB" in last
    assert last.count("━") >= 7
    assert all(len(line) <= terminal for frame in drawn for line in frame.splitlines())
    assert ("from mirror.example 75 %, swarm 25 %" in last) is (terminal >= 120)
    assert ("MB/s" in last) is (terminal >= 80)


def test_the_last_frame_is_the_final_state(capsys, monkeypatch, terminal):
    text = show(capsys, ProgressMode.RICH, HALF_WAY + DONE, monkeypatch)
    assert " 100 % 100.0 MB of 100.0 MB" in frames(text)[-1]
    assert text.endswith("\x1b[?25h")  # the cursor is back


def test_the_bar_says_when_it_verifies(capsys, monkeypatch, terminal):
    last = frames(show(capsys, ProgressMode.RICH, HALF_WAY + DONE[:3], monkeypatch))[-1]
    assert last.startswith("mistral-7b@v0.1 ━")
    assert re.search(r" 50 % verifying a\.b(in|…)$", last.rstrip())


def test_a_bar_of_a_verification_alone(capsys, monkeypatch, terminal):
    text = show(capsys, ProgressMode.RICH, [BytesVerified("a.bin", 3 * MB, 10 * MB)], monkeypatch)
    last = frames(text)[-1]
    assert last.startswith("verifying a.bin ━")
    assert " 30 % 3.0 MB of 10.0 MB" in last


def test_bars_that_have_nothing_to_show_leave_no_trace(capsys, monkeypatch, terminal):
    assert show(capsys, ProgressMode.RICH, [], monkeypatch) == ""


def test_no_color(capsys, monkeypatch, terminal):
    assert re.search(r"\x1b\[[0-9;]*m", show(capsys, ProgressMode.RICH, HALF_WAY, monkeypatch))
    plain = show(capsys, ProgressMode.RICH, HALF_WAY, monkeypatch, color=False)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9][0-9;]*m", plain)
