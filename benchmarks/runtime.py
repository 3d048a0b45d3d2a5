"""Is our runtime as fast as llama.cpp on the same weights, and how does it compare with transformers?

    python benchmarks/runtime.py MODEL=OURS,GGUF … [--llama-python PATH] [--rounds 3]

Each argument is a width and what to run at it: `bf16=SNAPSHOT,model-BF16.gguf int8=PREPARED,model-Q8_0.gguf`. Make
them with `synthetic_mistral.py`, `gguf_model.py` and `python -m mistral_runtime quantize`. Engines take turns, each in
a process of its own, so that every figure has one of the other's beside it from the same minute; ratios are medians
over rounds. Before each, a start to the first token brings the file into memory, so that starts are warm. A plain read
of memory and a product of matrices tell where the walls are. `--plot FILE.svg` draws the rates. Ends with one line of
JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import Summary
from benchmarks.plot import Bar, Group, write_bar_chart
from benchmarks.runtime_worker import timed

WORKER = Path(__file__).with_name("runtime_worker.py")
RATES = ("prefill_tokens_per_second", "decode_tokens_per_second")


def run(python: str, engine: str, model: str, options: list[str]) -> dict[str, Any]:
    """Run one engine once."""
    command = [python, str(WORKER), engine, model, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=WORKER.parents[1])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def walls() -> dict[str, float]:
    """Return what memory and arithmetic give at best here: bytes read, and bfloat16 operations, per second."""
    with torch.inference_mode():
        large = torch.ones(1 << 28, dtype=torch.float32)
        seconds = min(timed(large.sum) for _ in range(4))
        left, right = torch.ones(512, 4096, dtype=torch.bfloat16), torch.ones(4096, 4096, dtype=torch.bfloat16)
        product = min(timed(lambda: left @ right) for _ in range(4))
    return {"memory_bytes_per_second": large.nbytes / seconds, "bf16_flops": 2 * 512 * 4096 * 4096 / product}


def compare(
    width: str, models: dict[str, str], pythons: dict[str, str], rounds: int, options: list[str]
) -> dict[str, Any]:
    """Measure one width, print it for people and return it."""
    rows: dict[str, list[dict[str, Any]]] = {engine: [] for engine in models}
    reads: list[dict[str, float]] = []
    for number in range(rounds):
        order = list(models) if number % 2 == 0 else list(reversed(models))
        for engine in order:
            run(pythons[engine], engine, models[engine], ["--start-only"])
            found = run(pythons[engine], engine, models[engine], options)
            rows[engine].append(found)
            print(f"  {width} round {number + 1} {engine:12s} " + _shown(found), file=sys.stderr, flush=True)
        reads.append(walls())
    result: dict[str, Any] = {"walls": _medians(reads), "rows": rows, "engines": {}, "ratios": {}}
    for engine, found_rows in rows.items():
        result["engines"][engine] = _medians(found_rows)
        print(f"{width} {engine:12s} " + _shown(result["engines"][engine]))
    for engine in models:
        if engine != "ours":
            pairs = list(zip(rows["ours"], rows[engine], strict=True))
            result["ratios"][engine] = {
                rate: statistics.median(our[rate] / their[rate] for our, their in pairs) for rate in RATES
            }
            print(f"{width} ours / {engine}: " + ", ".join(f"{k} {v:.2f}" for k, v in result["ratios"][engine].items()))
    return result


def plot(path: Path, results: dict[str, dict[str, Any]], rounds: int) -> None:
    """Draw prefill and decode rates at every width."""
    groups = []
    for rate, what in zip(RATES, ("prefill", "decode"), strict=True):
        for width, result in results.items():
            bars = []
            for engine, rows in result["rows"].items():
                found = Summary.of([row[rate] for row in rows])
                bars.append(Bar(engine, found.median, found.low, found.high, is_ours=engine == "ours"))
            groups.append(Group(f"{what}, {width}", bars))
    note = f"tokens per second, median of {rounds}; lines reach from the lowest to the highest; longer is better"
    write_bar_chart(path, "Mistral 7B's shapes on a CPU", note, groups, unit="tokens/s")


def _medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def _shown(found: dict[str, Any]) -> str:
    return (
        f"prefill {found['prefill_tokens_per_second']:.1f} tokens/s, decode {found['decode_tokens_per_second']:.2f}, "
        f"first token {found['first_token_seconds']:.1f} s, resident {found['peak_rss_bytes'] / 2**30:.2f} GiB"
    )


def main() -> None:
    """Compare at each width that the command line names."""
    parser = argparse.ArgumentParser(description="Compare runtimes on the same weights.")
    parser.add_argument("models", nargs="+", metavar="WIDTH=OURS,GGUF")
    parser.add_argument("--llama-python", default=sys.executable, help="a Python that has llama_cpp")
    parser.add_argument("--transformers", action="store_true", help="compare with transformers too, on the first width")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    pythons = {"ours": sys.executable, "llama.cpp": arguments.llama_python, "transformers": sys.executable}
    options = [f"--prompt={arguments.prompt}", f"--tokens={arguments.tokens}"]
    for position, text in enumerate(arguments.models):
        width, _, paths = text.partition("=")
        own, _, other = paths.partition(",")
        models = {"ours": own} | ({"llama.cpp": other} if other else {})
        if arguments.transformers and position == 0:
            models["transformers"] = own
        results[width] = compare(width, models, pythons, arguments.rounds, options)
    if arguments.plot:
        plot(arguments.plot, results, arguments.rounds)
    print(json.dumps({"rounds": arguments.rounds, "widths": results}))


if __name__ == "__main__":
    main()
