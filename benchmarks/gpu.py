"""How near do decoding and prompts on a GPU come to what its memory and its arithmetic allow?

    python benchmarks/gpu.py                      full-size Mistral 7B, random weights, some 30 GB of the GPU
    python benchmarks/gpu.py --device cpu --small            does it run at all?

Beside ours: the ceilings (a read of a large tensor, one large product), the eager engine, and transformers where it is
installed, with the same shapes. Decoding is timed in rounds that take turns; medians. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from mistral_runtime.batched_step import Segment, batched_step
from mistral_runtime.config import ModelConfig
from mistral_runtime.engine import Engine, Request, eager_step
from mistral_runtime.gpu.device_engine import DeviceEngine
from mistral_runtime.gpu.graphs import EagerRunner, runner_for
from mistral_runtime.gpu.static_cache import SlotPool
from mistral_runtime.gpu.static_step import StaticStep
from mistral_runtime.transformer import Transformer

MISTRAL_7B = ModelConfig(
    dim=4096, n_layers=32, head_dim=128, hidden_dim=14336, n_heads=32, n_kv_heads=8, vocab_size=32000,
    norm_eps=1e-5, rope_theta=1e4, sliding_window=4096,
)  # fmt: skip
SMALL = replace(MISTRAL_7B, dim=256, n_layers=2, head_dim=64, hidden_dim=512, n_heads=4, n_kv_heads=2, vocab_size=500)
PROMPT = 512


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return how long the device takes, everything it was given included."""
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(work: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """Return the median after a first run that does not count."""
    work()
    return statistics.median(seconds_of(work, device) for _ in range(rounds))


def ceilings(device: torch.device, *, small: bool) -> dict[str, float]:
    """Return what a plain read of memory and a plain product reach."""
    values = torch.ones((1 << 22) if small else (1 << 31), dtype=torch.bfloat16, device=device)
    read = values.nbytes / median_seconds(values.sum, device)
    del values
    side = 512 if small else 8192
    square = torch.ones(side, side, dtype=torch.bfloat16, device=device)
    product = 2 * side**3 / median_seconds(lambda: square @ square, device)
    return {"read_gb_per_s": read / 1e9, "product_tflops": product / 1e12}


def build(config: ModelConfig, device: torch.device) -> Transformer:
    """Return a model with random weights, made where they are."""
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
    model.to_empty(device=device).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.normal_(std=0.02) if weight.dim() > 1 else weight.fill_(1)
    return model


def read_per_step(model: Transformer) -> int:
    """Return the bytes of weights that a decode step reads: all but the embeddings."""
    return sum(weight.nbytes for name, weight in model.named_parameters() if not name.startswith("tok_embeddings"))


def decode_seconds(model: Transformer, batch: int, steps: int) -> dict[str, float]:
    """Return the median seconds of a step of so many sequences: by graphs, by static steps alone, and eager."""
    context, prompt = PROMPT + 8 * (steps + 1), [5] * PROMPT
    ways: dict[str, Callable[[], object]] = {}
    for name, runner in (("graphs", runner_for(model.device)), ("static", EagerRunner())):
        static = StaticStep(model, SlotPool(model, slots=batch, context=context), runner)
        slots = [static.pool.new_cache(context) for _ in range(batch)]
        rows = [(cache, 7) for cache in slots if cache is not None]
        for cache, _ in rows:
            eager_step(model, prompt, cache)
        ways[name] = lambda static=static, rows=rows: static.decode(rows)
    caches = [model.new_cache(context) for _ in range(batch)]
    for cache in caches:
        eager_step(model, prompt, cache)
    ways["eager"] = lambda: batched_step(model, [Segment(cache, [7]) for cache in caches])
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(5):
        for name, way in ways.items():
            taken[name].append(seconds_of(lambda way=way: [way() for _ in range(steps)], model.device) / steps)
    return {name: statistics.median(values) for name, values in taken.items()}


def prefill_seconds(model: Transformer) -> float:
    """Return the seconds of one prompt in one chunk."""
    return median_seconds(lambda: eager_step(model, [5] * PROMPT, model.new_cache(PROMPT)), model.device)


def first_token_seconds(engine: Engine) -> float:
    """Return the seconds from a prompt to its first token, graphs captured before."""

    def first(token: int) -> int:
        return next(iter(engine.generate(Request([token] * PROMPT, 4))))

    list(engine.generate(Request([5] * PROMPT, 4)))
    device = engine.model.device
    return statistics.median(seconds_of(partial(first, token), device) for token in range(6, 11))


def of_transformers(config: ModelConfig, device: torch.device, steps: int) -> dict[str, float] | None:
    """Return what transformers takes with the same shapes, or None where it is not installed."""
    try:
        from transformers import MistralConfig, MistralForCausalLM
    except ImportError:
        return None
    shapes = MistralConfig(
        hidden_size=config.dim, num_hidden_layers=config.n_layers, head_dim=config.head_dim,
        intermediate_size=config.hidden_dim, num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads, vocab_size=config.vocab_size, sliding_window=config.sliding_window,
    )  # fmt: skip
    with torch.device(device):
        model = MistralForCausalLM(shapes).to(torch.bfloat16).eval()
    ids = torch.full((1, PROMPT), 5, device=device)

    def generate(count: int) -> None:
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)

    first = median_seconds(lambda: generate(1), device, rounds=3)
    whole = median_seconds(lambda: generate(1 + steps), device, rounds=3)
    return {"first_token_s": first, "step_s": (whole - first) / steps}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes: a test of this program, not of the device")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=64)
    options = parser.parse_args()
    device, config = torch.device(options.device), SMALL if options.small else MISTRAL_7B
    result: dict[str, object] = {"device": str(device), "torch": torch.__version__}
    limits = ceilings(device, small=options.small)
    result["ceilings"] = limits
    model = build(config, device)
    size, products = read_per_step(model), 2 * PROMPT * sum(w.numel() for w in model.layers.parameters())
    decode = {}
    for batch in options.batch:
        taken = decode_seconds(model, batch, options.steps)
        decode[batch] = {
            name: {"step_s": s, "tokens_per_s": batch / s, "share_of_read": size / s / 1e9 / limits["read_gb_per_s"]}
            for name, s in taken.items()
        }
        print(
            f"decode, {batch} sequences: " + ", ".join(f"{name} {batch / s:.0f} tokens/s" for name, s in taken.items())
        )
    result["decode"] = decode
    seconds = prefill_seconds(model)
    result["prefill"] = {"seconds": seconds, "share_of_product": products / seconds / 1e12 / limits["product_tflops"]}
    pool = SlotPool(model, slots=1, context=PROMPT + 8)
    result["first_token_s"] = first_token_seconds(DeviceEngine(model, pool=pool, runner=runner_for(device)))
    del model, pool
    gc.collect()
    result["transformers"] = of_transformers(config, device, options.steps)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
