"""What ``show`` and ``list --catalog`` say about a release: plain values, for JSON and for text.

Owns which facts are told, in which order and in which words, and that no value is told without its
confidence. It refuses to know terminals, colours and widths; whoever draws it decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mistral_fetch.catalog_values import (
    ArchiveChannel,
    Catalog,
    Channel,
    Claim,
    Confidence,
    FilePin,
    HubChannel,
    Link,
    Release,
    TorrentChannel,
)
from mistral_fetch.digest import Digest
from mistral_fetch.units import format_size_both

_ARCHITECTURE_TITLES = {
    "vocabulary_size": "vocabulary",
    "max_positions": "positions",
    "sliding_window": "sliding window",
    "rope_theta": "rope theta",
}
_CHANNEL_TITLES = {"hub": "Hugging Face", "torrent": "torrent", "archive": "tar archive"}


@dataclass(frozen=True)
class Row:
    """One line: what, its value, and how well it is vouched for (empty for what needs no voucher)."""

    label: str
    text: str
    confidence: str = ""
    sources: tuple[int, ...] = ()  # numbers of the last section; only with details


@dataclass(frozen=True)
class Section:
    """A heading and its lines."""

    title: str
    rows: tuple[Row, ...]


_CATALOG_HEADINGS = ["MODEL", "PARAMETERS", "WEIGHTS", "LICENCE", "CHANNELS", "NOTE"]


def catalog_rows(catalog: Catalog) -> tuple[list[str], list[list[str]], dict[str, Any]]:
    """Return ``list --catalog``: headings and rows for people, and the same as values for programs."""
    rows = [
        [
            release.ref,
            "" if release.parameters is None else f"{release.parameters.value / 1e9:.2f} B",
            "" if release.tensor_bytes is None else format_size_both(release.tensor_bytes.value),
            release.licence.value,
            ", ".join(f"{channel.kind} ({channel.weights_assurance.label})" for channel in release.channels),
            _note(release),
        ]
        for release in catalog.releases
    ]
    return _CATALOG_HEADINGS, rows, {"as_of": catalog.as_of, "models": [_row_data(r) for r in catalog.releases]}


def _note(release: Release) -> str:
    notes = [f"{release.name} means this one"] if release.is_default else []
    notes += [] if release.runnable else ["fetch only"]
    return "; ".join(notes)


def _row_data(release: Release) -> dict[str, Any]:
    return {
        "ref": release.ref,
        "title": release.title,
        "default": release.is_default,
        "aliases": list(release.aliases),
        "parameters": None if release.parameters is None else release.parameters.value,
        "tensor_bytes": None if release.tensor_bytes is None else release.tensor_bytes.value,
        "licence": release.licence.value,
        "channels": {channel.kind: channel.weights_assurance.label for channel in release.channels},
        "runnable": release.runnable,
    }


# JSON


def show_fields(catalog: Catalog, release: Release) -> dict[str, Any]:
    """Return everything the catalog knows about a release, each claim with confidence and source keys."""
    data: dict[str, Any] = {
        "ref": release.ref,
        "name": release.name,
        "version": release.version,
        "default": release.is_default,
        "aliases": list(release.aliases),
        "title": release.title,
        "publisher": release.publisher,
        "variant": release.variant,
        "date": _claim_data(release.date),
        "licence": _claim_data(release.licence),
        "credit": release.credit,
        "source_url": release.source_url,
        "parameters": _claim_data(release.parameters),
        "tensor_bytes": _claim_data(release.tensor_bytes),
        "chat_template": _claim_data(release.chat_template),
        "architecture": {key: _claim_data(claim) for key, claim in release.architecture},
        "runnable": release.runnable,
        "not_runnable_because": release.not_runnable_because,
        "channels": [_channel_data(channel) for channel in release.channels],
        "copies": [{"kind": c.kind, "id": _claim_data(c.identity), "title": c.title} for c in release.copies],
        "open": [_claim_data(claim) for claim in release.open],
        "closed": [_claim_data(claim) for claim in release.closed],
        "scores": [_claim_data(claim) for claim in release.scores],
        "links": [_link_data(link) for link in release.links],
        "hub_mirrors": [_link_data(link) for link in catalog.hub_mirrors],
        "traps": [_claim_data(claim) for claim in release.traps],
        "as_of": catalog.as_of,
    }
    used = dict.fromkeys(_source_keys(data))
    data["sources"] = {key: {"title": catalog.citations[key].title, "url": catalog.citations[key].url} for key in used}
    return data


def _claim_data(claim: Claim[Any] | None) -> dict[str, Any] | None:
    if claim is None:
        return None
    value = claim.value
    data: dict[str, Any] = {
        "value": str(value) if isinstance(value, Digest) else list(value) if isinstance(value, tuple) else value,
        "confidence": claim.confidence.value,
        "used_as_check": claim.is_usable,
        "sources": list(claim.sources),
    }
    if claim.confidence is Confidence.CONFIRMED:
        data["count"] = claim.count
    if claim.note:
        data["note"] = claim.note
    return data


def _link_data(link: Link) -> dict[str, Any]:
    return {"title": link.title, "url": _claim_data(link.url)}


def _channel_data(channel: Channel) -> dict[str, Any]:
    data: dict[str, Any] = {
        "kind": channel.kind,
        "weight_format": channel.info.weight_format,
        "assurance": channel.assurance.label,
        "weights_assurance": channel.weights_assurance.label,
        "size": channel.size,
        "size_at_least": channel.size_at_least,
    }
    if isinstance(channel, HubChannel):
        data["repo"] = channel.repo
        data["revision"] = channel.revision
        data["claimed_revision"] = _claim_data(channel.claimed_revision)
        data["include"] = list(channel.include)
        data["files"] = [_file_data(pin) for pin in channel.files]
    elif isinstance(channel, TorrentChannel):
        data["info_hash"] = _claim_data(channel.info_hash)
        data["name"] = _claim_data(channel.name)
        data["trackers"] = [_claim_data(claim) for claim in channel.trackers]
        data["magnet"] = channel.magnet
        data["listing"] = _claim_data(channel.listing)
        data["files"] = [_file_data(pin) for pin in channel.files]
    else:
        data["url"] = _claim_data(channel.url)
        data["md5"] = _claim_data(channel.md5)
    return data


def _file_data(pin: FilePin) -> dict[str, Any]:
    return {
        "path": pin.path,
        "size": _claim_data(pin.size),
        "digests": [_claim_data(claim) for claim in pin.digests],
    }


def _source_keys(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        if "confidence" in value:
            yield from value["sources"]
        for item in value.values():
            yield from _source_keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from _source_keys(item)


# Text


def show_text(catalog: Catalog, release: Release, *, details: bool = False) -> str:
    """Return :func:`show_sections` as text: label, value, confidence in brackets, numbers of sources."""
    sections = show_sections(catalog, release, details=details)
    last = f"As of {catalog.as_of}. Every file's claims and all sources: mistral-fetch show {release.ref} --json"
    return "\n\n".join([*(_block(section) for section in sections), last])


def _block(section: Section) -> str:
    # One long file name must not push every other line's text to the right.
    width = min(max(len(row.label) for row in section.rows), 16)
    lines = [section.title]
    for row in section.rows:
        vouched = f"  [{row.confidence}]" if row.confidence else ""
        sources = f" ({', '.join(map(str, row.sources))})" if row.sources else ""
        label = f"{row.label:{width}}  " if width else ""
        lines.append(f"  {label}{row.text}{vouched}{sources}")
    return "\n".join(lines)


class _Sources:
    """Numbers the sources in the order in which the text first needs them; numbers nothing unless asked to."""

    def __init__(self, is_numbering: bool) -> None:
        self._is_numbering = is_numbering
        self.keys: list[str] = []

    def row(self, label: str, text: str, claim: Claim[Any]) -> Row:
        """Return a claim as a line."""
        text = f"{text} ({claim.note})" if claim.note else text
        if not self._is_numbering:
            return Row(label, text, claim.label)
        self.keys += [key for key in claim.sources if key not in self.keys]
        return Row(label, text, claim.label, tuple(self.keys.index(key) + 1 for key in claim.sources))

    def rows(self, claims: Iterable[Claim[str]]) -> tuple[Row, ...]:
        """Return statements as lines."""
        return tuple(self.row("", claim.value, claim) for claim in claims)


def show_sections(catalog: Catalog, release: Release, *, details: bool = False) -> tuple[Section, ...]:
    """Return what ``show`` prints, in order; ``details`` adds every claim about every file, and all sources."""
    sources = _Sources(details)
    # Built in the order of reading, because the sources are numbered on the way.
    sections = [
        Section(f"{release.title} ({release.ref})", tuple(_identity(release, sources))),
        *(_channel_section(channel, sources, details) for channel in release.channels),
        Section("Also held by others", tuple(_copies(catalog, release, sources))),
        Section("Licence", tuple(_licence(release, sources))),
        Section("Open", sources.rows(release.open)),
        Section("Not open", sources.rows(release.closed)),
        Section("Published scores", tuple(_scores(catalog, release, sources))),
        Section("Links", tuple(sources.row(link.title, link.url.value, link.url) for link in release.links)),
        Section("Worth knowing", sources.rows(release.traps)),
        Section(f"Sources, as of {catalog.as_of}", tuple(_cited(catalog, sources))),
    ]
    return tuple(section for section in sections if section.rows)


def _licence(release: Release, sources: _Sources) -> Iterator[Row]:
    yield sources.row("licence", release.licence.value, release.licence)
    yield Row("credit line", release.credit)


def _cited(catalog: Catalog, sources: _Sources) -> Iterator[Row]:
    for number, key in enumerate(sources.keys, 1):
        citation = catalog.citations[key]
        yield Row(str(number), " ".join((citation.title, citation.url)).strip())


def _identity(release: Release, sources: _Sources) -> Iterator[Row]:
    yield Row("publisher", release.publisher)
    kind = "instruct model: chat and run" if release.variant == "instruct" else "base model: it continues text, no chat"
    yield Row("kind", kind)
    if release.date is not None:
        yield sources.row("released", release.date.value, release.date)
    if release.parameters is not None:
        yield sources.row("parameters", f"{release.parameters.value:,}", release.parameters)
    if release.tensor_bytes is not None:
        yield sources.row("weights", format_size_both(release.tensor_bytes.value), release.tensor_bytes)
    for key, claim in release.architecture:
        yield sources.row(_ARCHITECTURE_TITLES[key], "none" if claim.value is None else f"{claim.value:,}", claim)
    if release.chat_template.value:
        yield sources.row("prompt format", release.chat_template.value, release.chat_template)
    yield Row("runs here", "yes" if release.runnable else f"no: {release.not_runnable_because}")


def _channel_section(channel: Channel, sources: _Sources, details: bool) -> Section:
    rows = [Row("size", _size_text(channel)), Row("assurance", _assurance_text(channel))]
    if channel.info.weight_format != "archive":
        rows.append(Row("layout", channel.info.weight_format))
    if isinstance(channel, HubChannel):
        rows += _hub_rows(channel, sources, details)
    elif isinstance(channel, TorrentChannel):
        rows += _torrent_rows(channel, sources, details)
    else:
        rows += _archive_rows(channel, sources)
    return Section(f"Channel: {_CHANNEL_TITLES[channel.kind]}", tuple(rows))


def _size_text(channel: Channel) -> str:
    if channel.size is not None:
        return format_size_both(channel.size)
    return "unknown" if channel.size_at_least is None else f"at least {format_size_both(channel.size_at_least)}"


def _assurance_text(channel: Channel) -> str:
    if channel.weights_assurance is channel.assurance:
        return channel.assurance.label
    return f"{channel.weights_assurance.label} for the weights, {channel.assurance.label} for some small files"


def _hub_rows(channel: HubChannel, sources: _Sources, details: bool) -> Iterator[Row]:
    yield Row("reference", f"hf:{channel.repo}@{channel.revision}")
    if channel.claimed_revision is not None:
        yield sources.row("commit", channel.claimed_revision.value, channel.claimed_revision)
    if channel.needs_listing:
        yield Row("files", f"{', '.join(channel.include)} (the hub is asked for names, sizes and digests)")
    else:
        pinned = sum(1 for path in channel.include if channel.pin(path).entry().sha256)
        which = "all" if pinned == len(channel.include) else f"{pinned} of them"
        rest = "" if which == "all" else "; for the others the hub's own digests count"
        yield Row("files", f"{len(channel.include)}, {which} pinned by sha256{rest}")
    yield from _file_rows(channel.files, sources, details)


def _torrent_rows(channel: TorrentChannel, sources: _Sources, details: bool) -> Iterator[Row]:
    yield sources.row("info-hash", channel.info_hash.value, channel.info_hash)
    yield sources.row("name", channel.name.value, channel.name)
    for tracker in channel.trackers:
        yield sources.row("tracker", tracker.value, tracker)
    if channel.listing is not None:
        yield sources.row("files", ", ".join(channel.listing.value), channel.listing)
    yield Row("magnet", channel.magnet)
    yield from _file_rows(channel.files, sources, details)


def _archive_rows(channel: ArchiveChannel, sources: _Sources) -> Iterator[Row]:
    yield sources.row("address", channel.url.value, channel.url)
    if channel.md5 is not None:
        yield sources.row("digest", str(channel.md5.value), channel.md5)
    else:
        yield Row("digest", "none published: only the length can be compared")


def _file_rows(pins: Iterable[FilePin], sources: _Sources, details: bool) -> Iterator[Row]:
    for pin in pins if details else ():
        if pin.size is not None:
            yield sources.row(pin.path, f"{pin.size.value:,} bytes", pin.size)
        for digest in pin.digests:
            yield sources.row(
                pin.path, str(digest.value) + ("" if digest.is_usable else ", not used as a check"), digest
            )


def _copies(catalog: Catalog, release: Release, sources: _Sources) -> Iterator[Row]:
    for copy in release.copies:
        text = f"{copy.kind}: {copy.identity.value}: {copy.title}; fetched only when it is named"
        yield sources.row("copy", text, copy.identity)
    if release.channel("hub") is not None:
        for mirror in catalog.hub_mirrors:
            yield sources.row("hub mirror", f"{mirror.url.value}: {mirror.title}", mirror.url)


def _scores(catalog: Catalog, release: Release, sources: _Sources) -> Iterator[Row]:
    for claim in release.scores:
        text = ", ".join(f"{name} {value:.1f}" for name, value in claim.value.items())
        yield sources.row("scores", text, claim)
        source = catalog.citations[claim.sources[0]]
        yield Row("source", " ".join((source.title, source.url)).strip())
