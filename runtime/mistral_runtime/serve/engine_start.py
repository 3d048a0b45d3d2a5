"""The engine that a command line asks for: what `serve` was told about the model and the machine is passed on to it."""

from __future__ import annotations

import argparse

from mistral_runtime.serve.engine_client import EngineClient
from mistral_runtime.serve.engine_port import EnginePort

_VALUES = (
    *("context", "max_running", "cache_positions", "prefill_chunk", "lookup"),
    *("device", "dtype", "quantize", "kv", "threads", "lora", "lora_scale"),
)
_SWITCHES = ("deterministic", "ignore_memory_plan", "lora_apart", "no_graphs", "quiet")


def engine_of(args: argparse.Namespace) -> EnginePort:
    """Return the engine, not yet started."""
    return EngineClient(engine_arguments(args), max_queue=args.max_queue)


def engine_arguments(args: argparse.Namespace) -> list[str]:
    """Return the `engine` command's own arguments, without the socket."""
    given = [(name, getattr(args, name)) for name in _VALUES]
    values = [f"{_flag(name)}={value}" for name, value in given if value is not None]
    return [*values, *(_flag(name) for name in _SWITCHES if getattr(args, name)), "--", str(args.directory)]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
