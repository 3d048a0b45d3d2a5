"""Whole pulls from a Hugging Face on loopback, and of catalog entries that begin there."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mistral_fetch.errors import GatedRepository, MistralFetchError, NotAuthorised, UnknownModel
from mistral_fetch.events import Notice
from mistral_fetch.simulators.hub import HubRepository, HubSimulator
from mistral_fetch.simulators.mirror import Fault
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.store.snapshots import load_provenance
from tests.transfer.conftest import Puller, Seed

WEIGHTS = random.Random(9).randbytes(300_000)
FILES = {
    "config.json": b'{"model_type": "mistral"}',
    "model.safetensors": WEIGHTS,
    "tokenizer.model": random.Random(10).randbytes(9_000),
}
MODEL = PublisherSimulator(FILES)
COMMIT = "27d67f1b5f57dc0953326b2601d68371d40ea8da"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubSimulator]:
    repositories = {
        "org/model": HubRepository({**FILES, "README.md": b"read me", "pytorch_model.bin": b"x" * 5000}),
        "org/gated": HubRepository(FILES, is_gated=True),
    }
    with HubSimulator(repositories) as simulator:
        monkeypatch.setenv("HF_ENDPOINT", simulator.base_url)
        yield simulator


def claim(value: Any) -> dict[str, Any]:
    return {"value": value, "confidence": "publisher", "sources": ["test"]}


def pin(path: str, **digests: Any) -> dict[str, Any]:
    return {"path": path, "size": claim(len(FILES[path])), **digests}


def sha256(path: str) -> dict[str, Any]:
    return claim(hashlib.sha256(FILES[path]).hexdigest())


def write_catalog(path: Path, *channels: Mapping[str, Any]) -> str:
    """Write a catalog with one release, ``model@v0.2``, offered by these channels."""
    release = {
        "name": "model",
        "version": "v0.2",
        "title": "Model",
        "publisher": "Test",
        "variant": "base",
        "credit": "Model by Test",
        "source_url": "https://example.org/",
        "licence": claim("Apache-2.0"),
        "chat_template": claim(""),
        "channels": list(channels),
    }
    document = {
        "schema": 1,
        "as_of": "2026-09",
        "names": {"model": {"default": "v0.2", "aliases": []}},
        "sources": {"test": {"title": "this test"}},
        "links": {},
        "hub_mirrors": [],
        "statements": {},
        "releases": [release],
    }
    path.write_text(json.dumps(document))
    return str(path)


def hub_channel(repo: str = "org/model", **more: Any) -> dict[str, Any]:
    return {
        "kind": "hub",
        "weight_format": "hf-safetensors",
        "repo": repo,
        "revision": claim(COMMIT),
        "include": sorted(FILES),
        **more,
    }


def test_a_repository_is_pulled_with_the_files_a_runtime_needs(puller: Puller, hub: HubSimulator) -> None:
    result = puller("hf:org/model")
    puller.assert_exact(result, MODEL)
    assert not (result.directory / "pytorch_model.bin").exists()
    assert (result.channel, result.assurance) == ("hub", "gitsha1")
    assert (result.directory / "LICENSE").exists()


def test_a_repository_pulled_again_asks_nobody(puller: Puller, hub: HubSimulator) -> None:
    puller("hf:org/model")
    asked = len(hub.requests())
    assert puller("hf:org/model").was_complete
    assert len(hub.requests()) == asked


@pytest.mark.parametrize(
    "token, known, error",
    [(None, False, NotAuthorised), ("hf_known", True, GatedRepository), ("hf_unknown", False, MistralFetchError)],
)
def test_a_gated_repository_is_exit_code_4_with_what_to_do(
    puller: Puller,
    hub: HubSimulator,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    known: bool,
    error: type[Exception],
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.access.known_tokens |= {token} if known and token else set()
    with pytest.raises(error) as caught:
        puller("hf:org/gated")
    assert isinstance(caught.value, MistralFetchError)
    assert caught.value.exit_code == 4
    assert "huggingface.co/org/gated" in caught.value.hint
    puller.assert_nothing_published()


def test_a_granted_token_opens_a_gated_repository_and_never_reaches_the_content_network(
    puller: Puller, hub: HubSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.access.granted_tokens.add("hf_secret")
    result = puller("hf:org/gated")
    puller.assert_exact(result, MODEL)
    kept = [path.read_bytes() for path in puller.home.rglob("*") if path.is_file() and path.stat().st_size < 100_000]
    assert not any(b"hf_secret" in data for data in kept)


@pytest.mark.parametrize("ref", ["hf:org/none", "hf:org/model@nonesuch"])
def test_what_the_hub_does_not_have_is_exit_code_3(puller: Puller, hub: HubSimulator, ref: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        puller(ref)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "fault",
    [
        Fault(wrong_bytes_at=(1000,)),
        Fault(size=len(WEIGHTS) - 1),
        Fault(body=b"<html>", headers={"Content-Type": "text/html"}),
    ],
    ids=["flipped", "short", "html"],
)
def test_a_wrong_file_from_the_content_network_is_never_published(
    puller: Puller, hub: HubSimulator, fault: Fault
) -> None:
    path = f"cdn/{hashlib.sha256(WEIGHTS).hexdigest()}"
    hub.always(path, fault)
    with pytest.raises(MistralFetchError) as caught:
        puller("hf:org/model")
    assert caught.value.exit_code in {6, 32}
    puller.assert_nothing_published()
    hub.always(path, Fault())
    puller.assert_exact(puller("hf:org/model"), MODEL)


def test_a_small_file_is_checked_by_its_git_blob_id(puller: Puller, hub: HubSimulator) -> None:
    hub.always(f"org/model/resolve/{COMMIT}/config.json", Fault(wrong_bytes_at=(3,)))
    with pytest.raises(MistralFetchError) as caught:
        puller("hf:org/model")
    assert caught.value.exit_code == 32
    assert "config.json" in caught.value.what


def test_a_catalog_entry_with_every_pin_needs_no_listing(puller: Puller, hub: HubSimulator, tmp_path: Path) -> None:
    files = [pin(path, sha256=sha256(path)) for path in sorted(FILES)]
    catalog = write_catalog(tmp_path / "catalog.json", hub_channel(files=files))
    result = puller("model@v0.2", catalog=catalog)
    puller.assert_exact(result, MODEL)
    assert (result.key, result.assurance) == ("model@v0.2", "sha256")
    assert hub.requests(f"api/models/org/model/revision/{COMMIT}") == []


def test_the_runtime_is_told_of_a_base_model_only_where_somebody_knows(
    puller: Puller, hub: HubSimulator, tmp_path: Path
) -> None:
    """A repository's own files tell whether it chats; a catalog's base model must not be taken for one that does."""
    unknown = load_provenance(puller("hf:org/model").directory)
    assert "chat_template" not in unknown
    catalog = write_catalog(tmp_path / "catalog.json", hub_channel())
    puller.home = tmp_path / "another"
    known = load_provenance(puller("model", catalog=catalog).directory)
    assert known["chat_template"] is None


def test_what_the_catalog_leaves_open_is_asked_of_the_hub(puller: Puller, hub: HubSimulator, tmp_path: Path) -> None:
    files = [pin("model.safetensors", sha256=sha256("model.safetensors"))]
    catalog = write_catalog(tmp_path / "catalog.json", hub_channel(files=files))
    puller.assert_exact(puller("model", catalog=catalog), MODEL)
    assert len(hub.requests(f"api/models/org/model/revision/{COMMIT}")) == 1


def test_a_pin_is_never_replaced_by_what_the_hub_says(puller: Puller, hub: HubSimulator, tmp_path: Path) -> None:
    files = [pin("model.safetensors", sha256=claim("0" * 64))]
    catalog = write_catalog(tmp_path / "catalog.json", hub_channel(files=files))
    with pytest.raises(MistralFetchError) as caught:
        puller("model", catalog=catalog)
    assert caught.value.exit_code == 32
    assert "model.safetensors" in caught.value.what
    puller.assert_nothing_published()


def test_an_unconfirmed_record_that_differs_is_a_notice_not_a_check(
    puller: Puller, hub: HubSimulator, tmp_path: Path
) -> None:
    rumour = {"value": "0" * 64, "confidence": "single", "sources": ["test"]}
    catalog = write_catalog(tmp_path / "catalog.json", hub_channel(files=[pin("model.safetensors", sha256=rumour)]))
    puller.assert_exact(puller("model", catalog=catalog), MODEL)
    (notice,) = puller.of_kind(Notice)
    assert "model.safetensors" in notice.text
    assert "0" * 64 in notice.text


def test_a_file_the_repository_lost_is_told(puller: Puller, hub: HubSimulator, tmp_path: Path) -> None:
    channel = hub_channel(include=[*sorted(FILES), "gone.json"])
    with pytest.raises(UnknownModel, match=r"gone\.json"):
        puller("model", catalog=write_catalog(tmp_path / "catalog.json", channel))


@pytest.mark.swarm
def test_a_gated_repository_gives_way_to_the_torrent_of_the_same_release(
    puller: Puller, hub: HubSimulator, tmp_path: Path, seed: Seed
) -> None:
    publication = PublisherSimulator(FILES).publish(tmp_path / "published")
    peer = seed(publication.plain_torrent_path, tmp_path / "published" / "model")
    torrent = {
        "kind": "torrent",
        "weight_format": "hf-safetensors",
        "info_hash": claim(publication.plain_info_hash),
        "name": claim("model"),
        "trackers": [],
    }
    catalog = write_catalog(tmp_path / "catalog.json", hub_channel("org/gated"), torrent)
    result = puller("model", catalog=catalog, peers=(peer,), peer_timeout=10.0)
    puller.assert_exact(result, MODEL)
    assert (result.channel, result.assurance) == ("torrent", "btv1")


def test_every_channel_s_failure_is_told(puller: Puller, hub: HubSimulator, tmp_path: Path) -> None:
    torrent = {
        "kind": "torrent",
        "weight_format": "hf-safetensors",
        "info_hash": claim("1" * 40),
        "name": claim("model"),
        "trackers": [],
    }
    catalog = write_catalog(tmp_path / "catalog.json", hub_channel("org/gated"), torrent)
    with pytest.raises(MistralFetchError) as caught:
        puller("model", catalog=catalog)
    assert "gated" in caught.value.detail
    assert "metadata" in caught.value.detail
    puller.assert_nothing_published()
