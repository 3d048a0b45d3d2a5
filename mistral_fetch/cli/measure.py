"""``bench``, ``ppl`` and ``logits``: make a model complete, and let the runtime measure it or say what it expects."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mistral_fetch.cli.choices import QuantizeTo
from mistral_fetch.cli.fetch import RUN_EXIT_CODES, RefArgument
from mistral_fetch.cli.options import FrontEnd, command
from mistral_fetch.cli.run import directory_of
from mistral_fetch.cli.runtime_flags import (
    ChatTemplate,
    Device,
    Dtype,
    IgnorePlan,
    KeysValues,
    Prompt,
    Quantize,
    Raw,
    System,
    Threads,
    Timings,
    prompt_arguments,
    runtime_options,
)


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(app, "bench", transfer=True, epilog=RUN_EXIT_CODES)(bench)
    command(app, "ppl", transfer=True, epilog=RUN_EXIT_CODES)(ppl)
    command(app, "logits", transfer=True, epilog=RUN_EXIT_CODES)(logits)


def bench(
    front: FrontEnd,
    ref: RefArgument,
    prompt_tokens: Annotated[
        int | None, typer.Option("--prompt-tokens", metavar="N", help="Length of the prompt (512).")
    ] = None,
    decode_tokens: Annotated[
        int | None, typer.Option("--decode-tokens", metavar="N", help="Tokens generated after it (32).")
    ] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", metavar="N", help="How often to measure (3).")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the bandwidth as SVG; replaces the file.")
    ] = None,
    timings: Timings = False,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    ignore_memory_plan: IgnorePlan = False,
    quantize: Quantize = None,
    kv: KeysValues = None,
) -> int:
    """Measure a model's prefill and decoding beside the speed of this machine's memory."""
    options = runtime_options(
        {
            "--prompt-tokens": prompt_tokens,
            "--decode-tokens": decode_tokens,
            "--rounds": rounds,
            "--plot": plot,
            "--device": device,
            "--dtype": dtype,
            "--threads": threads,
            "--kv": kv,
        },
        {"--timings": timings, "--ignore-memory-plan": ignore_memory_plan},
    )
    return _measure(front, ref, quantize, "bench", options, [])


def ppl(
    front: FrontEnd,
    ref: RefArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="UTF-8 text; - reads standard input.")],
    context: Annotated[int | None, typer.Option("--context", metavar="N", help="Tokens a window holds.")] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", metavar="N", help="Tokens from window to window (half of them).")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    ignore_memory_plan: IgnorePlan = False,
    quantize: Quantize = None,
    kv: KeysValues = None,
) -> int:
    """Measure how well a model predicts a text: perplexity and bits per byte."""
    options = runtime_options(
        {
            "--context": context,
            "--stride": stride,
            "--device": device,
            "--dtype": dtype,
            "--threads": threads,
            "--kv": kv,
        },
        {"--ignore-memory-plan": ignore_memory_plan},
    )
    return _measure(front, ref, quantize, "ppl", options, [str(file)])


def logits(
    front: FrontEnd,
    ref: RefArgument,
    prompt: Prompt = None,
    top: Annotated[int | None, typer.Option("--top", metavar="K", help="How many of the likeliest (10).")] = None,
    all_positions: Annotated[bool, typer.Option("--all", help="Tell it for every position of the prompt.")] = False,
    system: System = None,
    raw: Raw = False,
    chat_template: ChatTemplate = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    ignore_memory_plan: IgnorePlan = False,
    quantize: Quantize = None,
    kv: KeysValues = None,
) -> int:
    """Print the likeliest next tokens and their log probabilities, as JSON."""
    prompt_options, positionals = prompt_arguments(prompt, or_else=f'mistral-fetch logits {ref} "Your prompt"')
    options = runtime_options(
        {
            "--top": top,
            "--system": system,
            "--chat-template": chat_template,
            "--device": device,
            "--dtype": dtype,
            "--threads": threads,
            "--kv": kv,
        },
        {"--all": all_positions, "--raw": raw, "--ignore-memory-plan": ignore_memory_plan},
    )
    return _measure(front, ref, quantize, "logits", options + prompt_options, positionals)


def _measure(
    front: FrontEnd,
    ref: str,
    quantize: QuantizeTo | None,
    runtime_command: str,
    options: list[str],
    positionals: list[str],
) -> int:
    from mistral_fetch.launch.answer import ask_runtime
    from mistral_fetch.launch.locate import find_interpreter
    from mistral_fetch.launch.process import run_runtime
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.use import in_use

    # Asked before 13 GB are fetched, not after.
    interpreter = find_interpreter(front.settings.python)
    directory, quantizing = directory_of(front, ref, quantize, interpreter)
    arguments = [str(directory), *positionals]
    options = quantizing + options + ["--quiet"] * front.wants_no_text
    with in_use(Layout(front.settings.home), directory, f"{runtime_command} {ref}"):
        if not front.is_json:
            return run_runtime(interpreter, runtime_command, options, arguments)
        front.result(ask_runtime(interpreter, runtime_command, options, arguments), "")
    return 0
