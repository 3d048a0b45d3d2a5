"""A snapshot directory made ready to answer: found, checked, planned, loaded.

Owns the order of the steps, cheap refusals first: configuration, tokenizer and prompt are looked at before a single
weight is. Speaks to people through the `report` it is handed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mistral_runtime.adapter import open_adapter
from mistral_runtime.compiled_step import BackgroundCompiledStep
from mistral_runtime.config import ModelConfig
from mistral_runtime.conversation_cache import ConversationCache
from mistral_runtime.device import Compute, plan_memory
from mistral_runtime.engine import PREFILL_CHUNK, Engine, Request, Step, check_context, eager_step
from mistral_runtime.errors import BadRequest
from mistral_runtime.gpu.choose import device_engine
from mistral_runtime.gpu.device_engine import DeviceEngine
from mistral_runtime.kv_int8 import KvKind
from mistral_runtime.loading import choose_for, open_weights
from mistral_runtime.lookup import MAX_DRAFT, LookupMode
from mistral_runtime.lora import LoraOptions, describe, merging, result_fields, set_apart
from mistral_runtime.prompt import resolve_template
from mistral_runtime.snapshot import (
    WeightFiles,
    declared_chat_template,
    find_tokenizer,
    find_weights,
    load_config,
)
from mistral_runtime.startup import StartClock
from mistral_runtime.tensor_parallel import Shard, check_rank_devices, check_ranks
from mistral_runtime.text_stream import StopMatcher, StreamingDecoder, text_pieces
from mistral_runtime.tokenizer import Tokenizer
from mistral_runtime.tp_launch import Ranks
from mistral_runtime.tp_plan import plan_ranks, share_threads

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
    lora: LoraOptions | None = None
    ranks: int = 1
    compile: bool = False
    lookup: LookupMode = "auto"
    quantize: str | None = None
    kv: KvKind = "exact"
    graphs: bool = False


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
    """A loaded model, and what has to be ended with it; close it.

    `clock` times the start, up to the first token of the first answer.
    """

    snapshot: Snapshot
    compute: Compute
    engine: Engine
    load_seconds: float
    clock: StartClock = field(default_factory=StartClock)
    lora: dict[str, Any] | None = None
    ranks: int = 1
    compiling: BackgroundCompiledStep | None = None
    resources: ExitStack = field(default_factory=ExitStack)

    @property
    def steps(self) -> str:
        """How the next decode step is computed: eager, compiled, static, or cuda-graphs."""
        if isinstance(self.engine, DeviceEngine):
            return self.engine.runner.name
        return "compiled" if self.compiling is not None and self.compiling.is_compiled else "eager"

    def close(self) -> None:
        """End what runs beside this thread."""
        self.resources.close()


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
    snapshot: Snapshot,
    options: ComputeOptions,
    *,
    positions: int,
    context: int | None,
    report: Report,
    clock: StartClock | None = None,
) -> Session:
    """Check the weights' headers, plan the memory for `positions` per sequence, then load.

    Raises:
        CheckpointError: The weights, or the adapter, do not fit the configuration.
        DeviceError: The machine does not fit the weights.
    """
    started = time.perf_counter()
    clock = clock or StartClock()
    check_ranks(snapshot.config, options.ranks)
    _refuse_together(options)
    # Guesses are taken back in the cache of this process, which is not the only one, or not the one that was compiled.
    can_take_back = options.ranks == 1 and not options.compile
    lookup: LookupMode = options.lookup if can_take_back else "off"
    slack = MAX_DRAFT if can_take_back else 0
    weights = open_weights(snapshot.files, snapshot.config, quantize=options.quantize)
    clock.mark("weights_opened")
    for name in snapshot.files.passed_over:
        report(f"weights: reading {snapshot.files.paths[0].name}, not {name}, which is there as well")
    quantized_as = options.quantize or (weights.recipe and weights.recipe.kind)
    if options.compile and quantized_as is not None:
        raise BadRequest(
            "steps of quantised weights cannot be compiled",
            detail=f"expected weights as published with --compile, found {quantized_as}",
            hint="leave --compile out: their kernels are compiled already",
        )
    weights, compute = choose_for(weights, device=options.device, dtype=options.dtype, threads=options.threads)
    shard = Shard(snapshot.config, rank=0, ranks=options.ranks)
    if shard.ranks > 1:
        check_rank_devices(compute.device, shard.ranks)
        compute = share_threads(compute, shard.ranks)
    report(compute.line())
    if shard.ranks > 1:
        plan, line = plan_ranks(shard, compute, context=positions, prefill_chunk=PREFILL_CHUNK)
        report(line)
    else:
        plan = plan_memory(
            snapshot.config,
            compute,
            context=positions,
            prefill_chunk=PREFILL_CHUNK,
            slack=slack,
            kv=options.kv,
        )
        plan = replace(plan, weights=weights.resident_bytes(compute))
    lora, adapter = options.lora, None
    if lora is not None:
        adapter = open_adapter(lora.path, snapshot.config, scale=lora.scale)
        report(describe(adapter, apart=lora.apart))
        plan = replace(plan, weights=plan.weights + adapter.nbytes)
    report(plan.line())
    if not options.ignore_memory_plan:
        can_quantize = shard.ranks == 1 and not options.compile and options.dtype in ("auto", "bfloat16")
        plan.require_fit(weights.savings(compute) if can_quantize else {})
    clock.mark("device")
    with ExitStack() as resources:
        step: Step = eager_step
        compiling = None
        if shard.ranks > 1:
            ranks = resources.enter_context(Ranks(weights.published, shard, compute))
            model, step = ranks.load(), ranks.step
        else:
            transforms = [merging(adapter, dtype=compute.dtype)] if adapter and lora and not lora.apart else []
            model = weights.load(compute, transforms=transforms, has_row_kernels=not options.compile, report=report)
            if adapter and lora and lora.apart:
                set_apart(model, adapter)
        if options.compile:
            from mistral_runtime.inductor_decode import compile_decode

            step = compiling = BackgroundCompiledStep(model, compile_decode, report=report)
            resources.callback(compiling.close)
        model.kv = options.kv
        engine = None
        if step is eager_step and options.graphs:
            engine = device_engine(
                model,
                positions=positions,
                context=context,
                slack=slack,
                lookup=lookup,
                report=report,
            )
        clock.mark("model_built")
        return Session(
            snapshot,
            compute,
            engine or Engine(model, context=context, step=step, lookup=lookup, slack=slack),
            time.perf_counter() - started,
            clock,
            lora=result_fields(adapter, apart=lora.apart) if adapter and lora else None,
            ranks=shard.ranks,
            compiling=compiling,
            resources=resources.pop_all(),
        )


def _refuse_together(options: ComputeOptions) -> None:
    """Raise BadRequest where two things were asked for that do not go together."""
    has_ranks = options.ranks > 1
    for is_refused, flags, what in (
        (has_ranks and options.compile, "--compile or --tp", "steps of several ranks cannot be compiled"),
        (has_ranks and options.lora is not None, "--lora or --tp", "an adapter cannot be spread over several ranks"),
        (has_ranks and options.quantize is not None, "--quantize or --tp", "several ranks cannot quantise"),
        (has_ranks and options.lookup == "on", "--lookup on or --tp", "several ranks cannot guess ahead"),
        (has_ranks and options.kv != "exact", f"--kv {options.kv} or --tp", "several ranks keep keys and values exact"),
        (
            options.compile and options.kv != "exact",
            f"--kv {options.kv} or --compile",
            "compiled steps keep keys and values exact",
        ),
        (options.compile and options.lookup == "on", "--lookup on or --compile", "compiled steps cannot guess ahead"),
    ):
        if is_refused:
            raise BadRequest(what, detail=f"expected {flags}, found both", hint="leave one of them out")


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
    cached_tokens: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding rate. The first token belongs to the prefill, so one token alone has no rate."""
        steps = self.generated_tokens - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds > 0 else None


def stream_answer(
    session: Session,
    request: Request,
    *,
    stops: Sequence[str],
    strip_leading_space: bool,
    emit: Callable[[str], None],
    cache: ConversationCache | None = None,
) -> Answer:
    """Generate, passing finished text to `emit` as it comes, and return the whole."""
    generation = session.engine.generate(request, cache=cache)
    decoder = StreamingDecoder(session.snapshot.tokenizer, strip_leading_space=strip_leading_space)
    matcher = StopMatcher(stops)
    shown: list[str] = []
    for piece in text_pieces(session.clock.watch(generation), decoder, matcher):
        shown.append(piece)
        emit(piece)
    return Answer(
        text="".join(shown),
        prompt_tokens=len(request.prompt),
        generated_tokens=generation.generated_tokens,
        finish_reason="stop" if matcher.matched is not None else generation.finish_reason,
        prefill_seconds=generation.prefill_seconds,
        decode_seconds=generation.decode_seconds,
        drafted_tokens=generation.pace.drafted,
        accepted_tokens=generation.pace.accepted,
        cached_tokens=generation.cached_tokens,
    )
