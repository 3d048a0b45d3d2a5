"""Asking the runtime a question whose answer is one JSON object, and its errors as ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mistral_fetch.errors import ExitCode, Interrupted, MistralFetchError, OutOfSpace, RuntimeFailed, StoreError
from mistral_fetch.launch.locate import Interpreter
from mistral_fetch.launch.process import capture_runtime, explained_failure

# The runtime's names for what is the disk's fault; everything else is the runtime's or the model's.
_STORE_ERRORS: dict[str, type[StoreError]] = {"disk-full": OutOfSpace, "write-failed": StoreError}


def ask_runtime(
    interpreter: Interpreter, command: str, options: Sequence[str], positionals: Sequence[str]
) -> dict[str, Any]:
    """Run ``COMMAND --json`` and return the object it printed.

    Raises:
        OutOfSpace, StoreError: The runtime could not write.
        RuntimeFailed: It refused, in its own three lines; or it crashed, or printed something else.
        Interrupted: It was asked to stop.
    """
    code, output = capture_runtime(interpreter, command, [*options, "--json"], positionals)
    if code == ExitCode.INTERRUPTED:
        raise Interrupted(
            "interrupted",
            detail="what was not finished is discarded; what was there before is kept",
            hint="run the same command again",
        )
    try:
        answer = json.loads(output)
        error = answer.get("error")
        told = None if error is None else [str(error[key]) for key in ("kind", "what", "detail", "hint")]
    except (ValueError, AttributeError, TypeError, KeyError) as problem:
        raise (explained_failure(code) if code else _no_answer(command, output)) from problem
    if told is not None:
        raise _as_ours(code, *told)
    if code:
        raise explained_failure(code)
    return dict(answer)


def _as_ours(code: int, kind: str, what: str, detail: str, hint: str) -> MistralFetchError:
    if kind in _STORE_ERRORS:
        return _STORE_ERRORS[kind](what, detail=detail, hint=hint)
    failed = RuntimeFailed(what, detail=detail, hint=hint)
    failed.exit_code = ExitCode(code or ExitCode.RUNTIME)
    return failed


def _no_answer(command: str, output: bytes) -> RuntimeFailed:
    return RuntimeFailed(
        f"the runtime's answer to {command} makes no sense",
        detail=f"expected one JSON object, got {output[:80]!r}",
        hint="does MISTRAL_FETCH_PYTHON name a Python? mistral-fetch doctor shows which interpreter is used",
    )
