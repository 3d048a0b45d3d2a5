"""Many sequences in one step: each gets what it gets alone, in bfloat16 on the CPU bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mistral_runtime.batched_step import Segment, batched_step
from mistral_runtime.config import ModelConfig
from mistral_runtime.engine import eager_step
from mistral_runtime.kernels.rows import MAX_ROWS, row_kernels
from mistral_runtime.kv_cache import RollingKVCache
from mistral_runtime.linear_rows import use_row_kernels
from mistral_runtime.quantized import QuantizedWeight, quantize
from mistral_runtime.quantized_file import build_quantized, group_of
from mistral_runtime.recipe import Recipe
from mistral_runtime.transformer import Transformer

CONFIG = ModelConfig(
    dim=256, n_layers=2, head_dim=64, hidden_dim=384, n_heads=4, n_kv_heads=2, vocab_size=300, norm_eps=1e-5,
    rope_theta=1e4, sliding_window=None,
)  # fmt: skip
KINDS = ("float32", "float32+int8", "bf16", "bf16+int8", "int8", "int4", "int4+int8")


def _model(kind: str, config: ModelConfig) -> Transformer:
    """Return a model with matrices of that kind; behind a plus, how its caches keep keys and values."""
    kind, _, kv = kind.partition("+")
    torch.manual_seed(5)
    model = Transformer(config).eval().requires_grad_(False)
    model.kv = "int8" if kv else "exact"
    model.tok_embeddings.weight.normal_()
    if kind == "float32":
        return model
    model = model.to(torch.bfloat16)
    if kind == "bf16":
        use_row_kernels(model)
        return model
    recipe = Recipe.of(kind)

    def tensors() -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
        for name, shape in config.tensor_shapes().items():
            weight, bits = model.get_parameter(name), recipe.bits_of(name, shape)
            group = group_of(recipe, bits) if bits else 0
            yield name, quantize(weight, bits=bits, group=group, name=name) if bits else weight

    model = build_quantized(config, tensors())
    model.kv = "int8" if kv else "exact"
    return model


def _ids(count: int, seed: int = 1) -> list[int]:
    return random.Random(seed).choices(range(CONFIG.vocab_size), k=count)


def _pair(model: Transformer, prompt: int, seed: int, *, slack: int = 0) -> tuple[RollingKVCache, RollingKVCache]:
    """Return the same sequence twice: to go on with others, and alone."""
    caches = model.new_cache(400, slack=slack), model.new_cache(400, slack=slack)
    for cache in caches:
        if prompt:
            eager_step(model, _ids(prompt, seed), cache)
    return caches


def _same(kind: str) -> Callable[[Tensor, Tensor], bool]:
    is_exact = not kind.startswith("float32") and row_kernels() is not None
    # Where the last digit decides what an integer is rounded to, 8 bits make more of it.
    tolerance = {"float32": 2e-5, "float32+int8": 2e-2}.get(kind, 0.1)
    return torch.equal if is_exact else lambda a, b: torch.allclose(a, b, atol=tolerance)


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_of_all_lengths_get_together_what_they_get_alone(kind: str, window: int | None) -> None:
    model, same = _model(kind, replace(CONFIG, sliding_window=window)), _same(kind)
    # Empty, within a window, past it, and past a chunk of the kernel's; some that can be taken back.
    pairs = [
        _pair(model, prompt, prompt, slack=slack) for prompt, slack in ((0, 0), (5, 3), (23, 0), (52, 3), (270, 0))
    ]
    # Decoding, checking guesses and the beginning of a prompt, all in one step; at most 24 rows.
    for turn, counts in enumerate([(9, 1, 1, 1, 1), (1, 4, 1, 4, 12), (1, 1, 2, 4, 1), (1, 1, 1, 1, 1)]):
        ids = [_ids(count, 10 * turn + index) for index, count in enumerate(counts)]
        found = batched_step(model, [Segment(ours, each, "all") for (ours, _), each in zip(pairs, ids, strict=True)])
        for (_, alone), each, logits in zip(pairs, ids, found, strict=True):
            assert same(logits, eager_step(model, each, alone, last_only=False)), (turn, len(each))
        if turn == 1:  # guesses were wrong
            for cache in (*pairs[1], *pairs[3]):
                cache.rewind(3)


@pytest.mark.parametrize("kind", ["float32", "bf16"])
def test_a_long_prompt_beside_decoding_agrees_up_to_rounding(kind: str) -> None:
    model = _model(kind, replace(CONFIG, sliding_window=24))
    (long, long_alone), (short, short_alone) = _pair(model, 30, 1), _pair(model, 50, 2)
    chunk = _ids(60)
    ours = batched_step(model, [Segment(long, chunk, "last"), Segment(short, [7], "last")])
    theirs = [eager_step(model, chunk, long_alone), eager_step(model, [7], short_alone)]
    for found, expected in zip(ours, theirs, strict=True):
        tolerance = 1e-5 if kind == "float32" else 0.03
        assert float((found - expected).abs().max()) < tolerance * float(expected.abs().max())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("float32")])
def test_what_stands_beside_a_sequence_changes_no_bit(kind: str) -> None:
    if row_kernels() is None:
        pytest.skip("torch promises no such thing")
    model = _model(kind, CONFIG)
    results = []
    for others in (0, 1, 7, MAX_ROWS - 1):
        cache, _ = _pair(model, 20, 3)
        beside = [Segment(_pair(model, 3 * index, index)[0], [index]) for index in range(others)]
        results.append(batched_step(model, [*beside, Segment(cache, [9])])[-1])
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_only_the_logits_that_are_wanted_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("float32", CONFIG)
    projected = list[int]()
    whole = model.project

    def counting(x: Tensor) -> Tensor:
        projected.append(x.shape[1])
        return whole(x)

    monkeypatch.setattr(model, "project", counting)
    caches = [model.new_cache(10) for _ in range(3)]
    last, every, none = batched_step(
        model,
        [Segment(caches[0], [1, 2, 3], "last"), Segment(caches[1], [4, 5], "all"), Segment(caches[2], [6], "none")],
    )
    assert (last.shape[0], every.shape[0], none.shape[0], projected) == (1, 2, 0, [3])
    assert all(logits.dtype == torch.float32 and logits.shape[1] == 300 for logits in (last, every, none))
    (silent,) = batched_step(model, [Segment(caches[2], [7], "none")])
    assert (silent.shape, projected) == ((0, 300), [3])
    assert [cache.length for cache in caches] == [3, 2, 2]
    assert batched_step(model, []) == []


def _refused(model: Transformer) -> Sequence[list[Segment]]:
    good, full = model.new_cache(10), model.new_cache(2)
    return (
        [Segment(good, [1]), Segment(model.new_cache(10), [])],
        [Segment(good, [1]), Segment(full, [1, 2, 3])],
        [Segment(good, [1]), Segment(good, [2])],
        [Segment(good, [1]), Segment(model.new_cache(10, batch_size=2), [2])],
    )


@pytest.mark.parametrize("case", range(4))
def test_a_step_that_is_refused_has_changed_nothing(case: int) -> None:
    model = _model("float32", CONFIG)
    segments = _refused(model)[case]
    with pytest.raises(ValueError, match=r"."):
        batched_step(model, segments)
    assert {segment.cache.length for segment in segments} == {0}
