"""POST /v1/completions: texts or token ids continued, and scored where `echo` and `logprobs` ask for it."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mistral_runtime.serve.answering import End, Piece, TokenPlace
from mistral_runtime.serve.completion_schema import CompletionRequest, Prompt, parse_completion
from mistral_runtime.serve.event_stream import EventStream, unless_gone
from mistral_runtime.serve.fan_out import merged
from mistral_runtime.serve.json_body import read_object
from mistral_runtime.serve.protocol import Generate, Scored
from mistral_runtime.serve.served_model import room_for_answer
from mistral_runtime.serve.service import Service, note_usage, now, service_of, usage
from mistral_runtime.serve.token_text import LegacyLogprobs
from mistral_runtime.text_stream import StreamingDecoder


async def completions(request: Request) -> Response:
    """Continue one prompt or several, whole or as events."""
    service = service_of(request)
    wanted = parse_completion(await read_object(request), vocab_size=service.model.tokenizer.vocab_size)
    name = service.model.require_name(wanted.model)
    context = service.require_ready().context
    prompts = [await _ids(service, prompt, context, wanted.adds_bos) for prompt in wanted.prompts]
    for ids in prompts:
        room_for_answer(context, ids, wanted.max_tokens)
    batch = _Batch(request, service, wanted, name, prompts)
    if wanted.options.is_stream:
        return EventStream(batch.events(), keep_alive_seconds=service.keep_alive_seconds)
    return JSONResponse(await unless_gone(request, batch.whole()))


async def _ids(service: Service, prompt: Prompt, context: int, adds_bos: bool) -> list[int]:
    if isinstance(prompt, list):
        return prompt
    tokenizer = service.model.tokenizer
    # Without BOS an empty text has no token, and nothing can follow nothing.
    return await service.model.encode(prompt, context=context, bos=adds_bos) or [tokenizer.bos_id]


@dataclass
class _Choice:
    """One answer as it comes."""

    prompt: list[int]
    text: list[str] = field(default_factory=list)
    places: list[TokenPlace] = field(default_factory=list)
    scored: Scored | None = None
    end: End | None = None


class _Batch:
    """One request under way: `n` answers for each prompt, in the order of the prompts."""

    def __init__(
        self, request: Request, service: Service, wanted: CompletionRequest, name: str, prompts: list[list[int]]
    ) -> None:
        self._request = request
        self._service = service
        self._wanted = wanted
        self._prompts = prompts
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._head = {"id": self._id, "object": "text_completion", "created": now(), "model": name}
        self._choices = [_Choice(prompt) for prompt in prompts for _ in range(wanted.options.choices)]

    def _answers(self) -> AsyncGenerator[tuple[int, Piece], None]:
        stops = self._wanted.options.stops
        return merged(
            [
                self._service.answer(self._engine_request(index), stops, strip_leading_space=False)
                for index in range(len(self._choices))
            ]
        )

    def _engine_request(self, index: int) -> Generate:
        scores_prompt = self._wanted.echo and self._wanted.logprobs is not None
        return self._wanted.options.request(
            f"{self._id}-{index}",
            self._choices[index].prompt,
            choice=index % self._wanted.options.choices,
            max_new_tokens=self._wanted.max_tokens,
            eos_id=self._service.model.tokenizer.eos_id,
            logprobs=self._wanted.logprobs,
            prompt_logprobs=self._wanted.logprobs if scores_prompt else None,
        )

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """Give the chunks of the stream."""
        offsets = [0] * len(self._choices)
        async with aclosing(self._answers()) as answers:
            async for index, piece in answers:
                choice = self._choices[index]
                choice.end = piece.end
                if piece.text or piece.end or (piece.tokens and self._tells_tokens):
                    yield self._chunk(index, piece, offsets[index])
                offsets[index] += len(piece.text)
        told = self._usage()
        if self._wanted.options.includes_usage:
            yield {**self._head, "choices": [], "usage": told}

    @property
    def _tells_tokens(self) -> bool:
        return self._wanted.logprobs is not None or self._wanted.options.returns_token_ids

    def _chunk(self, index: int, piece: Piece, offset: int) -> dict[str, Any]:
        logprobs = None
        if piece.tokens and self._wanted.logprobs is not None:
            told = LegacyLogprobs(self._service.model.tokenizer, self._wanted.logprobs)
            told.add_answer(piece.tokens, 0)
            logprobs = told.body()
        choice = {"index": index, "text": piece.text, "logprobs": logprobs, **_ending(piece.end)}
        if self._wanted.options.returns_token_ids:
            choice["token_ids"] = [place.token.token for place in piece.tokens]
            if offset == 0:
                choice["prompt_token_ids"] = self._choices[index].prompt
        usage_field = {"usage": None} if self._wanted.options.includes_usage else {}
        return {**self._head, "choices": [choice], **usage_field}

    async def whole(self) -> dict[str, Any]:
        """Return all answers in one object."""
        if self._wanted.max_tokens == 0 and self._wanted.logprobs is None:
            for choice in self._choices:
                choice.end = End("length", 0)  # an echo alone: there is nothing to compute
        else:
            async with aclosing(self._answers()) as answers:
                async for index, piece in answers:
                    self._take(self._choices[index], piece)
        choices = [self._choice_body(index, choice) for index, choice in enumerate(self._choices)]
        return {**self._head, "choices": choices, "usage": self._usage()}

    def _take(self, choice: _Choice, piece: Piece) -> None:
        choice.scored = piece.scored or choice.scored
        choice.end = piece.end or choice.end
        choice.text.append(piece.text)
        choice.places += piece.tokens

    def _choice_body(self, index: int, choice: _Choice) -> dict[str, Any]:
        asked = self._wanted.prompts[index // self._wanted.options.choices]
        tokenizer = self._service.model.tokenizer
        before = ""
        if self._wanted.echo:
            before = asked if isinstance(asked, str) else tokenizer.decode(choice.prompt)
        body = {
            "index": index,
            "text": before + "".join(choice.text),
            "logprobs": self._logprobs(choice, before),
            **_ending(choice.end),
        }
        if self._wanted.options.returns_token_ids:
            body["token_ids"] = [place.token.token for place in choice.places]
            body["prompt_token_ids"] = choice.prompt
        return body

    def _logprobs(self, choice: _Choice, before: str) -> dict[str, Any] | None:
        if self._wanted.logprobs is None:
            return None
        told = LegacyLogprobs(self._service.model.tokenizer, self._wanted.logprobs)
        if choice.scored is not None:
            self._add_prompt(told, choice.prompt, choice.scored)
        told.add_answer(choice.places, len(before))
        return told.body()

    def _add_prompt(self, told: LegacyLogprobs, prompt: list[int], scored: Scored) -> None:
        decoder = StreamingDecoder(self._service.model.tokenizer, strip_leading_space=True)
        offset = 0
        scores = [(None, None), *zip(scored.logprobs, scored.top, strict=True)]
        for token, (logprob, top) in zip(prompt, scores, strict=True):
            told.add(token, logprob, top, offset)
            offset += len(decoder.feed(token))

    def _usage(self) -> dict[str, Any]:
        ends = [choice.end for choice in self._choices if choice.end is not None]
        told = usage(sum(map(len, self._prompts)), ends)
        note_usage(self._request, told)
        return told


def _ending(end: End | None) -> dict[str, Any]:
    return {"finish_reason": end and end.reason, "stop_reason": end and end.stop_text}
