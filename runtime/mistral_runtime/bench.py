"""The `bench` command: prefill and decoding, beside what this machine's memory gives in the same minute.

Prefill is bound by arithmetic: a chunk of the prompt shares one read of the weights. Decoding is bound by memory: each
token reads them all. So decoding is told as a share of the ceiling too, measured in turn with it, since the speed of a
shared machine's memory drifts and only figures of the same minute can be compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mistral_runtime.bandwidth_plot import bandwidth_svg
from mistral_runtime.config import ModelConfig
from mistral_runtime.device import dtype_name
from mistral_runtime.engine import Request
from mistral_runtime.errors import BadRequest, WriteFailed
from mistral_runtime.json_result import tell
from mistral_runtime.machine import peak_resident_bytes
from mistral_runtime.memory_speed import MemoryProbe, bytes_read_per_token
from mistral_runtime.session import ComputeOptions, Session, load_session, open_snapshot
from mistral_runtime.startup import StartClock
from mistral_runtime.terminal import write_err


@dataclass(frozen=True)
class BenchOptions:
    """What the command line asked for."""

    directory: Path
    compute: ComputeOptions
    prompt_tokens: int = 512
    decode_tokens: int = 32
    rounds: int = 3
    plot: Path | None = None
    as_json: bool = False
    quiet: bool = False
    timings: bool = False
    clock: StartClock = field(default_factory=StartClock)


@dataclass(frozen=True)
class Round:
    """One prompt and its continuation: tokens per second, and what memory gave just before, in bytes per second."""

    prefill: float
    decode: float
    first_token_at: float  # on the clock of time.perf_counter
    ceiling: float = 0.0

    def fields(self) -> dict[str, float]:
        """Return the figures as they are printed; the first pass has no ceiling."""
        told: dict[str, float] = {
            "prefill_tokens_per_second": round(self.prefill, 3),
            "decode_tokens_per_second": round(self.decode, 3),
        }
        return told | ({"memory_bytes_per_second": round(self.ceiling)} if self.ceiling else {})


def run_bench(options: BenchOptions) -> int:
    """Measure, tell people on stderr, print one JSON object on stdout, and return the exit code.

    Raises:
        MistralRuntimeError: Without `--json`, any failure that has three lines to show.
        Interrupted: A signal came.
    """
    report: Callable[[str], None] = _ignore if options.quiet else write_err
    results: list[dict[str, Any]] = []

    def work() -> tuple[dict[str, Any], str]:
        results.append(measure(options, report))
        return results[0], ""

    code = tell(work, as_json=options.as_json, always_json=True)
    # After the result is out: a disk that refuses the picture must not take the measurement with it.
    if results and options.plot is not None:
        _draw(options.plot, options.directory, results[0])
    return code


def measure(options: BenchOptions, report: Callable[[str], None]) -> dict[str, Any]:
    """Return what the command prints; documented in docs/runtime.md."""
    _require_place_for(options.plot)
    snapshot = open_snapshot(options.directory, chat_template="none")
    positions = options.prompt_tokens + options.decode_tokens + 1
    _require_room(snapshot.config, positions)
    options.clock.mark("snapshot")
    session = load_session(
        snapshot, options.compute, positions=positions, context=None, report=report, clock=options.clock
    )
    loaded = time.perf_counter()
    # The first pass is a start: it touches the weights for the first time. Its memory is all that a run takes, so the
    # peak is read before the probe adds its own.
    first = _pass(session, options)
    peak_bytes = peak_resident_bytes()
    report(f"first pass: {_rates(first)} · peak memory {peak_bytes / 1e9:.2f} GB")
    if options.timings:
        write_err(session.clock.line())
    probe = MemoryProbe(session.compute.device)
    weight_bytes = bytes_read_per_token(session.engine.model)
    rounds = []
    for number in range(1, options.rounds + 1):
        ceiling = probe.bytes_per_second()
        rounds.append(replace(_pass(session, options), ceiling=ceiling))
        report(f"round {number}: {_rates(rounds[-1])} · {_share(rounds[-1], weight_bytes)}")
    told = _medians(rounds, weight_bytes)
    report(f"median: {told['prefill_tokens_per_second']:.1f} and {told['decode_tokens_per_second']:.2f} tokens/s")
    return {
        **told,
        "weight_bytes_per_token": weight_bytes,
        "first_token_seconds": {
            "from_start": round(session.clock.total, 4),
            "since": session.clock.since,
            "from_load": round(session.load_seconds + first.first_token_at - loaded, 4),
        },
        "peak_rss_bytes": peak_bytes,
        "prompt_tokens": options.prompt_tokens,
        "decode_tokens": options.decode_tokens,
        "first_pass": first.fields(),
        "rounds": [measured.fields() for measured in rounds],
        "timings": session.clock.fields(),
        "device": str(session.compute.device),
        "dtype": dtype_name(session.compute.dtype),
        "threads": session.compute.threads,
        "layout": snapshot.files.layout,
        "torch": torch.__version__,
    }


def _pass(session: Session, options: BenchOptions) -> Round:
    """Answer one prompt as `generate` would. Which tokens it is made of makes no difference to the speed."""
    vocabulary = session.snapshot.config.vocab_size
    drawn = torch.randint(vocabulary, (options.prompt_tokens,), generator=torch.Generator().manual_seed(0))
    # One more than is timed as decoding: the first token comes out of the prefill.
    generation = session.engine.generate(Request(drawn.tolist(), options.decode_tokens + 1))
    first_token_at = 0.0
    for _token in session.clock.watch(generation):
        first_token_at = first_token_at or time.perf_counter()
    return Round(
        prefill=options.prompt_tokens / generation.prefill_seconds,
        decode=options.decode_tokens / generation.decode_seconds,
        first_token_at=first_token_at,
    )


def _medians(rounds: Sequence[Round], weight_bytes: int) -> dict[str, float]:
    """Return the middle of each figure; the share is the middle of the rounds' own shares, each pair side by side."""
    decode = statistics.median(measured.decode for measured in rounds)
    return {
        "prefill_tokens_per_second": round(statistics.median(measured.prefill for measured in rounds), 3),
        "decode_tokens_per_second": round(decode, 3),
        "decode_bytes_per_second": round(decode * weight_bytes),
        "memory_bytes_per_second": round(statistics.median(measured.ceiling for measured in rounds)),
        "share_of_memory": round(statistics.median(r.decode * weight_bytes / r.ceiling for r in rounds), 4),
    }


