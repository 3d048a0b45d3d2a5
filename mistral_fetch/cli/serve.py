"""``serve``: make a model complete, and answer OpenAI's API with it."""

from __future__ import annotations

import ipaddress
import re
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistral_fetch.cli.fetch import RUN_EXIT_CODES, RefArgument, fetch
from mistral_fetch.cli.options import FrontEnd, command
from mistral_fetch.cli.run import directory_of
from mistral_fetch.cli.runtime_flags import (
    ChatTemplate,
    Device,
    Dtype,
    KeysValues,
    Lookup,
    Lora,
    LoraApart,
    LoraScale,
    Quantize,
    Threads,
    runtime_options,
)
from mistral_fetch.errors import UsageError
from mistral_fetch.ref import CatalogRef, DirectoryRef, HubRef, ManifestRef, Ref, TorrentRef, parse_ref

if TYPE_CHECKING:
    from mistral_fetch.launch.vllm import VllmOptions

_DEFAULT_PORT = 8000
_NAME_ENDINGS = re.compile(r"\.(meta4|torrent)$")


class ServeEngine(str, Enum):
    """What computes the answers."""

    BUILT_IN = "built-in"
    VLLM = "vllm"


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(app, "serve", transfer=True, epilog=RUN_EXIT_CODES)(serve)


def serve(
    front: FrontEnd,
    ref: RefArgument,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Where to listen; all but loopback needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", help="The port; 0 takes a free one.")] = _DEFAULT_PORT,
    uds: Annotated[Path | None, typer.Option("--uds", metavar="PATH", help="Listen at a Unix socket instead.")] = None,
    model_name: Annotated[
        list[str] | None,
        typer.Option("--model-name", metavar="NAME", help="What clients call it; may be repeated (default: REF)."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", metavar="FILE", help="Keys that requests must show, one a line."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option("--allowed-host", metavar="NAME", help="A name clients may use for this server; repeatable."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option("--allow-origin", metavar="ORIGIN", help="Let pages of this origin use it; repeatable."),
    ] = None,
    max_body: Annotated[
        int | None, typer.Option("--max-body", metavar="BYTES", help="The largest request (default: 16 MiB).")
    ] = None,
    drain_timeout: Annotated[
        float | None,
        typer.Option("--drain-timeout", metavar="SECONDS", help="Time for answers under way at the end (default: 30)."),
    ] = None,
    max_running: Annotated[
        int | None, typer.Option("--max-running", metavar="N", help="Answers computed together.")
    ] = None,
    max_queue: Annotated[int | None, typer.Option("--max-queue", metavar="N", help="Requests that may wait.")] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same request gives the same answer, alone or in a batch.")
    ] = False,
    context: Annotated[
        int | None, typer.Option("--context", metavar="N", help="Most tokens of prompt and answer together.")
    ] = None,
    chat_template: ChatTemplate = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    quantize: Quantize = None,
    kv: KeysValues = None,
    lookup: Lookup = None,
    lora: Lora = None,
    lora_scale: LoraScale = None,
    lora_apart: LoraApart = False,
    engine: Annotated[
        ServeEngine, typer.Option("--engine", metavar="built-in|vllm", help="What computes; vllm has to be installed.")
    ] = ServeEngine.BUILT_IN,
    tp: Annotated[
        int | None, typer.Option("--tp", metavar="N", help="With vllm: spread the model over N GPUs.")
    ] = None,
    vllm_args: Annotated[
        list[str] | None,
        typer.Option("--vllm-arg", metavar="TEXT", help="With vllm: one more argument for it; may be repeated."),
    ] = None,
) -> int:
    """Fetch a model if it is missing, verify it, and serve OpenAI's API with it."""
    _refuse_json(front)
    names = tuple(model_name or ()) or _default_names(parse_ref(ref))
    built_in = {
        "--uds": uds,
        "--max-body": max_body,
        "--drain-timeout": drain_timeout,
        "--max-running": max_running,
        "--max-queue": max_queue,
        "--chat-template": chat_template,
        "--device": device,
        "--threads": threads,
        "--kv": kv,
        "--lookup": lookup,
        "--lora": lora,
        "--lora-scale": lora_scale,
    }
    repeated = {"--allowed-host": allowed_host or [], "--allow-origin": allow_origin or []}
    switches = {"--deterministic": deterministic, "--lora-apart": lora_apart}
    if engine is ServeEngine.VLLM:
        _refuse_together("vllm", {**built_in, **repeated, **switches, "--quantize": quantize})
        from mistral_fetch.launch.vllm import VllmOptions

        return _serve_vllm(
            front, ref, VllmOptions(host, port, names, api_key_file, context, dtype, tp, tuple(vllm_args or ()))
        )
    _refuse_together("built-in", {"--tp": tp, "--vllm-arg": vllm_args})
    options = runtime_options(
        {"--host": host, "--port": port, "--api-key-file": api_key_file, "--context": context, "--dtype": dtype}
        | built_in,
        {**switches, "--quiet": front.wants_no_text},
    )
    options += [f"--model-name={name}" for name in names]
    options += [f"{flag}={value}" for flag, values in repeated.items() for value in values]
    return _serve_built_in(front, ref, quantize, options, device=device)


