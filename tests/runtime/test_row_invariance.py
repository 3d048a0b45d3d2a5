"""On the CPU in bfloat16, what a position gets does not depend on how many are computed with it: guessing is exact."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mistral_runtime.config import ModelConfig
from mistral_runtime.engine import Engine, Request
from mistral_runtime.kernels.rows import kernels_reason
from mistral_runtime.linear_rows import RowLinear, use_row_kernels
from mistral_runtime.lookup import MAX_DRAFT
from mistral_runtime.quantized import QuantizedWeight, quantize
from mistral_runtime.quantized_file import build_quantized, group_of
from mistral_runtime.recipe import Recipe
from mistral_runtime.transformer import Transformer

pytestmark = pytest.mark.skipif(
    kernels_reason() in ("no C compiler", "only on Linux"), reason="nothing compiles kernels here"
)

CONFIG = ModelConfig(
    dim=512, n_layers=3, head_dim=64, hidden_dim=1024, n_heads=8, n_kv_heads=2, vocab_size=700, norm_eps=1e-5,
    rope_theta=1e4, sliding_window=64,
)  # fmt: skip


@pytest.fixture(scope="module", params=["bf16", "int8", "int4"])
def model(request: pytest.FixtureRequest) -> Transformer:
    torch.manual_seed(7)
    model = Transformer(CONFIG).to(torch.bfloat16).eval().requires_grad_(False)
    model.tok_embeddings.weight.normal_()  # the model leaves them to the checkpoint
    if request.param != "bf16":
        recipe = Recipe.of(request.param)

        def tensors() -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
            for name, shape in CONFIG.tensor_shapes().items():
                weight, bits = model.get_parameter(name), recipe.bits_of(name, shape)
                group = group_of(recipe, bits) if bits else 0
                yield name, quantize(weight, bits=bits, group=group, name=name) if bits else weight

        return build_quantized(CONFIG, tensors())
    assert use_row_kernels(model) == 7 * CONFIG.n_layers + 1
    return model


@torch.inference_mode()
def test_a_prompt_gets_what_its_tokens_get_one_by_one(model: Transformer) -> None:
    """For integers, whose products are the same for any number of rows; bfloat16 goes to oneDNN for many."""
    if isinstance(model.output, RowLinear) or model.output._kernels is None or model.output._kernels.max_rows:
        pytest.skip("prompts are multiplied otherwise here")
    ids = torch.randint(0, CONFIG.vocab_size, (1, 60), generator=torch.Generator().manual_seed(2))
    one, many = (model.new_cache(60) for _ in range(2))
    alone = torch.cat([model(ids[:, at : at + 1], one) for at in range(60)], dim=1)
    assert torch.equal(alone, model(ids, many))


@torch.inference_mode()
@pytest.mark.parametrize("threads", [1, 2])
def test_positions_get_the_same_logits_alone_and_together(model: Transformer, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ids = torch.randint(0, CONFIG.vocab_size, (1, 200), generator=torch.Generator().manual_seed(1))
        one, many = (model.new_cache(220, slack=MAX_DRAFT) for _ in range(2))
        assert torch.equal(model(ids[:, :40], one), model(ids[:, :40], many))
        position = 40
        for count in (1, 2, 5, 8, 16, 3, 12, 16, 7, 16, 16):  # past the window of 64 and round the buffer
            span = range(position, position + count)
            alone = torch.cat([model(ids[:, at : at + 1], one) for at in span], dim=1)
            assert torch.equal(alone, model(ids[:, span.start : span.stop], many)), count
            position += count
    finally:
        torch.set_num_threads(before)


def test_guesses_leave_a_greedy_answer_as_it_is(model: Transformer) -> None:
    # A prompt that repeats itself, so that there is much to guess, much of it wrongly.
    phrase = random.Random(3).sample(range(3, 700), 12)
    prompt = [1, *phrase * 3]
    plain = list(Engine(model).generate(Request(prompt, 120)))
    guessed = Engine(model, lookup="on").generate(Request(prompt, 120))
    assert list(guessed) == plain
    assert guessed.pace.drafted > 0
