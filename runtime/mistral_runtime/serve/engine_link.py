"""The engine's end of the socket: a thread that reads, a thread that writes, and the loop between them.

The process belongs to the one at the other end. When that is gone nothing computed here reaches anybody, so the end of
the socket ends the process at once, in the middle of a step too.
"""

from __future__ import annotations

import os
import socket
import threading
from queue import SimpleQueue
from typing import BinaryIO, NoReturn

from mistral_runtime.errors import BadRequest
from mistral_runtime.serve.engine_loop import Inbox
from mistral_runtime.serve.protocol import (
    MAX_LINE_BYTES,
    Cancel,
    Drain,
    Embed,
    Generate,
    Message,
    ProtocolError,
    decode_line,
    encode_line,
)
from mistral_runtime.terminal import write_err

GARBAGE_EXIT_CODE = 40


class EngineLink:
    """Messages in both directions, until the process ends.

    Args:
        descriptor: A connected stream socket, which is now this object's.
        inbox: Where what is read goes.

    Raises:
        BadRequest: The descriptor is none.
    """

    def __init__(self, descriptor: int, inbox: Inbox) -> None:
        self._socket = _connected(descriptor)
        self._outbox: SimpleQueue[Message | None] = SimpleQueue()
        self._inbox = inbox
        self._writer = threading.Thread(target=self._write, name="engine-writer", daemon=True)
        self._writer.start()
        threading.Thread(target=self._read, name="engine-reader", daemon=True).start()

    def send(self, message: Message) -> None:
        """Write a message soon; never waits for the reader."""
        self._outbox.put(message)

    def flush(self) -> None:
        """Wait until all is written."""
        self._outbox.put(None)
        self._writer.join()

    def _read(self) -> None:
        try:
            with self._socket.makefile("rb") as lines:
                while line := _next_line(lines):
                    self._inbox.put(_request(line))
        except ProtocolError as error:
            write_err(f"error: the engine was told what it does not understand\n  {error}\n  this is a bug")
            _end(GARBAGE_EXIT_CODE)
        except OSError:
            pass  # as good as its end
        _end(0)

    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._socket.sendall(encode_line(message))
            except OSError:
                _end(0)


def _connected(descriptor: int) -> socket.socket:
    try:
        os.set_inheritable(descriptor, False)  # a compiler that is started from here must not keep it open
        return socket.socket(fileno=descriptor)
    except OSError as error:
        raise BadRequest(
            "--fd is no connected socket",
            detail=f"expected a descriptor that the serving process handed over, found {descriptor}: {error.strerror}",
            hint="start `serve`, which starts this command itself",
        ) from error


def _next_line(lines: BinaryIO) -> bytes:
    line = lines.readline(MAX_LINE_BYTES + 1)
    if len(line) > MAX_LINE_BYTES:
        raise ProtocolError(f"a line of more than {MAX_LINE_BYTES} bytes")
    return line if line.endswith(b"\n") else b""  # a line that breaks off is the end


def _request(line: bytes) -> Message:
    message = decode_line(line)
    if not isinstance(message, Generate | Embed | Cancel | Drain) or not _has_name(message):
        raise ProtocolError(f"not for the engine: {type(message).__name__}")
    return message


def _has_name(message: Generate | Embed | Cancel | Drain) -> bool:
    return isinstance(message, Drain) or isinstance(message.id, str)


def _end(code: int) -> NoReturn:
    os._exit(code)
