"""The `serve` command: its flags, and what has to be right before a socket is opened."""

from __future__ import annotations

import argparse
import asyncio
import re
import socket
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from mistral_runtime.errors import BadRequest, Interrupted
from mistral_runtime.serve.api_keys import load_api_keys
from mistral_runtime.serve.engine_port import EnginePort
from mistral_runtime.serve.guard import GuardRules
from mistral_runtime.serve.host_rules import HostRules
from mistral_runtime.serve.http_server import HttpServer
from mistral_runtime.serve.listening import (
    listen_tcp,
    listen_unix,
    raise_open_file_limit,
    require_key_beyond_loopback,
    resolve,
)
from mistral_runtime.serve.metrics import Metrics
from mistral_runtime.serve.served_model import ServedModel, open_model
from mistral_runtime.serve.service import Service, now
from mistral_runtime.terminal import write_err, write_out

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/+-]{0,199}")


@dataclass(frozen=True)
class ServeOptions:
    """What the command line asked for."""

    directory: Path
    host: str
    port: int
    uds: Path | None
    model_names: tuple[str, ...]
    chat_template: str
    api_key_file: Path | None
    allowed_hosts: frozenset[str]
    allowed_origins: frozenset[str]
    max_body: int
    drain_seconds: float
    quiet: bool

    @classmethod
    def of(cls, args: argparse.Namespace) -> ServeOptions:
        """Return the options of a parsed command line.

        Raises:
            BadRequest: One is out of range.
        """
        names = tuple(args.model_name) or (_directory_name(args.directory),)
        for name in names:
            if not _MODEL_NAME.fullmatch(name):
                raise _wrong("model-name", "letters, digits and ._:@/+- , at most 200", repr(name[:80]))
        if not 0 <= args.port <= 65535:
            raise _wrong("port", "a number from 0 to 65535", str(args.port))
        if not 1024 <= args.max_body <= 1 << 30:
            raise _wrong("max-body", "a number of bytes from 1024 to 1 GiB", str(args.max_body))
        if not 0 <= args.drain_timeout <= 86400:
            raise _wrong("drain-timeout", "a number of seconds from 0 to 86400", f"{args.drain_timeout:g}")
        return cls(
            args.directory,
            args.host,
            args.port,
            args.uds,
            names,
            args.chat_template,
            args.api_key_file,
            frozenset(host.lower() for host in args.allowed_host),
            frozenset(args.allow_origin),
            args.max_body,
            args.drain_timeout,
            args.quiet,
        )


def run_serve(options: ServeOptions, make_engine: Callable[[], EnginePort]) -> int:
    """Serve until a signal comes, and return the exit code: 0 once all was answered, 130 where answers were cut off.

    Raises:
        MistralRuntimeError: The snapshot, a flag or the address cannot be used, found before anything is loaded.
    """
    keys = None if options.api_key_file is None else load_api_keys(options.api_key_file)
    model = open_model(options.directory, chat_template=options.chat_template, names=options.model_names, created=now())
    listener, url = _listen(options, has_keys=keys is not None)
    raise_open_file_limit()
    rules = GuardRules(
        HostRules(options.allowed_hosts, options.allowed_origins),
        keys,
        options.max_body,
        log=None if options.quiet else write_err,
    )
    with closing(listener):
        return asyncio.run(_serve(options, _service(make_engine(), model), rules, listener, url))


def _service(engine: EnginePort, model: ServedModel) -> Service:
    return Service(engine, model, Metrics(lambda: engine.stats, model.names[0]))


async def _serve(options: ServeOptions, service: Service, rules: GuardRules, listener: socket.socket, url: str) -> int:
    report = _ignore if options.quiet else write_err
    server = HttpServer(service, rules, drain_seconds=options.drain_seconds, report=report)
    names = ", ".join(options.model_names)
    try:
        await server.serve(listener, tell_listening=lambda: write_out(f"listening on {url} model {names}\n"))
    finally:
        if options.uds is not None:
            options.uds.unlink(missing_ok=True)
    if server.failure is not None:
        write_err(server.failure.text)
        return server.failure.exit_code
    return Interrupted.exit_code if server.has_cut_off else 0


def _listen(options: ServeOptions, *, has_keys: bool) -> tuple[socket.socket, str]:
    if options.uds is not None:
        return listen_unix(options.uds), f"unix:{options.uds}"
    family, address = resolve(options.host, options.port)
    require_key_beyond_loopback(address[0], has_keys=has_keys)
    listener = listen_tcp(family, address)
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return listener, f"http://{host}:{listener.getsockname()[1]}/v1"


def _directory_name(directory: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._:@+-]", "-", directory.resolve().name).lstrip("._:@+-") or "model"


def _wrong(flag: str, expected: str, found: str) -> BadRequest:
    return BadRequest(
        f"--{flag} is out of range",
        detail=f"expected {expected}, found {found}",
        hint="correct the flag, or leave it out",
    )


def _ignore(_text: str) -> None:
    """Show nothing."""
