"""The publisher's signatures: over a manifest or catalog, and over a model's files for people with the library alone.

Owns what is signed and where the signature goes; how, is :mod:`mistral_fetch.signatures`'s business. Nothing is signed
that no pull would accept.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

from mistral_fetch.catalog import MAX_CATALOG_BYTES, parse_catalog
from mistral_fetch.errors import NotFoundError, UsageError
from mistral_fetch.manifest import RESERVED_NAMES, Manifest
from mistral_fetch.metalink import MAX_METALINK_BYTES, parse_metalink
from mistral_fetch.signatures import BUNDLE_SUFFIX, SigningKey, sign_document, sign_files
from mistral_fetch.store.durable import disk_errors, write_durably

PASSPHRASE_VARIABLE = "MISTRAL_FETCH_SIGN_PASSPHRASE"  # noqa: S105 - the name of a variable

# What model_signing leaves out when it signs a directory, so that it leaves it out when it verifies one.
_GIT_PATHS = (".git", ".gitattributes", ".github", ".gitignore")


def signing_key(path: Path) -> SigningKey:
    """Return the private key in a file, its passphrase taken from the environment, after trying it out.

    Raises:
        PublishError: It cannot sign.
        ConfigError: The ``sign`` extra is not installed.
    """
    key = SigningKey(path, os.environ.get(PASSPHRASE_VARIABLE) or None)
    sign_document(b"", "trial", key)  # before the weights are read, not after
    return key


def sign_file(path: Path, key: SigningKey) -> Path:
    """Sign a catalog (``.json``) or a manifest (``.meta4``) and return where its signature lies: beside it.

    Raises:
        NotFoundError: The file cannot be read.
        UsageError: It is neither.
        ManifestError: It is no usable one.
        PublishError, ConfigError: The key or the library cannot be used.
        StoreError: The signature cannot be written.
    """
    limits = {".json": MAX_CATALOG_BYTES, ".meta4": MAX_METALINK_BYTES}
    if path.suffix not in limits:
        raise UsageError(
            f"{path} is neither a catalog nor a manifest",
            detail=f"expected a .json or .meta4 file, got {path.suffix or 'no ending'!r}",
            hint="sign anything else with the library's own command: model_signing sign key FILE",
        )
    try:
        with path.open("rb") as file:
            document = file.read(limits[path.suffix] + 1)
    except OSError as error:
        raise NotFoundError(
            f"cannot read {path}",
            detail=f"expected a readable file, got: {error.strerror or error}",
            hint="check the path",
        ) from error
    if path.suffix == ".json":
        parse_catalog(document)
    else:
        parse_metalink(document)
    return _write(path, sign_document(document, path.name, key))


def sign_publication(manifest: Manifest, manifest_path: Path, name: str, key: SigningKey) -> tuple[Path, Path]:
    """Sign what was just published; return the signatures over the manifest and over the model's files.

    The second one is made from the manifest's digests, so nothing is read again.

    Raises:
        PublishError, ConfigError: The key or the library cannot be used.
        StoreError: A signature cannot be written.
    """
    files = sign_files(name, model_digests(manifest), ignored_beside(manifest), key)
    over_files = _write(manifest_path.with_name(name), files)
    # Last: whoever finds it finds the manifest and the other signature.
    return _write(manifest_path, sign_document(manifest_path.read_bytes(), manifest_path.name, key)), over_files


def model_digests(manifest: Manifest) -> dict[str, str]:
    """Return the sha256 of every file that the library looks at by default: all but git's own."""
    return {
        entry.path: entry.sha256
        for entry in manifest.files
        if entry.sha256 is not None and PurePosixPath(entry.path).parts[0] not in _GIT_PATHS
    }


def ignored_beside(manifest: Manifest) -> list[str]:
    """Return what a snapshot of the model may hold beside its files: our papers, and a licence of our own."""
    paths = {entry.path for entry in manifest.files}
    return sorted({*_GIT_PATHS, *RESERVED_NAMES, *({"LICENSE"} - paths)})


def _write(document: Path, bundle: bytes) -> Path:
    signature = document.with_name(document.name + BUNDLE_SUFFIX)
    with disk_errors("writing a signature", signature):
        write_durably(signature, bundle)
    return signature
