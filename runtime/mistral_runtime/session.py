"""A snapshot directory made ready to answer: found, checked, planned, loaded.

Owns the order of the steps, cheap refusals first: configuration, tokenizer and prompt are looked at before a single
weight is. Speaks to people through the `report` it is handed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mistral_runtime.config import ModelConfig
from mistral_runtime.device import Compute, choose_compute, plan_memory
from mistral_runtime.engine import PREFILL_CHUNK, Engine, Request, check_context
from mistral_runtime.lookup import LookupMode, cache_slack
from mistral_runtime.prompt import resolve_template
from mistral_runtime.snapshot import (
    WeightFiles,
    declared_chat_template,
    find_tokenizer,
    find_weights,
    load_config,
)
from mistral_runtime.text_stream import StopMatcher, StreamingDecoder
from mistral_runtime.tokenizer import Tokenizer
from mistral_runtime.weights import load_model, open_checkpoint

Report = Callable[[str], None]
DEFAULT_ANSWER_TOKENS = 256
DEFAULT_CHAT_CONTEXT = 8192  # a cache of 1 GiB for a 7B without a window; with one, the window bounds it already


@dataclass(frozen=True)
class ComputeOptions:
    """The machine-related flags of every command."""

    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    ignore_memory_plan: bool = False
    lookup: LookupMode = "auto"


@dataclass(frozen=True)
class Snapshot:
    """A directory whose small files have been read: enough to refuse a request, not yet to answer one."""

    directory: Path
    files: WeightFiles
    config: ModelConfig
    tokenizer: Tokenizer
    template: str | None


@dataclass(frozen=True)
class Session:
    """A loaded model."""

    snapshot: Snapshot
    compute: Compute
    engine: Engine
    load_seconds: float


def open_snapshot(directory: Path, *, chat_template: str) -> Snapshot:
    """Read configuration, tokenizer and evidence of a chat template.

    Raises:
        CheckpointError: The directory is incomplete or not understood.
    """
    files = find_weights(directory)
    config = load_config(directory, files.layout)
    tokenizer = Tokenizer(find_tokenizer(directory))
    tokenizer.require_vocab_size(config.vocab_size)
    template = resolve_template(chat_template, declared=declared_chat_template(directory), tokenizer=tokenizer)
    return Snapshot(directory, files, config, tokenizer, template)


def answer_tokens(config: ModelConfig, *, prompt_tokens: int, wanted: int | None, context: int | None) -> int:
    """Return the answer's largest length: as asked, or the default, cut to the room that is left.

    Only the default is cut. A length that was asked for and does not fit is an error, raised by `check_context`, which
    also refuses a prompt that leaves no room at all.
    """
    if wanted is not None:
        count = wanted
    else:
        limits = [limit - prompt_tokens for limit in (config.context_limit, context) if limit is not None]
        count = max(1, min([DEFAULT_ANSWER_TOKENS, *limits]))
    check_context(config, prompt_tokens=prompt_tokens, max_new_tokens=count, context=context)
    return count


def load_session(
    snapshot: Snapshot, options: ComputeOptions, *, positions: int, context: int | None, report: Report
) -> Session:
    """Check the weights' headers, plan the memory for `positions` per sequence, then load.

    Raises:
        CheckpointError: The weights do not fit the configuration.
        DeviceError: The machine does not fit the weights.
    """
    started = time.perf_counter()
    checkpoint = open_checkpoint(snapshot.files, snapshot.config)
    for name in snapshot.files.passed_over:
        report(f"weights: reading {snapshot.files.paths[0].name}, not {name}, which is there as well")
    compute = choose_compute(
        device=options.device, dtype=options.dtype, threads=options.threads, stored=checkpoint.dtype
    )
    report(compute.line())
    plan = plan_memory(
        snapshot.config,
        compute,
        context=positions,
        prefill_chunk=PREFILL_CHUNK,
        slack=cache_slack(options.lookup),
    )
    report(plan.line())
    if not options.ignore_memory_plan:
        plan.require_fit()
    model = load_model(checkpoint, snapshot.config, device=compute.device, dtype=compute.dtype)
    engine = Engine(model, context=context, lookup=options.lookup)
    return Session(snapshot, compute, engine, time.perf_counter() - started)


@dataclass
class Answer:
    """One finished answer and how it went."""

    text: str
    prompt_tokens: int
    generated_tokens: int
    finish_reason: str
    prefill_seconds: float
    decode_seconds: float
    drafted_tokens: int
    accepted_tokens: int

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding rate. The first token belongs to the prefill, so one token alone has no rate."""
        steps = self.generated_tokens - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds > 0 else None


def stream_answer(
    session: Session, request: Request, *, stops: Sequence[str], strip_leading_space: bool, emit: Callable[[str], None]
) -> Answer:
    """Generate, passing finished text to `emit` as it comes, and return the whole."""
    generation = session.engine.generate(request)
    decoder = StreamingDecoder(session.snapshot.tokenizer, strip_leading_space=strip_leading_space)
    matcher = StopMatcher(stops)
    shown: list[str] = []

    def show(text: str) -> None:
        if text:
            shown.append(text)
            emit(text)

    for token in generation:
        show(matcher.feed(decoder.feed(token)))
        if matcher.matched is not None:
            break
    if matcher.matched is None:
        show(matcher.feed(decoder.flush()))
    show(matcher.flush())
    return Answer(
        text="".join(shown),
        prompt_tokens=len(request.prompt),
        generated_tokens=generation.generated_tokens,
        finish_reason="stop" if matcher.matched is not None else generation.finish_reason,
        prefill_seconds=generation.prefill_seconds,
        decode_seconds=generation.decode_seconds,
        drafted_tokens=generation.pace.drafted,
        accepted_tokens=generation.pace.accepted,
    )
