"""Logits to the next token, as pure functions in the order they are applied.

repetition penalty → temperature → top-k → top-p → min-p → draw. Logits are float32 on the CPU, shape (V). The only
state is the generator that the caller passes in, so equal logits and equal seeds give equal tokens on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from mistral_runtime.errors import NonFiniteLogits
from mistral_runtime.sampling_params import SamplingParams

_TOP_P_COUNTS = (64, 1024)
_FLOAT32 = torch.finfo(torch.float32)


def new_generator(params: SamplingParams) -> torch.Generator:
    """Return a source of random numbers for one answer, seeded from `params` or from the system."""
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def next_token(logits: Tensor, params: SamplingParams, *, seen: Iterable[int], generator: torch.Generator) -> int:
    """Return the next token id, given the logits (V) and all token ids so far.

    Raises:
        NonFiniteLogits: The model computed NaN or infinity.
    """
    require_finite(logits)
    if params.repetition_penalty != 1:
        logits = penalize(logits, seen, params.repetition_penalty)
    if params.temperature == 0:
        return int(logits.argmax())
    return draw_token(logits, params, generator)


def draw_token(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Return the next token id for a temperature above 0, by one random number."""
    probabilities, ids = candidates(logits, params)
    drawn = draw(probabilities, generator)
    return drawn if ids is None else int(ids[drawn])


def draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """Return an index drawn from a distribution (N): the first whose cumulated share exceeds a random number."""
    shares = probabilities.cumsum(0, dtype=torch.float64)
    total = float(shares[-1])
    # Below the total even where the product is rounded up to it, so that what is found has a share of its own.
    point = min(float(torch.rand((), generator=generator, dtype=torch.float64)) * total, math.nextafter(total, 0))
    return int(torch.searchsorted(shares, point, right=True))


def require_finite(logits: Tensor) -> None:
    """Raise NonFiniteLogits if any value of `logits`, whatever its shape, is NaN or infinite."""
    finite = torch.isfinite(logits)
    if not bool(finite.all()):
        raise NonFiniteLogits(
            "the model computed a value that is not a number",
            detail=f"expected finite logits, found {int((~finite).sum())} of {logits.numel()} that are not",
            hint="verify the snapshot; if it is intact, try --dtype float32",
        )


def token_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Return the distribution (V) that the next token is drawn from, for a temperature above 0."""
    probabilities, ids = candidates(logits, params)
    return probabilities if ids is None else torch.zeros_like(logits).index_put((ids,), probabilities)


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Return the probabilities (N) of the tokens that no filter rules out, and their ids (N) in rising order.

    The ids are None where they are all of the vocabulary. Each filter looks only at what the one before it left: after
    the first one that is few, and what is done with few costs nothing.
    """
    # Shifted first: a tiny temperature would otherwise push the largest logits to infinity. One too small for float32
    # would be 0 there, and 0 / 0 is no number.
    logits = (logits - logits.max()) / max(params.temperature, _FLOAT32.tiny)
    ids = None
    filters: list[Callable[[Tensor], Tensor]] = []
    if params.top_k:
        filters.append(partial(top_k_ids, k=params.top_k))
    if params.top_p < 1:
        filters.append(partial(top_p_ids, p=params.top_p))
    if params.min_p > 0:
        filters.append(partial(min_p_ids, fraction=params.min_p))
    for kept_of in filters:
        kept = kept_of(logits)
        logits, ids = logits[kept], kept if ids is None else ids[kept]
    return logits.softmax(-1), ids


def penalize(logits: Tensor, seen: Iterable[int], penalty: float) -> Tensor:
    """Make tokens already seen less likely (Keskar et al. 2019, arXiv 1909.05858, section 4.1).

    Positive logits are divided and negative ones multiplied, so that the push is downward for both.
    """
    ids = torch.tensor(sorted(set(seen)), dtype=torch.long)
    return logits.index_put((ids,), pushed_down(logits[ids], penalty))


def pushed_down(chosen: Tensor, penalty: float) -> Tensor:
    """Return logits of tokens already seen after the penalty, all of them finite however small it is."""
    changed = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    return changed.clamp(_FLOAT32.min, _FLOAT32.max)


def top_k_ids(logits: Tensor, k: int) -> Tensor:
    """Return the ids of the k largest, in rising order."""
    return logits.topk(min(k, logits.numel())).indices.sort().values


def top_p_ids(logits: Tensor, p: float) -> Tensor:
    """Return the ids of the smallest set of likeliest tokens that reaches probability p (arXiv 1904.09751), rising.

    A token stays while the sum before it is below p, so the likeliest always stays; of equals those with lower ids do.
    """
    p = max(p, _FLOAT32.tiny)  # what float32 cannot hold would be 0, which no sum is below
    probabilities = logits.softmax(-1)
    # Sorting all of 32,000 takes milliseconds, and most often a few hold nearly everything.
    for count in (*(n for n in _TOP_P_COUNTS if n < logits.numel()), logits.numel()):
        values, ids = probabilities.topk(count)
        stays = values.cumsum(-1) - values < p
        last = values[stays][-1]
        if count == logits.numel() or (not stays[-1] and values[-1] < last):
            break
    larger, equal = ids[values > last], ids[values == last].sort().values
    return torch.cat((larger, equal[: int(stays.sum()) - len(larger)])).sort().values


def min_p_ids(logits: Tensor, fraction: float) -> Tensor:
    """Return the ids of tokens at least as likely as `fraction` of the likeliest (arXiv 2407.01082), rising."""
    return (logits >= logits.max() + math.log(fraction)).nonzero()[:, 0]
