"""Token ids in, token ids out: prefill, decode, stop.

Owns the loop and its clocks. Knows nothing of text: no tokenizer, no prompt, no stop string.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from mistral_runtime.config import ModelConfig
from mistral_runtime.conversation_cache import ConversationCache
from mistral_runtime.errors import BadRequest, EmptyPrompt, PromptTooLong
from mistral_runtime.kv_cache import RollingKVCache
from mistral_runtime.lookup import MAX_DRAFT, DraftPace, LookupMode, PromptLookup
from mistral_runtime.sampling import new_generator, next_token
from mistral_runtime.sampling_params import SamplingParams
from mistral_runtime.transformer import Transformer

# Positions per prefill step. Large enough to be bound by arithmetic, small enough that a cancelled prompt stops soon
# and activations stay below 200 MB at 7B.
PREFILL_CHUNK = 512

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Request:
    """What to continue and when to stop.

    Attributes:
        prompt: Token ids, at least one.
        max_new_tokens: The answer's largest length.
        stop_ids: Tokens that end the answer and are not part of it.
        cancel: Looked at before every step; set it from anywhere.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    cancel: threading.Event = field(default_factory=threading.Event)


def check_context(config: ModelConfig, *, prompt_tokens: int, max_new_tokens: int, context: int | None = None) -> int:
    """Return how many positions the sequence may come to need.

    Args:
        context: A limit chosen by the user, below the model's own.

    Raises:
        EmptyPrompt: Nothing to continue.
        BadRequest: No token asked for.
        PromptTooLong: Prompt and answer exceed a limit. Nothing is ever cut off unasked.
    """
    if prompt_tokens < 1:
        raise EmptyPrompt("the prompt is empty", detail="expected at least one token, found none", hint="give a prompt")
    if max_new_tokens < 1:
        raise BadRequest(
            "no tokens were asked for",
            detail=f"expected a count of at least 1, found {max_new_tokens}",
            hint="set --max-tokens to 1 or more",
        )
    needed = prompt_tokens + max_new_tokens
    limits = [limit for limit in (config.context_limit, context) if limit is not None]
    if limits and needed > min(limits):
        raise PromptTooLong(
            f"the prompt has {prompt_tokens} tokens, too long with an answer of up to {max_new_tokens}",
            detail=f"expected at most {min(limits)} together, found {needed}",
            hint="shorten the prompt or lower --max-tokens"
            + ("" if context is None or min(limits) < context else ", or raise --context"),
        )
    return needed


