"""``verify``, ``path``, ``list`` and ``rm``: what this cache holds, and whether it is still right."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistral_fetch.cli.options import FrontEnd, command, stop_on_signals
from mistral_fetch.cli.paths import local_directory
from mistral_fetch.errors import (
    AssuranceTooLow,
    Conflict,
    ExitCode,
    NotFoundError,
    NotInCache,
    StoreError,
    UsageError,
)
from mistral_fetch.ref import DirectoryRef, parse_ref
from mistral_fetch.units import format_duration, format_size

if TYPE_CHECKING:
    from mistral_fetch.store.layout import Layout


_VERIFY_EXIT_CODES = (
    "Exit codes: 0 all right, 2 usage, 3 nothing to verify, 20 bad manifest or signature, 32 a file is wrong,"
    " 33 no digest."
)


@dataclass(frozen=True)
class _ToVerify:
    """A directory to check, and against what: its own manifest when none is given."""

    name: str
    directory: Path
    manifest: Any = None
    is_derived: bool = False
    is_shared: bool = False


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(
        app,
        "verify",
        trust=True,
        epilog=_VERIFY_EXIT_CODES,
    )(verify)
    command(app, "path", epilog="Exit codes: 0 ok, 2 usage, 3 not complete in the cache.")(path)
    command(app, "list", trust=True, epilog="Exit codes: 0 ok, 2 usage.")(list_models)
    command(app, "rm", epilog="Exit codes: 0 ok, 2 usage, 3 not found, 9 disk, 11 in use, 13 pinned.")(remove)


def verify(
    front: FrontEnd,
    refs: Annotated[list[str] | None, typer.Argument(metavar="REF...", help="Default: every model.")] = None,
    manifest: Annotated[
        str | None, typer.Option("--manifest", metavar="FILE", help="For a directory: the .meta4 to check it against.")
    ] = None,
) -> int:
    """Hash every byte of models again, offline, and name the ranges that are wrong."""
    from mistral_fetch.cli.render import count
    from mistral_fetch.sources.base import StopSignal

    stop = StopSignal()
    undo = stop_on_signals(stop.set)
    started = time.monotonic()
    try:
        with front.reporter() as report:
            items = _to_verify(front, refs, manifest)
            # First, for it takes no time: bytes that match what nobody signed are no comfort.
            signers = {item.directory: _check_signature(front, item) for item in items}
            checked = [(item.name, item.directory, _check(item, report, stop.check)) for item in items]
    finally:
        undo()
    seconds = time.monotonic() - started
    total = sum(verdict.size for _, _, verdicts in checked for verdict in verdicts)
    bad = [(name, verdict) for name, _, verdicts in checked for verdict in verdicts if not verdict.is_good]
    fields = {
        "ok": not bad,
        "seconds": round(seconds, 3),
        "bytes": total,
        "models": [
            {
                "ref": name,
                "directory": str(directory),
                "signed_by": signers[directory],
                "files": [
                    {
                        "path": verdict.path,
                        "size": verdict.size,
                        "ok": verdict.is_good,
                        "problem": verdict.problem,
                        "bad_ranges": [[span.start, span.end] for span in verdict.bad_spans],
                    }
                    for verdict in verdicts
                ],
            }
            for name, directory, verdicts in checked
        ],
    }
    lines = [f"{name}: {verdict.path}: {verdict.problem}" for name, verdict in bad]
    if bad:
        wrong = count(len(bad), "file") + (" is wrong" if len(bad) == 1 else " are wrong")
        how = "what a cache holds is repaired with: mistral-fetch repair REF"
        lines.append(f"{wrong}; {how}")
    else:
        files = count(sum(len(verdicts) for _, _, verdicts in checked), "file")
        lines.append(f"{files}, {format_size(total)}: every byte is right ({format_duration(seconds)})")
        lines += [f"{item.name}: as it was made" for item in items if item.is_derived]
    lines += [f"{name}: signed by {signers[where]}" for name, where, _ in checked if signers[where]]
    front.result(fields, "\n".join(lines))
    return int(ExitCode.INTEGRITY if bad else ExitCode.OK)


def _to_verify(front: FrontEnd, refs: list[str] | None, manifest: str | None) -> list[_ToVerify]:
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.snapshots import list_refs
    from mistral_fetch.transfer.local import readable_layouts, require_local

    layout = Layout(front.settings.home)
    places = [layout, *readable_layouts(front.settings.shared_homes)]
    directories = [text for text in refs or [] if _is_directory(places, text)]
    if manifest and (len(refs or []) != 1 or not directories):
        raise UsageError(
            "--manifest goes with one directory",
            detail=f"expected a directory to check against {manifest}, got {', '.join(refs or []) or 'nothing'}",
            hint="models in the cache have a manifest of their own: leave --manifest out",
        )
    if not refs:
        layout.check_version()
        names: dict[str, list[str]] = {}
        for record in list_refs(layout):
            names.setdefault(record.content_digest, []).append(record.key)
        if not names:
            raise NotInCache(
                f"there is nothing to verify in the cache at {layout.home}",
                detail="expected models, got none",
                hint="name a directory with its manifest, or another cache with --home DIR",
            )
        return [
            item
            for digest, keys in names.items()
            for item in _of_snapshot(layout, ", ".join(dict.fromkeys(keys)), layout.snapshot(digest))
        ]
    chosen = []
    for text in refs:
        if text in directories:
            directory = local_directory(text)
            chosen.append(_ToVerify(text, directory, _manifest_of_directory(directory, manifest)))
        else:
            local = require_local(layout, text, front.settings)
            place = Layout(local.directory.parent.parent)  # a shared cache, perhaps
            is_shared = place.home != layout.home
            chosen += _of_snapshot(place, local.record.key, local.directory, is_shared=is_shared)
    return chosen


def _of_snapshot(layout: Layout, name: str, directory: Path, *, is_shared: bool = False) -> list[_ToVerify]:
    """Return a snapshot and what was made of it, to be checked each by its own manifest."""
    from mistral_fetch.store.derived import list_derived

    made = [_ToVerify(_name_of(name, path), path, is_derived=True) for path in list_derived(layout, directory.name)]
    return [replace(item, is_shared=is_shared) for item in (_ToVerify(name, directory), *made)]


def _name_of(name: str, made: Path) -> str:
    from mistral_fetch.store.layout import unquote_name

    return f"{name} ({unquote_name(made.parent.name)})"


def _is_directory(places: list[Layout], text: str) -> bool:
    from mistral_fetch.store.snapshots import find_refs

    return not any(find_refs(place, text) for place in places) and isinstance(parse_ref(text), DirectoryRef)


def _check(item: _ToVerify, report: Any, check_stop: Any) -> list[Any]:
    """Return a verdict for every file; a snapshot whose own papers are damaged gets one for those."""
    from mistral_fetch.store.verify import verify_directory, verify_snapshot

    if item.manifest is None:
        manifest, verdicts = verify_snapshot(item.directory, report, check_stop)
        if not item.is_shared:
            _keep_learnt(item.directory, manifest, verdicts)
        return verdicts
    return verify_directory(item.directory, item.manifest, report, check_stop)


def _check_signature(front: FrontEnd, item: _ToVerify) -> str | None:
    """Check the signature of a model of the cache if keys are pinned, and return which key made it.

    Keys of the command line must have signed it; those of the settings are asked only where there is a signature.
    """
    # What was made here is nobody's to sign; what it was made from is checked beside it.
    if not front.settings.trust_keys or item.manifest is not None or item.is_derived:
        return None
    from mistral_fetch.store.snapshots import load_manifest, load_provenance
    from mistral_fetch.transfer.authenticity import check_papers, pinned_keys

    papers = load_provenance(item.directory)
    if "signature" not in papers and front.origins["trust_keys"] != "flag":
        return None
    signed = check_papers(item.directory, papers, load_manifest(item.directory), pinned_keys(front.settings), item.name)
    return f"sha256:{signed.fingerprint}"


def _keep_learnt(directory: Path, manifest: Any, verdicts: list[Any]) -> None:
    """Keep piece hashes that were computed on the way: the next check uses all cores, a repair fetches only pieces."""
    from mistral_fetch.store.snapshots import learn_pieces

    learnt = {verdict.path: verdict.learnt for verdict in verdicts if verdict.learnt is not None}
    if learnt and manifest is not None:
        with suppress(StoreError):  # a cache that may only be read is verified all the same
            learn_pieces(directory, manifest, learnt)


def _manifest_of_directory(directory: Path, named: str | None) -> Any:
    from mistral_fetch.metalink import parse_metalink
    from mistral_fetch.transfer.local import read_local_file

    candidates = [Path(named)] if named else sorted(directory.glob("*.meta4"))
    if len(candidates) != 1:
        raise NotFoundError(
            f"it is not clear what {directory} should hold",
            detail=f"expected one .meta4 in it, got {len(candidates)}",
            hint="name the manifest with --manifest FILE",
        )
    loaded = parse_metalink(read_local_file(str(candidates[0])))
    for entry in loaded.files:
        if not entry.digests and entry.pieces is None:
            raise AssuranceTooLow(
                f"nothing vouches for {entry.path} but its size",
                detail=f"expected a digest in {candidates[0]}, got none",
                hint="get a manifest with sha-256 hashes from the publisher",
            )
    return loaded


def path(front: FrontEnd, ref: Annotated[str, typer.Argument(metavar="REF")]) -> int:
    """Print the snapshot directory of a complete model."""
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.use import note_use
    from mistral_fetch.transfer.local import require_local

    layout = Layout(front.settings.home)
    local = require_local(layout, ref, front.settings)
    note_use(layout, local.directory)
    front.result({"ref": local.record.key, "directory": str(local.directory)}, str(local.directory))
    return 0


def list_models(
    front: FrontEnd,
    catalog: Annotated[bool, typer.Option("--catalog", help="List what can be fetched instead.")] = False,
    partial: Annotated[bool, typer.Option("--partial", help="List unfinished files only.")] = False,
) -> int:
    """List the models in the cache, with size, channel and age, what is unfinished, and the disk all of it takes."""
    from mistral_fetch.cli.holdings import holdings_fields, holdings_text, partial_rows
    from mistral_fetch.store.inventory import take_inventory
    from mistral_fetch.store.layout import Layout

    if catalog:
        from mistral_fetch.cli.show import list_catalog

        return list_catalog(front)
    layout = Layout(front.settings.home)
    layout.check_version()
    held = take_inventory(layout)
    partials = partial_rows(layout, held)
    fields = {"models": [], "partials": partials} if partial else holdings_fields(front, layout, held, partials)
    nothing = "nothing is unfinished" if partial else "the cache is empty; see mistral-fetch list --catalog"
    front.result(fields, holdings_text(fields) or nothing)
    return 0


def remove(
    front: FrontEnd,
    refs: Annotated[list[str], typer.Argument(metavar="REF...")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and touch nothing.")] = False,
) -> int:
    """Delete models, their unfinished files, and every blob that no other model uses."""
    from mistral_fetch.cli.holdings import describe
    from mistral_fetch.store.gc import execute_removal, held_for_removal, list_partials, plan_removal
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.lock import locked
    from mistral_fetch.store.pins import is_pinned
    from mistral_fetch.store.snapshots import find_refs
    from mistral_fetch.transfer.local import local_key

    layout = Layout(front.settings.home)
    layout.check_version()
    freed, plans = 0, []
    for text in refs:
        partials = [directory for directory in list_partials(layout) if describe(directory)["ref"] == text]
        key = text if partials else local_key(layout, text, front.settings)
        records = find_refs(layout, key)
        partials = partials or [path for path in list_partials(layout) if describe(path)["ref"] == key]
        if not records and not partials:
            raise NotInCache(
                f"{text} is not in the cache at {layout.home}",
                detail="expected something to delete, got nothing",
                hint="mistral-fetch list shows what there is",
            )
        if records and is_pinned(layout, key):
            raise Conflict(
                f"{text} is pinned",
                detail="expected a model that may be removed, got one that is pinned",
                hint=f"if it is to go: mistral-fetch unpin {text}",
            )
        if dry_run:
            plan = plan_removal(layout, records, partials)
        else:
            # Not beside a pull of the same model: a short wait, since nobody likes a hanging rm.
            with (
                locked(layout.lock(key), f"rm {key}", 2.0, front.note, lambda: None),
                held_for_removal(layout, plan_removal(layout, find_refs(layout, key), partials)),
            ):
                # Once more, now that no pull can take up what is about to go.
                plan = plan_removal(layout, find_refs(layout, key), partials)
                execute_removal(layout, plan)
        freed += plan.freed_bytes
        plans.append(plan)
    doomed = [str(item) for plan in plans for item in (*plan.derived, *plan.snapshots, *plan.blobs, *plan.partials)]
    lines = [f"would delete {path}" for path in doomed] if dry_run else []
    lines.append(f"{'would free' if dry_run else 'freed'} {format_size(freed)}")
    front.result({"freed_bytes": freed, "deleted": doomed, "dry_run": dry_run}, "\n".join(lines))
    return 0
