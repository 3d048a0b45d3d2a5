"""``lock``: write down what the models of a ``mistral-fetch.toml`` are today, file by file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from mistral_fetch.cli.options import FrontEnd, command, show_error, stop_on_signals
from mistral_fetch.cli.sync_options import DEFAULT_FILE, FileOption
from mistral_fetch.errors import ConfigError, Interrupted, MistralFetchError, UsageError

if TYPE_CHECKING:
    from mistral_fetch.cli.provisioning import Provisioning
    from mistral_fetch.lock_file import LockedModel
    from mistral_fetch.provision import WantedModel

_EXIT_CODES = (
    "Exit codes: 0 ok, 2 usage, 3 not found, 4 not authorised, 6 no source, 13 the lock does not match (--check),"
    " 20 bad lock or manifest, 33 assurance, 130 interrupted."
)


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(app, "lock", transfer=True, epilog=_EXIT_CODES)(lock)


def lock(
    front: FrontEnd,
    refs: Annotated[list[str] | None, typer.Argument(metavar="REF...", help="With --update: these only.")] = None,
    file: FileOption = DEFAULT_FILE,
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail if the lock does not match.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Look again at what is locked already.")] = False,
) -> int:
    """Write down which files the models of mistral-fetch.toml are today, so that sync --frozen fetches those."""
    from mistral_fetch.cli.provisioning import load_provisioning, require_current_lock

    if check:
        provisioning = load_provisioning(file)
        require_current_lock(provisioning)
        front.result({"ok": True, "lock": str(provisioning.lock_path)}, f"{provisioning.lock_path} is up to date")
        return 0
    # A lock file that cannot be read is no reason not to write it anew.
    provisioning = load_provisioning(file, ignore_lock=update and not refs)
    again = _to_update(provisioning, refs or [], update=update)
    entries, failures = lock_models(front, provisioning, again)
    for _, error in failures:
        show_error(error, is_json=False)
    changed = not failures and write_lock(provisioning, entries)
    front.result(_fields(provisioning, entries, failures, changed), _text(provisioning, entries, changed))
    return int(failures[0][1].exit_code) if failures else 0


def _to_update(provisioning: Provisioning, refs: list[str], *, update: bool) -> set[str]:
    known = {model.ref for model in provisioning.wanted.models}
    unknown = [ref for ref in refs if ref not in known]
    if unknown or (refs and not update):
        raise UsageError(
            f"{(unknown or refs)[0]} is not to be updated",
            detail=f"expected --update with references as they stand in {provisioning.path}",
            hint="type: mistral-fetch lock --update REF, or add the model to the file first",
        )
    return set(refs or known) if update else set()


def lock_models(
    front: FrontEnd, provisioning: Provisioning, again: set[str]
) -> tuple[list[LockedModel], list[tuple[WantedModel, MistralFetchError]]]:
    """Return the entry of every model, and the errors of those that have none.

    Raises:
        Interrupted: It was asked to stop.
    """
    entries, failures = [], []
    for wanted in provisioning.wanted.models:
        try:
            entry = None if wanted.ref in again else provisioning.locked(wanted)
            entries.append(entry or lock_one(front, provisioning, wanted))
        except Interrupted:
            raise
        except MistralFetchError as error:
            failures.append((wanted, error))
    return entries, failures


def lock_one(front: FrontEnd, provisioning: Provisioning, wanted: WantedModel) -> LockedModel:
    """Return what one model is today.

    Raises:
        MistralFetchError: It cannot be found out.
    """
    from mistral_fetch.cli.provisioning import settings_for
    from mistral_fetch.sources.base import StopSignal
    from mistral_fetch.transfer.locking import lock_model

    stop = StopSignal()
    undo = stop_on_signals(stop.set)
    try:
        with front.reporter() as report:
            settings = settings_for(front, provisioning, wanted)
            return lock_model(wanted, provisioning.base, settings, report, stop)
    finally:
        undo()


def write_lock(provisioning: Provisioning, entries: list[LockedModel]) -> bool:
    """Write the lock file unless it says the same already, and return whether it was written.

    Raises:
        ConfigError: Two references are the same model.
        StoreError: The disk refused.
    """
    from mistral_fetch.lock_file import LockFile, serialise_lock
    from mistral_fetch.store.durable import disk_errors, write_durably

    _refuse_one_model_twice(provisioning, entries)
    data = serialise_lock(LockFile(tuple(entries)))
    if data == provisioning.lock_bytes:
        return False
    with disk_errors("writing the lock file", provisioning.lock_path):
        write_durably(provisioning.lock_path, data)
    return True


def _refuse_one_model_twice(provisioning: Provisioning, entries: list[LockedModel]) -> None:
    by_key: dict[str, LockedModel] = {}
    for entry in entries:
        if (first := by_key.setdefault(entry.key, entry)) is not entry:
            raise ConfigError(
                f"two references in {provisioning.path} are the same model",
                detail=f"expected every model once, got {first.ref} and {entry.ref}, both {entry.key}",
                hint="take one of them out",
            )


def _fields(
    provisioning: Provisioning,
    entries: list[LockedModel],
    failures: list[tuple[WantedModel, MistralFetchError]],
    changed: bool,
) -> dict[str, object]:
    from mistral_fetch.cli.provisioning import error_fields

    locked = [
        {
            "ref": entry.ref,
            "key": entry.key,
            "channel": entry.channel,
            "assurance": entry.assurance.label,
            "manifest": str(entry.manifest_digest),
            "content": str(entry.content_digest) if entry.content_digest else None,
            "bytes": sum(file.size for file in entry.files),
        }
        for entry in entries
    ]
    failed = [{"ref": wanted.ref, "error": error_fields(error)} for wanted, error in failures]
    return {"lock": str(provisioning.lock_path), "changed": changed, "models": locked, "failed": failed}


def _text(provisioning: Provisioning, entries: list[LockedModel], changed: bool) -> str:
    from mistral_fetch.cli.render import table
    from mistral_fetch.units import format_size

    rows = [
        [entry.key, entry.channel, format_size(sum(file.size for file in entry.files)), entry.assurance.label]
        for entry in entries
    ]
    state = "written" if changed else "unchanged"
    return f"{table(['MODEL', 'CHANNEL', 'SIZE', 'ASSURANCE'], rows)}\n{provisioning.lock_path}: {state}"
