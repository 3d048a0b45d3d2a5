"""Whole pulls from mirrors on loopback: honest, lying, broken and absent ones."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mistral_fetch.digest import Assurance, Digest
from mistral_fetch.errors import DigestMismatch, MistralFetchError, UsageError
from mistral_fetch.events import BytesDropped, Notice, SourceFailed, SourceLied
from mistral_fetch.manifest import MirrorUrl
from mistral_fetch.metalink import parse_metalink, serialise_metalink
from mistral_fetch.simulators.mirror import Fault, MirrorSimulator
from mistral_fetch.simulators.publisher import SMALL_PIECE_LENGTH, PublisherSimulator
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.partials import Partial
from mistral_fetch.transfer.channels import PullResult
from mistral_fetch.units import MIB
from tests.transfer.conftest import Puller

PIECE = SMALL_PIECE_LENGTH
WEIGHTS = random.Random(8).randbytes(5 * PIECE + 4321)
PUBLISHER = PublisherSimulator({"weights.bin": WEIGHTS, "config.json": b"{}"})


@contextmanager
def two_mirrors(tmp_path: Path, *, has_pieces: bool) -> Iterator[tuple[str, MirrorSimulator, MirrorSimulator]]:
    """Give a manifest's path and the two mirrors it names, in their order."""
    with MirrorSimulator(PUBLISHER.files) as first, MirrorSimulator(PUBLISHER.files) as second:
        bases = [first.base_url, second.base_url]
        manifest = PUBLISHER.manifest(bases, piece_length=PIECE if has_pieces else None)
        (tmp_path / "model.meta4").write_bytes(serialise_metalink(manifest))
        yield str(tmp_path / "model.meta4"), first, second


def test_a_manifest_s_address_is_all_a_pull_needs(puller: Puller) -> None:
    with PUBLISHER.serve() as mirror:
        result = puller(mirror.url("model.meta4"))
    puller.assert_exact(result, PUBLISHER)
    assert (result.channel, result.assurance, result.was_complete) == ("manifest", "sha256", False)
    assert result.received_bytes == sum(map(len, PUBLISHER.files.values()))


def test_provenance_says_what_came_from_where(puller: Puller) -> None:
    with PUBLISHER.serve() as mirror:
        result = puller(mirror.url("model.meta4"))
        host, port = mirror.address
    record = json.loads((result.directory / "PROVENANCE.json").read_text())
    weights = next(file for file in record["files"] if file["path"] == "weights.bin")
    assert weights["sources"] == [f"{host}:{port}"]
    assert weights["sha256"] == PUBLISHER.manifest().entry("weights.bin").sha256
    assert weights["assurance"] == "sha256"
    assert weights["verified_at"].endswith("+00:00")
    assert (record["licence"], record["channel"]) == ("Apache-2.0", "manifest")
    assert (result.directory / "LICENSE").exists()


def test_files_no_digest_is_known_of_get_ours(puller: Puller) -> None:
    with PUBLISHER.serve(PUBLISHER.manifest(piece_length=None, has_sha256=False)) as mirror:
        result = puller(mirror.url("model.meta4"), min_assurance=Assurance.SIZE)
    puller.assert_exact(result, PUBLISHER)
    assert result.assurance == "size"
    kept = parse_metalink((result.directory / "manifest.meta4").read_bytes())
    assert [entry.sha256 for entry in kept.files] == [entry.sha256 for entry in PUBLISHER.manifest().files]
    assert all(entry.pieces for entry in kept.files)


