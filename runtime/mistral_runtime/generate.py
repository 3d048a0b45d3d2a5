"""The `generate` command: one prompt, one answer."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mistral_runtime.device import dtype_name
from mistral_runtime.engine import Request
from mistral_runtime.errors import BadRequest, Interrupted
from mistral_runtime.interrupts import Interrupts
from mistral_runtime.machine import peak_resident_bytes
from mistral_runtime.prompt import ChatTemplate, Message
from mistral_runtime.sampling_params import SamplingParams
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
from mistral_runtime.startup import StartClock
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
    timings: bool = False
    clock: StartClock = field(default_factory=StartClock)


def run_generate(options: GenerateOptions, interrupts: Interrupts) -> int:
    """Answer one prompt on stdout and return the exit code.

    Raises:
        MistralRuntimeError: Any failure that has three lines to show.
        Interrupted: A signal came; what was generated until then has been written.
    """
    started = time.perf_counter()
    report: Callable[[str], None] = _ignore if options.quiet else write_err
    snapshot = open_snapshot(options.directory, chat_template=options.chat_template)
    options.clock.mark("snapshot")
    prompt, template_stops = encode_prompt(snapshot, options.prompt, system=options.system, raw=options.raw)
    options.clock.mark("prompt")
    count = answer_tokens(
        snapshot.config, prompt_tokens=len(prompt), wanted=options.max_tokens, context=options.context
    )
    with closing(
        load_session(
            snapshot,
            options.compute,
            positions=len(prompt) + count,
            context=options.context,
            report=report,
            clock=options.clock,
        )
    ) as session:
        with interrupts.answering() as cancel:
            answer = stream_answer(
                session,
                Request(prompt, count, options.sampling, frozenset({snapshot.tokenizer.eos_id}), cancel),
                stops=(*options.stops, *template_stops),
                strip_leading_space=not is_continuation(snapshot, raw=options.raw),
                emit=_ignore if options.as_json else write_out,
            )
        if options.as_json:
            total = time.perf_counter() - started
            write_out(json.dumps(result_object(session, options, answer, total), ensure_ascii=False) + "\n")
        elif not answer.text.endswith("\n"):
            write_out("\n")
    report(timing_line(answer))
    if options.timings:
        write_err(session.clock.line())
    if answer.finish_reason == "interrupted":
        interrupts.raise_if_received()
        raise Interrupted(signal.SIGINT)
    return 0


def encode_prompt(
    snapshot: Snapshot, prompt: str, *, system: str | None, raw: bool
) -> tuple[list[int], tuple[str, ...]]:
    """Return the prompt's ids and the template's stop strings; a base model gets the text as it is.

    Raises:
        BadRequest: A system prompt without a template to put it in.
    """
    if is_continuation(snapshot, raw=raw):
        if system is not None:
            raise BadRequest(
                "a system prompt needs an instruct model",
                detail="expected a chat template, found a base model or --raw",
                hint="leave --system out, or name a template with --chat-template",
            )
        return snapshot.tokenizer.encode(prompt), ()
    assert snapshot.template is not None
    template = ChatTemplate(snapshot.template, snapshot.tokenizer)
    opening = [] if system is None else [Message("system", system)]
    return template.encode([*opening, Message("user", prompt)]), template.stop_strings


def is_continuation(snapshot: Snapshot, *, raw: bool) -> bool:
    """Say whether a prompt is text to continue and not a question to answer."""
    return raw or snapshot.template is None


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
        "timings": session.clock.fields(),
        "lookup": {
            "mode": options.compute.lookup,
            "drafted": answer.drafted_tokens,
            "accepted": answer.accepted_tokens,
        },
        "tokens_per_second": None if rate is None else round(rate, 3),
        "device": str(session.compute.device),
        "dtype": dtype_name(session.compute.dtype),
        "threads": session.compute.threads,
        "ranks": session.ranks,
        "compiled": session.compiling is not None and session.compiling.is_compiled,
        "steps": session.steps,
        "layout": session.snapshot.files.layout,
        "lora": session.lora,
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
