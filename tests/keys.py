"""Throwaway keys for tests of signatures, and bundles that look right without being signed by anybody."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_fetch.signatures import PublicKey, parse_public_key


@dataclass(frozen=True)
class KeyPair:
    """Two PEM files."""

    private: Path
    public: Path

    @property
    def key(self) -> PublicKey:
        return parse_public_key(self.public.read_bytes(), str(self.public))


def make_keys(folder: Path, name: str, *, curve: str = "SECP256R1", passphrase: str = "") -> KeyPair:
    """Write a new key pair to ``folder``, as ``openssl genpkey`` would."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    made = ec.generate_private_key(getattr(ec, curve)())
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked = serialization.BestAvailableEncryption(passphrase.encode()) if passphrase else serialization.NoEncryption()
    pair = KeyPair(folder / f"{name}.pem", folder / f"{name}.pub")
    pair.private.write_bytes(made.private_bytes(pem, pkcs8, locked))
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    pair.public.write_bytes(made.public_key().public_bytes(pem, spki))
    return pair


def some_key(number: int = 1) -> PublicKey:
    """Return what has the form of a P-256 key; that its point lies on no curve matters to the library alone."""
    head = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004")
    return PublicKey(head + bytes([number]) * 64)


def statement_over(document: bytes) -> dict[str, Any]:
    """Return the in-toto statement of one document."""
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "document", "digest": {"sha256": "0" * 64}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
            "resources": [{"algorithm": "sha256", "digest": hashlib.sha256(document).hexdigest(), "name": "."}],
        },
    }


def bundle_over(document: bytes, key: PublicKey) -> dict[str, Any]:
    """Return a bundle of the right form, with a signature that is none."""
    return {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": key.hint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64_of(statement_over(document)),
            "payloadType": "application/vnd.in-toto+json",
            "signatures": [{"sig": base64.b64encode(b"signature").decode(), "keyid": ""}],
        },
    }


def base64_of(value: Any) -> str:
    """Return a JSON document as it lies in an envelope."""
    return base64.b64encode(json.dumps(value).encode()).decode()
