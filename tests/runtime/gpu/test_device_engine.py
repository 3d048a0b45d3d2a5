"""Answers by static steps are those of the plain engine, and leave the same caches behind."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mistral_runtime.engine import Engine, Request
from mistral_runtime.errors import NonFiniteLogits
from mistral_runtime.gpu.device_engine import DeviceEngine
from mistral_runtime.gpu.graphs import EagerRunner, LateReader, Runner, runner_for
from mistral_runtime.gpu.static_cache import SlotPool
from mistral_runtime.lookup import LookupMode
from mistral_runtime.sampling_params import SamplingParams
from tests.runtime.gpu.models import CONFIG, make_model

PROMPT = [5, 17, 3, 200, 41]


def _engine(
    *, window: int | None = None, lookup: LookupMode = "off", context: int = 60, runner: Runner | None = None
) -> DeviceEngine:
    model = make_model(replace(CONFIG, sliding_window=window))
    pool = SlotPool(model, slots=1, context=context, slack=15 if lookup == "on" else 0)
    return DeviceEngine(model, pool=pool, runner=runner or EagerRunner(), lookup=lookup)


def _plain(engine: DeviceEngine) -> Engine:
    return Engine(engine.model, slack=engine.static.pool.slack)


@pytest.mark.parametrize("lookup", ["off", "auto", "on"])
@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("penalty", [1.0, 1.4])
def test_greedy_answers_are_those_of_the_plain_engine(window: int | None, lookup: LookupMode, penalty: float) -> None:
    engine = _engine(window=window, lookup=lookup)
    request = Request(PROMPT, 40, SamplingParams(repetition_penalty=penalty))
    generation, plain = engine.generate(request), _plain(engine).generate(request)
    assert list(generation) == list(plain)
    assert (generation.finish_reason, generation.generated_tokens) == ("length", 40)


@pytest.mark.parametrize("window", [None, 12])
def test_a_stop_token_ends_the_answer_and_leaves_the_cache_as_without_it(window: int | None) -> None:
    engine = _engine(window=window)
    tokens = list(_plain(engine).generate(Request(PROMPT, 30)))
    stop = next(token for token in tokens[15:] if tokens.index(token) >= 15)
    kept = engine.conversation_cache(60)
    generation = engine.generate(Request(PROMPT, 30, stop_ids=frozenset({stop})), cache=kept)
    answer = list(generation)
    assert answer == tokens[: tokens.index(stop)]
    assert generation.finish_reason == "stop"
    # The next turn goes on from what was stored, and gets what it would get anew.
    longer = Request([*PROMPT, *answer, 7, 8], 10)
    turn = engine.generate(longer, cache=kept)
    assert list(turn) == list(_plain(engine).generate(longer))
    assert turn.cached_tokens == len(PROMPT) + len(answer)


@pytest.mark.parametrize("how", ["cancel", "close", "length"])
def test_an_answer_that_is_left_early_can_be_gone_on_with(how: str) -> None:
    engine = _engine()
    kept = engine.conversation_cache(60)
    request = Request(PROMPT, 6 if how == "length" else 30)
    tokens, answer = iter(engine.generate(request, cache=kept)), list[int]()
    for token in tokens:
        answer.append(token)
        if len(answer) == 6:
            if how == "close":
                break
            request.cancel.set()
    tokens.close()  # type: ignore[attr-defined]
    assert len(answer) == 6
    longer = Request([*PROMPT, *answer, 7], 10)
    assert list(engine.generate(longer, cache=kept)) == list(_plain(engine).generate(longer))


def test_answers_that_find_no_slot_are_computed_all_the_same() -> None:
    engine = _engine(context=20)
    expected = list(_plain(engine).generate(Request(PROMPT, 30)))
    assert list(engine.generate(Request(PROMPT, 30))) == expected
    holder = engine.conversation_cache(20)
    assert list(engine.generate(Request(PROMPT, 10), cache=holder)) == expected[:10]
    assert engine.static.pool.free_slots == 0
    assert list(engine.generate(Request(PROMPT, 10))) == expected[:10]


def test_a_seed_makes_sampling_repeatable() -> None:
    engine = _engine()
    drawn = [
        list(engine.generate(Request(PROMPT, 20, SamplingParams(temperature=1.0, seed=seed)))) for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_steps_are_launched_before_the_token_they_begin_with_is_read() -> None:
    events: list[str] = []

    class Recording(EagerRunner):
        def run(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
            events.append("step")
            return super().run(key, compute)

    engine = _engine(runner=Recording())
    for _ in engine.generate(Request(PROMPT, 3)):
        events.append("token")
    assert events == ["step", "token", "step", "token", "token"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_values_that_are_no_numbers_end_the_answer_with_an_error(temperature: float) -> None:
    engine = _engine()
    tokens = iter(engine.generate(Request(PROMPT, 20, SamplingParams(temperature=temperature))))
    next(tokens)
    engine.model.norm.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteLogits):
        list(tokens)


def test_a_capture_that_fails_leaves_eager_steps_and_says_so() -> None:
    class Failing:
        name = "cuda-graphs"

        def run(self, _key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
            compute()
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    said: list[str] = []
    engine = _engine()
    careful = DeviceEngine(engine.model, pool=engine.static.pool, runner=Failing(), report=said.append)
    assert careful.runner.name == "cuda-graphs"
    assert list(careful.generate(Request(PROMPT, 10))) == list(_plain(engine).generate(Request(PROMPT, 10)))
    assert careful.runner.name == "static"
    assert len(said) == 1
    assert "operation not permitted" in said[0]


def test_ids_can_be_read_while_the_next_are_copied() -> None:
    reader = LateReader(4, torch.device("cpu"))
    first = reader.begin(torch.tensor([1, 2]))
    second = reader.begin(torch.tensor([3, 4, 5]))
    assert (first(), second()) == ([1, 2], [3, 4, 5])


def test_without_cuda_there_are_no_graphs() -> None:
    assert runner_for(torch.device("cpu")).name == "static"
