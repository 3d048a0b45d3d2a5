"""``prune``: collect garbage, by a plan that is printed first and carried out only when told so."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistral_fetch.cli.options import FrontEnd, command
from mistral_fetch.cli.pruning import Done, carry_out, live_recipes, make_plan, prune_lock
from mistral_fetch.errors import NotInCache, UsageError
from mistral_fetch.units import format_duration, format_size, parse_duration

if TYPE_CHECKING:
    from mistral_fetch.store.inventory import Inventory
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.prune import Doomed
    from mistral_fetch.store.trash import TrashEntry


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    epilog = (
        "Exit codes: 0 ok (also with only a plan), 2 usage, 3 nothing to undo, 9 disk, 11 another prune is at work."
    )
    command(app, "prune", epilog=epilog)(prune)


def prune(
    front: FrontEnd,
    refs: Annotated[list[str] | None, typer.Argument(metavar="REF...", help="With --undo: these only.")] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Carry the plan out; without it, the plan is only printed.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and change nothing.")] = False,
    older_than: Annotated[
        str | None,
        typer.Option("--older-than", metavar="TIME", help="Also models that were not used for this long: 30d, 12h."),
    ] = None,
    high: Annotated[
        str | None,
        typer.Option(
            "--high", metavar="SIZE|N%", help="Above this, for the cache or the disk, models go (default: the quota)."
        ),
    ] = None,
    low: Annotated[
        str | None, typer.Option("--low", metavar="SIZE|N%", help="Down to this (default: the same).")
    ] = None,
    derived: Annotated[
        bool, typer.Option("--derived", help="Also converted weights that the runtime of this machine cannot use.")
    ] = False,
    trash: Annotated[
        bool, typer.Option("--trash/--no-trash", help="Keep what is removed for a while, or delete it at once.")
    ] = True,
    keep_trash: Annotated[
        str | None, typer.Option("--keep-trash", metavar="TIME", help="How long that is (default: 24h).")
    ] = None,
    undo: Annotated[
        bool, typer.Option("--undo", help="Bring back what was removed and is still in the trash.")
    ] = False,
) -> int:
    """Print what is garbage in the cache, and with --yes remove it: what nothing uses, and by age or size models."""
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.prune import Rules

    layout = Layout(front.settings.home)
    layout.check_version()
    if (yes and dry_run) or (refs and not undo):
        raise UsageError(
            "the options of prune exclude each other",
            detail="expected --yes or --dry-run, and models only with --undo",
            hint="to remove one model type: mistral-fetch rm REF",
        )
    if undo:
        return _undo(front, layout, refs or [])
    front = _with_keep_trash(front, keep_trash)
    age = None if older_than is None else _duration("--older-than", older_than)
    rules = Rules(older_than=age, live_recipes=live_recipes(front) if derived else None, keeps_trash=trash)
    rules = rules if age is None else replace(rules, partials_older_than=min(age, rules.partials_older_than))
    if not yes or not layout.home.is_dir():
        held, plan = make_plan(front, layout, rules, high, low)
        _tell(front, layout, held, Done(plan, [], [], set()), is_plan=True)
        return 0
    with prune_lock(front, layout):
        held, plan = make_plan(front, layout, rules, high, low)
        done = carry_out(layout, plan, keeps_trash=trash)
    _tell(front, layout, held, done, is_plan=False)
    return 0


def _tell(front: FrontEnd, layout: Layout, held: Inventory, done: Done, *, is_plan: bool) -> None:
    items = done.plan if is_plan else done.removed
    later = [item for item in items if item.name in done.trashed or (is_plan and item.kind == "model")]
    freed_now = sum(item.freed_bytes for item in items if item not in later)
    freed_later = sum(item.freed_bytes for item in later)
    fields = {
        "dry_run": is_plan,
        "cache_bytes": held.total_bytes,
        "quota_bytes": front.settings.cache_quota or None,
        "freed_bytes": freed_now,
        "trashed_bytes": freed_later,
        "items": [item_fields(item) for item in items],
        "kept": [{**item_fields(item), "used_by": owner} for item, owner in done.kept],
    }
    front.result(fields, _text(front, held, done, items, freed_now, freed_later, is_plan=is_plan))


def item_fields(item: Doomed) -> dict[str, Any]:
    """Return what ``--json`` says of one thing that goes."""
    return {
        "kind": item.kind,
        "name": item.name,
        "reason": item.reason,
        "bytes": item.freed_bytes,
        "path": str(item.path),
        "content_digest": item.model.content_digest if item.model else None,
    }


def _text(
    front: FrontEnd,
    held: Inventory,
    done: Done,
    items: list[Doomed],
    freed_now: int,
    freed_later: int,
    *,
    is_plan: bool,
) -> str:
    from mistral_fetch.cli.render import table

    lines = []
    if items:
        rows = [[item.kind, item.name, format_size(item.freed_bytes), item.reason] for item in items]
        lines.append(table(["REMOVE" if is_plan else "REMOVED", "WHAT", "SIZE", "WHY"], rows))
    lines += [f"kept {item.name}: {owner}" for item, owner in done.kept]
    if not items and not done.kept:
        return f"nothing to remove; the cache takes {format_size(held.total_bytes)}"
    told = f"{'would free' if is_plan else 'freed'} {format_size(freed_now)} of {format_size(held.total_bytes)}"
    if freed_later:
        told += f", and {format_size(freed_later)} {format_duration(front.settings.keep_trash)} later from the trash"
    lines.append(told)
    if is_plan and items:
        lines.append("nothing was changed; carry it out with the same command and --yes")
    elif done.trashed:
        lines.append("bring models back with: mistral-fetch prune --undo")
    return "\n".join(lines)


def _undo(front: FrontEnd, layout: Layout, refs: list[str]) -> int:
    from mistral_fetch.store.trash import bring_back, list_trash

    if not any(_chosen(entry, refs) for entry in list_trash(layout)):
        raise NotInCache(
            f"there is nothing to bring back in the cache at {layout.home}",
            detail=f"expected {', '.join(refs) or 'models'} in the trash, got none",
            hint="what was emptied from the trash has to be fetched again",
        )
    back: list[dict[str, Any]] = []
    broken: list[dict[str, Any]] = []
    with prune_lock(front, layout):
        for entry in list_trash(layout):
            if _chosen(entry, refs):
                names = ", ".join(dict.fromkeys(r.key for r in entry.records)) or entry.content_digest[:16]
                place = bring_back(layout, entry)
                (broken if place is None else back).append({"ref": names, "directory": str(place) if place else None})
    lines = [f"{model['ref']}: back in {model['directory']}" for model in back]
    lines += [
        f"{model['ref']}: its name is back, not all of its files: mistral-fetch pull {model['ref']}" for model in broken
    ]
    front.result({"restored": back, "incomplete": broken}, "\n".join(lines))
    return 0


def _chosen(entry: TrashEntry, refs: list[str]) -> bool:
    return not refs or any(record.key in refs for record in entry.records)


def _with_keep_trash(front: FrontEnd, text: str | None) -> FrontEnd:
    if text is None:
        return front
    return replace(front, settings=replace(front.settings, keep_trash=_duration("--keep-trash", text)))


def _duration(option: str, text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise UsageError(f"{option} cannot be used", detail=str(error), hint="type for example: 30d") from error