@pytest.mark.parametrize("has_pieces", [True, False])
def test_the_second_mirror_delivers_when_the_first_lies(puller: Puller, tmp_path: Path, has_pieces: bool) -> None:
    with two_mirrors(tmp_path, has_pieces=has_pieces) as (manifest, liar, honest):
        liar.always("weights.bin", Fault(wrong_bytes_at=(2 * PIECE + 7,)))
        result = puller(manifest, connections=1)
        puller.assert_exact(result, PUBLISHER)
        (lie,) = puller.of_kind(SourceLied)
        assert f"127.0.0.1:{liar.address[1]}" in lie.source
        assert lie.path == "weights.bin"
        assert lie.expected != lie.actual
        assert len(liar.requests("weights.bin")) == 1
        assert honest.requests("weights.bin")
        record = json.loads((result.directory / "PROVENANCE.json").read_text())
        weights = next(file for file in record["files"] if file["path"] == "weights.bin")
        # Pieces that were right are kept, whoever sent them; a wrong whole file is discarded whole.
        assert (f"127.0.0.1:{liar.address[1]}" in weights["sources"]) == has_pieces
        assert f"127.0.0.1:{honest.address[1]}" in weights["sources"]


def test_three_liars_before_an_honest_mirror_are_each_named(puller: Puller, tmp_path: Path) -> None:
    wrong = {**PUBLISHER.files, "weights.bin": WEIGHTS[:-1] + b"\0"}
    with (
        MirrorSimulator(wrong) as a,
        MirrorSimulator(wrong) as b,
        MirrorSimulator(wrong) as c,
        MirrorSimulator(PUBLISHER.files) as honest,
    ):
        mirrors = [a, b, c, honest]
        manifest = PUBLISHER.manifest([mirror.base_url for mirror in mirrors], piece_length=None)
        (tmp_path / "model.meta4").write_bytes(serialise_metalink(manifest))
        result = puller(str(tmp_path / "model.meta4"), connections=1)
        puller.assert_exact(result, PUBLISHER)
        named = [lie.source for lie in puller.of_kind(SourceLied)]
        assert named == [f"127.0.0.1:{mirror.address[1]}" for mirror in (a, b, c)]


def test_when_a_liar_completes_what_an_honest_mirror_began_the_end_is_exact(puller: Puller, tmp_path: Path) -> None:
    with two_mirrors(tmp_path, has_pieces=False) as (manifest, dying, liar):
        dying.script("weights.bin", [Fault(wrong_bytes_at=(5,), end_at=3 * PIECE)] + [Fault(status=404)] * 9)
        result = puller(manifest, connections=1)
        puller.assert_exact(result, PUBLISHER)
        assert liar.requests("weights.bin")


def test_bytes_of_an_earlier_run_are_not_blamed_on_the_mirror_that_completes_them(
    puller: Puller, tmp_path: Path
) -> None:
    # A liar filled all of it before the process died; the only mirror now is honest.
    entry = PUBLISHER.manifest(piece_length=None).entry("weights.bin")
    partial = Partial(Layout(puller.home).partial(f"sha256-{entry.sha256}"), len(WEIGHTS))
    partial.put(0, b"\0" * len(WEIGHTS), "a liar")
    partial.close()
    with PUBLISHER.serve(PUBLISHER.manifest(piece_length=None)) as mirror:
        puller.assert_exact(puller(mirror.url("model.meta4")), PUBLISHER)
    (lie,) = puller.of_kind(SourceLied)
    assert "127.0.0.1" not in lie.source


def test_an_honest_mirror_is_not_dropped_for_what_an_earlier_run_left(puller: Puller, tmp_path: Path) -> None:
    publisher = PublisherSimulator({"weights.bin": random.Random(9).randbytes(5 * MIB)})
    entry = publisher.manifest(piece_length=None).entry("weights.bin")
    partial = Partial(Layout(puller.home).partial(f"sha256-{entry.sha256}"), 5 * MIB)
    partial.put(0, b"\0" * (4 * MIB), "a liar")
    partial.close()
    with MirrorSimulator(publisher.files) as honest, MirrorSimulator({}) as empty:
        manifest = publisher.manifest([honest.base_url, empty.base_url], piece_length=None)
        (tmp_path / "model.meta4").write_bytes(serialise_metalink(manifest))
        puller.assert_exact(puller(str(tmp_path / "model.meta4")), publisher)


