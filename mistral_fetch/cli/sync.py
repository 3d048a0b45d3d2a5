"""``sync``: make this machine have what a ``mistral-fetch.toml`` says; each model says whether that took anything."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistral_fetch.cli.choices import QuantizeTo
from mistral_fetch.cli.lock import lock_one, write_lock
from mistral_fetch.cli.options import FrontEnd, command, show_error, stop_on_signals
from mistral_fetch.cli.sync_options import DEFAULT_FILE, FileOption, WaitOption, with_wait
from mistral_fetch.errors import Interrupted, MistralFetchError
from mistral_fetch.units import format_size

if TYPE_CHECKING:
    from mistral_fetch.cli.provisioning import Provisioning
    from mistral_fetch.lock_file import LockedModel
    from mistral_fetch.provision import WantedModel
    from mistral_fetch.transfer.channels import PullResult

_EXIT_CODES = (
    "Exit codes: 0 ok; of the first model that failed: 2 usage, 3 not found, 4 not authorised, 5 stalled, 6 no source,"
    " 9 disk, 11 locked, 13 the lock does not match (--frozen), 20 bad lock or manifest, 32 integrity, 33 assurance,"
    " 40 runtime, 130 interrupted."
)


@dataclass
class Outcome:
    """What became of one model. ``state`` is ok, changed, failed, or planned where nothing was to be changed."""

    ref: str
    state: str
    entry: LockedModel | None = None
    result: PullResult | None = None
    derived: list[dict[str, Any]] = field(default_factory=list)
    missing_bytes: int = 0
    error: MistralFetchError | None = None


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(app, "sync", transfer=True, epilog=_EXIT_CODES)(sync)


def sync(
    front: FrontEnd,
    file: FileOption = DEFAULT_FILE,
    frozen: Annotated[
        bool, typer.Option("--frozen", help="Fetch what the lock file says or fail; look nothing up.")
    ] = False,
    prune: Annotated[
        bool | None,
        typer.Option("--prune/--no-prune", help="Remove models that are not listed (default: as [policy] says)."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and change nothing.")] = False,
    wait: WaitOption = False,
) -> int:
    """Make this machine have the models of mistral-fetch.toml: all of them, verified, as they are locked."""
    from mistral_fetch.cli.provisioning import adopt_directories, load_provisioning, require_current_lock

    front = with_wait(front, wait)
    provisioning = load_provisioning(file)
    if frozen:
        require_current_lock(provisioning)
    front = replace(front, adopt_from=adopt_directories(front, provisioning))
    outcomes = [_settle(front, provisioning, wanted, dry_run=dry_run) for wanted in provisioning.wanted.models]
    failures = [outcome.error for outcome in outcomes if outcome.error is not None]
    entries = [outcome.entry for outcome in outcomes if outcome.entry is not None]
    is_whole = len(entries) == len(outcomes) and not dry_run
    lock_changed = is_whole and not frozen and write_lock(provisioning, entries)
    wants_prune = provisioning.wanted.policy.prune if prune is None else prune
    removed = _prune(front, entries, failures, dry_run=dry_run) if wants_prune else []
    if not front.is_json:
        for error in failures:
            show_error(error, is_json=False)
    fields = _fields(outcomes, removed, lock_changed=lock_changed, dry_run=dry_run)
    front.result(fields, _text(outcomes, removed, dry_run=dry_run))
    return int(failures[0].exit_code) if failures else 0


def _settle(front: FrontEnd, provisioning: Provisioning, wanted: WantedModel, *, dry_run: bool) -> Outcome:
    """Do everything for one model; its failure is its own and does not keep the others from being settled."""
    from mistral_fetch.cli.provisioning import settings_for

    outcome = Outcome(wanted.ref, "failed")
    try:
        outcome.entry = provisioning.locked(wanted) or lock_one(front, provisioning, wanted)
        mine = replace(front, settings=settings_for(front, provisioning, wanted))
        if dry_run:
            _plan(mine, wanted, outcome.entry, outcome)
        else:
            outcome.result = _fetch(mine, provisioning, outcome.entry)
            outcome.derived = _derive(mine, wanted, outcome.result)
            is_done = outcome.result.was_complete and all(made["was_complete"] for made in outcome.derived)
            outcome.state = "ok" if is_done else "changed"
    except Interrupted:
        raise
    except MistralFetchError as error:
        outcome.error = error
    return outcome


def _plan(front: FrontEnd, wanted: WantedModel, entry: LockedModel, outcome: Outcome) -> None:
    from mistral_fetch.store.blobs import find_blob
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.transfer.frozen import find_locked

    layout = Layout(front.settings.home)
    outcome.result = find_locked(layout, entry, front.settings)
    outcome.state = "ok" if outcome.result and not (wanted.convert or wanted.quantize) else "planned"
    if outcome.result is None:
        sha256 = {file.path: file.digest.value for file in entry.files if file.digest and len(file.digest.value) == 64}
        missing = (f for f in entry.files if f.path not in sha256 or not find_blob(layout, sha256[f.path], f.size))
        outcome.missing_bytes = sum(file.size for file in missing)


def _fetch(front: FrontEnd, provisioning: Provisioning, entry: LockedModel) -> PullResult:
    from mistral_fetch.sources.base import StopSignal
    from mistral_fetch.transfer.frozen import pull_locked

    stop = StopSignal()
    undo = stop_on_signals(stop.set)
    try:
        with front.reporter() as report:
            return pull_locked(entry, provisioning.base, front.settings, report, stop, front.adopt_from)
    finally:
        undo()


def _derive(front: FrontEnd, wanted: WantedModel, result: PullResult) -> list[dict[str, Any]]:
    """Make the other forms of the weights that are asked for."""
    from mistral_fetch.cli.convert import convert_model
    from mistral_fetch.cli.derive import derivation_fields

    made = [derivation_fields(convert_model(front, result)) for _ in wanted.convert]
    if wanted.quantize:
        from mistral_fetch.cli.quantizer import find_quantizer, quantize_model
        from mistral_fetch.launch.locate import find_interpreter

        interpreter = find_interpreter(front.settings.python)
        for bits in wanted.quantize:
            quantizer = find_quantizer(front, interpreter, QuantizeTo(bits))
            made.append(derivation_fields(quantize_model(front, quantizer, result)))
    return made


def _prune(
    front: FrontEnd, entries: list[LockedModel], failures: list[MistralFetchError], *, dry_run: bool
) -> list[dict[str, Any]]:
    """Move models that are not listed to the trash, unless something failed: then the list may be at fault."""
    from mistral_fetch.cli.prune import item_fields
    from mistral_fetch.cli.pruning import carry_out, make_plan, prune_lock
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.prune import Rules

    if failures:
        front.note("nothing is pruned, because not every model is as it should be")
        return []
    layout = Layout(front.settings.home)
    if not layout.home.is_dir():
        return []
    rules = Rules(only_models={entry.key for entry in entries})
    if dry_run:
        return [item_fields(item) for item in make_plan(front, layout, rules)[1]]
    with prune_lock(front, layout):
        done = carry_out(layout, make_plan(front, layout, rules)[1], keeps_trash=True)
    for item, owner in done.kept:
        front.note(f"{item.name} is not listed, but in use: {owner}")
    return [item_fields(item) for item in done.removed]


def _fields(
    outcomes: list[Outcome], removed: list[dict[str, Any]], *, lock_changed: bool, dry_run: bool
) -> dict[str, Any]:
    states = [outcome.state for outcome in outcomes]
    return {
        "changed": lock_changed or bool(removed) or "changed" in states,
        "dry_run": dry_run,
        "lock_changed": lock_changed,
        "totals": {
            **{state: states.count(state) for state in ("ok", "changed", "planned", "failed")},
            "removed": len(removed),
            "received_bytes": sum(outcome.result.received_bytes for outcome in outcomes if outcome.result),
        },
        "models": [_model_fields(outcome) for outcome in outcomes],
        "removed": removed,
    }


def _model_fields(outcome: Outcome) -> dict[str, Any]:
    from mistral_fetch.cli.provisioning import error_fields

    entry, result = outcome.entry, outcome.result
    return {
        "ref": outcome.ref,
        "key": entry.key if entry else None,
        "state": outcome.state,
        "changed": outcome.state == "changed",
        "directory": str(result.directory) if result else None,
        "content_digest": result.content_digest if result else None,
        "channel": entry.channel if entry else None,
        "assurance": entry.assurance.label if entry else None,
        "received_bytes": result.received_bytes if result else 0,
        "missing_bytes": outcome.missing_bytes,
        "derived": outcome.derived,
        "error": error_fields(outcome.error) if outcome.error else None,
    }


def _text(outcomes: list[Outcome], removed: list[dict[str, Any]], *, dry_run: bool) -> str:
    lines = [f"{outcome.state:<8} {outcome.ref}  {_remark(outcome)}".rstrip() for outcome in outcomes]
    lines += [f"{'planned' if dry_run else 'removed':<8} {model['name']}  not listed" for model in removed]
    states = [outcome.state for outcome in outcomes]
    counted = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    return "\n".join([*lines, ", ".join([*counted, f"{len(removed)} removed"] if removed else counted)])


def _remark(outcome: Outcome) -> str:
    if outcome.error is not None:
        return outcome.error.lines()[0]
    if outcome.state == "planned" and outcome.result is None:
        return f"would fetch {format_size(outcome.missing_bytes)} by {outcome.entry.channel if outcome.entry else ''}"
    return str(outcome.result.directory) if outcome.result else ""
