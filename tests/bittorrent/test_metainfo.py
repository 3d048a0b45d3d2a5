"""Torrents as hostile input: every lie has its error, and libtorrent sees what we saw."""

from __future__ import annotations

import hashlib

import pytest

from mistral_fetch.bittorrent.bencode import encode
from mistral_fetch.bittorrent.load import load_parameters
from mistral_fetch.bittorrent.metainfo import (
    MAX_TORRENT_BYTES,
    Metainfo,
    TorrentFile,
    metainfo_to_manifest,
    parse_metainfo,
)
from mistral_fetch.digest import Assurance
from mistral_fetch.errors import ExitCode, ManifestError, UnsafePath, UnsafeTorrent

PIECE = 16384
ROOT = bytes(range(32))


def v1(*files, name=b"model", piece_length=PIECE, pieces=None, **more):
    """Return a multi-file v1 torrent of (path parts, size[, extra keys])."""
    listed = [{b"path": list(path), b"length": size, **(extra[0] if extra else {})} for path, size, *extra in files]
    count = -(-sum(size for _, size, *_ in files) // (piece_length or 1))
    info = {
        b"name": name,
        b"piece length": piece_length,
        b"pieces": bytes(20 * count) if pieces is None else pieces,
        b"files": listed,
        **{key.encode(): value for key, value in more.items()},
    }
    return encode({b"info": {key: value for key, value in info.items() if value is not None}})


def v2(tree, piece_length=PIECE):
    info = {b"name": b"model", b"piece length": piece_length, b"meta version": 2, b"file tree": tree}
    return encode({b"info": info, b"piece layers": {}})


def leaf(size):
    return {b"": {b"length": size, **({b"pieces root": ROOT} if size else {})}}


def hybrid(files, tree):
    listed = [{b"path": [path], b"length": size} for path, size in files]
    halves = {b"pieces": bytes(20), b"files": listed, b"meta version": 2, b"file tree": tree}
    return encode({b"info": {b"name": b"model", b"piece length": PIECE, **halves}, b"piece layers": {}})


def nested(depth):
    tree = {b"a": leaf(1)}
    for _ in range(depth):
        tree = {b"d": tree}
    return tree


ONE = (([b"a"], 5),)
HOSTILE = {
    "not bencoded": (b"<html>", UnsafeTorrent),
    "empty": (b"", UnsafeTorrent),
    "a list": (b"le", UnsafeTorrent),
    "no info": (b"de", UnsafeTorrent),
    "info is text": (b"d4:info1:xe", UnsafeTorrent),
    "info is empty": (b"d4:infodee", UnsafeTorrent),
    "bytes follow": (v1(*ONE) + b"x", UnsafeTorrent),
    "cut short": (v1(*ONE)[:-3], UnsafeTorrent),
    "too large": (bytes(MAX_TORRENT_BYTES + 1), UnsafeTorrent),
    "dotdot": (v1(([b"..", b"etc", b"passwd"], 5)), UnsafePath),
    "dotdot inside": (v1(([b"a", b"..", b"b"], 5)), UnsafePath),
    "slash in a part": (v1(([b"../../etc/passwd"], 5)), UnsafePath),
    "plain slash in a part": (v1(([b"a/b"], 5)), UnsafePath),
    "absolute": (v1(([b"/etc/passwd"], 5)), UnsafePath),
    "empty part": (v1(([b"", b"a"], 5)), UnsafePath),
    "backslash": (v1(([b"..\\..\\windows"], 5)), UnsafePath),
    "drive letter": (v1(([b"C:", b"x"], 5)), UnsafePath),
    "newline in a name": (v1(([b"a\nb"], 5)), UnsafePath),
    "right-to-left override": (v1((["a\u202egp.exe".encode()], 5)), UnsafePath),
    "reserved name": (v1(([b".complete"], 5)), UnsafePath),
    "hostile utf-8 twin": (v1(([b"a"], 5, {b"path.utf-8": [b"..", b"b"]})), UnsafePath),
    "root name dotdot": (v1(*ONE, name=b".."), UnsafePath),
    "root name with slash": (v1(*ONE, name=b"a/b"), UnsafePath),
    "root name empty": (v1(*ONE, name=b""), UnsafePath),
    "no name": (v1(*ONE, name=None), UnsafeTorrent),
    "duplicate": (v1(([b"a"], 5), ([b"a"], 6)), UnsafePath),
    "case collision": (v1(([b"Model"], 5), ([b"model"], 6)), UnsafePath),
    "unicode collision": (v1((["\u00e9".encode()], 5), (["e\u0301".encode()], 6)), UnsafePath),
    "file and folder": (v1(([b"a"], 5), ([b"a", b"b"], 6)), UnsafePath),
    "not utf-8": (v1(([b"\xff\xfe"], 5)), UnsafeTorrent),
    "no path": (v1(([], 5)), UnsafeTorrent),
    "no files": (v1(), UnsafeTorrent),
    "only padding": (v1(([b".pad", b"5"], 5, {b"attr": b"p"})), UnsafeTorrent),
    "symlink attribute": (v1(([b"a"], 5, {b"attr": b"l", b"symlink path": [b"..", b"x"]})), UnsafeTorrent),
    "symlink without target": (v1(([b"a"], 5, {b"attr": b"xl"})), UnsafeTorrent),
    "symlink without attribute": (v1(([b"a"], 5, {b"symlink path": [b"etc"]})), UnsafeTorrent),
    "negative size": (v1(([b"a"], -5), pieces=bytes(20)), UnsafeTorrent),
    "size beyond reason": (v1(([b"a"], 1 << 55), pieces=bytes(20)), UnsafeTorrent),
    "sum beyond reason": (v1(([b"a"], 1 << 50), ([b"b"], 1 << 50), pieces=bytes(20)), UnsafeTorrent),
    "too few piece hashes": (v1(([b"a"], PIECE + 1), pieces=bytes(20)), UnsafeTorrent),
    "too many piece hashes": (v1(*ONE, pieces=bytes(40)), UnsafeTorrent),
    "half a piece hash": (v1(*ONE, pieces=bytes(19)), UnsafeTorrent),
    "piece hashes are a number": (v1(*ONE, pieces=7), UnsafeTorrent),
    "ten million pieces": (v1(([b"a"], 10_000_000), piece_length=1, pieces=b""), UnsafeTorrent),
    "piece length zero": (v1(*ONE, piece_length=0, pieces=b""), UnsafeTorrent),
    "piece length negative": (v1(*ONE, piece_length=-1, pieces=bytes(20)), UnsafeTorrent),
    "piece length huge": (v1(*ONE, piece_length=1 << 40), UnsafeTorrent),
    "length and files": (v1(*ONE, length=5), UnsafeTorrent),
    "neither length nor files": (v1(*ONE, files=None), UnsafeTorrent),
    "twenty thousand files": (v1(*(([b"%d" % i], 1) for i in range(20_000))), UnsafeTorrent),
    "v2 wrong version": (
        encode({b"info": {b"name": b"m", b"piece length": PIECE, b"meta version": 3, b"file tree": {b"a": leaf(5)}}}),
        UnsafeTorrent,
    ),
    "v2 odd piece length": (v2({b"a": leaf(5)}, piece_length=PIECE + 1), UnsafeTorrent),
    "v2 piece length below 16 KiB": (v2({b"a": leaf(5)}, piece_length=8192), UnsafeTorrent),
    "v2 dotdot": (v2({b"..": {b"a": leaf(5)}}), UnsafePath),
    "v2 slash": (v2({b"a/../../b": leaf(5)}), UnsafePath),
    "v2 no root": (v2({b"a": {b"": {b"length": 5}}}), UnsafeTorrent),
    "v2 short root": (v2({b"a": {b"": {b"length": 5, b"pieces root": b"x"}}}), UnsafeTorrent),
    "v2 file and folder": (v2({b"a": {**leaf(5), b"b": leaf(6)}}), UnsafeTorrent),
    "v2 empty folder": (v2({b"a": {}}), UnsafeTorrent),
    "v2 empty tree": (v2({}), UnsafeTorrent),
    "v2 tree is a list": (v2([]), UnsafeTorrent),
    "v2 symlink": (v2({b"a": {b"": {b"length": 0, b"attr": b"l"}}, b"b": leaf(5)}), UnsafeTorrent),
    "v2 ten million pieces": (v2({b"a": leaf(10_000_000 * PIECE)}), UnsafeTorrent),
    "v2 deep folders": (v2(nested(30)), UnsafePath),
    "hybrid other size": (hybrid([(b"a", 5)], {b"a": leaf(6)}), UnsafeTorrent),
    "hybrid other name": (hybrid([(b"a", 5)], {b"b": leaf(5)}), UnsafeTorrent),
    "hybrid hidden file": (hybrid([(b"a", 5), (b"b", 5)], {b"a": leaf(5)}), UnsafeTorrent),
    "hybrid without padding": (hybrid([(b"a", 5), (b"b", 5)], {b"a": leaf(5), b"b": leaf(5)}), UnsafeTorrent),
    "hybrid in another order": (hybrid([(b"b", 5), (b"a", 5)], {b"a": leaf(5), b"b": leaf(5)}), UnsafeTorrent),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_torrent_is_refused(case):
    data, error = HOSTILE[case]
    with pytest.raises(error) as caught:
        parse_metainfo(data)
    assert caught.value.exit_code == ExitCode.BAD_MANIFEST
    assert all(0 < len(line) < 1000 for line in caught.value.lines())


def test_every_cut_of_a_torrent_is_refused_or_equal():
    data = v1(([b"a"], 5), ([b"b", b"c"], PIECE))
    for length in range(len(data)):
        with pytest.raises(ManifestError):
            parse_metainfo(data[:length])


def test_single_file_torrent_is_named_by_its_file():
    info = {b"name": b"model.bin", b"piece length": PIECE, b"pieces": bytes(40), b"length": PIECE + 1}
    data = encode({b"info": info})
    metainfo = parse_metainfo(data)
    assert metainfo.files == (TorrentFile(0, "model.bin", PIECE + 1, 0),)
    assert metainfo.info_hash_v1 == hashlib.sha1(encode(info)).hexdigest()
    assert (metainfo.info_hash_v2, metainfo.piece_count) == (None, 2)
    assert metainfo.assurance == Assurance.BTV1
    assert metainfo.data == data
    load_parameters(metainfo)


def test_paths_leave_out_the_root_and_indices_count_pad_files():
    data = v1(([b"b", b"c"], 5), ([b".pad", b"16379"], 16379, {b"attr": b"p"}), ([b"a"], 7, {b"attr": b"x"}))
    metainfo = parse_metainfo(data)
    assert metainfo.files == (TorrentFile(0, "b/c", 5, 0), TorrentFile(2, "a", 7, PIECE))
    assert [file.path for file in metainfo.files_in_piece(1)] == ["a"]
    load_parameters(metainfo)


def test_v2_only_torrent_has_roots_and_libtorrents_indices():
    root = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
    piece_length = 2 * PIECE
    metainfo = parse_metainfo(v2({b"a": leaf(5), b"b": {b"c": leaf(7), b"e": leaf(0)}}, piece_length=piece_length))
    assert metainfo.files == (
        TorrentFile(0, "a", 5, 0, root),
        TorrentFile(2, "b/c", 7, piece_length, root),
        TorrentFile(4, "b/e", 0, 2 * piece_length, None),
    )
    assert metainfo.info_hash_v1 is None
    assert metainfo.info_hash == metainfo.info_hash_v2
    assert metainfo.assurance == Assurance.BTV2
    load_parameters(metainfo)


def test_a_torrent_with_which_a_peer_can_crash_libtorrent_is_kept_from_it():
    with pytest.raises(UnsafeTorrent) as refused:
        load_parameters(parse_metainfo(v2({b"a": leaf(PIECE)})))
    assert "16 KiB and a in one of them" in refused.value.detail


def test_unsorted_and_unknown_keys_do_not_change_the_info_hash():
    raw = b"d6:lengthi5e4:name1:a12:piece lengthi16384e6:pieces20:" + bytes(20) + b"3:foo3:bare"
    metainfo = parse_metainfo(b"d7:comment2:hi4:info" + raw + b"e")
    assert metainfo.info_hash_v1 == hashlib.sha1(raw).hexdigest()
    load_parameters(metainfo)


def test_addresses_are_kept_when_usable():
    torrent = {
        b"announce": b"udp://one.example:1/announce",
        b"announce-list": [[b"udp://one.example:1/announce", b"wss://browser.example"], [b"http://two.example/a"], 7],
        b"url-list": [b"http://mirror.example/", b"ftp://old.example/", b"file:///etc/passwd", b"http://x\ny"],
        b"info": {b"name": b"a", b"piece length": PIECE, b"pieces": bytes(20), b"length": 5},
    }
    metainfo = parse_metainfo(encode(torrent))
    assert metainfo.trackers == ("udp://one.example:1/announce", "http://two.example/a")
    assert metainfo.web_seeds == ("http://mirror.example/",)


def test_names_libtorrent_would_mend_never_reach_it():
    """The reason for judging the raw bytes: libtorrent itself makes a harmless name of this one."""
    with pytest.raises(UnsafePath):
        parse_metainfo(v1(([b"..", b"..", b"authorized_keys"], 5)))


def test_what_libtorrent_refuses_is_refused_in_our_words():
    # The pieces root is a leaf's, but the piece layer that a file of two pieces needs belongs to another tree.
    info = {b"name": b"m", b"piece length": PIECE, b"meta version": 2, b"file tree": {b"a": leaf(2 * PIECE)}}
    metainfo = parse_metainfo(encode({b"info": info, b"piece layers": {ROOT: bytes(64)}}))
    with pytest.raises(UnsafeTorrent):
        load_parameters(metainfo)


def test_another_reading_by_libtorrent_is_refused():
    metainfo = parse_metainfo(v1(([b"a"], 5), ([b"b"], 6)))
    moved = tuple(TorrentFile(file.index + 1, file.path, file.size, file.offset) for file in metainfo.files)
    fields = {name: getattr(metainfo, name) for name in Metainfo.__dataclass_fields__}
    for change in ({"files": moved}, {"piece_count": 2}, {"info_hash_v1": "0" * 40}):
        with pytest.raises(UnsafeTorrent):
            load_parameters(Metainfo(**{**fields, **change}))


def test_the_manifest_of_a_torrent_knows_sizes_only():
    manifest = metainfo_to_manifest(parse_metainfo(v1(([b"b"], 5), ([b"a"], 6))))
    assert [(entry.path, entry.size, entry.digests) for entry in manifest.files] == [("a", 6, ()), ("b", 5, ())]
    assert manifest.info.name == "model"
