"""Hostile torrents, peers and web seeds through the command line: refused with the right code, or survived exactly."""

from __future__ import annotations

import hashlib
import random
import stat
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mistral_fetch.bittorrent.bencode import decode, encode
from mistral_fetch.bittorrent.metainfo import parse_metainfo
from mistral_fetch.bittorrent.seed import Seeder
from mistral_fetch.bittorrent.settings import SwarmSettings
from mistral_fetch.publish.build import Publication
from mistral_fetch.simulators.mirror import Fault, MirrorSimulator
from mistral_fetch.simulators.publisher import PublisherSimulator
from tests.attacks.metadata_peer import MetadataPeer
from tests.attacks.test_pull import CommandLine

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(60)]

MIB = 1024 * 1024
MODEL = PublisherSimulator({"weights.bin": random.Random(5).randbytes(9 * MIB), "config.json": b"{}"})
SEEDING = SwarmSettings(listen_interfaces="127.0.0.1:0", use_trackers=False, uploads=True)
Torrent = dict[bytes, Any]


class Attack:
    """A publication to tamper with, the seeds of it, and the program that pulls it."""

    def __init__(self, given: Path, program: CommandLine) -> None:
        self.given = given
        self.program = program
        self.publication: Publication = MODEL.publish(given)
        self._seeders: list[Seeder] = []

    def torrent(self, change: Callable[[Torrent], object], *, is_hybrid: bool = False) -> str:
        """Write a changed torrent and return where it is."""
        honest = self.publication.torrent_path if is_hybrid else self.publication.plain_torrent_path
        torrent: Torrent = decode(honest.read_bytes())
        change(torrent)
        path = self.given / "hostile.torrent"
        path.write_bytes(encode(torrent))
        return str(path)

    def seed(self, torrent: str, files: dict[str, bytes] | None = None) -> str:
        """Seed a torrent, with other files where they are given, and return the peer's address."""
        directory = self.given / "model"
        if files is not None:
            directory = self.given / f"lies{len(self._seeders)}"
            for path, data in files.items():
                (directory / path).parent.mkdir(parents=True, exist_ok=True)
                (directory / path).write_bytes(data)
        metainfo = parse_metainfo(Path(torrent).read_bytes())
        seeder = Seeder(metainfo, directory, SEEDING, skips_checks=True)
        seeder.wait_until_seeding(10)
        self._seeders.append(seeder)
        return f"127.0.0.1:{seeder.port}"

    def assert_pulls(self, ref: str, *arguments: str) -> None:
        code, out, err = self.program.pull(ref, *arguments)
        assert code == 0, err
        directory = Path(out.strip())
        assert {path: (directory / path).read_bytes() for path in MODEL.files} == MODEL.files
        assert list(self.program.home.glob("partial/*")) == []

    def assert_fails(self, codes: set[int], ref: str, *arguments: str) -> str:
        code, out, err = self.program.pull(ref, *arguments)
        assert code in codes, err
        assert out == ""
        assert len(err.splitlines()) == 3, err
        assert err.replace("\n", "").isprintable()
        self.program.assert_nothing_published()
        return err

    def close(self) -> None:
        for seeder in self._seeders:
            seeder.close()


@pytest.fixture
def attack(own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Attack]:
    monkeypatch.setenv("MISTRAL_FETCH_PEER_TIMEOUT", "3")
    monkeypatch.setenv("MISTRAL_FETCH_STALL_TIMEOUT", "12")
    (tmp_path / "given").mkdir()
    with closing(Attack(tmp_path / "given", CommandLine(own_home))) as attack:
        yield attack


def spoiled(data: bytes) -> bytes:
    """Return other bytes of the same length, wrong in every 64 KiB."""
    wrong = bytearray(data)
    for at in range(0, len(wrong), 65536):
        wrong[at] ^= 0xFF
    return bytes(wrong)


def test_a_peer_that_sends_other_bytes_is_integrity_and_named(attack: Attack) -> None:
    torrent = attack.torrent(lambda _: None)
    liar = attack.seed(torrent, {path: spoiled(data) for path, data in MODEL.files.items()})
    err = attack.assert_fails({32}, torrent, "--peer", liar)
    assert liar in err
    attack.assert_pulls(torrent, "--peer", attack.seed(torrent))


