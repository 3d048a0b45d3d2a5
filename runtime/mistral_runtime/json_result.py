"""The result of a command, or its error, for a person or for a program that reads one JSON object."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from mistral_runtime.errors import MistralRuntimeError
from mistral_runtime.terminal import write_out


def tell(work: Callable[[], tuple[dict[str, Any], str]], *, as_json: bool, always_json: bool = False) -> int:
    """Print what `work` returns, as JSON or as text, and return the exit code.

    A program gets its errors where it looks for results; people get them on stderr, from `main`. With `always_json`
    the result has no form for people.
    """
    try:
        fields, text = work()
    except MistralRuntimeError as error:
        if not as_json:
            raise
        write_out(json.dumps({"error": error_fields(error)}) + "\n")
        return error.exit_code
    write_out((json.dumps(fields, ensure_ascii=False) if as_json or always_json else text) + "\n")
    return 0


def error_fields(error: MistralRuntimeError) -> dict[str, str]:
    """Return an error as the object that stands under `error`; `kind` is its class in kebab case."""
    kind = re.sub(r"(?<!^)(?=[A-Z])", "-", type(error).__name__).lower()
    return {"kind": kind, "what": error.what, "detail": error.detail, "hint": error.hint}
