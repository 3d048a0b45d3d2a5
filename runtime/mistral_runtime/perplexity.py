"""The `ppl` command: how well the model predicts a text.

Perplexity is exp of the mean negative log likelihood of the tokens (Jelinek et al. 1977). The text is longer than a
window, so it is scored by the strided method of Hugging Face's "Perplexity of fixed-length models": windows of
`context` tokens begin every `stride` tokens, and each scores only those that no earlier window has scored.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_runtime.config import ModelConfig
from mistral_runtime.device import dtype_name
from mistral_runtime.errors import BadRequest
from mistral_runtime.json_result import tell
from mistral_runtime.scoring import token_logprobs
from mistral_runtime.session import ComputeOptions, load_session, open_snapshot
from mistral_runtime.terminal import MAX_PROMPT_BYTES, write_err
from mistral_runtime.transformer import Transformer

DEFAULT_CONTEXT = 2048
_REPORT_EVERY_SECONDS = 10.0
_LARGEST_EXPONENT = 700.0  # exp overflows a double at 709.8


@dataclass(frozen=True)
class PerplexityOptions:
    """What the command line asked for."""

    directory: Path
    file: Path
    compute: ComputeOptions
    context: int | None = None
    stride: int | None = None
    as_json: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class Window:
    """Tokens begin … end − 1, of which those from `first` on are scored, given the others before them."""

    begin: int
    first: int
    end: int


def windows(count: int, *, context: int, stride: int) -> Iterator[Window]:
    """Give windows over `count` tokens that score each but the first exactly once.

    Worked example, 10 tokens, context 6, stride 3: (0, 1, 6) scores 1…5, (3, 6, 9) scores 6…8 and (6, 9, 10) scores 9.
    """
    scored = 1
    for begin in range(0, count, stride):
        end = min(begin + context, count)
        yield Window(begin, scored, end)
        scored = end
        if end == count:
            return


def run_perplexity(options: PerplexityOptions) -> int:
    """Print the perplexity and return the exit code.

    Raises:
        MistralRuntimeError: Without `--json`, any failure that has three lines to show.
        Interrupted: A signal came.
    """

    def work() -> tuple[dict[str, Any], str]:
        fields = measure(options)
        return fields, _line(fields)

    return tell(work, as_json=options.as_json)


def measure(options: PerplexityOptions) -> dict[str, Any]:
    """Return what `--json` prints; documented in docs/runtime.md."""
    text, size = _read(options.file)
    snapshot = open_snapshot(options.directory, chat_template="none")
    context, stride = window_sizes(snapshot.config, context=options.context, stride=options.stride)
    ids = snapshot.tokenizer.encode(text)  # the first is BOS: it is given, never predicted
    if len(ids) < 3:
        raise BadRequest(
            f"there is too little text in {options.file}",
            detail=f"expected at least 2 tokens, found {len(ids) - 1}",
            hint="measure a longer text; some thousand tokens give a steady figure",
        )
    session = load_session(
        snapshot,
        options.compute,
        positions=min(context, len(ids)),
        context=None,
        report=_ignore if options.quiet else write_err,
    )
    started = time.perf_counter()
    nats, count = _score(session.engine.model, ids, context, stride, quiet=options.quiet)
    seconds = time.perf_counter() - started
    mean = -nats / (len(ids) - 1)
    return {
        "perplexity": math.exp(mean) if mean < _LARGEST_EXPONENT else None,
        "nats_per_token": mean,
        "bits_per_byte": -nats / math.log(2) / size,
        "tokens": len(ids) - 1,
        "bytes": size,
        "context": context,
        "stride": stride,
        "windows": count,
        "seconds": round(seconds, 6),
        "tokens_per_second": round((len(ids) - 1) / seconds, 3),
        "device": str(session.compute.device),
        "dtype": dtype_name(session.compute.dtype),
        "threads": session.compute.threads,
    }


def window_sizes(config: ModelConfig, *, context: int | None, stride: int | None) -> tuple[int, int]:
    """Return the length of a window and the step from one to the next, as asked or by default.

    Raises:
        BadRequest: The model has no such context, or the stride leaves tokens without any before them.
    """
    limit = config.context_limit
    length = context if context is not None else min(DEFAULT_CONTEXT, limit or DEFAULT_CONTEXT)
    if length < 2 or (limit is not None and length > limit):
        raise BadRequest(
            "--context is out of range",
            detail=f"expected from 2 to {'any length' if limit is None else limit} tokens, found {length}",
            hint="correct --context, or leave it out",
        )
    step = stride if stride is not None else length // 2
    if not 1 <= step < length:
        raise BadRequest(
            "--stride is out of range",
            detail=f"expected from 1 to {length - 1}, less than the context, found {step}",
            hint="lower --stride, so that every token has others before it; half of the context is usual",
        )
    return length, step


def _score(model: Transformer, ids: list[int], context: int, stride: int, *, quiet: bool) -> tuple[float, int]:
    """Return the sum of the log likelihoods in nats, and how many windows it took."""
    nats, count, told = 0.0, 0, time.monotonic()
    for window in windows(len(ids), context=context, stride=stride):
        logprobs = token_logprobs(model, ids[window.begin : window.end], first=window.first - window.begin)
        nats += float(logprobs.sum())
        count += 1
        if not quiet and time.monotonic() - told >= _REPORT_EVERY_SECONDS:
            told = time.monotonic()
            mean = -nats / (window.end - 1)
            write_err(f"{window.end - 1} of {len(ids) - 1} tokens · {mean:.4f} nats each so far")
    return nats, count


def _read(path: Path) -> tuple[str, int]:
    """Return the text and its size in bytes."""
    try:
        if str(path) == "-":
            data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        else:
            with path.open("rb") as file:
                data = file.read(MAX_PROMPT_BYTES + 1)
    except (OSError, ValueError) as error:
        raise BadRequest(
            f"cannot read {path}", detail=f"expected a text file, found: {error}", hint="name a file with UTF-8 text"
        ) from error
    if not 0 < len(data) <= MAX_PROMPT_BYTES:
        raise BadRequest(
            f"{path} is {'too long' if data else 'empty'}",
            detail=f"expected from 1 to {MAX_PROMPT_BYTES} bytes, found {'more' if data else 'none'}",
            hint="name a file with UTF-8 text, or a part of it",
        )
    try:
        return data.decode("utf-8"), len(data)
    except UnicodeDecodeError as error:
        raise BadRequest(
            f"{path} is not valid UTF-8",
            detail=f"expected UTF-8 text, found the byte 0x{data[error.start]:02x} at offset {error.start}",
            hint="save the text as UTF-8",
        ) from error


def _line(fields: dict[str, Any]) -> str:
    perplexity = "beyond 1e304" if fields["perplexity"] is None else f"{fields['perplexity']:.4f}"
    return (
        f"perplexity {perplexity} · {fields['bits_per_byte']:.4f} bits per byte · {fields['tokens']} tokens, "
        f"{fields['bytes']} bytes · context {fields['context']}, stride {fields['stride']} · {fields['dtype']}"
    )


def _ignore(_text: str) -> None:
    """Show nothing."""
