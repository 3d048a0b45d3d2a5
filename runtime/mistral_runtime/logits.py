"""The `logits` command: what the model expects next, for scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_runtime.device import dtype_name
from mistral_runtime.engine import check_context
from mistral_runtime.generate import encode_prompt
from mistral_runtime.json_result import tell
from mistral_runtime.scoring import likeliest, logits_by_chunk
from mistral_runtime.session import ComputeOptions, Session, load_session, open_snapshot
from mistral_runtime.terminal import write_err
from mistral_runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class LogitsOptions:
    """What the command line asked for."""

    directory: Path
    prompt: str
    compute: ComputeOptions
    top: int = 10
    all_positions: bool = False
    raw: bool = False
    system: str | None = None
    chat_template: str = "auto"
    as_json: bool = False
    quiet: bool = False


def run_logits(options: LogitsOptions) -> int:
    """Print one JSON object and return the exit code. With `--json`, an error is one as well.

    Raises:
        MistralRuntimeError: Without `--json`, any failure that has three lines to show.
        Interrupted: A signal came.
    """
    return tell(lambda: (next_tokens(options), ""), as_json=options.as_json, always_json=True)


def next_tokens(options: LogitsOptions) -> dict[str, Any]:
    """Return what the command prints; documented in docs/runtime.md."""
    snapshot = open_snapshot(options.directory, chat_template=options.chat_template)
    ids, _stops = encode_prompt(snapshot, options.prompt, system=options.system, raw=options.raw)
    check_context(snapshot.config, prompt_tokens=len(ids), max_new_tokens=1)
    session = load_session(
        snapshot,
        options.compute,
        positions=len(ids),
        context=None,
        report=_ignore if options.quiet else write_err,
    )
    told: dict[str, Any] = {"prompt_tokens": len(ids), "next": [], "dtype": dtype_name(session.compute.dtype)}
    told["device"] = str(session.compute.device)
    if options.all_positions:
        told["positions"] = _positions(session, ids, options.top)
        told["next"] = told["positions"][-1]["next"]
    else:
        (chunk,) = logits_by_chunk(session.engine.model, ids, first=len(ids) - 1)
        told["next"] = _told(snapshot.tokenizer, likeliest(chunk[-1], options.top))
    return told


def _positions(session: Session, ids: Sequence[int], top: int) -> list[dict[str, Any]]:
    """Return every token of the prompt: how likely it was, given those before it, and what was expected after it."""
    tokenizer = session.snapshot.tokenizer
    told: list[dict[str, Any]] = []
    logprob = None  # nothing comes before the first token, so nothing predicts it
    for chunk in logits_by_chunk(session.engine.model, ids):
        for row in chunk:
            position = len(told)
            entry = {"position": position, "id": ids[position], "piece": tokenizer.piece(ids[position])}
            told.append(entry | {"logprob": logprob, "next": _told(tokenizer, likeliest(row, top))})
            if position + 1 < len(ids):
                logprob = round(float(row[ids[position + 1]].double() - row.logsumexp(0).double()), 6)
    return told


def _told(tokenizer: Tokenizer, tokens: Sequence[tuple[int, float]]) -> list[dict[str, Any]]:
    return [{"id": token, "piece": tokenizer.piece(token), "logprob": round(logprob, 6)} for token, logprob in tokens]


def _ignore(_text: str) -> None:
    """Show nothing."""
