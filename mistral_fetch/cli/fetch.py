"""``pull``: make a model complete; and the same for every other command that needs one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistral_fetch.cli.choices import ConvertTo
from mistral_fetch.cli.options import FrontEnd, command, stop_on_signals
from mistral_fetch.cli.services import StatusListen, watched
from mistral_fetch.cli.sync_options import WaitOption, with_wait
from mistral_fetch.errors import UsageError
from mistral_fetch.ref import parse_ref
from mistral_fetch.units import format_size

if TYPE_CHECKING:
    from mistral_fetch.transfer.channels import PullResult

RefArgument = Annotated[
    str, typer.Argument(metavar="REF", help="name[@version], hf:org/repo, a .meta4 or .torrent, a magnet link")
]
_EXIT_CODES = "Exit codes: 0 ok, 2 usage, 3 not found, 4 not authorised, 5 stalled, 6 no source, 9 disk, 11 locked, 20 bad manifest, 32 integrity, 33 assurance, 130 interrupted."  # noqa: E501
RUN_EXIT_CODES = _EXIT_CODES.replace("130", "40 runtime, 130")


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(app, "pull", transfer=True, epilog=RUN_EXIT_CODES)(pull)


def pull(
    front: FrontEnd,
    refs: Annotated[list[str], typer.Argument(metavar="REF...", help="What to fetch.")],
    refresh: Annotated[bool, typer.Option("--refresh", help="Ask the source again even if complete.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan and change nothing; exit as the pull would if it is refused."),
    ] = False,
    convert: Annotated[
        ConvertTo | None,
        typer.Option(
            "--convert",
            help="Also write .pth weights in a form that cannot hold code, and print that directory instead.",
            metavar="safetensors",
        ),
    ] = None,
    status_listen: StatusListen = None,
    wait: WaitOption = False,
) -> int:
    """Fetch models, verify every byte, and print their snapshot directories. Does nothing where they are complete."""
    front = with_wait(front, wait)
    if dry_run:
        from mistral_fetch.cli.preview import print_plans

        _refuse_dry_conversion(convert)
        return print_plans(front, refs, refresh=refresh)
    if convert is not None:
        from mistral_fetch.cli.convert import require_runtime

        require_runtime(front, refs)
    results = [fetch(front, text, refresh=refresh, status_listen=status_listen) for text in refs]
    fields = [_pull_fields(result) for result in results]
    directories = [str(result.directory) for result in results]
    if convert is not None:
        from mistral_fetch.cli.convert import convert_model
        from mistral_fetch.cli.derive import derivation_fields

        conversions = [convert_model(front, result) for result in results]
        for told, conversion in zip(fields, conversions, strict=True):
            told["converted"] = derivation_fields(conversion)
        directories = [str(conversion.directory) for conversion in conversions]
    front.result(fields[0] if len(fields) == 1 else fields, "\n".join(directories))
    return 0


def _refuse_dry_conversion(convert: ConvertTo | None) -> None:
    if convert is not None:
        raise UsageError(
            "--dry-run has no plan for --convert",
            detail="expected one of the two: what a conversion takes is a second copy of the weights",
            hint="leave --convert out to see what would be fetched",
        )


def _pull_fields(result: PullResult) -> dict[str, Any]:
    return {
        "ref": result.key,
        "directory": str(result.directory),
        "content_digest": result.content_digest,
        "channel": result.channel,
        "assurance": result.assurance,
        "was_complete": result.was_complete,
        "received_bytes": result.received_bytes,
    }


def fetch(front: FrontEnd, text: str, *, refresh: bool = False, status_listen: str | None = None) -> PullResult:
    """Make one model complete, showing progress."""
    from mistral_fetch.sources.base import StopSignal
    from mistral_fetch.store.layout import Layout
    from mistral_fetch.store.use import note_use
    from mistral_fetch.transfer.pull import pull as pull_model

    ref, stop = parse_ref(text), StopSignal()
    undo = stop_on_signals(stop.set)
    try:
        with front.reporter() as shown, watched(shown, status_listen, "pull") as report:
            result = pull_model(ref, front.settings, report, stop, refresh=refresh, adopt_from=front.adopt_from)
    finally:
        undo()
    note_use(Layout(front.settings.home), result.directory)
    if not result.was_complete:
        received = format_size(result.received_bytes)
        front.note(f"{result.key}: complete and verified ({result.assurance}), {received} received")
        _tell_quota(front)
    return result


def _tell_quota(front: FrontEnd) -> None:
    """Say so where the cache takes more than its quota; nothing is removed unasked."""
    quota = front.settings.cache_quota
    if not quota:
        return
    from mistral_fetch.store.inventory import take_inventory
    from mistral_fetch.store.layout import Layout

    taken = take_inventory(Layout(front.settings.home)).total_bytes
    if taken > quota:
        front.note(
            f"the cache takes {format_size(taken)} of a quota of {format_size(quota)};"
            " mistral-fetch prune shows what would go"
        )
