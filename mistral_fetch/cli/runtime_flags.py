"""The flags of commands that start the runtime, spelled once, and how they are passed on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mistral_fetch.cli.choices import QuantizeTo
from mistral_fetch.errors import UsageError

Prompt = Annotated[str | None, typer.Argument(metavar="PROMPT", help="The prompt; - or nothing reads standard input.")]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", "-n", metavar="N", help="Most tokens of an answer.")]
Temperature = Annotated[float | None, typer.Option("--temperature", metavar="T", help="0 always takes the likeliest.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="The same seed gives the same text.")]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system prompt for instruct models.")]
Raw = Annotated[bool, typer.Option("--raw", help="Give an instruct model the prompt as it is.")]
ChatTemplate = Annotated[str | None, typer.Option("--chat-template", metavar="NAME", help="v1, v3, demo or none.")]
Device = Annotated[str | None, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, mps or xpu.")]
Dtype = Annotated[str | None, typer.Option("--dtype", metavar="NAME", help="auto, bfloat16, float16 or float32.")]
Threads = Annotated[int | None, typer.Option("--threads", metavar="N", help="CPU threads.")]
IgnorePlan = Annotated[bool, typer.Option("--ignore-memory-plan", help="Load even if the memory plan does not fit.")]
Timings = Annotated[bool, typer.Option("--timings", help="Tell what the start took, part by part.")]
Quantize = Annotated[
    QuantizeTo | None,
    typer.Option("--quantize", metavar="int8|int4", help="Run on quantized weights: made at the first use, then kept."),
]
Lora = Annotated[Path | None, typer.Option("--lora", metavar="PATH", help="Add this LoRA adapter.")]
LoraScale = Annotated[float | None, typer.Option("--lora-scale", metavar="S", help="Its factor, instead of its own.")]
LoraApart = Annotated[bool, typer.Option("--lora-apart", help="Keep its matrices apart from the weights.")]
TensorParallel = Annotated[int | None, typer.Option("--tp", metavar="N", help="Spread it over N processes or GPUs.")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile decode steps in the background; eager until then.")]
Lookup = Annotated[
    str | None, typer.Option("--lookup", metavar="MODE", help="Guess ahead from the text: auto, on or off.")
]
KeysValues = Annotated[
    str | None, typer.Option("--kv", metavar="KIND", help="Keys and values: exact, or int8 for half the cache.")
]


def runtime_options(given: dict[str, Any], switches: dict[str, bool]) -> list[str]:
    """Return what was given, one argument each: a value that begins with a dash is still a value."""
    values = [f"{name}={value}" for name, value in given.items() if value is not None]
    return values + [name for name, is_on in switches.items() if is_on]


def prompt_arguments(prompt: str | None, *, or_else: str) -> tuple[list[str], list[str]]:
    """Return options and positionals that hand the prompt, or standard input, to the runtime.

    Args:
        prompt: As typed; None or "-" stands for standard input.
        or_else: What to type instead, where there is neither.

    Raises:
        UsageError: There is none, and standard input is a terminal.
    """
    if prompt is None and sys.stdin.isatty():
        raise UsageError(
            "there is no prompt",
            detail="expected a prompt after the model, or text on standard input",
            hint=f"type: {or_else}",
        )
    # Not as a positional: argparse would take a prompt of two dashes for its own separator.
    return ([], ["-"]) if prompt in {None, "-"} else ([f"--prompt={prompt}"], [])
