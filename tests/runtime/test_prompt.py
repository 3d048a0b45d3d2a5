"""Prompts: equal to mistral-common's and to the published ids, whatever the tokenizer file is called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mistral_runtime.errors import BadRequest, MalformedConfig, NoChatTemplate
from mistral_runtime.prompt import ChatTemplate, Message, require_template, resolve_template, tokenizer_version
from mistral_runtime.snapshot import declared_chat_template, find_tokenizer
from mistral_runtime.tokenizer import Tokenizer

DATA = Path(mistral_common.__file__).parent / "data"
FILES = {"v1": DATA / "tokenizer.model.v1", "v3": DATA / "mistral_instruct_tokenizer_240323.model.v3"}
# The file in the v0.3 repositories is mistral-common's v2 bundle under another name.
V03_FILE = DATA / "mistral_instruct_tokenizer_240216.model.v2"

CONVERSATIONS = [
    [Message("user", "Hello")],
    [Message("system", "Be brief."), Message("user", "Hello")],
    [Message("user", "Hi"), Message("assistant", "Hello!"), Message("user", "And now?")],
    [
        Message("system", "Sei kurz."),
        Message("user", "Grüße"),
        Message("assistant", "Ja."),
        Message("user", "日本語? 👩‍👩‍👧"),
    ],
    [Message("user", "  spaces  and\n\nlines\t")],
    [Message("user", "[INST] not a marker [/INST] </s>")],
]


def _official(name: str, messages: list[Message]) -> list[int]:
    kinds: dict[str, Any] = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    tokenizer = MistralTokenizer.v1() if name == "v1" else MistralTokenizer.v3()
    request: Any = ChatCompletionRequest(messages=[kinds[m.role](content=m.content) for m in messages])
    ids: list[int] = tokenizer.encode_chat_completion(request).tokens
    return ids


@pytest.mark.parametrize("name", ["v1", "v3"])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
@pytest.mark.parametrize("file_name", ["as-published", "tokenizer.model"])
def test_prompts_equal_those_of_mistral_common(
    name: str, messages: list[Message], file_name: str, tmp_path: Path
) -> None:
    path = FILES[name]
    if file_name != "as-published":
        path = tmp_path / file_name
        shutil.copy(FILES[name], path)
    assert ChatTemplate(name, Tokenizer(path)).encode(messages) == _official(name, messages)


def test_v1_writes_its_markers_as_text() -> None:
    template = ChatTemplate("v1", Tokenizer(FILES["v1"]))
    ids = template.encode([Message("user", "Hi"), Message("assistant", "Yo"), Message("user", "Hi")])
    opening, closing = [733, 16289, 28793], [733, 28748, 16289, 28793]
    assert ids[:4] == [1, *opening]
    assert ids[-4:] == closing
    assert ids.count(1) == 1
    assert ids.count(2) == 1


def test_v3_writes_its_markers_as_single_tokens() -> None:
    ids = ChatTemplate("v3", Tokenizer(FILES["v3"])).encode([Message("user", "Hi")])
    assert ids[:2] == [1, 3]
    assert ids[-1] == 4


def test_v1_puts_the_system_prompt_first_and_v3_last() -> None:
    turns = [
        Message("system", "SYS"),
        Message("user", "one"),
        Message("assistant", "two"),
        Message("user", "three"),
    ]
    for name, before, after in (("v1", "SYS", "one"), ("v3", "two", "SYS")):
        tokenizer = Tokenizer(FILES[name])
        text = tokenizer.decode(ChatTemplate(name, tokenizer).encode(turns))
        assert text.index(before) < text.index(after)


def test_v03_file_under_its_plain_name_is_recognised_by_its_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    shutil.copy(V03_FILE, path)
    tokenizer = Tokenizer(path)
    assert tokenizer_version(path, tokenizer.vocab_size) == "v3"
    assert ChatTemplate("v3", tokenizer).encode([Message("user", "Hi")])[:2] == [1, 3]


@pytest.mark.parametrize(
    "name, vocab_size, version",
    [
        ("tokenizer.model", 32000, "v1"),
        ("tokenizer.model", 32768, "v3"),
        ("tokenizer.model.v1", 32768, "v1"),
        ("tokenizer.model.v2", 32768, "v3"),
        ("tokenizer.model.v3", 32000, "v3"),
    ],
)
def test_version_comes_from_the_name_then_the_vocabulary(name: str, vocab_size: int, version: str) -> None:
    assert tokenizer_version(Path(name), vocab_size) == version


def test_the_versioned_tokenizer_file_is_preferred(tmp_path: Path) -> None:
    for name in ("tokenizer.model", "tokenizer.model.v3"):
        shutil.copy(V03_FILE, tmp_path / name)
    assert find_tokenizer(tmp_path).name == "tokenizer.model.v3"


# --- which template ---------------------------------------------------------------------------------------------------


def _resolve(directory: Path, choice: str = "auto") -> str | None:
    tokenizer = Tokenizer(FILES["v1"])
    return resolve_template(choice, declared=declared_chat_template(directory), tokenizer=tokenizer)


def test_a_bare_directory_is_a_base_model(tmp_path: Path) -> None:
    assert _resolve(tmp_path) is None
    with pytest.raises(NoChatTemplate) as caught:
        require_template(None, Tokenizer(FILES["v1"]))
    assert caught.value.exit_code == 2
    assert "--chat-template" in caught.value.hint


@pytest.mark.parametrize("declared", ["v1", "v3", "demo", None])
def test_provenance_decides(declared: str | None, tmp_path: Path) -> None:
    (tmp_path / "PROVENANCE.json").write_text(json.dumps({"chat_template": declared, "files": []}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert _resolve(tmp_path) == declared


def test_provenance_without_the_key_leaves_it_to_the_directory(tmp_path: Path) -> None:
    (tmp_path / "PROVENANCE.json").write_text(json.dumps({"files": []}))
    assert _resolve(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert _resolve(tmp_path) == "v1"


def test_the_flag_wins_over_every_evidence(tmp_path: Path) -> None:
    (tmp_path / "PROVENANCE.json").write_text(json.dumps({"chat_template": "v1"}))
    assert _resolve(tmp_path, "none") is None
    assert _resolve(tmp_path, "v3") == "v3"


def test_unknown_template_in_provenance_is_told(tmp_path: Path) -> None:
    (tmp_path / "PROVENANCE.json").write_text(json.dumps({"chat_template": "v99"}))
    with pytest.raises(BadRequest, match="v99"):
        _resolve(tmp_path)


def test_damaged_provenance_is_told(tmp_path: Path) -> None:
    (tmp_path / "PROVENANCE.json").write_text("{")
    with pytest.raises(MalformedConfig, match=r"PROVENANCE\.json"):
        _resolve(tmp_path)


# --- the demo format --------------------------------------------------------------------------------------------------


def test_demo_writes_every_turn_on_one_line() -> None:
    tokenizer = Tokenizer(FILES["v1"])
    template = ChatTemplate("demo", tokenizer)
    turns = [Message("user", "first"), Message("assistant", "x"), Message("user", " What\n is  it? ")]
    assert template.encode(turns) == tokenizer.encode("Q: first\nA: x\nQ: What is it?\nA:")
    assert template.encode(turns[-1:]) == tokenizer.encode("Q: What is it?\nA:")
    assert template.stop_strings == ("\n",)


def test_demo_has_no_place_for_a_system_prompt() -> None:
    with pytest.raises(BadRequest, match="--system"):
        ChatTemplate("demo", Tokenizer(FILES["v1"])).encode([Message("system", "x"), Message("user", "y")])


def test_two_questions_in_a_row_are_no_bug(tmp_path: Path) -> None:
    # mistral-common merges or refuses them by version; either way no traceback.
    template = ChatTemplate("v3", Tokenizer(FILES["v3"]))
    with pytest.raises(BadRequest):
        template.encode([Message("user", "a"), Message("assistant", "b")])
