"""``bundle create``, ``bundle verify`` and ``bundle import``: models across an air gap, as one stream."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistral_fetch.cli.options import FrontEnd, command, stop_on_signals
from mistral_fetch.errors import ExitCode, NotFoundError, UsageError
from mistral_fetch.units import format_size, parse_size

if TYPE_CHECKING:
    from mistral_fetch.bundle.pack import Packed
    from mistral_fetch.events import Report
    from mistral_fetch.sources.base import StopSignal

Bundle = Annotated[
    list[str], typer.Argument(metavar="FILE...", help="A bundle, all volumes of one in any order, or - for a pipe.")
]
_CREATE_CODES = "Exit codes: 0 ok, 2 usage, 3 not in the cache, 9 disk, 13 the file is there, 32 the cache is damaged."
_VERIFY_CODES = "Exit codes: 0 all right, 2 usage, 3 not found, 20 malformed or not signed, 21 expired, 32 damaged."
_IMPORT_CODES = "Exit codes: 0 ok, 2 usage, 3 not found, 9 disk, 11 locked, 13 another model has the name, 20 malformed or not signed, 21 expired, 32 damaged, 33 assurance, 130 interrupted."  # noqa: E501


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(app, "bundle create", epilog=_CREATE_CODES)(create)
    command(app, "bundle verify", trust=True, epilog=_VERIFY_CODES)(verify)
    command(app, "bundle import", trust=True, epilog=_IMPORT_CODES)(import_models)


def create(
    front: FrontEnd,
    refs: Annotated[list[str], typer.Argument(metavar="REF...", help="Complete models of the cache.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE|-", help="Where to write (default: NAME.tar here).")
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="SIZE", help="Cut it into FILE.001, FILE.002 … of this size.")
    ] = None,
) -> int:
    """Write models as one stream that proves itself: a tar archive, to carry where no network goes."""
    from mistral_fetch.bundle.pack import pack
    from mistral_fetch.bundle.write import StreamSink, write_bundle, writing_to
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.transfer.local import require_local

    split_bytes = _volume_bytes(split, output)
    if output == "-":
        _refuse_stdout(front)
    layout = Layout(front.settings.home)
    models = [require_local(layout, text, front.settings) for text in refs]
    with _working(front) as (report, stop):
        packed = pack(models, stop.check)
        if output == "-":
            write_bundle(packed, StreamSink(sys.stdout.fileno()), report, stop.check)
            front.note(f"{_told(packed)} written")
            return 0
        target = _target(output, packed)
        with writing_to(target, split_bytes, packed.plan.size, front.settings.disk_reserve) as sink:
            write_bundle(packed, sink, report, stop.check)
            files = [str(path) for path in sink.publish()]
    front.note(f"{_told(packed)} written")
    fields = {"files": files, "size": packed.plan.size, "models": [_model_fields(r) for r in packed.records]}
    front.result(fields, "\n".join(files))
    return 0


def verify(front: FrontEnd, files: Bundle) -> int:
    """Read a bundle to its end and prove every byte, without a cache; wrong pieces are named."""
    from mistral_fetch.bundle.check import verify_bundle
    from mistral_fetch.bundle.reader import BundleReader
    from mistral_fetch.bundle.trust import vouch_for
    from mistral_fetch.bundle.volumes import open_input

    with _working(front) as (report, stop), open_input(files, stop.check) as source:
        reader = BundleReader(source)
        vouched = [vouch_for(model, front.settings, report) for model in reader.models]
        wrong = verify_bundle(reader, report, stop.check)
    signers = [f"sha256:{word.signed.fingerprint}" if word.signed else None for word in vouched]
    models = [
        {**_model_fields(model.record), "signed_by": signer}
        for model, signer in zip(reader.models, signers, strict=True)
    ]
    pieces = [{**vars(piece), "text": str(piece)} for piece in wrong]
    lines = [str(piece) for piece in wrong]
    if wrong:
        lines.append(f"{len(wrong)} wrong; copy the bundle again, or import what is right: the rest is fetched later")
    else:
        size = format_size(reader.plan.size)
        lines.append(f"{', '.join(m.record.ref for m in reader.models)}: every byte of {size} is right")
    lines += [f"{m['ref']}: signed by {m['signed_by']}" for m in models if m["signed_by"]]
    front.result({"ok": not wrong, "size": reader.plan.size, "models": models, "wrong": pieces}, "\n".join(lines))
    return int(ExitCode.INTEGRITY if wrong else ExitCode.OK)


def import_models(
    front: FrontEnd,
    files: Bundle,
    replace: Annotated[
        bool, typer.Option("--replace", help="Let names of this cache stand for the bundle's models from now on.")
    ] = False,
    min_assurance: Annotated[
        str | None,
        typer.Option("--min-assurance", metavar="LEVEL", help="Weakest proof a file may have: sha256 or signed."),
    ] = None,
) -> int:
    """Take a bundle's models into the cache, each byte proved before it counts, and print their directories."""
    from mistral_fetch.bundle.reader import BundleReader
    from mistral_fetch.bundle.receive import import_bundle
    from mistral_fetch.bundle.volumes import open_input

    settings = _with_floor(front, min_assurance)
    with _working(front) as (report, stop), open_input(files, stop.check) as source:
        results = import_bundle(BundleReader(source), settings, report, stop, replace_names=replace)
    for result in results:
        state = "complete before" if result.was_complete else f"complete and verified ({result.assurance})"
        front.note(f"{result.key}: {state}")
    fields = [
        {
            "ref": result.key,
            "directory": str(result.directory),
            "content_digest": result.content_digest,
            "channel": result.channel,
            "assurance": result.assurance,
            "was_complete": result.was_complete,
            "read_bytes": result.received_bytes,
        }
        for result in results
    ]
    front.result({"models": fields}, "\n".join(str(result.directory) for result in results))
    return 0


