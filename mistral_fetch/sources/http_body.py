"""The body of an answer, read as directly as its connection allows.

httpx hands out bodies in chunks of 64 KiB, copied three times on the way; that costs more than hashing them. So httpx
connects, negotiates TLS, passes proxies and reads the headers, and once it has handed out what came with them, the
rest is read from its socket straight into the caller's buffer. Such a connection cannot be used again, which is why
short bodies, and those whose length is unknown, stay with httpx.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from mistral_fetch.units import KIB

if TYPE_CHECKING:
    import httpx

# A new connection costs about as much as httpx's way through so many bytes.
DIRECT_BYTES = 512 * KIB


class Body:
    """What is left of an answer's body.

    Args:
        response: The answer, its body untouched.
        length: The announced length, None if there is none.
        timeout_seconds: How long to wait for a byte.
    """

    def __init__(self, response: httpx.Response, length: int | None, timeout_seconds: float) -> None:
        self._chunks: Iterator[bytes] = response.iter_raw()
        self._left = length
        self._chunk = memoryview(b"")
        self._timeout_seconds = timeout_seconds
        self._stream = response.extensions.get("network_stream")
        self._socket: socket.socket | None = None
        self._flags = 0

    def read_into(self, target: memoryview) -> int:
        """Fill the beginning of ``target`` and return how many bytes that are; 0 at the end of the body.

        Raises:
            OSError, httpx.HTTPError: The connection broke, or nothing came in time.
        """
        if self._socket is None and not self._chunk:
            self._chunk = memoryview(next(self._chunks, b""))
        if self._chunk:
            length = min(len(self._chunk), len(target))
            target[:length] = self._chunk[:length]
            self._chunk = self._chunk[length:]
        elif self._socket is not None:
            length = self._receive(self._socket, target[: self._left])
        else:
            return 0
        self._took(length)
        return length

    def _took(self, length: int) -> None:
        if self._left is None:
            return
        self._left -= length
        if self._left == 0:
            if self._socket is None:
                # httpx learns that the body is over, and keeps the connection.
                self._chunk = memoryview(next(self._chunks, b""))
        elif self._socket is None and not self._chunk and self._left >= DIRECT_BYTES:
            # What httpx had read ahead is used up now, so the next byte on the socket is the next of the body.
            self._socket = self._plain_socket()
            if self._socket is not None:
                self._wait_in_the_kernel(self._socket)

    def _receive(self, connection: socket.socket, target: memoryview) -> int:
        if isinstance(connection, ssl.SSLSocket):
            return _receive_records(connection, target)
        try:
            return connection.recv_into(target, flags=self._flags)
        except BlockingIOError as error:  # the kernel's name for its own time limit
            raise TimeoutError("the read operation timed out") from error

    def _wait_in_the_kernel(self, connection: socket.socket) -> None:
        """Let the kernel fill the buffer before it wakes us, where it can: each return to Python costs a lock.

        Python's own time limits make a socket non-blocking, and poll before each read.
        """
        if isinstance(connection, ssl.SSLSocket) or not hasattr(socket, "MSG_WAITALL") or os.name != "posix":
            connection.settimeout(self._timeout_seconds)
            return
        seconds = int(self._timeout_seconds)
        limit = struct.pack("ll", seconds, int((self._timeout_seconds - seconds) * 1e6))
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        self._flags = int(socket.MSG_WAITALL)

    def _plain_socket(self) -> socket.socket | None:
        """Return the socket whose bytes are the body's, or None where there is another layer between."""
        if self._stream is None:
            return None
        connection = self._stream.get_extra_info("socket")
        encryption = self._stream.get_extra_info("ssl_object")
        is_within_tls = isinstance(encryption, ssl.SSLObject)  # the socket is then that of a proxy asked over https
        is_consistent = (encryption is not None) == isinstance(connection, ssl.SSLSocket)
        return connection if isinstance(connection, socket.socket) and is_consistent and not is_within_tls else None

    def abort(self) -> None:
        """Break the connection, from any thread; a read that waits for a byte ends at once."""
        connection = self._stream.get_extra_info("socket") if self._stream is not None else None
        if isinstance(connection, socket.socket):
            with suppress(OSError):  # closed already
                # Not the TLS socket's own shutdown: that one swaps its state under the reading thread.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _receive_records(connection: ssl.SSLSocket, target: memoryview) -> int:
    """Fill ``target`` from TLS records, of which each read gives one (16 KiB at most, RFC 8446, 5.1)."""
    filled = 0
    while filled < len(target):
        try:
            length = connection.recv_into(target[filled:])
        except OSError:
            if filled:
                break  # what came is good; the next call meets the error again
            raise
        if length == 0:
            break
        filled += length
    return filled
