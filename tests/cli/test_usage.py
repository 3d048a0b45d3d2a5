"""Mistakes in the command line: three lines, exit code 2, nothing on standard output."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

COMMANDS = (
    "run",
    "chat",
    "pull",
    "serve",
    "lock",
    "sync",
    "bench",
    "ppl",
    "logits",
    "quantize",
    "verify",
    "path",
    "list",
    "rm",
    "pin",
    "unpin",
    "env",
    "prune",
    "repair",
    "show",
    "compare",
    "publish",
    "sign",
    "seed",
    "mirror",
    "mirror check",
    "bundle create",
    "bundle verify",
    "bundle import",
    "export hf",
    "export gguf-source",
    "export ollama",
    "export oci",
    "doctor",
    "config",
    "config path",
    "config get",
    "config set",
    "config unset",
    "config explain",
    "completion",
    "demo",
)


@pytest.mark.parametrize(
    "arguments, what, hint",
    [
        (["pull"], "Missing argument 'REF...'", "type: mistral-fetch pull --help"),
        (["path"], "Missing argument 'REF'", "type: mistral-fetch path --help"),
        (["frobnicate"], "No such command 'frobnicate'", "type: mistral-fetch --help"),
        (["list", "--frobnicate"], "No such option: --frobnicate", "type: mistral-fetch list --help"),
        (["publish", "x"], "Missing option '--out'", "type: mistral-fetch publish --help"),
        (["pull", "x", "--home"], "Option '--home' requires an argument", "type: mistral-fetch --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_explained(program, arguments, what, hint):
    shown = program(*arguments)
    first, second, third = shown.err.splitlines()
    assert (shown.code, shown.out) == (2, "")
    assert first == f"error: {what}"
    assert second.startswith("  expected: mistral-fetch ")
    assert third == f"  {hint}"


@pytest.mark.parametrize("option, value", [("--via", "pigeon"), ("--lock-timeout", "soon"), ("--progress", "loud")])
def test_a_value_that_no_option_takes_is_named(program, option, value):
    shown = program("pull", "mistral-7b", option, value)
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.startswith(f"error: Invalid value for '{option}': ")
    assert len(shown.err.splitlines()) == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["pull", "x", "--min-assurance", "certain"],
        ["pull", "x", "--peer", "nowhere"],
        ["pull", "x", "--lock-timeout", "-1"],
        ["pull", "one/two"],
        ["pull", "208b101a0f51514ecf285885a8b0f6fb1a1e4d7d"],
        ["pull", "./here"],
        ["pull", ""],
    ],
    ids=" ".join,
)
def test_a_value_that_makes_no_sense_is_refused_before_anything_happens(program, arguments):
    shown = program(*arguments)
    assert (shown.code, shown.out) == (2, "")
    assert len(shown.err.splitlines()) == 3
    assert not program.home.exists()


def test_without_arguments_the_help_is_shown_and_the_exit_code_says_that_nothing_was_done(program):
    shown = program()
    assert (shown.code, shown.out) == (2, "")
    assert "Usage: mistral-fetch" in shown.err
    assert "Traceback" not in shown.err


def test_help_lists_every_command_with_a_whole_sentence(program):
    shown = program("--help")
    assert (shown.code, shown.err) == (0, "")
    listed = shown.out.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    names = [line[2:].partition("  ")[0] for line in listed if line.startswith("  ") and line[2] != " "]
    assert names == list(COMMANDS)
    assert not any(line.endswith("...") for line in listed)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_its_exit_codes(program, command):
    shown = program(*command.split(), "-h")
    assert (shown.code, shown.err) == (0, "")
    assert "Exit codes: 0 " in shown.out
    for option in ("--json", "--progress", "--quiet", "--no-color", "--offline", "--home"):
        assert option in shown.out


def test_an_unknown_name_gets_the_nearest_ones(program):
    for command in ("pull", "path", "show", "run"):
        shown = program(command, "mistral-7b-instrct", *(["hello"] if command == "run" else []))
        first, second, third = shown.err.splitlines()
        assert (shown.code, shown.out) == (3, "")
        assert first == "error: no model is called 'mistral-7b-instrct'"
        assert second.strip().startswith("expected one of the catalog's")
        assert "mistral-7b-instruct" in third
        assert "mistral-fetch list --catalog" in third


def test_run_on_a_terminal_without_a_prompt_says_how_to_give_one(program, environment):
    terminal = Mock()
    terminal.isatty.return_value = True
    shown = program("run", "mistral-7b", stdin=terminal)
    assert (shown.code, shown.out) == (2, "")
    assert 'type: mistral-fetch run mistral-7b "Your prompt"' in shown.err
