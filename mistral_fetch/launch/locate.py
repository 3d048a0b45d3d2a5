"""Finding an interpreter that can run the bundled runtime: the configured one, or our own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mistral_fetch.errors import RuntimeMissing

# What the runtime imports; named by import name, with the name to install where that differs.
REQUIRED_MODULES = {
    "torch": "torch",
    "safetensors": "safetensors",
    "sentencepiece": "sentencepiece",
    "mistral_common": "mistral-common",
}
PROBE_TIMEOUT_SECONDS = 60
# Begins the probe's answer: a program that prints nothing and succeeds, such as true, is no Python.
PROBE_WORD = "missing:"
INSTALL_HINT = "install it with: pip install 'mistral-fetch[runtime]', or name an interpreter in MISTRAL_FETCH_PYTHON"


@dataclass(frozen=True)
class Interpreter:
    """A Python that has everything the runtime needs, and the folder of the runtime package."""

    executable: str
    runtime_package: Path


def find_interpreter(configured: str) -> Interpreter:
    """Return the interpreter to run the runtime with.

    Args:
        configured: The interpreter that the settings name; empty for the one running now.

    Raises:
        RuntimeMissing: It does not exist or lacks a package; the error names what to install.
    """
    package = runtime_package()
    if not configured:
        missing = [name for module, name in REQUIRED_MODULES.items() if importlib.util.find_spec(module) is None]
        _refuse_missing(sys.executable, missing)
        return Interpreter(sys.executable, package)
    _refuse_missing(configured, _probe(configured))
    return Interpreter(configured, package)


def runtime_package() -> Path:
    """Return the folder of the ``mistral_runtime`` package, without importing it.

    Raises:
        RuntimeMissing: The installation is incomplete.
    """
    spec = importlib.util.find_spec("mistral_runtime")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeMissing(
            "the bundled runtime is not installed",
            detail="expected the package mistral_runtime beside mistral_fetch, got none",
            hint="reinstall with: pip install --force-reinstall 'mistral-fetch[runtime]'",
        )
    return Path(spec.submodule_search_locations[0])


def _probe(executable: str) -> list[str]:
    """Ask another interpreter which of the modules it lacks, without importing them there."""
    # Without the current directory: a torch.py in it is not PyTorch.
    program = (
        "import sys; sys.path[:] = [entry for entry in sys.path if entry]; import importlib.util;"
        f"print({PROBE_WORD!r}, *[name for name in sys.argv[1:] if importlib.util.find_spec(name) is None])"
    )
    try:
        answer = subprocess.run(
            [executable, "-c", program, *REQUIRED_MODULES],
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_SECONDS,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise _no_answer(executable, str(error)) from error
    # The last line: a site's own start-up files may print before it.
    word, *missing = (answer.stdout.splitlines() or [""])[-1].split() or [""]
    if word != PROBE_WORD or not REQUIRED_MODULES.keys() >= set(missing):
        raise _no_answer(executable, f"{answer.stdout[:80]!r}")
    return [REQUIRED_MODULES[module] for module in missing]


def _no_answer(executable: str, got: str) -> RuntimeMissing:
    return RuntimeMissing(
        f"the interpreter {executable} does not answer",
        detail=f"expected a Python with PyTorch, got: {got}",
        hint=INSTALL_HINT,
    )


def _refuse_missing(executable: str, missing: list[str]) -> None:
    if missing:
        raise RuntimeMissing(
            f"the interpreter {executable} cannot run a model",
            detail=f"expected {', '.join(REQUIRED_MODULES.values())}; missing: {', '.join(missing)}",
            hint=INSTALL_HINT,
        )
