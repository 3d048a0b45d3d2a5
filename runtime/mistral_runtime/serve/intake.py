"""What a request from the other process has to be before anything is computed for it.

The HTTP process checks what its clients send; this looks again at all that could otherwise stop the engine for
everybody.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from mistral_runtime.config import ModelConfig
from mistral_runtime.engine import check_context
from mistral_runtime.errors import BadRequest
from mistral_runtime.serve.protocol import Embed, Generate

MAX_LOGPROBS = 1000


def needed_positions(request: Generate | Embed, config: ModelConfig, context: int) -> int:
    """Check a request and return how many positions its sequence may come to need.

    Raises:
        RequestError: It cannot be served.
    """
    _require_ids("prompt", request.prompt, config.vocab_size)
    if isinstance(request, Embed):
        return _checked(config, len(request.prompt), 0, context)
    _require_count("max_new_tokens", request.max_new_tokens, 1 << 24)
    _require_count("min_tokens", request.min_tokens, 1 << 24)
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(request, name) is not None:
            _require_count(name, getattr(request, name), MAX_LOGPROBS)
    _require_ids("stop_ids", request.stop_ids, config.vocab_size)
    _require_ids("logit_bias", [token for token, _ in request.logit_bias], config.vocab_size)
    _require_numbers("logit_bias", [bias for _, bias in request.logit_bias])
    _require_numbers("presence_penalty", [request.presence_penalty])
    _require_numbers("frequency_penalty", [request.frequency_penalty])
    return _checked(config, len(request.prompt), request.max_new_tokens, context)


def _checked(config: ModelConfig, prompt_tokens: int, new_tokens: int, context: int) -> int:
    if new_tokens == 0 and prompt_tokens > 0:
        # The check counts an answer of at least one token, which is not computed with here.
        check_context(config, prompt_tokens=max(1, prompt_tokens - 1), max_new_tokens=1, context=context)
        return prompt_tokens
    return check_context(config, prompt_tokens=prompt_tokens, max_new_tokens=new_tokens, context=context)


def _require_ids(name: str, ids: object, vocab_size: int) -> None:
    if not isinstance(ids, list):
        raise _bad(name, "a list of token ids", type(ids).__name__)
    wrong = next((token for token in ids if type(token) is not int or not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise _bad(name, f"token ids from 0 to {vocab_size - 1}", wrong)


def _require_count(name: str, value: object, most: int) -> None:
    if type(value) is not int or not 0 <= value <= most:
        raise _bad(name, f"a whole number from 0 to {most}", value)


def _require_numbers(name: str, values: Iterable[object]) -> None:
    for value in values:
        if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > 1e4:  # type: ignore[arg-type]
            raise _bad(name, "a number from -10000 to 10000", value)


def _bad(name: str, expected: str, found: object) -> BadRequest:
    return BadRequest(
        f"{name} cannot be used", detail=f"expected {expected}, found {found!r}"[:300], hint=f"correct {name}"
    )
