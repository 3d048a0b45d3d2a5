"""The next tokens of a batch, chosen where the logits are: no value is looked at by the host.

Order and meaning of the settings are those of `sampling.py`. What differs is where chance comes from: a number that
depends on a row's seed and position alone (`counter_random.py`), so a seed gives the same tokens alone and in a batch,
but not those that it gives on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mistral_runtime.gpu.counter_random import uniform
from mistral_runtime.sampling_params import SamplingParams

NOT_FINITE = -1
"""Takes the place of an id where a row's logits were not all finite; whoever reads the ids raises the error."""


@dataclass(frozen=True)
class RowChoice:
    """How one row's tokens are chosen.

    Attributes:
        sampling: The settings; a seed of None draws one now.
        seen: The ids that the repetition penalty knows of before the first token.
        presence: Taken from the logits of every token of the answer so far.
        frequency: The same, once for each time it is there.
    """

    sampling: SamplingParams
    seen: Iterable[int] = ()
    presence: float = 0.0
    frequency: float = 0.0
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        drawn = self.sampling.seed
        object.__setattr__(self, "seed", torch.Generator().seed() >> 1 if drawn is None else drawn)


class DeviceSampler:
    """Chooses tokens for the same rows again and again, and remembers what penalties need."""

    def __init__(self, rows: Sequence[RowChoice], *, vocab_size: int, device: torch.device | str) -> None:
        params = [row.sampling for row in rows]
        self._is_greedy = all(each.temperature == 0 for each in params)
        self._greedy = torch.tensor([each.temperature == 0 for each in params], device=device)
        self._seeds = torch.tensor([row.seed for row in rows], dtype=torch.int64, device=device)
        # Greedy rows go through the same arithmetic, at any temperature, and drop its result.
        self._temperature = _column([each.temperature or 1.0 for each in params], device)
        self._top_k = torch.tensor([[each.top_k or vocab_size] for each in params], device=device)
        # At 1 nothing is ruled out, not even where the sum is rounded to 1 before the last token.
        self._top_p = _column([each.top_p if each.top_p < 1 else math.inf for each in params], device)
        self._least = _column([math.log(each.min_p) if each.min_p else -math.inf for each in params], device)
        self._repetition = _column([each.repetition_penalty for each in params], device)
        self._presence = _column([row.presence for row in rows], device)
        self._frequency = _column([row.frequency for row in rows], device)
        shape = (len(rows), vocab_size)
        self._seen: Tensor | None = None
        if any(each.repetition_penalty != 1 for each in params):
            self._seen = torch.zeros(shape, dtype=torch.bool)
            for index, row in enumerate(rows):
                self._seen[index, list(row.seen)] = True
            self._seen = self._seen.to(device)
        has_counts = any(row.presence or row.frequency for row in rows)
        self._counts = torch.zeros(shape, device=device) if has_counts else None

    def choose(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Return the next ids (B) by logits (B, V) in float32, and take them in.

        Args:
            positions: Where in its sequence each of them will stand, (B) of int64.

        Returns:
            Ids, and NOT_FINITE in rows with a value that is NaN or infinite.
        """
        lowest, highest = logits.aminmax(dim=1)
        finite = torch.isfinite(lowest) & torch.isfinite(highest)
        adjusted = self._adjusted(logits)
        ids = adjusted.argmax(dim=1)
        if not self._is_greedy:
            ids = torch.where(self._greedy, ids, self._drawn(adjusted, positions))
        self._take_in(ids)
        return torch.where(finite, ids, NOT_FINITE)

    def probabilities(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's distribution (B, V), the likeliest first, and which ids those are (B, V)."""
        values, ids = logits.sort(dim=1, descending=True, stable=True)
        values = (values - values[:, :1]) / self._temperature
        rank = torch.arange(values.shape[1], device=values.device)
        values = values.masked_fill(rank >= self._top_k, -math.inf)
        shares = values.softmax(1)
        # The likeliest always stays, for nothing lies before it.
        values = values.masked_fill(shares.cumsum(1) - shares >= self._top_p, -math.inf)
        values = values.masked_fill(values < self._least, -math.inf)
        return values.softmax(1), ids

    def _drawn(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Invert the cumulated distribution at one random number per row."""
        probabilities, ids = self.probabilities(logits)
        shares = probabilities.cumsum(1, dtype=torch.float64)
        total = shares[:, -1:]
        point = uniform(self._seeds, positions)[:, None] * total
        # Below the total even where the product is rounded up to it, so that what is found has a share of its own.
        point = torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))
        # Logits that are not finite have no shares; their index must stay one all the same.
        found = torch.searchsorted(shares, point, right=True).clamp(max=shares.shape[1] - 1)
        return ids.gather(1, found)[:, 0]

    def _adjusted(self, logits: Tensor) -> Tensor:
        if self._seen is not None:
            penalized = torch.where(logits > 0, logits / self._repetition, logits * self._repetition)
            logits = torch.where(self._seen, penalized, logits)
        if self._counts is not None:
            logits = logits - self._presence * (self._counts > 0) - self._frequency * self._counts
        return logits

    def _take_in(self, ids: Tensor) -> None:
        if self._seen is not None:
            self._seen.scatter_(1, ids[:, None], True)
        if self._counts is not None:
            self._counts.scatter_add_(1, ids[:, None], torch.ones_like(ids[:, None], dtype=self._counts.dtype))


def _column(values: Sequence[float], device: torch.device | str) -> Tensor:
    return torch.tensor([[value] for value in values], dtype=torch.float32, device=device)
