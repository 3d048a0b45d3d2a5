"""Catalogs by path and by address: signed, with versions that only rise and a last day, also without a network."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timezone
from pathlib import Path

import pytest

from mistral_fetch.publish.sign import sign_file
from mistral_fetch.signatures import SigningKey, sign_document
from mistral_fetch.simulators.hub import HubRepository, HubSimulator
from mistral_fetch.simulators.mirror import Fault, MirrorSimulator
from tests.keys import make_keys

pytest.importorskip("model_signing")

FILES = {"config.json": b'{"model_type": "mistral"}', "model.safetensors": bytes(range(256)) * 100}


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return make_keys(tmp_path_factory.mktemp("keys"), "ours")


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    return make_keys(tmp_path_factory.mktemp("keys"), "second")


@pytest.fixture
def hub(environment):
    with HubSimulator({"org/model": HubRepository(FILES)}) as simulator:
        environment.setenv("HF_ENDPOINT", simulator.base_url)
        yield simulator


@pytest.fixture
def mirror():
    with MirrorSimulator({}) as serving:
        yield serving


def claim(value):
    return {"value": value, "confidence": "publisher", "sources": ["test"]}


def pin(path):
    return {"path": path, "size": claim(len(FILES[path])), "sha256": claim(hashlib.sha256(FILES[path]).hexdigest())}


def catalog(version=None, expires=None, *, names=("model",), pins=tuple(FILES), title="Model"):
    """Return a catalog file that offers ``org/model`` under each name."""
    channel = {
        "kind": "hub",
        "repo": "org/model",
        "weight_format": "hf-safetensors",
        "include": sorted(FILES),
        "files": [pin(path) for path in pins],
    }
    release = {
        "version": "v1",
        "title": title,
        "publisher": "somebody",
        "variant": "base",
        "credit": "somebody",
        "source_url": "https://models.example/",
        "licence": claim("Apache-2.0"),
        "chat_template": claim(""),
        "channels": [channel],
    }
    fields = {
        "schema": 1,
        "as_of": "2027-01",
        "names": {name: {"default": "v1"} for name in names},
        "sources": {"test": {"title": "a test"}},
        "links": {},
        "statements": {},
        "releases": [{"name": name, **release} for name in names],
    }
    fields |= {"version": version} if version is not None else {}
    fields |= {"expires": expires} if expires is not None else {}
    return json.dumps(fields).encode()


def lay(data, pair):
    """Write a signed catalog to the current directory and return its path."""
    path = Path("catalog.json")
    path.write_bytes(data)
    sign_file(path, SigningKey(pair.private))
    return path


def serve(mirror, data, pair=None):
    mirror.files["catalog.json"] = data
    mirror.files.pop("catalog.json.sig", None)
    if pair is not None:
        mirror.files["catalog.json.sig"] = sign_document(data, "catalog.json", SigningKey(pair.private))
    return mirror.url("catalog.json")


def pull(program, where, *keys, ref="model", more=()):
    pinned = [argument for pair in keys for argument in ("--trust-key", pair.public)]
    return program("pull", ref, "--catalog", where, *pinned, "--json", "--quiet", *more)


def kind_of(shown):
    return shown.code, shown.json["error"]["kind"]


def at(environment, moment):
    environment.setattr(
        "mistral_fetch.transfer.catalogs.now_utc", lambda: datetime.fromisoformat(moment).replace(tzinfo=timezone.utc)
    )


def test_what_a_signed_catalog_pins_is_signed(program, hub, ours):
    shown = pull(program, lay(catalog(1), ours), ours)
    assert (shown.code, shown.json["assurance"]) == (0, "signed")
    papers = json.loads((Path(shown.json["directory"]) / "PROVENANCE.json").read_text())
    assert (papers["signature"]["kind"], papers["ref"]) == ("catalog", "model@v1")
    assert pull(program, "catalog.json", ours).json["was_complete"]
    verified = program("verify", "model@v1", "--trust-key", ours.public, "--json", "--quiet")
    assert verified.json["models"][0]["signed_by"] == f"sha256:{ours.key.fingerprint}"


def test_what_it_leaves_to_the_hub_is_not(program, hub, ours):
    shown = pull(program, lay(catalog(1, pins=["model.safetensors"]), ours), ours)
    papers = json.loads((Path(shown.json["directory"]) / "PROVENANCE.json").read_text())
    levels = {file["path"]: file["assurance"] for file in papers["files"]}
    assert levels == {"config.json": "gitsha1", "model.safetensors": "signed"}
    assert program("verify", "model@v1", "--trust-key", ours.public, "--quiet").code == 0
    assert pull(program, "catalog.json", ours).json["was_complete"]


def test_an_unsigned_catalog_is_used_without_keys_and_refused_with_them(program, hub, ours, second):
    path = lay(catalog(1), ours)
    assert kind_of(pull(program, path, second)) == (20, "bad-signature")
    Path("catalog.json.sig").unlink()
    assert kind_of(pull(program, path, ours)) == (20, "unsigned-manifest")
    shown = pull(program, path)
    assert (shown.code, shown.json["assurance"]) == (0, "sha256")


def test_a_model_of_an_unsigned_catalog_does_not_count_once_keys_are_pinned(program, hub, ours):
    path = lay(catalog(1), ours)
    assert pull(program, path).code == 0
    shown = pull(program, path, ours)
    assert (shown.json["was_complete"], shown.json["assurance"]) == (False, "signed")


def test_the_built_in_catalog_needs_no_signature(program, hub, ours):
    """Offline, so that all there is to see is why it stops: for want of a network, not of a signature."""
    assert kind_of(program("pull", "mistral-7b", "--trust-key", ours.public, "--offline", "--json")) == (
        6,
        "offline-refused",
    )


@pytest.mark.parametrize("place", ["file", "address"])
def test_versions_only_rise(program, hub, mirror, ours, place):
    def publish(data):
        return lay(data, ours) if place == "file" else serve(mirror, data, ours)

    assert pull(program, publish(catalog(5)), ours).code == 0
    assert kind_of(pull(program, publish(catalog(4)), ours, more=["--refresh"])) == (21, "rolled-back")
    again = publish(catalog(5, title="Another"))
    assert kind_of(pull(program, again, ours, more=["--refresh"])) == (21, "rolled-back")
    assert kind_of(pull(program, publish(catalog()), ours, more=["--refresh"])) == (21, "rolled-back")
    assert pull(program, publish(catalog(5)), ours, more=["--refresh"]).code == 0
    assert pull(program, publish(catalog(6)), ours, more=["--refresh"]).code == 0


def test_a_rotated_key_goes_on_counting_and_an_unpinned_one_is_forgotten(program, hub, mirror, ours, second):
    assert pull(program, serve(mirror, catalog(5), ours), ours).code == 0
    assert pull(program, serve(mirror, catalog(6), second), ours, second, more=["--refresh"]).code == 0
    old = serve(mirror, catalog(5), ours)
    assert kind_of(pull(program, old, ours, second, more=["--refresh"])) == (21, "rolled-back")
    stolen = serve(mirror, catalog(9_000), ours)
    assert pull(program, stolen, ours, second, more=["--refresh"]).code == 0
    honest = serve(mirror, catalog(7), second)
    assert kind_of(pull(program, honest, ours, second, more=["--refresh"])) == (21, "rolled-back")
    assert pull(program, honest, second, more=["--refresh"]).code == 0


def test_another_address_has_a_memory_of_its_own(program, hub, mirror, ours):
    assert pull(program, serve(mirror, catalog(5), ours), ours).code == 0
    assert pull(program, lay(catalog(4), ours), ours, more=["--refresh"]).code == 0


def test_an_expired_catalog_is_refused_with_its_date(program, hub, mirror, ours):
    shown = pull(program, serve(mirror, catalog(1, "2020-01-31T00:00:00Z"), ours), ours)
    assert kind_of(shown) == (21, "expired")
    assert "2020-01-31T00:00:00Z" in shown.json["error"]["detail"]
    assert list(Path("home").glob("trust/*/seen.json")) == [], "what was refused is not remembered"


def test_the_last_accepted_catalog_serves_without_a_network_until_it_expires(program, hub, mirror, ours, environment):
    url = serve(mirror, catalog(3, "2030-01-31T00:00:00Z", names=("model", "twin")), ours)
    at(environment, "2029-12-31T00:00:00")
    assert pull(program, url, ours).code == 0
    asked = len(mirror.requests())
    assert pull(program, url, ours, more=["--offline"]).json["was_complete"]
    assert program("show", "model", "--trust-key", ours.public).code == 3, "another catalog has no such name"
    environment.setenv("MISTRAL_FETCH_CATALOG", url)
    assert program("show", "twin", "--trust-key", ours.public).code == 0
    assert kind_of(pull(program, url, ours, ref="twin", more=["--offline"]))[0] == 6
    assert len(mirror.requests()) == asked
    at(environment, "2030-02-01T00:00:00")
    assert kind_of(pull(program, url, ours, more=["--offline"])) == (21, "expired")


def test_a_server_that_is_down_is_no_reason_to_stop(program, hub, mirror, ours):
    url = serve(mirror, catalog(3, names=("model", "twin")), ours)
    assert pull(program, url, ours).code == 0
    mirror.always("catalog.json", Fault(status=404))
    shown = program("pull", "twin", "--catalog", url, "--trust-key", ours.public, "--json", "--progress", "plain")
    assert shown.code == 0
    assert "the catalog that was accepted last is used" in shown.err


def test_a_complete_model_asks_no_server(program, hub, mirror, ours):
    url = serve(mirror, catalog(3), ours)
    assert pull(program, url, ours).code == 0
    asked = len(mirror.requests())
    assert pull(program, url, ours).json["was_complete"]
    assert len(mirror.requests()) == asked
    assert pull(program, url, ours, more=["--refresh"]).code == 0
    assert len(mirror.requests()) == asked + 2


def test_a_dry_run_keeps_nothing(program, hub, mirror, ours):
    shown = pull(program, serve(mirror, catalog(3), ours), ours, more=["--dry-run"])
    assert (shown.code, shown.json["files"][0]["assurance"]) == (0, "signed")
    assert not Path("home").exists()


def test_an_address_works_without_keys_too(program, hub, mirror, environment):
    url = serve(mirror, catalog())
    assert pull(program, url).json["assurance"] == "sha256"
    assert mirror.requests("catalog.json.sig") == []
    environment.setenv("MISTRAL_FETCH_CATALOG", url)
    assert "model@v1" in program("list", "--catalog", "--json").out


def test_a_copy_from_before_the_keys_is_not_believed(program, hub, mirror, ours):
    url = serve(mirror, catalog(3), ours)
    assert pull(program, url).code == 0
    assert kind_of(pull(program, url, ours, more=["--offline"])) == (20, "unsigned-manifest")
    assert pull(program, url, ours).json["assurance"] == "signed"


@pytest.mark.parametrize(
    "body, code",
    [(b"x" * 2_000_000, 6), (b"<html></html>", 20), (b'{"a":' * 100_000, 20)],
    ids=["huge", "a web page", "deep"],
)
def test_a_hostile_answer_is_refused(program, mirror, body, code):
    mirror.files["catalog.json"] = body
    shown = pull(program, mirror.url("catalog.json"))
    assert (shown.code, shown.err) == (code, "")
    assert list(Path("home").glob("trust/*/*")) == []


def test_a_damaged_memory_stops_the_pull(program, hub, mirror, ours):
    url = serve(mirror, catalog(3), ours)
    assert pull(program, url, ours).code == 0
    (memory,) = Path("home").glob("trust/*/seen.json")
    memory.write_bytes(b"{")
    shown = pull(program, url, ours, more=["--refresh"])
    assert (shown.code, "cannot be read" in shown.json["error"]["what"]) == (9, True)


@pytest.mark.parametrize(
    "version, expires", [(0, None), (-1, None), ("5", None), (1.5, None), (1 << 53, None), (1, "2027-01-31"), (1, 7)]
)
def test_a_version_or_a_day_that_is_none_is_refused(program, ours, version, expires):
    Path("catalog.json").write_bytes(catalog(version, expires))
    assert kind_of(pull(program, "catalog.json")) == (20, "malformed-manifest")


@pytest.mark.parametrize("address", ["ftp://h.example/catalog.json", "https:///catalog.json", "file:///catalog.json"])
def test_an_address_of_another_kind_is_refused(program, address):
    assert kind_of(pull(program, address)) == (2, "config-error")
