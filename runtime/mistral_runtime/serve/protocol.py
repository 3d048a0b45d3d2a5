"""What the HTTP process and the engine process say to each other: one JSON object a line over a socket.

Token ids only, never text, except for a grammar, which is about text. Both ends are ours, yet each checks what it
reads: a line that does not parse ends the connection, not the process. Imports no torch.

From the HTTP process: `Generate`, `Embed`, `Cancel`, `Drain`. From the engine: `Ready`, then `Step`, `Scored`,
`Embedded`, `Finished` and, about once a second and at every change, `Stats`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar

from mistral_runtime.sampling_params import SamplingParams

# A prompt of a million ids takes 7 MB.
MAX_LINE_BYTES = 64 << 20

GrammarKind = Literal["json_schema", "json_object", "regex", "lark", "choice"]
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Grammar:
    """What the answer's text must match; `text` is the schema as JSON, the expression, or the grammar."""

    kind: GrammarKind
    text: str


@dataclass(frozen=True)
class Generate:
    """One answer wanted.

    Attributes:
        id: The caller's name for it, unique among those under way.
        prompt: Token ids, at least one.
        stop_ids: Tokens that end the answer and are not part of it; not looked at before `min_tokens`.
        logprobs: How many of the likeliest tokens to tell with each token of the answer, 0 for its own alone.
        prompt_logprobs: The same for the prompt's tokens from the second on, told once in `Scored`.
        grammar: The answer has to match it; masks are made by the engine.
        priority: A lower number goes first among those waiting.
    """

    id: str
    prompt: list[int]
    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: list[int] = field(default_factory=list)
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: list[tuple[int, float]] = field(default_factory=list)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    priority: int = 0


@dataclass(frozen=True)
class Embed:
    """The mean over all positions of the last layer's normed output, at length one, is wanted."""

    id: str
    prompt: list[int]


@dataclass(frozen=True)
class Cancel:
    """Nobody waits for this answer any more: compute no further step of it. Unknown ids are no error."""

    id: str


@dataclass(frozen=True)
class Drain:
    """Take nothing new; end the process once all is answered."""


@dataclass(frozen=True)
class Ready:
    """The model is loaded."""

    context: int
    vocab_size: int
    cache_positions: int
    max_running: int
    weights: str
    device: str
    load_seconds: float


@dataclass(frozen=True)
class Token:
    """One token of an answer. `top` holds (id, logprob) of the likeliest, in their order."""

    id: str
    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """All tokens of one step of the batch, at most a few per answer, in the order of each answer."""

    tokens: list[Token]


@dataclass(frozen=True)
class Scored:
    """The logprobs of a prompt: of each token from the second on (None, the first, is left out)."""

    id: str
    logprobs: list[float]
    top: list[list[tuple[int, float]]]


@dataclass(frozen=True)
class Embedded:
    """One embedding."""

    id: str
    vector: list[float]


@dataclass(frozen=True)
class Finished:
    """The end of one answer, said exactly once for every `Generate` and `Embed`, cancelled ones included.

    `error` holds kind, what, detail and hint where the reason is "error".
    """

    id: str
    reason: FinishReason
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    error: dict[str, str] | None = None


@dataclass(frozen=True)
class Stats:
    """How the engine is. Counters only grow."""

    running: int
    waiting: int
    cache_used: int
    cache_total: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preempted: int = 0


Message = Generate | Embed | Cancel | Drain | Ready | Step | Scored | Embedded | Finished | Stats
_KINDS: dict[str, type[Any]] = {
    kind.__name__.lower(): kind
    for kind in (Generate, Embed, Cancel, Drain, Ready, Step, Scored, Embedded, Finished, Stats)
}
_Kind = TypeVar("_Kind")


class ProtocolError(Exception):
    """A line is not what the other end may say."""


def encode_line(message: Message) -> bytes:
    """Return the message as one line."""
    said = {"is": type(message).__name__.lower(), **asdict(message)}
    return json.dumps(said, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def decode_line(line: bytes) -> Message:
    """Return the message that a line says.

    Raises:
        ProtocolError: It says none.
    """
    try:
        said = json.loads(line)
        kind = _KINDS[said.pop("is")]
        message: Message = _build(kind, said)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ProtocolError(f"not a message: {line[:80]!r}: {error}") from error
    return message


def _build(kind: type[_Kind], said: Mapping[str, Any]) -> _Kind:
    known = {entry.name for entry in fields(kind)}  # type: ignore[arg-type]
    if unknown := said.keys() - known:
        raise ValueError(f"unknown {sorted(unknown)}")
    values = dict(said)
    if kind is Generate:
        values["sampling"] = SamplingParams(**values.get("sampling", {}))
        values["grammar"] = Grammar(**values["grammar"]) if values.get("grammar") else None
        values["logit_bias"] = _pairs(values.get("logit_bias", []))
    elif kind is Step:
        values["tokens"] = [Token(**{**token, "top": _pairs(token["top"])}) for token in values["tokens"]]
    elif kind is Scored:
        values["top"] = [_pairs(top) for top in values["top"]]
    return kind(**values)


def _pairs(said: list[Any]) -> list[tuple[int, float]]:
    return [(token, number) for token, number in said]
