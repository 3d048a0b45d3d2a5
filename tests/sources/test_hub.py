from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mistral_fetch.digest import Digest
from mistral_fetch.errors import (
    GatedRepository,
    Interrupted,
    MalformedManifest,
    MistralFetchError,
    NotAModelFile,
    NotAuthorised,
    UnknownModel,
    UnsafePath,
    UnsupportedFormat,
)
from mistral_fetch.events import ignore_events
from mistral_fetch.simulators.hub import HubRepository, HubSimulator
from mistral_fetch.simulators.mirror import MirrorSimulator
from mistral_fetch.sources.base import StopSignal, Target
from mistral_fetch.sources.http import HttpSource
from mistral_fetch.sources.http_client import HttpClient, HttpSettings
from mistral_fetch.sources.hub import (
    HubClient,
    HubFile,
    HubListing,
    hub_endpoint,
    hub_manifest,
    load_hub_token,
    parse_listing,
    with_hub_token,
)
from mistral_fetch.sources.retry import RetryPolicy
from mistral_fetch.store.partials import Partial

NAME = "mistralai/Mistral-7B-v0.1"
WEIGHTS = bytes(range(256)) * 400
FILES = {
    "config.json": b'{"model_type": "mistral"}',
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS[::-1],
    "model.safetensors.index.json": b'{"weight_map": {}}',
    "pytorch_model.bin": WEIGHTS,
    "tokenizer.model": b"sp",
    "README.md": b"# hello",
    ".gitattributes": b"",
}


@pytest.fixture
def hub() -> Iterator[HubSimulator]:
    with HubSimulator({NAME: HubRepository(FILES), "org/gated": HubRepository(FILES, is_gated=True)}) as hub:
        hub.access.known_tokens = {"hf_stranger", "hf_friend"}
        hub.access.granted_tokens = {"hf_friend"}
        yield hub


CLIENTS: list[HttpClient] = []


@pytest.fixture(autouse=True)
def _close_clients() -> Iterator[None]:
    yield
    while CLIENTS:
        CLIENTS.pop().close()


def asking(hub: HubSimulator, token: str = "") -> HubClient:
    """Return a client of the simulated hub, set up from the environment like the real one."""
    environment = {"HF_ENDPOINT": hub.base_url, "HF_TOKEN": token, "HF_TOKEN_PATH": "/nonexistent"}
    settings = HttpSettings(retry=RetryPolicy(attempts=2, first_delay_seconds=0.01))
    CLIENTS.append(HttpClient(with_hub_token(settings, environment)))
    return HubClient(CLIENTS[-1], hub_endpoint(environment))


def test_a_listing_has_the_commit_and_every_digest(hub: HubSimulator) -> None:
    listing = asking(hub).list_files(NAME)
    assert listing.commit == "27d67f1b5f57dc0953326b2601d68371d40ea8da"
    assert listing.licence == "Apache-2.0"
    digests = {file.path: file.digest.algorithm for file in listing.files if file.digest}
    assert digests["pytorch_model.bin"] == "sha256"
    assert digests["config.json"] == "gitsha1"
    assert {file.path: file.size for file in listing.files} == {path: len(data) for path, data in FILES.items()}


def test_a_manifest_holds_the_weights_once_pinned_to_the_commit(hub: HubSimulator) -> None:
    manifest = hub_manifest(asking(hub), NAME)
    assert [entry.path for entry in manifest.files] == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
    ]
    assert manifest.info.weight_format == "hf-safetensors"
    assert manifest.info.version == "27d67f1b5f57dc0953326b2601d68371d40ea8da"
    assert all("/resolve/27d67f1b5f57dc0953326b2601d68371d40ea8da/" in entry.mirrors[0].url for entry in manifest.files)


@pytest.mark.parametrize("has_own_cdn", [False, True])
def test_every_file_of_a_gated_repository_arrives_and_the_token_stays(
    has_own_cdn: bool, tmp_path: Path, hub: HubSimulator
) -> None:
    with MirrorSimulator({}) as cdn:
        cdn.files = hub.cdn_files()
        hub.cdn_base_url = cdn.base_url if has_own_cdn else ""
        asked = asking(hub, "hf_friend")
        manifest = hub_manifest(asked, "org/gated")
        targets = [Target(entry, Partial(tmp_path / entry.path, entry.size or 0)) for entry in manifest.files]
        HttpSource(CLIENTS[-1]).fetch(targets, ignore_events, StopSignal())
        assert {t.entry.path: t.partial.data_path.read_bytes() for t in targets} == {
            entry.path: FILES[entry.path] for entry in manifest.files
        }
        assert all("authorization" not in request.headers for request in cdn.requests())
        assert len(cdn.requests()) == (2 if has_own_cdn else 0)
        assert all(request.headers["authorization"] == "Bearer hf_friend" for request in hub.requests())


