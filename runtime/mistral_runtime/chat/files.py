"""A conversation as a file: one JSON object, readable by its owner alone."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mistral_runtime.errors import BadRequest
from mistral_runtime.prompt import Message

FORMAT = "mistral-fetch chat 1"
MAX_FILE_BYTES = 16 << 20


def save_conversation(path: Path, system: str | None, turns: Sequence[Message], *, may_replace: bool) -> None:
    """Write the conversation to a file.

    Raises:
        BadRequest: The file is there already and must not be replaced, or cannot be written.
    """
    told = {"format": FORMAT, "system": system, "messages": [{"role": t.role, "content": t.content} for t in turns]}
    data = json.dumps(told, ensure_ascii=False, indent=1).encode("utf-8") + b"\n"
    target = path.with_name(f".{path.name}.{os.getpid()}.tmp") if may_replace else path
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        if may_replace:
            target.replace(path)
    except FileExistsError:
        raise BadRequest(
            f"{path} is there already",
            detail="expected a new name, found a file",
            hint=f"/save -f {path} replaces it",
        ) from None
    except (OSError, ValueError) as error:
        raise BadRequest(
            f"{path} cannot be written",
            detail=f"expected a file in a folder that takes one, found: {_reason(error)}",
            hint="choose another place",
        ) from error


def load_conversation(path: Path) -> tuple[str | None, list[Message]]:
    """Return the system prompt and the turns of a saved conversation.

    Raises:
        BadRequest: Not a file that `save_conversation` writes.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise _refusal(path, _reason(error)) from error
    if len(data) > MAX_FILE_BYTES:
        raise _refusal(path, f"more than {MAX_FILE_BYTES} bytes")
    try:
        told = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"no JSON ({type(error).__name__})") from error
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise _refusal(path, f"no object with the format {FORMAT!r}")
    return _system_of(path, told), _turns_of(path, told)


def _system_of(path: Path, told: dict[str, Any]) -> str | None:
    system = told.get("system")
    if system is not None and not _is_text(system):
        raise _refusal(path, "a system prompt that is not text")
    return system


def _turns_of(path: Path, told: dict[str, Any]) -> list[Message]:
    messages = told.get("messages")
    if not isinstance(messages, list) or len(messages) % 2:
        raise _refusal(path, "messages that are not pairs of question and answer")
    turns = []
    for index, message in enumerate(messages):
        role = ("user", "assistant")[index % 2]
        if not isinstance(message, dict) or message.get("role") != role or not _is_text(message.get("content")):
            raise _refusal(path, f"message {index + 1}, which is not a text of the {role}")
        turns.append(Message("user" if role == "user" else "assistant", message["content"]))
    return turns


def _is_text(value: object) -> bool:
    # A lone surrogate is valid JSON and no text: it cannot be encoded, and would end the chat later.
    return isinstance(value, str) and bool(value.strip()) and not any(0xD800 <= ord(c) < 0xE000 for c in value)


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _refusal(path: Path, found: str) -> BadRequest:
    return BadRequest(
        f"{path} is no saved conversation",
        detail=f"expected a file that /save has written, found {found}",
        hint="the conversation is as it was",
    )
