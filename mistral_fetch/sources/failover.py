"""What sources with several addresses a file share: their order, and how their failures become one error."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from urllib.parse import urlsplit

from mistral_fetch.digest import sha256_of
from mistral_fetch.errors import AllSourcesFailed, MistralFetchError
from mistral_fetch.events import Report, SourceLied
from mistral_fetch.manifest import FileEntry, MirrorUrl
from mistral_fetch.sources.base import Target


def mirrors_of(entry: FileEntry, schemes: Collection[str]) -> list[MirrorUrl]:
    """Return the mirrors whose addresses have one of these schemes, the lowest priority number first, each once."""
    ordered = sorted(entry.mirrors, key=lambda mirror: mirror.priority)  # stable: ties stay in file order
    by_url = {replace(mirror, priority=0): mirror for mirror in reversed(ordered) if scheme_of(mirror.url) in schemes}
    return list(reversed(by_url.values()))


def mirror_urls(entry: FileEntry, schemes: Collection[str]) -> list[str]:
    """Return the addresses of these schemes, the lowest priority number first, each once.

    An archive that holds the file among others is no address of the file.
    """
    return [mirror.url for mirror in mirrors_of(entry, schemes) if not mirror.member]


def scheme_of(url: str) -> str:
    """Return the scheme in lower case, or '' of something unreadable."""
    try:
        return urlsplit(url).scheme
    except ValueError:
        return ""


def known_size(entry: FileEntry) -> int:
    """Return the size of a file about to be fetched.

    Raises:
        ValueError: It is unknown: whoever resolved the model had to complete it.
    """
    if entry.size is None:
        raise ValueError(f"the size of {entry.path} must be known before it is fetched")
    return entry.size


def give_up(entry: FileEntry, causes: Sequence[MistralFetchError], kind: str) -> MistralFetchError:
    """Return the one error that stands for all failed addresses of a file.

    A single cause speaks for itself.
    """
    if len(causes) == 1:
        return causes[0]
    what = f"none of the {kind}s has {entry.path}" if not causes else f"every {kind} failed for {entry.path}"
    hint = "run the same command again to go on, or try --via torrent (mistral-fetch show lists channels)"
    return AllSourcesFailed(what, causes, hint=hint)


def report_lie(target: Target, index: int, data: memoryview, source: str, report: Report) -> None:
    """Say which piece was wrong, what was expected and what came (integrity rule 5)."""
    known = target.partial.known_pieces
    expected = f"sha256:{known.sha256[index]}" if known else "unknown"
    where = f"piece {index} at bytes {target.partial.grid.span(index)}"
    report(SourceLied(source, target.entry.path, where, expected, str(sha256_of(data))))
