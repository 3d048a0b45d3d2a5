"""What a user typed as a model, sorted into one of six forms. Pure text work: nothing is opened or looked up.

Owns the grammar of references and the names under which the cache remembers them (``key``). It refuses to
know the catalog, the hub and the disk: whether a thing exists is found out by whoever resolves it.

    mistral-7b · mistral-7b-instruct@v0.3          CatalogRef
    hf:org/repo · hf:org/repo@revision             HubRef
    model.meta4 · https://host/model.meta4         ManifestRef
    model.torrent · https://host/model.torrent     TorrentRef
    magnet:?xt=urn:btih:…                          MagnetRef
    ./directory · ~/models/x · /srv/models/x       DirectoryRef
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from mistral_fetch.errors import AmbiguousRef, UsageError

DEFAULT_REVISION = "main"
MAX_REF_LENGTH = 64 * 1024

_HUB_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_HUB_REPO = re.compile(rf"{_HUB_NAME}/{_HUB_NAME}")
_HUB_SHAPED = re.compile(rf"{_HUB_NAME}/{_HUB_NAME}(?:@[^/]*)?")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,254}")
_CATALOG_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,94}[a-z0-9])?")
_VERSION = re.compile(r"[a-z0-9](?:[a-z0-9._+-]{0,62}[a-z0-9])?")
_BTIH = re.compile(r"urn:btih:(?:([0-9a-f]{40})|([a-z2-7]{32}))(?![0-9a-z])", re.IGNORECASE | re.ASCII)
_BTMH = re.compile(r"urn:btmh:1220([0-9a-f]{64})(?![0-9a-z])", re.IGNORECASE | re.ASCII)
_INFO_HASH = re.compile(r"[0-9a-fA-F]{40}")
_HUB_HOSTS = frozenset({"huggingface.co", "www.huggingface.co", "hf.co", "hf-mirror.com"})
_FORMS = "a reference is name[@version], hf:org/repo, a .meta4 or .torrent file or URL, a magnet link or ./directory"


@dataclass(frozen=True)
class CatalogRef:
    """A model of the catalog; ``version`` is None for the catalog's default."""

    name: str
    version: str | None = None

    @property
    def key(self) -> str:
        """Return ``name`` or ``name@version``, in lower case."""
        return self.name if self.version is None else f"{self.name}@{self.version}"


@dataclass(frozen=True)
class HubRef:
    """A repository on a Hugging Face hub, at a branch, tag or commit."""

    repo: str
    revision: str = DEFAULT_REVISION

    @property
    def key(self) -> str:
        """Return ``hf:org/repo@revision``, the revision always written out."""
        return f"hf:{self.repo}@{self.revision}"


@dataclass(frozen=True)
class ManifestRef:
    """A ``.meta4`` manifest, by path or URL."""

    location: str

    @property
    def is_url(self) -> bool:
        """Return whether the manifest lies on a server."""
        return "://" in self.location

    @property
    def key(self) -> str:
        """Return the URL without credentials and with its query hashed, or the absolute path."""
        return location_key(self.location)


@dataclass(frozen=True)
class TorrentRef:
    """A ``.torrent`` file, by path or URL."""

    location: str

    @property
    def is_url(self) -> bool:
        """Return whether the torrent file lies on a server."""
        return "://" in self.location

    @property
    def key(self) -> str:
        """Return the URL without credentials and with its query hashed, or the absolute path."""
        return location_key(self.location)


@dataclass(frozen=True)
class MagnetRef:
    """A magnet link as it was typed; its repair is :mod:`mistral_fetch.bittorrent`'s business."""

    text: str

    @property
    def key(self) -> str:
        """Return ``magnet:btih:…`` or ``magnet:btmh:…`` in hexadecimal, whatever trackers the link names."""
        key = _magnet_key(self.text)
        if key is None:
            raise ValueError("a magnet link without an info-hash has no key")
        return key


@dataclass(frozen=True)
class DirectoryRef:
    """A directory on this machine."""

    path: str

    @property
    def key(self) -> str:
        """Return the absolute path."""
        return location_key(self.path)


Ref = CatalogRef | HubRef | ManifestRef | TorrentRef | MagnetRef | DirectoryRef


