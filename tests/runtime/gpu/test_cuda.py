"""What only a GPU can show: graphs compute what eager steps compute, and a step makes the host wait for nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from mistral_runtime.engine import Engine, Request, eager_step
from mistral_runtime.gpu.choose import device_engine
from mistral_runtime.gpu.device_sampling import DeviceSampler, RowChoice
from mistral_runtime.gpu.graphs import EagerRunner, GraphRunner, LateReader
from mistral_runtime.gpu.static_cache import SlotCache, SlotPool
from mistral_runtime.gpu.static_step import Bucket, StaticStep
from mistral_runtime.sampling_params import SamplingParams
from tests.runtime.gpu.models import CONFIG, make_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@contextmanager
def _no_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _begin(step: StaticStep, prompt: list[int]) -> SlotCache:
    cache = step.pool.new_cache(step.pool.context)
    assert cache is not None
    eager_step(step.model, prompt, cache)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 300])
def test_graphs_compute_what_eager_steps_compute(window: int | None, dtype: torch.dtype) -> None:
    model = make_model(replace(CONFIG, sliding_window=window), dtype, "cuda")
    steps = [StaticStep(model, SlotPool(model, slots=3, context=700), r) for r in (GraphRunner(), EagerRunner())]
    for count in (1, 3):
        sequences = [[_begin(step, [5 + i] * (240 + i)) for i in range(count)] for step in steps]
        for token in range(300):  # past a length bucket, past the window, and back to graphs captured before
            graph, eager = (
                step.decode([(cache, token) for cache in caches]) for step, caches in zip(steps, sequences, strict=True)
            )
            torch.testing.assert_close(graph, eager, atol=1e-5 if dtype == torch.float32 else 4e-2, rtol=1e-3)
        del sequences


def test_greedy_answers_are_those_of_the_plain_engine() -> None:
    model, said = make_model(device="cuda"), list[str]()
    engine = device_engine(model, positions=200, context=None, slack=0, lookup="auto", report=said.append)
    assert engine is not None
    for _ in range(2):
        request = Request([5, 17, 3], 150)
        assert list(engine.generate(request)) == list(Engine(model, slack=0).generate(request))
    assert (engine.runner.name, said) == ("cuda-graphs", [])


def test_a_step_and_its_choice_wait_for_nothing() -> None:
    model = make_model(dtype=torch.bfloat16, device="cuda")
    step = StaticStep(model, SlotPool(model, slots=2, context=300), GraphRunner())
    caches = [_begin(step, [5, 6, 7]), _begin(step, [8, 9])]
    rows = [
        RowChoice(SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=1)),
        RowChoice(SamplingParams(), frequency=0.5),
    ]
    sampler, reader = DeviceSampler(rows, vocab_size=CONFIG.vocab_size, device="cuda"), LateReader(2, model.device)
    step.decode([(cache, 1) for cache in caches])  # captures, which may wait
    with _no_waiting(), torch.inference_mode():
        for _ in range(5):
            bucket = step.place([(cache, 0) for cache in caches])
            logits = step.launch(bucket)
            ids = sampler.choose(logits, step.positions[: bucket.rows] + 1)
            read = reader.begin(ids)
            step.tokens[: bucket.rows].copy_(ids.clamp(min=0))
    assert all(0 <= token < CONFIG.vocab_size for token in read())
    assert bucket == Bucket(2, 256, in_order=True)


def test_graphs_are_not_slower_than_eager_steps(capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(CONFIG, dim=1024, n_layers=8, head_dim=64, hidden_dim=3072, n_heads=16, n_kv_heads=4)
    model = make_model(config, torch.bfloat16, "cuda")
    size = sum(parameter.nbytes for name, parameter in model.named_parameters() if name != "tok_embeddings.weight")
    seconds = {}
    for runner in (GraphRunner(), EagerRunner()):
        step = StaticStep(model, SlotPool(model, slots=1, context=200), runner)
        cache = _begin(step, [1, 2, 3])
        for number in range(110):
            if number == 10:
                torch.cuda.synchronize()
                started = time.perf_counter()
            step.decode([(cache, 7)])
        torch.cuda.synchronize()
        seconds[runner.name] = (time.perf_counter() - started) / 100
    with capsys.disabled():
        print({name: f"{size / taken / 1e9:.0f} GB/s" for name, taken in seconds.items()})
    assert seconds["cuda-graphs"] < seconds["static"]
