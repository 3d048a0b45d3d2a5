"""Bundles and keys: what is read at all, and what the library's own command line makes of ours, and we of its."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mistral_fetch import signatures
from mistral_fetch.errors import ConfigError, PublishError
from mistral_fetch.publish.sign import ignored_beside, model_digests, sign_publication
from mistral_fetch.signatures import (
    MAX_BUNDLE_BYTES,
    SigningKey,
    is_signed_by,
    parse_bundle,
    parse_public_key,
    sign_document,
)
from mistral_fetch.simulators.publisher import PublisherSimulator
from mistral_fetch.strict_json import UnexpectedJson
from tests.keys import KeyPair, base64_of, bundle_over, make_keys, some_key, statement_over

pytest.importorskip("model_signing")

DOCUMENT = b"the document"
KEY = some_key()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_keys(tmp_path_factory.mktemp("keys"), "ours")


def model_signing(*arguments: str | Path) -> bool:
    """Run the library's own command line."""
    command = [sys.executable, "-m", "model_signing", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0


# Keys.


@pytest.mark.parametrize("curve", ["SECP256R1", "SECP384R1", "SECP521R1"])
def test_a_key_of_each_curve_signs_and_is_recognised(tmp_path: Path, curve: str) -> None:
    pair = make_keys(tmp_path, "k", curve=curve)
    assert pair.key.pem == pair.public.read_bytes()
    bundle = sign_document(DOCUMENT, "document", SigningKey(pair.private))
    assert parse_bundle(bundle).hint == pair.key.hint
    assert is_signed_by(DOCUMENT, bundle, pair.key)


def test_the_fingerprint_is_that_of_the_key_not_of_its_file(keys: KeyPair) -> None:
    loose = keys.public.read_text().replace("\n", "\r\n") + "\n\n"
    assert parse_public_key(loose.encode(), "x") == keys.key


@pytest.mark.parametrize("curve", ["SECP256K1", "BrainpoolP256R1"])
def test_a_key_of_another_curve_is_refused(tmp_path: Path, curve: str) -> None:
    with pytest.raises(ConfigError, match="holds no public key"):
        _ = make_keys(tmp_path, "k", curve=curve).key


def refused_keys(keys: KeyPair) -> dict[str, bytes]:
    good = keys.public.read_bytes()
    return {
        "private": keys.private.read_bytes(),
        "two": good + good,
        "empty": b"",
        "cut": good[:100],
        "binary": bytes(range(256)),
        "no base64": good.replace(b"MFkw", b"!!!!"),
        "huge": good + b"\n" * 100_000,
        "another tail": good.replace(b"END PUBLIC", b"END PRIVATE"),
    }


@pytest.mark.parametrize("kind", ["private", "two", "empty", "cut", "binary", "no base64", "huge", "another tail"])
def test_what_is_not_one_public_key_is_refused(keys: KeyPair, kind: str) -> None:
    with pytest.raises(ConfigError, match=r"k\.pub holds no public key") as refused:
        parse_public_key(refused_keys(keys)[kind], "k.pub")
    assert "openssl pkey" in refused.value.hint


def test_an_encrypted_key_needs_its_passphrase(tmp_path: Path) -> None:
    pair = make_keys(tmp_path, "locked", passphrase="correct horse")
    bundle = sign_document(DOCUMENT, "document", SigningKey(pair.private, "correct horse"))
    assert is_signed_by(DOCUMENT, bundle, pair.key)
    for passphrase in (None, "wrong"):
        with pytest.raises(PublishError, match="cannot sign with"):
            sign_document(DOCUMENT, "document", SigningKey(pair.private, passphrase))


def test_a_key_that_cannot_sign_is_refused(keys: KeyPair, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no key")
    for path in (keys.public, tmp_path / "missing", tmp_path / "text"):
        with pytest.raises(PublishError, match="cannot sign with"):
            sign_document(DOCUMENT, "document", SigningKey(path))


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, keys: KeyPair) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(ConfigError) as refused:
        sign_document(DOCUMENT, "document", SigningKey(keys.private))
    assert refused.value.hint == "pip install 'mistral-fetch[sign]'"


# Bundles.


def test_only_these_bytes_and_this_key_are_right(keys: KeyPair, tmp_path: Path) -> None:
    bundle = sign_document(DOCUMENT, "document", SigningKey(keys.private))
    stranger = make_keys(tmp_path, "stranger")
    assert is_signed_by(DOCUMENT, bundle, keys.key)
    assert not is_signed_by(DOCUMENT + b" ", bundle, keys.key)
    assert not is_signed_by(DOCUMENT, bundle, stranger.key)


def test_one_flipped_byte_anywhere_ends_it(keys: KeyPair) -> None:
    """Each part of the bundle that is signed, and the signature itself."""
    made = json.loads(sign_document(DOCUMENT, "document", SigningKey(keys.private)))
    envelope = made["dsseEnvelope"]
    for part in ("payload", "sig"):
        holder = envelope if part == "payload" else envelope["signatures"][0]
        honest = holder[part]
        middle = len(honest) // 2
        holder[part] = honest[:middle] + ("A" if honest[middle] != "A" else "B") + honest[middle + 1 :]
        assert not is_signed_by(DOCUMENT, json.dumps(made).encode(), keys.key), part
        holder[part] = honest
    assert is_signed_by(DOCUMENT, json.dumps(made).encode(), keys.key)


def test_no_two_signatures_are_alike(keys: KeyPair) -> None:
    key = SigningKey(keys.private)
    assert sign_document(DOCUMENT, "document", key) != sign_document(DOCUMENT, "document", key)


def changed(path: str, value: Any) -> bytes:
    """Return a bundle with one thing in it replaced; ``statement`` stands for what the payload holds."""
    made, statement = bundle_over(DOCUMENT, KEY), statement_over(DOCUMENT)
    *parents, last = path.split("/")
    table: Any = {**made, "statement": statement}
    for parent in parents:
        table = table[int(parent) if parent.isdigit() else parent]
    table[int(last) if last.isdigit() else last] = value
    if parents[:1] == ["statement"]:
        made["dsseEnvelope"]["payload"] = base64_of(statement)
    elif not parents:
        made[last] = value
    return json.dumps(made).encode()


RESOURCE = {"algorithm": "sha256", "digest": "0" * 64, "name": "."}
CERTIFICATE = {"x509CertificateChain": {"certificates": [{"rawBytes": "AAAA"}]}, "tlogEntries": []}
HOSTILE = {
    "empty": b"",
    "no JSON": b"-----BEGIN PGP SIGNATURE-----",
    "a list": b"[]",
    "nested deeply": b'{"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "huge": json.dumps(bundle_over(DOCUMENT, KEY)).encode().ljust(MAX_BUNDLE_BYTES + 1),
    "a key twice": json.dumps(bundle_over(DOCUMENT, KEY)).replace("{", '{"mediaType": "x",', 1).encode(),
    "another media type": changed("mediaType", "application/vnd.dev.sigstore.bundle+json;version=0.1"),
    "something more": changed("messageSignature", {}),
    "a certificate instead of a key": changed("verificationMaterial", CERTIFICATE),
    "a key and a certificate": changed("verificationMaterial/certificate", {"rawBytes": "AAAA"}),
    "a key without a hint": changed("verificationMaterial/publicKey", {}),
    "a hint of another form": changed("verificationMaterial/publicKey/hint", "../../key"),
    "a log entry": changed("verificationMaterial/tlogEntries", ["x"]),
    "another payload type": changed("dsseEnvelope/payloadType", "application/vnd.in-toto+json; x"),
    "a payload that is no base64": changed("dsseEnvelope/payload", "{}"),
    "a payload in a second form": changed("dsseEnvelope/payload", base64_of({}) + "\n"),
    "no signature": changed("dsseEnvelope/signatures", []),
    "two signatures": changed("dsseEnvelope/signatures", [{"sig": "AAAA"}, {"sig": "AAAA"}]),
    "a signature that is a number": changed("dsseEnvelope/signatures/0/sig", 7),
    "a key id": changed("dsseEnvelope/signatures/0/keyid", "x"),
    "another statement": changed("statement/_type", "https://in-toto.io/Statement/v0.1"),
    "an early predicate, whose files are subjects": changed(
        "statement/predicateType", "https://model_signing/Digests/v0.1"
    ),
    "shards": changed("statement/predicate/serialization/method", "shards"),
    "another algorithm": changed("statement/predicate/serialization/hash_type", "blake2"),
    "another algorithm of the file": changed("statement/predicate/resources/0/algorithm", "blake2"),
    "a file of a directory": changed("statement/predicate/resources", [{**RESOURCE, "name": "weights.bin"}]),
    "two files": changed("statement/predicate/resources", [RESOURCE, {**RESOURCE, "name": "b"}]),
    "no file": changed("statement/predicate/resources", []),
    "a digest that is none": changed("statement/predicate/resources/0/digest", "0" * 63),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_bundle_is_refused_before_the_library_sees_it(data: bytes) -> None:
    with pytest.raises(UnexpectedJson):
        parse_bundle(data)


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_the_library_alone_would_not_be_fooled_either(data: bytes, keys: KeyPair) -> None:
    assert not is_signed_by(DOCUMENT, data, keys.key)


def test_unknown_things_in_a_predicate_are_ignored() -> None:
    assert parse_bundle(changed("statement/predicate/card", {"x": 1})).hint == KEY.hint


# The library's own command line.


@pytest.mark.interop
def test_ours_is_theirs_and_theirs_is_ours(keys: KeyPair, tmp_path: Path) -> None:
    document, signature = tmp_path / "catalog.json", tmp_path / "catalog.json.sig"
    document.write_bytes(DOCUMENT)
    key, public = ("--private_key", keys.private), ("--public_key", keys.public)
    signature.write_bytes(sign_document(DOCUMENT, "catalog.json", SigningKey(keys.private)))
    assert model_signing("verify", "key", document, "--signature", signature, *public)
    document.write_bytes(DOCUMENT + b"!")
    assert not model_signing("verify", "key", document, "--signature", signature, *public)
    assert model_signing("sign", "key", document, "--signature", signature, *key)
    assert parse_bundle(signature.read_bytes()).hint == keys.key.hint
    assert is_signed_by(DOCUMENT + b"!", signature.read_bytes(), keys.key)
    assert not is_signed_by(DOCUMENT, signature.read_bytes(), keys.key)


@pytest.mark.interop
def test_the_files_signature_holds_for_a_copy_and_for_nothing_else(keys: KeyPair, tmp_path: Path) -> None:
    files = {"weights.bin": bytes(1000), "sub/params.json": b"{}", ".gitattributes": b"x"}
    made = PublisherSimulator(files, name="tiny").publish(tmp_path, key=keys.private)
    copy, signature = tmp_path / "tiny", tmp_path / "tiny.sig"
    check = ("verify", "key", copy, "--signature", signature, "--public_key", keys.public)
    assert made.manifest_path.with_name("tiny.meta4.sig").is_file()
    for name in ignored_beside(made.manifest):
        (copy / name).write_text("papers") if name != ".gitattributes" else None
    assert model_signing(*check)
    (copy / "weights.bin").write_bytes(bytes(999) + b"!")
    assert not model_signing(*check)
    (copy / "weights.bin").write_bytes(bytes(1000))
    (copy / "model.py").write_text("import os")
    assert not model_signing(*check)


def test_nothing_is_read_again_for_the_files_signature(
    keys: KeyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = PublisherSimulator({"weights.bin": bytes(1000)}, name="tiny").publish(tmp_path)
    (tmp_path / "tiny" / "weights.bin").unlink()
    sign_publication(made.manifest, made.manifest_path, "tiny", SigningKey(keys.private))
    assert model_digests(made.manifest) == {"weights.bin": made.manifest.files[0].sha256}
    assert (tmp_path / "tiny.sig").stat().st_size < 8192


def test_a_full_temporary_directory_is_explained(keys: KeyPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/dev/null/nowhere")
    with pytest.raises(signatures.StoreError, match="no place to handle a signature"):
        is_signed_by(DOCUMENT, b"{}", keys.key)
