"""What settings mean and how ``config.toml`` is changed: values and text, no disk.

The table of settings is :class:`mistral_fetch.config.Settings`; the line under each of its fields is what people
are told, so that a setting is declared in one place.
"""

from __future__ import annotations

import json
import re
from dataclasses import fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from mistral_fetch.config import Settings, parse_setting, parse_settings_text
from mistral_fetch.errors import ConfigError, UsageError

_PATHS = {"home", "ca_bundle", "catalog"}


@cache
def meanings() -> dict[str, str]:
    """Return what each setting means, from the text under its field; empty where Python's source is not kept."""
    import ast
    import inspect
    import textwrap

    told = {field.name: "" for field in fields(Settings)}
    try:
        (table,) = ast.parse(textwrap.dedent(inspect.getsource(Settings))).body
    except OSError:
        return told
    body = table.body if isinstance(table, ast.ClassDef) else []
    for declared, text in pairwise(body):
        if isinstance(declared, ast.AnnAssign) and isinstance(declared.target, ast.Name) and isinstance(text, ast.Expr):
            value = ast.literal_eval(text.value)
            told[declared.target.id] = " ".join(str(value).replace("``", "").split())
    return told


def first_sentence(name: str) -> str:
    """Return a setting's meaning in one line: up to the first full stop or semicolon."""
    return re.split(r"[.;](?:\s|$)", meanings()[name], maxsplit=1)[0]


def known_setting(name: str) -> str:
    """Return the name of a setting as the table has it; dashes and capitals are forgiven.

    Raises:
        UsageError: There is none; the nearest ones are named.
    """
    wanted = name.strip().lower().replace("-", "_")
    names = [field.name for field in fields(Settings)]
    if wanted in names:
        return wanted
    near = nearest(wanted, names)
    raise UsageError(
        f"there is no setting called {name!r}",
        detail=f"expected one of {', '.join(names)}",
        hint=f"did you mean {near}?" if near else "mistral-fetch config lists them with what they mean",
    )


def nearest(name: str, names: list[str]) -> str:
    """Return the names that look like ``name``, joined by "or"; empty where none does."""
    import difflib

    return " or ".join(difflib.get_close_matches(name, names, n=2))


def as_toml(name: str, value: str) -> str:
    """Return a value that was typed as TOML, in the type that its setting has.

    Raises:
        ConfigError: It is no value of this setting.
    """
    parsed = parse_setting(name, value, name)
    if isinstance(parsed, bool):
        return str(parsed).lower()
    if isinstance(parsed, tuple):
        return f"[{', '.join(_string(str(item)) for item in parsed or _none_of(name))}]"
    if isinstance(parsed, int | float) and re.fullmatch(r"\d{1,15}(\.\d+)?", value.strip()):
        return value.strip()
    return _string(_from_anywhere(value) if name in _PATHS else value)


def _from_anywhere(value: str) -> str:
    """Return a path as it can be found from every directory; addresses and ``~`` mean the same everywhere."""
    return value if not value or "://" in value or value.startswith("~") else str(Path(value).absolute())


def _none_of(name: str) -> tuple[str, ...]:
    return ("none",) if name == "trust_keys" else ()


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def changed(text: str, name: str, toml: str | None, where: str) -> str:
    """Return the text of ``config.toml`` with one setting set (or removed, with None), everything else as it was.

    Raises:
        ConfigError: The file is written in a way that only a person can change.
    """
    before = parse_settings_text(where, text)
    wanted = {key: value for key, value in before.items() if key != name}
    new = [] if toml is None else [f"{name} = {toml}\n"]
    if new:
        wanted |= parse_settings_text(where, new[0])
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    for start, end in _candidates(lines, name):
        candidate = "".join([*lines[:start], *_with_comment(lines[start:end], new), *lines[end:]])
        if _says(candidate, wanted):
            return candidate
    raise ConfigError(
        f"{name} in {where} cannot be changed without touching the rest of the file",
        detail=f"expected a line of its own, {name} = ...",
        hint="edit the file by hand",
    )


def _candidates(lines: list[str], name: str) -> list[tuple[int, int]]:
    """Return the ranges of lines that may be the setting, an array over several lines included; last the end."""
    key = re.compile(rf"\s*(?:{name}|\"{name}\"|'{name}')\s*=")
    starts = [number for number, line in enumerate(lines) if key.match(line)]
    return [(start, end) for start in starts for end in range(start + 1, min(len(lines), start + 200) + 1)] + [
        (len(lines), len(lines))
    ]


def _with_comment(old: list[str], new: list[str]) -> list[str]:
    """Keep the comment behind a value that stands on one line, as far as it surely is one."""
    comment = re.search(r"[^#\"']*(?:\"[^\"]*\"|'[^']*')?[^#\"']*?(\s*#[^\"']*)$", old[0].rstrip("\n")) if old else None
    if not new or len(old) != 1 or not comment:
        return new
    return [f"{new[0].rstrip()}{comment[1]}\n"]


def _says(text: str, wanted: dict[str, Any]) -> bool:
    try:
        return parse_settings_text("", text) == wanted
    except ConfigError:
        return False
