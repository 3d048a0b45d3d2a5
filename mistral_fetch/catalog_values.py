"""The values of a catalog: releases, the channels that carry them, and what vouches for every statement.

Owns the rule that decides which statements may be used as checks (``Claim.is_usable``) and how a name finds
its release. It refuses to know the file format (:mod:`mistral_fetch.catalog`), the network and the disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Generic, TypeVar
from urllib.parse import quote

from mistral_fetch.digest import Assurance, Digest
from mistral_fetch.errors import UnknownModel
from mistral_fetch.manifest import FileEntry, Manifest, MirrorUrl, ModelInfo
from mistral_fetch.ref import DEFAULT_REVISION, normalize_version

DEFAULT_HUB_ENDPOINT = "https://huggingface.co"

T_co = TypeVar("T_co", covariant=True)


class Confidence(Enum):
    """How well a value is vouched for. Only ``SINGLE`` is too weak to check bytes against."""

    CONFIRMED = "confirmed"  # by two or more sources that do not copy each other
    PUBLISHER = "publisher"  # by the model's own publisher, in places it controls
    COMPUTED = "computed"  # by arithmetic, or by rebuilding the bytes and finding a published digest again
    SINGLE = "single"  # by one outside source alone


@dataclass(frozen=True)
class Claim(Generic[T_co]):
    """A value, how far it can be believed, and the keys of its sources in ``Catalog.citations``."""

    value: T_co
    confidence: Confidence
    sources: tuple[str, ...]
    count: int = 0  # independent sources, for CONFIRMED; may exceed the sources that could be named
    note: str = ""

    @property
    def is_usable(self) -> bool:
        """Return whether the value may be used as a check."""
        return self.confidence is not Confidence.SINGLE

    @property
    def label(self) -> str:
        """Return the confidence as people read it."""
        if self.confidence is Confidence.CONFIRMED:
            return f"confirmed by {self.count}"
        return _LABELS[self.confidence]


_LABELS = {
    Confidence.PUBLISHER: "stated by its publisher",
    Confidence.COMPUTED: "computed",
    Confidence.SINGLE: "one source only",
}


@dataclass(frozen=True)
class Citation:
    """One public source of claims; ``url`` is empty where only a description was recorded."""

    key: str
    title: str
    url: str = ""


@dataclass(frozen=True)
class Link:
    """An address worth knowing."""

    title: str
    url: Claim[str]


@dataclass(frozen=True)
class Copy:
    """The same release held by somebody else; never fetched unless the user names it."""

    kind: str  # modelscope or hub
    identity: Claim[str]
    title: str


@dataclass(frozen=True)
class FilePin:
    """What is claimed about one file, usable or not."""

    path: str
    size: Claim[int] | None = None
    digests: tuple[Claim[Digest], ...] = ()

    def claims(self) -> Iterator[Claim[Any]]:
        """Yield every claim about this file."""
        if self.size is not None:
            yield self.size
        yield from self.digests

    @property
    def unconfirmed(self) -> tuple[Claim[Any], ...]:
        """Return the claims that are shown and compared for a notice, but are no checks."""
        return tuple(claim for claim in self.claims() if not claim.is_usable)

    def entry(self, mirrors: tuple[MirrorUrl, ...] = ()) -> FileEntry:
        """Return the file with its usable pins alone."""
        size = self.size.value if self.size is not None and self.size.is_usable else None
        digests = tuple(claim.value for claim in self.digests if claim.is_usable)
        return FileEntry(self.path, size, digests, mirrors=mirrors)


@dataclass(frozen=True)
class HubChannel:
    """A repository on a Hugging Face hub.

    ``include`` names the wanted files by pattern (``*.json``); ``files`` pins some or all of them.
    """

    kind: ClassVar[str] = "hub"

    info: ModelInfo
    repo: str
    claimed_revision: Claim[str] | None
    include: tuple[str, ...]
    files: tuple[FilePin, ...]
    size_floor: int | None

    @property
    def revision(self) -> str:
        """Return the commit to ask for: the pinned one if it is vouched for, else the default branch.

        A hub also answers for commits of other people's pull requests, so a commit that only one stranger
        named could be anybody's.
        """
        claim = self.claimed_revision
        return claim.value if claim is not None and claim.is_usable else DEFAULT_REVISION

    @property
    def needs_listing(self) -> bool:
        """Return whether the hub must be asked for the file names first."""
        return any(set(pattern) & set("*?[") for pattern in self.include)

    @property
    def weights_assurance(self) -> Assurance:
        """Return what this channel proves of the weights: a sha256, pinned here or given by the hub."""
        return Assurance.SHA256

    @property
    def assurance(self) -> Assurance:
        """Return what this channel proves of every file: of small files without a pin the hub gives a git blob id."""
        if self.needs_listing:
            return Assurance.GITSHA1
        pinned = all(entry.sha256 for entry in self._entries(DEFAULT_HUB_ENDPOINT))
        return Assurance.SHA256 if pinned else Assurance.GITSHA1

    @property
    def size(self) -> int | None:
        """Return the bytes of all wanted files, or None while one is unknown."""
        if self.needs_listing:
            return None
        sizes = [entry.size for entry in self._entries(DEFAULT_HUB_ENDPOINT)]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    @property
    def size_at_least(self) -> int | None:
        """Return the best lower bound: the known sizes together, or the tensors' bytes if that is more."""
        known = sum(pin.entry().size or 0 for pin in self.files)
        return max(known, self.size_floor or 0) or None

    def wants(self, path: str) -> bool:
        """Return whether a file of the repository belongs to the release; ``*`` stays within one folder."""
        return any(fnmatchcase(path, pattern) and path.count("/") == pattern.count("/") for pattern in self.include)

    def pin(self, path: str) -> FilePin:
        """Return what is claimed about ``path``, possibly nothing."""
        return next((pin for pin in self.files if pin.path == path), FilePin(path))

    def url(self, path: str, endpoint: str = DEFAULT_HUB_ENDPOINT) -> str:
        """Return the address of one file on this or another endpoint."""
        return f"{endpoint.rstrip('/')}/{self.repo}/resolve/{quote(self.revision)}/{quote(path)}"

    def manifest(self, endpoint: str = DEFAULT_HUB_ENDPOINT) -> Manifest:
        """Return the wanted files with their usable pins; unknown sizes and digests stay open for the hub.

        Raises:
            ValueError: The names are not all known (``needs_listing``).
        """
        if self.needs_listing:
            raise ValueError(f"the files of {self.repo} are not all named in the catalog")
        return Manifest(tuple(self._entries(endpoint)), self.info)

    def _entries(self, endpoint: str) -> Iterator[FileEntry]:
        for path in self.include:
            yield self.pin(path).entry((MirrorUrl(self.url(path, endpoint)),))


