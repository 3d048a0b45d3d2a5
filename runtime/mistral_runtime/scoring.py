"""How likely each token of a given sequence is: ids in, logits or log probabilities out.

The counterpart of `engine`, which chooses tokens: here they are all known, so whole chunks are computed at once and
every position's logits are wanted. Knows nothing of text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mistral_runtime.errors import BadRequest
from mistral_runtime.kv_cache import RollingKVCache
from mistral_runtime.sampling import require_finite
from mistral_runtime.transformer import Transformer

# Positions per step. Half a prefill chunk, since here each position has its row of logits: 33 MB at 32,768 columns.
SCORE_CHUNK = 256


def require_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raise BadRequest unless there are ids and the vocabulary has all of them."""
    wrong = next((token for token in ids if not 0 <= token < vocab_size), None)
    if not ids or wrong is not None:
        raise BadRequest(
            "these are no token ids of the model",
            detail=f"expected at least one, each below {vocab_size}, found {'none' if wrong is None else wrong}",
            hint="encode the text with the model's own tokenizer",
        )


def logits_by_chunk(model: Transformer, ids: Sequence[int], *, first: int = 0) -> Iterator[Tensor]:
    """Give the logits after each position from `first` on, in chunks (T, V), float32 on the CPU.

    Positions before `first` are computed without the vocabulary projection, which would be thrown away.

    Raises:
        NonFiniteLogits: The model computed NaN or infinity.
    """
    cache = model.new_cache(len(ids))
    for start in range(0, first, SCORE_CHUNK):
        _forward(model, ids[start : min(start + SCORE_CHUNK, first)], cache, last_only=True)
    for start in range(first, len(ids), SCORE_CHUNK):
        logits = _forward(model, ids[start : start + SCORE_CHUNK], cache, last_only=False).cpu()
        require_finite(logits)
        yield logits


@torch.inference_mode()
def _forward(model: Transformer, ids: Sequence[int], cache: RollingKVCache, *, last_only: bool) -> Tensor:
    tokens = torch.tensor([ids], device=model.device)  # (1, T)
    logits: Tensor = model(tokens, cache, last_only=last_only)  # (1, T or 1, V)
    return logits[0]


def all_logits(model: Transformer, ids: Sequence[int]) -> Tensor:
    """Return the logits after every position, (T, V), float32 on the CPU."""
    return torch.cat(list(logits_by_chunk(model, ids)))


def token_logprobs(model: Transformer, ids: Sequence[int], *, first: int) -> Tensor:
    """Return ln p(id | all ids before it) of the ids from `first` on, float64 (len(ids) − first).

    `first` is at least 1: nothing comes before the first id. The last id is never computed with, only predicted.
    """
    targets = torch.tensor(ids[first:])
    found, done = [], 0
    for logits in logits_by_chunk(model, ids[:-1], first=first - 1):
        wanted = targets[done : done + len(logits)]
        found.append(target_logprobs(logits, wanted))
        done += len(logits)
    return torch.cat(found)


def target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log probability of one target id (T) in each row of logits (T, V), as float64 (T)."""
    chosen = logits.gather(1, targets[:, None])[:, 0]
    return chosen.double() - logits.logsumexp(1).double()


def likeliest(logits: Tensor, count: int) -> list[tuple[int, float]]:
    """Return the `count` likeliest ids of one row of logits (V) with their log probabilities, best first."""
    values, ids = logits.topk(min(count, logits.numel()))
    logprobs = values.double() - logits.logsumexp(0).double()
    return list(zip(ids.tolist(), logprobs.tolist(), strict=True))