def parse_ref(text: str) -> Ref:
    """Return what ``text`` refers to, by its form alone.

    Raises:
        UsageError: The text has none of the six forms; the hint says which one is probably meant.
        AmbiguousRef: ``one/two`` could be a hub repository or a directory.
    """
    text = text.strip()
    if not text:
        raise _usage(
            "no model was named", "got an empty reference", "list what can be had: mistral-fetch list --catalog"
        )
    if len(text) > MAX_REF_LENGTH or not text.isprintable():
        reason = f"longer than {MAX_REF_LENGTH} characters or holds control characters"
        raise _usage(f"cannot use the reference {_shown(text, 60)!r}", reason, _FORMS)
    # The order matters: explicit prefixes first, then what a file name's ending tells, then paths, then names.
    if text[:7].lower() == "magnet:":
        return _parse_magnet(text)
    if text[:3].lower() == "hf:":
        return _parse_hub(text[3:])
    if "://" in text:
        return _parse_url(text)
    if text.lower().endswith(".meta4"):
        return ManifestRef(text)
    if text.lower().endswith(".torrent"):
        return TorrentRef(text)
    if "/" in text or text[0] in ".~":
        return _parse_directory(text)
    return _parse_catalog(text)


def normalize_version(version: str) -> str:
    """Return a version as the catalog writes it: lower case, with ``v`` before a number (``0.1`` is ``v0.1``)."""
    version = version.lower()
    return f"v{version}" if version[:1].isdigit() else version


def _parse_magnet(text: str) -> MagnetRef:
    if _magnet_key(text) is None:
        raise _usage(
            f"this magnet link holds no info-hash: {_shown(text, 80)!r}",
            "expected xt=urn:btih: with 40 hexadecimal (or 32 base32) digits, or xt=urn:btmh:1220 with 64",
            "copy the whole link, in quotes: the shell cuts it at every &",
        )
    return MagnetRef(text)


def _parse_hub(rest: str) -> HubRef:
    repo, at, revision = rest.partition("@")
    if not is_hub_repo(repo):
        raise _usage(
            f"not a hub repository: {_shown(rest)!r}",
            "expected hf:org/repo of letters, digits, '-', '_' and '.', such as hf:mistralai/Mistral-7B-v0.1",
            "copy the name from the repository's page, without the server's address",
        )
    if at and not is_hub_revision(revision):
        raise _usage(
            f"not a revision: {_shown(revision)!r}",
            "expected a branch, a tag or a commit after '@'",
            f"hf:{repo} alone means its branch {DEFAULT_REVISION}",
        )
    return HubRef(repo, revision or DEFAULT_REVISION)


def is_hub_revision(revision: str) -> bool:
    """Return whether this can be a branch, tag or commit that is safe to put into an address."""
    parts = revision.split("/")
    safe = all(part and not part.startswith(".") and ".." not in part for part in parts)
    return safe and _REVISION.fullmatch(revision) is not None


def is_hub_repo(repo: str) -> bool:
    """Return whether this is ``org/repo`` in the hub's alphabet, safe to put into an address."""
    return _HUB_REPO.fullmatch(repo) is not None and ".." not in repo and "--" not in repo


def is_catalog_name(name: str) -> bool:
    """Return whether this can be a model's name in a catalog."""
    return _CATALOG_NAME.fullmatch(name) is not None and ".." not in name


def is_version(version: str) -> bool:
    """Return whether this can be a version in a catalog."""
    return _VERSION.fullmatch(version) is not None


def _parse_url(text: str) -> ManifestRef | TorrentRef:
    parts = _split_url(text)
    if parts.scheme.lower() not in {"http", "https"} or not parts.hostname:
        raise _usage(
            f"cannot use the address {_shown(text)!r}",
            f"expected http:// or https:// and a host, got the scheme {parts.scheme!r}",
            "write a local file as a plain path",
        )
    path = unquote(parts.path).lower()
    if path.endswith(".meta4"):
        return ManifestRef(text)
    if path.endswith(".torrent"):
        return TorrentRef(text)
    raise _usage(
        f"this address is neither a manifest nor a torrent: {_shown(text)!r}",
        "expected the path to end in .meta4 or .torrent",
        _hub_hint(parts) or "ask the publisher for a .meta4 manifest, or make one: mistral-fetch publish DIR",
    )


