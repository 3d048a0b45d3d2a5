"""How much sooner is an answer that repeats its prompt, when the text itself is used to guess ahead?

    python benchmarks/lookup.py [--tokens 192] [--rounds 5] [--dim 2048] [--layers 8] [--threads N]

The demo model, where a step is mostly overhead, and random ones in bfloat16 whose weights are read from memory for
every step. Each continues a text in which the same passage stands again, and one that is new, where there is little to
guess: what lookup costs then. The random model that copies has small weights in its layers and equal embeddings in
and out, so that it repeats the token it was given: every guess is right, and its ratio is the most there can be. The
one that does not has another output. Rounds with and without lookup take turns; the ratio is that of the medians.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from mistral_runtime.config import ModelConfig
from mistral_runtime.engine import Engine, Request
from mistral_runtime.lookup import LookupMode
from mistral_runtime.sampling_params import SamplingParams
from mistral_runtime.snapshot import find_weights, load_config
from mistral_runtime.tokenizer import Tokenizer
from mistral_runtime.transformer import Transformer
from mistral_runtime.weights import load_model, open_checkpoint

COPIED = "What licence is Mistral 7B under?"


@dataclass(frozen=True)
class Case:
    """A model and what it continues."""

    name: str
    model: Transformer
    prompt: list[int]
    temperature: float = 0.0
    stop_ids: frozenset[int] = frozenset()


def demo_cases() -> list[Case]:
    """Return the demo model asked twice, so that its second answer can be copied from the first, and something new."""
    directory = Path(str(resources.files("mistral_fetch") / "demo_model"))
    files = find_weights(directory)
    config = load_config(directory, files.layout)
    model = load_model(open_checkpoint(files, config), config)
    tokenizer = Tokenizer(directory / "tokenizer.model")
    question = tokenizer.encode(f"Q: {COPIED}\nA:")
    eos = frozenset({tokenizer.eos_id})
    answer = list(Engine(model).generate(Request(question, 192, stop_ids=eos)))
    told = tokenizer.encode(f"Q: {COPIED}\nA:{tokenizer.decode(answer)}\nQ: {COPIED}\nA:")
    return [
        Case("demo model, copies", model, told, stop_ids=eos),
        Case("demo model, new", model, question, stop_ids=eos),
    ]


def random_cases(dim: int, layers: int) -> list[Case]:
    """Return two models of random weights, one that repeats itself and one that wanders."""
    return [
        Case("random model, copies", *_random_model(dim, layers, copies=True)),
        Case("random model, new", *_random_model(dim, layers, copies=False), temperature=10.0),
    ]


def _random_model(dim: int, layers: int, *, copies: bool) -> tuple[Transformer, list[int]]:
    config = ModelConfig(
        dim=dim, n_layers=layers, head_dim=128, hidden_dim=dim * 7 // 2, n_heads=dim // 128,
        n_kv_heads=max(1, dim // 512), vocab_size=8192, norm_eps=1e-5, rope_theta=1e4, sliding_window=4096,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    model = Transformer(config).to(torch.bfloat16).requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            weight.normal_(std=1.0 if name.startswith("tok_embeddings") else 0.002, generator=generator)
    if copies:
        model.output.weight.copy_(model.tok_embeddings.weight)
    else:
        model.output.weight.normal_(generator=generator)
    passage = torch.randint(0, config.vocab_size, (256,), generator=generator).tolist()
    return model, passage


def tokens_per_second(case: Case, lookup: LookupMode, tokens: int) -> tuple[float, list[int], float]:
    """Return the decoding rate, the ids, and which part of the guesses was right."""
    engine = Engine(case.model, lookup=lookup)
    sampling = SamplingParams(temperature=case.temperature, seed=1)
    generation = engine.generate(Request(case.prompt, tokens, sampling, case.stop_ids))
    ids = list(generation)
    right = generation.pace.accepted / max(1, generation.pace.drafted)
    return (len(ids) - 1) / generation.decode_seconds, ids, right


def compare(case: Case, *, tokens: int, rounds: int) -> dict[str, object]:
    """Measure one case with and without lookup in turn."""
    tokens_per_second(case, "off", 8)  # warm
    rates: dict[LookupMode, list[float]] = {"off": [], "auto": []}
    for _ in range(rounds):
        answers = []
        for mode, measured in rates.items():
            rate, ids, right = tokens_per_second(case, mode, tokens)
            measured.append(rate)
            answers.append(ids)
    off, auto = (statistics.median(measured) for measured in rates.values())
    is_same = answers[0] == answers[1]
    print(
        f"{case.name:22} off {off:8.1f}   auto {auto:8.1f} tokens/s   ratio {auto / off:5.2f}   "
        f"guesses right {right:4.0%}   {'same ids' if is_same else 'OTHER IDS'}",
        flush=True,
    )
    return {
        "case": case.name,
        "off": round(off, 2),
        "auto": round(auto, 2),
        "ratio": round(auto / off, 3),
        "guesses_right": round(right, 3),
        "same_ids": is_same,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = [*demo_cases(), *random_cases(args.dim, args.layers)]
    results = [compare(case, tokens=args.tokens, rounds=args.rounds) for case in cases]
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "results": results}))


if __name__ == "__main__":
    main()
