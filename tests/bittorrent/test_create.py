"""Torrents we build, against libtorrent's own and the BEP 52 arithmetic."""

from __future__ import annotations

import hashlib

import libtorrent as lt
import pytest

from mistral_fetch.bittorrent import merkle
from mistral_fetch.bittorrent.bencode import decode
from mistral_fetch.bittorrent.create import TorrentAddresses, hybrid_torrent, plain_torrent, tree_order
from mistral_fetch.bittorrent.load import load_parameters
from mistral_fetch.bittorrent.metainfo import parse_metainfo
from mistral_fetch.publish.hashing import SourceFile, hash_files

KIB = 1024
TREES = {
    "one small file": {"a": 5},
    "one file of one block": {"a": 16 * KIB},
    "one file of exactly a piece": {"a": 64 * KIB},
    "a byte more than a piece": {"a": 64 * KIB + 1},
    "odd number of pieces": {"a": 64 * KIB * 5 + 12345},
    "many files": {"a": 5, "b/c": 70_000, "b/d": 16 * KIB, "e": 300_001},
    "empty files": {"a": 0, "b": 3, "c": 0, "d": 100_000, "z": 0},
    "last file fills its piece": {"a": 1, "z": 64 * KIB},
    "several windows": {"big": 35 * 1024 * KIB + 7, "small": 99},
}


def files_of(tmp_path, sizes):
    files = []
    for path, size in sizes.items():
        location = tmp_path / "model" / path
        location.parent.mkdir(parents=True, exist_ok=True)
        location.write_bytes(hashlib.shake_128(path.encode()).digest(size))
        files.append(SourceFile(path, size, location))
    return files


def hashed_directory(tmp_path, sizes, piece_length):
    last = max(sizes, key=tree_order)
    return hash_files(files_of(tmp_path, sizes), piece_length, last, lambda _path, _done: None)


def libtorrents_own(tmp_path, piece_length, flags):
    created = lt.create_torrent(lt.list_files(str(tmp_path / "model")), piece_length, flags)
    lt.set_piece_hashes(created, str(tmp_path))
    return decode(lt.bencode(created.generate()))


@pytest.mark.parametrize("piece_length", [32 * KIB, 64 * KIB])
@pytest.mark.parametrize("case", TREES)
def test_hybrid_has_libtorrents_hash_trees(tmp_path, case, piece_length):
    hashed = hashed_directory(tmp_path, TREES[case], piece_length)
    data = hybrid_torrent("model", piece_length, [file.torrent for file in hashed.files], TorrentAddresses())
    ours, theirs = decode(data), libtorrents_own(tmp_path, piece_length, lt.create_torrent.v2_only)
    assert ours[b"info"][b"file tree"] == theirs[b"info"][b"file tree"]
    assert ours[b"piece layers"] == theirs[b"piece layers"]
    metainfo = parse_metainfo(data)
    load_parameters(metainfo)
    assert sorted((file.path, file.size) for file in metainfo.files) == sorted(TREES[case].items())


@pytest.mark.parametrize("case", TREES)
def test_hybrid_v1_pieces_are_padded_with_zeros_but_the_last(tmp_path, case):
    piece_length, sizes = 64 * KIB, TREES[case]
    hashed = hashed_directory(tmp_path, sizes, piece_length)
    data = hybrid_torrent("model", piece_length, [file.torrent for file in hashed.files], TorrentAddresses())
    stream = bytearray()
    for path in sorted(sizes, key=tree_order):
        stream += bytes(-len(stream) % piece_length) + (tmp_path / "model" / path).read_bytes()
    assert decode(data)[b"info"][b"pieces"] == sha1_pieces(bytes(stream), piece_length)


@pytest.mark.parametrize("piece_length", [16 * KIB, 64 * KIB])
@pytest.mark.parametrize("case", TREES)
def test_plain_torrent_runs_over_its_files_without_gaps(tmp_path, case, piece_length):
    hashed = hashed_directory(tmp_path, TREES[case], piece_length)
    data = plain_torrent("model", piece_length, hashed.plain_order, hashed.plain_pieces, TorrentAddresses())
    metainfo = parse_metainfo(data)
    load_parameters(metainfo)
    stream = b"".join((tmp_path / "model" / file.path).read_bytes() for file in metainfo.files)
    assert metainfo.v1_pieces == sha1_pieces(stream, piece_length)
    assert b"meta version" not in decode(data)[b"info"]
    assert b"attr" not in data


def sha1_pieces(stream, piece_length):
    return b"".join(
        hashlib.sha1(stream[start : start + piece_length]).digest() for start in range(0, len(stream), piece_length)
    )


def test_file_named_like_its_torrent_is_a_single_file_torrent(tmp_path):
    hashed = hashed_directory(tmp_path, {"model": 70_000}, 16 * KIB)
    hybrid = hybrid_torrent("model", 16 * KIB, [hashed.files[0].torrent], TorrentAddresses())
    assert decode(hybrid)[b"info"][b"length"] == 70_000
    metainfo = parse_metainfo(hybrid)
    load_parameters(metainfo)
    assert [file.path for file in metainfo.files] == ["model"]


def test_addresses_are_outside_the_info_hash(tmp_path):
    hashed = hashed_directory(tmp_path, {"a": 5}, 16 * KIB)
    torrents = [file.torrent for file in hashed.files]
    addresses = TorrentAddresses(("udp://t.example:1/announce", "http://u.example/a"), ("http://m.example/models/",))
    plain = parse_metainfo(hybrid_torrent("model", 16 * KIB, torrents, TorrentAddresses()))
    found = parse_metainfo(hybrid_torrent("model", 16 * KIB, torrents, addresses))
    assert (found.trackers, found.web_seeds) == (addresses.trackers, addresses.web_seeds)
    assert (found.info_hash_v1, found.info_hash_v2) == (plain.info_hash_v1, plain.info_hash_v2)


def test_merkle_roots_by_hand():
    zero = bytes(32)
    a, b, c = (hashlib.sha256(bytes([n])).digest() for n in range(3))

    def pair(left, right):
        return hashlib.sha256(left + right).digest()

    assert merkle.root([a], 1) == a
    assert merkle.root([a, b, c], 4) == pair(pair(a, b), pair(c, zero))
    assert merkle.root([a], 4) == pair(pair(a, zero), pair(zero, zero))
    assert merkle.root([], 2) == pair(zero, zero)
    assert merkle.file_root([a, b, c], 32 * KIB) == pair(pair(a, b), pair(c, pair(zero, zero)))
    assert [merkle.next_power_of_two(count) for count in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, 8]
