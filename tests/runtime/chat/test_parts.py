"""The parts of the chat that need no model: settings, saved files, the history, reading of messages."""

from __future__ import annotations

import json
import stat

import pytest

from mistral_runtime.chat.files import FORMAT, MAX_FILE_BYTES, load_conversation, save_conversation
from mistral_runtime.chat.history import MAX_BYTES, MAX_ENTRIES, MAX_ENTRY_BYTES, HistoryFile, history_path
from mistral_runtime.chat.reading import Typed, read_message
from mistral_runtime.chat.settings import Settings
from mistral_runtime.errors import BadRequest
from mistral_runtime.prompt import Message

TURNS = [Message("user", "Grüße?\n\x1b[31m"), Message("assistant", "“Hi”")]


class Lines:
    def __init__(self, *lines):
        self._lines = list(lines)

    def line(self, prompt):
        return self._lines.pop(0) if self._lines else None


@pytest.mark.parametrize(
    "lines, expected",
    [
        (["hello "], Typed("hello")),
        (['"""', "a", "", " b", '"""', "c"], Typed("a\n\n b", is_quoted=True)),
        (['"""', "a"], Typed("a", is_quoted=True)),
        (["a\\", "b\\", "c"], Typed("a\nb\nc", is_quoted=True)),
        (["a\\"], Typed("a")),
        ([], None),
    ],
)
def test_lines_make_one_message(lines, expected):
    assert read_message(Lines(*lines)) == expected


def test_a_message_without_end_is_refused(monkeypatch):
    monkeypatch.setattr("mistral_runtime.chat.reading.MAX_PROMPT_BYTES", 100)
    for lines in (['"""', *["x" * 30] * 9], ["x" * 30 + "\\"] * 9):
        with pytest.raises(BadRequest, match="too long"):
            read_message(Lines(*lines))


def test_settings_change_one_value_at_a_time_and_go_back():
    changed = Settings().changed("temperature", "0.7").changed("top-p", "0.9").changed("seed", "3")
    assert (changed.sampling.temperature, changed.sampling.top_p, changed.sampling.seed) == (0.7, 0.9, 3)
    assert changed.changed("max_tokens", "12").max_tokens == 12
    assert changed.changed("temperature", "none").sampling.temperature == 0
    assert "temperature         0.7" in changed.listing()


@pytest.mark.parametrize(
    "name, value",
    [
        *(("temperature", text) for text in ("hot", "-1", "nan", "11")),
        *(("top_p", "0"), ("top_k", "1.5"), ("seed", "-1"), ("max_tokens", "0"), ("min_p", "1"), ("colour", "1")),
        ("seed", "9" * 5000),
    ],
)
def test_a_wrong_value_is_refused(name, value):
    with pytest.raises(BadRequest) as caught:
        Settings().changed(name, value)
    assert "/set" in caught.value.hint


def test_a_conversation_comes_back_as_it_was_saved(tmp_path):
    path = tmp_path / "chat.json"
    save_conversation(path, "Be brief.", TURNS, may_replace=False)
    assert load_conversation(path) == ("Be brief.", TURNS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_is_replaced_only_when_asked(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text("mine")
    with pytest.raises(BadRequest) as caught:
        save_conversation(path, None, TURNS, may_replace=False)
    assert (path.read_text(), caught.value.hint) == ("mine", f"/save -f {path} replaces it")
    save_conversation(path, None, TURNS, may_replace=True)
    assert load_conversation(path)[1] == TURNS
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_takes_no_file_is_refused(tmp_path):
    for path in (tmp_path / "none" / "chat.json", tmp_path / "nul\0"):
        for may_replace in (True, False):
            with pytest.raises(BadRequest):
                save_conversation(path, None, TURNS, may_replace=may_replace)


def saved(**changes):
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return json.dumps({"format": FORMAT, "system": None, "messages": turn, **changes}).encode()


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"garbage", b"\xff\xfe", b"[]", b"{}", b"[" * 100_000, b" " * (MAX_FILE_BYTES + 1)),
        *(
            saved(format="other"),
            saved(system=1),
            saved(messages={}),
            saved(messages=[{"role": "user", "content": "a"}]),
        ),
        saved(messages=[{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]),
        saved(messages=[{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "b"}]),
        saved(messages=[{"role": "user", "content": " "}, {"role": "assistant", "content": "b"}]),
        saved(messages=[None, 1]),
    ],
    ids=range(15),
)
def test_what_no_save_has_written_is_refused(tmp_path, data):
    path = tmp_path / "chat.json"
    path.write_bytes(data)
    with pytest.raises(BadRequest, match="is no saved conversation"):
        load_conversation(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(BadRequest, match="is no saved conversation"):
            load_conversation(path)


def test_history_is_private_and_comes_back(tmp_path):
    path = history_path({"XDG_STATE_HOME": str(tmp_path)})
    assert path == tmp_path / "mistral-fetch/chat-history"
    for line in ("one", "two\nlines", "x" * (MAX_ENTRY_BYTES + 1)):
        assert HistoryFile(path).add(line) is None
    assert HistoryFile(path).read() == ["one", "two lines"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_relative_state_directory_counts_as_none():
    assert str(history_path({"XDG_STATE_HOME": "here", "HOME": "/home/me"})).startswith("/home/me/.local/state/")


def test_a_history_that_has_grown_is_cut(tmp_path):
    path = tmp_path / "history"
    path.write_text("".join(f"line {n} {'x' * 100}\n" for n in range(2 * MAX_BYTES // 100)))
    lines = HistoryFile(path).read()
    assert len(lines) == MAX_ENTRIES
    assert all(line.startswith("line ") for line in lines)
    assert path.stat().st_size < MAX_BYTES
    assert HistoryFile(path).read()[-1] == lines[-1]


def test_a_history_that_cannot_be_kept_says_why_and_follows_no_link(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert HistoryFile(tmp_path / "link").add("x")
    assert (tmp_path / "target").read_text() == "precious"
    assert HistoryFile(tmp_path / "target" / "below").add("x")
    assert HistoryFile(tmp_path / "target" / "below").read() == []
