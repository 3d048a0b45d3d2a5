"""Addresses to serve on, as people type them, and the sockets that come of them."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from mistral_fetch.errors import ConfigError, ListenRefused

_LISTEN = re.compile(
    r"(?:(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<host>[^:\[\]\s]*)):)?(?P<first>\d{1,5})(?:-(?P<last>\d{1,5}))?"
)
_MAX_PORTS = 1000


@dataclass(frozen=True)
class ListenAddress:
    """Where to listen: ``host`` is empty for every address of this machine; ports are tried in order.

    Port 0 takes any free one. After a range of ports, any free one is better than none.
    """

    host: str
    first_port: int
    last_port: int

    @property
    def ports(self) -> tuple[int, ...]:
        """Return the ports to try, in order."""
        if self.first_port == self.last_port:
            return (self.first_port,)
        return (*range(self.first_port, self.last_port + 1), 0)


def parse_listen(text: str, option: str = "--listen") -> ListenAddress:
    """Return what ``HOST:PORT``, ``[IPV6]:PORT``, ``PORT`` or any of them with ``PORT-PORT`` means.

    Raises:
        ConfigError: It is none of them.
    """
    match = _LISTEN.fullmatch(text.strip())
    first = int(match["first"]) if match else -1
    last = int(match["last"]) if match and match["last"] else first
    if match is None or not 0 <= first <= last <= 65535 or last - first > _MAX_PORTS or (first == 0 and last):
        raise ConfigError(
            f"not an address to listen on: {text[:80]!r}",
            detail="expected HOST:PORT, [IPV6]:PORT or PORT, or a range of ports such as 6881-6889",
            hint=f"for example {option} 0.0.0.0:6881-6889; port 0 takes any free one",
        )
    return ListenAddress(match["v6"] or match["host"] or "", first, last)


def open_listener(address: ListenAddress) -> socket.socket:
    """Return a listening TCP socket on the first port that is free.

    Raises:
        ListenRefused: No port can be had.
    """
    failure: OSError | None = None
    for port in address.ports:
        try:
            return _listen(address.host, port)
        except (OSError, UnicodeError) as error:
            failure = error if isinstance(error, OSError) else OSError(errno.EINVAL, "not a host's name")
            if failure.errno != errno.EADDRINUSE:
                break
    reason = (failure.strerror if failure else None) or str(failure)
    raise ListenRefused(
        f"cannot listen on {show_address(address.host or 'any address', address.first_port)}",
        detail=f"expected a free port of this machine, got: {reason}",
        hint="stop what listens there, or name another address, port or range: --listen HOST:8080-8089",
    )


def numeric_host(host: str) -> str:
    """Return a host as a numeric address: libtorrent takes nothing else.

    Raises:
        ConfigError: It is no host that can be found.
    """
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]) if host else ""
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"cannot listen on {host[:80]!r}",
            detail=f"expected an address of this machine, got: {getattr(error, 'strerror', None) or error}",
            hint="for example --listen 0.0.0.0:6881",
        ) from error


def check_free(address: ListenAddress) -> None:
    """Fail now rather than after the model was hashed for nothing.

    Raises:
        ListenRefused: No port can be had.
    """
    open_listener(address).close()


def show_address(host: str, port: int) -> str:
    """Return ``host:port``, with brackets around IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def reachable_host(host: str) -> str:
    """Return an address under which this machine itself reaches what listens on ``host``."""
    return "127.0.0.1" if is_anywhere(host) else host


def is_anywhere(host: str) -> bool:
    """Return whether ``host`` means every address of this machine."""
    try:
        return not host or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def told_ports(address: ListenAddress, port: int) -> Iterable[str]:
    """Yield the one line that is worth saying where another port was taken than the first one asked for."""
    if address.first_port not in {0, port}:
        yield f"port {address.first_port} is in use; listening on {port} instead"


def _listen(host: str, port: int) -> socket.socket:
    if host:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
    return socket.create_server(("", port))
