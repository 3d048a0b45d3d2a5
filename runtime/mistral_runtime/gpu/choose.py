"""Whether decode steps are static ones, and the engine that computes them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mistral_runtime.gpu.device_engine import DeviceEngine
from mistral_runtime.gpu.fallback import FallbackRunner
from mistral_runtime.gpu.graphs import runner_for
from mistral_runtime.gpu.static_cache import SlotPool
from mistral_runtime.gpu.static_step import StaticStep
from mistral_runtime.kv_cache import cache_positions
from mistral_runtime.lookup import LookupMode
from mistral_runtime.transformer import Transformer


def gains_from_static_steps(device: torch.device) -> bool:
    """Say whether launching a step takes longer than computing it, as on a GPU."""
    return device.type == "cuda"


def why_not_static(model: Transformer) -> str | None:
    """Return what about a model keeps its steps from being static, or None."""
    if model.config.moe is not None:
        return "experts are chosen on the host"
    if model.kv != "exact":
        return f"keys and values are kept as {model.kv}"
    return None


def device_engine(
    model: Transformer,
    *,
    positions: int,
    context: int | None,
    slack: int,
    lookup: LookupMode,
    report: Callable[[str], None],
) -> DeviceEngine | None:
    """Return an engine with static steps for one sequence of up to `positions`, or None: eager ones do as well."""
    if not gains_from_static_steps(model.device):
        return None
    if (reason := why_not_static(model)) is not None:
        report(f"graphs: none, for {reason}")
        return None
    pool = SlotPool(model, slots=1, context=positions, slack=slack)
    return DeviceEngine(
        model,
        pool=pool,
        runner=runner_for(model.device),
        context=context,
        lookup=lookup,
        report=report,
    )


def serving_steps(
    model: Transformer, *, slots: int, context: int, positions: int, slack: int, report: Callable[[str], None]
) -> StaticStep | None:
    """Return static steps for so many sequences at once, or None where eager ones do as well.

    A slot holds the longest sequence, whatever lies in it. So there are slots only where that many fit the `positions`
    of memory; with less, more sequences find room in caches of their own size.
    """
    has_room = (slots + 1) * cache_positions(model.config, context, slack=slack) <= positions
    if not gains_from_static_steps(model.device) or why_not_static(model) is not None or not has_room:
        return None
    pool = SlotPool(model, slots=slots, context=context, slack=slack)
    return StaticStep(model, pool, FallbackRunner(runner_for(model.device), report=report))
