"""A load of concurrent streamed completions on an OpenAI-compatible server, and what came of it.

Prompts are token ids, so that every server computes the same work whatever its tokenizer does; each request has a
prompt of its own, which no cache of prefixes can know. Answers have a fixed length (``ignore_eos``), so that tokens are
counted by what was asked for and not by how a server cuts its events.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass

import httpx

_FIRST_PLAIN_ID = 1000  # below are control tokens and bytes


@dataclass(frozen=True)
class Load:
    """So many streams at once, each with a prompt and an answer of so many tokens."""

    streams: int
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Stream:
    """When one answer began and ended, in seconds from the load's start, and in how many events it came."""

    first_seconds: float
    last_seconds: float
    events: int


async def run_load(base_url: str, model: str, load: Load, *, vocabulary: int, seed: int) -> list[Stream]:
    """Send all requests at once and return what came of each.

    Raises:
        RuntimeError: A request failed, or an answer had another length than was asked for.
    """
    chooser = random.Random(seed)
    prompts = [
        [1, *(chooser.randrange(_FIRST_PLAIN_ID, vocabulary) for _ in range(load.prompt_tokens - 1))]
        for _ in range(load.streams)
    ]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=base_url, timeout=None, limits=limits, trust_env=False) as client:
        started = time.perf_counter()
        return await asyncio.gather(
            *(_stream(client, model, prompt, load.answer_tokens, started) for prompt in prompts)
        )


async def _stream(client: httpx.AsyncClient, model: str, prompt: list[int], answer: int, started: float) -> Stream:
    body = {
        "model": model, "prompt": prompt, "max_tokens": answer, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    first, events, usage = 0.0, 0, None
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            said = json.loads(line[6:])
            if "error" in said:
                raise RuntimeError(str(said["error"])[:300])
            usage = said.get("usage") or usage
            if said["choices"]:
                first = first or time.perf_counter() - started
                events += 1
    last = time.perf_counter() - started
    if usage is None or usage["completion_tokens"] != answer:
        raise RuntimeError(f"expected an answer of {answer} tokens, got {usage}")
    return Stream(first, last, events)
