"""What the shell is offered behind a TAB: models by name, and the second words of commands that have them.

Runs at every press of the key, so it reads the catalog and the names in the cache, and loads nothing heavy; what
cannot be read offers nothing, for a shell has no place for an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand

MAX_OFFERED = 200
# These work on what the cache holds; the others fetch what is missing.
_ONLY_HELD = frozenset({"verify", "repair", "path", "rm", "seed", "mirror"})
# A name with anything else in it could mean something to the shell.
_PLAIN = re.compile(r"[A-Za-z0-9][\w.@:/#+,=%-]{0,255}")


def complete_ref(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the references that begin with what was typed."""
    offered = [*_second_words(ctx), *_refs(ctx)]
    return [name for name in dict.fromkeys(offered) if name.startswith(incomplete)][:MAX_OFFERED]


def _second_words(ctx: Any) -> Iterator[str]:
    """Give ``check`` behind ``mirror``."""
    siblings: Iterable[str] = getattr(ctx.parent.command, "commands", ()) if ctx.parent else ()
    for name in siblings:
        first, _, second = name.partition(" ")
        if second and first == ctx.info_name:
            yield second


def _refs(ctx: Any) -> list[str]:
    from mistral_fetch.config import load_settings
    from mistral_fetch.errors import MistralFetchError
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.snapshots import list_refs

    flags = {name: ctx.params.get(name) for name in ("home", "catalog")}
    try:
        settings = load_settings(flags).values
        held = [record.key for record in list_refs(Layout(settings.home))]
        known = [] if ctx.info_name in _ONLY_HELD else list(_catalog_names(settings))
    except (MistralFetchError, OSError):
        return []
    return [name for name in [*held, *known] if _PLAIN.fullmatch(name)]


def _catalog_names(settings: Any) -> Iterator[str]:
    if "://" in settings.catalog:
        return  # only a signature check could say whether the copy that is here may be believed
    from mistral_fetch.transfer.local import settings_catalog

    releases = settings_catalog(settings).releases
    yield from dict.fromkeys(release.name for release in releases)
    yield from (release.ref for release in releases)


@dataclass
class Word:
    """One thing to offer, as the libraries' own class for it looks."""

    value: str
    type: str = "plain"
    help: str | None = None


class Command(TyperCommand):
    """A command whose options, and second words, are offered without their help: drawing that would load rich."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Return what may follow."""
        items = super().shell_complete(ctx, incomplete)
        words = [Word(word) for word in _second_words(ctx) if word.startswith(incomplete)]
        return [*without_help(items), *words]


def without_help(items: list[Any]) -> list[Any]:
    """Return the items with nothing but their names."""
    for item in items:
        item.help = None
    return items
