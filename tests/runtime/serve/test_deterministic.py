"""With `deterministic`, an answer has the same bits alone and in company."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mistral_runtime.config import ModelConfig
from mistral_runtime.kernels.rows import MAX_ROWS, kernels_reason
from mistral_runtime.linear_rows import use_row_kernels
from mistral_runtime.sampling_params import SamplingParams
from mistral_runtime.serve.protocol import Generate, Step
from mistral_runtime.transformer import Transformer

from .conftest import build
from .loops import TestLoop

CHUNK = 32  # more than go through the row kernels, so that a prompt's chunk is a product of another kind


@pytest.fixture(scope="module", params=["bf16 kernels", "float32"])
def any_model(
    request: pytest.FixtureRequest, tiny_config: ModelConfig, make_weights: Callable[..., dict[str, Tensor]]
) -> Transformer:
    config = replace(tiny_config, sliding_window=None, dim=256, hidden_dim=512, head_dim=32)
    if request.param == "float32":
        return build(config, make_weights(config))
    if kernels_reason() in ("no C compiler", "only on Linux"):
        pytest.skip("nothing compiles kernels here")
    model = build(config, make_weights(config), torch.bfloat16)
    assert use_row_kernels(model) > 0
    return model


def wanted() -> list[Generate]:
    """More short prompts than a product of the kernels has rows, then longer ones, some with a common beginning.

    That begins a second chunk with 13 ids, so who took all of it over would go on with a product of 19 rows.
    """
    drawn = random.Random(5)
    system = [drawn.randrange(3, 300) for _ in range(CHUNK + 13)]
    prompts = [[drawn.randrange(3, 300)] for _ in range(MAX_ROWS + 2)]
    for index, length in enumerate((31, 32, 33, 64, 65, 40)):
        prompts.append((system if index % 2 else []) + [drawn.randrange(3, 300) for _ in range(length)])
    return [
        Generate(f"r{index}", prompt, 36, SamplingParams(1.0, seed=index), logprobs=2)
        for index, prompt in enumerate(prompts)
    ]


def told(loop: TestLoop, key: str) -> list[tuple[int, float | None]]:
    steps = [message for message in loop.told if isinstance(message, Step)]
    return [(token.token, token.logprob) for step in steps for token in step.tokens if token.id == key]


def told_alone(model: Transformer, request: Generate) -> list[tuple[int, float | None]]:
    loop = TestLoop(model, deterministic=True, prefill_chunk=CHUNK)
    loop.put(request)
    loop.until_idle()
    return told(loop, request.id)


@pytest.mark.parametrize("lookup", ["off", "on"])
def test_an_answer_has_the_same_bits_alone_and_in_company(any_model: Transformer, lookup) -> None:
    company = TestLoop(
        any_model, lookup=lookup, deterministic=True, prefill_chunk=CHUNK, max_running=32, cache_positions=9000
    )
    requests = wanted()
    short, long = requests[: MAX_ROWS + 2], requests[MAX_ROWS + 2 :]
    company.put(*short)
    company.turns(MAX_ROWS + 3)  # all of them decode now
    assert company.stats().running == MAX_ROWS + 2
    for request in long:
        company.put(request)
        company.turns(2)
    company.until_idle()
    # Another turn: most of the answer before it is in a cache, yet was not computed as a prompt is.
    first = long[-1]
    answer = company.tokens(first.id)
    follow = Generate("follow", [*first.prompt, *answer, 7], 12, SamplingParams(1.0, seed=1), logprobs=2)
    again = Generate("again", [*long[1].prompt[: CHUNK + 13], 9, 8, 7], 12, SamplingParams(1.0, seed=2), logprobs=2)
    company.put(follow)
    company.until_idle()
    company.put(again)
    company.until_idle()
    assert company.finished("follow").cached_tokens == len(first.prompt) // CHUNK * CHUNK
    assert company.finished("again").cached_tokens == CHUNK
    for request in (*short[:3], *short[-2:], *long, follow, again):
        assert told_alone(any_model, request) == told(company, request.id), request.id
