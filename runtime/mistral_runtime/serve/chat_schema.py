"""A chat request, field by field."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from mistral_runtime.serve.answer_options import MAX_LOGPROBS, AnswerOptions, read_answer_options
from mistral_runtime.serve.fields import Fields

Role = Literal["system", "user", "assistant", "tool"]
MAX_MESSAGES = 10_000
MAX_TOOLS = 128
MAX_PARTS = 1000
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class ToolCall:
    """A call that the model made; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ChatMessage:
    """One turn, of a person, the model or a tool."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


@dataclass(frozen=True)
class Tool:
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str
    description: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class ToolUse:
    """Which tools there are. `forced` says that a call has to come, of `forced_name` where that is not None."""

    tools: tuple[Tool, ...] = ()
    forced: bool = False
    forced_name: str | None = None


@dataclass(frozen=True)
class ChatRequest:
    """Everything a chat request asks for."""

    model: str | None
    messages: tuple[ChatMessage, ...]
    options: AnswerOptions
    logprobs: int | None
    tool_use: ToolUse = field(default_factory=ToolUse)


def parse_chat(body: dict[str, Any], *, vocab_size: int) -> ChatRequest:
    """Return what a request body asks for.

    Raises:
        ApiError: A field is unknown, missing, of another type or out of range; the error names it.
    """
    fields = Fields(body)
    request = ChatRequest(
        model=fields.text("model", None),
        messages=_messages(fields),
        options=read_answer_options(
            fields, vocab_size=vocab_size, max_token_names=("max_completion_tokens", "max_tokens")
        ),
        logprobs=_logprobs(fields),
        tool_use=_tool_use(fields),
    )
    fields.only("parallel_tool_calls", True)
    fields.only("echo", False)
    fields.only("add_generation_prompt", True)
    fields.only("reasoning_effort", "none")
    fields.only("modalities", ["text"])
    fields.only("verbosity", "medium")
    fields.done()
    if request.options.max_tokens == 0:
        raise fields.wrong("max_tokens", "1 or more")
    if request.options.grammar is not None and request.tool_use.forced:
        raise fields.wrong("tool_choice", "auto or none beside a format of the answer")
    return request


def parse_messages(fields: Fields) -> tuple[ChatMessage, ...]:
    """Return the conversation of a request that holds one."""
    return _messages(fields)


def _messages(fields: Fields) -> tuple[ChatMessage, ...]:
    messages = tuple(_message(each) for each in fields.children("messages", at_most=MAX_MESSAGES))
    if not messages:
        raise fields.wrong("messages", "an array with at least one message")
    return messages


def _message(fields: Fields) -> ChatMessage:
    role = fields.choice("role", "", _ROLES)
    calls: tuple[ToolCall, ...] = ()
    call_id = None
    if role == "assistant":
        calls = tuple(_tool_call(each) for each in fields.children("tool_calls", at_most=MAX_TOOLS))
        for name in ("refusal", "function_call", "audio", "reasoning_content", "reasoning"):
            fields.only(name)
        fields.only("annotations", [])
        fields.ignored("parsed")
    if role == "tool":
        call_id = fields.required_text("tool_call_id")
    fields.ignored("name")
    content = _content(fields, is_optional=bool(calls))
    fields.done()
    return ChatMessage("system" if role == "developer" else role, content, calls, call_id)  # type: ignore[arg-type]


def _content(fields: Fields, *, is_optional: bool) -> str:
    value = fields.raw("content")
    if isinstance(value, str):
        return value
    if value is None and is_optional:
        return ""
    if not isinstance(value, list):
        raise fields.wrong("content", "a string, or an array of text parts")
    return "".join(map(_part, fields.children("content", at_most=MAX_PARTS)))


def _part(fields: Fields) -> str:
    fields.choice("type", "", ("text",))
    text = fields.required_text("text")
    fields.done()
    return text


def _tool_call(fields: Fields) -> ToolCall:
    name = fields.required_text("id")
    fields.choice("type", "function", ("function",))
    fields.ignored("index")
    function = fields.child("function")
    if function is None:
        raise fields.wrong("function", "an object with name and arguments")
    function.ignored("parsed_arguments")  # OpenAI's client adds its own reading of them when it sends a call back
    call = ToolCall(name, _tool_name(function), function.required_text("arguments"))
    function.done()
    fields.done()
    return call


def _tool_name(fields: Fields) -> str:
    name = fields.required_text("name")
    if not _TOOL_NAME.fullmatch(name):
        raise fields.wrong("name", "1 to 64 letters, digits, dashes and underscores")
    return name


def _logprobs(fields: Fields) -> int | None:
    wanted = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", None, low=0, high=MAX_LOGPROBS)
    if top is not None and not wanted:
        raise fields.wrong("top_logprobs", "nothing, as logprobs is not true")
    return (top or 0) if wanted else None


def _tool_use(fields: Fields) -> ToolUse:
    tools = tuple(_tool(each) for each in fields.children("tools", at_most=MAX_TOOLS))
    names = [tool.name for tool in tools]
    if len(set(names)) != len(names):
        raise fields.wrong("tools", "functions with different names")
    fields.only("functions")
    fields.only("function_call")
    choice = fields.raw("tool_choice")
    if choice is None or choice in ("auto", "none"):
        if choice == "auto" and not tools:
            raise fields.wrong("tool_choice", "none, as there are no tools")
        return ToolUse() if choice == "none" else ToolUse(tools)
    if not tools:
        raise fields.wrong("tool_choice", "none, as there are no tools")
    if choice == "required":
        return ToolUse(tools, forced=True)
    return ToolUse(tools, forced=True, forced_name=_chosen(fields, names))


def _chosen(fields: Fields, names: list[str]) -> str:
    choice = fields.raw("tool_choice")
    if not isinstance(choice, dict):
        raise fields.wrong("tool_choice", "none, auto, required, or an object that names a function")
    named = Fields(choice, "tool_choice.")
    named.choice("type", "", ("function",))
    function = named.child("function")
    if function is None:
        raise named.wrong("function", "an object with name")
    name = function.choice("name", "", tuple(names))
    function.done()
    named.done()
    return name


def _tool(fields: Fields) -> Tool:
    fields.choice("type", "", ("function",))
    function = fields.child("function")
    if function is None:
        raise fields.wrong("function", "an object with name and parameters")
    parameters = function.raw("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, dict):
        raise function.wrong("parameters", "a JSON schema")
    tool = Tool(_tool_name(function), function.text("description", ""), parameters)
    function.boolean("strict")
    function.done()
    fields.done()
    return tool
