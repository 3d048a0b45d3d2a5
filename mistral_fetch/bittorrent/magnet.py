"""Read magnet links (BEP 9, 53), the mangled ones that social networks make included. Pure text to values.

Every repair is told in one line: what a person pasted is not what is used, so the person must be able to see it.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

from mistral_fetch.bittorrent.metainfo import MAX_ADDRESSES
from mistral_fetch.errors import UnsafeTorrent, printable

MAX_MAGNET_LENGTH = 64 * 1024
_V1_HEX = re.compile(r"urn:btih:([0-9a-f]{40})", re.IGNORECASE)
_V1_BASE32 = re.compile(r"urn:btih:([a-z2-7]{32})", re.IGNORECASE)
_V2_HEX = re.compile(r"urn:btmh:1220([0-9a-f]{64})", re.IGNORECASE)
# X sees a domain in "%2Ftracker.example" without its percent sign and puts a scheme in front of it:
# udp%3A%2F%2Ftracker.example becomes udp%3A%2F%http://2Ftracker.example
_LINKIFIED = re.compile(r"%https?://(?=[0-9A-Fa-f]{2})")
_SHORTENED = re.compile(r"https?://t\.co/", re.IGNORECASE)
_TRACKER = re.compile(r"(?:udp|https?)://[^\s/]+(?:/\S*)?", re.IGNORECASE)
_WEB_SEED = re.compile(r"https?://[^\s/]+(?:/\S*)?", re.IGNORECASE)
_PORT = r"(?:[1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d{2}|655[0-2]\d|6553[0-5])"
_PEER = re.compile(rf"(?:\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):{_PORT}")


@dataclass(frozen=True)
class Magnet:
    """What a magnet link says. ``repairs`` tells, one line each, what had to be mended to read it."""

    info_hash_v1: str | None
    info_hash_v2: str | None
    name: str = ""
    trackers: tuple[str, ...] = ()
    web_seeds: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()

    @property
    def info_hash(self) -> str:
        """Return the info-hash people know the torrent by: v1 where there is one."""
        return self.info_hash_v1 or self.info_hash_v2 or ""


def parse_magnet(text: str) -> Magnet:
    """Return what the link says, mended where it was mangled.

    Raises:
        UnsafeTorrent: Not a magnet link, without an info-hash, or with two that exclude each other.
    """
    if len(text) > MAX_MAGNET_LENGTH:
        raise _refuse(f"at most {MAX_MAGNET_LENGTH} characters", str(len(text)))
    repairs: list[str] = []
    query = _query(_repair_whole(text, repairs))
    fields = [(key, _decode(key, value, repairs)) for key, value in query]
    v1, v2 = _info_hashes([value for key, value in fields if key == "xt"])
    return Magnet(
        info_hash_v1=v1,
        info_hash_v2=v2,
        name=next((_clean(value) for key, value in fields if key == "dn"), ""),
        trackers=_addresses(fields, "tr", _TRACKER, repairs),
        web_seeds=_addresses(fields, "ws", _WEB_SEED, repairs),
        peers=_addresses(fields, "x.pe", _PEER, repairs),
        repairs=tuple(dict.fromkeys(map(printable, repairs))),
    )


def magnet_uri(magnet: Magnet) -> str:
    """Return the link in its plain, unmangled form."""
    fields = []
    if magnet.info_hash_v1:
        fields.append(f"xt=urn:btih:{magnet.info_hash_v1}")
    if magnet.info_hash_v2:
        fields.append(f"xt=urn:btmh:1220{magnet.info_hash_v2}")
    fields += [f"dn={quote(magnet.name, safe='')}"] if magnet.name else []
    fields += [f"tr={quote(tracker, safe='')}" for tracker in magnet.trackers]
    fields += [f"ws={quote(seed, safe='')}" for seed in magnet.web_seeds]
    fields += [f"x.pe={peer}" for peer in magnet.peers]
    return "magnet:?" + "&".join(fields)


def _repair_whole(text: str, repairs: list[str]) -> str:
    """Undo what happened to the link as a whole, outermost damage first."""
    link = text.strip().strip("<>\"'`")
    if link.lower().startswith("magnet%3a"):
        link = unquote(link)
        repairs.append("decoded a magnet link that was percent-encoded as a whole")
    if "&amp;" in link:
        link = link.replace("&amp;", "&")
        repairs.append("replaced &amp; by & (copied from HTML)")
    words = link.split()
    if len(words) > 1:
        link = words[0]
        repairs.append(f"ignored what follows the link: {' '.join(words[1:])[:60]!r}")
    if _LINKIFIED.search(link):
        link = _LINKIFIED.sub("%", link)
        repairs.append("took out http:// that a social network had put inside a tracker's address")
    return link


def _query(link: str) -> list[tuple[str, str]]:
    scheme, _, query = link.partition(":?")
    if scheme.lower() != "magnet":
        raise _refuse("a link that begins with magnet:?", repr(link[:40]))
    fields = []
    for field in query.split("&"):
        key, _, value = field.partition("=")
        fields.append((re.sub(r"\.\d+$", "", key.lower()), value))  # xt.1 and tr.2 number repeated fields
    return fields


def _decode(key: str, value: str, repairs: list[str]) -> str:
    decoded = unquote(value.replace("+", " ") if key == "dn" else value)
    if key in {"xt", "tr", "ws"} and re.search(r"%(?:3a|2f)", decoded, re.IGNORECASE):
        again = unquote(decoded)
        # A web seed may rightly hold %2F in its path; a scheme that is still encoded is the sure sign.
        if key != "ws" or "://" not in decoded:
            repairs.append(f"decoded an address that was percent-encoded twice: {again[:80]}")
            return again
    return decoded


def _info_hashes(topics: list[str]) -> tuple[str | None, str | None]:
    v1: set[str] = set()
    v2: set[str] = set()
    for topic in topics:
        if match := _V1_HEX.fullmatch(topic):
            v1.add(match[1].lower())
        elif match := _V1_BASE32.fullmatch(topic):
            v1.add(_from_base32(match[1]))
        elif match := _V2_HEX.fullmatch(topic):
            v2.add(match[1].lower())
    v1.discard("0" * 40)
    v2.discard("0" * 64)
    if not v1 and not v2:
        shown = ", ".join(topics)[:100] or "no xt field"
        raise _refuse("an info-hash: xt=urn:btih: and 40 hex digits, or xt=urn:btmh:1220 and 64", shown)
    if len(v1) > 1 or len(v2) > 1:
        raise _refuse("one info-hash", f"several that differ: {', '.join(sorted(v1 | v2))}")
    return next(iter(v1), None), next(iter(v2), None)


def _from_base32(text: str) -> str:
    try:
        return base64.b32decode(text.upper()).hex()
    except binascii.Error as error:
        raise _refuse("an info-hash in base 32", text) from error


def _addresses(
    fields: list[tuple[str, str]], key: str, pattern: re.Pattern[str], repairs: list[str]
) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for name, value in fields:
        if name != key or not value:
            continue
        address = value.strip()
        if _SHORTENED.search(address):
            repairs.append(f"dropped a shortened address that hides its target: {address[:80]}")
        elif pattern.fullmatch(address) and address.isprintable():
            found[address] = None
        else:
            repairs.append(f"dropped an address that cannot be used: {address[:80]!r}")
    return tuple(found)[:MAX_ADDRESSES]


def _clean(name: str) -> str:
    return "".join(character for character in name if character.isprintable())[:255]


def _refuse(expected: str, got: str) -> UnsafeTorrent:
    return UnsafeTorrent(
        "this is not a usable magnet link",
        detail=f"expected {expected}, got {printable(got)}",
        hint="copy the link from the publisher's own page, in quotes; a .torrent file works as well",
    )