def _split_url(text: str) -> SplitResult:
    try:
        parts = urlsplit(text)
        _ = parts.port  # computed on access, and refused there when it is no number
    except ValueError:
        # The reason of the standard library quotes the address, with what may be a part of a password.
        raise _usage(
            f"cannot use the address {_shown(text)!r}", "its host or port cannot be read", "check the address"
        ) from None
    return parts


def _hub_hint(parts: SplitResult) -> str | None:
    """Return the ``hf:`` form of a hub page's address."""
    names = parts.path.strip("/").split("/")
    if parts.hostname not in _HUB_HOSTS or not is_hub_repo("/".join(names[:2])):
        return None
    revision = "/".join(names[3:]) if len(names) > 3 and names[2] == "tree" else ""
    return "for the repository itself type hf:" + "/".join(names[:2]) + (f"@{revision}" if revision else "")


def _parse_directory(text: str) -> DirectoryRef:
    if _HUB_SHAPED.fullmatch(text):
        raise AmbiguousRef(
            f"{_shown(text)!r} could be a hub repository or a directory",
            detail="expected hf: in front of a repository, or ./ in front of a directory",
            hint=f"type hf:{_shown(text)} or ./{_shown(text)}",
        )
    return DirectoryRef(text)


def _parse_catalog(text: str) -> CatalogRef:
    name, at, version = text.lower().partition("@")
    if _INFO_HASH.fullmatch(text):
        raise _usage(
            "a bare info-hash is not a reference", "expected a magnet link", f"type magnet:?xt=urn:btih:{text}"
        )
    if name.endswith((".safetensors", ".pth", ".gguf", ".bin", ".tar", ".metalink")):
        raise _usage(
            f"{_shown(text)!r} is a single file", "expected a model", "name the directory it lies in, or a manifest"
        )
    if not is_catalog_name(name):
        raise _usage(f"cannot use the reference {_shown(text)!r}", "it holds characters that no model name has", _FORMS)
    if not at:
        return CatalogRef(name)
    if not is_version(version):
        raise _usage(
            f"not a version: {_shown(version)!r}",
            f"expected a version after '@', such as {name}@v0.1",
            f"{name} alone means the catalog's default version",
        )
    return CatalogRef(name, normalize_version(version))


def _magnet_key(text: str) -> str | None:
    # Links copied from web pages are often percent-encoded, some of them twice.
    for candidate in (text, unquote(text), unquote(unquote(text))):
        if match := _BTIH.search(candidate):
            return "magnet:btih:" + (match[1] or base64.b32decode(match[2].upper()).hex()).lower()
        if match := _BTMH.search(candidate):
            return "magnet:btmh:" + match[1].lower()
    return None


def location_key(location: str) -> str:
    """Return the URL without credentials and with its query hashed, or the absolute path: fit to be kept and shown."""
    if "://" not in location:
        # Two directories may each hold a model.meta4; only the absolute path tells them apart.
        # pathlib keeps ".." and fails on an unknown ~user; a key needs neither.
        return os.path.abspath(os.path.expanduser(location))  # noqa: PTH100, PTH111
    parts = urlsplit(location)
    host = parts.netloc.rpartition("@")[2].lower()
    # A query may be a signature or a token, and keys are stored and listed: its hash tells two of them apart.
    query = hashlib.sha256(parts.query.encode("utf-8", "surrogatepass")).hexdigest()[:12] if parts.query else ""
    return urlunsplit((parts.scheme.lower(), host, parts.path, query, ""))


def _shown(text: str, limit: int = 120) -> str:
    """Return what may be printed of a text that may be an address: no userinfo, no values of a query."""
    address, mark, query = text.partition("#")[0].partition("?")
    head, slashes, rest = address.rpartition("://")
    authority, slash, path = rest.partition("/")
    # An @ further on may end a password that holds a slash or a question mark itself.
    if slashes and "@" in path + query and ":" in authority.rpartition("@")[2]:
        return "(an unreadable address)"
    if slashes:
        address = head.rpartition("@")[2] + slashes + authority.rpartition("@")[2] + slash + path
    names = "&".join(pair.partition("=")[0] + "=…" for pair in query.split("&") if "=" in pair)
    return (address + mark + names)[:limit]


def _usage(what: str, detail: str, hint: str) -> UsageError:
    return UsageError(what, detail=detail, hint=hint)