@pytest.mark.parametrize(
    "token, error, hint",
    [("", NotAuthorised, "export HF_TOKEN"), ("hf_stranger", GatedRepository, "https://huggingface.co/org/gated")],
)
def test_gated_files_say_what_to_do(
    token: str, error: type[MistralFetchError], hint: str, tmp_path: Path, hub: HubSimulator
) -> None:
    asked = asking(hub, token)
    entry = hub_manifest(asked, "org/gated").entry("config.json")
    with pytest.raises(error) as caught:
        HttpSource(CLIENTS[-1]).fetch(
            [Target(entry, Partial(tmp_path / "p", entry.size or 0))], ignore_events, StopSignal()
        )
    assert caught.value.exit_code == 4
    assert hint in caught.value.hint
    assert "hf_stranger" not in " ".join(caught.value.lines())


def test_credentials_in_the_hubs_address_are_sent_and_never_stored(hub: HubSimulator) -> None:
    endpoint = hub.base_url.replace("//", "//user:s3cret@")
    environment = {"HF_ENDPOINT": endpoint + "/?key=s3cret", "HF_TOKEN": "", "HF_TOKEN_PATH": "/nonexistent"}
    CLIENTS.append(HttpClient(with_hub_token(HttpSettings(), environment)))
    for address in (hub_endpoint(environment), endpoint):
        manifest = hub_manifest(HubClient(CLIENTS[-1], address), NAME)
        assert manifest.info.source_url == f"{hub.base_url}/{NAME}"
    assert "s3cret" not in repr(hub_manifest(HubClient(CLIENTS[-1], hub_endpoint(environment)), NAME))
    assert {request.headers["authorization"] for request in hub.requests()} == {"Basic dXNlcjpzM2NyZXQ="}


@pytest.mark.parametrize("repository, revision", [("org/none", "main"), (NAME, "v9")])
def test_unknown_repositories_and_revisions_are_not_found(repository: str, revision: str, hub: HubSimulator) -> None:
    with pytest.raises(UnknownModel) as caught:
        asking(hub).list_files(repository, revision)
    assert caught.value.exit_code == 3
    assert repository in caught.value.what


@pytest.mark.parametrize("name", ["x", "a/b/c", "../x", "a/..", "a b/c", "a/b?x=1", "", "a/" + "b" * 200, "a/b\n"])
def test_what_is_no_name_is_not_asked_for(name: str, hub: HubSimulator) -> None:
    with pytest.raises(UnknownModel):
        asking(hub).list_files(name)
    assert hub.served == []


def test_one_file_is_described_by_its_headers(hub: HubSimulator) -> None:
    asked = asking(hub)
    listed = {file.path: file for file in asked.list_files(NAME).files}
    for path in ("config.json", "pytorch_model.bin"):
        assert asked.resolve_file(NAME, "main", path) == listed[path]
    assert [request.path for request in hub.requests(method="HEAD")] == [
        f"{NAME}/resolve/main/config.json",
        f"{NAME}/resolve/main/pytorch_model.bin",
    ]


def test_a_renamed_repository_is_followed(hub: HubSimulator) -> None:
    hub.moved = {"old/name": NAME}
    assert asking(hub).resolve_file("old/name", "main", "config.json").size == len(FILES["config.json"])


def test_a_missing_file_is_not_found(hub: HubSimulator) -> None:
    with pytest.raises(UnknownModel, match=r"none\.bin"):
        asking(hub).resolve_file(NAME, "main", "none.bin")


def test_a_listing_without_sizes_is_completed_from_headers(hub: HubSimulator) -> None:
    siblings = [{"rfilename": path} for path in FILES]
    hub.listing_override = json.dumps({"sha": "2" * 40, "siblings": siblings}).encode()
    hub.repositories[NAME] = HubRepository(FILES, commit="2" * 40)
    manifest = hub_manifest(asking(hub), NAME)
    assert manifest.is_fully_pinned is False  # small files have a git blob id only
    assert {entry.path: entry.size for entry in manifest.files}["config.json"] == len(FILES["config.json"])
    assert all(entry.digests for entry in manifest.files)


def listing(**changes: object) -> bytes:
    sibling = {"rfilename": "a.bin", "size": 5, "blobId": "1" * 40, **changes}
    return json.dumps({"sha": "2" * 40, "siblings": [sibling]}).encode()


def test_a_listing_is_parsed() -> None:
    assert parse_listing(listing(), "a/b") == HubListing(
        "a/b", "2" * 40, (HubFile("a.bin", 5, Digest("gitsha1", "1" * 40)),)
    )


