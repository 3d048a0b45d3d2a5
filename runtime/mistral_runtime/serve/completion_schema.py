"""A completion request, field by field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mistral_runtime.serve.answer_options import MAX_LOGPROBS, AnswerOptions, read_answer_options
from mistral_runtime.serve.fields import Fields

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_PROMPTS = 256

Prompt = str | list[int]


@dataclass(frozen=True)
class CompletionRequest:
    """Everything a completion request asks for. `adds_bos` concerns prompts that are text."""

    model: str | None
    prompts: list[Prompt]
    options: AnswerOptions
    max_tokens: int
    logprobs: int | None
    echo: bool
    adds_bos: bool


def parse_completion(body: dict[str, Any], *, vocab_size: int) -> CompletionRequest:
    """Return what a request body asks for.

    Raises:
        ApiError: A field is unknown, missing, of another type or out of range; the error names it.
    """
    fields = Fields(body)
    options = read_answer_options(fields, vocab_size=vocab_size, max_token_names=("max_tokens",))
    request = CompletionRequest(
        model=fields.text("model", None),
        prompts=read_prompts(fields, "prompt", vocab_size),
        options=options,
        max_tokens=DEFAULT_MAX_TOKENS if options.max_tokens is None else options.max_tokens,
        logprobs=fields.integer("logprobs", None, low=0, high=MAX_LOGPROBS),
        echo=fields.boolean("echo"),
        adds_bos=fields.boolean("add_special_tokens", True),
    )
    fields.only("suffix", "")
    fields.done()
    if request.max_tokens == 0 and not request.echo:
        raise fields.wrong("max_tokens", "1 or more, as echo is not true")
    if request.echo and options.is_stream:
        raise fields.wrong("echo", "false beside stream")
    if len(request.prompts) * options.choices > MAX_PROMPTS:
        raise fields.wrong("n", f"at most {MAX_PROMPTS} answers in all")
    return request


def read_prompts(fields: Fields, name: str, vocab_size: int) -> list[Prompt]:
    """Return one prompt or several: texts, or token ids.

    Raises:
        ApiError: It is neither, or is empty.
    """
    value = fields.raw(name)
    if isinstance(value, str):
        return [value]
    expected = f"a string, token ids below {vocab_size}, or an array of up to {MAX_PROMPTS} of either"
    if not isinstance(value, list) or not value:
        raise fields.wrong(name, expected)
    if _is_ids(value, vocab_size):
        return [value]
    if len(value) > MAX_PROMPTS:
        raise fields.wrong(name, expected)
    if all(isinstance(each, str) for each in value) or all(_is_ids(each, vocab_size) for each in value):
        return value
    raise fields.wrong(name, expected)


def _is_ids(value: Any, vocab_size: int) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(type(each) is int and 0 <= each < vocab_size for each in value)
    )