@dataclass(frozen=True)
class TorrentChannel:
    """A torrent that the publisher announced by magnet link alone: what is inside is proved by its info-hash."""

    kind: ClassVar[str] = "torrent"

    info: ModelInfo
    info_hash: Claim[str]
    name: Claim[str]
    trackers: tuple[Claim[str], ...]
    listing: Claim[tuple[str, ...]] | None
    files: tuple[FilePin, ...]
    size_floor: int | None

    @property
    def assurance(self) -> Assurance:
        """Return what this channel proves: SHA-1 pieces, if the info-hash itself is vouched for."""
        return Assurance.BTV1 if self.info_hash.is_usable else Assurance.SIZE

    @property
    def size(self) -> int | None:
        """Return None: only the torrent's metadata tells, and it comes from the swarm."""
        return None

    @property
    def size_at_least(self) -> int | None:
        """Return the tensors' bytes, the best lower bound."""
        return self.size_floor

    @property
    def weights_assurance(self) -> Assurance:
        """Return what this channel proves of the weights, which is the same as of every file."""
        return self.assurance

    @property
    def magnet(self) -> str:
        """Return a clean magnet link, built from parts because copies of the announced one are mangled."""
        trackers = "".join(f"&tr={quote(claim.value, safe='')}" for claim in self.trackers)
        return f"magnet:?xt=urn:btih:{self.info_hash.value}&dn={quote(self.name.value, safe='')}{trackers}"


