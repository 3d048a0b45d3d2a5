"""A peer that says it has a torrent's metadata (BEP 9, 10) and then sends what it was told to, or nothing."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from mistral_fetch.bittorrent.bencode import encode

_OUR_ID = 3
_EXTENDED = 20
_BLOCK = 16384


class MetadataPeer:
    """Listens on loopback; ``metadata`` is what it sends for any torrent, None for silence; ``size`` what it claims."""

    def __init__(self, metadata: bytes | None, size: int | None = None) -> None:
        self._metadata = metadata
        self._size = len(metadata or b"") if size is None else size
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.requests = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection, suppress(OSError, ValueError):
            greeting = _read(connection, 68)
            if not greeting.startswith(b"\x13BitTorrent protocol"):
                return  # an encrypted greeting; the plain one follows
            reserved = b"\0\0\0\0\0\x10\0\0"
            connection.sendall(greeting[:20] + reserved + greeting[28:48] + b"-XX0000-" + bytes(12))
            offer = {b"m": {b"ut_metadata": _OUR_ID}, b"metadata_size": self._size}
            connection.sendall(_message(0, encode(offer)))
            while True:
                length = int.from_bytes(_read(connection, 4), "big")
                self._answer(connection, _read(connection, length))

    def _answer(self, connection: socket.socket, message: bytes) -> None:
        if message[:2] != bytes([_EXTENDED, _OUR_ID]):
            if message[:2] == bytes([_EXTENDED, 0]):
                at = message.index(b"11:ut_metadatai") + 15
                self._their_id = int(message[at : message.index(b"e", at)])
            return
        self.requests += 1
        if self._metadata is None:
            return
        piece = int(message.split(b"5:piecei")[1].split(b"e")[0])
        head = encode({b"msg_type": 1, b"piece": piece, b"total_size": self._size})
        block = self._metadata[piece * _BLOCK : (piece + 1) * _BLOCK]
        connection.sendall(_message(self._their_id, head + block))


def _message(kind: int, payload: bytes) -> bytes:
    return (len(payload) + 2).to_bytes(4, "big") + bytes([_EXTENDED, kind]) + payload


def _read(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        received = connection.recv(length - len(data))
        if not received:
            raise OSError("gone")
        data += received
    return data
