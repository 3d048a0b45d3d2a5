"""Progress: the numbers, and how bars, lines and silence show them."""

from __future__ import annotations

import json
import random
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


SLOW_BYTES_PER_SECOND = 400_000
PIECE_BYTES = 4_000_000
CONNECTIONS = 16


def slow_line(seconds, *, total=100 * MB, stall=(0.0, 0.0)):
    """Yield moments and events of sixteen connections that share a slow line, as the engine reports them.

    Each tells what came about every tenth of a second; a piece counts as present once it is whole.
    """
    chance = random.Random(7)
    yield 0.0, TransferPlanned("m", total, 0, 1)
    filled = [chance.uniform(0, 0.9) * PIECE_BYTES for _ in range(CONNECTIONS)]  # they do not end together
    present, received = 0, sum(filled)
    for tick in range(1, int(seconds * 10)):
        now = tick / 10
        if stall[0] <= now < stall[1]:
            continue
        for number in range(CONNECTIONS):
            length = SLOW_BYTES_PER_SECOND / 10 / CONNECTIONS * chance.uniform(0.2, 1.8)
            filled[number] += length
            received += length
            yield now + number / 1000, BytesReceived("m", "a.bin", int(length))
            if filled[number] >= PIECE_BYTES:
                filled[number] -= PIECE_BYTES
                present += PIECE_BYTES
                yield now + number / 1000, Progress("a.bin", present)
        yield now + 0.05, Progress("a.bin", present, max(0, int(received) - present))


def test_on_a_slow_line_with_many_connections_the_rate_is_calm_and_the_time_left_steady():
    view, rates, times = TransferView(), [], []
    for now, event in slow_line(120):
        view.apply(event, now)
        if now > 5:
            rates.append(view.rate(now))
            times.append((now, (view.total_bytes - view.shown_bytes) / view._pace.steady(now)))
    assert min(rates) > 0.9 * SLOW_BYTES_PER_SECOND
    assert max(rates) < 1.1 * SLOW_BYTES_PER_SECOND
    ends = [now + left for now, left in times]
    assert max(ends) - min(ends) < 0.08 * max(ends), "it always promises about the same moment"


def test_what_is_shown_never_goes_back_between_pieces():
    view, shown = TransferView(), []
    for now, event in slow_line(120):
        view.apply(event, now)
        shown.append(view.shown_bytes)
    assert shown == sorted(shown)
    assert len(set(shown)) > 1000, "and moves all the time, not only with each piece"


def test_after_a_pause_the_rate_begins_with_what_comes_now():
    view, rates = TransferView(), {}
    for now, event in slow_line(60, stall=(20, 40)):
        view.apply(event, now)
        rates[now] = view.rate(now)
    assert view.rate(60) > 0
    after = [rate for now, rate in rates.items() if now >= 40]
    assert max(after) < 1.3 * SLOW_BYTES_PER_SECOND
    assert next(rate for now, rate in rates.items() if now > 42) > 0.6 * SLOW_BYTES_PER_SECOND


def test_a_burst_after_a_long_wait_is_no_high_rate():
    view = view_of(HALF_WAY[0])
    view.apply(BytesReceived("m", "a.bin", 4 * MB), 60.0)
    assert view.rate(60.01) <= 4 * MB


def test_the_time_left_follows_a_line_that_has_become_slower():
    view = TransferView()
    view.apply(TransferPlanned("m", 1000 * MB, 0, 1), 0.0)
    for second in range(1, 200):
        view.apply(BytesReceived("m", "a.bin", MB if second > 60 else 5 * MB), float(second))
    assert view._pace.steady(199.0) == pytest.approx(MB, rel=0.2)


def test_another_plan_begins_anew():
    view = view_of(*HALF_WAY)
    view.apply(TransferPlanned("another channel", 1000 * MB, 20 * MB, 3), 5.0)
    view.apply(Progress("b.bin", 20 * MB), 6.0)
    assert (view.shown_bytes, view.total_bytes) == (20 * MB, 1000 * MB)


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


@pytest.mark.parametrize("begun", [0, 150, 350])
def test_a_line_is_not_repeated_when_a_step_was_hit_exactly(capsys, monkeypatch, begun):
    events = [TransferPlanned("m", 1000, begun, 1), *[Progress("a.bin", done) for done in range(begun + 1, 1001)]]
    lines = show(capsys, ProgressMode.PLAIN, events, monkeypatch, seconds_apart=0.001).splitlines()
    shares = [int(re.search(r"(\d+) %", line)[1]) for line in lines]
    assert shares == list(range(begun // 10, 101, 5))


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


def test_json_lines_never_leave_the_end_out(capsys, monkeypatch):
    events = [
        HALF_WAY[0],
        Progress("a.bin", 60 * MB),
        Progress("b.bin", 40 * MB),  # at once after the one before
        *[BytesVerified("a.bin", share * MB, 60 * MB) for share in (1, 59, 60)],
    ]
    printed = show(capsys, ProgressMode.JSON, events, monkeypatch, seconds_apart=0.01)
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["done_bytes"] for line in lines if line["event"] == "progress"] == [60 * MB, 100 * MB]
    assert [line["verified_bytes"] for line in lines if line["event"] == "bytes-verified"] == [MB, 60 * MB]


def test_json_lines_are_one_object_each_whatever_is_in_them(capsys, monkeypatch):
    nasty = 'a "quoted"\nline\r\x1b[31m\u2028 and \ud800'
    events = [event for _, event in slow_line(20)]
    events += [Notice(nasty), SourceFailed(nasty, nasty, will_retry=True), Progress(nasty, 1)]
    printed = show(capsys, ProgressMode.JSON, events, monkeypatch, seconds_apart=0.01)
    objects = [json.loads(line) for line in printed.split("\n") if line]
    assert {"notice", "source-failed", "progress", "bytes-received"} <= {fields["event"] for fields in objects}
    assert all(isinstance(fields["rate_bytes_per_second"], int) for fields in objects if "done_bytes" in fields)
    totals = [fields["done_bytes"] for fields in objects if "done_bytes" in fields]
    assert totals == sorted(totals)


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


def test_the_bar_says_how_far_it_verifies_and_stays_where_it_is(capsys, monkeypatch, terminal):
    last = frames(show(capsys, ProgressMode.RICH, HALF_WAY + DONE[:3], monkeypatch))[-1]
    assert last.startswith("mistral-7b@v0.1 ━")
    assert re.search(r" 100 % verifying 50 (% of a\.bin|…)$", last.rstrip())


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
