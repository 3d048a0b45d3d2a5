"""Write ``docs/cli.md`` from the program's own commands, so that the two cannot disagree.

    python tools/generate_cli_reference.py            write it
    python tools/generate_cli_reference.py --check    exit with 1 when it is stale

Names, metavars and sentences are those of ``mistral-fetch COMMAND --help``; their layout is Markdown's, which stays
the same whatever the width of a terminal and the version of the library that draws the help.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from generated_page import write_or_check

from mistral_fetch.cli.app import app
from mistral_fetch.cli.options import SHARED_OPTIONS

TARGET = Path(__file__).parents[1] / "docs" / "cli.md"
_HELP = "help"

_INTRODUCTION = """\
# Command-line reference

Generated from the program by `make docs`; do not edit. The same words are in `mistral-fetch COMMAND --help`.

Results go to standard output and nothing else does; progress, notes and errors go to standard error.
What each exit code means: [exit-codes.md](exit-codes.md).
Settings that have no option: [configuration.md](configuration.md).
"""


def generate() -> str:
    """Return the whole page."""
    group: Any = typer.main.get_command(app)
    commands = dict(group.commands)
    parts = [_INTRODUCTION, "\n".join(_overview(commands))]
    first = next(iter(commands.values()))
    shared = [parameter for parameter in first.params if parameter.name in SHARED_OPTIONS]
    parts.append("\n".join(["## Every command", "", *_table("option", shared)]))
    parts += ["\n".join(_command(name, command)) for name, command in commands.items()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _overview(commands: dict[str, Any]) -> Iterator[str]:
    yield "| command | does |"
    yield "|---|---|"
    for name, command in commands.items():
        yield f"| [`{name}`](#{name.replace(' ', '-')}) | {_cell(command.help)} |"


def _command(name: str, command: Any) -> Iterator[str]:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [
        parameter
        for parameter in command.params
        if parameter.param_type_name == "option" and parameter.name not in {*SHARED_OPTIONS, _HELP}
    ]
    words = [argument.metavar if argument.required else f"[{argument.metavar}]" for argument in arguments]
    yield f"## {name}"
    yield ""
    yield f"    mistral-fetch {' '.join([name, '[OPTIONS]', *words])}"
    yield ""
    yield _cell(command.help)
    if any(argument.help for argument in arguments):
        yield ""
        yield from _table("argument", arguments)
    if options:
        yield ""
        yield from _table("option", options)
    yield ""
    yield command.epilog


def _table(heading: str, parameters: Sequence[Any]) -> Iterator[str]:
    yield f"| {heading} | meaning |"
    yield "|---|---|"
    for parameter in parameters:
        required = " Required." if parameter.required and parameter.param_type_name == "option" else ""
        yield f"| {_names(parameter)} | {_cell(parameter.help or '')}{required} |"


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{_cell(parameter.metavar)}`"
    longest = max(parameter.opts, key=len)
    named = {name: name for name in (*parameter.opts, *parameter.secondary_opts)}
    if parameter.metavar:
        named[longest] = f"{longest} {_cell(parameter.metavar)}"
    return ", ".join(f"`{text}`" for text in sorted(named.values(), key=len))


def _cell(text: str) -> str:
    # A bar would end the cell, even in code.
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(write_or_check(TARGET, generate(), sys.argv[1:]))
