"""A pull over several connections killed at each named place: nothing wrong has a name, and the next run goes on."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from mistral_fetch.simulators.mirror import MirrorSimulator
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.store.crash_points import CRASH_POINTS, VARIABLE
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.snapshots import list_refs
from tests.transfer.conftest import Puller
from tests.transfer.engine import BATCH, CONNECTIONS, LONGEST_RUN, PIECE, RATE, SEND_BUFFER
from tests.transfer.processes import assert_what_is_named_is_right, result_of, start_pull, write_manifest

pytestmark = pytest.mark.slow

PUBLISHER = PublisherSimulator(
    {"weights.bin": random.Random(71).randbytes(36 * PIECE + 777), "config.json": b"{}", "empty.txt": b""}
)
SIZE = sum(map(len, PUBLISHER.files.values()))
# Later passages of a place that is passed often: in the middle of the first batch, of the second, and near the end.
LATER = ("piece-verified:20", "piece-written:12", "piece-written:35", "data-synced:3", "journal-synced:2")
# A kill costs one batch and the pieces begun; and what was on its way then, at most a run for each connection.
LOST = BATCH + CONNECTIONS * PIECE + CONNECTIONS * LONGEST_RUN


@pytest.mark.parametrize("pins", ["pieces", "sha256"])
@pytest.mark.parametrize("place", [*CRASH_POINTS, *LATER])
def test_a_pull_killed_at_a_named_place_names_nothing_wrong_and_the_next_one_goes_on(
    place: str, pins: str, puller: Puller, tmp_path: Path
) -> None:
    options = {"rate_bytes_per_second": RATE, "send_buffer_bytes": SEND_BUFFER}
    with MirrorSimulator(PUBLISHER.files, **options) as mirror:  # type: ignore[arg-type]
        manifest = write_manifest(tmp_path / "model.meta4", PUBLISHER, [mirror], pins)
        code, _, err = result_of(start_pull(puller.home, manifest, environment={VARIABLE: place}))
        assert code == -signal.SIGKILL, f"{place} was never reached: {err}"
        puller.assert_blobs_are_right()
        assert_what_is_named_is_right(puller.home, PUBLISHER)
        before = mirror.bytes_sent()
        code, result, err = result_of(start_pull(puller.home, manifest))
        assert code == 0, err
        assert {p: (Path(result["directory"]) / p).read_bytes() for p in PUBLISHER.files} == PUBLISHER.files
        puller.assert_blobs_are_right()
        assert_what_is_named_is_right(puller.home, PUBLISHER)
        assert len(list_refs(Layout(puller.home))) == 1
        assert list(puller.home.glob("partial/*")) == []
        assert list(puller.home.glob("snapshots/.*")) == []
        assert {path.stat().st_mode & 0o777 for path in puller.home.glob("blobs/sha256/*/*")} == {0o444}
        assert SIZE <= mirror.bytes_sent() <= SIZE + LOST
        if CRASH_POINTS.index(place.partition(":")[0]) >= CRASH_POINTS.index("snapshot-laid-out"):
            assert mirror.bytes_sent() == before, "every file was a blob already"
        assert mirror.most_requests_at_once > 1
