"""Where a mirror's files are, from the one address that a person gave. Pure but for reading the mirror's own papers."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote, unquote, urljoin, urlsplit

from mistral_fetch.errors import AccessError, ManifestError, TransferError, UsageError
from mistral_fetch.manifest import Manifest
from mistral_fetch.metalink import MAX_METALINK_BYTES, parse_metalink
from mistral_fetch.publish.readback import CHECKSUMS_NAME, parse_checksums
from mistral_fetch.sources.http_client import HttpClient
from mistral_fetch.sources.urls import origin_of, redact


@dataclass(frozen=True)
class FileAddress:
    """A file of the manifest, and where this mirror has it."""

    path: str
    url: str


def is_manifest_address(url: str) -> bool:
    """Return whether an address is that of a manifest rather than of files."""
    return urlsplit(url).path.lower().endswith(".meta4")


def addresses_in_manifest(manifest: Manifest, url: str) -> list[FileAddress]:
    """Return where a manifest says the files are, as far as it is the server that the manifest came from.

    Args:
        manifest: Its relative addresses resolved.
        url: Where it came from.

    Raises:
        UsageError: It names no file on that server.
    """
    found = []
    for entry in manifest.files:
        here = [mirror.url for mirror in entry.mirrors if not mirror.member and _origin(mirror.url) == _origin(url)]
        found += [FileAddress(entry.path, here[0])] if here else []
    if not found:
        raise UsageError(
            f"the manifest at {redact(url)} names no file on its own server",
            detail="expected at least one address there, got others only",
            hint="name the mirror's directory, and the manifest with --manifest FILE",
        )
    return found


def addresses_below(manifest: Manifest, url: str) -> list[FileAddress]:
    """Return where the files are on a mirror that was named by its directory, or by one file."""
    path = unquote(urlsplit(url).path)
    named = [entry.path for entry in manifest.files if path.endswith(f"/{entry.path}")]
    if named and not path.endswith("/"):
        return [FileAddress(max(named, key=len), url)]
    base = url.partition("#")[0].partition("?")[0].rstrip("/")
    return [FileAddress(entry.path, f"{base}/{quote(entry.path)}") for entry in manifest.files]


def claims_of(
    http: HttpClient, manifest: Manifest, url: str, addresses: list[FileAddress], *, is_own_manifest: bool
) -> dict[str, str]:
    """Return what the mirror itself says its files' sha256 are, as far as it says anything.

    Args:
        http: Makes the requests.
        manifest: What is right.
        url: What was asked about; where that is a manifest, it is the mirror's own.
        addresses: Where the files are. ``SHA256SUMS`` and the mirror's own manifest lie beside their folder.
        is_own_manifest: ``manifest`` is the mirror's own, so that it cannot be compared with itself.
    """
    folder = urljoin(addresses[0].url, "../" * addresses[0].path.count("/") + ".")
    above = urljoin(folder, "..")
    name = unquote(folder.rstrip("/").rpartition("/")[2])
    claims: dict[str, str] = {}
    if not is_own_manifest:
        claims |= _claims_in_manifest(http, url if is_manifest_address(url) else f"{above}{quote(name)}.meta4")
    for place in (f"{above}{CHECKSUMS_NAME}", f"{folder}{CHECKSUMS_NAME}"):
        if not claims:
            claims |= _claims_in_checksums(http, place, name)
    wanted = {entry.path for entry in manifest.files}
    return {path: sha256 for path, sha256 in claims.items() if path in wanted}


def _claims_in_manifest(http: HttpClient, url: str) -> dict[str, str]:
    try:
        found = parse_metalink(http.get_bytes(url, MAX_METALINK_BYTES), url)
    except (TransferError, AccessError, ManifestError):
        return {}
    return {entry.path: entry.sha256 for entry in found.files if entry.sha256}


def _claims_in_checksums(http: HttpClient, url: str, name: str) -> dict[str, str]:
    try:
        found = parse_checksums(http.get_bytes(url, MAX_METALINK_BYTES).decode())
    except (TransferError, AccessError, ValueError):
        return {}
    return {path.removeprefix(f"{name}/"): sha256 for path, sha256 in found.items()}


def _origin(url: str) -> str:
    try:
        return origin_of(url)
    except TransferError:
        return ""
