"""Messages to token ids, by the template that the model was trained with.

mistral-common is Mistral's own statement of its templates and does the encoding. Ours is to find out which version
applies, because a file called plain `tokenizer.model` says v1 to mistral-common even where it is not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mistral_runtime.errors import BadRequest, NoChatTemplate
from mistral_runtime.tokenizer import Tokenizer

V3_VOCAB_SIZE = 32768  # v1 has 32,000 pieces; v2 and v3 add 768 control tokens and encode turns alike
TEMPLATES = ("v1", "v3", "demo")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


def resolve_template(choice: str, *, declared: tuple[bool, str | None], tokenizer: Tokenizer) -> str | None:
    """Return "v1", "v3", "demo", or None for a base model.

    Args:
        choice: The user's: one of TEMPLATES, "none", or "auto" to go by the directory's evidence.
        declared: What `snapshot.declared_chat_template` found.
        tokenizer: Tells the version where the evidence says only that there is a template.

    Raises:
        BadRequest: The directory names a template that is not known.
    """
    says, template = declared
    if choice != "auto":
        template = None if choice == "none" else choice
    elif not says:
        template = None
    if template == "auto":
        return tokenizer_version(tokenizer.path, tokenizer.vocab_size)
    if template is not None and template not in TEMPLATES:
        raise BadRequest(
            f"the snapshot asks for the unknown chat template {template!r}",
            detail=f"expected one of {', '.join(TEMPLATES)} or null in PROVENANCE.json",
            hint="name one with --chat-template",
        )
    return template


def tokenizer_version(path: Path, vocab_size: int) -> str:
    """Return "v1" or "v3" from the ending of the file's name, or from the vocabulary where the name is plain."""
    if path.name.endswith((".v2", ".v3")):
        return "v3"
    if path.name.endswith(".v1"):
        return "v1"
    return "v3" if vocab_size == V3_VOCAB_SIZE else "v1"


class ChatTemplate:
    """One way to write a conversation as tokens. `stop_strings` end an answer beside the EOS token."""

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        self.name = name
        self._tokenizer = tokenizer
        self.stop_strings: tuple[str, ...] = ("\n",) if name == "demo" else ()
        self._official = None if name == "demo" else official_tokenizer(tokenizer.path, name)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids that ask for the next answer; the last message is the user's.

        Raises:
            BadRequest: The template has no place for a message, or mistral-common refuses the conversation.
        """
        if self._official is None:
            return self._encode_demo(messages)
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct.request import ChatCompletionRequest
        from pydantic import ValidationError

        self._require_encodable(messages)
        try:
            request: Any = ChatCompletionRequest(messages=[_official_message(message) for message in messages])
            ids: list[int] = self._official.encode_chat_completion(request).tokens
        except (MistralCommonException, ValidationError) as error:
            raise BadRequest(
                "this conversation does not fit the chat template",
                detail=f"expected turns of user and assistant, found: {str(error).strip().splitlines()[0]}",
                hint="start over with /reset, or send the text as it is with --raw",
            ) from error
        return ids

    def _require_encodable(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self._tokenizer.encode(message.content)

    def _encode_demo(self, messages: Sequence[Message]) -> list[int]:
        """Write the conversation as the demo model was trained on it: one line per question and per answer."""
        if any(message.role == "system" for message in messages):
            raise BadRequest(
                "the demo model has no system prompt",
                detail="expected questions only, found a system message",
                hint="leave --system out",
            )
        lines = [
            f"{'Q' if message.role == 'user' else 'A'}: {' '.join(message.content.split())}\n" for message in messages
        ]
        return self._tokenizer.encode("".join(lines) + "A:")


def require_template(name: str | None, tokenizer: Tokenizer) -> ChatTemplate:
    """Return the template.

    Raises:
        NoChatTemplate: `name` is None: a base model.
    """
    if name is None:
        raise NoChatTemplate(
            "this is a base model: it continues text and has no chat template",
            detail="expected an instruct model, or evidence of a template in PROVENANCE.json or tokenizer_config.json",
            hint="let it continue a text with `run` (here `generate`), or name a template: --chat-template v1|v3",
        )
    return ChatTemplate(name, tokenizer)


def official_tokenizer(path: Path, name: str) -> Any:
    """Open the snapshot's tokenizer in mistral-common as version `name`, whatever the file is called.

    mistral-common reads the version from the ending of the name, so it is shown a link that has the right one.
    """
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    with tempfile.TemporaryDirectory(prefix="mistral-runtime-") as folder:
        link = Path(folder) / f"tokenizer.model.{name}"
        link.symlink_to(path.resolve())
        return MistralTokenizer.from_file(str(link))


def _official_message(message: Message) -> Any:
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage

    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    return kinds[message.role](content=message.content)
