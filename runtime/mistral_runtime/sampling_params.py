"""How the next token is to be chosen, as checked numbers. Imports no torch: who asks need not be who computes."""

from __future__ import annotations

from dataclasses import dataclass

from mistral_runtime.errors import BadSampling


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