@pytest.mark.parametrize("has_pieces", [True, False])
def test_a_single_liar_ends_in_exit_code_32_and_an_honest_retry_succeeds(puller: Puller, has_pieces: bool) -> None:
    with PUBLISHER.serve(PUBLISHER.manifest(piece_length=PIECE if has_pieces else None)) as mirror:
        mirror.always("model/weights.bin", Fault(wrong_bytes_at=(len(WEIGHTS) - 1,)))
        with pytest.raises(MistralFetchError) as caught:
            puller(mirror.url("model.meta4"))
        assert caught.value.exit_code == 32
        assert "weights.bin" in caught.value.what
        assert "127.0.0.1" in caught.value.what
        puller.assert_nothing_published()
        mirror.always("model/weights.bin", Fault())
        puller.assert_exact(puller(mirror.url("model.meta4")), PUBLISHER)


@pytest.mark.parametrize(
    "fault, exit_code",
    [
        (Fault(body=b"<html>log in</html>", headers={"Content-Type": "text/html"}), 6),
        (Fault(body=b"<html>log in</html>"), 32),
        (Fault(size=len(WEIGHTS) - 1), 32),
        (Fault(size=len(WEIGHTS) + 1), 32),
        (Fault(size=len(WEIGHTS) - 1, no_length=True), 32),
        (Fault(size=len(WEIGHTS) + 1, no_length=True), 32),
        (Fault(size=0), 32),
        (Fault(status=401), 4),
        (Fault(status=403), 4),
        (Fault(status=404), 6),
        (Fault(status=410), 6),
        (Fault(status=500), 6),
        (Fault(status=503, headers={"Retry-After": "0"}), 6),
        (Fault(status=503, headers={"Retry-After": "99999"}), 6),
        (Fault(status=204), 6),
        (Fault(is_gzipped=True), 6),
        (Fault(redirect_to="http://127.0.0.1:1/elsewhere"), 6),
        (Fault(redirect_to="file:///etc/passwd"), 6),
        (Fault(reset_at=0), 6),
        (Fault(hang_at=100), 5),
    ],
    ids=lambda value: repr(value).replace("Fault", "")[:60] if isinstance(value, Fault) else str(value),
)
def test_a_mirror_that_fails_is_explained_and_the_next_run_succeeds(
    puller: Puller, fault: Fault, exit_code: int
) -> None:
    with PUBLISHER.serve() as mirror:
        mirror.always("model/weights.bin", fault)
        with pytest.raises(MistralFetchError) as caught:
            puller(mirror.url("model.meta4"), read_timeout=0.2, connect_timeout=0.5)
        assert caught.value.exit_code == exit_code
        assert all(caught.value.lines())
        assert "127.0.0.1" in caught.value.what
        puller.assert_nothing_published()
        mirror.always("model/weights.bin", Fault())
        puller.assert_exact(puller(mirror.url("model.meta4")), PUBLISHER)


@pytest.mark.parametrize("answers", ["no connection", "no status"])
@pytest.mark.parametrize("has_pieces", [True, False])
def test_a_mirror_that_never_answers_holds_nobody_up_once_all_is_there(
    puller: Puller, tmp_path: Path, has_pieces: bool, answers: str
) -> None:
    with MirrorSimulator(PUBLISHER.files) as honest, socket.create_server(("127.0.0.1", 0), backlog=0) as mute:
        # It is connected to by the kernel as long as there is room in its queue.
        filler = [socket.socket() for _ in range(4 if answers == "no connection" else 0)]
        for client in filler:
            client.setblocking(False)
            client.connect_ex(mute.getsockname())
        bases = [f"http://127.0.0.1:{mute.getsockname()[1]}", honest.base_url]
        manifest = PUBLISHER.manifest(bases, piece_length=PIECE if has_pieces else None)
        (tmp_path / "model.meta4").write_bytes(serialise_metalink(manifest))
        began = time.monotonic()
        result = puller(str(tmp_path / "model.meta4"), connect_timeout=40.0, read_timeout=40.0)
        assert time.monotonic() - began < 20
        puller.assert_exact(result, PUBLISHER)
        for client in filler:
            client.close()


