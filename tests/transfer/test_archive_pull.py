"""A release that is offered as a tar: resolved from its headers, pulled by ranges, proved as a whole."""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mistral_fetch.config import Settings
from mistral_fetch.digest import Assurance, Digest
from mistral_fetch.errors import (
    AssuranceTooLow,
    DigestMismatch,
    ExitCode,
    MirrorStatus,
    MistralFetchError,
    UnsafePath,
    UnsupportedFormat,
)
from mistral_fetch.events import BytesReceived, Notice
from mistral_fetch.manifest import FileEntry, MirrorUrl, PieceHashes
from mistral_fetch.metalink import serialise_metalink
from mistral_fetch.ref import parse_ref
from mistral_fetch.simulators.hub import HubRepository, HubSimulator
from mistral_fetch.simulators.mirror import Fault, MirrorSimulator
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.partial_notes import CommittedBlob
from mistral_fetch.store.snapshots import load_manifest, load_provenance
from mistral_fetch.transfer import obtain
from mistral_fetch.transfer.provenance import Delivered, pin_manifest
from mistral_fetch.transfer.resolve import Resolver
from tests.transfer.conftest import Puller
from tests.transfer.test_hub_pull import claim, hub_channel, write_catalog

MODEL = PublisherSimulator(
    {
        "consolidated.00.pth": random.Random(31).randbytes(300_000),
        "params.json": b'{"dim": 8}',
        "tokenizer.model": random.Random(32).randbytes(70_000),
    }
)
NAME = "m/Model-v0.2.tar"


