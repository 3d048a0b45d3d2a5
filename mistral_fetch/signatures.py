"""Public keys and detached signatures: OpenSSF model-signing bundles, read strictly, checked and made by the library.

Owns the bundle's format (a sigstore bundle around a DSSE envelope around an in-toto statement that lists sha256
digests) and is the only user of the ``model_signing`` library, which is an extra and takes half a second to import.
Which keys are trusted, and what a signature is good for, is :mod:`mistral_fetch.trust`'s business.

The library is called by its public interface alone. That works on files, so what is in memory goes through a
temporary directory; nothing here touches the network.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_fetch.errors import BadSignature, ConfigError, PublishError, StoreError
from mistral_fetch.strict_json import Fields, UnexpectedJson, decode, listed, matching, one_of, refuse, table, text
from mistral_fetch.units import KIB

BUNDLE_SUFFIX = ".sig"
MAX_BUNDLE_BYTES = 64 * KIB  # one over a single document has about 2 KiB
MAX_KEY_BYTES = 64 * KIB

_BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_CERTIFICATES = ("certificate", "x509CertificateChain")

# How a SubjectPublicKeyInfo with an uncompressed point begins on the curves the library knows (RFC 5480), and its size.
_EC_KEYS = {
    "P-256": (bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004"), 91),
    "P-384": (bytes.fromhex("3076301006072a8648ce3d020106052b8104002203620004"), 120),
    "P-521": (bytes.fromhex("30819b301006072a8648ce3d020106052b810400230381860004"), 158),
}
_hex = matching(r"[0-9a-f]{64}", "64 lower-case hexadecimal digits")


@dataclass(frozen=True)
class PublicKey:
    """An elliptic-curve public key; two files with the same key are equal."""

    der: bytes

    @property
    def fingerprint(self) -> str:
        """Return the sha256 of the SubjectPublicKeyInfo, in hexadecimal."""
        return hashlib.sha256(self.der).hexdigest()

    @property
    def pem(self) -> bytes:
        """Return the key as OpenSSL writes it."""
        body = base64.b64encode(self.der).decode()
        lines = [body[at : at + 64] for at in range(0, len(body), 64)]
        return "\n".join(["-----BEGIN PUBLIC KEY-----", *lines, "-----END PUBLIC KEY-----", ""]).encode()

    @property
    def hint(self) -> str:
        """Return what a bundle calls this key."""
        return hashlib.sha256(self.pem).hexdigest()


@dataclass(frozen=True)
class Bundle:
    """A well-formed signature over one document: which key it names, and the sha256 it speaks of. Nothing is proved."""

    data: bytes
    hint: str
    sha256: str


@dataclass(frozen=True)
class SigningKey:
    """A PEM file with a private key, and its passphrase if it is encrypted."""

    path: Path
    passphrase: str | None = None


def parse_public_key(data: bytes, where: str) -> PublicKey:
    """Return the key in a PEM file.

    Raises:
        ConfigError: It holds anything but one public key on P-256, P-384 or P-521.
    """
    lines = data[: MAX_KEY_BYTES + 1].decode("ascii", "replace").split()
    label = " ".join(lines[:3]).strip("-")
    if len(data) > MAX_KEY_BYTES or label != "BEGIN PUBLIC KEY" or " ".join(lines[-3:]) != "-----END PUBLIC KEY-----":
        found = repr(label[:40]) if label.startswith("BEGIN ") else "something else"
        raise _bad_key(where, f"a file with one PEM public key, got {found}")
    try:
        der = base64.b64decode("".join(lines[3:-3]), validate=True)
    except (binascii.Error, ValueError):
        raise _bad_key(where, "base64 between its first and last line, got something else") from None
    if not any(der.startswith(head) and len(der) == size for head, size in _EC_KEYS.values()):
        raise _bad_key(where, f"an elliptic-curve key on {', '.join(_EC_KEYS)}, got another kind")
    return PublicKey(der)


def _bad_key(where: str, expected: str) -> ConfigError:
    return ConfigError(
        f"{where} holds no public key that can be trusted",
        detail=f"expected {expected}",
        hint="make it from the private key with: openssl pkey -in KEY.pem -pubout -out KEY.pub",
    )


def parse_bundle(data: bytes) -> Bundle:
    """Return the signature in ``data``, which must be one key's over one document.

    Raises:
        UnexpectedJson: It is anything else, such as a bundle with a certificate or over a directory.
    """
    top = Fields(decode(data, MAX_BUNDLE_BYTES), "the bundle")
    top.required("mediaType", one_of(_BUNDLE_TYPE))
    hint = top.required("verificationMaterial", _read_hint)
    payload = top.required("dsseEnvelope", _read_envelope)
    top.done()
    return Bundle(data, hint, _signed_sha256(payload))


def _read_hint(value: Any, where: str) -> str:
    if isinstance(value, dict) and any(key in value for key in _CERTIFICATES):
        refuse(where, "a signature by a key", "one by a certificate")
    material = Fields(value, where)
    key = material.required("publicKey", Fields)
    # The library prints a warning to standard output where this is missing (bundles of early versions).
    hint = key.required("hint", _hex)
    if material.entries("tlogEntries", text):
        refuse(where, "no transparency log", "one")
    material.done()
    return hint


def _read_envelope(value: Any, where: str) -> bytes:
    envelope = Fields(value, where)
    envelope.required("payloadType", one_of(_PAYLOAD_TYPE))
    signatures = envelope.required("signatures", listed(_read_signature))
    if len(signatures) != 1:  # the library would look at the first and ignore the others
        refuse(f"{where}.signatures", "one signature", len(signatures))
    payload = envelope.required("payload", _base64)
    envelope.done()
    return payload


def _read_signature(value: Any, where: str) -> bytes:
    fields = Fields(value, where)
    signature = fields.required("sig", _base64)
    fields.optional("keyid", one_of(""), "")
    fields.done()
    return signature


def _base64(value: Any, where: str) -> bytes:
    try:
        data = base64.b64decode(value, validate=True)
    except (ValueError, TypeError):
        refuse(where, "base64", value)
    if base64.b64encode(data).decode() != value:  # no second reader may see other bytes in it
        refuse(where, "base64 in its one canonical form", value)
    return data


def _signed_sha256(payload: bytes) -> str:
    """Return the digest in a statement; unknown keys in a predicate of version 1.0 are to be ignored."""
    statement = Fields(decode(payload, MAX_BUNDLE_BYTES), "the statement")
    statement.required("_type", one_of(_STATEMENT_TYPE))
    statement.required("predicateType", one_of(_PREDICATE_TYPE))
    predicate = statement.required("predicate", Fields)
    serialization = predicate.required("serialization", Fields)
    serialization.required("method", one_of("files"))
    serialization.required("hash_type", one_of("sha256"))
    resources = predicate.required("resources", listed(table(text, text)))
    if len(resources) != 1 or resources[0].get("name") != ".":
        refuse("the statement", "one document", f"{len(resources)} files of a directory")
    resource = Fields(resources[0], "the statement's resource")
    resource.required("algorithm", one_of("sha256"))
    return resource.required("digest", _hex)


def is_signed_by(document: bytes, bundle: bytes, key: PublicKey) -> bool:
    """Return whether ``key`` made a well-formed ``bundle`` over ``document``; whatever the library dislikes is a no.

    Raises:
        ConfigError: The ``sign`` extra is not installed.
    """
    verifying, hashing = _load_library().verifying, _load_library().hashing
    with _on_disk({"document": document, "bundle": bundle, "key": key.pem}) as folder:
        # Named, not guessed from the bundle: one file, sha256.
        check = verifying.Config().use_elliptic_key_verifier(public_key=folder / "key")
        check.set_hashing_config(hashing.Config().use_file_serialization(hashing_algorithm="sha256"))
        try:
            check.verify(folder / "document", folder / "bundle")
        except Exception:  # noqa: BLE001 - a hostile bundle may end in anything, and all of it means no
            return False
    return True


def sign_document(document: bytes, name: str, key: SigningKey) -> bytes:
    """Return a bundle over one document, as ``model_signing sign key FILE`` makes it. No two are alike (ECDSA).

    Raises:
        PublishError: The key cannot be used.
        ConfigError: The ``sign`` extra is not installed.
    """
    with _on_disk({name: document}) as folder:
        return _sign(folder / name, _load_library().hashing.Config(), key)


def sign_files(name: str, sha256: Mapping[str, str], ignored: Sequence[str], key: SigningKey) -> bytes:
    """Return a bundle over a directory of files whose digests are known, without reading them again.

    Args:
        name: What the bundle calls the directory; for people.
        sha256: Hexadecimal digests by relative path.
        ignored: Paths that a copy of the directory may hold beside them.
        key: What to sign with.

    Raises:
        PublishError, ConfigError: As above.
    """
    library = _load_library()
    items = [
        library.manifest.FileManifestItem(path=Path(path), digest=_KnownDigest("sha256", bytes.fromhex(value)))
        for path, value in sha256.items()
    ]
    # Symbolic links are allowed because a snapshot consists of them.
    how = {"method": "files", "hash_type": "sha256", "allow_symlinks": True, "ignore_paths": list(ignored)}
    manifest = library.manifest.Manifest(name, items, library.manifest.SerializationType.from_args(how))
    return _sign(Path(name), _AlreadyHashed(manifest), key)


@dataclass(frozen=True)
class _KnownDigest:
    """A digest as the library's manifests hold it."""

    algorithm: str
    digest_value: bytes

    @property
    def digest_hex(self) -> str:
        return self.digest_value.hex()