def test_a_mirror_that_asks_for_more_patience_than_there_is_is_given_up_at_once(puller: Puller) -> None:
    with PUBLISHER.serve() as mirror:
        # Two files, so that the refused connection is not the only one.
        mirror.always("model/weights.bin", Fault(status=503, headers={"Retry-After": "99999"}))
        began = time.monotonic()
        with pytest.raises(MistralFetchError, match="answered 503"):
            puller(mirror.url("model.meta4"))
        assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "fault",
    [
        Fault(body=b"<html>", headers={"Content-Type": "text/html"}),
        Fault(size=10),
        Fault(status=403),
        Fault(status=404),
        Fault(status=503),
        Fault(end_at=2 * PIECE + 5),
        Fault(reset_at=2 * PIECE),
    ],
    ids=lambda fault: repr(fault)[6:60],
)
@pytest.mark.parametrize("has_pieces", [True, False])
def test_the_second_mirror_delivers_when_the_first_fails(
    puller: Puller, tmp_path: Path, fault: Fault, has_pieces: bool
) -> None:
    with two_mirrors(tmp_path, has_pieces=has_pieces) as (manifest, broken, _):
        broken.always("weights.bin", fault)
        puller.assert_exact(puller(manifest, connections=1), PUBLISHER)
        assert any(f"127.0.0.1:{broken.address[1]}" in event.source for event in puller.of_kind(SourceFailed))


def test_what_one_mirror_gave_is_not_asked_of_the_next(puller: Puller, tmp_path: Path) -> None:
    with two_mirrors(tmp_path, has_pieces=True) as (manifest, dying, other):
        dying.script("weights.bin", [Fault(end_at=3 * PIECE)] + [Fault(status=404)] * 9)
        puller.assert_exact(puller(manifest, connections=1), PUBLISHER)
        assert dying.bytes_sent("weights.bin") + other.bytes_sent("weights.bin") == len(WEIGHTS)


def test_nobody_answers_is_exit_code_6(puller: Puller) -> None:
    with pytest.raises(MistralFetchError) as caught:
        puller("http://127.0.0.1:1/model.meta4", connect_timeout=0.5)
    assert caught.value.exit_code == 6
    puller.assert_nothing_published()


def test_a_manifest_that_is_a_web_page_is_exit_code_20(puller: Puller) -> None:
    page = b"<!DOCTYPE html><html>sign in</html>"
    with MirrorSimulator({"model.meta4": page}) as mirror, pytest.raises(MistralFetchError) as caught:
        puller(mirror.url("model.meta4"))
    assert caught.value.exit_code == 20


def test_too_weak_a_proof_is_refused_before_a_byte_is_fetched(puller: Puller) -> None:
    with PUBLISHER.serve(PUBLISHER.manifest(piece_length=None, has_sha256=False)) as mirror:
        with pytest.raises(MistralFetchError) as caught:
            puller(mirror.url("model.meta4"))
        assert caught.value.exit_code == 33
        assert "--min-assurance size" in caught.value.hint
        assert mirror.bytes_sent("model/weights.bin") == 0
    puller.assert_nothing_published()


def test_a_complete_model_is_refused_when_more_proof_is_asked_of_it_than_it_has(puller: Puller) -> None:
    with PUBLISHER.serve(PUBLISHER.manifest(piece_length=None, has_sha256=False)) as mirror:
        puller(mirror.url("model.meta4"), min_assurance=Assurance.SIZE)
        with pytest.raises(MistralFetchError) as caught:
            puller(mirror.url("model.meta4"))
    assert caught.value.exit_code == 33


