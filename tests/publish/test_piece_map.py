"""The picture of a transfer: pieces by who sent them, and sources with their rates and failures."""

from __future__ import annotations

import threading

from mistral_fetch.events import (
    BytesReceived,
    FilesOpened,
    FileVerified,
    PieceView,
    Progress,
    SnapshotReady,
    SourceConnected,
    SourceFailed,
    SourceLied,
    TransferPlanned,
)
from mistral_fetch.publish.metrics import Metrics
from mistral_fetch.publish.piece_map import MAX_CELLS, ON_DISK, PieceMap
from mistral_fetch.publish.source_table import WINDOW_SECONDS, SourceTable


def view(path, count, senders):
    return PieceView(path, count, lambda: dict(senders))


def test_each_piece_has_the_letter_of_its_sender():
    pieces = PieceMap()
    senders = {0: "https://a.example/x?token=secret", 2: "torrent abc…", 3: ""}
    pieces.open((view("w", 5, senders), view("p", 1, {0: "https://a.example/p"})))
    told = pieces.told()
    assert told == {
        "pieces": 6,
        "pieces_per_cell": 1,
        "senders": "a.bc.a",
        "filled": "909909",
        "legend": {"a": "a.example", "b": "torrent abc…", "c": ON_DISK},
    }
    assert "secret" not in str(told)


def test_a_letter_stays_with_its_source():
    senders = {5: "https://a.example/x"}
    pieces = PieceMap()
    pieces.open((view("w", 6, senders),))
    pieces.told()
    senders[0] = "https://b.example/x"
    assert pieces.told()["senders"] == "b....a"


def test_many_pieces_share_cells_and_a_cell_says_how_full_it_is():
    count = 10 * MAX_CELLS - 3
    pieces = PieceMap()
    pieces.open((view("w", count, {**dict.fromkeys(range(10), "http://a.example/"), 10: "http://b.example/"}),))
    told = pieces.told()
    assert (told["pieces_per_cell"], len(told["senders"]), len(told["filled"])) == (10, MAX_CELLS, MAX_CELLS)
    assert (told["senders"][:3], told["filled"][:3]) == ("ab.", "910")


def test_more_sources_than_letters():
    pieces = PieceMap()
    pieces.open((view("w", 40, {index: f"http://m{index}.example/" for index in range(40)}),))
    told = pieces.told()
    assert told["senders"].endswith("zzz")
    assert len(told["legend"]) == 26


def test_a_complete_file_keeps_its_colours_when_its_record_is_given_up():
    senders = {0: "http://a.example/"}
    pieces = PieceMap()
    pieces.open((view("w", 2, senders),))
    pieces.verified("w")
    senders.clear()
    assert (pieces.told()["senders"], pieces.told()["filled"]) == ("ab", "99")


def test_no_files_no_cells():
    assert PieceMap().told()["senders"] == ""


def test_looking_waits_for_no_lock_that_a_reporter_may_hold():
    """Who reports may hold the lock that a look needs: then neither may wait for the other."""
    metrics, lock = Metrics("pull"), threading.Lock()
    is_looking = threading.Event()

    def senders():
        is_looking.set()
        with lock:
            return {}

    metrics(FilesOpened((PieceView("w", 1, senders),)))
    with lock:
        looking = threading.Thread(target=metrics.picture, daemon=True)
        looking.start()
        assert is_looking.wait(20)
        reporting = threading.Thread(
            target=lambda: [metrics(Progress("w", 1)), metrics(FilesOpened(())), metrics.pieces.told()], daemon=True
        )
        reporting.start()
        reporting.join(20)
        assert not reporting.is_alive()
    looking.join(20)
    assert not looking.is_alive()


def test_a_rate_is_that_of_the_last_seconds():
    table = SourceTable()
    for second in range(10):
        table.received("a.example", 100, float(second))
    assert table.rows(9.5)[0]["rate_bytes_per_second"] == int(500 / 4.5)
    assert table.rows(9.0 + WINDOW_SECONDS + 1)[0]["rate_bytes_per_second"] == 0
    assert table.rows(9.5)[0]["received_bytes"] == 1000


def test_failures_are_told_and_a_source_that_comes_back_is_not_given_up():
    table = SourceTable()
    table.failed("a.example", "no answer", will_retry=True)
    table.failed("https://a.example/x?sig=1", "gone", will_retry=False)
    table.lied("b.example", "bytes [0, 10)")
    a, b = table.rows(0.0)
    assert (a["name"], a["failures"], a["problem"], a["given_up"]) == ("a.example", 2, "gone", True)
    assert (b["lies"], b["given_up"], b["problem"]) == (1, True, "sent wrong bytes: bytes [0, 10)")
    table.connected("a.example")
    assert table.rows(0.0)[0]["given_up"] is False


def test_the_picture_says_how_long_it_takes():
    now = [100.0]
    metrics = Metrics("pull", clock=lambda: now[0])
    for event in (
        TransferPlanned("tiny", 10_000, 0, 2),
        FilesOpened((view("w", 2, {0: "http://a.example/w"}),)),
        SourceConnected("a.example"),
        SourceFailed("b.example", "no answer", True),
        SourceLied("c.example", "w", "bytes [0, 10)", "sha256:0", "sha256:1"),
    ):
        metrics(event)
    now[0] = 104.0
    metrics(BytesReceived("a.example", "w", 2000))
    now[0] = 105.0
    metrics(Progress("w", 4000, 77))
    metrics(FileVerified("p", 1, "0" * 64, "sha256"))
    told = metrics.picture()
    assert (told["rate_bytes_per_second"], told["seconds_left"], told["flying_bytes"]) == (2000, 3, 77)
    assert (told["files"], told["files_verified"]) == (2, 1)
    assert [source["name"] for source in told["sources"]] == ["a.example", "b.example", "c.example"]
    assert told["map"]["senders"] == "a."
    metrics(SnapshotReady("/x", "abc"))
    assert (metrics.picture()["seconds_left"], metrics.picture()["flying_bytes"]) == (None, 0)
