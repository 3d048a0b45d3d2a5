"""Several pulls of one model at once, with locks that hold and with locks that lie: exact, and nothing left behind."""

from __future__ import annotations

import random
from contextlib import ExitStack
from pathlib import Path

import pytest

from mistral_fetch.simulators.mirror import Fault, MirrorSimulator
from mistral_fetch.simulators.publisher import PublisherSimulator
from tests.transfer.conftest import Puller
from tests.transfer.engine import CONNECTIONS, PIECE, SEND_BUFFER, write_one_certificate
from tests.transfer.processes import (
    LYING_FLOCK,
    assert_what_is_named_is_right,
    result_of,
    start_pull,
    write_manifest,
)

pytestmark = pytest.mark.slow

PUBLISHER = PublisherSimulator({"weights.bin": random.Random(81).randbytes(40 * PIECE + 99), "config.json": b"{}"})
SIZE = sum(map(len, PUBLISHER.files.values()))
# Slow enough that processes which do not wait for one another are at work at the same time.
RATE = 1_500_000


def pull_at_once(
    count: int, before: str, manifest: str, puller: Puller, environment: dict[str, str]
) -> list[tuple[int, str]]:
    """Start pulls at the same time; return of each the exit code, and what it says of its failure."""
    started = [start_pull(puller.home, manifest, before=before, environment=environment) for _ in range(count)]
    ended = []
    for process in started:
        code, result, err = result_of(process)
        said = result.get("error", {})
        ended.append((code, f"{said.get('what')} | {said.get('detail')}" if code and said else err))
        if code == 0:
            directory = Path(str(result["directory"]))
            assert {path: (directory / path).read_bytes() for path in PUBLISHER.files} == PUBLISHER.files
    puller.assert_blobs_are_right()
    assert_what_is_named_is_right(puller.home, PUBLISHER)
    return ended


def assert_one_more_pull_leaves_nothing(manifest: str, puller: Puller, environment: dict[str, str]) -> None:
    code, _, err = result_of(start_pull(puller.home, manifest, "--refresh", environment=environment))
    assert code == 0, err
    puller.assert_blobs_are_right()
    assert list(puller.home.glob("partial/*")) == []
    assert list(puller.home.glob("snapshots/.*")) == []
    assert list(puller.home.rglob("*.tmp")) == []


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    write_one_certificate(tmp_path / "one.pem")
    return {"SSL_CERT_FILE": str(tmp_path / "one.pem")}


@pytest.mark.parametrize("pins", ["pieces", "sha256"])
@pytest.mark.parametrize("count", [2, 8])
def test_where_locks_hold_one_process_works_and_the_others_find_its_result(
    count: int, pins: str, puller: Puller, tmp_path: Path, environment: dict[str, str]
) -> None:
    with MirrorSimulator(PUBLISHER.files, rate_bytes_per_second=RATE, send_buffer_bytes=SEND_BUFFER) as mirror:
        manifest = write_manifest(tmp_path / "model.meta4", PUBLISHER, [mirror], pins)
        ended = pull_at_once(count, "", manifest, puller, environment)
        assert [code for code, _ in ended] == [0] * count, ended
        # A race for the last pieces may bring one twice.
        assert SIZE <= mirror.bytes_sent() <= SIZE + CONNECTIONS * PIECE
        assert list(puller.home.glob("partial/*")) == []
        assert_one_more_pull_leaves_nothing(manifest, puller, environment)


@pytest.mark.parametrize("pins", ["pieces", "sha256"])
@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("mirrors", ["one honest", "one honest and one liar"])
def test_where_locks_lie_every_process_ends_well_or_says_why_and_nothing_wrong_is_named(
    mirrors: str, count: int, pins: str, puller: Puller, tmp_path: Path, environment: dict[str, str]
) -> None:
    with ExitStack() as stack:
        options = {"rate_bytes_per_second": RATE, "send_buffer_bytes": SEND_BUFFER}
        honest = stack.enter_context(MirrorSimulator(PUBLISHER.files, **options))  # type: ignore[arg-type]
        asked = [honest]
        if mirrors != "one honest":
            liar = stack.enter_context(MirrorSimulator(PUBLISHER.files, **options))  # type: ignore[arg-type]
            liar.always("weights.bin", Fault(wrong_bytes_at=tuple(range(7, SIZE, 5 * PIECE))))
            asked = [liar, honest]
        manifest = write_manifest(tmp_path / "model.meta4", PUBLISHER, asked, pins)
        ended = pull_at_once(count, LYING_FLOCK, manifest, puller, environment)
        # A file that another process took away ends in 9; what a liar brought to all of them may end in 32.
        allowed = {0, 9} if len(asked) == 1 or pins == "pieces" else {0, 9, 32}
        assert {code for code, _ in ended} <= allowed, ended
        for code, said in ended:
            assert honest.base_url.removeprefix("http://") not in said, "an honest mirror is blamed"
            assert code != 9 or "something removed a file that was in use" in said
        assert any(code == 0 for code, _ in ended), ended
        assert not any("Traceback" in err for _, err in ended), ended
        assert honest.bytes_sent() > SIZE, "they did not get into one another's way: the test shows nothing"
        assert_one_more_pull_leaves_nothing(manifest, puller, environment)
