"""A conversation with tools as token ids, by the model's template; mistral-common writes them, as in `prompt`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from mistral_runtime.prompt import ChatTemplate, Message, official_tokenizer
from mistral_runtime.serve.api_error import bad_request
from mistral_runtime.serve.chat_schema import ChatMessage, Tool, ToolCall, ToolUse
from mistral_runtime.serve.protocol import Grammar
from mistral_runtime.serve.tool_calls import call_grammar
from mistral_runtime.tokenizer import Tokenizer

_CALL_PIECE = "[TOOL_CALLS]"
_MISTRAL_ID = re.compile("[a-zA-Z0-9]{9}")


class ChatPrompt:
    """How this model's turns are written.

    `stop_strings` end an answer beside the EOS token; `call_token` stands before calls, None where there is no such
    token.
    """

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        self.name = name
        self._tokenizer = tokenizer
        self._plain = ChatTemplate(name, tokenizer)
        self._official: Any = None if name == "demo" else official_tokenizer(tokenizer.path, name)
        self.stop_strings = self._plain.stop_strings
        self.call_token = _find_piece(tokenizer, _CALL_PIECE) if name == "v3" else None

    def encode(self, messages: Sequence[ChatMessage], use: ToolUse) -> list[int]:
        """Return the ids that ask for the next answer.

        Raises:
            BadRequest: mistral-common refuses the conversation, or a text is not valid UTF-8.
            ApiError: The template has no place for tools or their results.
        """
        if self.call_token is not None:
            ids = self._encode_official(messages, use.tools)
            return [*ids, self.call_token] if use.forced else ids
        self._refuse_tool_turns(messages)
        if use.tools:
            messages = self._describe_tools(messages, use)
        turns = [Message(each.role, each.content) for each in messages]  # type: ignore[arg-type]
        return self._plain.encode(turns)

    def grammar(self, use: ToolUse) -> Grammar | None:
        """Return what an answer has to match where a call is forced."""
        return call_grammar(use, is_array=self.call_token is not None) if use.forced else None

    def _describe_tools(self, messages: Sequence[ChatMessage], use: ToolUse) -> Sequence[ChatMessage]:
        if self.name == "demo":
            if use.forced:
                return messages
            raise bad_request(
                "this model's template has no place for tools; expected tool_choice required or a function's name, "
                "which hold the answer to the form of a call",
                param="tools",
            )
        return [ChatMessage("system", _tool_text(use.tools)), *messages]

    def _refuse_tool_turns(self, messages: Sequence[ChatMessage]) -> None:
        for index, message in enumerate(messages):
            if message.role == "tool" or message.tool_calls:
                raise bad_request(
                    f"messages[{index}]: this model's template ({self.name}) has no place for calls and their results; "
                    "expected messages of system, user and assistant",
                    param="messages",
                )

    def _encode_official(self, messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[int]:
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct.request import ChatCompletionRequest
        from pydantic import ValidationError

        _require_encodable(messages, tools)
        try:
            request: Any = ChatCompletionRequest(
                messages=[_official_message(message) for message in messages],
                tools=[_official_tool(tool) for tool in tools] or None,
            )
            ids: list[int] = self._official.encode_chat_completion(request).tokens
        except (MistralCommonException, ValidationError) as error:
            found = (str(error).strip().splitlines() or [""])[0]
            raise bad_request(
                f"this conversation does not fit the chat template ({self.name}): {found}", param="messages"
            ) from error
        return ids


def _find_piece(tokenizer: Tokenizer, piece: str) -> int | None:
    return next((each for each in range(min(64, tokenizer.vocab_size)) if tokenizer.piece(each) == piece), None)


def _require_encodable(messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> None:
    """Raise for lone surrogates anywhere: mistral-common would let them through to sentencepiece."""
    texts = [message.content for message in messages]
    texts += [call.arguments for message in messages for call in message.tool_calls]
    texts += [text for tool in tools for text in (tool.description, json.dumps(tool.parameters, ensure_ascii=False))]
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise bad_request("a text is not valid UTF-8: it holds half of a surrogate pair") from error


def _tool_text(tools: Sequence[Tool]) -> str:
    told = [{"name": tool.name, "description": tool.description, "parameters": tool.parameters} for tool in tools]
    return (
        "You can call these functions, each described by the JSON schema of its parameters:\n"
        f"{json.dumps(told, ensure_ascii=False)}\n"
        'To call one, answer with nothing but {"name": the function\'s name, "arguments": an object that fits its '
        "parameters}. Otherwise answer in words."
    )


def _official_message(message: ChatMessage) -> Any:
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage

    if message.role == "tool":
        return ToolMessage(content=message.content, tool_call_id=_mistral_id(message.tool_call_id or ""))
    if message.role == "assistant":
        calls = [_official_call(call) for call in message.tool_calls]
        return AssistantMessage(content=message.content or None, tool_calls=calls or None)
    return (SystemMessage if message.role == "system" else UserMessage)(content=message.content)


def _official_call(call: ToolCall) -> Any:
    from mistral_common.protocol.instruct.tool_calls import FunctionCall
    from mistral_common.protocol.instruct.tool_calls import ToolCall as OfficialCall

    return OfficialCall(
        id=_mistral_id(call.id), function=FunctionCall(name=call.name, arguments=_arguments(call.arguments))
    )


def _arguments(text: str) -> str:
    try:
        is_object = isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise bad_request(f"arguments of a call: expected a JSON object as text, found {text[:80]!r}", param="messages")
    return text


def _official_tool(tool: Tool) -> Any:
    from mistral_common.protocol.instruct.tool_calls import Function
    from mistral_common.protocol.instruct.tool_calls import Tool as OfficialTool

    return OfficialTool(function=Function(name=tool.name, description=tool.description, parameters=tool.parameters))


def _mistral_id(name: str) -> str:
    """Return the id, or nine letters that stand for one that another server made in another form."""
    return name if _MISTRAL_ID.fullmatch(name) else hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:9]