def _rates(measured: Round) -> str:
    return f"prefill {measured.prefill:.1f} tokens/s · decode {measured.decode:.2f} tokens/s"


def _share(measured: Round, weight_bytes: int) -> str:
    used = measured.decode * weight_bytes
    return (
        f"{used / 1e9:.1f} GB/s of weights, memory gives {measured.ceiling / 1e9:.1f} ({used / measured.ceiling:.0%})"
    )


def _require_room(config: ModelConfig, positions: int) -> None:
    if config.context_limit is not None and positions > config.context_limit:
        raise BadRequest(
            "the model's context is too short for this measurement",
            detail=f"expected at most {config.context_limit} tokens together, found {positions}",
            hint="lower --prompt-tokens or --decode-tokens",
        )


def _require_place_for(plot: Path | None) -> None:
    """Raise BadRequest for a picture that could not be written, before minutes are spent on what it shows."""
    if plot is not None and (plot.is_dir() or not plot.parent.is_dir()):
        raise BadRequest(
            f"{plot} is no place for a picture",
            detail=f"expected a file in a directory that exists, found {'a directory' if plot.is_dir() else 'none'}",
            hint="correct --plot",
        )


def _draw(path: Path, directory: Path, result: dict[str, Any]) -> None:
    weight_bytes = result["weight_bytes_per_token"]
    pairs = [(r["decode_tokens_per_second"] * weight_bytes, r["memory_bytes_per_second"]) for r in result["rounds"]]
    title = f"Decoding {directory.resolve().name}: {result['decode_tokens_per_second']:.2f} tokens/s"
    note = (
        f"{result['device']}, {result['dtype']}, {result['threads']} threads · {weight_bytes / 1e9:.2f} GB of weights "
        f"a token · prefill {result['prefill_tokens_per_second']:.0f} tokens/s"
    )
    try:
        path.write_text(bandwidth_svg(title, note, pairs), encoding="utf-8")
    except OSError as error:
        raise WriteFailed(
            f"cannot write {path}", detail=f"expected to write a picture, found: {error}", hint="correct --plot"
        ) from error


def _ignore(_text: str) -> None:
    """Show nothing."""
