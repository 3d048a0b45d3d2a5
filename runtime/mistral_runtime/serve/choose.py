"""The next tokens of a batch: each row of logits by its own answer's settings and its own random numbers.

What most answers need, the likeliest token, is found for all rows at once. Penalties, biases and masks are applied in
this order: repetition, presence and frequency, bias, too early to stop, grammar; `sampling.py` does the rest. Log
probabilities are the model's own, before any of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mistral_runtime.sampling import draw_token, new_generator, pushed_down
from mistral_runtime.scoring import likeliest
from mistral_runtime.serve.protocol import Generate


def rows_at_a_glance(rows: Tensor) -> tuple[list[bool], list[int]]:
    """Return of each row of logits (N, V) whether all of it is finite, and its likeliest id (the lowest of equals)."""
    # NaN and infinity both reach one of the extremes; looking at every value apart takes three times as long.
    lowest, highest = rows.aminmax(dim=1)
    finite = torch.isfinite(lowest) & torch.isfinite(highest)
    return finite.tolist(), rows.argmax(dim=1).tolist()


class Chooser:
    """How one answer's tokens are chosen, and what it has to remember for that."""

    def __init__(self, request: Generate) -> None:
        self._sampling = request.sampling
        self._request = request
        self._generator = new_generator(request.sampling)
        self._seen = set(request.prompt) if request.sampling.repetition_penalty != 1 else set()
        self._seen_ids: Tensor | None = None
        self._counts: dict[int, int] = {}
        self._bias_ids = torch.tensor([token for token, _ in request.logit_bias], dtype=torch.long)
        self._bias = torch.tensor([bias for _, bias in request.logit_bias], dtype=torch.float32)
        self._stop_ids = torch.tensor(sorted(set(request.stop_ids)), dtype=torch.long)
        self._has_counts = request.presence_penalty != 0 or request.frequency_penalty != 0
        self._adjusts = bool(request.logit_bias or self._has_counts or request.sampling.repetition_penalty != 1)

    def takes_likeliest(self, generated: int, mask: Tensor | None) -> bool:
        """Say whether the token is simply the likeliest, after so many of the answer."""
        is_early = generated < self._request.min_tokens and len(self._stop_ids) > 0
        return self._sampling.temperature == 0 and not self._adjusts and mask is None and not is_early

    def choose(self, logits: Tensor, *, generated: int, mask: Tensor | None) -> int | None:
        """Return the next id by one row of finite logits (V), or None where nothing is allowed."""
        logits = self._adjusted(logits, generated, mask)
        if logits.max() == -math.inf:
            return None
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        return draw_token(logits, self._sampling, self._generator)

    def note(self, token: int) -> None:
        """Take in a token of the answer."""
        if self._has_counts:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self._sampling.repetition_penalty != 1 and token not in self._seen:
            self._seen.add(token)
            self._seen_ids = None

    def _adjusted(self, logits: Tensor, generated: int, mask: Tensor | None) -> Tensor:
        if self._sampling.repetition_penalty != 1:
            logits = self._penalized(logits)
        if self._counts:
            ids = torch.tensor(list(self._counts), dtype=torch.long)
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float32)
            penalties = self._request.presence_penalty + counts * self._request.frequency_penalty
            logits = logits.index_add(0, ids, -penalties)
        if len(self._bias_ids):
            logits = logits.index_add(0, self._bias_ids, self._bias)
        if generated < self._request.min_tokens:
            logits = logits.index_fill(0, self._stop_ids, -math.inf)
        return logits if mask is None else logits.masked_fill(~mask, -math.inf)

    def _penalized(self, logits: Tensor) -> Tensor:
        if self._seen_ids is None:
            self._seen_ids = torch.tensor(sorted(self._seen), dtype=torch.long)
        changed = pushed_down(logits[self._seen_ids], self._sampling.repetition_penalty)
        return logits.index_put((self._seen_ids,), changed)


def told_logprobs(logits: Tensor, token: int, count: int | None) -> tuple[float | None, list[tuple[int, float]]]:
    """Return a token's log probability by one row of logits (V), and the `count` likeliest with theirs."""
    if count is None:
        return None, []
    logprob = float(logits[token].double() - logits.logsumexp(0).double())
    return logprob, likeliest(logits, count) if count else []


def scored_rows(
    logits: Tensor, targets: Sequence[int], count: int
) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """Return the log probability of one target per row of logits (T, V), and the `count` likeliest of each row."""
    totals = logits.logsumexp(1).double()  # (T,)
    chosen = logits.gather(1, torch.tensor(targets, dtype=torch.long)[:, None])[:, 0].double() - totals
    if not count:
        return chosen.tolist(), [[] for _ in targets]
    values, ids = logits.topk(min(count, logits.shape[1]), dim=1)
    logprobs = values.double() - totals[:, None]
    rows = zip(ids.tolist(), logprobs.tolist(), strict=True)
    return chosen.tolist(), [list(zip(*row, strict=True)) for row in rows]
