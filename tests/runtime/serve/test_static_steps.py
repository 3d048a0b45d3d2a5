"""A serving loop whose decode steps are static gives the same answers, and never runs out of slots."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import pytest
from torch import Tensor

from mistral_runtime.gpu.graphs import EagerRunner
from mistral_runtime.gpu.static_cache import SlotPool
from mistral_runtime.gpu.static_step import StaticStep
from mistral_runtime.sampling_params import SamplingParams
from mistral_runtime.serve.caches import SERVING_SLACK
from mistral_runtime.serve.protocol import Generate
from mistral_runtime.transformer import Transformer

from .loops import TestLoop, alone
from .test_engine_loop import SETTINGS, requests


class Counting(EagerRunner):
    """Knows how often it was asked."""

    calls = 0

    def run(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        self.calls += 1
        return super().run(key, compute)


def _loop(model: Transformer, *, slots: int) -> tuple[TestLoop, Counting, SlotPool]:
    pool, runner = SlotPool(model, slots=slots, context=256, slack=SERVING_SLACK), Counting()
    room = slots * pool.capacity
    static = StaticStep(model, pool, runner)
    return TestLoop(model, static=static, max_running=slots, cache_positions=room), runner, pool


@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
def test_answers_are_those_alone(model: Transformer, sampling: SamplingParams) -> None:
    loop, runner, _ = _loop(model, slots=4)
    wanted = requests(sampling)
    loop.put(*wanted)
    loop.until_idle()
    for request in wanted:
        assert loop.tokens(request.id) == alone(model, request), request.id
    assert runner.calls > 12


def test_kept_caches_make_way_for_new_sequences(plain_model: Transformer) -> None:
    loop, runner, pool = _loop(plain_model, slots=2)
    for number in range(5):
        request = Generate(f"r{number}", [3 + number] * 30, 5, SamplingParams())
        loop.put(request)
        loop.until_idle()
        assert loop.tokens(request.id) == alone(plain_model, request)
        assert pool.free_slots == max(0, 2 - number - 1)
    assert runner.calls == 5 * 4  # the first token of each is its prompt's
    again = Generate("again", [7] * 30 + [9], 5, SamplingParams())
    loop.put(again)
    loop.until_idle()
    assert loop.finished("again").cached_tokens >= 29
    assert loop.tokens("again") == alone(plain_model, again)
