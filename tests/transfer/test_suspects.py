"""Who sent a wrong file: doubts, asking alone, and naming liars by their pieces."""

from __future__ import annotations

import hashlib

import pytest

from mistral_fetch.events import SourceLied
from mistral_fetch.manifest import FileEntry, MirrorUrl, PieceHashes
from mistral_fetch.spans import PieceGrid
from mistral_fetch.store.partial_notes import CommittedBlob
from mistral_fetch.transfer.suspects import Suspects, sent_pieces

GRID = PieceGrid(250, 100)
RIGHT = tuple(hashlib.sha256(bytes([number])).hexdigest() for number in range(3))
WRONG = "f" * 64
BLOB = CommittedBlob("a" * 64, 250, PieceHashes(100, RIGHT))


def suspects(*urls: str) -> Suspects:
    mirrors = tuple(MirrorUrl(url, priority) for priority, url in enumerate(urls))
    return Suspects(FileEntry("w.bin", 250, (), None, mirrors))


def abc() -> Suspects:
    return suspects("http://a.example/w", "https://b.example/w", "http://c.example/w")


def asked(who: Suspects) -> list[str]:
    return [mirror.url for mirror in who.asked().mirrors]


def liars(who: Suspects, blob: CommittedBlob = BLOB) -> dict[str, SourceLied]:
    return {lie.source: lie for lie in who.liars(blob, GRID)}


def test_as_long_as_nothing_was_wrong_everybody_is_asked() -> None:
    who = abc()
    assert who.asked() is who.entry
    assert liars(who) == {}


def test_each_is_asked_alone_in_the_manifest_s_order() -> None:
    who = abc()
    order = []
    while who.ask_next_alone():
        order.append(asked(who))
        who.drop(who.alone)
    assert order == [["http://a.example/w"], ["https://b.example/w"], ["http://c.example/w"]]
    assert who.last_dropped == "c.example"


def test_priority_decides_not_the_place_in_the_file() -> None:
    mirrors = (MirrorUrl("http://late.example/w", 9), MirrorUrl("http://early.example/w", 1))
    who = Suspects(FileEntry("w.bin", 250, (), None, mirrors))
    assert who.ask_next_alone()
    assert who.alone == "early.example"


def test_a_host_that_was_dropped_before_is_not_asked_alone() -> None:
    who = abc()
    who.drop("a.example")
    assert who.ask_next_alone()
    assert who.alone == "b.example"


def test_all_addresses_of_a_host_are_asked_and_dropped_together() -> None:
    who = suspects("http://a.example/1", "http://b.example/w", "http://a.example/2")
    assert who.ask_next_alone()
    assert asked(who) == ["http://a.example/1", "http://a.example/2"]
    who.drop("a.example")
    assert who.ask_next_alone()
    assert asked(who) == ["http://b.example/w"]


def test_ports_are_hosts_of_their_own() -> None:
    who = suspects("http://127.0.0.1:1001/w", "http://127.0.0.1:1002/w")
    assert who.ask_next_alone()
    assert asked(who) == ["http://127.0.0.1:1001/w"]


@pytest.mark.parametrize("urls", [(), ("ftp://a.example/w",), ("http://",)])
def test_where_nobody_is_left_it_says_so(urls: tuple[str, ...]) -> None:
    who = suspects(*urls)
    assert not who.ask_next_alone()
    assert who.alone == ""


def test_a_liar_in_a_mixture_is_named_with_its_first_wrong_piece() -> None:
    who = abc()
    who.doubt({2: ("b.example", WRONG), 1: ("b.example", WRONG), 0: ("a.example", RIGHT[0])})
    (lie,) = who.liars(BLOB, GRID)
    assert (lie.source, lie.path, lie.where) == ("b.example", "w.bin", "piece 1 at bytes [100, 200)")
    assert (lie.expected, lie.actual) == (f"sha256:{RIGHT[1]}", f"sha256:{WRONG}")


def test_several_mixtures_are_remembered() -> None:
    who = abc()
    who.doubt({0: ("a.example", WRONG)})
    who.doubt({0: ("b.example", RIGHT[0]), 2: ("c.example", WRONG)})
    assert list(liars(who)) == ["a.example", "c.example"]


def test_who_was_dropped_is_not_named_again() -> None:
    who = abc()
    who.doubt({0: ("a.example", WRONG)})
    who.drop("a.example")
    assert liars(who) == {}


def test_pieces_of_another_grid_prove_nothing() -> None:
    who = abc()
    who.doubt({0: ("a.example", WRONG)})
    assert liars(who, CommittedBlob("a" * 64, 250, PieceHashes(50, RIGHT + RIGHT))) == {}


def test_senders_are_known_by_their_hosts() -> None:
    sent = sent_pieces({0: ("http://a.example/x", "1"), 1: ("a torrent", "2")})
    assert sent == {0: ("a.example", "1"), 1: ("a torrent", "2")}