def with_web_seed(url: str) -> Callable[[Torrent], None]:
    return lambda torrent: torrent.update({b"url-list": [url.encode()]})


def lying_mirror() -> MirrorSimulator:
    return MirrorSimulator({f"model/{path}": spoiled(data) for path, data in MODEL.files.items()})


@pytest.mark.parametrize("is_hybrid", [False, True], ids=["plain", "hybrid"])
def test_a_web_seed_that_lies_alone_brings_nothing(attack: Attack, is_hybrid: bool) -> None:
    with lying_mirror() as mirror:
        torrent = attack.torrent(with_web_seed(f"{mirror.base_url}/"), is_hybrid=is_hybrid)
        began = time.monotonic()
        attack.assert_fails({5, 6, 32}, torrent)
        assert time.monotonic() - began < 30
        assert sum(mirror.bytes_sent(f"model/{path}") for path in MODEL.files) < 20 * 9 * MIB


@pytest.mark.parametrize("is_hybrid", [False, True], ids=["plain", "hybrid"])
def test_a_web_seed_that_lies_beside_an_honest_peer_costs_time_only(attack: Attack, is_hybrid: bool) -> None:
    with lying_mirror() as mirror:
        torrent = attack.torrent(with_web_seed(f"{mirror.base_url}/"), is_hybrid=is_hybrid)
        attack.assert_pulls(torrent, "--peer", attack.seed(torrent))


def test_a_web_seed_that_lies_beside_an_honest_one(attack: Attack) -> None:
    with lying_mirror() as liar, MirrorSimulator(attack.given) as honest:
        addresses = [f"{mirror.base_url}/".encode() for mirror in (liar, honest)]
        attack.assert_pulls(attack.torrent(lambda torrent: torrent.update({b"url-list": addresses})))


BREAKING = {"not there": Fault(status=404), "silent": Fault(hang_at=-1), "cut short": Fault(end_at=1000)}


@pytest.mark.parametrize("fault", BREAKING.values(), ids=BREAKING)
def test_a_web_seed_that_breaks_beside_an_honest_peer(attack: Attack, fault: Fault) -> None:
    with MirrorSimulator(attack.given) as mirror:
        for path in MODEL.files:
            mirror.always(f"model/{path}", fault)
        torrent = attack.torrent(with_web_seed(f"{mirror.base_url}/"))
        attack.assert_pulls(torrent, "--peer", attack.seed(torrent))


