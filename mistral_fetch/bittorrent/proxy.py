"""A proxy for the swarm: everything through it, or nothing at all.

libtorrent connects to peers, web seeds and http trackers through a proxy, names included. What cannot go that way
(udp trackers, uTP, the DHT, local discovery, port mapping, incoming connections, names of peers that this machine
would look up) is left out while a proxy is set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

import libtorrent as lt

from mistral_fetch.errors import SwarmError

_TYPES = {
    "socks5": (lt.proxy_type_t.socks5, lt.proxy_type_t.socks5_pw),
    "socks5h": (lt.proxy_type_t.socks5, lt.proxy_type_t.socks5_pw),
    "http": (lt.proxy_type_t.http, lt.proxy_type_t.http_pw),
}
_DEFAULT_PORTS = {"socks5": 1080, "socks5h": 1080, "http": 80}


@dataclass(frozen=True)
class Proxy:
    """A proxy's address and, where it wants them, credentials."""

    scheme: str
    host: str
    port: int
    username: str = ""
    password: str = ""


def parse_proxy(url: str) -> Proxy:
    """Return the proxy that ``url`` names.

    Raises:
        SwarmError: The swarm cannot use such a proxy.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in _TYPES or not parts.hostname:
        raise SwarmError(
            "the swarm cannot be reached through this proxy",
            detail=f"expected socks5://HOST:PORT or http://HOST:PORT, got {parts.scheme or 'no scheme'}://…",
            hint="fetch with --via http, or name another proxy; without one, peers see this machine's address",
        )
    port = _DEFAULT_PORTS[parts.scheme] if port is None else port
    return Proxy(parts.scheme, parts.hostname, port, unquote(parts.username or ""), unquote(parts.password or ""))


def proxy_settings(proxy: Proxy) -> dict[str, Any]:
    """Return libtorrent's settings that send everything through ``proxy``."""
    plain, with_password = _TYPES[proxy.scheme]
    return {
        "proxy_type": int(with_password if proxy.username else plain),
        "proxy_hostname": proxy.host,
        "proxy_port": proxy.port,
        "proxy_username": proxy.username,
        "proxy_password": proxy.password,
        "proxy_hostnames": True,
        "proxy_peer_connections": True,
        "proxy_tracker_connections": True,
        "enable_dht": False,
        "enable_lsd": False,
        "enable_upnp": False,
        "enable_natpmp": False,
        "enable_incoming_utp": False,
        "enable_outgoing_utp": False,
        "enable_incoming_tcp": False,
        "announce_port": 1,  # a tracker wants one; nobody can reach us there
    }
