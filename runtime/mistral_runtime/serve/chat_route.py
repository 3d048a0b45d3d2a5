"""POST /v1/chat/completions."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mistral_runtime.serve.answering import End, Piece, TokenPlace
from mistral_runtime.serve.chat_schema import ChatRequest, ToolCall, parse_chat
from mistral_runtime.serve.event_stream import EventStream, unless_gone
from mistral_runtime.serve.fan_out import merged
from mistral_runtime.serve.json_body import read_object
from mistral_runtime.serve.served_model import refuse_hopeless, room_for_answer
from mistral_runtime.serve.service import Service, note_usage, now, service_of, usage
from mistral_runtime.serve.threads import in_thread
from mistral_runtime.serve.token_text import chat_logprobs
from mistral_runtime.serve.tool_reader import ToolReader


async def chat_completions(request: Request) -> Response:
    """Answer a conversation, whole or as events."""
    service = service_of(request)
    chat = parse_chat(await read_object(request), vocab_size=service.model.tokenizer.vocab_size)
    name = service.model.require_name(chat.model)
    context = service.require_ready().context
    prompt = await encode_chat(service, chat, context)
    conversation = _Conversation(request, service, chat, name, prompt, context)
    if chat.options.is_stream:
        return EventStream(conversation.events(), keep_alive_seconds=service.keep_alive_seconds)
    return JSONResponse(await unless_gone(request, conversation.whole()))


async def encode_chat(service: Service, chat: ChatRequest, context: int) -> list[int]:
    """Return the prompt's ids. Long ones are tokenised beside the event loop.

    Raises:
        ApiError: A base model, or a conversation that its template cannot write.
    """
    writer = service.model.require_chat()
    characters = sum(len(message.content) for message in chat.messages)
    refuse_hopeless(characters, service.model.tokenizer, context)
    return await in_thread(writer.encode, chat.messages, chat.tool_use)


class _Choice:
    """One answer as it comes: what of it is text, what is calls."""

    def __init__(self, chat: ChatRequest, call_token: int | None) -> None:
        self._reader = ToolReader(chat.tool_use, call_token)
        self.end: End | None = None
        self.has_begun = False

    def read(self, piece: Piece) -> tuple[str, list[ToolCall]]:
        if piece.end is None:
            return self._reader.feed(piece)
        self.end = piece.end
        return self._reader.finish()

    @property
    def calls(self) -> int:
        return self._reader.calls

    @property
    def finish_reason(self) -> str | None:
        if self.end is None:
            return None
        return "tool_calls" if self.calls and self.end.reason == "stop" else self.end.reason


class _Conversation:
    """One request under way."""

    def __init__(
        self, request: Request, service: Service, chat: ChatRequest, name: str, prompt: list[int], context: int
    ) -> None:
        self._request = request
        self._service = service
        self._chat = chat
        self._prompt = prompt
        self._writer = service.model.require_chat()
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._head = {"id": self._id, "created": now(), "model": name, "system_fingerprint": None}
        self._length = room_for_answer(context, prompt, chat.options.max_tokens)
        self._choices = [_Choice(chat, self._writer.call_token) for _ in range(chat.options.choices)]

    def _answers(self) -> AsyncGenerator[tuple[int, Piece], None]:
        options = self._chat.options
        grammar = self._writer.grammar(self._chat.tool_use) or options.grammar
        # A grammar knows where its text ends; the template's own end may lie inside it, such as a line break in JSON.
        stops = options.stops if grammar is not None else (*options.stops, *self._writer.stop_strings)
        requests = [
            options.request(
                f"{self._id}-{choice}",
                self._prompt,
                choice=choice,
                max_new_tokens=self._length,
                eos_id=self._service.model.tokenizer.eos_id,
                logprobs=self._chat.logprobs,
                grammar=grammar,
            )
            for choice in range(options.choices)
        ]
        return merged([self._service.answer(each, stops, strip_leading_space=True) for each in requests])

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """Give the chunks of the stream."""
        async with aclosing(self._answers()) as answers:
            async for index, piece in answers:
                choice = self._choices[index]
                calls_before = choice.calls
                text, calls = choice.read(piece)
                if not choice.has_begun:
                    choice.has_begun = True
                    yield self._chunk(index, {"role": "assistant", "content": ""}, first=True)
                if text or (piece.tokens and self._tells_tokens):
                    yield self._chunk(index, {"content": text}, piece.tokens)
                for number, call in enumerate(calls, start=calls_before):
                    yield self._chunk(index, {"tool_calls": [{"index": number, **_call_body(call)}]})
                if choice.end is not None:
                    yield self._chunk(index, {}, reason=choice.finish_reason)
        told = self._usage()
        if self._chat.options.includes_usage:
            yield {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": told}

    @property
    def _tells_tokens(self) -> bool:
        return self._chat.logprobs is not None or self._chat.options.returns_token_ids

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        places: list[TokenPlace] | None = None,
        *,
        reason: str | None = None,
        first: bool = False,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        if places:
            choice.update(self._token_fields(places))
        if first and self._chat.options.returns_token_ids:
            chunk["prompt_token_ids"] = self._prompt
        if self._chat.options.includes_usage:
            chunk["usage"] = None
        return chunk

    def _token_fields(self, places: list[TokenPlace]) -> dict[str, Any]:
        told: dict[str, Any] = {"logprobs": None}
        if self._chat.logprobs is not None:
            told["logprobs"] = chat_logprobs(self._service.model.tokenizer, places, self._chat.logprobs)
        if self._chat.options.returns_token_ids:
            told["token_ids"] = [place.token.token for place in places]
        return told

    async def whole(self) -> dict[str, Any]:
        """Return the answer in one object."""
        texts: list[list[str]] = [[] for _ in self._choices]
        calls: list[list[ToolCall]] = [[] for _ in self._choices]
        places: list[list[TokenPlace]] = [[] for _ in self._choices]
        async with aclosing(self._answers()) as answers:
            async for index, piece in answers:
                text, found = self._choices[index].read(piece)
                texts[index].append(text)
                calls[index] += found
                places[index] += piece.tokens
        body = {
            **self._head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": index,
                    "message": _message("".join(texts[index]), calls[index]),
                    "finish_reason": choice.finish_reason,
                    **self._token_fields(places[index]),
                }
                for index, choice in enumerate(self._choices)
            ],
            "usage": self._usage(),
        }
        return body | ({"prompt_token_ids": self._prompt} if self._chat.options.returns_token_ids else {})

    def _usage(self) -> dict[str, Any]:
        told = usage(len(self._prompt), [choice.end for choice in self._choices if choice.end is not None])
        note_usage(self._request, told)
        return told


def _message(text: str, calls: list[ToolCall]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
    return message | ({"tool_calls": [_call_body(call) for call in calls]} if calls else {})


def _call_body(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
