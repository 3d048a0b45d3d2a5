"""Running the runtime on a snapshot: prepare its environment, start it, pass signals on, explain how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

from mistral_fetch.errors import ExitCode, RuntimeFailed
from mistral_fetch.launch.cpu import usable_threads
from mistral_fetch.launch.locate import Interpreter

_FORWARDED = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]

# What ``python -m mistral_runtime`` would do, minus two dangers: the current directory is no place to import
# from (it may hold a hostile torch.py), and another interpreter must not see our site-packages, only the
# runtime's own folder.
_BOOTSTRAP = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
import importlib.util, runpy
folder = sys.argv.pop(1)
spec = importlib.util.spec_from_file_location(
    "mistral_runtime", folder + "/__init__.py", submodule_search_locations=[folder])
sys.modules["mistral_runtime"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
runpy.run_module("mistral_runtime", run_name="__main__", alter_sys=True)
"""


def runtime_environment(base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment the runtime starts in. What the user has set already is left alone.

    Threads, OpenMP and the allocator have to be settled before PyTorch is imported: its thread pools read
    these variables once.
    """
    threads = str(usable_threads())
    defaults = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # Waiting threads sleep soon: long spinning starves whatever else shares a small machine.
        "GOMP_SPINCOUNT": "10000",
        # Few arenas: each thread's own would keep freed memory, which counts against the memory plan.
        "MALLOC_ARENA_MAX": "2",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    return {**defaults, **base}


def run_runtime(interpreter: Interpreter, command: str, options: Sequence[str], positionals: Sequence[str]) -> int:
    """Run the runtime's ``COMMAND [OPTIONS] -- SNAPSHOT …`` in the foreground and return its exit code.

    Standard streams are the runtime's own. Ctrl-C reaches it directly from the terminal; other signals are
    passed on. The runtime explains its own errors (exit codes in ``docs/exit-codes.md``).

    Raises:
        RuntimeFailed: It could not be started, was killed by a signal, or crashed.
    """
    process = _start(interpreter, command, options, positionals, stdout=None)
    with _signals_passed_to(process):
        code = process.wait()
    return _explain(code)


def capture_runtime(
    interpreter: Interpreter, command: str, options: Sequence[str], positionals: Sequence[str]
) -> bytes:
    """Run the runtime and return what it wrote to its standard output.

    Raises:
        RuntimeFailed: See :func:`run_runtime`; also when it ended with an error that it explained itself.
    """
    process = _start(interpreter, command, options, positionals, stdout=subprocess.PIPE)
    with _signals_passed_to(process):
        output, _ = process.communicate()
    code = _explain(process.returncode)
    if code:
        raise RuntimeFailed(
            f"the runtime ended with exit code {code}",
            detail="expected it to finish, got the error above",
            hint="mistral-fetch doctor explains this machine",
        )
    return bytes(output)


def _start(
    interpreter: Interpreter, command: str, options: Sequence[str], positionals: Sequence[str], stdout: int | None
) -> subprocess.Popen[bytes]:
    argv = [interpreter.executable, "-c", _BOOTSTRAP, str(interpreter.runtime_package)]
    argv += [command, *options, "--", *positionals]
    try:
        return subprocess.Popen(argv, env=runtime_environment(os.environ), stdout=stdout)
    except OSError as error:
        raise RuntimeFailed(
            f"the runtime could not be started with {interpreter.executable}",
            detail=f"expected a program that runs, got: {error}",
            hint="mistral-fetch doctor shows which interpreter is used",
        ) from error


@contextmanager
def _signals_passed_to(process: subprocess.Popen[bytes]) -> Iterator[None]:
    def forward(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    # The terminal sends Ctrl-C to both; the runtime decides what it means (in a chat: stop this answer).
    previous = {signal.SIGINT: signal.signal(signal.SIGINT, lambda _number, _frame: None)}
    previous.update({number: signal.signal(number, forward) for number in _FORWARDED})
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _explain(code: int) -> int:
    known = {ExitCode.OK, ExitCode.USAGE, ExitCode.RUNTIME, ExitCode.INTERRUPTED}
    if code in known:
        return code
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        killed = "the system may have run out of memory" if name == "SIGKILL" else "see what it printed above"
        raise RuntimeFailed(
            f"the runtime was ended by {name}",
            detail=f"expected it to finish, but {killed}",
            hint="mistral-fetch doctor shows the memory; a smaller --context needs less of it",
        )
    raise RuntimeFailed(
        f"the runtime crashed with exit code {code}",
        detail="expected it to finish, got the traceback above",
        hint="this is a bug: please report it with the traceback",
    )
