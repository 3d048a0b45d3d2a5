"""The fields that say how to answer, shared by chat and completions: OpenAI's, and vLLM's beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mistral_runtime.errors import BadSampling
from mistral_runtime.sampling_params import SamplingParams
from mistral_runtime.serve.api_error import bad_request
from mistral_runtime.serve.fields import Fields
from mistral_runtime.serve.grammar_fields import read_grammar
from mistral_runtime.serve.protocol import Generate, Grammar

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_TOKENS = 1 << 24


@dataclass(frozen=True)
class AnswerOptions:
    """How to answer. `stops` are texts; `max_tokens` is None for as many as the context has room for."""

    sampling: SamplingParams
    max_tokens: int | None
    min_tokens: int
    presence_penalty: float
    frequency_penalty: float
    logit_bias: list[tuple[int, float]]
    stops: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    choices: int
    is_stream: bool
    includes_usage: bool
    returns_token_ids: bool
    grammar: Grammar | None
    priority: int

    def request(
        self,
        name: str,
        prompt: list[int],
        *,
        choice: int,
        max_new_tokens: int,
        eos_id: int,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        grammar: Grammar | None = None,
    ) -> Generate:
        """Return what to ask the engine for. Each choice has a seed of its own, or they would all be the same."""
        seed = self.sampling.seed
        sampling = self.sampling if seed is None else replace(self.sampling, seed=(seed + choice) % (1 << 63))
        return Generate(
            name,
            prompt,
            max_new_tokens,
            sampling,
            stop_ids=[*self.stop_token_ids, *([] if self.ignore_eos else [eos_id])],
            min_tokens=min(self.min_tokens, max_new_tokens),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            grammar=grammar or self.grammar,
            priority=self.priority,
        )


def read_answer_options(fields: Fields, *, vocab_size: int, max_token_names: Sequence[str]) -> AnswerOptions:
    """Read them.

    Args:
        fields: The request's.
        vocab_size: Ids below it exist.
        max_token_names: What the field with the largest length is called here; the first that is given counts.

    Raises:
        ApiError: A field has another type or is out of range.
    """
    fields.only("best_of", *_lawful_best_of(fields.raw("n")))
    stream = fields.boolean("stream")
    _accept_plain(fields)
    return AnswerOptions(
        sampling=_sampling(fields),
        max_tokens=_max_tokens(fields, max_token_names),
        min_tokens=fields.integer("min_tokens", 0, low=0, high=MAX_TOKENS),
        presence_penalty=fields.number("presence_penalty", 0.0, low=-2, high=2),
        frequency_penalty=fields.number("frequency_penalty", 0.0, low=-2, high=2),
        logit_bias=_logit_bias(fields, vocab_size),
        stops=_stops(fields),
        stop_token_ids=tuple(read_ids(fields, "stop_token_ids", vocab_size, at_most=256)),
        ignore_eos=fields.boolean("ignore_eos"),
        choices=fields.integer("n", 1, low=1, high=MAX_CHOICES),
        is_stream=stream,
        includes_usage=_includes_usage(fields, stream),
        returns_token_ids=fields.boolean("return_token_ids"),
        grammar=read_grammar(fields),
        priority=fields.integer("priority", 0, low=-(1 << 31), high=1 << 31),
    )


def read_ids(fields: Fields, name: str, vocab_size: int, *, at_most: int) -> list[int]:
    """Return an array of token ids, each of which exists."""
    values = fields.array(name, at_most=at_most) or []
    if any(type(value) is not int or not 0 <= value < vocab_size for value in values):
        raise fields.wrong(name, f"token ids from 0 to {vocab_size - 1}")
    return values


def _accept_plain(fields: Fields) -> None:
    """Accept what clients send by habit and what means the same as not sending it."""
    fields.ignored("user", "metadata", "safety_identifier", "prompt_cache_key", "request_id")
    fields.only("service_tier", "auto", "default")
    fields.only("store", False)
    fields.only("skip_special_tokens", True)
    fields.only("include_stop_str_in_output", False)
    fields.only("length_penalty", 1, 1.0)
    fields.only("use_beam_search", False)


def _lawful_best_of(n: Any) -> tuple[Any, ...]:
    return (1 if n is None else n,)


def _sampling(fields: Fields) -> SamplingParams:
    top_k = fields.integer("top_k", 0, low=-1, high=1 << 24)
    try:
        return SamplingParams(
            temperature=fields.number("temperature", 1.0, low=0, high=10),
            top_k=max(0, top_k),
            top_p=fields.number("top_p", 1.0, low=0, high=1),
            min_p=fields.number("min_p", 0.0, low=0, high=1),
            repetition_penalty=fields.number("repetition_penalty", 1.0, low=0, high=10),
            seed=fields.integer("seed", None, low=0, high=(1 << 63) - 1),
        )
    except BadSampling as error:
        raise bad_request(f"{error.what}: {error.detail}", param=error.what.split()[0]) from error


def _max_tokens(fields: Fields, names: Sequence[str]) -> int | None:
    given = [fields.integer(name, None, low=0, high=MAX_TOKENS) for name in names]
    return next((value for value in given if value is not None), None)


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.raw("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(map(_is_stop, stops)):
        raise fields.wrong("stop", f"a string, or up to {MAX_STOPS}, of 1 to {MAX_STOP_CHARACTERS} characters each")
    return tuple(stops)


def _is_stop(value: Any) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= MAX_STOP_CHARACTERS


def _logit_bias(fields: Fields, vocab_size: int) -> list[tuple[int, float]]:
    value = fields.raw("logit_bias")
    if value is None:
        return []
    expected = f"an object of up to {MAX_LOGIT_BIAS} token ids below {vocab_size}, each with a number from -100 to 100"
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        raise fields.wrong("logit_bias", expected)
    pairs = []
    for key, bias in value.items():
        is_id = key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocab_size
        if not is_id or type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise fields.wrong("logit_bias", expected)
        pairs.append((int(key), float(bias)))
    return pairs


def _includes_usage(fields: Fields, stream: bool) -> bool:
    options = fields.child("stream_options")
    if options is None:
        return False
    if not stream:
        raise fields.wrong("stream_options", "nothing, as stream is not true")
    includes = options.boolean("include_usage")
    options.only("continuous_usage_stats", False)
    options.only("include_obfuscation", False)
    options.done()
    return includes
