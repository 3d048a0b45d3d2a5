"""Decode steps that become compiled ones while answers are under way.

A thread compiles and then checks; until it is done, and for ever if it fails, steps are computed eagerly.
Owns the thread, the check and the swap. What compiling means is a function it is handed (`inductor_decode.py`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mistral_runtime.engine import Step, eager_step
from mistral_runtime.kv_cache import RollingKVCache
from mistral_runtime.process_end import left_to_run
from mistral_runtime.transformer import Transformer

Compiler = Callable[[Transformer], Step]
"""Returns a step that takes one token of a sequence already begun. May take its time and may raise anything."""

# How far compiled logits may be from eager ones, as a share of the largest: a fused kernel rounds in other places.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
PROBE_TOKENS = 12  # as a prompt, and once more as decoded tokens


class BackgroundCompiledStep:
    """An `engine.Step` that is eager at first and compiled from the moment that can be trusted. Close it."""

    def __init__(self, model: Transformer, compiler: Compiler, *, report: Callable[[str], None]) -> None:
        """Begin to compile.

        Args:
            model: Whose steps are to be compiled. Its weights are read by the thread and never changed.
            compiler: What compiles, in the thread.
            report: Is told once: that steps are compiled now, or why they stay eager.
        """
        self._model = model
        self._compiler = compiler
        self._report = report
        self._compiled: Step | None = None
        self._closed = threading.Event()
        # Inductor builds the number of threads into its code and asks for it in the thread that compiles, where OpenMP
        # has a number of its own.
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._compile, name="compile", daemon=True)
        left_to_run(self._thread)
        self._thread.start()

    @property
    def is_compiled(self) -> bool:
        """Whether the next decode step will be a compiled one."""
        return self._compiled is not None

    def __call__(
        self, model: Transformer, ids: Sequence[int], cache: RollingKVCache, *, last_only: bool = True
    ) -> Tensor:
        """Compute one step; see `engine.Step`."""
        compiled = self._compiled
        # A compiler takes sizes of 0 and 1 for constants, so the first positions are another program.
        if compiled is None or len(ids) > 1 or min(cache.length, cache.capacity - 1) < 1:
            return eager_step(model, ids, cache, last_only=last_only)
        before = cache.length
        try:
            return compiled(model, ids, cache)
        except Exception as error:  # whatever a compiler's code may raise, the answer goes on
            self._compiled = None
            if cache.length != before:
                raise
            self._say(f"compile: a compiled step failed, steps are eager again ({_first_line(error)})")
            return eager_step(model, ids, cache, last_only=last_only)  # what the failed step stored is stored over

    def close(self) -> None:
        """Say nothing any more. The thread is left to itself: a compiler cannot be stopped (`process_end.py`)."""
        self._closed.set()

    def _compile(self) -> None:
        started = time.perf_counter()
        torch.set_num_threads(self._threads)
        try:
            compiled = self._compiler(self._model)
            difference = check_step(self._model, compiled)
        except Exception as error:  # noqa: BLE001  # there is no end of what a compiler may raise, and eager steps go on
            self._say(f"compile: steps stay eager ({_first_line(error)})")
            return
        if difference is not None:
            self._say(f"compile: steps stay eager, for compiled ones compute something else ({difference})")
            return
        self._compiled = compiled
        self._say(f"compile: decode steps are compiled now, after {time.perf_counter() - started:.1f} s")

    def _say(self, text: str) -> None:
        if not self._closed.is_set():
            self._report(text)


def check_step(model: Transformer, step: Step) -> str | None:
    """Compare a step with the eager one on a short greedy answer; return what differs, or None.

    Logits have to agree within `TOLERANCES`, and the likeliest token has to be the same unless eager logits have the
    two that close together.
    """
    tolerance = TOLERANCES[model.dtype]
    prompt = [(7 * index + 1) % model.config.vocab_size for index in range(PROBE_TOKENS)]
    eager_cache, cache = (model.new_cache(2 * PROBE_TOKENS) for _ in range(2))
    logits = eager_step(model, prompt, eager_cache)
    eager_step(model, prompt, cache)
    for position in range(PROBE_TOKENS):
        token = int(logits.argmax())
        logits, other = eager_step(model, [token], eager_cache), step(model, [token], cache)
        allowed = tolerance * max(1.0, float(logits.abs().max()))
        error = float((logits - other).abs().max())
        if not error <= allowed:  # not `>`: NaN differs as well
            return f"logits by {error:.2g} at step {position}, where {allowed:.2g} is rounding"
        if float(logits.max() - logits[0, other.argmax()]) > allowed:
            return f"the likeliest token at step {position}"
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