@contextmanager
def _working(front: FrontEnd) -> Iterator[tuple[Report, StopSignal]]:
    from mistral_fetch.sources.base import StopSignal

    stop = StopSignal()
    undo = stop_on_signals(stop.set)
    try:
        with front.reporter() as report:
            yield report, stop
    finally:
        undo()


def _with_floor(front: FrontEnd, min_assurance: str | None) -> Any:
    from dataclasses import replace

    from mistral_fetch.digest import Assurance

    if min_assurance is None:
        return front.settings
    try:
        return replace(front.settings, min_assurance=Assurance.parse(min_assurance))
    except ValueError as error:
        raise UsageError(
            f"--min-assurance {min_assurance} makes no sense", detail=str(error), hint="type: --min-assurance signed"
        ) from error


def _volume_bytes(split: str | None, output: str | None) -> int | None:
    if split is None:
        return None
    if output == "-":
        raise UsageError(
            "a stream has no volumes",
            detail="expected --split with a file, got -o -",
            hint="cut the stream where it arrives, with: split -b",
        )
    try:
        return parse_size(split)
    except ValueError as error:
        raise UsageError(
            f"--split {split} is no size", detail=str(error), hint="type for example --split 4GB"
        ) from error


def _refuse_stdout(front: FrontEnd) -> None:
    if front.is_json or os.isatty(sys.stdout.fileno()):
        raise UsageError(
            "standard output cannot take the bundle",
            detail="expected a pipe or a file, and no --json, with -o -",
            hint="redirect it: mistral-fetch bundle create REF -o - | ssh HOST mistral-fetch bundle import -",
        )


def _target(output: str | None, packed: Packed) -> Path:
    name = f"{packed.records[0].folder}.tar" if len(packed.records) == 1 else "models.tar"
    try:
        target = Path(output or name).expanduser().absolute()
        parent_exists = target.parent.is_dir()
    except (OSError, RuntimeError, ValueError):
        parent_exists, target = False, Path(output or name)
    if not parent_exists:
        raise NotFoundError(
            f"there is no directory {target.parent}",
            detail="expected a place for the bundle, got none",
            hint="make it first, or give another name with -o",
        )
    return target


def _told(packed: Packed) -> str:
    return f"{', '.join(record.ref for record in packed.records)}: {format_size(packed.plan.size)}"


def _model_fields(record: Any) -> dict[str, Any]:
    return {
        "ref": record.ref,
        "folder": record.folder,
        "channel": record.channel,
        "content_digest": record.content_digest,
    }
