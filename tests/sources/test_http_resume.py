from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from mistral_fetch.errors import Interrupted, MirrorError, OfflineRefused
from mistral_fetch.events import BytesDropped, BytesReceived, Event, Progress, SourceConnected, SourceFailed
from mistral_fetch.simulators.mirror import Fault, MirrorSimulator
from mistral_fetch.sources.base import StopSignal, Target
from mistral_fetch.sources.http import HttpSource
from mistral_fetch.sources.http_client import HttpClient, HttpSettings
from tests.sources.conftest import DATA, NAME, PIECE, Download


def test_a_fresh_file_is_asked_for_without_a_range(download: Download, mirror: MirrorSimulator) -> None:
    download.run(mirror)
    assert [request.range for request in mirror.requests()] == [""]
    download.assert_complete()


def test_gaps_are_asked_for_exactly(download: Download, mirror: MirrorSimulator) -> None:
    download.begin_with(0, 3, 4, 10)
    download.run(mirror)
    assert [request.range for request in mirror.requests()] == [
        f"bytes={PIECE}-{3 * PIECE - 1}",
        f"bytes={5 * PIECE}-{10 * PIECE - 1}",
    ]
    assert mirror.bytes_sent() == len(DATA) - 3 * PIECE - 4321
    download.assert_complete()


def test_a_complete_file_opens_no_connection(download: Download, mirror: MirrorSimulator) -> None:
    download.begin_with(*range(11))
    download.run(mirror)
    assert mirror.served == []


def test_a_broken_piece_goes_on_within_itself(download: Download, mirror: MirrorSimulator) -> None:
    mirror.script(NAME, [Fault(end_at=2 * PIECE + 500)])
    download.run(mirror)
    assert mirror.requests()[1].range == f"bytes={2 * PIECE + 500}-{len(DATA) - 1}"
    assert mirror.bytes_sent() == len(DATA)
    download.assert_complete()


def test_the_validator_of_an_unpinned_file_is_remembered_across_runs_and_sent(
    download: Download, mirror: MirrorSimulator
) -> None:
    download.pins = "nothing"
    mirror.always(NAME, Fault(end_at=3 * PIECE))
    stop = StopSignal()
    stop_at(download, stop, 3 * PIECE)
    with pytest.raises(Interrupted):
        download.run(mirror, stop=stop)
    mirror.always(NAME, Fault())
    download.events = []
    download.run(mirror)
    last = mirror.requests()[-1]
    assert last.headers["if-range"] == mirror.content(NAME).etag  # type: ignore[union-attr]
    assert last.range == f"bytes={3 * PIECE}-{len(DATA) - 1}"


def test_validators_of_two_mirrors_are_not_confused(
    download: Download, mirror: MirrorSimulator, honest: MirrorSimulator
) -> None:
    mirror.always(NAME, Fault(etag='"of the first"', end_at=2 * PIECE))
    mirror.script(NAME, [Fault(etag='"first"', end_at=2 * PIECE), Fault(status=404)])
    download.run(mirror, honest)
    assert "if-range" not in honest.requests()[0].headers
    assert honest.bytes_sent() == len(DATA) - 2 * PIECE
    download.assert_complete()


def test_a_mirror_that_ignores_ranges_still_works(download: Download, mirror: MirrorSimulator) -> None:
    download.begin_with(0, 1, 5)
    mirror.always(NAME, Fault(ignores_range=True))
    download.run(mirror)
    assert len(mirror.requests()) == 2  # one finds out, one pass fills all gaps
    download.assert_complete()


def test_a_pass_over_the_whole_file_ends_when_nothing_is_missing(download: Download, mirror: MirrorSimulator) -> None:
    download.begin_with(*range(3, 11))
    mirror.always(NAME, Fault(ignores_range=True, rate_bytes_per_second=20 * PIECE))
    download.run(mirror)
    download.assert_complete()
    assert received(download) <= 4 * PIECE


@pytest.mark.parametrize("pins", ["pieces", "sha256"])
def test_pinned_bytes_survive_a_new_validator(pins: str, download: Download, mirror: MirrorSimulator) -> None:
    download.pins = pins
    mirror.script(NAME, [Fault(etag='"one"', end_at=4 * PIECE)])
    download.run(mirror)
    download.assert_complete()
    assert download.of_kind(BytesDropped) == []


def test_unpinned_bytes_of_an_older_version_are_dropped(download: Download, mirror: MirrorSimulator) -> None:
    download.pins = "nothing"
    mirror.script(NAME, [Fault(etag='"one"', wrong_bytes_at=(1, PIECE), end_at=4 * PIECE)])
    download.run(mirror)
    download.assert_complete()
    assert [event.length for event in download.of_kind(BytesDropped)] == [4 * PIECE]
    assert download.of_kind(Progress)[-1].present_bytes == len(DATA)


