"""Every message survives the way over the wire, and nothing else is taken for one."""

from __future__ import annotations

import pytest

from mistral_runtime.sampling_params import SamplingParams
from mistral_runtime.serve.protocol import (
    Cancel,
    Drain,
    Embed,
    Embedded,
    Finished,
    Generate,
    Grammar,
    Message,
    ProtocolError,
    Ready,
    Scored,
    Stats,
    Step,
    Token,
    decode_line,
    encode_line,
)

MESSAGES: list[Message] = [
    Generate("a", [1, 2], 5),
    Generate(
        "b", [1], 5, SamplingParams(0.7, seed=3), [2], 1, 0.5, -0.5, [(7, -100.0)], 3, 0, Grammar("regex", "a+"), -1
    ),
    Embed("c", [1]),
    Cancel("a"),
    Drain(),
    Ready(4096, 32000, 8192, 8, "bfloat16", "cpu", 1.5),
    Step([Token("a", 7), Token("b", 9, -0.5, [(9, -0.5), (1, -2.0)])]),
    Scored("b", [-1.0], [[(1, -1.0)]]),
    Embedded("c", [0.6, 0.8]),
    Finished("a", "error", error={"kind": "x", "what": "y", "detail": "z", "hint": "w"}),
    Stats(1, 2, 3, 4, 5, 6, 7, 8),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_survives_the_wire(message: Message) -> None:
    line = encode_line(message)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert decode_line(line) == message


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff\n",
        b"[]\n",
        b"{}\n",
        b'{"is":"token","id":"a","token":1}\n',
        b'{"is":"cancel"}\n',
        b'{"is":"cancel","id":"a","more":1}\n',
        b'{"is":"step","tokens":[{"id":"a"}]}\n',
        b'{"is":"generate","id":"a","prompt":[1],"max_new_tokens":1,"grammar":{"kind":"regex"}}\n',
    ],
)
def test_what_is_no_message_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_line(line)
