"""With `deterministic`, an answer has the same bits alone and in company."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mistral_runtime.config import ModelConfig
from mistral_runtime.kernels.rows import kernels_reason
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
    drawn = random.Random(5)
    system = [drawn.randrange(3, 300) for _ in range(70)]  # shared: two whole chunks and a part of a third
    made = []
    for index in range(30):
        length = drawn.choice((1, 3, 31, 32, 33, 64, 65))
        prompt = (system if index % 2 else []) + [drawn.randrange(3, 300) for _ in range(length)]
        made.append(Generate(f"r{index}", prompt, 14, SamplingParams(1.0, seed=index), logprobs=2))
    return made


def told(loop: TestLoop, key: str) -> list[tuple[int, float | None]]:
    steps = [message for message in loop.told if isinstance(message, Step)]
    return [(token.token, token.logprob) for step in steps for token in step.tokens if token.id == key]


@pytest.mark.parametrize("lookup", ["off", "on"])
def test_an_answer_has_the_same_bits_alone_and_in_company(any_model: Transformer, lookup) -> None:
    requests = wanted()
    company = TestLoop(
        any_model, lookup=lookup, deterministic=True, prefill_chunk=CHUNK, max_running=28, cache_positions=9000
    )
    drawn = random.Random(9)
    for request in requests:
        company.put(request)
        company.turns(drawn.choice((0, 0, 1, 3)))
    company.until_idle()
    assert sum(company.finished(request.id).cached_tokens for request in requests) > 0
    for request in requests[:12]:
        single = TestLoop(any_model, deterministic=True, prefill_chunk=CHUNK)
        single.put(request)
        single.until_idle()
        assert told(single, request.id) == told(company, request.id), request.id
