"""`python -m mistral_runtime`: parse the command line, call one function, turn errors into exit codes.

Parsing only. torch is imported after the arguments are understood, so that `--help` and usage errors are instant.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mistral_runtime.errors import BadRequest, Interrupted, MissingDependency, MistralRuntimeError
from mistral_runtime.interrupts import Interrupts
from mistral_runtime.terminal import decode_argument, read_prompt, silence, write_err

if TYPE_CHECKING:
    from mistral_runtime.sampling import SamplingParams
    from mistral_runtime.session import ComputeOptions

EXIT_CODES = "exit codes: 0 ok, 1 bug, 2 usage, 40 the model or this machine failed, 130 interrupted"
_DEPENDENCIES = {"torch", "safetensors", "sentencepiece", "mistral_common", "numpy"}


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
    commands = parser.add_subparsers(dest="command", required=True, metavar="generate|chat|convert|digest")
    generate = commands.add_parser(
        "generate", help="answer or continue one prompt", description=_GENERATE_TEXT, epilog=EXIT_CODES
    )
    generate.add_argument("directory", type=_path, metavar="SNAPSHOT", help="directory with weights and tokenizer")
    generate.add_argument(
        "prompt", nargs="?", type=_text, metavar="PROMPT", help='the prompt; "-" or nothing reads stdin'
    )
    generate.add_argument(
        "--prompt", type=_text, dest="prompt_text", metavar="TEXT", help="the prompt, whatever it looks like; wins"
    )
    generate.add_argument("--raw", action="store_true", help="continue the text as it is, even with an instruct model")
    generate.add_argument("--json", action="store_true", dest="as_json", help="print one JSON result, no stream")
    chat = commands.add_parser("chat", help="converse, one line at a time", description=_CHAT_TEXT, epilog=EXIT_CODES)
    chat.add_argument("directory", type=_path, metavar="SNAPSHOT", help="directory with weights and tokenizer")
    for command in (generate, chat):
        _add_answer_arguments(command)
        _add_sampling_arguments(command)
        _add_machine_arguments(command)
    _add_weight_commands(commands)
    return parser


def _add_weight_commands(commands: argparse._SubParsersAction[_Parser]) -> None:
    convert = commands.add_parser(
        "convert", help="write weights without their pickle", description=_CONVERT_TEXT, epilog=EXIT_CODES
    )
    convert.add_argument("directory", type=_path, metavar="SNAPSHOT", help="directory with consolidated.00.pth")
    convert.add_argument("out", type=_path, metavar="OUT", help="directory to write to")
    convert.add_argument("--reserve", type=int, default=0, metavar="BYTES", help="leave so much of the disk free")
    digest = commands.add_parser(
        "digest", help="hash every tensor, whatever the layout", description=_DIGEST_TEXT, epilog=EXIT_CODES
    )
    digest.add_argument("directories", type=_path, nargs="+", metavar="SNAPSHOT", help="directory with weights")
    for command in (convert, digest):
        command.add_argument("--json", action="store_true", dest="as_json", help="print one JSON object, errors too")


_GENERATE_TEXT = "Write the answer to stdout as it is generated; everything else goes to stderr."
_CONVERT_TEXT = "Write OUT/consolidated.safetensors with the tensors of SNAPSHOT/consolidated.00.pth."
_DIGEST_TEXT = "Print the sha256 of every tensor by Mistral's name, with its type and shape."
_CHAT_TEXT = "Read questions from stdin, write answers to stdout. /reset starts over, /quit leaves."


_LITERAL_DASHES = "\0--"  # no argument can hold a NUL, so this cannot be mistaken for one

_DASHES_AS_VALUE = re.compile("--[a-z-]+=--")


def _shield_dashes(argv: Sequence[str]) -> list[str]:
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


def _add_answer_arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("answer")
    group.add_argument("--max-tokens", type=int, metavar="N", help="longest answer (default: 256, or the room left)")
    group.add_argument(
        "--stop", type=_text, action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    group.add_argument("--system", type=_text, metavar="TEXT", help="system prompt, for instruct models")
    group.add_argument(
        "--chat-template",
        choices=("auto", "v1", "v3", "demo", "none"),
        default="auto",
        help="how turns are written; auto goes by the directory (default), none is a base model",
    )
    group.add_argument("--context", type=int, metavar="N", help="most tokens of prompt and answer together")
    group.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")


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
        "--lookup", choices=("auto", "on", "off"), default="auto", help="guess ahead from the text; same answer, sooner"
    )
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: as many as may run at once)")
    group.add_argument("--ignore-memory-plan", action="store_true", help="load even if the plan does not fit")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Unexpected exceptions pass through: bugs keep their traceback."""
    with Interrupts().installed() as interrupts:
        try:
            return _dispatch(
                build_parser().parse_args(_shield_dashes(sys.argv[1:] if argv is None else argv)), interrupts
            )
        except MistralRuntimeError as error:
            write_err(f"error: {error.what}\n  {error.detail}\n  {error.hint}")
            return error.exit_code
        except ModuleNotFoundError as error:
            missing = _missing_dependency(error)
            write_err(str(missing))
            return missing.exit_code
        except BrokenPipeError:
            # The reader has seen enough (`| head -1`): nothing failed, and there is nobody to tell.
            silence(sys.stdout.fileno())
            return 0
        except KeyboardInterrupt:
            write_err("interrupted")
            return Interrupted.exit_code


