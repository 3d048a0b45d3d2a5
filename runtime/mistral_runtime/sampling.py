"""Logits to the next token, as pure functions in the order they are applied.

repetition penalty → temperature → top-k → top-p → min-p → draw. Logits are float32 on the CPU, shape (V). The only
state is the generator that the caller passes in, so equal logits and equal seeds give equal tokens on every device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from mistral_runtime.errors import NonFiniteLogits
from mistral_runtime.sampling_params import SamplingParams

_TOP_P_COUNTS = (64, 1024)


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
    return draw(token_probabilities(logits, params), generator)


def draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """Return an id drawn from a distribution (V), by one random number: the first whose cumulated share exceeds it."""
    shares = probabilities.double().cumsum(0)
    total = float(shares[-1])
    # Below the total even where the product is rounded up to it, so that what is found has a share of its own.
    point = min(float(torch.rand((), generator=generator, dtype=torch.float64)) * total, math.nextafter(total, 0))
    return int(torch.searchsorted(shares, torch.tensor(point, dtype=torch.float64), right=True))


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
    # Shifted first: a tiny temperature would otherwise push the largest logits to infinity.
    logits = (logits - logits.max()) / params.temperature
    if params.top_k:
        logits = keep_top_k(logits, params.top_k)
    if params.top_p < 1:
        logits = keep_top_p(logits, params.top_p)
    if params.min_p > 0:
        logits = keep_min_p(logits, params.min_p)
    return logits.softmax(-1)


def penalize(logits: Tensor, seen: Iterable[int], penalty: float) -> Tensor:
    """Make tokens already seen less likely (Keskar et al. 2019, arXiv 1909.05858, section 4.1).

    Positive logits are divided and negative ones multiplied, so that the push is downward for both.
    """
    ids = torch.tensor(sorted(set(seen)), dtype=torch.long)
    chosen = logits[ids]
    return logits.index_put((ids,), torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Rule out all but the k largest."""
    values, ids = logits.topk(min(k, logits.numel()))
    return torch.full_like(logits, -math.inf).index_put((ids,), values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Rule out all but the smallest set of likeliest tokens that reaches probability p (arXiv 1904.09751).

    A token stays while the sum before it is below p, so the likeliest always stays.
    """
    probabilities = logits.softmax(-1)
    # Sorting all of 32,000 takes milliseconds, and most often a few hold nearly everything.
    for count in (*(n for n in _TOP_P_COUNTS if n < logits.numel()), logits.numel()):
        values = probabilities.topk(count).values
        before = values.cumsum(-1) - values
        if bool(before[-1] >= p):
            break
    kept = values[before < p]
    # Where several are as likely as the last that stays, those with the lower ids do.
    ties = (probabilities == kept[-1]).nonzero()[:, 0][int((kept == kept[-1]).sum()) :]
    dropped = (probabilities < kept[-1]).index_fill(0, ties, True)
    return logits.masked_fill(dropped, -math.inf)


def keep_min_p(logits: Tensor, fraction: float) -> Tensor:
    """Rule out tokens less likely than `fraction` of the likeliest (arXiv 2407.01082)."""
    return logits.masked_fill(logits < logits.max() + math.log(fraction), -math.inf)
