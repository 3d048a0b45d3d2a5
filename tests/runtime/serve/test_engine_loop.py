"""Many answers at once are the answers that each would have been alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from mistral_runtime.sampling_params import SamplingParams
from mistral_runtime.serve.protocol import Generate
from mistral_runtime.transformer import Transformer

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
