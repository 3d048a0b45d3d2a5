"""Build .torrent files from digests that were computed already. Pure: the same digests give the same bytes.

Two forms. The hybrid (BEP 52) carries v1 and v2 and aligns every file to the piece grid with pad files (BEP 47).
The plain v1 form has neither, for clients that predate both: they would write the pad files to disk, or take the
info-hash of a hybrid wrongly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mistral_fetch.bittorrent.bencode import encode

CREATED_BY = b"mistral-fetch"  # without a version, so that an upgrade does not change the bytes


@dataclass(frozen=True)
class HashedFile:
    """A file's size and digests on the torrent's piece grid.

    ``v1_pieces`` are SHA-1 digests of the file's own pieces, the last one as :func:`hybrid_torrent` needs it:
    filled up with zeros, unless it is the last file. ``v2_layer`` is empty for a file of at most one piece.
    """

    path: str
    size: int
    v1_pieces: tuple[bytes, ...]
    v2_root: bytes
    v2_layer: tuple[bytes, ...]


@dataclass(frozen=True)
class TorrentAddresses:
    """Where a torrent's peers and web seeds are found; none of it is part of the info-hash."""

    trackers: tuple[str, ...] = ()
    web_seeds: tuple[str, ...] = ()


def tree_order(path: str) -> tuple[bytes, ...]:
    """Return the sort key of a v2 file tree: bytes of the parts, so that ``a/b`` precedes ``a.b``."""
    return tuple(part.encode() for part in path.split("/"))


def hybrid_torrent(name: str, piece_length: int, files: Iterable[HashedFile], addresses: TorrentAddresses) -> bytes:
    """Return the bytes of a hybrid v1 and v2 torrent."""
    ordered = sorted(files, key=lambda file: tree_order(file.path))
    info = {
        b"name": name.encode(),
        b"piece length": piece_length,
        b"meta version": 2,
        b"pieces": b"".join(piece for file in ordered for piece in file.v1_pieces),
        b"file tree": _file_tree(ordered),
        **_v1_files(name, _padded(ordered, piece_length)),
    }
    layers = {file.v2_root: b"".join(file.v2_layer) for file in ordered if file.v2_layer}
    return _torrent(info, addresses, {b"piece layers": layers})


def plain_torrent(
    name: str, piece_length: int, files: Sequence[tuple[str, int]], pieces: Sequence[bytes], addresses: TorrentAddresses
) -> bytes:
    """Return the bytes of a v1 torrent; ``pieces`` run over the files in the order given, without gaps."""
    info = {
        b"name": name.encode(),
        b"piece length": piece_length,
        b"pieces": b"".join(pieces),
        **_v1_files(name, [_v1_entry(path, size) for path, size in files]),
    }
    return _torrent(info, addresses, {})


def _torrent(info: dict[bytes, Any], addresses: TorrentAddresses, more: dict[bytes, Any]) -> bytes:
    torrent: dict[bytes, Any] = {b"created by": CREATED_BY, b"info": info, **more}
    if addresses.trackers:
        torrent[b"announce"] = addresses.trackers[0].encode()
        torrent[b"announce-list"] = [[tracker.encode()] for tracker in addresses.trackers]
    if addresses.web_seeds:
        torrent[b"url-list"] = [seed.encode() for seed in addresses.web_seeds]
    return encode(torrent)


def _v1_files(name: str, entries: list[dict[bytes, Any]]) -> dict[bytes, Any]:
    # In v2 a lone file named like the torrent IS the torrent; the v1 half must say the same.
    if len(entries) == 1 and entries[0][b"path"] == [name.encode()]:
        return {b"length": entries[0][b"length"]}
    return {b"files": entries}


def _v1_entry(path: str, size: int) -> dict[bytes, Any]:
    return {b"length": size, b"path": list(tree_order(path))}


def _padded(files: Sequence[HashedFile], piece_length: int) -> list[dict[bytes, Any]]:
    entries: list[dict[bytes, Any]] = []
    gap = 0
    for file in files:
        if gap:
            # Before an empty file too: libtorrent lays them out so, and refuses a hybrid that differs.
            entries.append({b"attr": b"p", b"length": gap, b"path": [b".pad", str(gap).encode()]})
        gap = -file.size % piece_length
        entries.append(_v1_entry(file.path, file.size))
    return entries


def _file_tree(files: Iterable[HashedFile]) -> dict[bytes, Any]:
    tree: dict[bytes, Any] = {}
    for file in files:
        node = tree
        for part in tree_order(file.path):
            node = node.setdefault(part, {})
        leaf: dict[bytes, Any] = {b"length": file.size}
        if file.size:
            leaf[b"pieces root"] = file.v2_root
        node[b""] = leaf
    return tree
