"""The catalog file: bytes to values, every key and every value checked.

Owns the JSON format described in ``docs/catalog.md`` and the catalog that ships in the package. A catalog may
come from a stranger, so nothing in it is believed until its type, length, alphabet and range are right, and
a key that is not known is refused by name instead of being ignored. What the values mean is
:mod:`mistral_fetch.catalog_values`'s business; the network is nobody's here.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from mistral_fetch.catalog_values import (
    DEFAULT_HUB_ENDPOINT,
    ArchiveChannel,
    Catalog,
    Channel,
    Citation,
    Claim,
    Confidence,
    Copy,
    FilePin,
    HubChannel,
    Link,
    Release,
    TorrentChannel,
)
from mistral_fetch.digest import Digest
from mistral_fetch.errors import MalformedManifest
from mistral_fetch.manifest import MAX_FILE_SIZE, ModelInfo, validate_path, validate_paths
from mistral_fetch.ref import is_catalog_name, is_hub_repo, is_hub_revision, is_version, normalize_version
from mistral_fetch.strict_json import (
    MAX_ITEMS,
    Fields,
    Read,
    UnexpectedJson,
    accepted,
    decode,
    integer,
    listed,
    matching,
    number,
    number_or_null,
    one_of,
    refuse,
    table,
    text,
    url,
)
from mistral_fetch.units import parse_utc

__all__ = [
    "DEFAULT_HUB_ENDPOINT",
    "ArchiveChannel",
    "Catalog",
    "Channel",
    "Citation",
    "Claim",
    "Confidence",
    "Copy",
    "FilePin",
    "HubChannel",
    "Link",
    "Release",
    "TorrentChannel",
    "load_catalog",
    "parse_catalog",
]

SCHEMA = 1
MAX_CATALOG_BYTES = 1 << 20
MAX_VERSION = (1 << 53) - 1  # what every JSON reader keeps exactly
MAX_INCLUDE = 200  # patterns of one channel; each pinned file is matched against all of them

T = TypeVar("T")


def load_catalog() -> Catalog:
    """Return the catalog that ships in the package."""
    data = pkgutil.get_data("mistral_fetch", "data/catalog.json")  # lighter to import than importlib.resources
    if data is None:
        raise _malformed(UnexpectedJson("the package", "its catalog as package data", "none"))
    return parse_catalog(data)


def parse_catalog(data: bytes) -> Catalog:
    """Return the catalog in ``data``.

    Raises:
        MalformedManifest: The file is too large, is not JSON, or a key or value in it is not allowed.
        UnsafePath: A file name in it is unsafe.
    """
    try:
        return _Parser(decode(data, MAX_CATALOG_BYTES)).catalog()
    except UnexpectedJson as error:
        raise _malformed(error) from None


def _malformed(error: UnexpectedJson) -> MalformedManifest:
    return MalformedManifest(
        f"the catalog cannot be used: {error.where}",
        detail=f"expected {error.expected}, got {error.actual}",
        hint="correct the catalog file (docs/catalog.md has its format) or do without it",
    )


_size = integer(0, MAX_FILE_SIZE)
_key = matching(r"[a-z0-9][a-z0-9.-]{0,63}", "a key of lower-case letters, digits, '.' and '-'")
_name = accepted(is_catalog_name, "a lower-case model name")
_version = accepted(lambda version: is_version(version) and normalize_version(version) == version, "a version as v0.1")
_date = matching(r"\d{4}-\d{2}(?:-\d{2})?", "a date as 2023-09-27 or 2023-09")
_info_hash = matching(r"[0-9a-f]{40}", "40 lower-case hexadecimal digits")
_pattern = matching(r"[A-Za-z0-9*?._/-]{1,200}", "a file name or pattern")
_spdx = matching(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", "an SPDX identifier")
_hub_repo = accepted(is_hub_repo, "org/repo")
_hub_revision = accepted(is_hub_revision, "a branch, tag or commit")
_web_url = url("http", "https")
_tracker_url = url("udp", "http", "https")
_confidence = one_of(*(level.value for level in Confidence))
_chat_template = one_of("", "v1", "v3", "demo")
_weight_format = one_of("consolidated-pth", "consolidated-safetensors", "hf-safetensors", "archive")
_architecture_key = one_of("vocabulary_size", "max_positions", "sliding_window", "rope_theta")


def _moment(value: Any, where: str) -> str:
    written = text(value, where)
    try:
        parse_utc(written)
    except ValueError:
        refuse(where, "a moment as 2027-01-31T12:00:00Z", value)
    return written


def _digest(algorithm: str) -> Read[Digest]:
    def read(value: Any, where: str) -> Digest:
        try:
            return Digest(algorithm, value)
        except (ValueError, TypeError):
            refuse(where, f"a lower-case hexadecimal {algorithm}", value)

    return read


def _paths(value: Any, where: str) -> tuple[str, ...]:
    paths = listed(text)(value, where)
    validate_paths(paths)
    return paths


def _path(value: Any, where: str) -> str:
    path = text(value, where)
    validate_path(path)
    return path


def _pick(entries: Mapping[str, T], key: Any, where: str) -> T:
    if not isinstance(key, str) or key not in entries:
        refuse(where, "the key of an entry in the file's tables", key)
    return entries[key]


def _refuse_repeats(where: str, names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            refuse(where, "every name once", name)
        seen.add(name)


class _Parser:
    """One pass over a decoded catalog; the shared tables come first because releases point into them."""

    def __init__(self, value: Any) -> None:
        top = Fields(value, "the top level")
        schema = top.required("schema", integer(0, 1 << 31))
        if schema != SCHEMA:
            refuse("the schema", f"version {SCHEMA}", schema)
        self._as_of = top.required("as_of", _date)
        self._version = top.maybe("version", integer(1, MAX_VERSION))
        self._expires = top.optional("expires", _moment, "")
        self._citations = top.required("sources", self._read_citations)
        self._links = top.required("links", table(self._link, _key))
        self._hub_mirrors = top.entries("hub_mirrors", self._link)
        self._statements = top.required("statements", table(self._claim(text), _key))
        self._names = top.required("names", table(self._name_entry, _name))
        self._releases = top.required("releases", listed(self._release))
        top.done()

    def catalog(self) -> Catalog:
        """Return the whole, after the checks that need all of it."""
        refs = {release.ref for release in self._releases}
        _refuse_repeats("the releases", [release.ref for release in self._releases])
        _refuse_repeats(
            "the names", [*self._names, *(alias for _, aliases in self._names.values() for alias in aliases)]
        )
        for name, (default, _) in self._names.items():
            if f"{name}@{default}" not in refs:
                refuse(f"the name {name!r}", "a default that is a release", default)
        return Catalog(self._releases, self._citations, self._hub_mirrors, self._as_of, self._version, self._expires)

    def _read_citations(self, value: Any, where: str) -> dict[str, Citation]:
        def read(item: Any, at: str) -> tuple[str, str]:
            fields = Fields(item, at)
            parts = fields.required("title", text), fields.optional("url", _web_url, "")
            fields.done()
            return parts

        return {key: Citation(key, *parts) for key, parts in table(read, _key)(value, where).items()}

    def _name_entry(self, value: Any, where: str) -> tuple[str, tuple[str, ...]]:
        fields = Fields(value, where)
        entry = fields.required("default", _version), fields.entries("aliases", _name)
        fields.done()
        return entry

    # Claims.

    def _claim(self, read: Read[T]) -> Read[Claim[T]]:
        def read_claim(value: Any, where: str) -> Claim[T]:
            fields = Fields(value, where)
            content = fields.required("value", read)
            confidence = Confidence(fields.required("confidence", _confidence))
            count = fields.optional("count", integer(2, MAX_ITEMS), 0)
            if (count > 0) != (confidence is Confidence.CONFIRMED):
                refuse(where, "a count of 2 or more with 'confirmed', and with nothing else", count)
            sources = fields.required("sources", listed(self._source_key))
            if not sources or len(set(sources)) != len(sources):
                refuse(where, "at least one source, and each once", list(sources))
            note = fields.optional("note", text, "")
            fields.done()
            return Claim(content, confidence, sources, count, note)

        return read_claim

    def _source_key(self, value: Any, where: str) -> str:
        return _pick(self._citations, value, where).key

    def _statement(self, value: Any, where: str) -> Claim[str]:
        return _pick(self._statements, value, where)

    def _link_key(self, value: Any, where: str) -> Link:
        return _pick(self._links, value, where)

    def _link(self, value: Any, where: str) -> Link:
        fields = Fields(value, where)
        link = Link(fields.required("title", text), fields.required("url", self._claim(_web_url)))
        fields.done()
        return link

    # Releases.

    def _release(self, value: Any, where: str) -> Release:
        fields = Fields(value, where)
        name = fields.required("name", _name)
        version = fields.required("version", _version)
        default, aliases = _pick(self._names, name, f"{where}.name")
        where = fields.where = f"{name}@{version}"
        title = fields.required("title", text)
        credit = fields.required("credit", text)
        source_url = fields.required("source_url", _web_url)
        licence = fields.required("licence", self._claim(_spdx))
        chat_template = fields.required("chat_template", self._claim(_chat_template))
        tensor_bytes = fields.maybe("tensor_bytes", self._claim(_size))
        info = ModelInfo(
            name=name,
            version=version,
            licence=licence.value,
            credit=credit,
            source_url=source_url,
            chat_template=chat_template.value or "none",
        )
        floor = tensor_bytes.value if tensor_bytes is not None and tensor_bytes.is_usable else None
        release = Release(
            name=name,
            version=version,
            is_default=version == default,
            aliases=aliases,
            title=title,
            publisher=fields.required("publisher", text),
            variant=fields.required("variant", one_of("base", "instruct")),
            credit=credit,
            source_url=source_url,
            licence=licence,
            chat_template=chat_template,
            date=fields.maybe("date", self._claim(_date)),
            parameters=fields.maybe("parameters", self._claim(integer(1, 1 << 50))),
            tensor_bytes=tensor_bytes,
            architecture=tuple((fields.maybe("architecture", self._architecture) or {}).items()),
            scores=fields.entries("scores", self._claim(table(number, text))),
            open=fields.entries("open", self._statement),
            closed=fields.entries("closed", self._statement),
            traps=fields.entries("traps", self._statement),
            links=fields.entries("links", self._link_key),
            copies=fields.entries("copies", self._copy),
            channels=fields.required("channels", listed(self._channel(info, floor))),
            not_runnable_because=fields.optional("not_runnable_because", text, ""),
        )
        fields.done()
        return release

    def _architecture(self, value: Any, where: str) -> dict[str, Claim[float | None]]:
        return table(self._claim(number_or_null), _architecture_key)(value, where)

    def _copy(self, value: Any, where: str) -> Copy:
        fields = Fields(value, where)
        kind = fields.required("kind", one_of("hub", "modelscope"))
        repo = self._claim(_hub_repo)
        copy = Copy(kind, fields.required("id", repo), fields.required("title", text))
        fields.done()
        return copy

    # Channels.

    def _channel(self, release_info: ModelInfo, floor: int | None) -> Read[Channel]:
        readers: Mapping[str, Callable[[Fields, ModelInfo, int | None], Channel]] = {
            "hub": self._hub,
            "torrent": self._torrent,
            "archive": self._archive,
        }

        def read(value: Any, where: str) -> Channel:
            fields = Fields(value, where)
            kind = fields.required("kind", one_of(*readers))
            weight_format = fields.required("weight_format", _weight_format)
            info = replace(release_info, weight_format=weight_format)
            channel = readers[kind](fields, info, floor)
            fields.done()
            return channel

        return read

    def _hub(self, fields: Fields, info: ModelInfo, floor: int | None) -> HubChannel:
        include = fields.required("include", listed(_pattern))
        if not 1 <= len(include) <= MAX_INCLUDE:
            refuse(f"{fields.where}.include", f"1 to {MAX_INCLUDE} file names or patterns", list(include))
        _refuse_repeats(f"{fields.where}.include", include)
        channel = HubChannel(
            info=info,
            repo=fields.required("repo", _hub_repo),
            claimed_revision=fields.maybe("revision", self._claim(_hub_revision)),
            include=include,
            files=fields.optional("files", self._file_pins, ()),
            size_floor=floor,
        )
        if not channel.needs_listing:
            validate_paths(include)
        for pin in channel.files:
            if not channel.wants(pin.path):
                refuse(f"{fields.where}.files", "only files that 'include' names", pin.path)
        return channel

    def _torrent(self, fields: Fields, info: ModelInfo, floor: int | None) -> TorrentChannel:
        return TorrentChannel(
            info=info,
            info_hash=fields.required("info_hash", self._claim(_info_hash)),
            name=fields.required("name", self._claim(_path)),
            trackers=fields.entries("trackers", self._claim(_tracker_url)),
            listing=fields.maybe("listing", self._claim(_paths)),
            files=fields.optional("files", self._file_pins, ()),
            size_floor=floor,
        )

    def _archive(self, fields: Fields, info: ModelInfo, floor: int | None) -> ArchiveChannel:
        return ArchiveChannel(
            info=info,
            url=fields.required("url", self._claim(_web_url)),
            md5=fields.maybe("md5", self._claim(_digest("md5"))),
            size_floor=floor,
        )

    def _file_pins(self, value: Any, where: str) -> tuple[FilePin, ...]:
        pins = listed(self._file_pin)(value, where)
        validate_paths(pin.path for pin in pins)
        return pins

    def _file_pin(self, value: Any, where: str) -> FilePin:
        fields = Fields(value, where)
        path = fields.required("path", _path)
        fields.where = f"{where} ({path[:80]})"
        size = fields.maybe("size", self._claim(_size))
        found = [fields.maybe(algorithm, self._claim(_digest(algorithm))) for algorithm in ("sha256", "gitsha1", "md5")]
        fields.done()
        return FilePin(path, size, tuple(claim for claim in found if claim is not None))
