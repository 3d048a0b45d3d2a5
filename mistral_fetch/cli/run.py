"""``run`` and ``chat``: make a model complete, and start the runtime on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mistral_fetch.cli.choices import QuantizeTo
from mistral_fetch.cli.fetch import RUN_EXIT_CODES, RefArgument, fetch
from mistral_fetch.cli.options import FrontEnd, command, write_out
from mistral_fetch.cli.paths import local_directory
from mistral_fetch.cli.runtime_flags import (
    ChatTemplate,
    Compile,
    Device,
    Dtype,
    KeysValues,
    Lookup,
    Lora,
    LoraApart,
    LoraScale,
    MaxTokens,
    Prompt,
    Quantize,
    Raw,
    Seed,
    System,
    Temperature,
    TensorParallel,
    Threads,
    Timings,
    prompt_arguments,
    runtime_options,
)
from mistral_fetch.errors import UsageError
from mistral_fetch.ref import DirectoryRef, parse_ref

if TYPE_CHECKING:
    from mistral_fetch.launch.locate import Interpreter


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(app, "run", transfer=True, epilog=RUN_EXIT_CODES)(run)
    command(app, "chat", transfer=True, epilog=RUN_EXIT_CODES)(chat)


def run(
    front: FrontEnd,
    ref: RefArgument,
    prompt: Prompt = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", metavar="P", help="Keep the likeliest tokens up to this mass.")
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", metavar="K", help="Keep this many tokens.")] = None,
    min_p: Annotated[
        float | None, typer.Option("--min-p", metavar="P", help="Drop tokens below this share of the best.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", metavar="R", help="Above 1 makes repeats less likely.")
    ] = None,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Stop before this text; may be repeated.")
    ] = None,
    system: System = None,
    raw: Raw = False,
    chat_template: ChatTemplate = None,
    device: Device = None,
    dtype: Dtype = None,
    context: Annotated[int | None, typer.Option("--context", metavar="N", help="Positions to make room for.")] = None,
    threads: Threads = None,
    timings: Timings = False,
    quantize: Quantize = None,
    lora: Lora = None,
    lora_scale: LoraScale = None,
    lora_apart: LoraApart = False,
    tp: TensorParallel = None,
    compile_steps: Compile = False,
    lookup: Lookup = None,
    kv: KeysValues = None,
) -> int:
    """Fetch a model if it is missing, verify it, and generate text from a prompt."""
    prompt_options, positionals = prompt_arguments(
        prompt, or_else=f'mistral-fetch run {ref} "Your prompt", or use mistral-fetch chat {ref}'
    )
    options = runtime_options(
        {
            "--max-tokens": max_tokens,
            "--temperature": temperature,
            "--top-p": top_p,
            "--top-k": top_k,
            "--min-p": min_p,
            "--repetition-penalty": repetition_penalty,
            "--seed": seed,
            "--system": system,
            "--chat-template": chat_template,
            "--device": device,
            "--dtype": dtype,
            "--context": context,
            "--threads": threads,
            "--lora": lora,
            "--lora-scale": lora_scale,
            "--tp": tp,
            "--lookup": lookup,
            "--kv": kv,
        },
        {
            "--timings": timings,
            "--lora-apart": lora_apart,
            "--compile": compile_steps,
            "--raw": raw,
            "--json": front.is_json,
            "--quiet": front.wants_no_text,
        },
    )
    options += [f"--stop={text}" for text in stop or []] + prompt_options
    return _launch(front, ref, quantize, "generate", options, positionals, device=device)


def chat(
    front: FrontEnd,
    ref: RefArgument,
    system: System = None,
    temperature: Temperature = None,
    seed: Seed = None,
    max_tokens: MaxTokens = None,
    chat_template: ChatTemplate = None,
    device: Device = None,
    threads: Threads = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Show answers as they are, without styles for markdown.")
    ] = False,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Neither read nor keep what was typed in other chats.")
    ] = False,
    timings: Timings = False,
    quantize: Quantize = None,
    lora: Lora = None,
    lora_scale: LoraScale = None,
    lora_apart: LoraApart = False,
    tp: TensorParallel = None,
    compile_steps: Compile = False,
    lookup: Lookup = None,
    kv: KeysValues = None,
) -> int:
    """Fetch a model if it is missing, verify it, and talk to it."""
    if front.is_json:
        raise UsageError(
            "a chat has no single result",
            detail="expected chat without --json",
            hint=f'for one answer as JSON type: mistral-fetch run {ref} "Your prompt" --json',
        )
    options = runtime_options(
        {
            "--system": system,
            "--temperature": temperature,
            "--seed": seed,
            "--max-tokens": max_tokens,
            "--chat-template": chat_template,
            "--device": device,
            "--threads": threads,
            "--lora": lora,
            "--lora-scale": lora_scale,
            "--tp": tp,
            "--lookup": lookup,
            "--kv": kv,
        },
        {
            "--timings": timings,
            "--lora-apart": lora_apart,
            "--compile": compile_steps,
            "--plain": plain,
            "--no-history": no_history,
            "--quiet": front.wants_no_text,
        },
    )
    return _launch(front, ref, quantize, "chat", options, [], device=device)


def _launch(
    front: FrontEnd,
    text: str,
    quantize: QuantizeTo | None,
    runtime_command: str,
    options: list[str],
    positionals: list[str],
    *,
    device: str | None,
) -> int:
    from mistral_fetch.launch.locate import find_interpreter
    from mistral_fetch.launch.process import capture_runtime, explained_failure, run_runtime
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.use import in_use

    # Asked before 13 GB are fetched, not after.
    interpreter = find_interpreter(front.settings.python)
    directory, quantizing = directory_of(front, text, quantize, interpreter, device=device)
    options = quantizing + options
    with in_use(Layout(front.settings.home), directory, f"{runtime_command} {text}"):
        if not front.is_json:
            return run_runtime(interpreter, runtime_command, options, [str(directory), *positionals])
        # A JSON result or a JSON error, never neither: so its output is kept until it is known which.
        code, output = capture_runtime(interpreter, runtime_command, options, [str(directory), *positionals])
    if not output.strip():
        raise explained_failure(code)
    write_out(output.decode().rstrip("\n"))
    return code


def directory_of(
    front: FrontEnd, text: str, quantize: QuantizeTo | None, interpreter: Interpreter, *, device: str | None = None
) -> tuple[Path, list[str]]:
    """Return the directory to run a ref from, and what the runtime has still to be told.

    A directory is taken as it is; nothing vouches for what it holds, so it is quantised in memory and not kept. A model
    is fetched and complete, and so is its quantised copy where that is what to run. That copy is for processors: on a
    GPU, the runtime quantises the weights as published.
    """
    ref = parse_ref(text)
    if isinstance(ref, DirectoryRef):
        return local_directory(ref.path), [] if quantize is None else [f"--quantize={quantize.value}"]
    if quantize is None:
        return fetch(front, text).directory, []
    if device == "cuda":
        return fetch(front, text).directory, [f"--quantize={quantize.value}"]
    from mistral_fetch.cli.quantizer import find_quantizer, quantize_model

    quantizer = find_quantizer(front, interpreter, quantize)
    return quantize_model(front, quantizer, fetch(front, text)).directory, []
