"""The catalog file: bytes to values, every key and every value checked.

Owns the JSON format described in ``docs/catalog.md`` and the catalog that ships in the package. A catalog may
come from a stranger, so nothing in it is believed until its type, length, alphabet and range are right, and
a key that is not known is refused by name instead of being ignored. What the values mean is
:mod:`mistral_fetch.catalog_values`'s business; the network is nobody's here.
"""

from __future__ import annotations

import json
import pkgutil
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

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
from mistral_fetch.manifest import MAX_FILE_SIZE, ModelInfo, validate_paths
from mistral_fetch.ref import is_catalog_name, is_hub_repo, is_hub_revision, is_version, normalize_version

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
MAX_ITEMS = 1000  # entries of any one list or table
MAX_TEXT = 1000  # characters of any one text
MAX_URL = 2048

CHAT_TEMPLATES = frozenset({"", "v1", "v3", "demo"})
WEIGHT_FORMATS = frozenset({"consolidated-pth", "consolidated-safetensors", "hf-safetensors", "archive"})
ARCHITECTURE = frozenset({"vocabulary_size", "max_positions", "sliding_window", "rope_theta"})

T = TypeVar("T")
Read = Callable[[Any, str], T]
"""A reader takes a JSON value and where it stands, and returns a checked value or raises."""

_KEY = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
_DATE = re.compile(r"\d{4}-\d{2}(?:-\d{2})?", re.ASCII)
_INFO_HASH = re.compile(r"[0-9a-f]{40}")
_PATTERN = re.compile(r"[A-Za-z0-9*?._/-]{1,200}")
_SPDX = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")


def load_catalog() -> Catalog:
    """Return the catalog that ships in the package."""
    data = pkgutil.get_data("mistral_fetch", "data/catalog.json")  # lighter to import than importlib.resources
    if data is None:
        _refuse("the package", "a loader that can read package data", "none")
    return parse_catalog(data)


def parse_catalog(data: bytes) -> Catalog:
    """Return the catalog in ``data``.

    Raises:
        MalformedManifest: The file is too large, is not JSON, or a key or value in it is not allowed.
        UnsafePath: A file name in it is unsafe.
    """
    if len(data) > MAX_CATALOG_BYTES:
        _refuse("the file", f"at most {MAX_CATALOG_BYTES} bytes", str(len(data)))
    return _Parser(_decode(data)).catalog()


