"""Many answers at once are the answers that each would have been alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mistral_runtime.config import ModelConfig
from mistral_runtime.sampling_params import SamplingParams
from mistral_runtime.scoring import all_logits
from mistral_runtime.serve.protocol import (
    Cancel,
    Drain,
    Embed,
    Embedded,
    Generate,
    Grammar,
    Scored,
    Step,
)
from mistral_runtime.transformer import Transformer

from .conftest import build
from .loops import TestLoop, alone


def prompts(count: int, *, seed: int = 0) -> list[list[int]]:
    """Return prompts of different lengths, some longer than a chunk, some repeating themselves."""
    drawn = random.Random(seed)
    made = []
    for index in range(count):
        ids = [drawn.randrange(3, 300) for _ in range(drawn.choice((1, 5, 8, 9, 20, 41)))]
        made.append(ids * 3 if index % 3 == 0 else ids)
    return made


SETTINGS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(),
    "drawn": SamplingParams(0.9, seed=7),
    "filtered": SamplingParams(1.2, top_k=40, top_p=0.8, min_p=0.01, repetition_penalty=1.3, seed=11),
}


def requests(sampling: SamplingParams, *, seed: int = 0) -> list[Generate]:
    return [
        Generate(f"r{index}", ids, 12 + index, sampling, stop_ids=[2, 50 + index])
        for index, ids in enumerate(prompts(6, seed=seed))
    ]


@pytest.mark.parametrize("lookup", ["off", "on"])
@pytest.mark.parametrize("sampling", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("pauses", [(0, 0, 0, 0, 0, 0), (0, 1, 2, 3, 5, 8)], ids=["together", "apart"])
def test_answers_in_company_are_those_alone(model: Transformer, sampling, pauses: Sequence[int], lookup) -> None:
    loop = TestLoop(model, lookup=lookup)
    wanted = requests(sampling)
    for request, pause in zip(wanted, pauses, strict=True):
        loop.put(request)
        loop.turns(pause)
    loop.until_idle()
    for request in wanted:
        tokens, end = loop.tokens(request.id), loop.finished(request.id)
        assert tokens == alone(model, request), request.id
        assert end.reason == ("length" if len(tokens) == request.max_new_tokens else "stop")
        assert (end.prompt_tokens, end.generated_tokens) == (len(request.prompt), len(tokens))


def kinds(loop: TestLoop, key: str) -> list[str]:
    """Return what was told of one answer, in order."""
    return [
        type(message).__name__
        for message in loop.told
        if getattr(message, "id", None) == key
        or (isinstance(message, Step) and any(token.id == key for token in message.tokens))
    ]


@pytest.mark.parametrize("steps, tokens", [(0, 0), (1, 0), (2, 0), (3, 1), (6, 4)], ids=str)
def test_a_cancelled_answer_computes_no_further_step(plain_model: Transformer, steps: int, tokens: int) -> None:
    loop = TestLoop(plain_model, prefill_alone=8)  # 24 ids are three chunks
    loop.put(Generate("a", list(range(3, 27)), 50))
    loop.turns(steps)
    loop.put(Cancel("a"))
    loop.turns(3)
    assert loop.loop.totals.steps == steps
    assert len(loop.tokens("a")) == tokens
    assert loop.finished("a").reason == "cancelled"
    assert loop.finished("a").generated_tokens == tokens


def test_cancelling_one_leaves_the_others_as_they_are(plain_model: Transformer) -> None:
    wanted = requests(SETTINGS["drawn"])
    loop = TestLoop(plain_model, max_running=3)
    loop.put(*wanted)
    loop.turns(4)
    loop.put(Cancel("r1"), Cancel("r5"), Cancel("nobody"))  # one that runs, one that waits
    loop.until_idle()
    for request in wanted:
        if request.id not in ("r1", "r5"):
            assert loop.tokens(request.id) == alone(plain_model, request)
    assert loop.finished("r1").reason == loop.finished("r5").reason == "cancelled"
    assert loop.tokens("r5") == []


def test_the_next_turn_of_a_conversation_computes_only_what_is_new(model: Transformer) -> None:
    loop = TestLoop(model)
    first = Generate("a", prompts(1)[0] + list(range(40, 80)), 10)
    loop.put(first)
    loop.until_idle()
    before = loop.loop.totals.prompt_tokens
    second = Generate("b", [*first.prompt, *loop.tokens("a"), 60, 61, 62], 10)
    loop.put(second)
    loop.until_idle()
    assert loop.tokens("b") == alone(model, second)
    # The answer's last token was told and never computed with.
    assert loop.finished("b").cached_tokens == len(first.prompt) + 9
    assert loop.loop.totals.prompt_tokens - before == 4


def test_a_shared_beginning_is_taken_over_and_cut_back(plain_model: Transformer) -> None:
    system = list(range(100, 130))
    loop = TestLoop(plain_model)
    for index in range(3):
        request = Generate(f"r{index}", [*system, 7 + index, 20, 30 - index], 8, SamplingParams(0.8, seed=index))
        loop.put(request)
        loop.until_idle()
        assert loop.tokens(request.id) == alone(plain_model, request)
        assert loop.finished(request.id).cached_tokens == (30 if index else 0)
    assert loop.stats().cached_tokens == 60


def test_idle_caches_make_room_for_those_who_wait(plain_model: Transformer) -> None:
    loop = TestLoop(plain_model, cache_positions=100, max_running=2)
    for index in range(4):
        loop.put(Generate(f"r{index}", [200 + index] * 30, 20))
    loop.turns(2)
    assert (loop.stats().running, loop.stats().waiting, loop.stats().cache_used) == (2, 2, 100)
    loop.until_idle()
    assert all(loop.finished(f"r{index}").reason == "length" for index in range(4))
    # Two idle ones hold 49 positions each; a request for 90 leaves no room for either.
    loop.put(Generate("large", [5] * 80, 10))
    loop.until_idle()
    assert loop.finished("large").reason == "length"


BAD: dict[str, tuple[Generate | Embed, str]] = {
    "too long": (Generate("x", [5] * 300, 10), "PromptTooLong"),
    "never fits": (Generate("x", [5] * 90, 20), "BadRequest"),
    "empty": (Generate("x", [], 10), "EmptyPrompt"),
    "not an id": (Generate("x", [300], 10), "BadRequest"),
    "not a number": (Generate("x", ["1"], 10), "BadRequest"),  # type: ignore[list-item]
    "bias": (Generate("x", [5], 10, logit_bias=[(5, float("inf"))]), "BadRequest"),
    "count": (Generate("x", [5], -1), "BadRequest"),
    "no grammars": (Generate("x", [5], 5, grammar=Grammar("regex", "a")), "BadRequest"),
    "embedding": (Embed("x", []), "EmptyPrompt"),
}


@pytest.mark.parametrize("request_, kind", BAD.values(), ids=BAD)
def test_what_cannot_be_served_is_refused_alone(plain_model: Transformer, request_, kind: str) -> None:
    loop = TestLoop(plain_model, cache_positions=100)
    good = Generate("good", [5, 6, 7], 6)
    loop.put(good, request_)
    loop.until_idle()
    end = loop.finished("x")
    assert end.reason == "error"
    assert end.error is not None
    assert end.error["kind"] == kind
    assert all(end.error[part] for part in ("what", "detail", "hint"))
    assert loop.tokens("good") == alone(plain_model, good)


def test_a_value_that_is_no_number_ends_one_answer_alone(
    tiny_config: ModelConfig, make_weights: Callable[..., dict[str, Tensor]]
) -> None:
    config = replace(tiny_config, sliding_window=None)
    weights = make_weights(config)
    weights["tok_embeddings.weight"][299] = float("nan")
    model = build(config, weights)
    loop = TestLoop(model)
    good = Generate("good", [5, 6, 7], 10)
    loop.put(good, Generate("bad", [5] * 20 + [299], 10))
    loop.until_idle()
    assert loop.tokens("good") == alone(model, good)
    end = loop.finished("bad")
    assert end.reason == "error"
    assert end.error is not None
    assert end.error["kind"] == "NonFiniteLogits"
    # Its cache is not to be trusted by anybody.
    again = Generate("again", [5] * 20 + [9], 4)
    loop.put(again)
    loop.until_idle()
    assert loop.finished("again").cached_tokens == 0
    assert loop.tokens("again") == alone(model, again)


def test_a_bug_in_the_choice_of_one_answer_ends_that_one_alone(
    plain_model: Transformer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_arguments: object) -> int:
        raise IndexError("out of range")

    monkeypatch.setattr("mistral_runtime.serve.choose.draw_token", broken)
    loop = TestLoop(plain_model)
    other = Generate("other", prompts(1)[0], 6)
    loop.put(Generate("drawn", prompts(1)[0], 6, SamplingParams(1.0, seed=1)), other)
    loop.until_idle()
    error = loop.finished("drawn").error
    assert error is not None
    assert error["what"] == "this is a bug in the engine"
    assert loop.tokens("other") == alone(plain_model, other)
    assert "IndexError: out of range" in capfd.readouterr().err


def test_penalties_bias_and_least_length(plain_model: Transformer) -> None:
    prompt = prompts(1)[0]
    plain = alone(plain_model, Generate("a", prompt, 12))
    loop = TestLoop(plain_model)
    loop.put(
        Generate("never", prompt, 12, logit_bias=[(plain[0], -100.0)]),
        Generate("always", prompt, 4, logit_bias=[(123, 100.0)]),
        Generate("once", prompt, 12, presence_penalty=1000.0),
        Generate("least", prompt, 12, stop_ids=[plain[0], plain[1]], min_tokens=3),
        Generate("soon", prompt, 12, stop_ids=[plain[0]]),
    )
    loop.until_idle()
    assert loop.tokens("never")[0] != plain[0]
    assert plain[0] not in loop.tokens("never")
    assert loop.tokens("always") == [123] * 4
    assert len(set(loop.tokens("once"))) == 12
    assert len(loop.tokens("least")) >= 3
    assert not {plain[0], plain[1]} & set(loop.tokens("least")[:3])
    assert (loop.tokens("soon"), loop.finished("soon").reason) == ([], "stop")


def test_logprobs_are_the_models_own(plain_model: Transformer) -> None:
    prompt = prompts(3)[2]
    request = Generate("a", prompt, 5, SamplingParams(2.0, seed=3), logprobs=4, prompt_logprobs=2)
    loop = TestLoop(plain_model)
    loop.put(request, Generate("scored", prompt, 0, prompt_logprobs=0))
    loop.until_idle()
    assert kinds(loop, "a")[0] == "Scored"
    tokens = loop.tokens("a")
    ids = [*prompt, *tokens]
    expected = all_logits(plain_model, ids).double().log_softmax(-1)
    told = [token for m in loop.told if isinstance(m, Step) for token in m.tokens if token.id == "a"]
    for index, token in enumerate(told):
        row = expected[len(prompt) + index - 1]
        assert token.logprob == pytest.approx(float(row[token.token]), abs=1e-4)
        assert [found for found, _ in token.top] == row.topk(4).indices.tolist()
    (scored,) = [m for m in loop.told if isinstance(m, Scored) and m.id == "a"]
    wanted = [float(expected[i, prompt[i + 1]]) for i in range(len(prompt) - 1)]
    assert scored.logprobs == pytest.approx(wanted, abs=1e-4)
    assert [top[0][0] for top in scored.top] == expected[: len(prompt) - 1].argmax(-1).tolist()
    (alone_,) = [m for m in loop.told if isinstance(m, Scored) and m.id == "scored"]
    assert alone_.logprobs == pytest.approx(wanted, abs=1e-4)
    assert alone_.top == [[] for _ in wanted]
    assert (loop.finished("scored").reason, loop.finished("scored").generated_tokens) == ("length", 0)


def test_embeddings_do_not_depend_on_chunks_or_company(model: Transformer) -> None:
    ids = prompts(3)[2] * 2
    vectors = []
    for chunk in (4, 8, 64):
        loop = TestLoop(model, prefill_chunk=chunk, prefill_alone=chunk)
        loop.put(Generate("busy", [9, 8, 7], 30), Embed("e", ids))
        loop.until_idle()
        (embedded,) = [m for m in loop.told if isinstance(m, Embedded)]
        vectors.append(torch.tensor(embedded.vector))
        assert loop.finished("e").reason == "stop"
    assert float(vectors[0].norm()) == pytest.approx(1)
    assert torch.allclose(vectors[0], vectors[1], atol=1e-5)
    assert torch.allclose(vectors[0], vectors[2], atol=1e-5)


def test_draining_answers_everything_first(plain_model: Transformer) -> None:
    loop = TestLoop(plain_model, max_running=2)
    wanted = requests(SETTINGS["greedy"])
    loop.put(*wanted, Drain())
    loop.loop.run()
    assert all(loop.finished(request.id).reason in ("stop", "length") for request in wanted)


def test_a_stream_is_never_frozen_by_a_long_prompt(plain_model: Transformer) -> None:
    loop = TestLoop(plain_model)
    loop.put(Generate("stream", [5, 6, 7], 60))
    loop.turns(3)
    before = len(loop.tokens("stream"))
    loop.put(Generate("long", [9] * 160, 5))
    loop.turns(20)  # chunks of 8 while the stream goes on
    assert loop.tokens("long") != []
    assert len(loop.tokens("stream")) == before + 20
