"""How the simulated mirror puts a body on the wire: from memory or a file, at a rate, with flipped bytes."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mistral_fetch.simulators.faults import Content, ServedRequest
from mistral_fetch.simulators.gate import Visit

_SLICE_BYTES = 64 * 1024
_SENDFILE_BYTES = 8 * 1024 * 1024

_Read = Callable[[int, int], bytes]


@dataclass
class BodySender:
    """Sends parts of a content over one connection and counts them."""

    connection: socket.socket
    entry: ServedRequest
    visit: Visit
    stopping: threading.Event
    rate_bytes_per_second: float | None
    flipped: tuple[int, ...] = ()

    def send_last(self, content: Content, start: int, end: int) -> None:
        """Send ``[start, end)`` and nothing afterwards."""
        # The last byte goes alone, when the request no longer counts: whoever has it may ask again at once.
        self.send(content, start, end - 1)
        self.visit.leave()
        self.send(content, max(start, end - 1), end)

    def send(self, content: Content, start: int, end: int) -> None:
        """Send ``[start, end)``."""
        flipped = [offset for offset in self.flipped if start <= offset < end]
        if isinstance(content.data, Path) and self.rate_bytes_per_second is None and not flipped:
            self._send_file(content.data, start, end)
        else:
            with _reader(content) as read:
                self._send_slices(_flipping(read, flipped), start, end)

    def _send_file(self, path: Path, start: int, end: int) -> None:
        with path.open("rb") as file:
            while start < end:
                length = min(_SENDFILE_BYTES, end - start)
                with self._counted(length):
                    sent = self.connection.sendfile(file, start, length)
                    if sent != length:
                        raise ConnectionError(f"{path} became shorter while it was sent")
                start += length

    def _send_slices(self, read: _Read, start: int, end: int) -> None:
        begun, offset, rate = time.monotonic(), start, self.rate_bytes_per_second
        slice_bytes = _SLICE_BYTES if rate is None else max(1, min(_SLICE_BYTES, int(rate / 50)))
        while offset < end and not self.stopping.is_set():
            data = read(offset, min(slice_bytes, end - offset))
            with self._counted(len(data)):
                self.connection.sendall(data)
            offset += len(data)
            if rate is not None:
                ahead = (offset - start) / rate - (time.monotonic() - begun)
                self.stopping.wait(max(0.0, ahead))

    @contextmanager
    def _counted(self, length: int) -> Iterator[None]:
        # Counted before it is sent: a client that has the last byte may ask for the count at once.
        self.entry.bytes_sent += length
        try:
            yield
        except OSError:
            self.entry.bytes_sent -= length
            raise


@contextmanager
def _reader(content: Content) -> Iterator[_Read]:
    """Give a function from offset and length to bytes."""
    if isinstance(content.data, bytes):
        view = content.data
        yield lambda offset, length: view[offset : offset + length]
        return
    descriptor = os.open(content.data, os.O_RDONLY)
    try:
        yield lambda offset, length: os.pread(descriptor, length, offset)
    finally:
        os.close(descriptor)


def _flipping(read: _Read, flipped: list[int]) -> _Read:
    if not flipped:
        return read

    def read_flipped(offset: int, length: int) -> bytes:
        data = bytearray(read(offset, length))
        for at in flipped:
            if 0 <= at - offset < len(data):
                data[at - offset] ^= 0xFF
        return bytes(data)

    return read_flipped
