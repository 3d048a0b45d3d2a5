"""What a line that begins with a slash does."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mistral_runtime.chat.conversation import Conversation
from mistral_runtime.chat.files import load_conversation, save_conversation
from mistral_runtime.errors import BadRequest
from mistral_runtime.terminal import escape_controls, write_err

HELP = "/help tells the commands, /quit or the end of input leaves, Ctrl-C stops an answer"
KEYS = (
    '""" on a line of its own begins and ends a message of several lines; a backslash at a line\'s end continues it.',
    "Ctrl-C stops an answer, or clears the line; twice, or Ctrl-D, leaves. // sends a line that begins with a slash.",
)


class Quit(Exception):
    """The person wants to leave."""


@dataclass(frozen=True)
class Command:
    """One command: what follows its name, what it does in a few words, and the doing."""

    arguments: str
    text: str
    run: Callable[[Conversation, str], None]


def run_command(line: str, conversation: Conversation) -> None:
    """Do what the line says.

    Raises:
        BadRequest: No such command, or it cannot be done.
        Quit: It was /quit.
    """
    name, _, rest = line.partition(" ")
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        raise BadRequest(
            f"there is no command {name}",
            detail=f"expected one of {' '.join(COMMANDS)}",
            hint=(f"did you mean {nearest[0]}? " if nearest else "") + "a line that begins with // is sent with one /",
        )
    COMMANDS[name].run(conversation, rest.strip())


def _say(text: str) -> None:
    """Show a line; what a loaded file brought must not draw on the terminal."""
    write_err(escape_controls(text))


def _reset(conversation: Conversation, _rest: str) -> None:
    conversation.reset()
    _say("the conversation starts over")


def _undo(conversation: Conversation, _rest: str) -> None:
    question = " ".join(conversation.undo().split())
    _say(f"(took back: {question if len(question) <= 60 else question[:59] + '…'})")


def _retry(conversation: Conversation, _rest: str) -> None:
    conversation.retry()


def _system(conversation: Conversation, rest: str) -> None:
    if rest:
        conversation.set_system(None if rest == "none" else rest)
    _say("(no system prompt)" if conversation.system is None else f"(system prompt: {conversation.system})")


def _set(conversation: Conversation, rest: str) -> None:
    if not rest:
        _say(conversation.settings.listing())
        return
    name, _, value = rest.replace("=", " ", 1).partition(" ")
    if not value.strip():
        raise BadRequest("/set needs a value", detail=f"expected /set NAME VALUE, found {rest}", hint="or /set alone")
    conversation.settings = conversation.settings.changed(name, value.strip())
    _say(f"({name.replace('-', '_')} is {value.strip()})")


def _save(conversation: Conversation, rest: str) -> None:
    words = _words(rest)
    may_replace = words[:1] == ["-f"]
    path = _one_path("/save", words[may_replace:])
    save_conversation(path, conversation.system, conversation.turns, may_replace=may_replace)
    _say(f"(saved {len(conversation.turns) // 2} turns to {path})")


def _load(conversation: Conversation, rest: str) -> None:
    path = _one_path("/load", _words(rest))
    system, turns = load_conversation(path)
    conversation.replace(system, turns)
    _say(f"(loaded {len(turns) // 2} turns from {path})")


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BadRequest("the file's name is not clear", detail=f"found: {error}", hint="close the quotes") from error


def _one_path(command: str, words: list[str]) -> Path:
    if len(words) != 1:
        raise BadRequest(
            f"{command} needs one file",
            detail=f"expected a name, found {len(words)}",
            hint=f'{command} FILE, in quotes where the name has spaces: {command} "my chat.json"',
        )
    try:
        return Path(words[0]).expanduser()
    except RuntimeError:  # ~nobody
        return Path(words[0])


def _help(_conversation: Conversation, _rest: str) -> None:
    width = max(len(f"{name} {command.arguments}") for name, command in COMMANDS.items())
    lines = [f"{f'{name} {command.arguments}':<{width}}  {command.text}" for name, command in COMMANDS.items()]
    _say("\n".join([*lines, *KEYS]))


def _quit(_conversation: Conversation, _rest: str) -> None:
    raise Quit


COMMANDS = {
    "/reset": Command("", "start over; system prompt and settings stay", _reset),
    "/undo": Command("", "take back the last question and its answer", _undo),
    "/retry": Command("", "ask the last question again", _retry),
    "/system": Command("[TEXT]", "show or change the system prompt; none removes it", _system),
    "/set": Command("[NAME VALUE]", "list the settings, or change one; none brings its default back", _set),
    "/save": Command("[-f] FILE", "write the conversation to a file; -f replaces one", _save),
    "/load": Command("FILE", "go on from a saved conversation", _load),
    "/help": Command("", "show this", _help),
    "/quit": Command("", "leave", _quit),
}
