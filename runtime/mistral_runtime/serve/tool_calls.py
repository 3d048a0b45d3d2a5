"""Tool calls in an answer's text: what a forced call has to look like, and reading calls as they come.

Mistral's models write `[{"name": …, "arguments": {…}}, …]` behind the token [TOOL_CALLS]; others are held to one
object of that kind by a grammar, or asked for it in words.
"""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Iterable
from typing import Any

from mistral_runtime.serve.chat_schema import Tool, ToolCall, ToolUse
from mistral_runtime.serve.grammar_fields import schema_grammar
from mistral_runtime.serve.protocol import Grammar

_ID_LETTERS = string.ascii_letters + string.digits
_PLAIN_VALUES = {"const", "enum", "default", "examples"}  # values of the answer, whatever they look like
_BY_NAME = {"properties", "patternProperties", "$defs", "definitions"}  # whose keys are no keywords
_ID_LENGTH = 9  # what Mistral's v3 template asks of an id


def new_call_id() -> str:
    """Return a fresh id that Mistral's templates accept when the call comes back in the history."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(_ID_LENGTH))


def call_grammar(use: ToolUse, *, is_array: bool) -> Grammar:
    """Return the grammar of the calls that are allowed where one is forced."""
    allowed = [tool for tool in use.tools if use.forced_name in (None, tool.name)]
    root = "#/items" if is_array else "#"
    one: dict[str, Any] = {
        "anyOf": [
            _call_schema(tool, f"{root}/anyOf/{index}/properties/arguments") for index, tool in enumerate(allowed)
        ]
    }
    if not is_array:
        return schema_grammar(one)
    limits = {"minItems": 1} | ({} if use.forced_name is None else {"maxItems": 1})
    return schema_grammar({"type": "array", "items": one, **limits})


def _call_schema(tool: Tool, place: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "arguments": _moved(tool.parameters, place)},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """Return a schema that stands at `place` of another: its `#` is no longer the root."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {name: _moved_field(name, value, place) for name, value in schema.items()}


def _moved_field(name: str, value: Any, place: str) -> Any:
    if name == "$ref" and isinstance(value, str) and value.startswith("#"):
        return place + value[1:]
    if name in _BY_NAME and isinstance(value, dict):
        return {each: _moved(inner, place) for each, inner in value.items()}
    return value if name in _PLAIN_VALUES else _moved(value, place)


class CallScanner:
    """Finds the objects of an array of calls in text that comes in pieces; each is parsed once it is whole."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._current: list[str] = []
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def feed(self, text: str) -> list[ToolCall]:
        """Return the calls that `text` completes. What is no call to a known function is passed over."""
        found = []
        for character in text:
            if self._step(character) and (call := self._parse()):
                found.append(call)
        return found

    def _step(self, character: str) -> bool:
        """Take one character in; say whether it ends an object."""
        if self._depth or character == "{":
            self._current.append(character)
        if self._in_string:
            self._in_string = self._is_escaped or character != '"'
            self._is_escaped = not self._is_escaped and character == "\\"
            return False
        if character == '"' and self._depth:
            self._in_string = True
        elif character == "{":
            self._depth += 1
        elif character == "}" and self._depth:
            self._depth -= 1
            return self._depth == 0
        return False

    def _parse(self) -> ToolCall | None:
        text = "".join(self._current)
        self._current.clear()
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        name, arguments = value.get("name"), value.get("arguments", {})
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict):
            return None
        return ToolCall(new_call_id(), name, _argument_text(arguments))


def _argument_text(arguments: dict[str, Any]) -> str:
    text = json.dumps(arguments, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(arguments)  # half of a surrogate pair: JSON can hold it only as an escape
    return text
