"""``pin`` and ``unpin``: which models nothing removes but their owner; ``env``: where a model is, for shells."""

from __future__ import annotations

import json
import re
import shlex
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from mistral_fetch.cli.options import FrontEnd, command
from mistral_fetch.errors import NotInCache, UsageError

if TYPE_CHECKING:
    from mistral_fetch.store.layout import Layout

RefsArgument = Annotated[list[str] | None, typer.Argument(metavar="REF...")]


class Shell(str, Enum):
    """The languages that ``env`` speaks."""

    SH = "sh"
    FISH = "fish"
    POWERSHELL = "powershell"
    DOTENV = "dotenv"


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(app, "pin", epilog="Exit codes: 0 ok, 2 usage, 3 not in the cache, 9 disk.")(pin)
    command(app, "unpin", epilog="Exit codes: 0 ok, 2 usage, 3 not pinned, 9 disk.")(unpin)
    command(app, "env", epilog="Exit codes: 0 ok, 2 usage, 3 not complete in the cache.")(env)


def pin(front: FrontEnd, refs: Annotated[list[str], typer.Argument(metavar="REF...")]) -> int:
    """Keep models from being removed by prune, sync and rm."""
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.pins import write_pin
    from mistral_fetch.store.snapshots import find_refs

    layout = Layout(front.settings.home)
    keys = [_key(front, layout, text) for text in refs]
    for text, key in zip(refs, keys, strict=True):
        if not find_refs(layout, key):
            raise NotInCache(
                f"{text} is not in the cache at {layout.home}",
                detail="expected a model to pin, got none",
                hint=f"fetch it with: mistral-fetch pull {text}",
            )
    changed = [key for key in keys if write_pin(layout, key)]
    front.result({"pinned": keys, "changed": bool(changed)}, "\n".join(f"{key}: pinned" for key in keys))
    return 0


def unpin(front: FrontEnd, refs: Annotated[list[str], typer.Argument(metavar="REF...")]) -> int:
    """Let models be removed again."""
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.pins import is_pinned, remove_pin

    layout = Layout(front.settings.home)
    keys = [_key(front, layout, text) for text in refs]
    for text, key in zip(refs, keys, strict=True):
        if not is_pinned(layout, key):
            raise NotInCache(
                f"{text} is not pinned in the cache at {layout.home}",
                detail="expected a pinned model, got one that is not",
                hint="mistral-fetch list shows what is pinned",
            )
    for key in keys:
        remove_pin(layout, key)
    front.result({"unpinned": keys}, "\n".join(f"{key}: not pinned any more" for key in keys))
    return 0


def _key(front: FrontEnd, layout: Layout, text: str) -> str:
    from mistral_fetch.store.pins import is_pinned
    from mistral_fetch.transfer.local import local_key

    layout.check_version()
    return text if is_pinned(layout, text) else local_key(layout, text, front.settings)


def env(
    front: FrontEnd,
    ref: Annotated[str, typer.Argument(metavar="REF")],
    shell: Annotated[
        Shell, typer.Option("--shell", metavar="sh|fish|powershell|dotenv", help="Whose syntax (default: sh).")
    ] = Shell.SH,
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="The variable with the directory.")
    ] = "MISTRAL_FETCH_MODEL",
) -> int:
    """Print where a complete model is, as lines that set variables in a shell."""
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.use import note_use
    from mistral_fetch.transfer.local import require_local

    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", name):
        raise UsageError(
            f"{name[:80]!r} is no name of a variable",
            detail="expected letters, digits and underscores, and no digit first",
            hint="leave --name out for MISTRAL_FETCH_MODEL",
        )
    layout = Layout(front.settings.home)
    local = require_local(layout, ref, front.settings)
    note_use(layout, local.directory)
    values = {
        name: str(local.directory),
        f"{name}_REF": local.record.key,
        f"{name}_DIGEST": f"sha256:{local.record.content_digest}",
    }
    front.result(values, "\n".join(assignment(shell, key, value) for key, value in values.items()))
    return 0


def assignment(shell: Shell, name: str, value: str) -> str:
    """Return the line that sets a variable, quoted so that nothing in the value is more than text.

    Raises:
        UsageError: The value has a line break, which a dotenv file cannot hold.
    """
    if shell is Shell.SH:
        return f"export {name}={shlex.quote(value)}"
    if shell is Shell.FISH:
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"set -gx {name} '{escaped}'"
    if shell is Shell.POWERSHELL:
        # PowerShell takes typographic quotes for its own.
        return f"$env:{name} = '" + re.sub("(['\u2018\u2019\u201a\u201b])", r"\1\1", value) + "'"
    return f"{name}={_dotenv(value)}"


def _dotenv(value: str) -> str:
    """Quote for a dotenv file: single quotes keep everything as it is; double quotes where there is one."""
    if "\n" in value or "\r" in value:
        raise UsageError(
            "a dotenv file cannot hold this path",
            detail="expected a path without line breaks, got one with them",
            hint="use --shell sh, or another --home",
        )
    return f"'{value}'" if "'" not in value else json.dumps(value, ensure_ascii=False).replace("$", "\\$")