HOSTILE = {
    "nothing": b"",
    "web page": b"<html>",
    "another document": b"[]",
    "text": b'"text"',
    "no commit": b'{"siblings": []}',
    "a commit that is a path": b'{"sha": "../../etc", "siblings": []}',
    "files that are none": b'{"sha": "%s", "siblings": "abc"}' % (b"2" * 40),
    "a file that is text": b'{"sha": "%s", "siblings": ["abc"]}' % (b"2" * 40),
    "too many files": json.dumps({"sha": "2" * 40, "siblings": [{"rfilename": "a"}] * 10_001}).encode(),
    "a negative size": listing(size=-1),
    "a boolean size": listing(size=True),
    "a fraction": listing(size=1.5),
    "a size beyond reason": listing(size=1 << 60),
    "a size of many digits": b'{"sha": "2", "siblings": [{"rfilename": "a", "size": ' + b"9" * 5000 + b"}]}",
    "a name that is a number": listing(rfilename=5),
    "two sizes": listing(lfs={"sha256": "3" * 64, "size": 6}),
    "a digest that is none": listing(lfs={"sha256": "xyz", "size": 5}),
    "a blob id that is none": listing(blobId="../x"),
    "nesting without end": b"[" * 200_000,
    "not text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_hostile_listings_are_refused(body: bytes) -> None:
    with pytest.raises(MalformedManifest) as caught:
        parse_listing(body, "a/b")
    assert len(" ".join(caught.value.lines())) < 1000


@pytest.mark.parametrize("name", ["tokenizer\ud800.json", "\x1b[31m.json", "a/../b", "", "notes\u202e.txt"])
def test_a_name_that_cannot_be_used_is_refused_even_where_it_is_not_chosen(name: str) -> None:
    with pytest.raises(UnsafePath) as caught:
        parse_listing(listing(rfilename=name), "a/b")
    assert caught.value.exit_code == 20
    assert all(line.isprintable() for line in caught.value.lines())


def test_a_publishers_own_manifest_may_lie_in_a_repository() -> None:
    assert [file.path for file in parse_listing(listing(rfilename="manifest.meta4"), "a/b").files] == ["manifest.meta4"]


def test_a_listing_is_read_up_to_four_mib(hub: HubSimulator) -> None:
    hub.listing_override = b" " * (4 * 1024 * 1024 + 1)
    with pytest.raises(NotAModelFile, match="too large"):
        asking(hub).list_files(NAME)


@pytest.mark.timeout(20)
def test_a_stop_ends_the_wait_for_a_silent_hub() -> None:
    stop = StopSignal()
    timer = threading.Timer(0.3, stop.set)
    timer.start()
    # Accepted by the system, answered by nobody.
    with socket.create_server(("127.0.0.1", 0)) as silent, HttpClient(HttpSettings(read_timeout_seconds=15)) as client:
        hub = HubClient(client, f"http://127.0.0.1:{silent.getsockname()[1]}", stop=stop)
        for ask in (lambda: hub.list_files(NAME), lambda: hub.resolve_file(NAME, "main", "config.json")):
            began = time.monotonic()
            with pytest.raises(Interrupted):
                ask()
            assert time.monotonic() - began < 5
    timer.join()


def test_hostile_names_are_refused_when_chosen(hub: HubSimulator) -> None:
    hub.listing_override = listing(rfilename="../../.bashrc")
    with pytest.raises(UnsafePath):
        hub_manifest(asking(hub), NAME, include=["*"])


def test_a_listing_that_is_too_large_is_not_read(hub: HubSimulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mistral_fetch.sources.hub.MAX_LISTING_BYTES", 100)
    with pytest.raises(MistralFetchError, match="too large"):
        asking(hub).list_files(NAME)


def test_no_weights_is_an_error_unless_asked_for(hub: HubSimulator) -> None:
    hub.listing_override = listing(rfilename="notes.txt")
    with pytest.raises(UnsupportedFormat):
        hub_manifest(asking(hub), NAME)
    assert [entry.path for entry in hub_manifest(asking(hub), NAME, include=["*.txt"]).files] == ["notes.txt"]


def test_where_the_token_comes_from(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_home\n")
    (tmp_path / "other").write_text("  hf_path  ")
    home, path = {"HF_HOME": str(tmp_path)}, {"HF_TOKEN_PATH": str(tmp_path / "other")}
    assert load_hub_token({"HF_TOKEN": "hf_env", **home, **path}) == "hf_env"
    assert load_hub_token({**home, **path}) == "hf_path"
    assert load_hub_token(home) == "hf_home"
    assert load_hub_token({"HF_HOME": str(tmp_path / "none")}) is None
    assert load_hub_token({"HF_TOKEN": "", "XDG_CACHE_HOME": str(tmp_path)}) is None


@pytest.mark.parametrize("token", ["two words", "line\r\nX-Evil: 1", "ключ"])
def test_what_cannot_be_a_token_is_refused_without_showing_it(token: str) -> None:
    with pytest.raises(NotAuthorised) as caught:
        load_hub_token({"HF_TOKEN": token})
    assert token not in " ".join(caught.value.lines())


@pytest.mark.parametrize("value", ["", "https://huggingface.co/", "https://huggingface.co"])
def test_the_endpoint_has_a_default_and_no_slash(value: str) -> None:
    assert hub_endpoint({"HF_ENDPOINT": value}) == "https://huggingface.co"


def test_the_token_is_bound_to_the_endpoint() -> None:
    settings = with_hub_token(HttpSettings(), {"HF_TOKEN": "hf_x", "HF_ENDPOINT": "https://hf-mirror.com"})
    assert dict(settings.authorizations) == {"https://hf-mirror.com:443": "Bearer hf_x"}
