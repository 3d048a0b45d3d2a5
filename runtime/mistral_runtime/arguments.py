"""The command line as argparse sees it: commands, flags, their defaults and their help.

Owns words and types only. What a command does with them is `__main__`'s to decide, and nothing here is slow to import.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mistral_runtime.errors import BadRequest
from mistral_runtime.serve.defaults import MAX_RUNNING
from mistral_runtime.serve.flags import add_serve_flags

EXIT_CODES = "exit codes: 0 ok, 1 bug, 2 usage, 40 the model or this machine failed, 130 interrupted"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadRequest(
            f"{self.prog}: {message}",
            detail="expected the arguments listed by --help",
            hint=f"type `{self.prog} --help`",
        )


def build_parser() -> argparse.ArgumentParser:
    """Return the whole command line."""
    parser = _Parser(
        prog="python -m mistral_runtime",
        description="Run a Mistral model from a snapshot directory.",
        epilog=EXIT_CODES,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="generate|chat|serve|bench|ppl|logits|convert|quantize|digest"
    )
    generate = commands.add_parser(
        "generate", help="answer or continue one prompt", description=_GENERATE_TEXT, epilog=EXIT_CODES
    )
    generate.add_argument("directory", type=_path, metavar="SNAPSHOT", help="directory with weights and tokenizer")
    _add_prompt_arguments(generate)
    generate.add_argument("--json", action="store_true", dest="as_json", help="print one JSON result, no stream")
    chat = commands.add_parser("chat", help="converse", description=_CHAT_TEXT, epilog=EXIT_CODES)
    chat.add_argument("directory", type=_path, metavar="SNAPSHOT", help="directory with weights and tokenizer")
    chat.add_argument("--plain", action="store_true", help="show answers as they are, without styles for markdown")
    chat.add_argument("--no-history", action="store_true", help="neither read nor keep what was typed in other chats")
    for command in (generate, chat):
        _add_answer_arguments(command)
        _add_sampling_arguments(command)
        _add_machine_arguments(command)
        _add_step_arguments(command)
        _add_adapter_arguments(command)
        _add_timings(command)
    _add_serve(commands)
    _add_measuring_commands(commands)
    _add_weight_commands(commands)
    _add_engine(commands)
    return parser


def _add_engine(commands: argparse._SubParsersAction[_Parser]) -> None:
    """Add the command that a serving process starts for itself; no help mentions it."""
    engine = commands.add_parser("engine", description="Serve one model over a socket.", epilog=EXIT_CODES)
    engine.add_argument("directory", type=_path, metavar="SNAPSHOT", help="directory with weights and tokenizer")
    engine.add_argument("--fd", type=int, required=True, metavar="N", help="descriptor of the connected socket")
    _add_engine_arguments(engine)
    _add_quiet(engine)


def _add_engine_arguments(command: argparse.ArgumentParser) -> None:
    """Add the flags of serving that are the engine's."""
    group = command.add_argument_group("engine")
    group.add_argument("--context", type=int, metavar="N", help="most tokens of prompt and answer together")
    group.add_argument(
        "--max-running", type=int, default=MAX_RUNNING, metavar="N", help=f"most answers at once ({MAX_RUNNING})"
    )
    group.add_argument(
        "--cache-positions", type=int, metavar="N", help="positions of all their caches (default: what memory allows)"
    )
    group.add_argument(
        "--prefill-chunk", type=int, default=64, metavar="N", help="prompt tokens in a step while others stream (64)"
    )
    group.add_argument("--deterministic", action="store_true", help="same seed, same tokens, alone or in company")
    group.add_argument(
        "--lookup", choices=("auto", "on", "off"), default="auto", help="guess ahead from the text; same answer, sooner"
    )
    _add_graphs(group)
    _add_machine_arguments(command)
    _add_adapter_arguments(command)


def _add_serve(commands: argparse._SubParsersAction[_Parser]) -> None:
    serve = commands.add_parser(
        "serve", help="answer OpenAI's API over HTTP", description=_SERVE_TEXT, epilog=EXIT_CODES
    )
    serve.add_argument("directory", type=_path, metavar="SNAPSHOT", help="directory with weights and tokenizer")
    add_serve_flags(serve)
    _add_chat_template(serve)
    _add_quiet(serve)
    _add_engine_arguments(serve)