def make_tar(files: Mapping[str, bytes], top: str = "Model-v0.2/") -> bytes:
    """Return a tar of these files in one folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for path, data in files.items():
            info = tarfile.TarInfo(top + path)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


TAR = make_tar(MODEL.files)
MD5 = hashlib.md5(TAR).hexdigest()


@pytest.fixture
def mirror() -> Iterator[MirrorSimulator]:
    with MirrorSimulator({NAME: TAR}) as simulator:
        yield simulator


def archive_channel(mirror: MirrorSimulator, md5: str | None = MD5) -> dict[str, Any]:
    """Return the archive as a catalog describes it."""
    digest = {"md5": claim(md5)} if md5 else {}
    return {"kind": "archive", "weight_format": "archive", "url": claim(mirror.url(NAME)), **digest}


@pytest.fixture
def catalog(mirror: MirrorSimulator, tmp_path: Path) -> str:
    return write_catalog(tmp_path / "catalog.json", archive_channel(mirror))


MD5_IS_ENOUGH = {"min_assurance": Assurance.MD5}
SIZE_IS_ENOUGH = {"min_assurance": Assurance.SIZE}


def test_an_archive_is_pulled_as_the_files_inside_it(puller: Puller, catalog: str, mirror: MirrorSimulator) -> None:
    result = puller("model", catalog=catalog, **MD5_IS_ENOUGH)
    puller.assert_exact(result, MODEL)
    assert (result.channel, result.assurance) == ("archive", "md5")
    papers = load_provenance(result.directory)
    assert (papers["identity"], papers["weight_format"]) == (f"archive-md5-{MD5}", "consolidated-pth")
    assert [file["assurance"] for file in papers["files"]] == ["md5"] * 3
    kept = load_manifest(result.directory).entry("params.json")
    assert kept.mirrors == (MirrorUrl(mirror.url(NAME), member="Model-v0.2/params.json"),)
    assert all(request.range for request in mirror.requests())


def test_an_archive_pulled_again_asks_nobody(puller: Puller, catalog: str, mirror: MirrorSimulator) -> None:
    puller("model", catalog=catalog, **MD5_IS_ENOUGH)
    asked = len(mirror.requests())
    assert puller("model", catalog=catalog, **MD5_IS_ENOUGH).was_complete
    assert len(mirror.requests()) == asked


def test_an_archive_of_another_digest_is_never_published(
    puller: Puller, mirror: MirrorSimulator, tmp_path: Path
) -> None:
    catalog = write_catalog(tmp_path / "catalog.json", archive_channel(mirror, "0" * 32))
    with pytest.raises(DigestMismatch) as caught:
        puller("model", catalog=catalog, **MD5_IS_ENOUGH)
    assert caught.value.exit_code == 32
    puller.assert_nothing_published()
    assert not [path for path in puller.home.glob("partial/*/data") if path.stat().st_blocks]


@pytest.mark.parametrize("md5, floor", [(MD5, "md5"), (None, "size")])
def test_the_default_floor_excludes_an_archive_and_says_how_to_take_it(
    puller: Puller, mirror: MirrorSimulator, tmp_path: Path, md5: str | None, floor: str
) -> None:
    catalog = write_catalog(tmp_path / "catalog.json", archive_channel(mirror, md5))
    with pytest.raises(AssuranceTooLow) as caught:
        puller("model", catalog=catalog)
    assert caught.value.exit_code == 33
    assert f"--min-assurance {floor}" in caught.value.hint
    assert "model v0.2" in caught.value.what
    assert mirror.requests() == []
    result = puller("model", catalog=catalog, min_assurance=Assurance.parse(floor))
    puller.assert_exact(result, MODEL)
    assert result.assurance == floor


def test_an_archive_without_a_digest_is_not_enough_for_md5(
    puller: Puller, mirror: MirrorSimulator, tmp_path: Path
) -> None:
    catalog = write_catalog(tmp_path / "catalog.json", archive_channel(mirror, None))
    with pytest.raises(AssuranceTooLow):
        puller("model", catalog=catalog, **MD5_IS_ENOUGH)


def test_an_archive_comes_after_better_channels_and_takes_over_from_them(
    puller: Puller, mirror: MirrorSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = write_catalog(
        tmp_path / "catalog.json", archive_channel(mirror), hub_channel("org/gated", include=sorted(MODEL.files))
    )
    with HubSimulator({"org/gated": HubRepository(MODEL.files, is_gated=True)}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.base_url)
        with Resolver(Layout(puller.home), Settings(home=puller.home, catalog=catalog), print, StopSignal()) as r:
            found = r.candidates(parse_ref("model"))
        assert [(c.channel, c.excluded is None) for c in found] == [("hub", True), ("archive", False)]
        result = puller("model", catalog=catalog, **MD5_IS_ENOUGH)
    puller.assert_exact(result, MODEL)
    assert result.channel == "archive"


def test_an_excluded_archive_is_told_and_does_not_hide_why_the_others_failed(
    puller: Puller, mirror: MirrorSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = write_catalog(
        tmp_path / "catalog.json", hub_channel("org/gated", include=sorted(MODEL.files)), archive_channel(mirror)
    )
    with HubSimulator({"org/gated": HubRepository(MODEL.files, is_gated=True)}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.base_url)
        with pytest.raises(MistralFetchError) as caught:
            puller("model", catalog=catalog)
    assert caught.value.exit_code is ExitCode.NOT_AUTHORISED
    (notice,) = puller.of_kind(Notice)
    assert "--min-assurance md5" in notice.text
    assert mirror.requests() == []


def test_via_torrent_leaves_an_archive_out(puller: Puller, catalog: str) -> None:
    with pytest.raises(MistralFetchError) as caught:
        puller("model", catalog=catalog, via="torrent", **SIZE_IS_ENOUGH)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "tar, kind",
    [
        (b"\x1f\x8b" + bytes(5000), UnsupportedFormat),
        (make_tar({"../../x": b"x"}, ""), UnsafePath),
        (make_tar({"PROVENANCE.json": b"x", "params.json": b"{}"}), UnsafePath),
    ],
    ids=["compressed", "dot dot", "a name of ours"],
)
def test_a_hostile_archive_is_refused_before_a_file_is_fetched(
    puller: Puller, catalog: str, mirror: MirrorSimulator, tar: bytes, kind: type[MistralFetchError]
) -> None:
    mirror.files[NAME] = tar  # type: ignore[index]
    with pytest.raises(kind) as caught:
        puller("model", catalog=catalog, **MD5_IS_ENOUGH)
    assert caught.value.exit_code == 20
    puller.assert_nothing_published()


def test_an_archive_that_is_gone_is_told(puller: Puller, catalog: str, mirror: MirrorSimulator) -> None:
    mirror.always(NAME, Fault(status=404))
    with pytest.raises(MirrorStatus) as caught:
        puller("model", catalog=catalog, **MD5_IS_ENOUGH)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(
    "names, expected",
    [
        (["top/a", "top/b/c"], ["a", "b/c"]),
        (["a", "top/b"], ["a", "top/b"]),
        (["x/y/a", "x/y/b"], ["a", "b"]),
        (["top/a", "topper/b"], ["top/a", "topper/b"]),
        (["top/a"], ["a"]),
    ],
)
def test_the_folder_that_holds_everything_is_left_out_of_names(
    puller: Puller, catalog: str, mirror: MirrorSimulator, names: list[str], expected: list[str]
) -> None:
    mirror.files[NAME] = make_tar(dict.fromkeys(names, b"x"), "")  # type: ignore[index]
    with Resolver(Layout(puller.home), Settings(home=puller.home, catalog=catalog), print, StopSignal()) as resolver:
        (candidate,) = resolver.candidates(parse_ref("model"))
        offer = candidate.open()
    assert [entry.path for entry in offer.manifest.files] == expected
    assert [entry.mirrors[0].member for entry in offer.manifest.files] == names


def test_a_kill_between_two_commits_fetches_nothing_again(
    puller: Puller, catalog: str, mirror: MirrorSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = obtain.commit_partial

    def commit_one(layout: Layout, entry: FileEntry, *rest: Any) -> Any:
        if entry.path == "params.json":
            raise KeyboardInterrupt
        return commit(layout, entry, *rest)

    with monkeypatch.context() as killed:
        killed.setattr(obtain, "commit_partial", commit_one)
        with pytest.raises(KeyboardInterrupt):
            puller("model", catalog=catalog, **MD5_IS_ENOUGH)
    sent = mirror.bytes_sent()
    puller.events.clear()
    result = puller("model", catalog=catalog, **MD5_IS_ENOUGH)
    puller.assert_exact(result, MODEL)
    assert result.assurance == "md5"
    assert puller.of_kind(BytesReceived) == []
    assert mirror.bytes_sent() - sent < 200_000  # the headers, to learn what is inside


def test_a_kept_manifest_holds_an_archive_s_address_without_its_secrets() -> None:
    url = "https://user:pw@host.example/m.tar?token=1"
    entry = FileEntry("f", 1, mirrors=(MirrorUrl(url, 3, "top/f"),))
    manifest = replace(MODEL.manifest(), files=(entry,))
    blob = CommittedBlob("a" * 64, 1, PieceHashes(4, ("a" * 64,)))
    (kept,) = pin_manifest(manifest, [Delivered(entry, blob, Assurance.MD5)]).files
    assert kept.mirrors == (MirrorUrl("https://host.example/m.tar", 3, "top/f"),)


def test_a_manifest_may_name_an_archive_as_a_mirror(puller: Puller, mirror: MirrorSimulator) -> None:
    """Its sizes may be missing, as RFC 5854 allows: the archive's headers tell."""
    entries = [
        FileEntry(
            path,
            None,
            (Digest("sha256", hashlib.sha256(data).hexdigest()),),
            mirrors=(MirrorUrl("m/Model-v0.2.tar", member=f"Model-v0.2/{path}"),),
        )
        for path, data in MODEL.files.items()
    ]
    manifest = MODEL.manifest().with_files(entries)
    mirror.files["model.meta4"] = serialise_metalink(manifest)  # type: ignore[index]
    result = puller(mirror.url("model.meta4"))
    puller.assert_exact(result, MODEL)
    assert (result.channel, result.assurance) == ("manifest", "sha256")
