"""The engine: why it stops, when it looks at the cancel flag, and that nothing is truncated unasked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mistral_runtime.config import ModelConfig
from mistral_runtime.engine import Engine, Request, check_context
from mistral_runtime.errors import BadRequest, EmptyPrompt, PromptTooLong
from mistral_runtime.lookup import MAX_DRAFT
from mistral_runtime.sampling_params import SamplingParams
from mistral_runtime.session import answer_tokens
from mistral_runtime.snapshot import find_weights, load_config
from mistral_runtime.transformer import Transformer
from mistral_runtime.weights import load_model, open_checkpoint

PROMPT = [1, 17, 42, 5]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, write_snapshot: Callable[..., dict[str, Tensor]]) -> Transformer:
    directory = tmp_path_factory.mktemp("snapshot")
    write_snapshot(directory)
    files = find_weights(directory)
    config = load_config(directory, files.layout)
    return load_model(open_checkpoint(files, config), config)


def test_answer_has_the_length_asked_for(model: Transformer) -> None:
    generation = Engine(model).generate(Request(PROMPT, 7))
    assert len(list(generation)) == generation.generated_tokens == 7
    assert generation.finish_reason == "length"
    assert generation.prefill_seconds > 0
    assert generation.decode_seconds > 0


def test_stop_token_ends_the_answer_and_is_not_part_of_it(model: Transformer) -> None:
    tokens = list(Engine(model).generate(Request(PROMPT, 12)))
    position = 5
    stop = tokens[position]
    assert stop not in tokens[:position]
    generation = Engine(model).generate(Request(PROMPT, 12, stop_ids=frozenset({stop})))
    assert list(generation) == tokens[:position]
    assert generation.finish_reason == "stop"


def test_chunks_do_not_change_the_answer(model: Transformer) -> None:
    prompt = list(range(3, 60))
    answers = [list(Engine(model, prefill_chunk=chunk).generate(Request(prompt, 8))) for chunk in (1, 5, 57, 512)]
    assert all(answer == answers[0] for answer in answers)


def test_seed_makes_sampling_repeatable(model: Transformer) -> None:
    def sample(seed: int) -> list[int]:
        params = SamplingParams(temperature=5.0, seed=seed)
        return list(Engine(model).generate(Request(PROMPT, 12, params)))

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)


def test_cancel_between_tokens_ends_after_the_current_one(model: Transformer) -> None:
    cancel = threading.Event()
    generation = Engine(model).generate(Request(PROMPT, 50, cancel=cancel))
    received = []
    for token in generation:
        received.append(token)
        if len(received) == 3:
            cancel.set()
    assert len(received) == 3
    assert generation.finish_reason == "interrupted"


def test_cancel_between_prefill_chunks_computes_no_further_chunk(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancel = threading.Event()
    computed: list[int] = []
    forward = model.forward

    def counting(tokens: Tensor, *args: Any, **keywords: Any) -> Tensor:
        computed.append(tokens.shape[1])
        if len(computed) == 2:
            cancel.set()
        return forward(tokens, *args, **keywords)

    monkeypatch.setattr(model, "forward", counting)
    generation = Engine(model, prefill_chunk=10).generate(Request(list(range(3, 100)), 5, cancel=cancel))
    assert list(generation) == []
    assert computed == [10, 10]
    assert generation.finish_reason == "interrupted"


def test_last_token_costs_no_step(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    forward = model.forward

    def counting(tokens: Tensor, *args: Any, **keywords: Any) -> Tensor:
        steps.append(tokens.shape[1])
        return forward(tokens, *args, **keywords)

    monkeypatch.setattr(model, "forward", counting)
    list(Engine(model).generate(Request(PROMPT, 3)))
    assert steps == [4, 1, 1]


def test_two_answers_in_turn_do_not_share_a_cache(model: Transformer) -> None:
    engine = Engine(model)
    first, second = engine.generate(Request(PROMPT, 6)), engine.generate(Request([9, 8], 6))
    interleaved = list(zip(first, second, strict=True))
    assert [a for a, _ in interleaved] == list(engine.generate(Request(PROMPT, 6)))
    assert [b for _, b in interleaved] == list(engine.generate(Request([9, 8], 6)))


# --- context ----------------------------------------------------------------------------------------------------------


def _check(config: ModelConfig, prompt: int, new: int, context: int | None = None) -> int:
    return check_context(config, prompt_tokens=prompt, max_new_tokens=new, context=context)


def test_without_a_window_the_model_sets_a_limit(tiny_config: ModelConfig) -> None:
    config = replace(tiny_config, sliding_window=None, max_position_embeddings=100)
    assert _check(config, 90, 10) == 100
    with pytest.raises(PromptTooLong) as caught:
        _check(config, 91, 10)
    assert "100" in caught.value.detail
    assert "101" in caught.value.detail


def test_with_a_window_only_the_user_sets_a_limit(tiny_config: ModelConfig) -> None:
    assert _check(tiny_config, 10**6, 10) == 10**6 + 10
    with pytest.raises(PromptTooLong, match="--context"):
        _check(tiny_config, 50, 10, context=59)


def test_only_the_default_length_is_cut_to_the_room_left(tiny_config: ModelConfig) -> None:
    config = replace(tiny_config, sliding_window=None, max_position_embeddings=300)
    assert answer_tokens(config, prompt_tokens=10, wanted=None, context=None) == 256
    assert answer_tokens(config, prompt_tokens=290, wanted=None, context=None) == 10
    with pytest.raises(PromptTooLong):
        answer_tokens(config, prompt_tokens=290, wanted=11, context=None)
    with pytest.raises(PromptTooLong):
        answer_tokens(config, prompt_tokens=300, wanted=None, context=None)


def test_nothing_to_continue_and_nothing_asked_for_are_refused(model: Transformer) -> None:
    with pytest.raises(EmptyPrompt):
        Engine(model).generate(Request([], 5))
    with pytest.raises(BadRequest):
        Engine(model).generate(Request(PROMPT, 0))


def test_answers_beyond_the_window_keep_a_small_cache(model: Transformer) -> None:
    generation = Engine(model).generate(Request(PROMPT, 100))
    assert len(list(generation)) == 100
    assert generation._cache.capacity == 8 + MAX_DRAFT
    assert all(torch.isfinite(keys).all() for keys in generation._cache.keys)
