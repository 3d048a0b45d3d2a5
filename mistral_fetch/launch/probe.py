"""Asking the runtime's interpreter what it would run on: PyTorch's version, devices, memory, cores. Bounded in time."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from typing import Any

from mistral_fetch.errors import RuntimeFailed
from mistral_fetch.launch.locate import Interpreter
from mistral_fetch.launch.process import runtime_environment

PROBE_SECONDS = 60.0
MAX_ANSWER_BYTES = 64 * 1024
_WORD = "mistral-fetch-probe:"

# Like the runtime's own start: the current directory is no place to import from. Memory and cores are the runtime's
# own answers, so that what is said here is what it will plan with.
_PROGRAM = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
import importlib.util, json
folder, word = sys.argv[1:]
spec = importlib.util.spec_from_file_location(
    "mistral_runtime", folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules["mistral_runtime"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from mistral_runtime.machine import available_memory, usable_cores
import torch
devices = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
device_memory = [torch.cuda.mem_get_info(n)[0] for n in range(len(devices))]
if not devices and torch.backends.mps.is_available():
    devices, device_memory = ["mps"], []
print(word, json.dumps({"torch": torch.__version__, "devices": devices, "device_memory": device_memory,
    "memory": available_memory(), "cores": usable_cores(), "threads": torch.get_num_threads()}))
"""


@dataclass(frozen=True)
class RuntimeMachine:
    """What the runtime has: names of accelerators, free bytes of each, free bytes of memory (None where unknown)."""

    torch: str
    devices: tuple[str, ...]
    device_memory: tuple[int, ...]
    memory: int | None
    cores: int
    threads: int


def ask_machine(interpreter: Interpreter, timeout_seconds: float = PROBE_SECONDS) -> RuntimeMachine:
    """Import PyTorch in the runtime's interpreter and return what it finds.

    Raises:
        RuntimeFailed: It crashed, printed something else, or took longer than ``timeout_seconds``.
    """
    argv = [interpreter.executable, "-c", _PROGRAM, str(interpreter.runtime_package), _WORD]
    try:
        answer = subprocess.run(
            argv,
            env=runtime_environment(os.environ),
            capture_output=True,
            timeout=timeout_seconds,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise _failed(interpreter, f"no answer within {timeout_seconds:g} s") from None
    except (OSError, ValueError) as error:
        raise _failed(interpreter, str(error)) from error
    lines = answer.stdout[-MAX_ANSWER_BYTES:].decode("utf-8", "replace").splitlines()
    told = next((line.removeprefix(_WORD) for line in reversed(lines) if line.startswith(_WORD)), "")
    try:
        return _machine(json.loads(told))
    except (ValueError, TypeError, KeyError) as error:
        last = answer.stderr[-MAX_ANSWER_BYTES:].decode("utf-8", "replace").strip().splitlines()
        raise _failed(interpreter, (last or ["nothing"])[-1][:300]) from error


def _machine(told: Any) -> RuntimeMachine:
    memory = told["memory"]
    return RuntimeMachine(
        torch=str(told["torch"])[:40],
        devices=tuple(str(name)[:80] for name in told["devices"]),
        device_memory=tuple(map(int, told["device_memory"])),
        memory=None if memory is None else int(memory),
        cores=int(told["cores"]),
        threads=int(told["threads"]),
    )


def _failed(interpreter: Interpreter, got: str) -> RuntimeFailed:
    return RuntimeFailed(
        f"PyTorch does not work in {interpreter.executable}",
        detail=f"expected it to be imported, got: {got}",
        hint="reinstall it there: pip install --force-reinstall torch; or name another one in MISTRAL_FETCH_PYTHON",
    )
