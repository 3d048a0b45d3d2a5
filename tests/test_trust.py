"""The rules of trust, one small case each: given these bytes, keys and memories, that verdict. No library, no disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

import pytest

from mistral_fetch.digest import Assurance, Digest
from mistral_fetch.errors import BadSignature, Expired, RolledBack, TrustError, UnsignedManifest
from mistral_fetch.manifest import FileEntry, Manifest
from mistral_fetch.ref import parse_ref
from mistral_fetch.signatures import MAX_BUNDLE_BYTES
from mistral_fetch.trust import (
    MANIFEST,
    Seen,
    SeenVersion,
    authenticate,
    check_expiry,
    check_version,
    confirm_same_files,
    refuse_unsignable,
    remember,
    with_signed,
)
from tests.keys import bundle_over, some_key

DOCUMENT, OTHER = b"the document", b"another document"
OURS, SECOND, STRANGERS = some_key(1), some_key(2), some_key(3)


def bundled(document: bytes = DOCUMENT, key: Any = OURS) -> bytes:
    return json.dumps(bundle_over(document, key)).encode()


def signed_by(*signers: Any) -> Callable[[bytes, bytes, Any], bool]:
    """Stand for the cryptography: these keys have signed whatever is shown."""
    return lambda _document, _bundle, key: key in signers


@dataclass(frozen=True)
class Case:
    """A document with a signature beside it; ``signers`` are the keys whose signature it truly is."""

    bundle: bytes | None
    signers: tuple[Any, ...] = (OURS,)
    pinned: tuple[Any, ...] = (OURS,)
    error: type[TrustError] | None = None
    says: str = ""


CASES = {
    "signed by the pinned key": Case(bundled()),
    "signed by the second of two pinned keys": Case(bundled(key=SECOND), (SECOND,), (OURS, SECOND)),
    "not signed": Case(None, error=UnsignedManifest, says="got none"),
    "an empty signature": Case(b"", error=BadSignature, says="JSON"),
    "signed by a stranger": Case(bundled(key=STRANGERS), (STRANGERS,), error=BadSignature, says="another key"),
    "a stranger's signature under our key's name": Case(
        bundled(), (STRANGERS,), error=BadSignature, says="this key did not make"
    ),
    "a signature of another document": Case(bundled(OTHER), error=BadSignature, says="as it was signed"),
    "too large": Case(bundled() + b" " * MAX_BUNDLE_BYTES, error=BadSignature, says="at most"),
    "no key is left": Case(bundled(), pinned=(SECOND,), error=BadSignature, says="another key"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_document_counts_only_with_a_pinned_key_s_signature(case: Case) -> None:
    def judge() -> Any:
        return authenticate(MANIFEST, DOCUMENT, case.bundle, case.pinned, signed_by(*case.signers), "m.meta4")

    if case.error is None:
        signed = judge()
        assert (signed.document, signed.bundle) == (DOCUMENT, case.bundle)
        assert signed.fingerprint == case.signers[0].fingerprint
        return
    with pytest.raises(case.error) as refused:
        judge()
    assert (int(refused.value.exit_code), case.says in refused.value.detail) == (20, True), refused.value.detail
    assert "m.meta4" in refused.value.what


def test_the_cryptography_is_asked_about_exactly_these_bytes() -> None:
    asked = []

    def check(*arguments: Any) -> bool:
        asked.append(arguments)
        return True

    authenticate(MANIFEST, DOCUMENT, bundled(), (SECOND, OURS), check, "x")
    assert asked == [(DOCUMENT, bundled(), OURS)]


SHA, OTHER_SHA = "a" * 64, "b" * 64


def seen(**versions: tuple[int, str]) -> Seen:
    keys = {"ours": OURS, "second": SECOND, "strangers": STRANGERS}
    return {keys[name].fingerprint: SeenVersion(*entry) for name, entry in versions.items()}


VERSIONS = {
    "the first one": (1, seen(), (OURS,), True),
    "the first one, without a version": (None, seen(), (OURS,), True),
    "a later one": (6, seen(ours=(5, OTHER_SHA)), (OURS,), True),
    "the same one again": (5, seen(ours=(5, SHA)), (OURS,), True),
    "an older one": (4, seen(ours=(5, SHA)), (OURS,), False),
    "the same number, other bytes": (5, seen(ours=(5, OTHER_SHA)), (OURS,), False),
    "the version is gone": (None, seen(ours=(5, SHA)), (OURS,), False),
    "older than what the other pinned key signed": (5, seen(ours=(5, SHA), second=(6, SHA)), (OURS, SECOND), False),
    "the other key's number, other bytes": (6, seen(second=(6, OTHER_SHA)), (OURS, SECOND), False),
    "older than what a key signed that is not pinned any more": (5, seen(second=(999, SHA)), (OURS,), True),
}


@pytest.mark.parametrize("version, memory, keys, is_accepted", VERSIONS.values(), ids=VERSIONS)
def test_versions_only_rise(version: int | None, memory: Seen, keys: Any, is_accepted: bool) -> None:
    if is_accepted:
        check_version(version, SHA, memory, keys, "catalog.json")
        return
    with pytest.raises(RolledBack, match=r"catalog\.json was rolled back") as refused:
        check_version(version, SHA, memory, keys, "catalog.json")
    assert refused.value.exit_code == 21


def test_what_is_remembered_only_rises() -> None:
    memory = remember({}, OURS.fingerprint, 5, SHA)
    assert memory == seen(ours=(5, SHA))
    assert remember(memory, OURS.fingerprint, 4, OTHER_SHA) == memory
    assert remember(memory, OURS.fingerprint, None, OTHER_SHA) == memory
    assert remember(memory, SECOND.fingerprint, 6, OTHER_SHA) == seen(ours=(5, SHA), second=(6, OTHER_SHA))


NOW = datetime(2027, 1, 31, 12, tzinfo=timezone.utc)


@pytest.mark.parametrize("expires", ["", "2027-01-31T12:00:01Z", "2028-01-01T00:00:00Z"])
def test_what_has_not_expired_holds(expires: str) -> None:
    check_expiry(expires, NOW, MANIFEST, "m.meta4")


@pytest.mark.parametrize("expires", ["2027-01-31T12:00:00Z", "2026-12-31T23:59:59Z"])
def test_what_has_expired_is_refused_with_its_date(expires: str) -> None:
    with pytest.raises(Expired) as refused:
        check_expiry(expires, NOW, MANIFEST, "m.meta4")
    assert refused.value.exit_code == 21
    assert expires in refused.value.detail
    assert "2027-01-31T12:00:00Z" in refused.value.detail


@pytest.mark.parametrize("text", ["hf:org/repo", "model.torrent", f"magnet:?xt=urn:btih:{'a' * 40}"])
def test_what_cannot_be_signed_is_refused_while_keys_are_pinned(text: str) -> None:
    refuse_unsignable(parse_ref(text), ())
    with pytest.raises(UnsignedManifest, match="cannot be signed"):
        refuse_unsignable(parse_ref(text), (OURS,))


@pytest.mark.parametrize("text", ["mistral-7b", "model.meta4", "https://h.example/model.meta4", "./directory"])
def test_what_can_be_signed_is_asked_for_its_signature_later(text: str) -> None:
    refuse_unsignable(parse_ref(text), (OURS,))


STRONG = FileEntry("a.bin", 3, (Digest("sha256", SHA),))
WEAK = FileEntry("b.bin", 3, (Digest("md5", "c" * 32),))


def test_a_signature_lifts_a_sha256_and_nothing_weaker() -> None:
    levels = {entry.path: entry.assurance for entry in with_signed(Manifest((STRONG, WEAK))).files}
    assert levels == {"a.bin": Assurance.SIGNED, "b.bin": Assurance.MD5}
    none = with_signed(Manifest((STRONG,)), lambda _entry: False)
    assert none.files[0].assurance is Assurance.SHA256


@pytest.mark.parametrize(
    "held, is_same",
    [
        ((STRONG, WEAK), True),
        ((replace(STRONG, digests=(Digest("sha256", OTHER_SHA),)), WEAK), False),
        ((replace(STRONG, size=4), WEAK), False),
        ((WEAK,), False),
        ((STRONG, WEAK, FileEntry("c.bin", 1)), False),
    ],
)
def test_a_signed_manifest_lists_exactly_the_files_that_are_held(held: tuple[FileEntry, ...], is_same: bool) -> None:
    if is_same:
        confirm_same_files((STRONG, WEAK), Manifest(held), "model", exactly=True)
        return
    with pytest.raises(BadSignature, match="is not what was signed"):
        confirm_same_files((STRONG, WEAK), Manifest(held), "model", exactly=True)


def test_a_catalog_may_pin_some_files_only() -> None:
    confirm_same_files((STRONG,), Manifest((STRONG, WEAK)), "model", exactly=False)