class Generation:
    """One answer under way. Iterate over it for token ids; afterwards it says why it ended and how long it took."""

    def __init__(
        self,
        model: Transformer,
        request: Request,
        *,
        context: int | None,
        prefill_chunk: int,
        step: Step,
        lookup: LookupMode,
        slack: int,
        cache: ConversationCache | None = None,
    ) -> None:
        positions = check_context(
            model.config,
            prompt_tokens=len(request.prompt),
            max_new_tokens=request.max_new_tokens,
            context=context,
        )
        self.finish_reason: FinishReason = "interrupted"
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.generated_tokens = 0
        self.cached_tokens = 0
        self.pace = DraftPace(lookup)
        self._model = model
        self._request = request
        self._prefill_chunk = prefill_chunk
        self._step = step
        self._step_seconds: float | None = None  # of the latest decode step
        self._lookup = None if lookup == "off" else PromptLookup(request.prompt)
        self._kept = cache or ConversationCache(lambda: model.new_cache(positions, slack=slack))

    def __iter__(self) -> Iterator[int]:
        # 1. Prefill: what of the prompt is not cached, chunk by chunk; only the last position's logits are wanted.
        yield from self._answer(self._prefill())

    def _answer(self, rows: Tensor | None) -> Iterator[int]:
        """Give the tokens that follow the prompt, whose last logits are (1, V), or None where it was cancelled."""
        request, generator = self._request, new_generator(self._request.sampling)
        seen, draft = list(request.prompt), list[int]()
        while rows is not None:
            # 2. Choose a token by each row of logits, for as long as that row's own input turned out to be right:
            #    row 0 always, row i+1 if the token chosen by row i is the i-th of the draft. For a draft that is
            #    certain of itself this is speculative sampling (arXiv 2211.17192, section 2.3): the guess x is kept
            #    with probability p(x), and otherwise another token y comes with p(y), which is the residual
            #    distribution times the probability of a refusal. And it draws as many random numbers as plain decoding.
            accepted = 0
            try:
                for row in rows:
                    token = next_token(row, request.sampling, seen=seen, generator=generator)
                    is_foreseen = accepted < len(draft) and token == draft[accepted]
                    accepted += is_foreseen
                    # A stop token ends the answer and is not part of it.
                    if token in request.stop_ids:
                        self.finish_reason = "stop"
                        return
                    seen.append(token)
                    self.generated_tokens += 1
                    yield token
                    # 3. Enough? Checked before computing logits that nobody would read.
                    if self.generated_tokens == request.max_new_tokens:
                        self.finish_reason = "length"
                        return
                    if request.cancel.is_set():
                        return
                    if not is_foreseen:
                        break
            finally:
                self._take_back(draft, accepted)
            # 4. Decode: the newest token and a guess at those behind it.
            draft = self._guess(seen)
            rows = self._decode([seen[-1], *draft])

    def _guess(self, seen: Sequence[int]) -> list[int]:
        """Return ids that may come next, none without lookup; never more than the answer still has room for."""
        if self._lookup is None:
            return []
        for token in seen[len(self._lookup) :]:
            self._lookup.append(token)
        # The step brings one token of its own, so a guess of all that are left would be one too many.
        room = self._request.max_new_tokens - self.generated_tokens - 1
        return self._lookup.propose(min(self.pace.limit(), room))

    def _take_back(self, draft: Sequence[int], accepted: int) -> None:
        """Remove from the cache what was guessed wrongly, and let the pace know."""
        self._kept.rewind(len(draft) - accepted)
        if self._step_seconds is not None:
            self.pace.note(drafted=len(draft), accepted=accepted, seconds=self._step_seconds)

    def _prefill(self) -> Tensor | None:
        started = time.perf_counter()
        prompt, logits = self._request.prompt, None
        self._cache, self.cached_tokens = self._kept.begin(prompt)
        for start in range(self.cached_tokens, len(prompt), self._prefill_chunk):
            if self._request.cancel.is_set():
                return None
            chunk = prompt[start : start + self._prefill_chunk]
            with self._kept.storing(chunk):
                logits = self._step(self._model, chunk, self._cache)
        self.prefill_seconds = time.perf_counter() - started
        return logits

    def _decode(self, ids: Sequence[int]) -> Tensor | None:
        if self._request.cancel.is_set():
            return None
        started = time.perf_counter()
        with self._kept.storing(ids):
            logits = self._step(self._model, ids, self._cache, last_only=False)
        self._step_seconds = time.perf_counter() - started
        self.decode_seconds += self._step_seconds
        return logits


class Step(Protocol):
    """Appends ids (T) to the sequence in the cache and returns logits in float32 on the CPU.

    Those after the last id alone, (1, V), or with `last_only=False` those after each, (T, V).
    """

    def __call__(
        self, model: Transformer, ids: Sequence[int], cache: RollingKVCache, *, last_only: bool = True
    ) -> Tensor:
        """Compute one step."""


@torch.inference_mode()
def eager_step(model: Transformer, ids: Sequence[int], cache: RollingKVCache, *, last_only: bool = True) -> Tensor:
    """Compute one step as it is written, without graphs or compilation; see `Step`."""
    tokens = torch.tensor([ids], device=model.device)  # (1, T)
    logits: Tensor = model(tokens, cache, last_only=last_only)  # (1, 1 or T, V)
    return logits[0].cpu()  # (1 or T, V)


class Engine:
    """Answer requests, one at a time, with one model.

    Args:
        context: Most positions of prompt and answer together; None leaves it to the model.
        prefill_chunk: Positions per step of a prompt.
        step: How a step is computed.
        lookup: Whether to guess several tokens ahead; see `lookup.py`. It changes the time, not the answer.
        slack: How many positions the cache can take back. The same with and without guesses: past a window, attention
            adds up in the order of the cache's slots, and their number decides that order.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        context: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        step: Step = eager_step,
        lookup: LookupMode = "off",
        slack: int = MAX_DRAFT,
    ) -> None:
        self.model = model
        self._step = step
        self._context = context
        self._prefill_chunk = prefill_chunk
        self._lookup = lookup
        self._slack = slack

    def conversation_cache(self, positions: int, *, may_rewind: bool = True) -> ConversationCache:
        """Return an empty cache to hand to `generate` again and again, for sequences of up to `positions`."""
        return ConversationCache(lambda: self.model.new_cache(positions, slack=self._slack), may_rewind=may_rewind)

    def generate(self, request: Request, *, cache: ConversationCache | None = None) -> Generation:
        """Begin an answer; nothing is computed until the result is iterated over.

        Args:
            cache: What is kept from the answer before, for one answer at a time; None computes the whole prompt.

        Raises:
            RequestError: The request cannot be served; see `check_context`.
        """
        return Generation(
            self.model,
            request,
            context=self._context,
            prefill_chunk=self._prefill_chunk,
            step=self._step,
            lookup=self._lookup,
            slack=self._slack,
            cache=cache,
        )
