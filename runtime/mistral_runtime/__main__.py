"""`python -m mistral_runtime`: call one function for one command, turn errors into exit codes.

The command line itself is described in `arguments`. torch is imported after the arguments are understood, so that
`--help` and usage errors are instant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mistral_runtime.arguments import build_parser, shield_dashes
from mistral_runtime.errors import BadRequest, Interrupted, MissingDependency, MistralRuntimeError
from mistral_runtime.interrupts import Interrupts
from mistral_runtime.terminal import decode_argument, read_prompt, silence, write_err

if TYPE_CHECKING:
    from mistral_runtime.sampling import SamplingParams
    from mistral_runtime.session import ComputeOptions

_DEPENDENCIES = {"torch", "safetensors", "sentencepiece", "mistral_common", "numpy"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Unexpected exceptions pass through: bugs keep their traceback."""
    with Interrupts().installed() as interrupts:
        try:
            return _dispatch(
                build_parser().parse_args(shield_dashes(sys.argv[1:] if argv is None else argv)), interrupts
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

    return ComputeOptions(args.device, args.dtype, args.threads, args.ignore_memory_plan)


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
