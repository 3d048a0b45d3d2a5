"""What ``doctor`` finds out about this program, its packages and the machine that would run a model."""

from __future__ import annotations

import os
import platform
import sys
from typing import TYPE_CHECKING

from mistral_fetch import system
from mistral_fetch.cli.doctor_report import Finding, fail, good, warn
from mistral_fetch.errors import MistralFetchError
from mistral_fetch.units import format_size
from mistral_fetch.version import __version__

if TYPE_CHECKING:
    from mistral_fetch.launch.probe import RuntimeMachine

_BASE = ("httpx", "libtorrent", "platformdirs", "rich", "typer")
_EXTRA = ("torch", "safetensors", "sentencepiece", "mistral-common", "model-signing")
# Whether these are set is worth knowing; their values may hold credentials.
_VARIABLES = (
    "HF_TOKEN",
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_CACHE",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "PYTHONPATH",
)
# Weights of a 7B by width, as the runtime holds them, and what its cache of keys and values takes for 4096 tokens.
_WIDTHS = {"16 bits": 14_500_000_000, "int8": 7_500_000_000, "int4": 4_200_000_000}
_CACHE_BYTES = 600_000_000


def program() -> Finding:
    """Tell the versions that a report begins with."""
    facts = {
        "version": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "virtual_environment": sys.prefix != sys.base_prefix,
    }
    told = f"mistral-fetch {__version__}, Python {facts['python']}, {facts['system']}"
    if platform.system() != "Linux":
        return warn(told, "this system was never tested: docs/platforms.md", **facts)
    return good(told, **facts)


def packages() -> Finding:
    """List the packages that there are; without the base ones nothing can be fetched."""
    import importlib.metadata  # brings the whole email package along

    found: dict[str, str] = {}
    for package in (*_BASE, *_EXTRA):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    told = ", ".join(f"{package} {version}" for package, version in found.items())
    missing = [package for package in _BASE if found[package] == "missing"]
    if missing:
        return fail(told, "reinstall with: pip install --force-reinstall mistral-fetch", **found)
    return good(told, **found)


def runtime(configured: str) -> tuple[Finding, RuntimeMachine | None]:
    """Find the interpreter that runs models, and let it import PyTorch."""
    from mistral_fetch.launch.locate import find_interpreter
    from mistral_fetch.launch.probe import ask_machine

    try:
        interpreter = find_interpreter(configured)
        machine = ask_machine(interpreter)
    except MistralFetchError as error:
        return fail(f"{error.what}; {error.detail}", error.hint), None
    devices = [
        f"{name} ({format_size(free)} free)"
        for name, free in zip(machine.devices, machine.device_memory or (0,) * len(machine.devices), strict=True)
    ]
    told = f"{interpreter.executable} can run models: torch {machine.torch} on {', '.join(devices) or 'the CPU'}"
    facts = {"torch": machine.torch, "devices": list(machine.devices), "device_memory": list(machine.device_memory)}
    return good(told, **facts), machine


def memory(machine: RuntimeMachine | None) -> Finding:
    """Tell which widths of a 7B fit, on the accelerator if there is one."""
    available = None
    if machine is not None:
        available = max(machine.device_memory, default=machine.memory)
    if available is None:
        return good("how much is available is not known here")
    fits = {width: available >= weights + _CACHE_BYTES for width, weights in _WIDTHS.items()}
    needs = {width: format_size(weights + _CACHE_BYTES) for width, weights in _WIDTHS.items()}
    listed = ", ".join(f"{width} {'fits' if fits[width] else 'does not fit'} ({needs[width]})" for width in fits)
    told = f"{format_size(available)} available; a 7B: {listed}"
    facts = {"available_bytes": available, "fits": fits}
    if fits["16 bits"]:
        return good(told, **facts)
    width = next((width for width, does in fits.items() if does), None)
    if width is None:
        return warn(told, "free some memory, or run a smaller model", **facts)
    return Finding("ok", told, f"run with --quantize {width}", facts)


def threads() -> Finding:
    """Compare the threads that the runtime would use with cores, affinity, quota and what the user has set."""
    from mistral_fetch.launch.cpu import usable_threads

    usable, own, cores = usable_threads(), system.usable_cores(), os.cpu_count() or 1
    facts = {"usable": usable, "affinity": own, "cores": cores}
    limits = [f"{own} by affinity"] * (own < cores) + [f"{usable} by the control group's quota"] * (usable < own)
    told = f"{usable} usable of {cores} cores" + (f" ({', '.join(limits)})" if limits else "")
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if chosen.isdigit() and int(chosen) > usable:
        return warn(f"{told}; OMP_NUM_THREADS is {chosen}", "unset OMP_NUM_THREADS: threads would wait", **facts)
    return good(told, **facts)


def environment() -> Finding:
    """List the variables that matter and are set, without their values."""
    named = [name for name in _VARIABLES if os.environ.get(name)]
    ours = sorted(name for name in os.environ if name.startswith("MISTRAL_FETCH_"))
    inside = "in a virtual environment" if sys.prefix != sys.base_prefix else "outside a virtual environment"
    return good(f"{inside}; set: {', '.join([*named, *ours]) or 'nothing'}", set=[*named, *ours])