def _add_measuring_commands(commands: argparse._SubParsersAction[_Parser]) -> None:
    bench = commands.add_parser("bench", help="measure speed", description=_BENCH_TEXT, epilog=EXIT_CODES)
    ppl = commands.add_parser("ppl", help="measure perplexity", description=_PPL_TEXT, epilog=EXIT_CODES)
    logits = commands.add_parser(
        "logits", help="print what the model expects next", description=_LOGITS_TEXT, epilog=EXIT_CODES
    )
    for command in (bench, ppl, logits):
        command.add_argument("directory", type=_path, metavar="SNAPSHOT", help="directory with weights and tokenizer")
    bench.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="length of the prompt (512)")
    bench.add_argument("--decode-tokens", type=int, default=32, metavar="N", help="steps after it (32)")
    bench.add_argument("--rounds", type=int, default=3, metavar="N", help="how often, after a first pass (3)")
    bench.add_argument("--plot", type=_path, metavar="FILE", help="draw the bandwidth as SVG; replaces the file")
    _add_timings(bench)
    ppl.add_argument("file", type=_path, metavar="FILE", help='UTF-8 text; "-" reads stdin')
    ppl.add_argument("--context", type=int, metavar="N", help="tokens a window holds (2048, or the model's limit)")
    ppl.add_argument("--stride", type=int, metavar="N", help="tokens from window to window (half of the context)")
    _add_prompt_arguments(logits)
    logits.add_argument("--top", type=int, default=10, metavar="K", help="how many of the likeliest tokens (10)")
    logits.add_argument("--all", action="store_true", dest="all_positions", help="tell it for every position")
    _add_system(logits)
    _add_chat_template(logits)
    for command in (bench, ppl, logits):
        command.add_argument("--json", action="store_true", dest="as_json", help="print one JSON object, errors too")
        _add_quiet(command)
        _add_machine_arguments(command)
        _add_adapter_arguments(command)


def _add_weight_commands(commands: argparse._SubParsersAction[_Parser]) -> None:
    convert = commands.add_parser(
        "convert", help="write weights without their pickle", description=_CONVERT_TEXT, epilog=EXIT_CODES
    )
    convert.add_argument("directory", type=_path, metavar="SNAPSHOT", help="directory with consolidated.00.pth")
    convert.add_argument("out", type=_path, metavar="OUT", help="directory to write to")
    convert.add_argument("--reserve", type=int, default=0, metavar="BYTES", help="leave so much of the disk free")
    quantize = commands.add_parser(
        "quantize", help="write matrices of 8 or 4 bits", description=_QUANTIZE_TEXT, epilog=EXIT_CODES
    )
    quantize.add_argument("directory", type=_path, nargs="?", metavar="SNAPSHOT", help="directory with weights")
    quantize.add_argument("out", type=_path, nargs="?", metavar="OUT", help="directory to write to")
    quantize.add_argument("--to", choices=("int8", "int4"), required=True, help="how many bits")
    quantize.add_argument("--group", type=int, metavar="N", help="inputs that share a scale, 64 or 128")
    quantize.add_argument("--reserve", type=int, default=0, metavar="BYTES", help="leave so much of the disk free")
    quantize.add_argument("--describe", action="store_true", help="only say what the result would be called")
    _add_quiet(quantize)
    digest = commands.add_parser(
        "digest", help="hash every tensor, whatever the layout", description=_DIGEST_TEXT, epilog=EXIT_CODES
    )
    digest.add_argument("directories", type=_path, nargs="+", metavar="SNAPSHOT", help="directory with weights")
    for command in (convert, quantize, digest):
        command.add_argument("--json", action="store_true", dest="as_json", help="print one JSON object, errors too")


_GENERATE_TEXT = "Write the answer to stdout as it is generated; everything else goes to stderr."
_SERVE_TEXT = "Serve one model until a signal comes. See docs/serving.md."
_CONVERT_TEXT = "Write OUT/consolidated.safetensors with the tensors of SNAPSHOT/consolidated.00.pth."
_QUANTIZE_TEXT = "Write OUT/quantized.safetensors with the matrices of SNAPSHOT in 8 or 4 bits."
_DIGEST_TEXT = "Print the sha256 of every tensor by Mistral's name, with its type and shape."
_BENCH_TEXT = "Measure prefill and decoding beside a plain read of memory; the last line of stdout is one JSON object."
_PPL_TEXT = "Measure how well the model predicts a text, with the strided method, every token scored once."
_LOGITS_TEXT = "Print the likeliest next tokens with their log probabilities, as one JSON object."
_CHAT_TEXT = "Read questions from stdin, write answers to stdout. /help tells the commands."

