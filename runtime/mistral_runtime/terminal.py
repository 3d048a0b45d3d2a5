"""Standard streams: UTF-8 whatever the locale, flushed, and quiet when the reader has gone.

Owns how bytes reach stdout and stderr and how a prompt is read; knows nothing of what they say.
"""

from __future__ import annotations

import os
import re
import sys

from mistral_runtime.errors import BadRequest

MAX_PROMPT_BYTES = 64 << 20
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0, DEL and C1; line break and tab stay


def write_out(text: str) -> None:
    """Write to stdout and flush. Raises BrokenPipeError when the reader has gone.

    A model may be made to generate anything: on a terminal, control characters are shown as `\\u001b`, which is
    also how JSON writes them. A pipe or a file gets the text as it is.
    """
    write_escaped(escape_controls(text) if sys.stdout.isatty() else text)


def write_escaped(text: str) -> None:
    """Write to stdout and flush, control characters included: the caller has escaped all but its own."""
    sys.stdout.flush()
    data = text.encode("utf-8")
    stream = getattr(sys.stdout, "buffer", None)
    if stream is None:  # a test's in-memory stream
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    stream.write(data)
    stream.flush()


def escape_controls(text: str) -> str:
    """Return the text with every control character but line break and tab written out."""
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def write_err(line: str) -> None:
    """Write a line to stderr; that nobody reads it is no reason to fail."""
    try:
        print(line, file=sys.stderr, flush=True)
    except UnicodeEncodeError:
        print(line.encode("ascii", "backslashreplace").decode("ascii"), file=sys.stderr, flush=True)
    except BrokenPipeError:
        silence(sys.stderr.fileno())


def silence(descriptor: int) -> None:
    """Point a descriptor at nothing, so that flushing it at exit does not fail a second time."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, descriptor)
    os.close(nothing)


def read_prompt(argument: str | None) -> str:
    """Return the prompt: the argument, or all of stdin when it is "-" or absent with stdin not a terminal.

    One final line break of piped text is dropped, since `echo` adds it.

    Raises:
        BadRequest: No prompt, not UTF-8, or absurdly long.
    """
    if argument is not None and argument != "-":
        return decode_argument(argument)
    if argument is None and sys.stdin.isatty():
        raise BadRequest(
            "no prompt was given",
            detail="expected text after the directory, or on standard input",
            hint='add the prompt in quotes, or pipe it: echo "…" | … -',
        )
    data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise BadRequest(
            "the prompt on standard input is too long",
            detail=f"expected at most {MAX_PROMPT_BYTES} bytes, found more",
            hint="shorten the prompt",
        )
    return decode_input(data).removesuffix("\n").removesuffix("\r")


def decode_argument(argument: str) -> str:
    """Return a command line argument as the UTF-8 it was typed in, even where the locale says ASCII.

    Raises:
        BadRequest: Not UTF-8.
    """
    return decode_input(os.fsencode(argument))


def decode_input(data: bytes) -> str:
    """Return text from bytes that a person or a pipe sent.

    Raises:
        BadRequest: Not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(
            "the input is not valid UTF-8",
            detail=f"expected UTF-8 text, found the byte 0x{data[error.start]:02x} at offset {error.start}",
            hint="save the prompt as UTF-8",
        ) from error
