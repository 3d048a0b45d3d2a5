"""The engine that a command line asks for."""

from __future__ import annotations

import argparse

from mistral_runtime.errors import DeviceUnavailable
from mistral_runtime.serve.engine_port import EnginePort


def engine_of(args: argparse.Namespace) -> EnginePort:
    """Return the engine, not yet started."""
    raise DeviceUnavailable(
        "this build has no engine process",
        detail=f"expected one that loads {args.directory}, found none",
        hint="use `generate` or `chat`",
    )
