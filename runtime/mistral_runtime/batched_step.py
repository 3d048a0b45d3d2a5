"""One step of many sequences, each with a cache of its own.

A decode step reads every weight to multiply it with one row. Of many sequences' rows each costs little more: the
weights are read once for all of them. Owns which rows are whose; the arithmetic is the model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mistral_runtime.kv_cache import RollingKVCache
from mistral_runtime.step_attention import StepAttention
from mistral_runtime.transformer import Transformer


@dataclass(frozen=True)
class Segment:
    """What one sequence adds in a step.

    Attributes:
        cache: Its own, of batch size 1.
        ids: Token ids, at least one.
        wants: After which of them logits are wanted. The vocabulary is computed for no others.
    """

    cache: RollingKVCache
    ids: Sequence[int]
    wants: Literal["last", "all", "none"] = "last"

    @property
    def wanted(self) -> range:
        """Which of its ids are followed by logits."""
        return range({"last": len(self.ids) - 1, "all": 0, "none": len(self.ids)}[self.wants], len(self.ids))


@torch.inference_mode()
def batched_step(model: Transformer, segments: Sequence[Segment]) -> list[Tensor]:
    """Append each segment's ids to its sequence and return its logits in float32 on the CPU, (0 or 1 or T, V) each.

    On the CPU in bfloat16, with the compiled kernels, a sequence gets bit for bit what it gets alone, as long as both
    steps have at most `kernels.rows.MAX_ROWS` rows. With more, products go through oneDNN, whose sums depend on their
    number; and in other types torch promises nothing: then logits agree up to rounding.

    Raises:
        ValueError: A segment without ids, a cache without room or of another batch size, or one that is there twice.
            No cache has been changed then.
    """
    if not segments:
        return []
    for segment in segments:
        if not segment.ids or segment.cache.batch_size != 1:
            raise ValueError(f"a segment of {len(segment.ids)} ids for a batch of {segment.cache.batch_size}")
    attention = StepAttention([(segment.cache, len(segment.ids)) for segment in segments])
    tokens = torch.tensor([[token for segment in segments for token in segment.ids]], device=model.device)
    x = model.hidden(tokens, attention)  # (1, T, dim)
    logits = _project(model, x, _wanted_rows(segments))
    return list(torch.split(logits, [len(segment.wanted) for segment in segments]))


def _wanted_rows(segments: Sequence[Segment]) -> list[int]:
    rows, first = list[int](), 0
    for segment in segments:
        rows.extend(first + index for index in segment.wanted)
        first += len(segment.ids)
    return rows


def _project(model: Transformer, x: Tensor, rows: list[int]) -> Tensor:
    """Return the logits of some rows of x (1, T, dim), (rows, V)."""
    if not rows:
        return torch.empty(0, model.config.vocab_size)
    if len(rows) < x.shape[1]:
        x = x[:, rows]
    return model.project(x)[0].cpu()