def test_unpinned_bytes_of_two_mirrors_are_never_mixed(
    download: Download, mirror: MirrorSimulator, honest: MirrorSimulator
) -> None:
    download.pins = "nothing"
    mirror.script(NAME, [Fault(wrong_bytes_at=(1,), end_at=4 * PIECE), Fault(status=404)])
    download.run(mirror, honest)
    download.assert_complete()
    assert [request.range for request in honest.requests()] == [""]


def test_unpinned_and_unnamed_versions_are_fetched_from_the_start(download: Download, mirror: MirrorSimulator) -> None:
    download.pins = "nothing"
    mirror.script(NAME, [Fault(etag="", end_at=4 * PIECE), Fault(etag=""), Fault(etag="")])
    download.run(mirror)
    download.assert_complete()
    assert mirror.requests()[-1].range == ""


def test_an_unpinned_file_that_changes_for_ever_is_given_up(download: Download, mirror: MirrorSimulator) -> None:
    download.pins = "nothing"
    mirror.rule = lambda request: Fault(etag=f'"{len(mirror.served)}"', end_at=4 * PIECE)
    with pytest.raises(MirrorError):
        download.run(mirror)
    assert len(mirror.requests()) < 12


def test_a_missing_content_range_is_believed_only_where_a_digest_will_tell(
    download: Download, mirror: MirrorSimulator
) -> None:
    download.begin_with(0, 1)
    mirror.always(NAME, Fault(content_range=""))
    download.run(mirror)
    download.assert_complete()


def test_a_weak_etag_is_no_validator(download: Download, mirror: MirrorSimulator) -> None:
    mirror.script(NAME, [Fault(etag='W/"weak"', end_at=2 * PIECE)])
    download.run(mirror)
    assert "if-range" not in mirror.requests()[1].headers
    download.assert_complete()


def test_expired_signatures_behind_a_redirect_are_resolved_again(
    download: Download, mirror: MirrorSimulator, honest: MirrorSimulator
) -> None:
    mirror.always(NAME, Fault(redirect_to=honest.url(NAME) + "?X-Amz-Signature=secret"))
    honest.script(NAME, [Fault(end_at=3 * PIECE), Fault(status=403)])
    download.run(mirror)
    download.assert_complete()
    assert len(mirror.requests()) == 3
    assert "secret" not in repr(download.events)


def test_a_stop_is_noticed_between_chunks(download: Download, mirror: MirrorSimulator) -> None:
    mirror.rate_bytes_per_second = 20 * PIECE
    stop = StopSignal()
    stop_at(download, stop, 2 * PIECE)
    with pytest.raises(Interrupted):
        download.run(mirror, stop=stop)
    assert download.partial().present_bytes >= 2 * PIECE
    assert mirror.bytes_sent() < len(DATA)
    download.assert_nothing_wrong_recorded()


@pytest.mark.parametrize("hang_at", [-1, 3 * PIECE])
def test_a_stop_does_not_wait_for_a_silent_mirror(hang_at: int, download: Download, mirror: MirrorSimulator) -> None:
    mirror.always(NAME, Fault(hang_at=hang_at))
    stop = StopSignal()
    threading.Timer(0.3, stop.set).start()
    begun = time.monotonic()
    with pytest.raises(Interrupted):
        download.run(mirror, stop=stop)
    assert time.monotonic() - begun < 10  # the read timeout is 30 seconds
    assert download.of_kind(SourceFailed) == []


def test_received_bytes_are_reported_exactly_and_seldom(download: Download, mirror: MirrorSimulator) -> None:
    download.run(mirror)
    assert received(download) == len(DATA)
    assert len(download.of_kind(BytesReceived)) < 10
    assert len(download.of_kind(SourceConnected)) == 1


def test_progress_never_goes_back(download: Download, mirror: MirrorSimulator) -> None:
    mirror.script(NAME, [Fault(end_at=3 * PIECE), Fault(end_at=10)])
    download.run(mirror)
    totals = [event.present_bytes for event in download.of_kind(Progress)]
    assert totals == sorted(totals)
    assert totals[-1] == len(DATA)


def test_offline_opens_no_socket(download: Download, mirror: MirrorSimulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a socket was connected"))
    with HttpClient(HttpSettings(is_offline=True)) as offline:
        source = HttpSource(offline)
        with pytest.raises(OfflineRefused):
            source.fetch([Target(download.entry(mirror.url(NAME)), download.partial())], print, StopSignal())
        assert offline._client is None


def test_a_size_has_to_be_known(download: Download) -> None:
    entry = replace(download.entry(), size=None, pieces=None)
    with pytest.raises(ValueError, match="size"):
        HttpSource(download.client).fetch([Target(entry, download.partial())], print, StopSignal())


def received(download: Download) -> int:
    return sum(event.length for event in download.of_kind(BytesReceived))


def stop_at(download: Download, stop: StopSignal, present_bytes: int) -> None:
    """Ask for a stop as soon as so many bytes are present."""

    class Watcher(list[Event]):
        def append(self, event: Event) -> None:
            super().append(event)
            if isinstance(event, Progress) and event.present_bytes >= present_bytes:
                stop.set()

    download.events = Watcher()
