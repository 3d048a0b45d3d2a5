"""Magnet links, the mangled ones included. Every repair is told."""

from __future__ import annotations

import contextlib
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mistral_fetch.bittorrent.magnet import MAX_MAGNET_LENGTH, Magnet, magnet_uri, parse_magnet
from mistral_fetch.bittorrent.peers import format_peer, parse_peer, resolve_peers
from mistral_fetch.errors import ConfigError, ExitCode, UnsafeTorrent

V1 = "208b101a0f51514ecf285885a8b0f6fb1a1e4d7d"
V2 = "ab" * 32
BASE32 = "ECFRAGQPKFIU5TZILCC2RMHW7MNB4TL5"
TRACKER = "udp://tracker.opentrackr.org:1337/announce"
XT = f"magnet:?xt=urn:btih:{V1}"

PLAIN = {
    "hex": (XT, Magnet(V1, None)),
    "upper case": (f"MAGNET:?XT=urn:btih:{V1.upper()}", Magnet(V1, None)),
    "base 32": (f"magnet:?xt=urn:btih:{BASE32}", Magnet(V1, None)),
    "lower base 32": (f"magnet:?xt=urn:btih:{BASE32.lower()}", Magnet(V1, None)),
    "v2": (f"magnet:?xt=urn:btmh:1220{V2}", Magnet(None, V2)),
    "hybrid": (f"{XT}&xt=urn:btmh:1220{V2}", Magnet(V1, V2)),
    "numbered topics": (f"magnet:?xt.1=urn:btih:{V1}&xt.2=urn:btmh:1220{V2}", Magnet(V1, V2)),
    "encoded topic": (f"magnet:?xt=urn%3Abtih%3A{V1}", Magnet(V1, None)),
    "name": (f"{XT}&dn=mistral-7B-v0.1", Magnet(V1, None, name="mistral-7B-v0.1")),
    "name with plus": (f"{XT}&dn=a+b%20c", Magnet(V1, None, name="a b c")),
    "trackers once": (
        f"{XT}&tr={quote(TRACKER, safe='')}&tr.1={quote(TRACKER)}",
        Magnet(V1, None, trackers=(TRACKER,)),
    ),
    "raw tracker": (f"{XT}&tr={TRACKER}", Magnet(V1, None, trackers=(TRACKER,))),
    "web seed": (f"{XT}&ws=http%3A%2F%2Fm.example%2Fa%2Fb", Magnet(V1, None, web_seeds=("http://m.example/a/b",))),
    "peers": (f"{XT}&x.pe=127.0.0.1:6881&x.pe=[::1]:7", Magnet(V1, None, peers=("127.0.0.1:6881", "[::1]:7"))),
    "a peer's port 65535": (f"{XT}&x.pe=127.0.0.1:65535", Magnet(V1, None, peers=("127.0.0.1:65535",))),
    "unknown topics and fields": (f"{XT}&xt=urn:sha1:abc&xl=5&foo&=&so=0-3", Magnet(V1, None)),
}

MANGLED = {
    "linkified by X": (f"{XT}&dn=m&tr=udp%3A%2F%http://2Ftracker.opentrackr.org%3A1337%2Fannounce", (TRACKER,), 1),
    "linkified with https": (f"{XT}&tr=udp%3A%2F%https://2Ftracker.opentrackr.org%3A1337%2Fannounce", (TRACKER,), 1),
    "two linkified": (
        f"{XT}&tr=udp%3A%2F%http://2Fopentracker.i2p.rocks%3A6969%2Fannounce"
        "&tr=http%3A%2F%http://2Ftracker.openbittorrent.com%3A80%2Fannounce",
        ("udp://opentracker.i2p.rocks:6969/announce", "http://tracker.openbittorrent.com:80/announce"),
        1,
    ),
    "shortened": (f"{XT}&tr={TRACKER}&tr=https%3A%2F%https://t.co/HAadNvH1t0", (TRACKER,), 1),
    "shortened with a tail": (f"{XT}&tr={TRACKER}&tr=https://t.co/HAadNvH1t0%2Fannounce", (TRACKER,), 1),
    "encoded twice": (f"{XT}&tr={quote(quote(TRACKER, safe=''), safe='')}", (TRACKER,), 1),
    "encoded as a whole": (quote(f"{XT}&tr={TRACKER}", safe=""), (TRACKER,), 1),
    "ampersands from HTML": (f"{XT}&amp;dn=m&amp;tr={quote(TRACKER, safe='')}", (TRACKER,), 1),
    "text after it": (f"  {XT}&tr={TRACKER}\n\nRELEASE and more words", (TRACKER,), 1),
    "in angle brackets": (f"<{XT}&tr={TRACKER}>", (TRACKER,), 0),
    "a tracker for browsers": (f"{XT}&tr={TRACKER}&tr=wss%3A%2F%2Fwstracker.online", (TRACKER,), 1),
    "half a tracker": (f"{XT}&tr={TRACKER}&tr=udp%3A", (TRACKER,), 1),
    "all at once": (
        f"{XT}&amp;tr=udp%3A%2F%http://2Ftracker.opentrackr.org%3A1337%2Fannounce&amp;tr=https://t.co/x",
        (TRACKER,),
        3,
    ),
}

