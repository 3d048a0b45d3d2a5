"""The engine that a command line asks for."""

from __future__ import annotations

import argparse

from mistral_runtime.serve.engine_client import EngineClient

_VALUES = (
    "context",
    "max_running",
    "cache_positions",
    "prefill_chunk",
    "lookup",
    "device",
    "dtype",
    "quantize",
    "threads",
    "lora",
    "lora_scale",
)
_SWITCHES = ("deterministic", "ignore_memory_plan", "lora_apart", "quiet")


def engine_of(args: argparse.Namespace) -> EngineClient:
    """Return the engine, not yet started."""
    return EngineClient(engine_arguments(args), max_queue=args.max_queue)


def engine_arguments(args: argparse.Namespace) -> list[str]:
    """Return what the `engine` command is started with: the flags of `serve` that are its own, then the snapshot."""
    values = [(name, getattr(args, name)) for name in _VALUES]
    given = [f"{_flag(name)}={value}" for name, value in values if value is not None]
    return [*given, *(_flag(name) for name in _SWITCHES if getattr(args, name)), "--", str(args.directory)]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
