"""Keys and values of 8 bits: what is kept, what the kernel makes of it, what it saves and what it costs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mistral_runtime.__main__ import main
from mistral_runtime.config import ModelConfig
from mistral_runtime.device import choose_compute, plan_memory
from mistral_runtime.engine import eager_step
from mistral_runtime.errors import BadRequest
from mistral_runtime.kernels.attention import attention_kernel
from mistral_runtime.kv_cache import RollingKVCache
from mistral_runtime.kv_int8 import Int8KVCache, to_int8
from mistral_runtime.scoring import all_logits
from mistral_runtime.session import ComputeOptions, Session, load_session, open_snapshot
from mistral_runtime.transformer import Transformer

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "mistral_fetch" / "demo_model"
PROBE = ROOT / "tools" / "demo_model" / "probe.txt"
CONFIG = ModelConfig(
    dim=256, n_layers=2, head_dim=64, hidden_dim=384, n_heads=4, n_kv_heads=2, vocab_size=300, norm_eps=1e-5,
    rope_theta=1e4, sliding_window=None,
)  # fmt: skip


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_vector_is_kept_to_half_a_step_of_its_largest() -> None:
    vectors = _drawn(50, 64) * torch.logspace(-6, 6, 50)[:, None]
    integers, scales = to_int8(vectors)
    assert int(integers.abs().max()) == 127
    assert bool(((integers * scales - vectors).abs() <= 0.501 * vectors.abs().amax(-1, keepdim=True) / 127).all())


def test_nothing_stays_nothing_and_what_is_no_number_stays_none() -> None:
    vectors = torch.ones(4, 8)
    vectors[0], vectors[1, 3], vectors[2, 5] = 0, math.nan, -math.inf
    kept = torch.mul(*to_int8(vectors))
    assert torch.equal(kept[0], torch.zeros(8))
    assert bool(kept[1:3].isnan().all())
    assert torch.equal(kept[3], torch.ones(8))


@pytest.mark.parametrize("slack", [0, 3])
@pytest.mark.parametrize("window", [None, 8])
def test_what_comes_back_is_what_a_plain_cache_holds_of_the_kept(window: int | None, slack: int) -> None:
    config = replace(CONFIG, sliding_window=window)
    plain = RollingKVCache(config, context=60, dtype=torch.float32, slack=slack)
    cache = Int8KVCache(config, context=60, dtype=torch.float32, slack=slack)
    for count in (5, 1, 9, 1, 3, 20, 1):  # within the window, past it, round the buffer
        keys, values = (_drawn(1, 2, count, 64, seed=10 * count + which) for which in range(2))
        expected = plain.update(1, *(torch.mul(*to_int8(new)) for new in (keys, values)))
        for found, wanted in zip(cache.update(1, keys, values), expected, strict=True):
            assert torch.equal(found, wanted)
        for each in (plain, cache):
            each.advance(count)


def _model(head_dim: int = CONFIG.head_dim) -> Transformer:
    torch.manual_seed(5)
    model = Transformer(replace(CONFIG, head_dim=head_dim)).eval().requires_grad_(False).bfloat16()
    model.tok_embeddings.weight.normal_()
    model.kv = "int8"
    return model


@pytest.mark.skipif(attention_kernel() is None, reason="no kernels here")
@pytest.mark.parametrize("head_dim", [64, 20])  # with products of bfloat16 and without
def test_the_kernel_keeps_and_reads_what_torch_does(monkeypatch: pytest.MonkeyPatch, head_dim: int) -> None:
    model, ids = _model(head_dim), [7 * index % 300 for index in range(600)]
    logits, caches = [], []
    for kernel in (attention_kernel(), None):
        monkeypatch.setattr("mistral_runtime.step_attention.attention_kernel", lambda kernel=kernel: kernel)
        cache = model.new_cache(700)
        assert isinstance(cache, Int8KVCache)
        logits.append(torch.cat([eager_step(model, part, cache) for part in (ids[:500], ids[500:503], ids[503:504])]))
        caches.append(cache)
    ours, torchs = caches
    # The first layer's inputs are the same bits, so what is kept of them is as well.
    for name in ("keys", "values", "key_scales", "value_scales"):
        assert torch.equal(getattr(ours, name)[0][:, :, :504], getattr(torchs, name)[0][:, :, :504]), name
    assert float((logits[0] - logits[1]).norm() / logits[1].norm()) < 0.02


@pytest.mark.skipif(attention_kernel() is None, reason="no kernels here")
def test_a_kernel_that_meets_nan_says_so() -> None:
    model = _model()
    cache = model.new_cache(40)
    eager_step(model, [1, 2, 3], cache)
    assert isinstance(cache, Int8KVCache)
    cache.value_scales[1][0, 0, 1] = math.nan
    assert bool(eager_step(model, [4], cache).isnan().any())


def test_the_cache_takes_half_of_the_memory_and_the_plan_says_so() -> None:
    compute = choose_compute(device="cpu", dtype="bfloat16", threads=1, stored=torch.bfloat16)
    plans = {kind: plan_memory(CONFIG, compute, context=100, prefill_chunk=512, kv=kind) for kind in ("exact", "int8")}
    model = _model()
    for kind, plan in plans.items():
        model.kv = kind
        cache = model.new_cache(100)
        held = [*cache.keys, *cache.values]
        if isinstance(cache, Int8KVCache):
            held += [*cache.key_scales, *cache.value_scales]
        assert sum(tensor.nbytes for tensor in held) == plan.cache
    assert plans["int8"].cache / plans["exact"].cache == (64 + 4) / 128


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["--tp=2", "--compile"])
def test_it_is_refused_where_caches_are_made_otherwise(
    other: str, tmp_path: Path, write_snapshot: Callable[..., dict[str, Tensor]]
) -> None:
    write_snapshot(tmp_path)
    flags = {"ranks": 2} if "tp" in other else {"compile": True}
    options = ComputeOptions(device="cpu", threads=1, kv="int8", **flags)  # type: ignore[arg-type]
    snapshot = open_snapshot(tmp_path, chat_template="none")
    with pytest.raises(BadRequest) as caught:
        load_session(snapshot, options, positions=10, context=None, report=lambda _text: None)
    assert "--kv int8" in caught.value.detail
    assert other.partition("=")[0] in caught.value.detail


def _demo(kind: str) -> Session:
    options = ComputeOptions(device="cpu", dtype="bfloat16", kv=kind, threads=1)  # type: ignore[arg-type]
    snapshot = open_snapshot(DEMO, chat_template="auto")
    return load_session(snapshot, options, positions=1000, context=None, report=lambda _text: None)


def test_perplexity_stays(capsys: pytest.CaptureFixture[str]) -> None:
    def perplexity(*flags: str) -> float:
        arguments = ["--device", "cpu", "--dtype", "bfloat16", "--threads", "1", "--json", "--quiet"]
        assert main(["ppl", str(DEMO), str(PROBE), *arguments, *flags]) == 0
        found: float = json.loads(capsys.readouterr().out)["perplexity"]
        return found

    assert 0 < abs(perplexity("--kv", "int8") / perplexity() - 1) <= 0.01


def test_what_is_expected_next_stays() -> None:
    """Kullback-Leibler divergence from a cache of bfloat16 in nats, over all positions of that English."""
    exact, kept = _demo("exact"), _demo("int8")
    ids = exact.snapshot.tokenizer.encode(PROBE.read_text(encoding="utf-8"))[:600]
    p, q = (all_logits(session.engine.model, ids).double().log_softmax(-1) for session in (exact, kept))
    divergence = (p.exp() * (p - q)).sum(-1)
    assert 0 < float(divergence.mean()) <= 0.003
    assert float(divergence.quantile(0.99)) <= 0.02
