"""Planning and carrying out what ``prune`` removes, for it and ``sync --prune``; asks the clock and the disk."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_fetch.cli.options import FrontEnd
from mistral_fetch.errors import StoreLocked, UsageError
from mistral_fetch.units import parse_size

if TYPE_CHECKING:
    from mistral_fetch.store.inventory import Inventory
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.prune import Ages, Doomed, Rules


@dataclass
class Done:
    """What a prune planned and did. ``kept`` are things that somebody uses right now, with who does."""

    plan: list[Doomed]
    removed: list[Doomed]
    kept: list[tuple[Doomed, str]]
    trashed: set[str]


def prune_lock(front: FrontEnd, layout: Layout) -> Any:
    """Return the lock that one prune holds at a time."""
    from mistral_fetch.store.lock import locked

    return locked(layout.lock("prune"), "prune", 2.0, front.note, lambda: None)


def make_plan(
    front: FrontEnd, layout: Layout, rules: Rules, high: str | None = None, low: str | None = None
) -> tuple[Inventory, list[Doomed]]:
    """Return what the cache holds, and what of it has to go by the rules and the settings."""
    from mistral_fetch.store.inventory import take_inventory
    from mistral_fetch.store.prune import plan_prune

    held, now = take_inventory(layout), time.time()
    above = front.settings.cache_quota or None if high is None else _mark("--high", high, layout, held)
    below = above if low is None else _mark("--low", low, layout, held)
    if below is not None and (above is None or below > above):
        raise UsageError(
            "--low is a mark below --high",
            detail=f"expected --high of at least {low}, got {high or 'none'}",
            hint="give both: mistral-fetch prune --high 200GB --low 150GB",
        )
    rules = replace(rules, to_free_above=above, to_free_below=below)
    return held, plan_prune(layout, held, rules, take_ages(front, layout, held, now), now)


def take_ages(front: FrontEnd, layout: Layout, held: Inventory, now: float) -> Ages:
    """Return how old things are; a time in the future is no age at all."""
    from mistral_fetch.store.durable import boot_id
    from mistral_fetch.store.prune import Ages
    from mistral_fetch.store.trash import read_entry

    boot, uptime = boot_id(), time.monotonic()
    entries = {path: read_entry(path) for path in held.trash}
    expired = {p for p, e in entries.items() if e is None or e.age(now, boot, uptime) >= front.settings.keep_trash}
    touched = {path: now - _newest(path) for path in (*held.partials, *held.drafts)}
    blobs = {name: now - _changed(layout.blob(name)) for name in held.blobs}
    return Ages(frozenset(expired), touched, blobs)


def carry_out(layout: Layout, plan: list[Doomed], *, keeps_trash: bool) -> Done:
    """Remove what is planned; what somebody uses meanwhile is kept.

    Raises:
        StoreError: The disk refused.
    """
    from mistral_fetch.store.prune import execute_doomed

    done = Done(plan, [], [], set())
    for item in plan:
        try:
            place = execute_doomed(layout, item, keeps_trash=keeps_trash)
        except StoreLocked as error:
            done.kept.append((item, error.detail))
            continue
        done.removed.append(item)
        if place is not None:
            done.trashed.add(item.name)
    return done


def live_recipes(front: FrontEnd) -> set[str]:
    """Return the keys of the copies that the runtime of this machine can use."""
    from mistral_fetch.cli.choices import QuantizeTo
    from mistral_fetch.cli.quantizer import find_quantizer
    from mistral_fetch.launch.locate import find_interpreter
    from mistral_fetch.transfer.convert import SAFETENSORS

    interpreter = find_interpreter(front.settings.python)
    return {SAFETENSORS.key, *(find_quantizer(front, interpreter, to).form.key for to in QuantizeTo)}


def _mark(option: str, text: str, layout: Layout, held: Inventory) -> int:
    """Return a watermark in bytes that the cache may take; a share of the disk counts what others have on it."""
    try:
        if not text.strip().endswith("%"):
            return parse_size(text)
        share = float(text.strip().removesuffix("%")) / 100
        if not 0 <= share <= 1:
            raise ValueError(f"expected 0 to 100 %, got {text[:40]!r}")
    except ValueError as error:
        raise UsageError(
            f"{option} cannot be used", detail=str(error), hint="type for example: 200GB, or 80%"
        ) from error
    if not layout.home.is_dir():
        return 0
    disk = shutil.disk_usage(layout.home)
    return max(0, held.total_bytes - int(disk.total - disk.free - share * disk.total))


def _newest(directory: Path) -> float:
    """Return when anything in a directory was changed last."""
    times = [directory.lstat().st_mtime] if directory.exists() else [time.time()]
    for path in directory.rglob("*"):
        try:
            times.append(path.lstat().st_mtime)
        except OSError:
            return time.time()  # somebody is at work in it
    return max(times)


def _changed(path: Path) -> float:
    """Return when a file was written or got its name; a rename is not a write, so both times count."""
    try:
        status = path.lstat()
    except OSError:
        return time.time()
    return max(status.st_mtime, status.st_ctime)
