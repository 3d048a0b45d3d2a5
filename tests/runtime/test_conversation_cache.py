"""The cache of a conversation: the same answers as without it, and only what is new is computed."""

from __future__ import annotations

import random

import pytest

from mistral_runtime.config import ModelConfig
from mistral_runtime.engine import Engine, Request, eager_step
from mistral_runtime.snapshot import find_weights, load_config
from mistral_runtime.transformer import Transformer
from mistral_runtime.weights import load_model, open_checkpoint


@pytest.fixture(scope="module", params=[None, 16], ids=["no window", "window"])
def model(request, tmp_path_factory, write_snapshot) -> Transformer:
    directory = tmp_path_factory.mktemp("snapshot")
    write_snapshot(directory, sliding_window=request.param)
    files = find_weights(directory)
    config: ModelConfig = load_config(directory, files.layout)
    return load_model(open_checkpoint(files, config), config)


class CountedSteps:
    """Counts the positions that were computed; can break off in the middle of one step."""

    def __init__(self):
        self.positions = 0
        self.break_at = None

    def __call__(self, model, ids, cache, *, last_only=True):
        self.positions += len(ids)
        if self.break_at is not None and self.positions >= self.break_at:
            for layer_keys in cache.keys:
                layer_keys[:] = 1e3
                break
            raise KeyboardInterrupt
        return eager_step(model, ids, cache, last_only=last_only)


@pytest.mark.parametrize("lookup", ["off", "on"])
def test_a_conversation_gets_the_answers_that_it_would_get_without_a_cache(model, lookup):
    """Turns follow on, are taken back, repeated and broken off, as a person would."""
    drawn = random.Random(7)
    engine = Engine(model, lookup=lookup)
    kept = engine.conversation_cache(400)
    history: list[int] = [1]
    for turn in range(14):
        prompt = history + [drawn.randrange(3, 60) for _ in range(drawn.choice((1, 4, 25)))]
        request = Request(prompt, drawn.choice((1, 5, 20)), stop_ids=frozenset({drawn.randrange(3, 60)}))
        expected = list(engine.generate(request))
        generation = engine.generate(request, cache=kept)
        heard = []
        for token in generation:
            heard.append(token)
            if turn % 5 == 4 and len(heard) == 3:
                break
        assert heard == expected[: len(heard)]
        assert turn % 5 == 4 or heard == expected
        history = prompt + heard if turn % 3 else history[: max(1, len(history) - drawn.randrange(6))]


def test_only_what_is_new_is_computed(model):
    steps = CountedSteps()
    engine = Engine(model, step=steps)
    kept = engine.conversation_cache(400)
    first = list(engine.generate(Request([1, 5, 9, 12], 6), cache=kept))
    steps.positions = 0
    generation = engine.generate(Request([1, 5, 9, 12, *first, 7, 8], 1), cache=kept)
    list(generation)
    # The last token of an answer was never put in.
    assert (generation.cached_tokens, steps.positions) == (4 + 5, 3)


def test_the_same_prompt_again_computes_its_last_token_alone(model):
    steps = CountedSteps()
    engine = Engine(model, step=steps)
    kept = engine.conversation_cache(400)
    once = list(engine.generate(Request([1, 5, 9], 1), cache=kept))
    steps.positions = 0
    assert list(engine.generate(Request([1, 5, 9], 1), cache=kept)) == once
    assert steps.positions == 1


def test_a_step_that_broke_off_spoils_nothing(model):
    steps = CountedSteps()
    engine = Engine(model, step=steps)
    kept = engine.conversation_cache(400)
    list(engine.generate(Request([1, 5, 9], 3), cache=kept))
    steps.break_at = steps.positions + 2
    with pytest.raises(KeyboardInterrupt):
        list(engine.generate(Request([1, 5, 9, 4], 9), cache=kept))
    steps.break_at = None
    request = Request([1, 5, 9, 4, 6], 9)
    assert list(engine.generate(request, cache=kept)) == list(engine.generate(request))


def test_a_cache_that_may_not_go_back_starts_anew(model):
    engine = Engine(model)
    kept = engine.conversation_cache(400, may_rewind=False)
    first = list(engine.generate(Request([1, 5, 9], 4), cache=kept))
    follows, goes_back = Request([1, 5, 9, *first, 7], 2), Request([1, 5], 2)
    for request, cached in ((follows, 6), (goes_back, 0)):
        generation = engine.generate(request, cache=kept)
        assert list(generation) == list(engine.generate(request))
        assert generation.cached_tokens == cached
