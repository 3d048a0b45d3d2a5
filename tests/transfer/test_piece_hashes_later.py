"""Our own piece hashes, where a fast line left no time for them: left out, learnt by verify, used from then on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mistral_fetch.errors import StoreError
from mistral_fetch.events import ignore_events
from mistral_fetch.manifest import DEFAULT_PIECE_LENGTH
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.store import follower, snapshots
from mistral_fetch.store.partials import Partial
from mistral_fetch.store.snapshots import learn_pieces, load_manifest
from mistral_fetch.store.verify import verify_snapshot
from tests.transfer.conftest import Puller

PIECES = 5
MODEL = PublisherSimulator({"w.bin": random.Random(8).randbytes((PIECES - 1) * DEFAULT_PIECE_LENGTH + 4321)})


def pull(puller: Puller, skipped: int, monkeypatch: pytest.MonkeyPatch, **options: bool) -> Path:
    """Pull a file of which the hashes of the first pieces are skipped, as if the processor were short."""
    skips = iter([1 << 40] * (2 * skipped))  # asked for once by the piece, once by its connection
    with monkeypatch.context() as busy:
        busy.setattr("mistral_fetch.store.partials.SKIP_LAG_BYTES", 1 << 39)
        busy.setattr(Partial, "lag_bytes", lambda _: next(skips, 0))
        busy.setattr("mistral_fetch.sources.http_engine.MOST_LAG_BYTES", 1 << 50)
        with MODEL.serve(MODEL.manifest(piece_length=None, **options)) as mirror:
            floor = {} if options.get("has_sha256", True) else {"min_assurance": 0}
            result = puller(mirror.url("model.meta4"), connections=1, **floor)
    puller.assert_exact(result, MODEL)
    return result.directory


def pieces_of(snapshot: Path) -> object:
    return load_manifest(snapshot).entry("w.bin").pieces


def truth() -> object:
    return MODEL.manifest(piece_length=DEFAULT_PIECE_LENGTH).entry("w.bin").pieces


def test_pieces_are_kept_where_there_was_time_for_them(puller: Puller, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pieces_of(pull(puller, 0, monkeypatch)) == truth()


def test_a_few_that_were_left_out_are_made_up_for(puller: Puller, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pieces_of(pull(puller, 1, monkeypatch)) == truth()


def test_more_than_a_quarter_is_left_for_later(puller: Puller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "hash_pieces", lambda *_: pytest.fail("a second pass over the file"))
    assert pieces_of(pull(puller, 2, monkeypatch)) is None


def test_a_file_without_a_sha256_is_always_hashed(puller: Puller, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pieces_of(pull(puller, PIECES, monkeypatch, has_sha256=False)) == truth()


def test_verify_learns_them_and_names_ranges_from_then_on(puller: Puller, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = pull(puller, PIECES, monkeypatch)
    manifest, (verdict,) = verify_snapshot(snapshot, ignore_events, lambda: None)
    assert verdict.is_good
    assert verdict.learnt == truth()
    assert manifest is not None
    learn_pieces(snapshot, manifest, {"w.bin": verdict.learnt})
    assert pieces_of(snapshot) == truth()
    blob = (snapshot / "w.bin").resolve()
    blob.chmod(0o644)
    with blob.open("r+b") as file:
        file.seek(2 * DEFAULT_PIECE_LENGTH + 5)
        file.write(b"\0\0\0\0\0")
    _, (verdict,) = verify_snapshot(snapshot, ignore_events, lambda: None)
    assert [span.start for span in verdict.bad_spans] == [2 * DEFAULT_PIECE_LENGTH]


def test_nothing_is_learnt_from_a_file_that_is_wrong(puller: Puller, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = pull(puller, PIECES, monkeypatch)
    blob = (snapshot / "w.bin").resolve()
    blob.chmod(0o644)
    blob.write_bytes(bytes(blob.stat().st_size))
    _, (verdict,) = verify_snapshot(snapshot, ignore_events, lambda: None)
    assert not verdict.is_good
    assert verdict.learnt is None


@pytest.mark.parametrize("writes_before_the_crash", [0, 1, 2])
def test_a_crash_while_learning_leaves_a_snapshot_that_is_believed(
    puller: Puller, monkeypatch: pytest.MonkeyPatch, writes_before_the_crash: int
) -> None:
    snapshot = pull(puller, PIECES, monkeypatch)
    manifest, (verdict,) = verify_snapshot(snapshot, ignore_events, lambda: None)
    assert manifest is not None
    assert verdict.learnt is not None
    write, written = snapshots.write_durably, []

    def crash(path: Path, data: bytes) -> None:
        if len(written) == writes_before_the_crash:
            raise OSError("the power went")
        written.append(path.name)
        write(path, data)

    with monkeypatch.context() as dying:
        dying.setattr(snapshots, "write_durably", crash)
        if writes_before_the_crash < 2:
            with pytest.raises(StoreError):
                learn_pieces(snapshot, manifest, {"w.bin": verdict.learnt})
        else:
            learn_pieces(snapshot, manifest, {"w.bin": verdict.learnt})
    assert pieces_of(snapshot) in {None, truth()}
