"""Choose device, number type and threads once, and say why; then check that the model fits.

Owns the choices and the memory plan. What the machine has comes from `machine.py` and torch; the model's sizes come
from the caller.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mistral_runtime.config import ModelConfig
from mistral_runtime.errors import DeviceUnavailable, NotEnoughMemory
from mistral_runtime.kv_cache import cache_bytes
from mistral_runtime.kv_int8 import KvKind, bytes_per_head
from mistral_runtime.machine import available_memory, usable_cores

DEVICES = ("auto", "cuda", "mps", "xpu", "cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Interpreter, torch and its kernels' scratch: 150 MB after import, about 300 MB after the first step, measured.
_BASE_WORKSPACE_BYTES = 300 << 20


@dataclass(frozen=True)
class Compute:
    """Where and in which type the model is computed, with the reason of each choice."""

    device: torch.device
    device_reason: str
    dtype: torch.dtype
    dtype_reason: str
    threads: int
    threads_reason: str

    def line(self) -> str:
        """Return one line for people."""
        return (
            f"compute: {self.device} ({self.device_reason}) · {dtype_name(self.dtype)} ({self.dtype_reason}) · "
            f"{self.threads} threads ({self.threads_reason})"
        )


def choose_compute(*, device: str, dtype: str, threads: int | None, stored: torch.dtype) -> Compute:
    """Settle "auto" choices and apply the number of threads.

    Raises:
        DeviceUnavailable: What was asked for explicitly is not here.
    """
    chosen, device_reason = choose_device(device)
    dtype_chosen, dtype_reason = choose_dtype(dtype, stored=stored, native_bf16=multiplies_bf16(chosen), device=chosen)
    count, threads_reason = choose_threads(threads)
    torch.set_num_threads(count)
    return Compute(chosen, device_reason, dtype_chosen, dtype_reason, count, threads_reason)


def choose_device(wanted: str) -> tuple[torch.device, str]:
    """Return the device and why: the first of cuda, mps, xpu and cpu that torch can use, or the one asked for."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "xpu": hasattr(torch, "xpu") and torch.xpu.is_available(),
        "cpu": True,
    }
    if wanted != "auto":
        if not available[wanted]:
            usable = ", ".join(name for name, is_there in available.items() if is_there)
            raise DeviceUnavailable(
                f"the device {wanted} cannot be used",
                detail=f"expected a device that torch {torch.__version__} finds here, found: {usable}",
                hint="leave --device out to choose automatically, or install a torch built for that device",
            )
        return torch.device(wanted), "as asked"
    name = next(name for name, is_there in available.items() if is_there)
    return torch.device(name), "no other device that torch can use" if name == "cpu" else "found by torch"


def multiplies_bf16(device: torch.device) -> bool:
    """Say whether the device multiplies bfloat16 at full speed."""
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return True


def multiplies_float16() -> bool:
    """Say whether the CPU multiplies float16 at full speed; else prompts take some ten times as long as in bfloat16."""
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def choose_dtype(
    wanted: str, *, stored: torch.dtype, native_bf16: bool, device: torch.device
) -> tuple[torch.dtype, str]:
    """Return the number type to compute in, and why.

    Weights stored as bfloat16 stay so where the device is good at it: no conversion, half the memory. Weights stored as
    float16 stay so on a GPU; a CPU computes them in float32, which holds all their digits (bfloat16 would not).
    """
    if wanted == "float16" and device.type == "cpu" and not multiplies_float16():
        return DTYPES[wanted], "as asked, but slow: this CPU does not multiply it; leave --dtype out"
    if wanted != "auto":
        return DTYPES[wanted], "as asked"
    if stored == torch.bfloat16:
        if native_bf16:
            return stored, "as stored; multiplied natively here"
        return torch.float32, "bfloat16 is slow here"
    if stored == torch.float16 and device.type != "cpu":
        return stored, "as stored"
    return torch.float32, "as stored" if stored == torch.float32 else "float16 is slow here"


def choose_threads(wanted: int | None) -> tuple[int, str]:
    """Return how many threads to compute with: as asked, as the launcher set, or as many as may run at once."""
    if wanted is not None:
        return wanted, "as asked"
    if os.environ.get("OMP_NUM_THREADS"):
        return torch.get_num_threads(), "OMP_NUM_THREADS"
    return usable_cores(), "cores this process may use"


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will take from the device's memory, in bytes, before anything is loaded."""

    weights: int
    cache: int
    workspace: int
    available: int | None
    device: str

    @property
    def needed(self) -> int:
        """The sum."""
        return self.weights + self.cache + self.workspace

    def parts(self) -> str:
        """Return the sum with its parts, for people."""
        return (
            f"weights {_gib(self.weights)} + cache {_gib(self.cache)} + workspace {_gib(self.workspace)} "
            f"= {_gib(self.needed)}"
        )

    def line(self) -> str:
        """Return one line for people."""
        have = "an unknown amount" if self.available is None else _gib(self.available)
        return f"memory: {self.parts()} of {have} available on {self.device}"

    def require_fit(self, savings: Mapping[str, int] | None = None) -> None:
        """Raise NotEnoughMemory unless the plan fits: better refused with numbers than killed without.

        ``savings`` says how many bytes each `--quantize` would save; the hint names those that fit then.
        """
        if self.available is not None and self.needed > self.available:
            smaller = {kind: self.needed - saved for kind, saved in (savings or {}).items()}
            fitting = [
                f"--quantize {kind} would take {_gib(size)}" for kind, size in smaller.items() if size <= self.available
            ]
            raise NotEnoughMemory(
                f"the model does not fit into the memory of {self.device}",
                detail=f"expected {_gib(self.needed)} ({self.line()}), found {_gib(self.available)}",
                hint="; ".join(
                    [*fitting, "lower --context or --max-tokens, free some memory, or add --ignore-memory-plan"]
                ),
            )


def plan_memory(
    config: ModelConfig,
    compute: Compute,
    *,
    context: int,
    prefill_chunk: int,
    slack: int = 0,
    kv: KvKind = "exact",
) -> MemoryPlan:
    """Return the plan for sequences of up to `context` positions; for `slack` see `RollingKVCache`."""
    width = compute.dtype.itemsize
    # One chunk's widest moment: three feed-forward rows and some eight of the stream, in float32 at worst.
    activations = min(prefill_chunk, context) * (3 * config.hidden_dim + 8 * config.dim) * 4
    return MemoryPlan(
        weights=config.parameter_count() * width,
        cache=cache_bytes(config, context, bytes_per_head=bytes_per_head(config, kv, compute.dtype), slack=slack),
        workspace=_BASE_WORKSPACE_BYTES + activations + config.vocab_size * 4,
        available=_device_memory(compute.device),
        device=str(compute.device),
    )


def _device_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "xpu":
        return int(torch.xpu.mem_get_info(device)[0])
    return available_memory()  # "mps" shares the machine's


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 10 << 20 else f"{count / 2**20:.2f} MiB"
