"""The flags of `serve` that concern requests and their clients; those of the engine are in `arguments`."""

from __future__ import annotations

import argparse
from pathlib import Path

from mistral_runtime.serve.defaults import DRAIN_SECONDS, MAX_BODY, MAX_QUEUE, PORT


def add_serve_flags(command: argparse.ArgumentParser) -> None:
    """Add them to a command."""
    group = command.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1); others need a key")
    group.add_argument("--port", type=int, default=PORT, metavar="N", help=f"port ({PORT}); 0 takes a free one")
    group.add_argument("--uds", type=Path, metavar="PATH", help="listen at a Unix socket instead")
    group.add_argument(
        "--model-name", action="append", default=[], metavar="NAME", help="what clients call it; repeatable"
    )
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys that requests must show, one a line")
    group.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="name clients may use for it; repeatable"
    )
    group.add_argument(
        "--allow-origin", action="append", default=[], metavar="ORIGIN", help="let these pages use it; repeatable"
    )
    group.add_argument(
        "--max-body", type=int, default=MAX_BODY, metavar="BYTES", help=f"largest request ({MAX_BODY >> 20} MiB)"
    )
    group.add_argument(
        "--drain-timeout",
        type=float,
        default=DRAIN_SECONDS,
        metavar="SECONDS",
        help=f"time for answers under way when it ends ({DRAIN_SECONDS:g})",
    )
    group.add_argument(
        "--max-queue", type=int, default=MAX_QUEUE, metavar="N", help=f"requests that may wait ({MAX_QUEUE})"
    )