@dataclass(frozen=True)
class _AlreadyHashed:
    """Stands where the library expects its hashing configuration, and answers without reading a byte."""

    manifest: Any

    def hash(self, _model_path: Path) -> Any:
        return self.manifest


def _sign(what: Path, hashing: Any, key: SigningKey) -> bytes:
    library = _load_library()
    passphrase = key.passphrase.encode() if key.passphrase else None  # text is what it asks for and cannot use
    with _on_disk({}) as folder:
        try:
            signer = library.signing.Config().use_elliptic_key_signer(private_key=key.path, password=passphrase)
            signer.set_hashing_config(hashing).sign(what, folder / "bundle")
        except (OSError, ValueError, TypeError, AttributeError) as error:  # the last two: no passphrase, no EC key
            raise PublishError(
                f"cannot sign with {key.path}",
                detail=f"expected a PEM private key on {', '.join(_EC_KEYS)} and its passphrase, got: {error}",
                hint="docs/signatures.md says how to make a key, and where the passphrase is taken from",
            ) from error
        return (folder / "bundle").read_bytes()


@contextmanager
def _on_disk(files: Mapping[str, bytes]) -> Iterator[Path]:
    from tempfile import TemporaryDirectory

    try:
        folder = TemporaryDirectory(prefix="mistral-fetch-")
    except OSError as error:
        raise _no_place(error) from error
    with folder as path:
        try:
            for name, data in files.items():
                (Path(path) / name).write_bytes(data)
        except OSError as error:
            raise _no_place(error) from error
        yield Path(path)


def _no_place(error: OSError) -> StoreError:
    return StoreError(
        "no place to handle a signature",
        detail=f"expected a temporary directory that can be written, got: {error.strerror or error}",
        hint="free some space, or name another place with TMPDIR",
    )


def _load_library() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise ConfigError(
            "signatures need the model-signing library",
            detail=f"expected it in this Python, got: {error}",
            hint="pip install 'mistral-fetch[sign]'",
        ) from error
    return model_signing


def malformed_bundle(where: str, error: UnexpectedJson) -> BadSignature:
    """Return the error for a signature that cannot be read."""
    return BadSignature(
        f"the signature {where} cannot be used: {error.where}",
        detail=f"expected {error.expected}, got {error.actual}",
        hint="ask the publisher for a signature made with: mistral-fetch sign FILE --key KEY",
    )
