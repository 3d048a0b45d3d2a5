"""One engine, one model, one process: start, prefill, decode; the figures as one line of JSON.

    python benchmarks/runtime_worker.py ours|llama.cpp|transformers MODEL --prompt 512 --tokens 16 --passes 3

MODEL is a snapshot's directory, or for llama.cpp a GGUF file. Started by `runtime.py`, by the Python that has the
engine: imports of the others are inside their functions.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Word-like ids, the same for every engine; what they mean does not matter to the time.
SHORT_PROMPT = 8


def ids(count: int) -> list[int]:
    """Return a prompt: the token that begins a text, then `count` − 1 others."""
    return [1, *((index * 7919) % 31000 + 300 for index in range(count - 1))]


@dataclass
class Engine:
    """``evaluate`` appends ids to the sequence and computes the last one's logits; ``reset`` begins another one."""

    evaluate: Callable[[Sequence[int]], Any]
    reset: Callable[[], Any]


def ours(model: str, positions: int, threads: int) -> Engine:
    """Load a snapshot with the bundled runtime."""
    from mistral_runtime.engine import eager_step
    from mistral_runtime.session import ComputeOptions, load_session, open_snapshot

    snapshot = open_snapshot(Path(model), chat_template="none")
    options = ComputeOptions(threads=threads, lookup="off")
    session = load_session(snapshot, options, positions=positions, context=None, report=lambda _line: None)
    loaded = session.engine.model
    cache = [loaded.new_cache(positions)]
    return Engine(
        lambda tokens: eager_step(loaded, tokens, cache[0]),
        lambda: cache.__setitem__(0, loaded.new_cache(positions)),
    )


def llama_cpp(model: str, positions: int, threads: int) -> Engine:
    """Load a GGUF file with llama.cpp, through llama-cpp-python."""
    from llama_cpp import Llama

    loaded = Llama(
        model, n_ctx=positions, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    return Engine(loaded.eval, loaded.reset)


def transformers(model: str, positions: int, threads: int) -> Engine:
    """Put a snapshot's mapped weights into transformers' model; queries' rows are in another order, the time is not."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM
    from transformers.cache_utils import DynamicCache

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from benchmarks.synthetic_mistral import hub_name
    from mistral_runtime.snapshot import find_weights, load_config
    from mistral_runtime.weights import open_checkpoint

    del positions
    torch.set_num_threads(threads)
    files = find_weights(Path(model))
    config = load_config(Path(model), files.layout)
    checkpoint = open_checkpoint(files, config)
    theirs = MistralConfig(
        vocab_size=config.vocab_size, hidden_size=config.dim, intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim, sliding_window=config.sliding_window, rms_norm_eps=config.norm_eps,
        rope_theta=config.rope_theta, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        loaded = MistralForCausalLM(theirs)
    state = {hub_name(name): checkpoint.read(info) for name, info in checkpoint.tensors.items()}
    loaded.load_state_dict(state, assign=True)
    loaded.model.rotary_emb = type(loaded.model.rotary_emb)(theirs)  # its buffers are not in any file
    loaded.eval()
    cache = [DynamicCache()]

    @torch.inference_mode()
    def evaluate(tokens: Sequence[int]) -> Any:
        return loaded(torch.tensor([list(tokens)]), past_key_values=cache[0], logits_to_keep=1).logits

    return Engine(evaluate, lambda: cache.__setitem__(0, DynamicCache()))


ENGINES = {"ours": ours, "llama.cpp": llama_cpp, "transformers": transformers}


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds that `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def seconds_since_start() -> float:
    """Return how long ago this process began."""
    ticks = int(Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description="Measure one engine.")
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--start-only", action="store_true", help="stop at the first token")
    arguments = parser.parse_args()
    positions = arguments.prompt + arguments.tokens + SHORT_PROMPT
    engine = ENGINES[arguments.engine](arguments.model, positions, arguments.threads)
    engine.evaluate(ids(SHORT_PROMPT))
    found: dict[str, Any] = {"first_token_seconds": seconds_since_start()}
    if not arguments.start_only:
        engine.evaluate([5])
        prefill, decode = [], []
        for _ in range(arguments.passes):
            engine.reset()
            prefill.append(timed(lambda: engine.evaluate(ids(arguments.prompt))))
            decode += [timed(partial(engine.evaluate, [index + 300])) for index in range(arguments.tokens)]
        found["prefill_tokens_per_second"] = arguments.prompt / statistics.median(prefill)
        found["decode_tokens_per_second"] = 1 / statistics.median(decode)
    found["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(found))


if __name__ == "__main__":
    main()
