"""The `engine` command: a loaded model at the end of a socket.

Started by the HTTP process, which hands over one end of a socket pair, and ends with it. Signals are the parent's to
decide on. A failure to load is three lines on stderr and an exit code, as with every command.
"""

from __future__ import annotations

import signal
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue

import torch

from mistral_runtime.device import dtype_name
from mistral_runtime.gpu.choose import gains_from_static_steps, serving_steps
from mistral_runtime.kv_cache import cache_bytes, cache_positions
from mistral_runtime.kv_int8 import bytes_per_head
from mistral_runtime.machine import available_memory
from mistral_runtime.serve.cache_budget import choose_cache_positions
from mistral_runtime.serve.caches import SERVING_SLACK, CacheMaker
from mistral_runtime.serve.constraints import Constraints
from mistral_runtime.serve.engine_link import EngineLink
from mistral_runtime.serve.engine_loop import EngineLoop, Inbox
from mistral_runtime.serve.protocol import Ready
from mistral_runtime.serve.scheduler import Limits
from mistral_runtime.session import DEFAULT_CHAT_CONTEXT, ComputeOptions, Session, load_session, open_snapshot
from mistral_runtime.terminal import write_err

_WORKSPACE_BYTES = 512 << 20  # interpreter, torch, and the activations of one chunk


@dataclass(frozen=True)
class EngineOptions:
    """What the command line asked for; see `arguments`."""

    directory: Path
    descriptor: int
    compute: ComputeOptions
    context: int | None = None
    max_running: int = 8
    cache_positions: int | None = None
    prefill_chunk: int = 64
    deterministic: bool = False
    quiet: bool = False


def run_engine(options: EngineOptions) -> int:
    """Load, say so, serve until drained, and return the exit code.

    Raises:
        MistralRuntimeError: The model cannot be loaded.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    inbox: Inbox = SimpleQueue()
    link = EngineLink(options.descriptor, inbox)
    report = _ignore if options.quiet else write_err
    snapshot = open_snapshot(options.directory, chat_template="auto")
    context = options.context or snapshot.config.context_limit or snapshot.config.max_position_embeddings
    free_bytes = available_memory()
    with closing(
        load_session(
            snapshot,
            replace(options.compute, graphs=False),  # those of the loop's own caches, not of one answer at a time
            positions=min(context, options.cache_positions or DEFAULT_CHAT_CONTEXT),
            context=context,
            report=report,
        )
    ) as session:
        caches, limits = _plan(session, options, context, free_bytes)
        report(f"cache: {limits.cache_positions} positions for up to {limits.max_running} answers at once")
        constraints = Constraints(snapshot.tokenizer)
        loop = EngineLoop(
            limits,
            caches,
            inbox=inbox,
            emit=link.send,
            lookup=options.compute.lookup,
            constraints=constraints,
            eos_id=snapshot.tokenizer.eos_id,
        )
        link.send(_ready(session, options, caches, limits))
        loop.run()
        constraints.close()
        link.flush()
    return 0


def _plan(session: Session, options: EngineOptions, context: int, free_bytes: int | None) -> tuple[CacheMaker, Limits]:
    config, model = session.snapshot.config, session.engine.model
    may_be_static = options.compute.graphs and not options.deterministic and gains_from_static_steps(model.device)
    positions = choose_cache_positions(
        wanted=options.cache_positions,
        # Batches of static steps are padded with rows that need a sequence's memory.
        most=(options.max_running + may_be_static) * cache_positions(config, context, slack=SERVING_SLACK),
        room_bytes=_room_bytes(session, free_bytes),
        position_bytes=cache_bytes(config, 1, bytes_per_head=bytes_per_head(config, options.compute.kv, model.dtype)),
        ignore_plan=options.compute.ignore_memory_plan,
    )
    if may_be_static:
        steps = serving_steps(
            model,
            slots=options.max_running,
            context=context,
            positions=positions,
            slack=SERVING_SLACK,
            report=write_err,
        )
        if steps is not None:
            room = steps.pool.capacity * options.max_running
            limits = Limits(room, options.max_running, prefill_chunk=options.prefill_chunk)
            return CacheMaker(model, context, SERVING_SLACK, steps), limits
    # A sequence that could never fit is no context to promise.
    if config.sliding_window is None:
        context = min(context, positions)
    limits = Limits(
        positions, options.max_running, prefill_chunk=options.prefill_chunk, deterministic=options.deterministic
    )
    return CacheMaker(model, context, SERVING_SLACK), limits


def _room_bytes(session: Session, free_bytes: int | None) -> int | None:
    """Return what is free beside the weights: of the machine before they were loaded, or of the device after."""
    if session.compute.device.type == "cuda":
        return torch.cuda.mem_get_info(session.compute.device)[0] - _WORKSPACE_BYTES
    if free_bytes is None:
        return None
    tensors = [*session.engine.model.parameters(), *session.engine.model.buffers()]
    return free_bytes - sum(tensor.nbytes for tensor in tensors) - _WORKSPACE_BYTES


def _ready(session: Session, options: EngineOptions, caches: CacheMaker, limits: Limits) -> Ready:
    return Ready(
        context=caches.context,
        vocab_size=session.snapshot.config.vocab_size,
        cache_positions=limits.cache_positions,
        max_running=limits.max_running,
        weights=options.compute.quantize or dtype_name(session.compute.dtype),
        device=str(session.compute.device),
        load_seconds=session.load_seconds,
    )


def _ignore(_text: str) -> None:
    """Show nothing."""
