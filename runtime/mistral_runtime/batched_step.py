"""One step of many sequences, each with a cache of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mistral_runtime.engine import eager_step
from mistral_runtime.kv_cache import RollingKVCache
from mistral_runtime.transformer import Transformer


@dataclass(frozen=True)
class Segment:
    """What one sequence adds in a step.

    Attributes:
        cache: Its own, of batch size 1.
        ids: Token ids, at least one.
        wants: After which of them logits are wanted.
    """

    cache: RollingKVCache
    ids: Sequence[int]
    wants: Literal["last", "all", "none"] = "last"


@torch.inference_mode()
def batched_step(model: Transformer, segments: Sequence[Segment]) -> list[Tensor]:
    """Append each segment's ids to its sequence and return its logits in float32 on the CPU, (0 or 1 or T, V) each."""
    return [_step(model, segment) for segment in segments]


def _step(model: Transformer, segment: Segment) -> Tensor:
    logits = eager_step(model, segment.ids, segment.cache, last_only=segment.wants != "all")
    return logits[:0] if segment.wants == "none" else logits
