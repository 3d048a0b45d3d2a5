"""Numbers for Prometheus, with vLLM's names where it has one, so that its dashboards work.

The engine's own counts are passed on as they are; times are those that a client sees.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from mistral_runtime.serve.answering import Piece
from mistral_runtime.serve.protocol import Stats

_Family = TypeVar("_Family", GaugeMetricFamily, CounterMetricFamily)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 1, 2.5, 5, 10)
_WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)


class _EngineNumbers(Collector):
    """What the engine said last, asked for at every scrape."""

    def __init__(self, read: Callable[[], Stats | None], model: str) -> None:
        self._read = read
        self._model = model

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        stats = self._read()
        if stats is None:
            return
        used = stats.cache_used / stats.cache_total if stats.cache_total else 0.0
        for name, text, value in (
            ("num_requests_running", "Answers being computed.", stats.running),
            ("num_requests_waiting", "Requests that wait.", stats.waiting),
            ("kv_cache_usage_perc", "Share of the cache's positions that is promised; 1 is all.", used),
        ):
            yield self._filled(GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"]), value)
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens taken in.", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.generated_tokens),
            ("prefix_cache_queries", "Prompt tokens that were looked for among computed ones.", stats.prompt_tokens),
            ("prefix_cache_hits", "Prompt tokens found among computed ones.", stats.cached_tokens),
            ("num_preemptions", "Answers put back for others.", stats.preempted),
            ("engine_steps", "Steps of the batch.", stats.steps),
        ):
            yield self._filled(CounterMetricFamily(f"vllm:{name}", text, labels=["model_name"]), value)

    def _filled(self, family: _Family, value: float) -> _Family:
        family.add_metric([self._model], value)
        return family


class Metrics:
    """All numbers of one server, in a registry of their own.

    Args:
        read_stats: Returns what the engine said last.
        model: The label `model_name`.
    """

    def __init__(self, read_stats: Callable[[], Stats | None], model: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineNumbers(read_stats, model))
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From request to first token.", _FIRST, model
        )
        self._next_token = self._histogram("inter_token_latency_seconds", "From token to token.", _TOKEN, model)
        self._whole = self._histogram("e2e_request_latency_seconds", "From request to last token.", _WHOLE, model)
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _COUNTS, model)
        self._generated = self._histogram("request_generation_tokens", "Tokens of an answer.", _COUNTS, model)
        self._model = model
        self._ended = Counter(
            "vllm:request_success",
            "Answers, by how they ended.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._ended.labels(model, reason)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], model: str) -> Histogram:
        return Histogram(f"vllm:{name}", text, ["model_name"], registry=self._registry, buckets=buckets).labels(model)

    def text(self) -> bytes:
        """Return all numbers in Prometheus' text format."""
        return generate_latest(self._registry)

    async def watch(self, pieces: AsyncGenerator[Piece, None], *, prompt_tokens: int) -> AsyncGenerator[Piece, None]:
        """Pass an answer on, timing it. One that nobody waited for to its end counts as "abort"."""
        started = before = time.perf_counter()
        seen = 0
        reason = "abort"
        self._prompt.observe(prompt_tokens)
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    if piece.tokens:
                        now = time.perf_counter()
                        self._observe_tokens(now - before, len(piece.tokens), is_first=seen == 0)
                        before, seen = now, seen + len(piece.tokens)
                    if piece.end is not None:
                        reason = piece.end.reason
                        self._generated.observe(piece.end.generated_tokens)
                    yield piece
        except Exception:
            reason = "error"
            raise
        finally:
            self._ended.labels(self._model, reason).inc()
            self._whole.observe(time.perf_counter() - started)

    def _observe_tokens(self, seconds: float, count: int, *, is_first: bool) -> None:
        if is_first:
            self._first_token.observe(seconds)
            return
        for _ in range(count):
            self._next_token.observe(seconds / count)