_LITERAL_DASHES = "\0--"  # no argument can hold a NUL, so this cannot be mistaken for one

_DASHES_AS_VALUE = re.compile("--[a-z-]+=--")


def shield_dashes(argv: Sequence[str]) -> list[str]:
    """Mark every `--` that is a text and not the end of the options: argparse drops those too."""
    end = argv.index("--") if "--" in argv else len(argv)
    options = [
        f"{argument[:-2]}{_LITERAL_DASHES}" if _DASHES_AS_VALUE.fullmatch(argument) else argument
        for argument in argv[:end]
    ]
    texts = [_LITERAL_DASHES if argument == "--" else argument for argument in argv[end + 1 :]]
    return [*options, *argv[end : end + 1], *texts]


def _text(argument: str) -> str:
    return argument.removeprefix("\0")


def _path(argument: str) -> Path:
    return Path(_text(argument))


def _add_prompt_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "prompt", nargs="?", type=_text, metavar="PROMPT", help='the prompt; "-" or nothing reads stdin'
    )
    command.add_argument(
        "--prompt", type=_text, dest="prompt_text", metavar="TEXT", help="the prompt, whatever it looks like; wins"
    )
    command.add_argument("--raw", action="store_true", help="continue the text as it is, even with an instruct model")


def _add_system(group: argparse._ActionsContainer) -> None:
    group.add_argument("--system", type=_text, metavar="TEXT", help="system prompt, for instruct models")


def _add_chat_template(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--chat-template",
        choices=("auto", "v1", "v3", "demo", "none"),
        default="auto",
        help="how turns are written; auto goes by the directory (default), none is a base model",
    )


def _add_quiet(group: argparse._ActionsContainer) -> None:
    group.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")


def _add_timings(command: argparse.ArgumentParser) -> None:
    command.add_argument("--timings", action="store_true", help="tell on stderr what the start took, part by part")


def _add_answer_arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("answer")
    group.add_argument("--max-tokens", type=int, metavar="N", help="longest answer (default: 256, or the room left)")
    group.add_argument(
        "--stop", type=_text, action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    _add_system(group)
    _add_chat_template(group)
    group.add_argument("--context", type=int, metavar="N", help="most tokens of prompt and answer together")
    _add_quiet(group)


def _add_sampling_arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy; up to 10")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens; 0 (default) all")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest up to this sum")
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="drop below this fraction of the likeliest"
    )
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 avoids repetition")
    group.add_argument("--seed", type=int, metavar="N", help="make sampling repeatable")


def _add_machine_arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("machine")
    group.add_argument("--device", choices=("auto", "cuda", "mps", "xpu", "cpu"), default="auto")
    group.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    group.add_argument(
        "--quantize", choices=("int8", "int4", "fp8"), help="matrices of 8 or 4 bits; not exact; fp8 on CUDA alone"
    )
    group.add_argument(
        "--kv",
        choices=("exact", "int8"),
        default="exact",
        help="keys and values as computed, or 8 bits: half the cache",
    )
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: as many as may run at once)")
    group.add_argument("--ignore-memory-plan", action="store_true", help="load even if the plan does not fit")


def _add_graphs(command: argparse._ActionsContainer) -> None:
    command.add_argument("--no-graphs", action="store_true", help="on CUDA: decode without CUDA graphs")


def _add_adapter_arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("adapter")
    group.add_argument("--lora", type=_path, metavar="PATH", help="add this LoRA adapter, of mistral-finetune or PEFT")
    group.add_argument("--lora-scale", type=float, metavar="S", help="its factor (default: as it says, else 2)")
    group.add_argument("--lora-apart", action="store_true", help="compute it beside the weights and do not merge it")


def _add_step_arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("steps")
    group.add_argument(
        "--lookup", choices=("auto", "on", "off"), default="auto", help="guess ahead from the text; same answer, sooner"
    )
    group.add_argument("--tp", type=int, default=1, metavar="N", help="spread the model over N processes or GPUs")
    _add_graphs(group)
    group.add_argument("--compile", action="store_true", help="compile decode steps in the background, eager till then")
