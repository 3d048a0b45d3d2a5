"""From rows of logits to the tokens of the answers they belong to, and to an answer's end.

How guesses are kept or not is told in `engine.py`: a row counts for as long as its own input turned out to be right.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mistral_runtime.errors import BadRequest, MistralRuntimeError
from mistral_runtime.sampling import require_finite
from mistral_runtime.serve.answer import Writing
from mistral_runtime.serve.choose import rows_at_a_glance, scored_rows, told_logprobs
from mistral_runtime.serve.protocol import FinishReason, Token
from mistral_runtime.terminal import write_err


@dataclass
class Chosen:
    """What one answer got in a step.

    Attributes:
        accepted: How many of its guesses were right.
        reason: Why it is at its end, if it is.
    """

    answer: Writing
    tokens: list[Token] = field(default_factory=list)
    accepted: int = 0
    reason: FinishReason | None = None
    error: MistralRuntimeError | None = None


def choose_tokens(rows: Sequence[tuple[Writing, Tensor]], *, eos_id: int | None) -> list[Chosen]:
    """Choose the tokens of many answers, each by its own logits (1 + guesses, V), and add them to the answers."""
    if not rows:
        return []
    finite, likeliest = rows_at_a_glance(torch.cat([logits for _, logits in rows]))
    found, first = [], 0
    for answer, logits in rows:
        chosen = Chosen(answer)
        span = slice(first, first + len(logits))
        first = span.stop
        try:
            _choose(chosen, logits, finite[span], likeliest[span], eos_id)
        except Exception as error:  # noqa: BLE001 - one answer's settings must not end everybody's
            chosen.reason, chosen.error = "error", _foreseen(error)
        found.append(chosen)
    return found


def _foreseen(error: Exception) -> MistralRuntimeError:
    """Return what to say of an answer's failure; for a bug, print its traceback."""
    if isinstance(error, MistralRuntimeError):
        return error
    write_err("".join(traceback.format_exception(error)).rstrip())
    return MistralRuntimeError(
        "this is a bug in the engine",
        detail=f"expected a next token, found {type(error).__name__}",
        hint="report it with the traceback that the server's log has",
    )


def _choose(
    chosen: Chosen, logits: Tensor, finite: Sequence[bool], likeliest: Sequence[int], eos_id: int | None
) -> None:
    answer, draft = chosen.answer, chosen.answer.draft
    for index, row in enumerate(logits):
        if not finite[index]:
            require_finite(row)
        token = _token(answer, row, likeliest[index])
        is_foreseen = chosen.accepted < len(draft) and token == draft[chosen.accepted]
        chosen.accepted += is_foreseen
        if answer.is_stop(token, eos_id):
            chosen.reason = "stop"
            return
        logprob, top = told_logprobs(row, token, answer.request.logprobs)
        chosen.tokens.append(Token(answer.key, token, logprob, top))
        answer.note(token)
        chosen.reason = answer.reason
        if chosen.reason is not None or not is_foreseen:
            return


def _token(answer: Writing, row: Tensor, likeliest: int) -> int:
    mask = None if answer.constraint is None else answer.constraint.mask()
    if answer.chooser.takes_likeliest(answer.generated, mask):
        return likeliest
    token = answer.chooser.choose(row, generated=answer.generated, mask=mask)
    if token is None:
        raise BadRequest(
            "no token may come next",
            detail="expected at least one that grammar, bias and the least length allow, found none",
            hint="relax one of them",
        )
    return token


def score_chunk(answer: Writing, logits: Tensor, first: int) -> None:
    """Add to an answer's scores what the logits (T, V) after its prompt's positions from `first` on foretell.

    Raises:
        NonFiniteLogits: The model computed NaN or infinity.
    """
    if answer.scores is None:
        return
    targets = answer.request.prompt[first + 1 : first + 1 + len(logits)]
    if not targets:
        return
    require_finite(logits)
    logprobs, top = scored_rows(logits[: len(targets)], targets, answer.request.prompt_logprobs or 0)
    answer.scores.logprobs += logprobs
    answer.scores.top += top
