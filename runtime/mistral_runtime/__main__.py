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
from mistral_runtime.process_end import end_process
from mistral_runtime.startup import StartClock
from mistral_runtime.terminal import decode_argument, read_prompt, silence, write_err

if TYPE_CHECKING:
    from mistral_runtime.lora import LoraOptions
    from mistral_runtime.sampling_params import SamplingParams
    from mistral_runtime.session import ComputeOptions

_COUNTS = (
    *("max_tokens", "context", "threads", "stride", "top", "prompt_tokens", "decode_tokens", "rounds", "tp"),
    *("max_running", "max_queue", "cache_positions", "prefill_chunk"),
)
_DEPENDENCIES = {
    "torch": "runtime",
    "safetensors": "runtime",
    "sentencepiece": "runtime",
    "mistral_common": "runtime",
    "numpy": "runtime",
    "starlette": "runtime,serve",
    "uvicorn": "runtime,serve",
    "prometheus_client": "runtime,serve",
    "llguidance": "runtime,serve",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Unexpected exceptions pass through: bugs keep their traceback."""
    # Called with arguments, it is part of a program that began earlier and for another reason.
    clock = StartClock.of_process() if argv is None else StartClock()
    clock.mark("interpreter")
    with Interrupts().installed() as interrupts:
        try:
            return _dispatch(
                build_parser().parse_args(shield_dashes(sys.argv[1:] if argv is None else argv)), interrupts, clock
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


def _dispatch(args: argparse.Namespace, interrupts: Interrupts, clock: StartClock) -> int:
    if args.command in ("convert", "digest", "quantize"):
        return _dispatch_weights(args)
    _require_positive(args)
    if args.command == "serve":
        return _serve(args)
    if args.command in ("bench", "ppl", "logits"):
        return _dispatch_measuring(args, clock)
    if args.command == "engine":
        return _dispatch_engine(args)
    prompt = _prompt(args) if args.command == "generate" else None
    _import_torch(clock)
    from mistral_runtime.chat.command import run_chat
    from mistral_runtime.chat.options import ChatOptions
    from mistral_runtime.generate import GenerateOptions, run_generate

    clock.mark("imports")
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
        "timings": args.timings,
        "clock": clock,
    }
    if prompt is None:
        chat = ChatOptions(**common, plain=args.plain, keeps_history=not args.no_history)
        return run_chat(chat, interrupts)
    return run_generate(GenerateOptions(**common, prompt=prompt, raw=args.raw, as_json=args.as_json), interrupts)


def _serve(args: argparse.Namespace) -> int:
    """Serve over HTTP. This process imports no torch; the engine is another."""
    from mistral_runtime.serve.command import ServeOptions, run_serve
    from mistral_runtime.serve.engine_start import engine_of

    options = ServeOptions.of(args)
    return run_serve(options, lambda: engine_of(args))


def _dispatch_measuring(args: argparse.Namespace, clock: StartClock) -> int:
    """Run `bench`, `ppl` or `logits`. A signal ends them at once: half a measurement is of no use to anybody."""
    prompt = _prompt(args) if args.command == "logits" else None
    _import_torch(clock)
    from mistral_runtime.bench import BenchOptions, run_bench
    from mistral_runtime.logits import LogitsOptions, run_logits
    from mistral_runtime.perplexity import PerplexityOptions, run_perplexity

    clock.mark("imports")
    common = {"directory": args.directory, "compute": _compute(args), "as_json": args.as_json, "quiet": args.quiet}
    if prompt is not None:
        system = None if args.system is None else decode_argument(args.system)
        template = {"raw": args.raw, "system": system, "chat_template": args.chat_template}
        return run_logits(
            LogitsOptions(**common, prompt=prompt, top=args.top, all_positions=args.all_positions, **template)
        )
    if args.command == "ppl":
        return run_perplexity(PerplexityOptions(**common, file=args.file, context=args.context, stride=args.stride))
    sizes = {"prompt_tokens": args.prompt_tokens, "decode_tokens": args.decode_tokens, "rounds": args.rounds}
    return run_bench(BenchOptions(**common, **sizes, plot=args.plot, timings=args.timings, clock=clock))


def _dispatch_engine(args: argparse.Namespace) -> int:
    from mistral_runtime.serve.engine_process import EngineOptions, run_engine

    return run_engine(
        EngineOptions(
            args.directory,
            args.fd,
            _compute(args),
            context=args.context,
            max_running=args.max_running,
            cache_positions=args.cache_positions,
            prefill_chunk=args.prefill_chunk,
            deterministic=args.deterministic,
            quiet=args.quiet,
        )
    )


def _import_torch(clock: StartClock) -> None:
    """Import torch before anything that uses it: one to three seconds, told apart from our own."""
    clock.mark("arguments")
    import torch  # noqa: F401

    clock.mark("torch")


def _dispatch_weights(args: argparse.Namespace) -> int:
    if args.command == "quantize" and args.describe:
        return _describe(args.to, args.group)
    from mistral_runtime.weight_commands import run_convert, run_digest, run_quantize

    if args.command == "quantize":
        if args.directory is None or args.out is None:
            raise BadRequest(
                "SNAPSHOT and OUT are missing",
                detail="expected both directories, or --describe",
                hint="python -m mistral_runtime quantize SNAPSHOT OUT --to int8",
            )
        told = {"as_json": args.as_json, "quiet": args.quiet}
        return run_quantize(args.directory, args.out, args.to, args.group, reserve_bytes=args.reserve, **told)
    if args.command == "digest":
        return run_digest(args.directories, as_json=args.as_json)
    return run_convert(args.directory, args.out, reserve_bytes=args.reserve, as_json=args.as_json)


def _describe(kind: str, group: int | None) -> int:
    """Say what quantising would make, without a model and without torch."""
    from mistral_runtime.json_result import tell
    from mistral_runtime.recipe import Recipe, check_group
    from mistral_runtime.snapshot import QUANTIZED_NAME

    def work() -> tuple[dict[str, str], str]:
        recipe = Recipe.of(kind, group)
        check_group(recipe.group)
        return {"recipe": recipe.name, "key": recipe.key, "product": QUANTIZED_NAME}, ""

    return tell(work, as_json=True)


def _prompt(args: argparse.Namespace) -> str:
    return read_prompt(args.prompt) if args.prompt_text is None else decode_argument(args.prompt_text)


def _require_positive(args: argparse.Namespace) -> None:
    for name in _COUNTS:
        value = getattr(args, name, None)
        if value is not None and not 1 <= value <= 1 << 24:
            raise BadRequest(
                f"--{name.replace('_', '-')} is out of range",
                detail=f"expected a whole number from 1 to {1 << 24}, found {value}",
                hint="correct the flag, or leave it out",
            )
    if "" in getattr(args, "stop", ()):
        raise BadRequest(
            "--stop is empty",
            detail="expected at least one character, found none",
            hint="leave --stop out to stop at the end of the answer only",
        )


def _sampling(args: argparse.Namespace) -> SamplingParams:
    from mistral_runtime.sampling_params import SamplingParams

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

    return ComputeOptions(
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
        ignore_memory_plan=args.ignore_memory_plan,
        lora=_lora(args),
        ranks=getattr(args, "tp", 1),
        compile=getattr(args, "compile", False),
        lookup=getattr(args, "lookup", "off"),
        quantize=args.quantize,
        kv=args.kv,
        graphs=not getattr(args, "no_graphs", True),
    )


def _lora(args: argparse.Namespace) -> LoraOptions | None:
    from mistral_runtime.lora import LoraOptions

    if args.lora is None:
        if args.lora_scale is not None or args.lora_apart:
            raise BadRequest(
                "there is no adapter",
                detail="expected --lora with --lora-scale and --lora-apart, found none",
                hint="name the adapter with --lora PATH",
            )
        return None
    if args.lora_scale is not None and not 0 < args.lora_scale <= 1000:
        raise BadRequest(
            "--lora-scale is out of range",
            detail=f"expected a number above 0 and up to 1000, found {args.lora_scale:g}",
            hint="correct the flag, or leave it out for the adapter's own",
        )
    return LoraOptions(args.lora, args.lora_scale, args.lora_apart)


def _missing_dependency(error: ModuleNotFoundError) -> MissingDependency:
    """Return the three lines for a library that is not installed; anything else is a bug and goes on."""
    name = (error.name or "").partition(".")[0]
    if name not in _DEPENDENCIES:
        raise error
    return MissingDependency(
        f"the library {name} is not installed for {sys.executable}",
        detail=f"expected the libraries of `{_DEPENDENCIES[name]}`, found at least one missing",
        hint=f'install them: pip install "mistral-fetch[{_DEPENDENCIES[name]}]"',
    )


if __name__ == "__main__":
    end_process(main())