def test_a_manifest_beside_its_files_needs_no_network(puller: Puller, tmp_path: Path) -> None:
    publication = PUBLISHER.publish(tmp_path / "stick")
    puller.assert_exact(puller(str(publication.manifest_path)), PUBLISHER)


def test_a_wrong_local_file_gives_way_to_an_honest_mirror(puller: Puller, tmp_path: Path) -> None:
    with MirrorSimulator(PUBLISHER.files) as mirror:
        manifest = PUBLISHER.manifest(piece_length=None)
        entries = [
            replace(e, mirrors=(*e.mirrors, MirrorUrl(mirror.url(e.path), 2)), torrents=()) for e in manifest.files
        ]
        (tmp_path / "model.meta4").write_bytes(serialise_metalink(manifest.with_files(entries)))
        (tmp_path / "model").mkdir()
        (tmp_path / "model/config.json").write_bytes(b"{}")
        (tmp_path / "model/weights.bin").write_bytes(WEIGHTS[:-1] + b"\0")
        puller.assert_exact(puller(str(tmp_path / "model.meta4")), PUBLISHER)


def test_via_torrent_leaves_a_manifest_of_mirrors_without_a_source(puller: Puller) -> None:
    with PUBLISHER.serve() as mirror, pytest.raises(UsageError):
        puller(mirror.url("model.meta4"), via="torrent")


def test_sizes_the_manifest_leaves_out_are_asked_for(puller: Puller) -> None:
    manifest = PUBLISHER.manifest(piece_length=None)
    unsized = manifest.with_files(replace(entry, size=None) for entry in manifest.files)
    with PUBLISHER.serve(unsized) as mirror:
        puller.assert_exact(puller(mirror.url("model.meta4")), PUBLISHER)


def test_a_size_the_mirror_lies_about_is_caught_by_the_digest(puller: Puller) -> None:
    manifest = PUBLISHER.manifest(piece_length=None)
    unsized = manifest.with_files(replace(entry, size=None) for entry in manifest.files)
    with PUBLISHER.serve(unsized) as mirror:
        mirror.files = {**mirror.files, "model/weights.bin": WEIGHTS[:-5]}  # type: ignore[dict-item]
        with pytest.raises(MistralFetchError) as caught:
            puller(mirror.url("model.meta4"))
    assert caught.value.exit_code == 32
    puller.assert_nothing_published()


def test_a_manifest_whose_pieces_contradict_its_sha256_is_refused(puller: Puller) -> None:
    manifest = PUBLISHER.manifest()
    entries = [replace(e, digests=(Digest("sha256", f"{n:064}"),)) for n, e in enumerate(manifest.files)]
    with PUBLISHER.serve(manifest.with_files(entries)) as mirror, pytest.raises(DigestMismatch):
        puller(mirror.url("model.meta4"))
    puller.assert_nothing_published()


def test_one_digest_for_two_different_files_is_refused(puller: Puller) -> None:
    manifest = PUBLISHER.manifest(piece_length=None)
    entries = [replace(e, digests=manifest.entry("weights.bin").digests) for e in manifest.files]
    with PUBLISHER.serve(manifest.with_files(entries)) as mirror, pytest.raises(MistralFetchError) as caught:
        puller(mirror.url("model.meta4"))
    assert caught.value.exit_code in {20, 32}
    puller.assert_nothing_published()


@pytest.mark.parametrize("has_sha256", [True, False])
def test_the_same_file_under_two_names_is_one_blob(puller: Puller, has_sha256: bool) -> None:
    publisher = PublisherSimulator({"a/w.bin": WEIGHTS, "b/w.bin": WEIGHTS, "e1": b"", "e2": b""})
    with publisher.serve(publisher.manifest(has_sha256=has_sha256)) as mirror:
        result = puller(mirror.url("model.meta4"), min_assurance=Assurance.SIZE)
        if has_sha256:
            assert result.received_bytes == len(WEIGHTS)
    puller.assert_exact(result, publisher)
    assert len(list(puller.home.glob("blobs/sha256/*/*"))) == 2


