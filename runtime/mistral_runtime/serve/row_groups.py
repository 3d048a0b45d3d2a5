"""Which sequences' rows go through the matrices together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mistral_runtime.batched_step import Segment
from mistral_runtime.kernels.attention import attention_kernel
from mistral_runtime.kernels.rows import MAX_ROWS, row_kernels
from mistral_runtime.serve.answer import Answer
from mistral_runtime.transformer import Transformer


@dataclass(frozen=True)
class Work:
    """What one answer adds in a step."""

    answer: Answer
    segment: Segment


def rows_are_independent(model: Transformer) -> bool:
    """Say whether a row of up to MAX_ROWS gets the same bits whatever lies beside it: with our kernels alone."""
    is_ours = model.device.type == "cpu" and model.dtype == torch.bfloat16
    return is_ours and row_kernels() is not None and attention_kernel() is not None


def groups_of_rows(
    decode: Sequence[Work], prompts: Sequence[Work], *, deterministic: bool, independent: bool
) -> list[list[Work]]:
    """Return the products of one step: one for all, or as `EngineLoop` says for deterministic answers."""
    if not deterministic:
        return [[*decode, *prompts]] if decode or prompts else []
    groups: list[list[Work]] = []
    rows = MAX_ROWS
    for work in decode:
        count = len(work.segment.ids)
        if not independent or rows + count > MAX_ROWS:
            groups.append([])
            rows = 0
        groups[-1].append(work)
        rows += count
    return [*groups, *([work] for work in prompts)]
