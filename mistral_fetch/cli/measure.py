"""``bench``, ``ppl`` and ``logits``: make a model complete, and let the runtime measure it or say what it expects."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mistral_fetch.cli.choices import QuantizeTo
from mistral_fetch.cli.fetch import RUN_EXIT_CODES, Quantize, RefArgument, directory_of, runtime_options
from mistral_fetch.cli.options import FrontEnd, command
from mistral_fetch.errors import UsageError

Device = Annotated[str | None, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, mps or xpu.")]
Dtype = Annotated[str | None, typer.Option("--dtype", metavar="NAME", help="auto, bfloat16, float16 or float32.")]
Threads = Annotated[int | None, typer.Option("--threads", metavar="N", help="CPU threads.")]
IgnorePlan = Annotated[bool, typer.Option("--ignore-memory-plan", help="Load even if the memory plan does not fit.")]


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
    timings: Annotated[bool, typer.Option("--timings", help="Tell what the start took, part by part.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    ignore_memory_plan: IgnorePlan = False,
    quantize: Quantize = None,
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
        }
    )
    options += ["--timings"] * timings + ["--ignore-memory-plan"] * ignore_memory_plan
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
) -> int:
    """Measure how well a model predicts a text: perplexity and bits per byte."""
    options = runtime_options(
        {"--context": context, "--stride": stride, "--device": device, "--dtype": dtype, "--threads": threads}
    )
    return _measure(front, ref, quantize, "ppl", options + ["--ignore-memory-plan"] * ignore_memory_plan, [str(file)])


def logits(
    front: FrontEnd,
    ref: RefArgument,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The prompt; - or nothing reads standard input.")
    ] = None,
    top: Annotated[int | None, typer.Option("--top", metavar="K", help="How many of the likeliest (10).")] = None,
    all_positions: Annotated[bool, typer.Option("--all", help="Tell it for every position of the prompt.")] = False,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="A system prompt for instruct models.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Give an instruct model the prompt as it is.")] = False,
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", metavar="NAME", help="v1, v3, demo or none.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    ignore_memory_plan: IgnorePlan = False,
    quantize: Quantize = None,
) -> int:
    """Print the likeliest next tokens and their log probabilities, as JSON."""
    if prompt is None and sys.stdin.isatty():
        raise UsageError(
            "there is no prompt",
            detail="expected a prompt after the model, or text on standard input",
            hint=f'type: mistral-fetch logits {ref} "Your prompt"',
        )
    options = runtime_options(
        {
            "--top": top,
            "--system": system,
            "--chat-template": chat_template,
            "--device": device,
            "--dtype": dtype,
            "--threads": threads,
        }
    )
    options += ["--all"] * all_positions + ["--raw"] * raw + ["--ignore-memory-plan"] * ignore_memory_plan
    if prompt in {None, "-"}:
        return _measure(front, ref, quantize, "logits", options, ["-"])
    return _measure(front, ref, quantize, "logits", [*options, f"--prompt={prompt}"], [])


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
