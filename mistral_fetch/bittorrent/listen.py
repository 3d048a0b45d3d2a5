"""Where peers may reach us: ``HOST:PORT[-PORT]`` as people write it, to the addresses libtorrent listens on.

libtorrent walks on from a busy port by itself, but not within limits and not within a range of each address's own; so
the port is chosen here. Between choosing and listening somebody may take it: libtorrent then says so.
"""

from __future__ import annotations

import ipaddress
import random
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from mistral_fetch.errors import ConfigError

# Whatever there is, on a port of the system's choice: two downloads on one machine must not be in each other's way.
DEFAULT_LISTEN = "0.0.0.0:0,[::]:0"
# Where a session listens that nobody was told to connect to; within the ports that systems leave to programs.
_ANY_FIRST, _ANY_LAST, _ANY_TRIES = 20_000, 30_000, 100
_ADDRESS = re.compile(
    r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<host>[A-Za-z0-9_.-]{1,64})):(?P<first>\d{1,5})(?:-(?P<last>\d{1,5}))?"
)


@dataclass(frozen=True)
class ListenAddress:
    """An IP address or the name of a network interface, and the ports to try in order; port 0 is any free one."""

    host: str
    first_port: int
    last_port: int


def parse_listen(text: str) -> ListenAddress:
    """Return what ``HOST:PORT`` or ``HOST:PORT-PORT`` means; an IPv6 address stands in brackets.

    Raises:
        ConfigError: It is neither.
    """
    match = _ADDRESS.fullmatch(text.strip())
    first = int(match["first"]) if match else -1
    last = int(match["last"] or first) if match else -1
    if match is None or not 0 <= first <= last < 65536 or (first == 0 and last > 0) or not _is_address(match["v6"]):
        raise ConfigError(
            f"not an address to listen on: {text[:80]!r}",
            detail="expected HOST:PORT or HOST:PORT-PORT, where HOST is an IP address or a network interface",
            hint="for example --listen 192.0.2.7:6881-6889, --listen [2001:db8::7]:6881 or --listen eth0:6881",
        )
    return ListenAddress(match["v6"] or match["host"], first, last)


def listen_interfaces(addresses: Iterable[str]) -> str:
    """Return libtorrent's ``listen_interfaces`` for what people wrote; the default where they wrote nothing.

    Of a range the first port that is free now is taken, or the first one where none is.

    Raises:
        ConfigError: See :func:`parse_listen`.
    """
    chosen = [_interface(parse_listen(text)) for text in addresses]
    return ",".join(chosen) or DEFAULT_LISTEN


def missing_interfaces(interfaces: str) -> list[str]:
    """Return the network interfaces that are named but not there: libtorrent skips them silently."""
    hosts = [part.rpartition(":")[0] for part in interfaces.split(",")]
    names = [host for host in hosts if host and not _is_address(host.strip("[]"))]
    present = {name for _, name in socket.if_nameindex()}
    return [name for name in names if name not in present]


def _interface(address: ListenAddress) -> str:
    ports = range(address.first_port, address.last_port + 1)
    port = next((port for port in ports if is_free(address.host, port)), address.first_port)
    return f"[{address.host}]:{port}" if ":" in address.host else f"{address.host}:{port}"


def is_free(host: str, port: int) -> bool:
    """Return whether peers could be listened for there now; port 0 asks for any."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as libtorrent does: waiting ends do not count
            probe.bind((host if _is_address(host) else "", port))
            probe.listen(1)
    except OSError:
        return False
    return True


def _is_address(host: str | None) -> bool:
    try:
        return host is None or bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def any_listen_interfaces() -> str:
    """Return libtorrent's ``listen_interfaces`` for one free port on all addresses.

    With port 0 each address would get a port of its own, and libtorrent may tell other peers the wrong one.
    """
    first = random.randint(_ANY_FIRST, _ANY_LAST)
    return listen_interfaces([f"0.0.0.0:{first}-{first + _ANY_TRIES}"])
