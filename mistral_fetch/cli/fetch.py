"""``pull``, ``run`` and ``chat``: make a model complete, and start the runtime on it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistral_fetch.cli.choices import ConvertTo, QuantizeTo
from mistral_fetch.cli.options import FrontEnd, command, stop_on_signals, write_out
from mistral_fetch.cli.paths import local_directory
from mistral_fetch.cli.services import StatusListen, watched
from mistral_fetch.cli.sync_options import WaitOption, with_wait
from mistral_fetch.errors import UsageError
from mistral_fetch.ref import DirectoryRef, parse_ref
from mistral_fetch.units import format_size

if TYPE_CHECKING:
    from mistral_fetch.launch.locate import Interpreter
    from mistral_fetch.transfer.channels import PullResult

RefArgument = Annotated[
    str, typer.Argument(metavar="REF", help="name[@version], hf:org/repo, a .meta4 or .torrent, a magnet link")
]
Quantize = Annotated[
    QuantizeTo | None,
    typer.Option("--quantize", metavar="int8|int4", help="Run on quantized weights: made at the first use, then kept."),
]
_EXIT_CODES = "Exit codes: 0 ok, 2 usage, 3 not found, 4 not authorised, 5 stalled, 6 no source, 9 disk, 11 locked, 20 bad manifest, 32 integrity, 33 assurance, 130 interrupted."  # noqa: E501
RUN_EXIT_CODES = _EXIT_CODES.replace("130", "40 runtime, 130")


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(app, "run", transfer=True, epilog=RUN_EXIT_CODES)(run)
    command(app, "chat", transfer=True, epilog=RUN_EXIT_CODES)(chat)
    command(app, "pull", transfer=True, epilog=RUN_EXIT_CODES)(pull)


def pull(
    front: FrontEnd,
    refs: Annotated[list[str], typer.Argument(metavar="REF...", help="What to fetch.")],
    refresh: Annotated[bool, typer.Option("--refresh", help="Ask the source again even if complete.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan and change nothing; exit as the pull would if it is refused."),
    ] = False,
    convert: Annotated[
        ConvertTo | None,
        typer.Option(
            "--convert",
            help="Also write .pth weights in a form that cannot hold code, and print that directory instead.",
            metavar="safetensors",
        ),
    ] = None,
    status_listen: StatusListen = None,
    wait: WaitOption = False,
) -> int:
    """Fetch models, verify every byte, and print their snapshot directories. Does nothing where they are complete."""
    front = with_wait(front, wait)
    if dry_run:
        from mistral_fetch.cli.preview import print_plans

        _refuse_dry_conversion(convert)
        return print_plans(front, refs, refresh=refresh)
    if convert is not None:
        from mistral_fetch.cli.convert import require_runtime

        require_runtime(front, refs)
    results = [fetch(front, text, refresh=refresh, status_listen=status_listen) for text in refs]
    fields = [_pull_fields(result) for result in results]
    directories = [str(result.directory) for result in results]
    if convert is not None:
        from mistral_fetch.cli.convert import convert_model
        from mistral_fetch.cli.derive import derivation_fields

        conversions = [convert_model(front, result) for result in results]
        for told, conversion in zip(fields, conversions, strict=True):
            told["converted"] = derivation_fields(conversion)
        directories = [str(conversion.directory) for conversion in conversions]
    front.result(fields[0] if len(fields) == 1 else fields, "\n".join(directories))
    return 0


def _refuse_dry_conversion(convert: ConvertTo | None) -> None:
    if convert is not None:
        raise UsageError(
            "--dry-run has no plan for --convert",
            detail="expected one of the two: what a conversion takes is a second copy of the weights",
            hint="leave --convert out to see what would be fetched",
        )


def _pull_fields(result: PullResult) -> dict[str, Any]:
    return {
        "ref": result.key,
        "directory": str(result.directory),
        "content_digest": result.content_digest,
        "channel": result.channel,
        "assurance": result.assurance,
        "was_complete": result.was_complete,
        "received_bytes": result.received_bytes,
    }


def fetch(front: FrontEnd, text: str, *, refresh: bool = False, status_listen: str | None = None) -> PullResult:
    """Make one model complete, showing progress."""
    from mistral_fetch.sources.base import StopSignal
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.use import note_use
    from mistral_fetch.transfer.pull import pull as pull_model

    ref, stop = parse_ref(text), StopSignal()
    undo = stop_on_signals(stop.set)
    try:
        with front.reporter() as shown, watched(shown, status_listen, "pull") as report:
            result = pull_model(ref, front.settings, report, stop, refresh=refresh, adopt_from=front.adopt_from)
    finally:
        undo()
    note_use(Layout(front.settings.home), result.directory)
    if not result.was_complete:
        received = format_size(result.received_bytes)
        front.note(f"{result.key}: complete and verified ({result.assurance}), {received} received")
        _tell_quota(front)
    return result


def _tell_quota(front: FrontEnd) -> None:
    """Say so where the cache takes more than its quota; nothing is removed unasked."""
    quota = front.settings.cache_quota
    if not quota:
        return
    from mistral_fetch.store.inventory import take_inventory
    from mistral_fetch.store.layout import Layout

    taken = take_inventory(Layout(front.settings.home)).total_bytes
    if taken > quota:
        front.note(
            f"the cache takes {format_size(taken)} of a quota of {format_size(quota)};"
            " mistral-fetch prune shows what would go"
        )


def run(
    front: FrontEnd,
    ref: RefArgument,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The prompt; - or nothing reads standard input.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-n", metavar="N", help="Most tokens to generate.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", metavar="T", help="0 always takes the likeliest.")
    ] = None,
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
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="The same seed gives the same text.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Stop before this text; may be repeated.")
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="A system prompt for instruct models.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Give an instruct model the prompt as it is.")] = False,
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", metavar="NAME", help="v1, v3, demo or none.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, mps or xpu.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", metavar="NAME", help="auto, bfloat16 or float32.")] = None,
    context: Annotated[int | None, typer.Option("--context", metavar="N", help="Positions to make room for.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", metavar="N", help="CPU threads.")] = None,
    timings: Annotated[bool, typer.Option("--timings", help="Tell what the start took, part by part.")] = False,
    quantize: Quantize = None,
    lora: Annotated[Path | None, typer.Option("--lora", metavar="PATH", help="Add this LoRA adapter.")] = None,
    lora_scale: Annotated[
        float | None, typer.Option("--lora-scale", metavar="S", help="Its factor, instead of its own.")
    ] = None,
    lora_apart: Annotated[bool, typer.Option("--lora-apart", help="Keep its matrices apart from the weights.")] = False,
    tp: Annotated[
        int | None, typer.Option("--tp", metavar="N", help="Spread the model over N processes or GPUs.")
    ] = None,
    compile_steps: Annotated[
        bool, typer.Option("--compile", help="Compile decode steps in the background; eager until then.")
    ] = False,
    lookup: Annotated[
        str | None, typer.Option("--lookup", metavar="MODE", help="Guess ahead from the text: auto, on or off.")
    ] = None,
    kv: Annotated[
        str | None, typer.Option("--kv", metavar="KIND", help="Keys and values: exact, or int8 for half the cache.")
    ] = None,
) -> int:
    """Fetch a model if it is missing, verify it, and generate text from a prompt."""
    if prompt is None and sys.stdin.isatty():
        raise UsageError(
            "there is no prompt",
            detail="expected a prompt after the model, or text on standard input",
            hint=f'type: mistral-fetch run {ref} "Your prompt", or use mistral-fetch chat {ref}',
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
        }
    )
    options += [f"--stop={text}" for text in stop or []]
    options += ["--timings"] * timings + ["--lora-apart"] * lora_apart + ["--compile"] * compile_steps
    options += ["--raw"] * raw + ["--json"] * front.is_json + ["--quiet"] * front.wants_no_text
    if prompt in {None, "-"}:
        return _launch(front, ref, quantize, "generate", options, ["-"])
    # Not as a positional: argparse would take a prompt of two dashes for its own separator.
    return _launch(front, ref, quantize, "generate", [*options, f"--prompt={prompt}"], [])


def chat(
    front: FrontEnd,
    ref: RefArgument,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system prompt.")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", metavar="T", help="0 always takes the likeliest.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="The same seed gives the same text.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-n", metavar="N", help="Most tokens in an answer.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option("--chat-template", metavar="NAME", help="v1, v3 or demo.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, mps or xpu.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", metavar="N", help="CPU threads.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Show answers as they are, without styles for markdown.")
    ] = False,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Neither read nor keep what was typed in other chats.")
    ] = False,
    timings: Annotated[bool, typer.Option("--timings", help="Tell what the start took, part by part.")] = False,
    quantize: Quantize = None,
    lora: Annotated[Path | None, typer.Option("--lora", metavar="PATH", help="Add this LoRA adapter.")] = None,
    lora_scale: Annotated[
        float | None, typer.Option("--lora-scale", metavar="S", help="Its factor, instead of its own.")
    ] = None,
    lora_apart: Annotated[bool, typer.Option("--lora-apart", help="Keep its matrices apart from the weights.")] = False,
    tp: Annotated[
        int | None, typer.Option("--tp", metavar="N", help="Spread the model over N processes or GPUs.")
    ] = None,
    compile_steps: Annotated[
        bool, typer.Option("--compile", help="Compile decode steps in the background; eager until then.")
    ] = False,
    lookup: Annotated[
        str | None, typer.Option("--lookup", metavar="MODE", help="Guess ahead from the text: auto, on or off.")
    ] = None,
    kv: Annotated[
        str | None, typer.Option("--kv", metavar="KIND", help="Keys and values: exact, or int8 for half the cache.")
    ] = None,
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
        }
    )
    options += ["--timings"] * timings + ["--lora-apart"] * lora_apart + ["--compile"] * compile_steps
    options += ["--plain"] * plain + ["--no-history"] * no_history
    return _launch(front, ref, quantize, "chat", options + ["--quiet"] * front.wants_no_text, [])


def runtime_options(given: dict[str, Any]) -> list[str]:
    """Return those that were given, one argument each: a value that begins with a dash is still a value."""
    return [f"{name}={value}" for name, value in given.items() if value is not None]


def _launch(
    front: FrontEnd,
    text: str,
    quantize: QuantizeTo | None,
    runtime_command: str,
    options: list[str],
    positionals: list[str],
) -> int:
    from mistral_fetch.launch.locate import find_interpreter
    from mistral_fetch.launch.process import capture_runtime, explained_failure, run_runtime
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.use import in_use

    # Asked before 13 GB are fetched, not after.
    interpreter = find_interpreter(front.settings.python)
    directory, quantizing = directory_of(front, text, quantize, interpreter)
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
    front: FrontEnd, text: str, quantize: QuantizeTo | None, interpreter: Interpreter
) -> tuple[Path, list[str]]:
    """Return the directory to run a ref from, and what the runtime has still to be told.

    A directory is taken as it is; nothing vouches for what it holds, so it is quantised in memory and not kept. A model
    is fetched and complete, and so is its quantised copy where that is what to run.
    """
    ref = parse_ref(text)
    if isinstance(ref, DirectoryRef):
        return local_directory(ref.path), [] if quantize is None else [f"--quantize={quantize.value}"]
    if quantize is None:
        return fetch(front, text).directory, []
    from mistral_fetch.cli.quantizer import find_quantizer, quantize_model

    quantizer = find_quantizer(front, interpreter, quantize)
    return quantize_model(front, quantizer, fetch(front, text)).directory, []
