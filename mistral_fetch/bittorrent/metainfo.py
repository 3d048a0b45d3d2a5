"""Read .torrent files (BEP 3, 47, 52): hostile bytes in, frozen values out. No I/O, no libtorrent.

libtorrent silently repairs the names it is given (``../../etc/passwd`` becomes ``etc/passwd``), so a hostile
torrent would look like a harmless one behind it. Names, sizes and counts are therefore judged here, in the
raw bencoding, and libtorrent sees only what passed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mistral_fetch.bittorrent.bencode import BencodeError, Decoder
from mistral_fetch.digest import Assurance
from mistral_fetch.errors import UnsafePath, UnsafeTorrent, printable
from mistral_fetch.manifest import MAX_FILE_SIZE, MAX_FILES, FileEntry, Manifest, ModelInfo, validate_paths
from mistral_fetch.units import KIB, MIB

MAX_TORRENT_BYTES = 32 * MIB
MAX_PIECE_COUNT = 1 << 21  # also libtorrent's own limit
MAX_PIECE_LENGTH = 512 * MIB
BLOCK_LENGTH = 16 * KIB
MAX_ADDRESSES = 100
_TRACKER_SCHEMES = ("http://", "https://", "udp://")
_WEB_SEED_SCHEMES = ("http://", "https://")
# BitComet pads files without saying so; the name is how every client, libtorrent too, knows them.
_BITCOMET_PADDING = "_____padding_file_"


@dataclass(frozen=True)
class TorrentFile:
    """One file of a torrent.

    ``index`` counts pad files, as libtorrent does; ``offset`` is the first byte in the torrent's address space.
    """

    index: int
    path: str
    size: int
    offset: int
    v2_root: str | None = None


@dataclass(frozen=True)
class Metainfo:
    """A torrent whose names, sizes and counts were validated.

    ``total_length`` is that of the address space, pad files included; ``data`` is the whole file as it came.
    ``is_private`` torrents get their peers from their trackers alone (BEP 27).
    """

    name: str
    info_hash_v1: str | None
    info_hash_v2: str | None
    piece_length: int
    piece_count: int
    total_length: int
    files: tuple[TorrentFile, ...]
    trackers: tuple[str, ...] = ()
    web_seeds: tuple[str, ...] = ()
    is_private: bool = False
    v1_pieces: bytes = field(default=b"", repr=False)
    data: bytes = field(default=b"", repr=False)

    @property
    def info_hash(self) -> str:
        """Return the info-hash people know the torrent by: v1 where there is one."""
        return self.info_hash_v1 or self.info_hash_v2 or ""

    @property
    def assurance(self) -> Assurance:
        """Return what a transfer of this torrent proves: a hybrid is checked against both its hashes."""
        return Assurance.BTV2 if self.info_hash_v2 else Assurance.BTV1

    def piece_hash(self, piece: int) -> str:
        """Return what a piece must hash to, as ``sha1:…``, or a plain word where only the v2 tree knows it."""
        digest = self.v1_pieces[20 * piece : 20 * piece + 20]
        return f"sha1:{digest.hex()}" if digest else "its node in the v2 hash tree"

    def blocks_in_piece(self, piece: int) -> int:
        """Return how many 16 KiB blocks, the unit asked of a peer, a piece has."""
        length = min(self.piece_length, self.total_length - piece * self.piece_length)
        return -(-length // BLOCK_LENGTH)

    def files_in_piece(self, piece: int) -> list[TorrentFile]:
        """Return the files that have bytes in a piece."""
        start = piece * self.piece_length
        end = start + self.piece_length
        return [file for file in self.files if file.size and file.offset < end and start < file.offset + file.size]


def parse_metainfo(data: bytes) -> Metainfo:
    """Return the torrent that ``data`` describes.

    Raises:
        UnsafeTorrent: Malformed, too large, inconsistent, or with symbolic links.
        UnsafePath: A name would leave its directory or clash with another.
    """
    if len(data) > MAX_TORRENT_BYTES:
        raise unsafe(f"at most {MAX_TORRENT_BYTES} bytes", f"{len(data)}")
    decoder = Decoder(data)
    try:
        torrent = decoder.decode()
    except BencodeError as error:
        raise unsafe("bencoded metadata (BEP 3)", str(error)) from error
    info = _dictionary(torrent, "the torrent").get(b"info")
    start, end = decoder.spans.get(b"info", (0, 0))
    return _Reader(_dictionary(info, "info"), data[start:end]).read(torrent, data)


def wrap_info(info: bytes) -> bytes:
    """Return a minimal .torrent around an info dictionary, such as a peer sends for a magnet link (BEP 9)."""
    return b"d4:info" + info + b"e"


def metainfo_to_manifest(metainfo: Metainfo) -> Manifest:
    """Return the torrent's files as a manifest: sizes only, since a torrent has no digests of whole files."""
    entries = tuple(FileEntry(path=file.path, size=file.size) for file in metainfo.files)
    return Manifest(files=entries, info=ModelInfo(name=metainfo.name))


