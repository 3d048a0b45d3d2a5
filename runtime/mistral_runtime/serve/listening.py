"""The socket that requests come in at, and the rule that nothing but this machine reaches it without a key."""

from __future__ import annotations

import ipaddress
import os
import resource
import socket
import stat
from contextlib import suppress
from pathlib import Path

from mistral_runtime.errors import BadRequest

BACKLOG = 2048


def resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """Return the first address that a host stands for.

    Raises:
        BadRequest: It stands for none.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise BadRequest(
            f"--host {host} is no address of this machine",
            detail=f"expected a name or an address, found: {error}",
            hint="leave --host out for 127.0.0.1, or give 0.0.0.0 for all addresses",
        ) from error
    family, _kind, _protocol, _name, address = found[0]
    return family, (str(address[0]), port)


def is_loopback(address: str) -> bool:
    """Say whether an address is reached from this machine only."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def require_key_beyond_loopback(address: str, *, has_keys: bool) -> None:
    """Refuse to serve a network without keys.

    Raises:
        BadRequest: There are none.
    """
    if not has_keys and not is_loopback(address):
        raise BadRequest(
            f"everybody who reaches {address} could use this server",
            detail="expected --api-key-file for any address but a loopback one, found none",
            hint="write a key to a file (openssl rand -hex 32 > keys; chmod 600 keys) and give --api-key-file keys",
        )


def listen_tcp(family: socket.AddressFamily, address: tuple[str, int]) -> socket.socket:
    """Return a socket that listens.

    Raises:
        BadRequest: The address or the port cannot be had.
    """
    try:
        listener = socket.create_server(address, family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise BadRequest(
            f"cannot listen on {address[0]} port {address[1]}",
            detail=f"expected a free port of this machine, found: {error}",
            hint="give another --port, or --port 0 for a free one",
        ) from error
    # Connections inherit it; asyncio sets it only for sockets that name their protocol, which this one does not.
    # Without it an answer on a kept connection waits for the client's delayed acknowledgement: 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def listen_unix(path: Path) -> socket.socket:
    """Return a socket that listens at a path and is this user's alone. One that nobody listens at is replaced.

    Raises:
        BadRequest: The path cannot be had.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o077)
    try:
        _remove_stale(path)
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise BadRequest(
            f"cannot listen at {path}",
            detail=f"expected a path where a socket can be made, found: {error}",
            hint="give another path to --uds",
        ) from error
    finally:
        os.umask(before)
    return listener


def _remove_stale(path: Path) -> None:
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode) and not _answers(path):
            path.unlink()


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


def raise_open_file_limit() -> None:
    """Ask for as many open files as this process may have: each waiting client is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
