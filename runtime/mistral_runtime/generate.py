"""The `generate` command: one prompt, one answer."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mistral_runtime.device import dtype_name
from mistral_runtime.engine import Request
from mistral_runtime.errors import BadRequest, Interrupted
from mistral_runtime.interrupts import Interrupts
from mistral_runtime.machine import peak_resident_bytes
from mistral_runtime.prompt import ChatTemplate, Message
from mistral_runtime.sampling import SamplingParams
from mistral_runtime.session import (
    Answer,
    ComputeOptions,
    Session,
    Snapshot,
    answer_tokens,
    load_session,
    open_snapshot,
    stream_answer,
)
from mistral_runtime.terminal import write_err, write_out


@dataclass(frozen=True)
class GenerateOptions:
    """What the command line asked for."""

    directory: Path
    prompt: str
    sampling: SamplingParams
    compute: ComputeOptions
    max_tokens: int | None = None
    context: int | None = None
    chat_template: str = "auto"
    raw: bool = False
    system: str | None = None
    stops: tuple[str, ...] = field(default_factory=tuple)
    as_json: bool = False
    quiet: bool = False


def run_generate(options: GenerateOptions, interrupts: Interrupts) -> int:
    """Answer one prompt on stdout and return the exit code.

    Raises:
        MistralRuntimeError: Any failure that has three lines to show.
        Interrupted: A signal came; what was generated until then has been written.
    """
    started = time.perf_counter()
    report: Callable[[str], None] = _ignore if options.quiet else write_err
    snapshot = open_snapshot(options.directory, chat_template=options.chat_template)
    prompt, template_stops = encode_prompt(snapshot, options)
    count = answer_tokens(
        snapshot.config, prompt_tokens=len(prompt), wanted=options.max_tokens, context=options.context
    )
    session = load_session(
        snapshot, options.compute, positions=len(prompt) + count, context=options.context, report=report
    )
    with interrupts.answering() as cancel:
        answer = stream_answer(
            session,
            Request(prompt, count, options.sampling, frozenset({snapshot.tokenizer.eos_id}), cancel),
            stops=(*options.stops, *template_stops),
            strip_leading_space=not _is_continuation(snapshot, options),
            emit=_ignore if options.as_json else write_out,
        )
    if options.as_json:
        total = time.perf_counter() - started
        write_out(json.dumps(result_object(session, options, answer, total), ensure_ascii=False) + "\n")
    elif not answer.text.endswith("\n"):
        write_out("\n")
    report(timing_line(answer))
    if answer.finish_reason == "interrupted":
        interrupts.raise_if_received()
        raise Interrupted(signal.SIGINT)
    return 0


def encode_prompt(snapshot: Snapshot, options: GenerateOptions) -> tuple[list[int], tuple[str, ...]]:
    """Return the prompt's ids and the template's stop strings; a base model gets the text as it is.

    Raises:
        BadRequest: A system prompt without a template to put it in.
    """
    if _is_continuation(snapshot, options):
        if options.system is not None:
            raise BadRequest(
                "a system prompt needs an instruct model",
                detail="expected a chat template, found a base model or --raw",
                hint="leave --system out, or name a template with --chat-template",
            )
        return snapshot.tokenizer.encode(options.prompt), ()
    assert snapshot.template is not None
    template = ChatTemplate(snapshot.template, snapshot.tokenizer)
    system = [] if options.system is None else [Message("system", options.system)]
    return template.encode([*system, Message("user", options.prompt)]), template.stop_strings


def _is_continuation(snapshot: Snapshot, options: GenerateOptions) -> bool:
    return options.raw or snapshot.template is None


def result_object(session: Session, options: GenerateOptions, answer: Answer, total_seconds: float) -> dict[str, Any]:
    """Return what `--json` prints; documented in docs/runtime.md."""
    rate = answer.tokens_per_second
    return {
        "text": answer.text,
        "prompt_tokens": answer.prompt_tokens,
        "generated_tokens": answer.generated_tokens,
        "finish_reason": answer.finish_reason,
        "seconds": {
            "load": round(session.load_seconds, 6),
            "prefill": round(answer.prefill_seconds, 6),
            "decode": round(answer.decode_seconds, 6),
            "total": round(total_seconds, 6),
        },
        "lookup": {
            "mode": options.compute.lookup,
            "drafted": answer.drafted_tokens,
            "accepted": answer.accepted_tokens,
        },
        "tokens_per_second": None if rate is None else round(rate, 3),
        "device": str(session.compute.device),
        "dtype": dtype_name(session.compute.dtype),
        "threads": session.compute.threads,
        "layout": session.snapshot.files.layout,
        "chat_template": None if options.raw else session.snapshot.template,
        "peak_rss_bytes": peak_resident_bytes(),
    }


def timing_line(answer: Answer) -> str:
    """Return one line for people."""
    rate = answer.tokens_per_second
    return (
        f"done: {answer.generated_tokens} tokens ({answer.finish_reason}) · prompt of {answer.prompt_tokens} in "
        f"{answer.prefill_seconds:.2f} s" + ("" if rate is None else f" · {rate:.1f} tokens/s")
    )


def _ignore(_text: str) -> None:
    """Show nothing."""
