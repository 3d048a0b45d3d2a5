"""Peers named by people: ``host:port`` to addresses libtorrent can connect to."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable

from mistral_fetch.errors import ConfigError

_PEER = re.compile(r"(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^:\[\]\s]+)):(?P<port>\d{1,5})")
Endpoint = tuple[str, int]


def parse_peer(text: str) -> Endpoint:
    """Return the host and port of ``host:port`` or ``[ipv6]:port``.

    Raises:
        ConfigError: It is neither.
    """
    match = _PEER.fullmatch(text.strip())
    port = int(match["port"]) if match else 0
    if match is None or not 0 < port < 65536:
        raise ConfigError(
            f"not a peer's address: {text[:80]!r}",
            detail="expected host:port or [ipv6]:port, with a port from 1 to 65535",
            hint="for example --peer 192.0.2.7:6881",
        )
    return match["v6"] or match["host"], port


def format_peer(endpoint: Endpoint) -> str:
    """Return ``host:port``, with brackets around IPv6."""
    host, port = endpoint
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def resolve_peers(peers: Iterable[str], *, looks_up: bool = True) -> list[Endpoint]:
    """Return numeric endpoints, each once; names that cannot be resolved now are left out.

    Args:
        peers: ``host:port`` each.
        looks_up: Whether names may be looked up; behind a proxy that would tell this network who is asked.

    Raises:
        ConfigError: A peer is not ``host:port``.
    """
    endpoints: dict[Endpoint, None] = {}
    for host, port in map(parse_peer, peers):
        for address in _addresses(host, looks_up):
            endpoints[address, port] = None
    return list(endpoints)


def needs_lookup(peer: str) -> bool:
    """Return whether ``host:port`` has a name for a host, rather than an address."""
    try:
        ipaddress.ip_address(parse_peer(peer)[0])
    except ValueError:
        return True
    return False


def _addresses(host: str, looks_up: bool) -> list[str]:
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        pass
    if not looks_up:
        return []
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # a label of more than 63 characters is a UnicodeError
        return []
    return [str(entry[4][0]) for entry in found]
