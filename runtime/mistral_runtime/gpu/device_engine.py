"""Answers whose decode steps stay on the device: the host launches a step ahead and reads tokens behind it.

The prompt is computed eagerly, in the slot that static steps then go on with. Owns the loop; what a step is, how tokens
are chosen and what a graph is are the other modules' of this folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mistral_runtime.conversation_cache import ConversationCache
from mistral_runtime.engine import (
    PREFILL_CHUNK,
    Engine,
    Generation,
    Request,
    Step,
    check_context,
    eager_step,
)
from mistral_runtime.errors import NonFiniteLogits
from mistral_runtime.gpu.device_sampling import NOT_FINITE, DeviceSampler, RowChoice
from mistral_runtime.gpu.fallback import FallbackRunner
from mistral_runtime.gpu.graphs import LateReader, Runner
from mistral_runtime.gpu.static_cache import SlotCache, SlotPool
from mistral_runtime.gpu.static_step import StaticStep
from mistral_runtime.kv_cache import RollingKVCache
from mistral_runtime.lookup import LookupMode
from mistral_runtime.transformer import Transformer


class DeviceGeneration(Generation):
    """An answer under way, whose tokens after the prompt are chosen on the device.

    `decode_seconds` is the time since the prompt was done, what the reader of the tokens took included: the device goes
    on meanwhile.
    """

    static: StaticStep

    def _answer(self, rows: Tensor | None) -> Iterator[int]:
        cache = self._cache if rows is not None else None
        if rows is None or not isinstance(cache, SlotCache) or cache.pool is not self.static.pool:
            yield from super()._answer(rows)
            return
        request, started = self._request, time.perf_counter()
        for token in self._tokens(rows, cache):
            self.decode_seconds = time.perf_counter() - started
            self.generated_tokens += 1
            yield token
            if self.generated_tokens == request.max_new_tokens:
                self.finish_reason = "length"
                return
            if request.cancel.is_set():
                return
        self.finish_reason = "stop"

    @torch.inference_mode()
    def _first(self, rows: Tensor, sampler: DeviceSampler, cache: SlotCache) -> Tensor:
        device = self.static.model.device
        return sampler.choose(rows.to(device), torch.tensor([cache.length], device=device))

    @torch.inference_mode()
    def _next(self, ids: Tensor, sampler: DeviceSampler, cache: SlotCache) -> Tensor:
        """Launch the step that appends `ids` (1), wherever the device is with them, and choose what follows."""
        bucket = self.static.place([(cache, 0)])
        # An id that stands for an error is none to look up.
        self.static.tokens[:1].copy_(ids.clamp(min=0))
        cache.advance(1)
        logits = self.static.launch(bucket)
        return sampler.choose(logits[:1], self.static.positions[:1] + 1)

    def _tokens(self, rows: Tensor, cache: SlotCache) -> Iterator[int]:
        """Give tokens until one ends the answer, each when the step behind it is under way already."""
        request = self._request
        choice = RowChoice(request.sampling, seen=request.prompt)
        sampler = DeviceSampler([choice], vocab_size=rows.shape[1], device=self.static.model.device)
        reader = LateReader(1, self.static.model.device)
        ids = self._first(rows, sampler, cache)
        while True:
            read = reader.begin(ids)
            # The last token that was asked for is not appended: nobody would look at what follows.
            is_ahead = self.generated_tokens + 1 < request.max_new_tokens
            if is_ahead:
                ids = self._next(ids, sampler, cache)
            (token,) = read()
            if token == NOT_FINITE or token in request.stop_ids:
                # Appended too early. What it overwrote is what the next token in its place overwrites as well.
                cache.rewind(int(is_ahead))
                if token == NOT_FINITE:
                    raise not_finite()
                return
            if is_ahead:
                with self._kept.storing([token]):
                    pass  # it was stored above, before anybody knew which it is
            yield token


class DeviceEngine(Engine):
    """Answer requests, one at a time, by static steps.

    Args:
        pool: Where sequences live. One that finds no slot, or does not fit, is computed as without this class.
        lookup: "on" guesses ahead, checks guesses in eager steps and chooses tokens on the host; "auto" does not guess:
            a step of several tokens is not static, and costs more than it saves.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        pool: SlotPool,
        runner: Runner,
        context: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        lookup: LookupMode = "off",
        report: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self.runner = FallbackRunner(runner, report=report)
        self.static = StaticStep(model, pool, self.runner)
        self._guesses = lookup == "on"
        super().__init__(
            model,
            context=context,
            prefill_chunk=prefill_chunk,
            step=static_or_eager(self.static),
            lookup="on" if self._guesses else "off",
            slack=pool.slack,
        )

    def conversation_cache(self, positions: int, *, may_rewind: bool = True) -> ConversationCache:
        """Return an empty cache in a slot of the pool if there is one; see `Engine`."""

        def make() -> RollingKVCache:
            slot = self.static.pool.new_cache(positions)
            return slot or self.model.new_cache(positions, slack=self._slack)

        return ConversationCache(make, may_rewind=may_rewind)

    def generate(self, request: Request, *, cache: ConversationCache | None = None) -> Generation:
        """Begin an answer; see `Engine`."""
        if cache is None:
            positions = check_context(
                self.model.config,
                prompt_tokens=len(request.prompt),
                max_new_tokens=request.max_new_tokens,
                context=self._context,
            )
            cache = self.conversation_cache(positions)
        if self._guesses:
            return super().generate(request, cache=cache)
        generation = DeviceGeneration(
            self.model,
            request,
            context=self._context,
            prefill_chunk=self._prefill_chunk,
            step=self._step,
            lookup="off",
            slack=self._slack,
            cache=cache,
        )
        generation.static = self.static
        return generation


def static_or_eager(static: StaticStep) -> Step:
    """Return an `engine.Step` that is static for one token of a sequence of the pool, and eager for all else."""

    def step(model: Transformer, ids: Sequence[int], cache: RollingKVCache, *, last_only: bool = True) -> Tensor:
        if len(ids) == 1 and isinstance(cache, SlotCache) and cache.pool is static.pool:
            return static.decode([(cache, ids[0])]).cpu()
        return eager_step(model, ids, cache, last_only=last_only)

    return step


def not_finite() -> NonFiniteLogits:
    """Return the error for logits that nobody on the host has seen."""
    return NonFiniteLogits(
        "the model computed a value that is not a number",
        detail="expected finite logits, found a row with NaN or infinity on the device",
        hint="verify the snapshot; if it is intact, try --dtype float32",
    )
