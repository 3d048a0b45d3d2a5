"""How many tokens a second do concurrent streams get, beside llama.cpp's own server on the same weights?

    python benchmarks/serve.py WIDTH=OURS,GGUF … --llama-server PATH [--streams 1,2,4,8,16] [--rounds 2]

Each argument is a width and what to serve at it: `int8=PREPARED,model-Q8_0.gguf`; see `runtime.py` for how to make
them. Servers take turns, each alone on the machine, so that every figure has the other's beside it from the same
minutes; ratios are medians over rounds. All streams begin at once, with prompts that no cache knows and answers of a
fixed length. `--plot FILE.svg` draws the totals. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import httpx

from benchmarks.common import Summary, free_port
from benchmarks.plot import Bar, Group, write_bar_chart
from benchmarks.streaming_load import Load, run_load

_START_SECONDS = 180
_ENGINES = ("ours", "llama-server")


@dataclass(frozen=True)
class Plan:
    """What to measure on every server."""

    streams: Sequence[int]
    prompt_tokens: int
    answer_tokens: int
    vocabulary: int

    @property
    def context(self) -> int:
        """Positions that one stream needs, with a little room."""
        return self.prompt_tokens + self.answer_tokens + 32


def command(engine: str, model: str, port: int, plan: Plan, llama_server: str) -> list[str]:
    """Return how to start a server for the most streams of the plan."""
    most = max(plan.streams)
    if engine == "ours":
        flags = [f"--port={port}", "--model-name=m", f"--max-running={most}", f"--context={plan.context}"]
        return [sys.executable, "-m", "mistral_runtime", "serve", model, *flags]
    size = f"{most * plan.context}"
    flags = ["--port", f"{port}", "--alias", "m", "-np", f"{most}", "-c", size, "-t", "2", "--no-webui"]
    return [llama_server, "-m", model, *flags]


@contextmanager
def server(engine: str, model: str, plan: Plan, llama_server: str) -> Iterator[str]:
    """Run one server and give its address once it answers.

    Raises:
        RuntimeError: It ended instead.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command(engine, model, port, plan, llama_server), stdout=log, stderr=subprocess.STDOUT
        )
        try:
            _wait_until_ready(process, f"{url}/{'ready' if engine == 'ours' else 'health'}", log)
            yield url
        finally:
            process.terminate()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: IO[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if httpx.get(url, trust_env=False, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(0.2)
    log.seek(0)
    raise RuntimeError(f"{process.args} did not come up; its last words: {log.read()[-500:]!r}")


def measure(url: str, plan: Plan, streams: int, seed: int) -> dict[str, float]:
    """Run one load and return its totals."""
    load = Load(streams, plan.prompt_tokens, plan.answer_tokens)
    found = asyncio.run(run_load(url, "m", load, vocabulary=plan.vocabulary, seed=seed))
    firsts = sorted(stream.first_seconds for stream in found)
    return {
        "tokens_per_second": streams * plan.answer_tokens / max(stream.last_seconds for stream in found),
        "first_token_p50_seconds": firsts[(len(firsts) - 1) // 2],
        "first_token_p95_seconds": firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))],
    }


def compare(width: str, models: dict[str, str], plan: Plan, rounds: int, llama_server: str) -> dict[str, Any]:
    """Measure one width, print it for people and return it."""
    rows: dict[str, dict[int, list[dict[str, float]]]] = {
        engine: {streams: [] for streams in plan.streams} for engine in models
    }
    for number in range(rounds):
        for engine in models if number % 2 == 0 else reversed(models):
            with server(engine, models[engine], plan, llama_server) as url:
                measure(url, plan, 1, seed=0)  # brings the weights into memory
                for streams in plan.streams:
                    found = measure(url, plan, streams, seed=1000 * number + streams)
                    rows[engine][streams].append(found)
                    print(
                        f"  {width} round {number + 1} {engine:12s} {streams:2d} streams: {_shown(found)}", flush=True
                    )
    medians = {engine: {n: _medians(found) for n, found in by.items()} for engine, by in rows.items()}
    ratios = {}
    for streams in plan.streams if len(models) > 1 else ():
        pairs = zip(*(rows[engine][streams] for engine in _ENGINES), strict=True)
        ratios[streams] = statistics.median(
            our["tokens_per_second"] / their["tokens_per_second"] for our, their in pairs
        )
        print(f"{width} {streams:2d} streams: ours / llama-server {ratios[streams]:.2f}", flush=True)
    return {"engines": medians, "ratios": ratios, "rows": rows}


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def _shown(found: dict[str, float]) -> str:
    return (
        f"{found['tokens_per_second']:6.2f} tokens/s in total, first token after "
        f"{found['first_token_p50_seconds']:.2f} s (p50), {found['first_token_p95_seconds']:.2f} s (p95)"
    )


def plot(path: Path, results: dict[str, dict[str, Any]], rounds: int) -> None:
    """Draw every width's total rate by the number of streams."""
    groups = []
    for width, result in results.items():
        for streams in next(iter(result["rows"].values())):
            bars = []
            for engine, by_streams in result["rows"].items():
                rate = Summary.of([row["tokens_per_second"] for row in by_streams[streams]])
                bars.append(Bar(engine, rate.median, rate.low, rate.high, is_ours=engine == "ours"))
            groups.append(Group(f"{width}, {streams} stream{'s' * (streams > 1)}", bars))
    note = f"tokens per second of all streams together, median of {rounds}; longer is better"
    write_bar_chart(path, "Concurrent streams on a CPU", note, groups, unit="tokens/s")


def main() -> None:
    """Compare at each width that the command line names."""
    parser = argparse.ArgumentParser(description="Compare servers under concurrent streams.")
    parser.add_argument("models", nargs="+", metavar="WIDTH=OURS,GGUF")
    parser.add_argument("--llama-server", default="llama-server", help="llama.cpp's server")
    parser.add_argument("--streams", default="1,2,4,8,16")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each answer")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    streams = [int(text) for text in arguments.streams.split(",")]
    plan = Plan(streams, arguments.prompt, arguments.tokens, arguments.vocabulary)
    results: dict[str, dict[str, Any]] = {}
    for text in arguments.models:
        width, _, paths = text.partition("=")
        own, _, other = paths.partition(",")
        models = dict(zip(_ENGINES, [own, other] if other else [own], strict=False))
        results[width] = compare(width, models, plan, arguments.rounds, arguments.llama_server)
    if arguments.plot:
        plot(arguments.plot, results, arguments.rounds)
    print(json.dumps({"rounds": arguments.rounds, "widths": results}))


if __name__ == "__main__":
    main()
