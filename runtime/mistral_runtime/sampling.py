"""Logits to the next token, as pure functions in the order they are applied.

repetition penalty → temperature → top-k → top-p → min-p → draw. Logits are float32 on the CPU, shape (V). The only
state is the generator that the caller passes in, so equal logits and equal seeds give equal tokens on every device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mistral_runtime.errors import BadSampling, NonFiniteLogits


@dataclass(frozen=True)
class SamplingParams:
    """How to choose. The defaults choose the most likely token every time (greedy).

    Attributes:
        temperature: 0 is greedy; up to 10. Divides the logits.
        top_k: Keep this many of the most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of likeliest tokens whose probabilities reach this sum; in (0, 1].
        min_p: Drop tokens less likely than this fraction of the likeliest; in [0, 1).
        repetition_penalty: Above 1 discourages tokens already in prompt or answer; in (0, 10].
        seed: Makes a run repeatable; None draws one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require("temperature", self.temperature, "from 0 to 10", 0 <= self.temperature <= 10)
        _require("top_k", self.top_k, "0 or more", self.top_k >= 0)
        _require("top_p", self.top_p, "above 0 and up to 1", 0 < self.top_p <= 1)
        _require("min_p", self.min_p, "from 0 to below 1", 0 <= self.min_p < 1)
        _require(
            "repetition_penalty", self.repetition_penalty, "above 0 and up to 10", 0 < self.repetition_penalty <= 10
        )
        _require("seed", self.seed, "from 0 to 2^63−1", self.seed is None or 0 <= self.seed < 1 << 63)


def _require(name: str, value: float | None, expected: str, holds: bool) -> None:
    # Comparisons with NaN are false, so NaN ends up here too.
    if not holds:
        raise BadSampling(
            f"{name} is out of range",
            detail=f"expected a number {expected}, found {value}",
            hint=f"set --{name.replace('_', '-')} within that range, or leave it out",
        )


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
    probabilities = token_probabilities(logits, params)
    return int(torch.multinomial(probabilities, 1, generator=generator))


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
    probabilities, ids = logits.softmax(-1).sort(descending=True, stable=True)
    dropped = ids[probabilities.cumsum(-1) - probabilities >= p]
    return logits.index_fill(0, dropped, -math.inf)


def keep_min_p(logits: Tensor, fraction: float) -> Tensor:
    """Rule out tokens less likely than `fraction` of the likeliest (arXiv 2407.01082)."""
    return logits.masked_fill(logits < logits.max() + math.log(fraction), -math.inf)