def test_two_models_share_what_they_have_in_common(puller: Puller) -> None:
    other = PublisherSimulator({"weights.bin": WEIGHTS, "config.json": b'{"other": 1}'}, name="other")
    with PUBLISHER.serve() as mirror:
        puller(mirror.url("model.meta4"))
    with other.serve() as mirror:
        result = puller(mirror.url("other.meta4"))
        assert mirror.bytes_sent("other/weights.bin") == 0
    puller.assert_exact(result, other)
    assert result.received_bytes == len(b'{"other": 1}')


def test_refreshing_a_complete_model_fetches_no_file_again(puller: Puller) -> None:
    with PUBLISHER.serve() as mirror:
        puller(mirror.url("model.meta4"))
        before = mirror.bytes_sent("model/weights.bin")
        again = puller(mirror.url("model.meta4"), refresh=True)
        assert mirror.bytes_sent("model/weights.bin") == before
    assert again.received_bytes == 0


def test_refreshing_finds_a_new_publication(puller: Puller) -> None:
    publisher = PublisherSimulator(PUBLISHER.files)
    with publisher.serve() as mirror:
        first = puller(mirror.url("model.meta4"))
        publisher.files["config.json"] = b'{"new": 1}'
        mirror.files = {
            "model/weights.bin": WEIGHTS,
            "model/config.json": publisher.files["config.json"],
            "model.meta4": serialise_metalink(publisher.manifest()),
        }
        assert puller(mirror.url("model.meta4")).content_digest == first.content_digest
        second = puller(mirror.url("model.meta4"), refresh=True)
    assert (second.directory / "config.json").read_bytes() == b'{"new": 1}'
    assert (first.directory / "config.json").read_bytes() == b"{}"


def test_bytes_that_changed_on_the_disk_between_runs_are_fetched_again(puller: Puller) -> None:
    with PUBLISHER.serve() as mirror:
        mirror.script("model/weights.bin", [Fault(end_at=4 * PIECE), Fault(status=404)])
        with pytest.raises(MistralFetchError):
            puller(mirror.url("model.meta4"))
        key = f"sha256-{PUBLISHER.manifest().entry('weights.bin').sha256}"
        data = Layout(puller.home).partial(key) / "data"
        with data.open("r+b") as file:
            file.seek(PIECE + 3)
            file.write(b"\0\0\0\0")
        result = puller(mirror.url("model.meta4"))
    puller.assert_exact(result, PUBLISHER)
    assert any("changed after they were written" in notice.text for notice in puller.of_kind(Notice))
    assert puller.of_kind(SourceLied) == []


def test_a_file_that_changes_on_a_mirror_half_way_is_never_spliced(puller: Puller) -> None:
    old, new = WEIGHTS, bytes(reversed(WEIGHTS))
    publisher = PublisherSimulator({"weights.bin": old})
    with publisher.serve(publisher.manifest(piece_length=None, has_sha256=False)) as mirror:
        mirror.script("model/weights.bin", [Fault(end_at=2 * PIECE)])

        def swap(request: object) -> None:
            if mirror.requests("model/weights.bin"):
                mirror.files["model/weights.bin"] = new  # type: ignore[index]

        mirror.rule = swap
        result = puller(mirror.url("model.meta4"), min_assurance=Assurance.SIZE)
    assert (result.directory / "weights.bin").read_bytes() in {old, new}
    assert puller.of_kind(BytesDropped) or (result.directory / "weights.bin").read_bytes() == old


def test_the_same_result_for_the_same_address(puller: Puller) -> None:
    with PUBLISHER.serve() as mirror:
        first: PullResult = puller(mirror.url("model.meta4"))
        second = puller(mirror.url("model.meta4"))
        asked = len(mirror.requests())
        third = puller(mirror.url("model.meta4"))
        assert len(mirror.requests()) == asked
    assert first.directory == second.directory == third.directory
    assert (second.was_complete, third.received_bytes) == (True, 0)
