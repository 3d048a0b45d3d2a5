"""Writing to standard error so that nothing there can end the work, and nothing from outside can drive a terminal.

Owns the standard streams' state. It refuses to know what is written, and leaves standard output's failures to
:func:`mistral_fetch.cli.options.write_out`: a result that is lost is an error, a message that is lost is not.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from mistral_fetch.errors import printable


def open_missing_streams() -> None:
    """Give every standard stream that was closed (``2>&-``) the null device.

    Otherwise the next file that is opened gets its number, and what is printed there lands in that file.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)  # the runtime needs it as well
            if getattr(sys, name) is None:
                setattr(sys, name, os.fdopen(number, mode, closefd=False))


def printable_lines(text: str) -> str:
    """Return text as :func:`mistral_fetch.errors.printable` does, but with its lines kept."""
    return "\n".join(map(printable, text.split("\n")))


def json_line(fields: Mapping[str, Any]) -> str:
    """Return fields as one line of JSON that is readable where it can be and moves no cursor where it cannot."""
    line = json.dumps(fields, ensure_ascii=False)
    return line if line.isprintable() else json.dumps(fields)


def write_err(text: str) -> None:
    """Print to standard error. When that fails (a full disk, a reader that left) all that follows is dropped."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def silence(stream: Any) -> None:
    """Let a stream's descriptor lead nowhere, so that neither we nor the runtime stumble over it again."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


class UnfailingStream:
    """A stream for rich, which would end the process (and standard output) when its reader leaves."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        """Return what the stream itself has, such as its encoding."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or drop the text and all that follows."""
        try:
            return int(self._stream.write(text))
        except OSError:
            silence(self._stream)
            return len(text)

    def flush(self) -> None:
        """Flush, or drop what is waiting and all that follows."""
        try:
            self._stream.flush()
        except OSError:
            silence(self._stream)
