"""What lies in the cache already is no proof: leftovers, other models' blobs, other people's papers."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from mistral_fetch.digest import Assurance, Digest
from mistral_fetch.errors import MistralFetchError, StoreLocked
from mistral_fetch.manifest import FileEntry, Manifest, MirrorUrl, ModelInfo, PieceHashes
from mistral_fetch.metalink import serialise_metalink
from mistral_fetch.simulators.mirror import MirrorSimulator
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.store.gc import execute_removal, held_for_removal, plan_removal
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.lock import locked
from mistral_fetch.store.partial_notes import LOCK_NAME
from mistral_fetch.store.snapshots import find_refs, load_manifest, load_provenance
from mistral_fetch.store.verify import verify_directory
from tests.transfer.conftest import Puller

OLD, NEW = b"old" * 50_000, b"new" * 50_000


def entry(mirror: MirrorSimulator, path: str, size: int, **more: object) -> FileEntry:
    return FileEntry(path, size, mirrors=(MirrorUrl(mirror.url(path)),), **more)  # type: ignore[arg-type]


def test_what_an_older_manifest_of_the_same_address_brought_is_not_taken_for_the_new_one(puller: Puller) -> None:
    with MirrorSimulator({"a.bin": OLD}) as mirror:
        files = (entry(mirror, "a.bin", len(OLD)), entry(mirror, "b.bin", 3))
        mirror.files["m.meta4"] = serialise_metalink(Manifest(files))
        with pytest.raises(MistralFetchError):
            puller(mirror.url("m.meta4"), min_assurance=Assurance.SIZE)
        files = (files[0], entry(mirror, "b.bin", 4))
        mirror.files.update({"a.bin": NEW, "b.bin": b"here", "m.meta4": serialise_metalink(Manifest(files))})
        result = puller(mirror.url("m.meta4"), min_assurance=Assurance.SIZE)
    assert (result.directory / "a.bin").read_bytes() == NEW


def test_the_floor_holds_for_what_a_more_lenient_run_left(puller: Puller) -> None:
    with MirrorSimulator({"a.bin": OLD}) as mirror:
        md5 = (Digest("md5", hashlib.md5(OLD).hexdigest()),)
        files = (entry(mirror, "a.bin", len(OLD), digests=md5), entry(mirror, "b.bin", 3, digests=md5))
        mirror.files["m.meta4"] = serialise_metalink(Manifest(files))
        for floor in (Assurance.MD5, Assurance.BTV1):
            with pytest.raises(MistralFetchError) as caught:
                puller(mirror.url("m.meta4"), min_assurance=floor)
        assert caught.value.exit_code == 33
    puller.assert_nothing_published()


def test_false_pieces_for_a_blob_of_the_cache_are_refused_and_poison_nothing(puller: Puller) -> None:
    honest = PublisherSimulator({"w.bin": OLD}, name="model")
    lie = honest.manifest()
    wrong = PieceHashes(64 * 1024, tuple("0" * 64 for _ in lie.files[0].pieces.sha256))  # type: ignore[union-attr]
    evil = lie.with_files([replace(file, pieces=wrong) for file in lie.files])
    with honest.serve() as mirror, honest.serve(evil) as hostile:
        puller(mirror.url("model.meta4"))
        with pytest.raises(MistralFetchError) as caught:
            puller(hostile.url("model.meta4"))
        assert caught.value.exit_code == 32
        directory = puller(mirror.url("model.meta4"), refresh=True).directory
    verdicts = verify_directory(directory, load_manifest(directory), lambda _event: None, lambda: None)
    assert all(verdict.is_good for verdict in verdicts)


def test_newer_papers_replace_older_ones(puller: Puller) -> None:
    first = PublisherSimulator({"w.bin": OLD}, info=ModelInfo(name="model", chat_template="none"))
    second = PublisherSimulator({"w.bin": OLD}, info=ModelInfo(name="model", chat_template="v3"))
    with first.serve() as one, second.serve() as two:
        directory = puller(one.url("model.meta4")).directory
        senders = load_provenance(directory)["files"][0]["sources"]
        assert puller(two.url("model.meta4")).directory == directory
    papers = load_provenance(directory)
    assert papers["chat_template"] == "v3"
    assert papers["files"][0]["sources"] == senders, "the bytes still came from the first"


@pytest.mark.parametrize("is_shared", [True, False], ids=["by another model", "by --refresh"])
def test_a_damaged_blob_is_noticed_and_fetched_again(puller: Puller, is_shared: bool) -> None:
    first = PublisherSimulator({"w.bin": OLD}, name="one")
    second = PublisherSimulator({"w.bin": OLD, "more.bin": b"x"}, name="two")
    with first.serve() as one, second.serve() as two:
        directory = puller(one.url("one.meta4")).directory
        blob = (directory / "w.bin").resolve()
        blob.chmod(0o644)
        blob.write_bytes(b"bad" + OLD[3:])
        if is_shared:
            puller.assert_exact(puller(two.url("two.meta4")), second)
        else:
            puller.assert_exact(puller(one.url("one.meta4"), refresh=True), first)
    assert (directory / "w.bin").read_bytes() == OLD, "the model that had it is whole again, too"


def test_no_secret_of_an_address_is_kept(puller: Puller) -> None:
    publisher = PublisherSimulator({"w.bin": OLD})
    with publisher.serve() as mirror:
        host = mirror.base_url.removeprefix("http://")
        manifest = publisher.manifest([f"http://user:s3cret@{host}/model"])
        mirror.files["model.meta4"] = serialise_metalink(manifest)
        puller(f"http://user:s3cret@{host}/model.meta4?sig=t0psecret")
    for path in puller.home.rglob("*"):
        assert "s3cret" not in str(path)
        assert "t0psecret" not in str(path)
        if path.is_file() and path.stat().st_size < 100_000:
            text = path.read_bytes()
            assert b"s3cret" not in text, path
            assert b"t0psecret" not in text, path


def test_a_dead_torrent_link_does_not_hide_the_live_mirror_or_link(puller: Puller, tmp_path: Path) -> None:
    publisher = PublisherSimulator({"w.bin": OLD})
    publication = publisher.publish(tmp_path / "site")
    publication.torrent_path.unlink()
    puller.assert_exact(puller(str(publication.manifest_path)), publisher)


def test_rm_keeps_its_hands_off_what_a_pull_holds(puller: Puller) -> None:
    publisher = PublisherSimulator({"w.bin": OLD})
    with publisher.serve() as mirror:
        result = puller(mirror.url("model.meta4"))
    layout = Layout(puller.home)
    plan = plan_removal(layout, find_refs(layout, result.key))
    held = layout.partial(f"sha256-{hashlib.sha256(OLD).hexdigest()}") / LOCK_NAME
    with (
        locked(held, "pull", 1.0, lambda _owner: None, lambda: None),
        pytest.raises(StoreLocked) as caught,
        held_for_removal(layout, plan),
    ):
        pytest.fail("the lock was not asked")
    assert caught.value.exit_code == 11
    with held_for_removal(layout, plan):
        execute_removal(layout, plan)
    assert not result.directory.exists()
    assert list(puller.home.glob("partial/*")) == []
