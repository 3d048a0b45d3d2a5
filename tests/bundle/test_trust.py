"""Who may give which name to which files: pinned keys, the catalog's pins, and what a bundle says of itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mistral_fetch.bundle import trust
from mistral_fetch.config import Settings
from mistral_fetch.digest import Assurance
from mistral_fetch.errors import (
    AssuranceTooLow,
    BadSignature,
    ExitCode,
    Expired,
    MalformedBundle,
    TrustError,
    UnsignedManifest,
)
from mistral_fetch.events import Event, Notice, ignore_events
from mistral_fetch.metalink import serialise_metalink
from mistral_fetch.ref import parse_ref
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.snapshots import load_provenance, write_snapshot
from mistral_fetch.transfer.authenticity import is_vouched_for
from mistral_fetch.transfer.local import LocalModel, find_local
from mistral_fetch.transfer.pull import already_here, pull
from mistral_fetch.trust import Signed
from tests.bundle.conftest import FILES, INFO, Receiver, bundle_of, keep
from tests.keys import KeyPair, make_keys


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def ours(folder: Path) -> KeyPair:
    pytest.importorskip("model_signing")
    return make_keys(folder, "ours")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> KeyPair:
    return make_keys(folder, "theirs")


def signed_bundle(tmp_path: Path, key: KeyPair) -> bytes:
    """Return the bundle of a model that was pulled from a signed manifest."""
    publisher = PublisherSimulator(FILES, name="tiny", info=INFO)
    for path, data in FILES.items():
        (tmp_path / "site" / "tiny" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / "tiny" / path).write_bytes(data)
    document = serialise_metalink(publisher.manifest())
    place = tmp_path / "site" / "tiny.meta4"
    place.write_bytes(document)
    place.with_name("tiny.meta4.sig").write_bytes(publisher.sign(document, key.private))
    settings = Settings(home=tmp_path / "signed", disk_reserve=0, trust_keys=(str(key.public),))
    result = pull(parse_ref(str(place)), settings, ignore_events, StopSignal())
    local = find_local(Layout(settings.home), result.key, "auto")
    assert local is not None
    return bundle_of(local)


def test_what_a_pinned_key_signed_stays_signed(tmp_path: Path, receive: Receiver, ours: KeyPair) -> None:
    data = signed_bundle(tmp_path, ours)
    result = receive(data, trust_keys=(str(ours.public),))
    assert result.assurance == "signed"
    papers = load_provenance(result.directory)
    assert papers["signature"]["key"] == f"sha256:{ours.key.fingerprint}"
    settings = Settings(home=receive.home, trust_keys=(str(ours.public),))
    assert already_here(Layout(receive.home), result.key, settings) is not None
    # And from there it can be carried on.
    local = find_local(Layout(receive.home), result.key, "auto")
    assert local is not None
    further = Receiver(tmp_path / "further", tmp_path)
    assert further(bundle_of(local), trust_keys=(str(ours.public),)).assurance == "signed"


def test_another_key_s_word_counts_for_nothing(
    tmp_path: Path, receive: Receiver, ours: KeyPair, theirs: KeyPair
) -> None:
    data = signed_bundle(tmp_path, ours)
    with pytest.raises(BadSignature):
        receive(data, trust_keys=(str(theirs.public),))
    assert not receive.home.exists()
    with pytest.raises(AssuranceTooLow):
        receive(data, min_assurance=Assurance.SIGNED)
    receive.assert_nothing_published()
    unasked = receive(data)
    assert unasked.assurance == "sha256"
    assert "signature" not in load_provenance(unasked.directory)


def test_an_unsigned_bundle_is_refused_while_keys_are_pinned(bundle: bytes, receive: Receiver, theirs: KeyPair) -> None:
    with pytest.raises(UnsignedManifest) as refused:
        receive(bundle, trust_keys=(str(theirs.public),))
    assert refused.value.exit_code is ExitCode.BAD_MANIFEST
    assert not receive.home.exists()


def signed_model(tmp_path: Path, key: KeyPair, ref: str = "", expires: str = "") -> LocalModel:
    """Put a model with a signed manifest into a cache, under a name of its own choice."""
    publisher = PublisherSimulator(FILES, name="tiny", info=replace(INFO, expires=expires))
    document, manifest = serialise_metalink(publisher.manifest()), publisher.manifest()
    signed = Signed("manifest", document, publisher.sign(document, key.private), key.key.fingerprint)
    ref = ref or f"tiny.meta4#{signed.sha256[:16]}"
    kept = keep(tmp_path / "signed", FILES, ref)
    told = {"kind": "manifest", "key": f"sha256:{signed.fingerprint}", "document": f"sha256:{signed.sha256}"}
    papers: dict[str, Any] = {**load_provenance(kept.directory), "signature": told}
    (kept.directory / ".complete").unlink()
    directory = write_snapshot(Layout(tmp_path / "signed"), manifest, papers, signed)
    return LocalModel(directory, kept.record)


def test_a_signed_manifest_s_last_day_counts(tmp_path: Path, receive: Receiver, ours: KeyPair) -> None:
    over = bundle_of(signed_model(tmp_path, ours, expires="2020-01-01T00:00:00Z"))
    with pytest.raises(Expired):
        receive(over, trust_keys=(str(ours.public),))
    assert not receive.home.exists()
    valid = bundle_of(signed_model(tmp_path / "valid", ours, expires="2999-01-01T00:00:00Z"))
    assert receive(valid, trust_keys=(str(ours.public),)).assurance == "signed"


@pytest.mark.parametrize("ref", ["other.meta4#0123456789abcdef", "other.torrent#0123456789abcdef", "mistral-7b@v0.1"])
def test_what_was_signed_under_one_name_does_not_speak_for_another(
    ref: str, tmp_path: Path, receive: Receiver, ours: KeyPair
) -> None:
    model = signed_model(tmp_path, ours, ref)
    with pytest.raises(MalformedBundle):
        bundle_of(model)
    renamed = bundle_of(model, is_honest=False)
    with pytest.raises(MalformedBundle):
        receive(renamed, trust_keys=(str(ours.public),))
    assert not receive.home.exists()


def test_a_release_that_the_catalog_has_by_other_channels_is_refused(tmp_path: Path, receive: Receiver) -> None:
    fake = keep(tmp_path / "from", {"consolidated.00.pth": b"x"}, "mistral-7b-instruct@v0.1", "torrent")
    with pytest.raises(MalformedBundle):
        receive(bundle_of(fake))
    unknown = keep(tmp_path / "from", {"a.bin": b"x"}, "model-of-another-catalog@v1", "hub")
    assert receive(bundle_of(unknown)).key == "model-of-another-catalog@v1"


def test_a_name_of_the_catalog_with_other_files_is_refused(tmp_path: Path, receive: Receiver) -> None:
    fake = keep(tmp_path / "from", {"config.json": b"{}", "tokenizer.model": b"x"}, "mistral-7b@v0.1", "hub")
    with pytest.raises(TrustError) as refused:
        receive(bundle_of(fake))
    assert "config.json" in refused.value.what
    assert not receive.home.exists()


def test_files_that_the_catalog_does_not_pin_are_taken_and_said_so_but_satisfy_no_key(
    tmp_path: Path, receive: Receiver, theirs: KeyPair
) -> None:
    data = bundle_of(keep(tmp_path / "from", {"consolidated.00.pth": b"x"}, "mistral-7b@v0.1", "torrent"))
    with pytest.raises(UnsignedManifest):
        receive(data, trust_keys=(str(theirs.public),))
    events: list[Event] = []
    (result,) = receive.all(data, report=events.append)
    told = [event.text for event in events if isinstance(event, Notice)]
    assert any("consolidated.00.pth" in text for text in told)
    pinned = Settings(home=receive.home, trust_keys=(str(theirs.public),))
    papers = load_provenance(result.directory)
    assert not is_vouched_for(papers, "torrent", pinned)
    pulled = {key: value for key, value in papers.items() if key != "carried_by"}
    assert is_vouched_for(pulled, "torrent", pinned), "a pull of the built-in catalog's name needs no signature"


def test_a_name_is_the_catalog_s_when_every_file_is_pinned(
    tmp_path: Path, receive: Receiver, theirs: KeyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = PublisherSimulator(FILES, info=INFO).manifest()
    monkeypatch.setattr(trust, "catalog_pins", lambda *_: list(manifest.files))
    data = bundle_of(keep(tmp_path / "from", FILES, "mistral-7b@v0.1", "hub"))
    receive.assert_exact(receive(data, trust_keys=(str(theirs.public),)))