def _dispatch(args: argparse.Namespace, interrupts: Interrupts) -> int:
    if args.command in ("convert", "digest"):
        return _dispatch_weights(args)
    _require_positive(args)
    prompt = _prompt(args) if args.command == "generate" else None
    # From here on torch is needed; its import takes about a second.
    from mistral_runtime.chat import ChatOptions, run_chat
    from mistral_runtime.generate import GenerateOptions, run_generate

    common = {
        "directory": args.directory,
        "sampling": _sampling(args),
        "compute": _compute(args),
        "max_tokens": args.max_tokens,
        "context": args.context,
        "chat_template": args.chat_template,
        "system": None if args.system is None else decode_argument(args.system),
        "stops": tuple(map(decode_argument, args.stop)),
        "quiet": args.quiet,
    }
    if prompt is None:
        return run_chat(ChatOptions(**common), interrupts)
    return run_generate(GenerateOptions(**common, prompt=prompt, raw=args.raw, as_json=args.as_json), interrupts)


def _dispatch_weights(args: argparse.Namespace) -> int:
    from mistral_runtime.weight_commands import run_convert, run_digest

    if args.command == "digest":
        return run_digest(args.directories, as_json=args.as_json)
    return run_convert(args.directory, args.out, reserve_bytes=args.reserve, as_json=args.as_json)


def _prompt(args: argparse.Namespace) -> str:
    return read_prompt(args.prompt) if args.prompt_text is None else decode_argument(args.prompt_text)


def _require_positive(args: argparse.Namespace) -> None:
    for name in ("max_tokens", "context", "threads"):
        value = getattr(args, name)
        if value is not None and not 1 <= value <= 1 << 24:
            raise BadRequest(
                f"--{name.replace('_', '-')} is out of range",
                detail=f"expected a whole number from 1 to {1 << 24}, found {value}",
                hint="correct the flag, or leave it out",
            )
    if "" in args.stop:
        raise BadRequest(
            "--stop is empty",
            detail="expected at least one character, found none",
            hint="leave --stop out to stop at the end of the answer only",
        )


def _sampling(args: argparse.Namespace) -> SamplingParams:
    from mistral_runtime.sampling import SamplingParams

    return SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )


def _compute(args: argparse.Namespace) -> ComputeOptions:
    from mistral_runtime.session import ComputeOptions

    return ComputeOptions(args.device, args.dtype, args.threads, args.ignore_memory_plan, args.lookup)


def _missing_dependency(error: ModuleNotFoundError) -> MissingDependency:
    """Return the three lines for a library that is not installed; anything else is a bug and goes on."""
    name = (error.name or "").partition(".")[0]
    if name not in _DEPENDENCIES:
        raise error
    return MissingDependency(
        f"the library {name} is not installed for {sys.executable}",
        detail="expected the libraries of the extra `runtime`, found at least one missing",
        hint='install them: pip install "mistral-fetch[runtime]"',
    )


if __name__ == "__main__":
    sys.exit(main())
