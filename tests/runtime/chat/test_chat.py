"""The chat as a whole: through pipes in this process, and on a terminal of its own."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mistral_runtime
from mistral_runtime.__main__ import main
from mistral_runtime.prompt import ChatTemplate, Message

PATIENCE_SECONDS = 60
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "NO_COLOR"},
    "PYTHONPATH": str(Path(mistral_runtime.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
    "TERM": "xterm",
}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory, write_snapshot):
    directory = tmp_path_factory.mktemp("chat") / "snapshot"
    write_snapshot(directory)
    return directory


@pytest.fixture(autouse=True)
def _one_thread_as_launched(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def asked(monkeypatch):
    """Every conversation that is asked about, oldest first."""
    seen = []
    real = ChatTemplate.encode

    def encode(self, messages):
        if messages[-1].content != "?":  # a check, not a question
            seen.append(list(messages))
        return real(self, messages)

    monkeypatch.setattr(ChatTemplate, "encode", encode)
    return seen


@pytest.fixture
def chat(monkeypatch, snapshot, capfd):
    """Hold a chat of these lines; give its exit code, stdout and stderr."""

    def hold(*lines, flags=()):
        data = b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        code = main(["chat", str(snapshot), "--chat-template", "v1", "--max-tokens", "3", *flags])
        return code, *capfd.readouterr()

    return hold


def questions(turns):
    return [message.content for message in turns if message.role == "user"]


def test_a_message_may_have_several_lines(chat, asked):
    chat('"""', "one", "/quit", '"""', "two \\", "lines", "//slash")
    assert questions(asked[-1]) == ["one\n/quit", "two \nlines", "/slash"]


def test_undo_and_retry(chat, asked):
    code, _, err = chat("one", "two", "/undo", "/retry", "three", "/retry", "/reset", "/undo", "/retry")
    assert [questions(turns) for turns in asked] == [["one"], ["one", "two"], ["one", "two"]] + 2 * [
        ["one", "two", "three"]
    ]
    assert (code, err.count("there is nothing to")) == (0, 2)
    assert "(took back: two)" in err


def test_the_system_prompt_and_settings_count_from_then_on(chat, asked):
    _, _, err = chat("one", "/system Be brief.", "/set max_tokens 1", "two", "/system none", "/set", "three")
    assert [turns[0] for turns in asked] == [
        *(Message("user", "one"), Message("system", "Be brief."), Message("user", "one"))
    ]
    assert "max_tokens          1" in err


def test_saved_in_one_chat_and_loaded_in_another(chat, asked, tmp_path):
    path = tmp_path / "a chat.json"
    chat("one", f'/save "{path}"', flags=["--system", "S"])
    _, _, err = chat(f'/load "{path}"', "two", f'/save "{path}"', f'/save -f "{path}"')
    assert [(m.role, m.content) for m in asked[-1] if m.role != "assistant"] == [
        *(("system", "S"), ("user", "one"), ("user", "two"))
    ]
    assert f"{path} is there already" in err
    assert len(json.loads(path.read_text())["messages"]) == 4


@pytest.mark.parametrize(
    "line, told",
    [
        ("/rest", "did you mean /reset?"),
        ("/", "there is no command /"),
        ("/set colour red", "there is no setting colour"),
        ("/set temperature", "/set needs a value"),
        ("/set temperature hot", "expected a number or none"),
        ("/save", "/save needs one file"),
        ("/load 'x", "close the quotes"),
        ("/load /dev/null", "is no saved conversation"),
        (b"caf\xe9\n", "not valid UTF-8"),
        ("word " * 200, "/reset starts over and /undo takes back"),
    ],
)
def test_what_cannot_be_done_is_told_and_the_chat_goes_on(chat, asked, line, told):
    code, _, err = chat(line, "ok", flags=["--context", "60"])
    assert (code, questions(asked[-1])) == (0, ["ok"])
    assert told in err


def test_a_loaded_conversation_cannot_draw_on_the_terminal(chat, tmp_path):
    path = tmp_path / "chat.json"
    hostile = [{"role": "user", "content": "\x1b[2J"}, {"role": "assistant", "content": "b"}]
    told = {"format": "mistral-fetch chat 1", "system": "\x1b]0;x\x07", "messages": hostile}
    path.write_text(json.dumps(told))
    _, _, err = chat(f"/load {path}", "/system", "/undo")
    assert "\x1b" not in err
    assert "\\u001b[2J" in err


def test_the_next_turn_computes_only_what_is_new(chat, monkeypatch):
    from mistral_runtime.engine import Engine

    generations = []
    real = Engine.generate

    def generate(self, request, **options):
        generations.append((len(request.prompt), real(self, request, **options)))
        return generations[-1][1]

    monkeypatch.setattr(Engine, "generate", generate)
    chat("one two three", "four")
    lengths, cached = zip(*((length, generation.cached_tokens) for length, generation in generations), strict=True)
    assert cached[0] == 0
    assert cached[1] >= lengths[0]


class Terminal:
    """A chat on a terminal of its own."""

    def __init__(self, snapshot, state, *flags):
        self._ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "mistral_runtime", "chat", snapshot, "--chat-template", "v1", *flags]
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**ENVIRONMENT, "XDG_STATE_HOME": str(state)},
            start_new_session=True,
        )
        os.close(theirs)
        self.seen = ""
        self._read = 0

    def __enter__(self):
        return self

    def __exit__(self, *_details):
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def wait_for(self, text):
        """Read until the text has come, and return what came before it since the last wait."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (at := self.seen.find(text, self._read)) < 0:
            assert select.select([self._ours], [], [], max(0, deadline - time.monotonic()))[0], self.seen
            try:
                self.seen += os.read(self._ours, 65536).decode("utf-8", "replace")
            except OSError as error:
                raise AssertionError(f"ended before {text!r}: {self.seen}") from error
        before, self._read = self.seen[self._read : at], at + len(text)
        return before

    def type(self, keys):
        os.write(self._ours, keys.encode())

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)


def test_on_a_terminal_lines_are_edited_kept_and_given_up(snapshot, tmp_path):
    flags = ("--max-tokens", 3)
    with Terminal(snapshot, tmp_path, *flags) as terminal:
        terminal.wait_for("> ")
        terminal.type("hello\n")
        terminal.wait_for("3 tokens")
        terminal.wait_for("tokens/s · context ")
        terminal.wait_for("> ")
        terminal.type("half a li")
        terminal.wait_for("half a li")
        terminal.interrupt()
        terminal.wait_for("(Ctrl-C again or Ctrl-D leaves)")
        terminal.wait_for("> ")
        terminal.type("/quit\n")
        assert terminal.process.wait(PATIENCE_SECONDS) == 0
    assert (tmp_path / "mistral-fetch/chat-history").read_text() == "hello\n/quit\n"
    with Terminal(snapshot, tmp_path, *flags) as terminal:
        terminal.wait_for("> ")
        terminal.type("\x1b[A\x1b[A")  # up twice
        terminal.wait_for("hello")
        terminal.interrupt()
        terminal.wait_for("leaves)")
        terminal.wait_for("> ")
        terminal.interrupt()
        assert terminal.process.wait(PATIENCE_SECONDS) == 130


def test_no_history_leaves_no_file_and_ctrl_d_leaves(snapshot, tmp_path):
    with Terminal(snapshot, tmp_path, "--max-tokens", 3, "--no-history") as terminal:
        terminal.wait_for("> ")
        terminal.type("hello\n")
        terminal.wait_for("tokens/s")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(PATIENCE_SECONDS) == 0
    assert list(tmp_path.iterdir()) == []
