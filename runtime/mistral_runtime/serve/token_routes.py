"""Embeddings, and the tokenizer as vLLM shows it: /v1/embeddings, /tokenize, /detokenize, /tokenizer_info."""

from __future__ import annotations

import asyncio
import base64
import struct
import uuid
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mistral_runtime.serve.answer_options import read_ids
from mistral_runtime.serve.chat_schema import ToolUse, parse_messages
from mistral_runtime.serve.completion_schema import Prompt, read_prompts
from mistral_runtime.serve.event_stream import unless_gone
from mistral_runtime.serve.fields import Fields
from mistral_runtime.serve.json_body import read_object
from mistral_runtime.serve.protocol import Embed
from mistral_runtime.serve.served_model import context_exceeded, refuse_hopeless
from mistral_runtime.serve.service import Service, note_usage, service_of
from mistral_runtime.serve.threads import in_thread

MAX_DETOKENIZED = 1 << 22


async def embeddings(request: Request) -> Response:
    """Return one vector for each input."""
    service = service_of(request)
    tokenizer = service.model.tokenizer
    fields = Fields(await read_object(request))
    name = service.model.require_name(fields.text("model", None))
    inputs = read_prompts(fields, "input", tokenizer.vocab_size)
    encoding = fields.choice("encoding_format", "float", ("float", "base64"))
    fields.only("dimensions")
    fields.ignored("user")
    fields.done()
    context = service.require_ready().context
    prompts = [await _input_ids(service, each, context) for each in inputs]
    vectors = await unless_gone(request, _embed_all(service, prompts))
    count = sum(map(len, prompts))
    note_usage(request, {"prompt_tokens": count, "completion_tokens": 0})
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, encoding)}
        for index, vector in enumerate(vectors)
    ]
    told = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "data": data, "model": name, "usage": told})


async def _input_ids(service: Service, prompt: Prompt, context: int) -> list[int]:
    ids = prompt if isinstance(prompt, list) else await service.model.encode(prompt, context=context)
    if len(ids) > context:
        raise context_exceeded(context, prompt=len(ids), answer=None)
    return ids


async def _embed_all(service: Service, prompts: list[list[int]]) -> list[list[float]]:
    name = uuid.uuid4().hex
    work = [
        asyncio.ensure_future(service.engine.embed(Embed(f"embd-{name}-{index}", prompt)))
        for index, prompt in enumerate(prompts)
    ]
    try:
        return list(await asyncio.gather(*work))
    finally:
        for task in work:
            task.cancel()
        await asyncio.gather(*work, return_exceptions=True)


def _encoded(vector: list[float], encoding: str) -> list[float] | str:
    if encoding == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


async def tokenize(request: Request) -> Response:
    """Return the ids of a text or of a conversation."""
    service = service_of(request)
    fields = Fields(await read_object(request))
    service.model.require_name(fields.text("model", None))
    returns_pieces = fields.boolean("return_token_strs")
    adds_bos = fields.boolean("add_special_tokens", True)
    context = service.require_ready().context
    if fields.raw("messages") is not None:
        ids = await _conversation_ids(service, fields, context)
    else:
        text = fields.required_text("prompt")
        fields.done()
        ids = await in_thread(lambda: service.model.tokenizer.encode(text, bos=adds_bos))
    pieces = [service.model.tokenizer.piece(token) for token in ids] if returns_pieces else None
    return JSONResponse({"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": pieces})


async def _conversation_ids(service: Service, fields: Fields, context: int) -> list[int]:
    fields.only("add_generation_prompt", True)
    fields.only("continue_final_message", False)
    messages = parse_messages(fields)
    fields.done()
    writer = service.model.require_chat()
    refuse_hopeless(sum(len(message.content) for message in messages), service.model.tokenizer, context)
    return await in_thread(writer.encode, messages, ToolUse())


async def detokenize(request: Request) -> Response:
    """Return the text of token ids."""
    service = service_of(request)
    tokenizer = service.model.tokenizer
    fields = Fields(await read_object(request))
    service.model.require_name(fields.text("model", None))
    if fields.raw("tokens") is None:
        raise fields.wrong("tokens", "token ids")
    ids = read_ids(fields, "tokens", tokenizer.vocab_size, at_most=MAX_DETOKENIZED)
    fields.done()
    return JSONResponse({"prompt": await in_thread(tokenizer.decode, ids)})


async def tokenizer_info(request: Request) -> Response:
    """Return what a client that tokenises for itself has to know."""
    model = service_of(request).model
    tokenizer = model.tokenizer
    info: dict[str, Any] = {
        "tokenizer_class": "SentencePieceTokenizer",
        "vocab_size": tokenizer.vocab_size,
        "bos_token": tokenizer.piece(tokenizer.bos_id),
        "eos_token": tokenizer.piece(tokenizer.eos_id),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "add_bos_token": True,
        "add_eos_token": False,
        # Ours are not Jinja; the name says which one mistral-common or the demo model's code writes.
        "chat_template": None,
        "chat_template_name": None if model.chat is None else model.chat.name,
    }
    return JSONResponse(info)
