"""Running the runtime on a snapshot: prepare its environment, start it, pass signals on, explain how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from mistral_fetch import system
from mistral_fetch.errors import ExitCode, RuntimeFailed
from mistral_fetch.launch.cpu import usable_threads
from mistral_fetch.launch.locate import Interpreter

_Result = TypeVar("_Result")
_FORWARDED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
# The runtime opens no connection, so it has no use for what fetching needed.
_SECRETS = frozenset({"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"})

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
    """Return the environment the runtime starts in. What the user has set already is left alone, but for secrets.

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
    return {**defaults, **{name: value for name, value in base.items() if name not in _SECRETS}}


def run_runtime(interpreter: Interpreter, command: str, options: Sequence[str], positionals: Sequence[str]) -> int:
    """Run the runtime's ``COMMAND [OPTIONS] -- SNAPSHOT …`` in the foreground and return its exit code.

    Standard streams are the runtime's own, and signals are passed on. The runtime explains its own errors
    (exit codes in ``docs/exit-codes.md``).

    Raises:
        RuntimeFailed: It could not be started, was killed by a signal, or crashed.
    """
    with _signals_passed_on() as follow:
        process = follow(_start(interpreter, command, options, positionals, stdout=None))
        code = _in_the_background(process.wait)
    return _explain(code)


def capture_runtime(
    interpreter: Interpreter, command: str, options: Sequence[str], positionals: Sequence[str]
) -> tuple[int, bytes]:
    """Run the runtime; return its exit code and what it wrote to its standard output.

    Raises:
        RuntimeFailed: See :func:`run_runtime`.
    """
    with _signals_passed_on() as follow:
        process = follow(_start(interpreter, command, options, positionals, stdout=subprocess.PIPE))
        output, _ = _in_the_background(process.communicate)
    return _explain(process.returncode), output


def explained_failure(code: int) -> RuntimeFailed:
    """Return the error for a runtime that ended with a code after it had explained itself."""
    error = RuntimeFailed(
        f"the runtime ended with exit code {code}",
        detail="expected it to finish, got the error above",
        hint="see its message; mistral-fetch doctor explains this machine",
    )
    error.exit_code = ExitCode(code or ExitCode.RUNTIME)
    return error


def _start(
    interpreter: Interpreter, command: str, options: Sequence[str], positionals: Sequence[str], stdout: int | None
) -> subprocess.Popen[bytes]:
    argv = [interpreter.executable, "-c", _BOOTSTRAP, str(interpreter.runtime_package)]
    argv += [command, *options, "--", *positionals]
    try:
        return subprocess.Popen(argv, env=runtime_environment(os.environ), stdout=stdout)
    except (OSError, ValueError) as error:
        raise RuntimeFailed(
            f"the runtime could not be started with {interpreter.executable}",
            detail=f"expected a program that runs, got: {error}",
            hint="mistral-fetch doctor shows which interpreter is used",
        ) from error


def _in_the_background(work: Callable[[], _Result]) -> _Result:
    """Do blocking work in another thread, so that this one looks up twice a second.

    Python runs signal handlers between bytecodes: a signal that arrives just before a blocking call begins would
    otherwise wait for the call's end, which here is the end of the runtime.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        while not future.done():
            wait([future], timeout=0.5)
        return future.result()


@contextmanager
def _signals_passed_on() -> Iterator[Callable[[subprocess.Popen[bytes]], subprocess.Popen[bytes]]]:
    """Pass signals to a process from the moment it is handed over; those that came before are delivered then."""
    started: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and _terminal_tells_both():
            return
        if started:
            started[0].send_signal(number)
        else:
            early.append(number)

    def follow(process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        started.append(process)
        for number in early:
            process.send_signal(number)
        return process

    # What we were told to ignore (nohup, a job in the background) stays ignored, by the runtime as well.
    heard = [number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, forward) for number in heard}
    try:
        yield follow
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _terminal_tells_both() -> bool:
    """Return whether Ctrl-C reaches the runtime without us: we are what the terminal has in its foreground.

    Then the runtime must not hear it twice: in a chat, once stops an answer and twice leaves.
    """
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | system.NO_TERMINAL)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _explain(code: int) -> int:
    known = {ExitCode.OK, ExitCode.USAGE, ExitCode.RUNTIME, ExitCode.INTERRUPTED}
    if code in known:
        return code
    if -code in {signal.SIGINT, signal.SIGTERM}:
        return ExitCode.INTERRUPTED  # asked to stop before it could listen, or while it could not
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