METADATA = {
    "never comes": (None, 20_000),
    "claims two gigabytes": (None, 2**31 - 1),
    "is of another torrent": (b"d6:lengthi5e4:name1:a12:piece lengthi16384e6:pieces20:" + bytes(20) + b"e", None),
    "is no bencoding": (b"x" * 40_000, None),
    "is cut short": (b"d6:length", 30_000),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_is_not_the_torrent_s_ends_in_time(attack: Attack, name: str) -> None:
    metadata, size = METADATA[name]
    with closing(MetadataPeer(metadata, size)) as peer:
        began = time.monotonic()
        err = attack.assert_fails({5, 6}, f"magnet:?xt=urn:btih:{'1' * 40}", "--peer", peer.address)
        assert time.monotonic() - began < 15
        assert peer.requests or (size or 0) > 2**30
    assert "metadata" in err


def test_metadata_that_has_the_right_hash_and_wrong_names_is_refused(attack: Attack) -> None:
    info = {b"name": b"m", b"piece length": 16384, b"pieces": bytes(20), b"length": 5}
    raw = encode({**info, b"name": b"../m"})
    with closing(MetadataPeer(raw)) as peer:
        attack.assert_fails({20}, f"magnet:?xt=urn:btih:{hashlib.sha1(raw).hexdigest()}", "--peer", peer.address)


def _v1(torrent: Torrent) -> Torrent:
    info: Torrent = torrent[b"info"]
    return info


def _pad(size: int) -> Callable[[Torrent], None]:
    def change(torrent: Torrent) -> None:
        info = _v1(torrent)
        info[b"files"].append({b"attr": b"p", b"length": size, b"path": [b".pad", b"x"]})
        total = sum(file[b"length"] for file in info[b"files"])
        info[b"pieces"] = bytes(20 * min(-(-total // info[b"piece length"]), 1_500_000))

    return change


def _first_in_tree(torrent: Torrent) -> Torrent:
    entry: Torrent = torrent[b"info"][b"file tree"][b"weights.bin"][b""]
    return entry


def _wrong_layers(torrent: Torrent) -> None:
    root, layer = next(iter(torrent[b"piece layers"].items()))
    torrent[b"piece layers"] = {root: bytes(32) + layer[32:]}


HOSTILE: dict[str, tuple[Callable[[Torrent], object], bool, set[int]]] = {
    "a pad file of a terabyte": (_pad(1 << 40), False, {20}),
    "a pad file as large as a piece": (_pad(4 * MIB), False, {20}),
    "a pad file that leaves its folder": (
        lambda t: _v1(t)[b"files"].append({b"attr": b"p", b"length": 0, b"path": [b"..", b"x"]}),
        False,
        {20},
    ),
    "a link that hides among attributes": (lambda t: _v1(t)[b"files"][0].update({b"attr": b"hxl"}), False, {20}),
    "attributes that are a list": (lambda t: _v1(t)[b"files"][0].update({b"attr": [b"p"]}), False, {20}),
    "a length that is negative": (lambda t: _v1(t)[b"files"][0].update({b"length": -1}), False, {20}),
    "names that differ by case": (
        lambda t: _v1(t)[b"files"].append({b"length": 0, b"path": [b"WEIGHTS.BIN"]}),
        False,
        {20},
    ),
    "a half that names another file": (
        lambda t: _v1(t)[b"files"][0].update({b"path": [b"other.json"]}),
        True,
        {20},
    ),
    "halves of two sizes": (lambda t: _first_in_tree(t).update({b"length": 9 * MIB - 1}), True, {20}),
    "v2 layers that do not lead to their root": (_wrong_layers, True, {20}),
    "no v2 layers": (lambda t: t.update({b"piece layers": {}}), True, {20, 5, 6}),
    "v2 layers that are a number": (lambda t: t.update({b"piece layers": 7}), True, {20, 5, 6}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_torrent_is_refused_before_a_byte_comes(attack: Attack, name: str) -> None:
    change, is_hybrid, codes = HOSTILE[name]
    torrent = attack.torrent(change, is_hybrid=is_hybrid)
    attack.assert_fails(codes, torrent, "--peer", "127.0.0.1:9")
    assert not [path for path in attack.program.home.glob("partial/*/data*") if path.stat().st_blocks]


def test_halves_whose_hashes_disagree_publish_nothing(attack: Attack) -> None:
    """The v1 half is another model's; whoever has that one passes v1 and fails v2."""
    other = PublisherSimulator({path: spoiled(data) for path, data in MODEL.files.items()})
    theirs = decode(other.publish(attack.given / "other").torrent_path.read_bytes())
    torrent = attack.torrent(lambda t: _v1(t).update({b"pieces": theirs[b"info"][b"pieces"]}), is_hybrid=True)
    peer = attack.seed(torrent, other.files)
    attack.assert_fails({6, 32}, torrent, "--peer", peer)
    attack.assert_fails({6, 32}, torrent, "--peer", attack.seed(torrent))


def test_attributes_that_mean_nothing_here_change_nothing(attack: Attack) -> None:
    torrent = attack.torrent(lambda t: [file.update({b"attr": b"hx"}) for file in _v1(t)[b"files"]])
    attack.assert_pulls(torrent, "--peer", attack.seed(torrent))
    for blob in attack.program.home.glob("blobs/sha256/*/*"):
        assert stat.S_IMODE(blob.stat().st_mode) == 0o444


BOMBS = {
    "ten million pieces": lambda: encode(
        {
            b"info": {
                b"name": b"m",
                b"piece length": 16384,
                b"length": 16384 * 10_000_000,
                b"pieces": bytes(20 * 10_000_000),
            }
        }
    ),
    "ten million values": lambda: b"d4:infol" + b"de" * 10_000_000 + b"ee",
    "a hundred thousand keys": lambda: b"d" + b"".join(b"7:%07d0:" % n for n in range(100_000)) + b"e",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_quickly_and_in_little_memory(attack: Attack, name: str) -> None:
    path = attack.given / "bomb.torrent"
    path.write_bytes(BOMBS[name]())
    tracemalloc.start()
    began = time.monotonic()
    try:
        attack.assert_fails({2, 20}, str(path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.monotonic() - began < 10
    assert peak < 150 * MIB