NONSENSE = {
    "empty": "",
    "a word": "mistral-7b",
    "an address": "https://example.org/model.torrent",
    "no info-hash": "magnet:?dn=model",
    "zeros": f"magnet:?xt=urn:btih:{'0' * 40}",
    "short info-hash": f"magnet:?xt=urn:btih:{V1[:-1]}",
    "not hex": f"magnet:?xt=urn:btih:{'z' * 40}",
    "base 32 of other digits": f"magnet:?xt=urn:btih:{'1' * 32}",
    "md5 as btmh": f"magnet:?xt=urn:btmh:1110{V2[:32]}",
    "two that differ": f"{XT}&xt=urn:btih:{'1' * 40}",
    "endless": f"{XT}&dn={'a' * MAX_MAGNET_LENGTH}",
}


@pytest.mark.parametrize("case", PLAIN)
def test_plain_magnet_is_read_and_not_repaired(case):
    text, expected = PLAIN[case]
    assert parse_magnet(text) == expected


@pytest.mark.parametrize("case", MANGLED)
def test_mangled_magnet_is_repaired_and_told(case):
    text, trackers, repairs = MANGLED[case]
    magnet = parse_magnet(text)
    assert (magnet.info_hash_v1, magnet.trackers) == (V1, trackers)
    assert len(magnet.repairs) == repairs
    assert all("\n" not in repair for repair in magnet.repairs)


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_refused(case):
    with pytest.raises(UnsafeTorrent) as caught:
        parse_magnet(NONSENSE[case])
    assert caught.value.exit_code == ExitCode.BAD_MANIFEST
    assert max(map(len, caught.value.lines())) < 500


@pytest.mark.parametrize("case", PLAIN)
def test_written_links_read_the_same(case):
    magnet = parse_magnet(PLAIN[case][0])
    assert parse_magnet(magnet_uri(magnet)) == magnet


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text):
    for link in (text, XT + text, f"{XT}&tr={text}"):
        with contextlib.suppress(UnsafeTorrent):
            assert parse_magnet(link).info_hash


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":1", "host:0", "host:65536", "a b:1", "::1:6881", "[::1]", "h:x"]
)
def test_what_is_no_peer_is_refused(text):
    with pytest.raises(ConfigError):
        parse_peer(text)


def test_peers_are_resolved_once():
    assert resolve_peers(["127.0.0.1:1", "127.0.0.1:1", "[::1]:2"]) == [("127.0.0.1", 1), ("::1", 2)]
    assert resolve_peers([f"{'a' * 70}.invalid:1"]) == []
    assert [format_peer(parse_peer(text)) for text in ("[::1]:2", "h:1")] == ["[::1]:2", "h:1"]


@pytest.mark.parametrize("port", ["0", "65536", "99999", "07", "x"])
def test_an_impossible_peer_is_left_out_and_said_so(port):
    magnet = parse_magnet(f"{XT}&x.pe=127.0.0.1:{port}&x.pe=127.0.0.1:7")
    assert magnet.peers == ("127.0.0.1:7",)
    assert len(magnet.repairs) == 1


@pytest.mark.parametrize(
    "text",
    [
        f"{XT}&tr=udp%253A%252F%252Ft%1b[31m",
        f"{XT}&ws=https://t.co/%1b]0;title%07",
        f"{XT}&tr=%1b[2J",
        f"{XT} \x1b[2J",
        f"{XT}&tr=http%253A%252F%252Ft%c2%9b31m",
    ],
)
def test_repairs_never_carry_control_characters(text: str) -> None:
    magnet = parse_magnet(text)
    assert magnet.repairs
    assert all(repair.isprintable() for repair in magnet.repairs)


@pytest.mark.parametrize("topic", ["%1b[31mEVIL%07", "%c2%9b2J", "%e2%80%ae"])
def test_refusals_never_carry_control_characters(topic: str) -> None:
    with pytest.raises(UnsafeTorrent) as caught:
        parse_magnet(f"magnet:?xt={topic}")
    assert all(line.isprintable() for line in caught.value.lines())
