"""What ``prune`` removes and why: a plan from an inventory and rules, pure, and its execution piece by piece.

A time in the future, left by a clock that was wrong, counts as now: nothing is old because of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mistral_fetch.errors import StoreLocked
from mistral_fetch.store.derived import discard_derived
from mistral_fetch.store.durable import disk_errors
from mistral_fetch.store.gc import RemovalPlan, execute_removal, held_for_removal
from mistral_fetch.store.inventory import HeldModel, Inventory
from mistral_fetch.store.layout import Layout, unquote_name
from mistral_fetch.store.lock import locked
from mistral_fetch.store.trash import empty_entry, move_to_trash, remove_unused_blobs
from mistral_fetch.units import format_duration, format_size

DRAFT_AGE_SECONDS = 86_400.0
# A pull that is at work right now names its blobs only at its end.
BLOB_AGE_SECONDS = 3600.0


@dataclass(frozen=True)
class Rules:
    """When something has to go. Ages are in seconds, sizes in bytes.

    ``to_free_above`` and ``to_free_below`` are watermarks of what the cache takes: above the first, the models that
    were used least recently go until it takes no more than the second. ``live_recipes`` are the keys of copies that
    this machine can use; None where that is unknown, and all are kept. With ``only_models``, all models that have none
    of these names go, and nothing else does.
    """

    older_than: float | None = None
    partials_older_than: float = 14 * 86_400.0
    to_free_above: int | None = None
    to_free_below: int | None = None
    live_recipes: Collection[str] | None = None
    only_models: Collection[str] | None = None
    keeps_trash: bool = True


@dataclass(frozen=True)
class Doomed:
    """One thing to remove. ``kind`` is model, derived, partial, draft, blobs or trash."""

    kind: str
    name: str
    reason: str
    freed_bytes: int
    path: Path
    model: HeldModel | None = None
    blobs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Ages:
    """How old things are, by name or path, in seconds; a thing whose age is not known is new."""

    trash_expired: frozenset[Path] = frozenset()
    touched: dict[Path, float] = field(default_factory=dict)
    blobs: dict[str, float] = field(default_factory=dict)


def plan_prune(layout: Layout, held: Inventory, rules: Rules, ages: Ages, now: float) -> list[Doomed]:
    """Return what has to go, in the order in which it goes."""
    plan = list(_rubbish(layout, held, rules, ages))
    kept = [model for model in held.models if not _is_orphan(model)]
    doomed = {model.content_digest: reason for model in kept if (reason := _why(model, rules, now))}
    if rules.only_models is None:
        doomed |= _over_the_mark(held, rules, doomed, sum(i.freed_bytes for i in plan if i.kind != "trash"), now)
    orphans = [(model, "no name leads to it") for model in held.models if _is_orphan(model)]
    chosen = orphans + [(model, doomed[model.content_digest]) for model in kept if model.content_digest in doomed]
    owners = held.owners
    for model, reason in sorted(chosen, key=lambda pair: pair[0].used_at):
        freed = held.exclusive_bytes(model, owners)
        owners.subtract(model.blobs)
        name = ", ".join(dict.fromkeys(record.key for record in model.records)) or model.content_digest[:16]
        plan.append(Doomed("model", name, reason, freed, layout.snapshot(model.content_digest), model))
    return plan


def _is_orphan(model: HeldModel) -> bool:
    return not model.records


def _why(model: HeldModel, rules: Rules, now: float) -> str:
    if model.is_pinned:
        return ""
    if rules.only_models is not None:
        listed = any(record.key in rules.only_models for record in model.records)
        return "" if listed else "not listed"
    age = now - model.used_at
    if rules.older_than is not None and age >= rules.older_than:
        return f"not used for {format_duration(age)}"
    return ""


def _over_the_mark(
    held: Inventory, rules: Rules, doomed: Collection[str], rubbish_bytes: int, now: float
) -> dict[str, str]:
    """Return the models that were used least recently and have to go for the watermarks."""
    if rules.to_free_above is None:
        return {}
    owners, chosen = held.owners, {}
    # What is in the trash is on its way out.
    taken = held.total_bytes - held.trash_bytes - rubbish_bytes
    for model in held.models:
        if _is_orphan(model) or model.content_digest in doomed:
            taken -= held.exclusive_bytes(model, owners)
            owners.subtract(model.blobs)
    if taken <= rules.to_free_above:
        return {}
    goal = rules.to_free_above if rules.to_free_below is None else rules.to_free_below
    for model in sorted(held.models, key=lambda model: min(model.used_at, now)):
        if taken <= goal:
            break
        if model.is_pinned or _is_orphan(model) or model.content_digest in doomed:
            continue
        taken -= held.exclusive_bytes(model, owners)
        owners.subtract(model.blobs)
        chosen[model.content_digest] = f"used least recently, and the cache is to take {format_size(goal)}"
    return chosen


def _rubbish(layout: Layout, held: Inventory, rules: Rules, ages: Ages) -> Iterator[Doomed]:
    """Give what nobody would miss: it is not brought back."""
    if rules.only_models is not None:
        return
    for path, size in held.trash.items():
        if path in ages.trash_expired or not rules.keeps_trash:
            own = held.trashed_blobs[path] - set(held.owners)
            others = set().union(*(names for other, names in held.trashed_blobs.items() if other != path))
            freed = size + sum(held.blobs.get(name, 0) for name in own - others)
            yield Doomed("trash", path.name, "its time in the trash is over", freed, path)
    for path, size in held.drafts.items():
        if ages.touched.get(path, 0.0) >= DRAFT_AGE_SECONDS:
            yield Doomed("draft", path.name, "its process died", size, path)
    for path, size in held.partials.items():
        if (age := ages.touched.get(path, 0.0)) >= rules.partials_older_than:
            reason = f"not touched for {format_duration(age)}"
            yield Doomed("partial", unquote_name(path.name), reason, size, path)
    yield from _useless_copies(layout, rules)
    yield from _unused_blobs(layout, held, ages)


def _useless_copies(layout: Layout, rules: Rules) -> Iterator[Doomed]:
    from mistral_fetch.store.derived import own_bytes

    if rules.live_recipes is None:
        return
    for path in sorted(layout.derivations.glob("*/*")):
        recipe = unquote_name(path.parent.name)
        if not path.name.startswith(".") and recipe not in rules.live_recipes:
            reason = "the runtime of this machine uses another form"
            yield Doomed("derived", f"{recipe} of {path.name[:16]}", reason, own_bytes(path), path)


def _unused_blobs(layout: Layout, held: Inventory, ages: Ages) -> Iterator[Doomed]:
    used = set(held.owners).union(*held.trashed_blobs.values())
    names = {name for name in set(held.blobs) - used if ages.blobs.get(name, 0.0) >= BLOB_AGE_SECONDS}
    if names:
        freed = sum(held.blobs[name] for name in names)
        label = f"{len(names)} blob" if len(names) == 1 else f"{len(names)} blobs"
        yield Doomed("blobs", label, "no model has them", freed, layout.blobs, blobs=frozenset(names))


def execute_doomed(layout: Layout, item: Doomed, *, keeps_trash: bool) -> Path | None:
    """Remove one thing, and return where it can be brought back from, if it can.

    Raises:
        StoreLocked: Somebody uses it.
        StoreError: The disk refused.
    """
    if item.kind == "model" and item.model is not None:
        entry = move_to_trash(layout, item.model.content_digest, item.model.records)
        if keeps_trash:
            return entry.directory
        empty_entry(layout, entry.directory)
    elif item.kind == "trash":
        empty_entry(layout, item.path)
    elif item.kind == "blobs":
        _remove_one_by_one(layout, item.blobs)
    elif item.kind == "partial":
        plan = RemovalPlan((), (), (), (item.path,), 0)
        with held_for_removal(layout, plan):
            execute_removal(layout, plan)
    elif item.kind == "derived":
        digest = item.path.name
        with (
            locked(layout.derived_lock(digest), "prune", 0.0, lambda _owner: None, lambda: None),
            locked(layout.use_lock(digest), "prune", 0.0, lambda _owner: None, lambda: None),
        ):
            discard_derived(item.path)
    elif item.kind == "draft":
        with disk_errors("removing an abandoned draft", item.path):
            shutil.rmtree(item.path)
    return None


def _remove_one_by_one(layout: Layout, names: Collection[str]) -> None:
    """Delete blobs; one that a pull takes up right now keeps none of the others."""
    busy: StoreLocked | None = None
    for name in sorted(names):
        try:
            remove_unused_blobs(layout, {name})
        except StoreLocked as error:
            busy = error
    if busy is not None:
        raise busy
