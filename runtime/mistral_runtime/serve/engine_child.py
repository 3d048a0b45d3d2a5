"""One engine process, seen from the one that started it: its socket, its last words, its end."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from mistral_runtime.serve.protocol import MAX_LINE_BYTES, Message, ProtocolError, decode_line, encode_line
from mistral_runtime.terminal import write_err

_KEPT_LINES = 20
_LONGEST_ERROR_LINE = 64 << 10
_END_SECONDS = 3.0

# Finds this very package wherever it is, without putting anything else on the import path.
_BOOTSTRAP = """
import importlib.util, runpy, sys
sys.path[:] = [entry for entry in sys.path if entry]
folder = sys.argv.pop(1)
spec = importlib.util.spec_from_file_location(
    "mistral_runtime", folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules["mistral_runtime"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
runpy.run_module("mistral_runtime", run_name="__main__", alter_sys=True)
"""


class EngineChild:
    """A started process; make one with `start`."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.process = process
        self._reader, self._writer = reader, writer
        self._last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._listening = asyncio.ensure_future(self._pass_on_errors())

    @classmethod
    async def start(cls, arguments: Sequence[str]) -> EngineChild:
        """Start `mistral_runtime engine` with these arguments and a socket."""
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _BOOTSTRAP, _package_folder()),
                *("engine", "--fd", str(theirs.fileno()), *arguments),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                limit=_LONGEST_ERROR_LINE,
                start_new_session=True,  # a Ctrl-C in the terminal is this process's to decide on
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours, limit=MAX_LINE_BYTES)
        return cls(process, reader, writer)

    def send(self, message: Message) -> None:
        """Write a message; to one that has ended, do nothing."""
        if not self._writer.is_closing():
            self._writer.write(encode_line(message))

    async def messages(self) -> AsyncIterator[Message]:
        """Give what it says, until it ends or says what is no message."""
        try:
            while line := await self._reader.readline():
                yield decode_line(line)
        except (ProtocolError, ValueError, OSError) as error:  # ValueError: a line beyond the limit
            if not isinstance(error, OSError):
                write_err(f"the engine said what is no message and is ended: {error}")

    async def end(self) -> int:
        """Close the socket, which ends the process, and return its exit code."""
        self._writer.close()
        try:
            await asyncio.wait_for(self.process.wait(), _END_SECONDS)
        except asyncio.TimeoutError:  # another class before Python 3.11
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
        code = await self.process.wait()
        await self._listening
        return code

    @property
    def last_words(self) -> str:
        """The last lines that it wrote to stderr."""
        return "\n".join(self._last_lines)

    async def _pass_on_errors(self) -> None:
        stream = self.process.stderr
        assert stream is not None
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # longer than any line of ours; what is left of it is read as the next
                continue
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip("\n")
            self._last_lines.append(text)
            write_err(text)


def _package_folder() -> str:
    spec = importlib.util.find_spec("mistral_runtime")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent)