def _serve_built_in(front: FrontEnd, ref: str, quantize: Any, options: list[str], *, device: str | None) -> int:
    from mistral_fetch.launch.locate import find_interpreter
    from mistral_fetch.launch.process import run_runtime
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.use import in_use

    # Asked before 13 GB are fetched, not after.
    interpreter = find_interpreter(front.settings.python)
    directory, quantizing = directory_of(front, ref, quantize, interpreter, device=device)
    with in_use(Layout(front.settings.home), directory, f"serve {ref}"):
        return run_runtime(interpreter, "serve", quantizing + options, [str(directory)])


def _serve_vllm(front: FrontEnd, ref: str, options: VllmOptions) -> int:
    from mistral_fetch.cli.paths import local_directory
    from mistral_fetch.launch.vllm import exec_vllm, find_vllm, read_key, vllm_arguments

    program = find_vllm()
    key = None if options.api_key_file is None else read_key(options.api_key_file)
    _require_key_beyond_loopback(options)
    parsed = parse_ref(ref)
    directory = local_directory(parsed.path) if isinstance(parsed, DirectoryRef) else fetch(front, ref).directory
    exec_vllm(program, vllm_arguments(directory, options), key)


def _require_key_beyond_loopback(options: VllmOptions) -> None:
    if options.api_key_file is None and not _is_loopback(options.host):
        raise UsageError(
            f"everybody who reaches {options.host} could use this server",
            detail="expected --api-key-file for any address but a loopback one, got none",
            hint="write a key to a file that only you can read, and name it with --api-key-file",
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _refuse_together(engine: str, given: dict[str, Any]) -> None:
    wrong = [flag for flag, value in given.items() if value not in (None, False, [])]
    if wrong:
        raise UsageError(
            f"the engine {engine} takes no {wrong[0]}",
            detail=f"expected flags of that engine only, got {', '.join(wrong)}",
            hint="leave them out, or choose the other --engine",
        )


def _refuse_json(front: FrontEnd) -> None:
    if front.is_json:
        raise UsageError(
            "a server has no single result",
            detail="expected serve without --json",
            hint="ask the server itself: its answers are JSON",
        )


def _default_names(ref: Ref) -> tuple[str, ...]:
    """Return what clients may call a model: as it was named here. A directory is called as the runtime likes."""
    if isinstance(ref, CatalogRef):
        return (ref.key,) if ref.version is None else (ref.key, ref.name)
    if isinstance(ref, HubRef):
        return (ref.repo,)
    if isinstance(ref, (ManifestRef, TorrentRef)):
        stem = _NAME_ENDINGS.sub("", ref.key.partition("?")[0].rpartition("/")[2])
        return (re.sub(r"[^A-Za-z0-9._-]", "-", stem).lstrip("._-")[:200] or "model",)
    return ()