@dataclass(frozen=True)
class ArchiveChannel:
    """One tar file on the publisher's server."""

    kind: ClassVar[str] = "archive"

    info: ModelInfo
    url: Claim[str]
    md5: Claim[Digest] | None
    size_floor: int | None

    @property
    def digest(self) -> Digest | None:
        """Return the usable digest of the whole archive."""
        return self.md5.value if self.md5 is not None and self.md5.is_usable else None

    @property
    def assurance(self) -> Assurance:
        """Return what this channel proves; MD5 shows damage, not tampering."""
        return Assurance.SIZE if self.digest is None else Assurance.MD5

    @property
    def size(self) -> int | None:
        """Return None: no archive's size is published."""
        return None

    @property
    def size_at_least(self) -> int | None:
        """Return the tensors' bytes, the best lower bound."""
        return self.size_floor

    @property
    def weights_assurance(self) -> Assurance:
        """Return what this channel proves of the weights, which is the same as of the archive."""
        return self.assurance


Channel = HubChannel | TorrentChannel | ArchiveChannel


@dataclass(frozen=True)
class Release:
    """One version of one model."""

    name: str
    version: str
    is_default: bool
    aliases: tuple[str, ...]
    title: str
    publisher: str
    variant: str  # base or instruct
    credit: str
    source_url: str
    licence: Claim[str]
    chat_template: Claim[str]
    date: Claim[str] | None
    parameters: Claim[int] | None
    tensor_bytes: Claim[int] | None
    architecture: tuple[tuple[str, Claim[Any]], ...]
    scores: tuple[Claim[dict[str, float]], ...]
    open: tuple[Claim[str], ...]
    closed: tuple[Claim[str], ...]
    traps: tuple[Claim[str], ...]
    links: tuple[Link, ...]
    copies: tuple[Copy, ...]
    channels: tuple[Channel, ...]
    not_runnable_because: str = ""

    @property
    def ref(self) -> str:
        """Return ``name@version``, the name under which the cache keeps this release."""
        return f"{self.name}@{self.version}"

    @property
    def runnable(self) -> bool:
        """Return whether the bundled runtime can run it."""
        return not self.not_runnable_because

    def channel(self, kind: str) -> Channel | None:
        """Return the first channel of this kind."""
        return next((channel for channel in self.channels if channel.kind == kind), None)


@dataclass(frozen=True)
class Catalog:
    """All releases a publisher offers, in the file's order.

    ``version`` and ``expires`` (2027-01-31T12:00:00Z) count where the file is signed (:mod:`mistral_fetch.trust`).
    """

    releases: tuple[Release, ...]
    citations: dict[str, Citation]
    hub_mirrors: tuple[Link, ...] = ()
    as_of: str = ""
    version: int | None = None
    expires: str = ""

    def find(self, name: str, version: str | None = None) -> Release:
        """Return a release by name and version; without a version, the name's default.

        Case does not matter, ``0.1`` is ``v0.1``, and ``mistral-7b-v0.1`` is ``mistral-7b@v0.1``.

        Raises:
            UnknownModel: Nothing has this name or version; the nearest names are in the hint.
        """
        name = name.lower()
        same_name = [release for release in self.releases if name == release.name or name in release.aliases]
        if not same_name and version is None:
            stem, dash, tail = name.rpartition("-v")
            same_name = [release for release in self.releases if dash and stem == release.name]
            version = tail if same_name else None
        if not same_name:
            raise self._unknown_name(name)
        if version is None:
            return next(release for release in same_name if release.is_default)
        wanted = normalize_version(version)
        for release in same_name:
            if release.version == wanted:
                return release
        known = ", ".join(release.ref for release in same_name)
        raise UnknownModel(
            f"{same_name[0].name} has no version {wanted!r} in the catalog",
            detail=f"expected one of {known}",
            hint=f"type mistral-fetch show {same_name[0].name} for the default, or list --catalog for all",
        )

    def _unknown_name(self, name: str) -> UnknownModel:
        # Only a failed look-up pays for importing the comparison.
        from difflib import get_close_matches

        names = list(dict.fromkeys(part for release in self.releases for part in (release.name, *release.aliases)))
        near = get_close_matches(name, names, n=3, cutoff=0.5)
        return UnknownModel(
            f"no model is called {name!r}",
            detail=f"expected one of the catalog's {len(names)} names"
            if near
            else f"expected one of {', '.join(names)}",
            hint=(f"did you mean {' or '.join(near)}? " if near else "") + "all names: mistral-fetch list --catalog",
        )