def _decode(data: bytes) -> Any:
    try:
        return json.loads(data.decode(), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        _refuse("the file", "JSON in UTF-8", str(error)[:200] or type(error).__name__)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            _refuse("the file", "every key once in its table", f"{key[:80]!r} again")
        table[key] = value
    return table


def _refuse_constant(name: str) -> NoReturn:
    _refuse("the file", "finite numbers", name)


def _refuse(where: str, expected: str, actual: str) -> NoReturn:
    raise MalformedManifest(
        f"the catalog cannot be used: {where}",
        detail=f"expected {expected}, got {actual}",
        hint="correct the catalog file (docs/catalog.md has its format) or do without it",
    )


# Readers of single values.


def _text(value: Any, where: str) -> str:
    """Return one line of text; nothing in it can move a terminal's cursor."""
    if not isinstance(value, str) or not value or len(value) > MAX_TEXT or not value.isprintable():
        _refuse(where, f"1 to {MAX_TEXT} printable characters", repr(value)[:80])
    return value


def _integer(low: int, high: int) -> Read[int]:
    def read(value: Any, where: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            _refuse(where, f"a whole number from {low} to {high}", repr(value)[:80])
        return value

    return read


_size = _integer(0, MAX_FILE_SIZE)


def _number(value: Any, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= 1e12:
        _refuse(where, "a number", repr(value)[:80])
    return float(value)


def _boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        _refuse(where, "true or false", repr(value)[:80])
    return value


def _matching(pattern: re.Pattern[str], expected: str) -> Read[str]:
    def read(value: Any, where: str) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            _refuse(where, expected, repr(value)[:80])
        return value

    return read


def _accepted(test: Callable[[str], bool], expected: str) -> Read[str]:
    def read(value: Any, where: str) -> str:
        if not isinstance(value, str) or not test(value):
            _refuse(where, expected, repr(value)[:80])
        return value

    return read


def _one_of(values: frozenset[str]) -> Read[str]:
    return _accepted(values.__contains__, "one of " + ", ".join(repr(value) for value in sorted(values)))


def _url(*schemes: str) -> Read[str]:
    def is_url(value: str) -> bool:
        if len(value) > MAX_URL or not value.isascii() or not value.isprintable() or " " in value:
            return False
        try:
            parts = urlsplit(value)
            return parts.scheme in schemes and bool(parts.hostname) and "@" not in parts.netloc and parts.port != 0
        except ValueError:
            return False

    return _accepted(is_url, f"an address with the scheme {' or '.join(schemes)}, a host and no credentials")


_web_url = _url("http", "https")
_tracker_url = _url("udp", "http", "https")


def _digest(algorithm: str) -> Read[Digest]:
    def read(value: Any, where: str) -> Digest:
        try:
            return Digest(algorithm, value)
        except (ValueError, TypeError) as error:
            _refuse(where, f"a lower-case hexadecimal {algorithm}", str(error)[:120])

    return read


def _list(read: Read[T]) -> Read[tuple[T, ...]]:
    def read_list(value: Any, where: str) -> tuple[T, ...]:
        if not isinstance(value, list) or len(value) > MAX_ITEMS:
            _refuse(where, f"a list of at most {MAX_ITEMS} entries", _shape(value))
        return tuple(read(item, f"{where}[{index}]") for index, item in enumerate(value))

    return read_list


def _table(read: Read[T], read_key: Read[str]) -> Read[dict[str, T]]:
    def read_table(value: Any, where: str) -> dict[str, T]:
        if not isinstance(value, dict) or len(value) > MAX_ITEMS:
            _refuse(where, f"a table of at most {MAX_ITEMS} entries", _shape(value))
        return {read_key(key, where): read(item, f"{where}.{key}") for key, item in value.items()}

    return read_table


def _shape(value: Any) -> str:
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, list | dict) else repr(value)[:80]


def _paths(value: Any, where: str) -> tuple[str, ...]:
    paths = _list(_text)(value, where)
    validate_paths(paths)
    return paths


_key = _matching(_KEY, "a key of lower-case letters, digits, '.' and '-'")
_name = _accepted(is_catalog_name, "a lower-case model name")
_version = _accepted(lambda text: is_version(text) and normalize_version(text) == text, "a version such as v0.1")


class _Fields:
    """One JSON object, taken apart key by key; what is left over at the end is refused by name."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            _refuse(where, "a table", _shape(value))
        self._rest: dict[str, Any] = dict(value)
        self.where = where

    def required(self, key: str, read: Read[T]) -> T:
        if key not in self._rest:
            _refuse(self.where, f"the key {key!r}", "none")
        return read(self._rest.pop(key), f"{self.where}.{key}")

    def optional(self, key: str, read: Read[T], default: T) -> T:
        return self.required(key, read) if key in self._rest else default

    def maybe(self, key: str, read: Read[T]) -> T | None:
        return self.required(key, read) if key in self._rest else None

    def listed(self, key: str, read: Read[T]) -> tuple[T, ...]:
        return self.optional(key, _list(read), ())

    def done(self) -> None:
        if self._rest:
            _refuse(self.where, "only known keys", ", ".join(repr(key)[:80] for key in list(self._rest)[:5]))


class _Parser:
    """One pass over a decoded catalog; the shared tables come first because releases point into them."""

    def __init__(self, value: Any) -> None:
        top = _Fields(value, "the top level")
        schema = top.required("schema", _integer(0, 1 << 31))
        if schema != SCHEMA:
            _refuse("the schema", f"version {SCHEMA}", str(schema))
        self._as_of = top.required("as_of", _matching(_DATE, "a date"))
        self._citations = top.required("sources", self._read_citations)
        self._links = top.required("links", _table(self._link, _key))
        self._hub_mirrors = top.listed("hub_mirrors", self._link)
        self._statements = top.required("statements", _table(self._claim(_text), _key))
        self._names = top.required("names", _table(self._name_entry, _name))
        self._releases = top.required("releases", _list(self._release))
        top.done()

    def catalog(self) -> Catalog:
        """Return the whole, after the checks that need all of it."""
        refs = [release.ref for release in self._releases]
        for ref in refs:
            if refs.count(ref) > 1:
                _refuse("the releases", "every name and version once", f"{ref} again")
        spoken = [*self._names, *(alias for _, aliases in self._names.values() for alias in aliases)]
        for name in spoken:
            if spoken.count(name) > 1:
                _refuse("the names", "every name and alias once", f"{name!r} again")
        for name, (default, _) in self._names.items():
            if f"{name}@{default}" not in refs:
                _refuse(f"the name {name!r}", "a default that is a release", repr(default))
        return Catalog(self._releases, self._citations, self._hub_mirrors, self._as_of)

    def _read_citations(self, value: Any, where: str) -> dict[str, Citation]:
        def read(item: Any, at: str) -> tuple[str, str]:
            fields = _Fields(item, at)
            parts = fields.required("title", _text), fields.optional("url", _web_url, "")
            fields.done()
            return parts

        return {key: Citation(key, *parts) for key, parts in _table(read, _key)(value, where).items()}

    def _name_entry(self, value: Any, where: str) -> tuple[str, tuple[str, ...]]:
        fields = _Fields(value, where)
        entry = fields.required("default", _version), fields.listed("aliases", _name)
        fields.done()
        return entry

    # Claims.

    def _claim(self, read: Read[T]) -> Read[Claim[T]]:
        def read_claim(value: Any, where: str) -> Claim[T]:
            fields = _Fields(value, where)
            content = fields.required("value", read)
            confidence = Confidence(fields.required("confidence", _CONFIDENCE))
            count = fields.optional("count", _integer(2, MAX_ITEMS), 0)
            if (count > 0) != (confidence is Confidence.CONFIRMED):
                _refuse(where, "a count of 2 or more with 'confirmed', and with nothing else", f"{count}")
            sources = fields.required("sources", _list(self._source_key))
            if not sources or len(set(sources)) != len(sources):
                _refuse(where, "at least one source, and each once", repr(sources)[:80])
            note = fields.optional("note", _text, "")
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
        fields = _Fields(value, where)
        link = Link(fields.required("title", _text), fields.required("url", self._claim(_web_url)))
        fields.done()
        return link

    # Releases.

    def _release(self, value: Any, where: str) -> Release:
        fields = _Fields(value, where)
        name = fields.required("name", _name)
        version = fields.required("version", _version)
        default, aliases = _pick(self._names, name, f"{where}.name")
        where = fields.where = f"{name}@{version}"
        title = fields.required("title", _text)
        credit = fields.required("credit", _text)
        source_url = fields.required("source_url", _web_url)
        licence = fields.required("licence", self._claim(_matching(_SPDX, "an SPDX identifier")))
        chat_template = fields.required("chat_template", self._claim(_one_of(CHAT_TEMPLATES)))
        tensor_bytes = fields.maybe("tensor_bytes", self._claim(_size))
        info = ModelInfo(
            name=name,
            version=version,
            licence=licence.value,
            credit=credit,
            source_url=source_url,
            chat_template=chat_template.value,
        )
        floor = tensor_bytes.value if tensor_bytes is not None and tensor_bytes.is_usable else None
        release = Release(
            name=name,
            version=version,
            is_default=version == default,
            aliases=aliases,
            title=title,
            publisher=fields.required("publisher", _text),
            variant=fields.required("variant", _one_of(frozenset({"base", "instruct"}))),
            credit=credit,
            source_url=source_url,
            licence=licence,
            chat_template=chat_template,
            date=fields.maybe("date", self._claim(_matching(_DATE, "a date"))),
            parameters=fields.maybe("parameters", self._claim(_integer(1, 1 << 50))),
            tensor_bytes=tensor_bytes,
            architecture=tuple((fields.maybe("architecture", self._architecture) or {}).items()),
            scores=fields.listed("scores", self._claim(_table(_number, _text))),
            open=fields.listed("open", self._statement),
            closed=fields.listed("closed", self._statement),
            traps=fields.listed("traps", self._statement),
            links=fields.listed("links", self._link_key),
            copies=fields.listed("copies", self._copy),
            channels=fields.required("channels", _list(self._channel(info, floor))),
            not_runnable_because=fields.optional("not_runnable_because", _text, ""),
        )
        fields.done()
        return release

    def _architecture(self, value: Any, where: str) -> dict[str, Claim[float | None]]:
        return _table(self._claim(_number_or_none), _one_of(ARCHITECTURE))(value, where)

    def _copy(self, value: Any, where: str) -> Copy:
        fields = _Fields(value, where)
        kind = fields.required("kind", _one_of(frozenset({"hub", "modelscope"})))
        repo = self._claim(_accepted(is_hub_repo, "org/repo"))
        copy = Copy(kind, fields.required("id", repo), fields.required("title", _text))
        fields.done()
        return copy

    # Channels.

    def _channel(self, release_info: ModelInfo, floor: int | None) -> Read[Channel]:
        readers: Mapping[str, Callable[[_Fields, ModelInfo, int | None], Channel]] = {
            "hub": self._hub,
            "torrent": self._torrent,
            "archive": self._archive,
        }

        def read(value: Any, where: str) -> Channel:
            fields = _Fields(value, where)
            kind = fields.required("kind", _one_of(frozenset(readers)))
            weight_format = fields.required("weight_format", _one_of(WEIGHT_FORMATS))
            info = ModelInfo(**{**vars(release_info), "weight_format": weight_format})
            channel = readers[kind](fields, info, floor)
            fields.done()
            return channel

        return read

    def _hub(self, fields: _Fields, info: ModelInfo, floor: int | None) -> HubChannel:
        include = fields.required("include", _list(_matching(_PATTERN, "a file name or pattern")))
        if not include or len(set(include)) != len(include):
            _refuse(f"{fields.where}.include", "at least one file name or pattern, each once", _shape(list(include)))
        channel = HubChannel(
            info=info,
            repo=fields.required("repo", _accepted(is_hub_repo, "org/repo")),
            claimed_revision=fields.maybe("revision", self._claim(_accepted(is_hub_revision, "a revision"))),
            include=include,
            files=fields.optional("files", self._file_pins, ()),
            size_floor=floor,
        )
        if not channel.needs_listing:
            validate_paths(include)
        for pin in channel.files:
            if not channel.wants(pin.path):
                _refuse(f"{fields.where}.files", "only files that 'include' names", repr(pin.path)[:80])
        return channel

    def _torrent(self, fields: _Fields, info: ModelInfo, floor: int | None) -> TorrentChannel:
        return TorrentChannel(
            info=info,
            info_hash=fields.required("info_hash", self._claim(_matching(_INFO_HASH, "40 lower-case digits"))),
            name=fields.required("name", self._claim(_text)),
            trackers=fields.listed("trackers", self._claim(_tracker_url)),
            listing=fields.maybe("listing", self._claim(_paths)),
            files=fields.optional("files", self._file_pins, ()),
            size_floor=floor,
        )

    def _archive(self, fields: _Fields, info: ModelInfo, floor: int | None) -> ArchiveChannel:
        return ArchiveChannel(
            info=info,
            url=fields.required("url", self._claim(_web_url)),
            md5=fields.maybe("md5", self._claim(_digest("md5"))),
            size_floor=floor,
        )

    def _file_pins(self, value: Any, where: str) -> tuple[FilePin, ...]:
        pins = _list(self._file_pin)(value, where)
        validate_paths(pin.path for pin in pins)
        return pins

    def _file_pin(self, value: Any, where: str) -> FilePin:
        fields = _Fields(value, where)
        path = fields.required("path", _text)
        fields.where = f"{where} ({path[:80]})"
        size = fields.maybe("size", self._claim(_size))
        found = [fields.maybe(algorithm, self._claim(_digest(algorithm))) for algorithm in ("sha256", "gitsha1", "md5")]
        fields.done()
        return FilePin(path, size, tuple(claim for claim in found if claim is not None))


_CONFIDENCE = _one_of(frozenset(level.value for level in Confidence))


def _number_or_none(value: Any, where: str) -> float | None:
    return None if value is None else _number(value, where)


def _pick(table: Mapping[str, T], key: Any, where: str) -> T:
    if not isinstance(key, str) or key not in table:
        _refuse(where, "the key of an entry in the file's tables", repr(key)[:80])
    return table[key]