def unsafe(expected: str, got: str) -> UnsafeTorrent:
    """Return the error for a torrent that cannot be believed."""
    return UnsafeTorrent(
        "refused a torrent that no honest publisher would make",
        detail=f"expected {expected}, got {printable(got)}",
        hint="get the .torrent or magnet link from its publisher again; do not use this one",
    )


@dataclass(frozen=True)
class _RawFile:
    parts: tuple[str, ...]
    size: int
    is_padding: bool
    root: str | None = None


class _Reader:
    """One parse: the info dictionary and its raw bytes, judged step by step."""

    def __init__(self, info: dict[bytes, Any], raw: bytes) -> None:
        self._info = info
        self._raw = raw
        self._has_v1 = b"pieces" in info
        self._has_v2 = b"file tree" in info or b"meta version" in info
        if not self._has_v1 and not self._has_v2:
            raise unsafe("pieces (v1) or a file tree (v2)", "neither")
        if self._has_v2 and info.get(b"meta version") != 2:
            raise unsafe("meta version 2", repr(info.get(b"meta version"))[:40])

    def read(self, torrent: dict[bytes, Any], data: bytes) -> Metainfo:
        name = self._name()
        piece_length = self._piece_length()
        raw_files = self._files(name)
        files, total = self._lay_out(raw_files, piece_length)
        return Metainfo(
            name=name,
            # SHA-1 is what BEP 3 names torrents by; it is not this program's choice.
            info_hash_v1=hashlib.sha1(self._raw, usedforsecurity=False).hexdigest() if self._has_v1 else None,
            info_hash_v2=hashlib.sha256(self._raw).hexdigest() if self._has_v2 else None,
            piece_length=piece_length,
            piece_count=self._piece_count(total, piece_length),
            total_length=total,
            files=files,
            trackers=_addresses(_tracker_values(torrent), _TRACKER_SCHEMES),
            web_seeds=_addresses(_web_seed_values(torrent), _WEB_SEED_SCHEMES),
            is_private=self._info.get(b"private") == 1,
            v1_pieces=self._info[b"pieces"] if self._has_v1 else b"",
            data=data,
        )

    def _name(self) -> str:
        name = _text(self._info.get(b"name.utf-8", self._info.get(b"name")), "the name")
        validate_paths([_part(name)])
        return name

    def _piece_length(self) -> int:
        length = _integer(self._info.get(b"piece length"), "the piece length")
        if not 0 < length <= MAX_PIECE_LENGTH:
            raise unsafe(f"a piece length up to {MAX_PIECE_LENGTH}", str(length))
        if self._has_v2 and (length < BLOCK_LENGTH or length & (length - 1)):
            raise unsafe("a power of two from 16 KiB as piece length (BEP 52)", str(length))
        return length

    def _files(self, name: str) -> list[_RawFile]:
        v1 = self._v1_files(name) if self._has_v1 else []
        v2 = list(_tree_files(_dictionary(self._info.get(b"file tree"), "the file tree"))) if self._has_v2 else []
        if not self._has_v2:
            return v1
        if not self._has_v1:
            return v2
        # A hybrid names everything twice; whoever reads the other half must see the same files.
        told_v1 = [(file.parts, file.size) for file in v1 if not file.is_padding]
        told_v2 = [(file.parts, file.size) for file in v2]
        if told_v1 != told_v2:
            raise unsafe("the same files in both halves of a hybrid torrent", "two different lists")
        roots = {file.parts: file.root for file in v2}
        return [_RawFile(file.parts, file.size, file.is_padding, roots.get(file.parts)) for file in v1]

    def _v1_files(self, name: str) -> list[_RawFile]:
        if (b"length" in self._info) == (b"files" in self._info):
            raise unsafe("either one length or a list of files", "both or neither")
        if b"length" in self._info:
            return [_v1_file(self._info, (name,))]
        listed = self._info[b"files"]
        if not isinstance(listed, list):
            raise unsafe("a list of files", type(listed).__name__)
        return [_v1_file(_dictionary(entry, "a file"), None) for entry in listed]

    def _lay_out(self, raw_files: list[_RawFile], piece_length: int) -> tuple[tuple[TorrentFile, ...], int]:
        files: list[TorrentFile] = []
        index = offset = 0
        for raw in raw_files:
            if raw.is_padding and raw.size >= piece_length:
                raise unsafe(f"pad files shorter than a piece of {piece_length} bytes (BEP 47)", f"one of {raw.size}")
            padding = -offset % piece_length
            if self._has_v2 and padding and not raw.is_padding:
                if self._has_v1:
                    raise unsafe("files of a hybrid torrent to begin at pieces", f"byte {offset}")
                # v2 aligns files by itself; libtorrent counts the gap as a file.
                index, offset = index + 1, offset + padding
            if not raw.is_padding:
                files.append(TorrentFile(index, "/".join(raw.parts), raw.size, offset, raw.root))
            index, offset = index + 1, offset + raw.size
        if not 1 <= len(files) <= MAX_FILES or len(raw_files) > 2 * MAX_FILES:
            raise unsafe(f"1 to {MAX_FILES} files", str(len(files)))
        validate_paths(file.path for file in files)
        if offset > MAX_FILE_SIZE:
            raise unsafe(f"at most {MAX_FILE_SIZE} bytes in all", str(offset))
        return tuple(files), offset

    def _piece_count(self, total: int, piece_length: int) -> int:
        count = -(-total // piece_length)
        if not 1 <= count <= MAX_PIECE_COUNT:
            raise unsafe(f"1 to {MAX_PIECE_COUNT} pieces", str(count))
        if self._has_v1:
            pieces = self._info[b"pieces"]
            if not isinstance(pieces, bytes) or len(pieces) != 20 * count:
                got = f"{len(pieces)} bytes" if isinstance(pieces, bytes) else type(pieces).__name__
                raise unsafe(f"{20 * count} bytes of piece hashes for {total} bytes of files", got)
        return count


def _v1_file(entry: dict[bytes, Any], parts: tuple[str, ...] | None) -> _RawFile:
    size = _integer(entry.get(b"length"), "a file's size")
    if parts is None:
        path = entry.get(b"path.utf-8", entry.get(b"path"))
        if not isinstance(path, list) or not path:
            raise unsafe("a path for every file", repr(path)[:60])
        parts = tuple(_part(_text(part, "a name")) for part in path)
    attributes = _attributes(entry)
    is_padding = b"p" in attributes or parts[-1].startswith(_BITCOMET_PADDING)
    return _RawFile(parts, size, is_padding)


def _tree_files(tree: dict[bytes, Any], above: tuple[str, ...] = ()) -> Iterator[_RawFile]:
    """Yield the files of a v2 file tree (BEP 52), in the order of the tree."""
    if list(tree) != sorted(tree):
        raise unsafe("a sorted file tree", "names out of order")
    for raw_name, below in tree.items():
        parts = (*above, _part(_text(raw_name, "a name")))
        node = _dictionary(below, "a file tree's node")
        if b"" not in node:
            if not node:
                raise unsafe("a file or a folder with files", f"nothing at {'/'.join(parts)[:80]}")
            yield from _tree_files(node, parts)
            continue
        if len(node) != 1:
            raise unsafe("a file or a folder", f"both at {'/'.join(parts)[:80]}")
        yield _v2_file(_dictionary(node[b""], "a file"), parts)


def _v2_file(entry: dict[bytes, Any], parts: tuple[str, ...]) -> _RawFile:
    size = _integer(entry.get(b"length"), "a file's size")
    root = entry.get(b"pieces root")
    if size and (not isinstance(root, bytes) or len(root) != 32):
        raise unsafe(f"a 32-byte pieces root for {'/'.join(parts)[:80]}", repr(root)[:60])
    _attributes(entry)
    return _RawFile(parts, size, is_padding=False, root=root.hex() if isinstance(root, bytes) else None)


def _attributes(entry: dict[bytes, Any]) -> bytes:
    attributes = entry.get(b"attr", b"")
    if not isinstance(attributes, bytes):
        raise unsafe("file attributes as text (BEP 47)", type(attributes).__name__)
    if b"l" in attributes or b"symlink path" in entry:
        raise unsafe("files only", "a symbolic link")
    return attributes


def _part(name: str) -> str:
    if "/" in name or name in {"", ".", ".."}:
        raise UnsafePath(
            f"refused the file name {name[:120]!r} in a torrent",
            detail="expected plain names, one a folder or file, but this one is a path or leaves its directory",
            hint="do not use this torrent; tell its publisher",
        )
    return name


def _tracker_values(torrent: dict[bytes, Any]) -> Iterator[Any]:
    tiers = torrent.get(b"announce-list")
    yield torrent.get(b"announce")
    for tier in tiers if isinstance(tiers, list) else ():
        yield from tier if isinstance(tier, list) else ()


def _web_seed_values(torrent: dict[bytes, Any]) -> Iterator[Any]:
    seeds = torrent.get(b"url-list")
    yield from seeds if isinstance(seeds, list) else (seeds,)


def _addresses(values: Iterator[Any], schemes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the usable addresses, each once. Unusable ones are no danger, only no help, so they are left out."""
    found: dict[str, None] = {}
    for value in values:
        text = value.decode("utf-8", "replace").strip() if isinstance(value, bytes) else ""
        if text.lower().startswith(schemes) and len(text) <= 2048 and text.isprintable():
            found[text] = None
    return tuple(found)[:MAX_ADDRESSES]


def _dictionary(value: Any, what: str) -> dict[bytes, Any]:
    if not isinstance(value, dict):
        raise unsafe(f"{what} to be a dictionary", type(value).__name__)
    return value


def _integer(value: Any, what: str) -> int:
    if not isinstance(value, int) or not 0 <= value <= MAX_FILE_SIZE:
        raise unsafe(f"{what} from 0 to {MAX_FILE_SIZE}", repr(value)[:40])
    return value


def _text(value: Any, what: str) -> str:
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8")
    except UnicodeDecodeError:
        pass
    raise unsafe(f"{what} in UTF-8", repr(value)[:60])
