"""An offer: one layout of a model that some sources can deliver. Values between resolve, plan and execute."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_fetch.errors import AssuranceTooLow
from mistral_fetch.manifest import FileEntry, Manifest
from mistral_fetch.sources.base import Source
from mistral_fetch.trust import Signed


@dataclass(frozen=True)
class Offer:
    """Files that are known by name and size, and how to get them.

    ``identity`` names the content where the manifest's digests do not: an info-hash, an archive's digest, or an
    address. ``sources``
    are opened one after the other, each only when the one before has failed. ``scratch`` returns the directories
    of the opened sources' own state, removed with the partials once the model is complete. ``papers`` is what
    ``PROVENANCE.json`` says already, where a snapshot is repaired: repairing proves nothing new. ``signed`` is the
    document that a pinned key vouches for. ``carried_by`` is what brought the files where that was not their channel.
    """

    channel: str
    identity: str
    manifest: Manifest
    sources: tuple[Callable[[], Source], ...]
    scratch: Callable[[], Sequence[Path]] = tuple
    papers: Mapping[str, Any] | None = None
    signed: Signed | None = None
    carried_by: str = ""


@dataclass(frozen=True)
class Candidate:
    """An offer that may still need the network to be known, such as a magnet link's metadata.

    ``excluded`` is why the settings forbid to open it.
    """

    channel: str
    open: Callable[[], Offer]
    excluded: AssuranceTooLow | None = None


def partial_key(offer: Offer, entry: FileEntry) -> str:
    """Return the name of a file's partial: by its content where that is known, so that channels share it."""
    for algorithm in ("sha256", "gitsha1"):
        digest = entry.digest(algorithm)
        if digest is not None:
            return f"{algorithm}-{digest.value}"
    name = hashlib.sha256(f"{offer.identity}\n{entry.path}".encode()).hexdigest()
    return f"{offer.identity[:60]}-{name[:24]}"


def names_content(offer: Offer, entry: FileEntry) -> bool:
    """Return whether a file's partial is named by what it holds, not by the address it comes from."""
    has_digest = any(entry.digest(algorithm) for algorithm in ("sha256", "gitsha1"))
    return has_digest or offer.identity.startswith(("btih-", "btmh-", "archive-md5-"))
