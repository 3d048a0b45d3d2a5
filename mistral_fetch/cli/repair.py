"""``repair``: what is wrong with a model of the cache, and only that fetched again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistral_fetch.cli.options import FrontEnd, command, stop_on_signals
from mistral_fetch.errors import UsageError
from mistral_fetch.ref import DirectoryRef, parse_ref
from mistral_fetch.units import format_size

if TYPE_CHECKING:
    from mistral_fetch.store.verify import FileVerdict
    from mistral_fetch.transfer.repair import Damage, Repaired

_EXIT_CODES = (
    "Exit codes: 0 whole (again), 2 usage, 3 not in the cache, 4 not authorised, 5 stalled, 6 no source, 9 disk,"
    " 11 locked, 32 integrity, 33 assurance, 130 interrupted."
)


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(app, "repair", transfer=True, epilog=_EXIT_CODES)(repair)


def repair(
    front: FrontEnd,
    ref: Annotated[str, typer.Argument(metavar="REF", help="A model of the cache.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what is wrong and touch nothing.")] = False,
) -> int:
    """Hash a model of the cache and fetch the pieces that are wrong or missing, and nothing else."""
    from mistral_fetch.sources.base import StopSignal
    from mistral_fetch.transfer.repair import Repaired, find_damage
    from mistral_fetch.transfer.repair import repair as repair_model

    _refuse_directory(front, ref)
    stop = StopSignal()
    undo = stop_on_signals(stop.set)
    try:
        with front.reporter() as report:
            damage = find_damage(ref, front.settings, report, stop)
            if damage.verdicts and not dry_run:
                done = repair_model(ref, damage, front.settings, report, stop, front.adopt_from)
            else:
                done = Repaired(damage.directory, {})
            discarded = [] if dry_run else _discard_wrong_copies(front, damage.directory.name, report, stop.check)
    finally:
        undo()
    fields = {**_fields(damage, done, dry_run=dry_run), "discarded": discarded}
    front.result(fields, "\n".join([_text(damage, done, dry_run=dry_run), *map(_discarded_text, discarded)]))
    return 0


def _discard_wrong_copies(front: FrontEnd, content_digest: str, report: Any, check_stop: Any) -> list[str]:
    """Remove what was made of a model and is not what was written: it is made again from the whole model."""
    from mistral_fetch.store.derived import discard_derived, list_derived
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.lock import locked
    from mistral_fetch.store.verify import verify_snapshot

    layout = Layout(front.settings.home)
    discarded = []
    for directory in list_derived(layout, content_digest):
        _, verdicts = verify_snapshot(directory, report, check_stop)
        if all(verdict.is_good for verdict in verdicts):
            continue
        lock = layout.derived_lock(content_digest)
        with locked(lock, "repair", front.settings.lock_timeout, front.note, check_stop):
            discard_derived(directory)
        discarded.append(str(directory))
    return discarded


def _discarded_text(directory: str) -> str:
    return f"removed the damaged {directory}; it is made again when it is next asked for"


def _refuse_directory(front: FrontEnd, text: str) -> None:
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.snapshots import find_refs

    if not find_refs(Layout(front.settings.home), text) and isinstance(parse_ref(text), DirectoryRef):
        raise UsageError(
            f"{text} is a directory, not a model of the cache",
            detail="expected a model that was pulled; nobody knows where a directory's files came from",
            hint=f"find out what is wrong with: mistral-fetch verify {text} --manifest FILE",
        )


def _bad_ranges(verdict: FileVerdict) -> list[list[int]]:
    """Return the ranges that are wrong: the whole file where it cannot be told."""
    ranges = [[span.start, span.end] for span in verdict.bad_spans]
    return ranges or ([[0, verdict.size]] if verdict.size else [])


def _fields(damage: Damage, done: Repaired, *, dry_run: bool) -> dict[str, Any]:
    return {
        "ref": damage.key,
        "directory": str(done.directory),
        "dry_run": dry_run,
        "repaired": [
            {
                "path": verdict.path,
                "problem": verdict.problem,
                "bad_ranges": _bad_ranges(verdict),
                "received_bytes": done.received.get(verdict.path, 0),
            }
            for verdict in damage.verdicts
        ],
        "received_bytes": sum(done.received.values()),
    }


def _text(damage: Damage, done: Repaired, *, dry_run: bool) -> str:
    from mistral_fetch.cli.render import count

    if not damage.verdicts:
        return f"{damage.key}: nothing to repair"
    lines = [f"{damage.key}: {verdict.path}: {verdict.problem}" for verdict in damage.verdicts]
    files = count(len(damage.verdicts), "file")
    if dry_run:
        wrong = sum(end - start for verdict in damage.verdicts for start, end in _bad_ranges(verdict))
        return "\n".join([*lines, f"would repair {files} ({format_size(wrong)} wrong or missing)"])
    return "\n".join([*lines, f"repaired {files}, {format_size(sum(done.received.values()))} received"])
