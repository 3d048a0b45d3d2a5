"""``mirror check``: look whether a mirror can be trusted, from a handful of its bytes."""

from __future__ import annotations

import secrets
import time
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistral_fetch.cli.options import FrontEnd, command, stop_on_signals
from mistral_fetch.errors import AccessError, AssuranceTooLow, TransferError, UsageError

if TYPE_CHECKING:
    from mistral_fetch.publish.mirror_check import MirrorFinding

CHECK_SECONDS = 600.0
_EXIT_CODES = (
    "Exit codes: 0 fine, 2 usage, 3 no such manifest, 6 unreachable or without ranges, 20 bad manifest, "
    "32 stale or lying, 33 nothing to compare with."
)


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(app, "mirror check", epilog=_EXIT_CODES)(mirror_check)


def mirror_check(
    front: FrontEnd,
    url: Annotated[str, typer.Argument(metavar="URL", help="A .meta4, a mirror's directory or one of its files.")],
    manifest: Annotated[
        str | None, typer.Option("--manifest", metavar="FILE", help="What is right; else the .meta4 at URL.")
    ] = None,
    pieces: Annotated[int, typer.Option("--pieces", metavar="N", help="How many random pieces to ask for.", min=1)] = 8,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Ask for the same pieces as another check did.")
    ] = None,
) -> int:
    """Ask a mirror for sizes, validators and random pieces: fine, without ranges, stale, lying or unreachable?"""
    from mistral_fetch.sources.base import StopSignal
    from mistral_fetch.sources.http_client import HttpClient, HttpSettings, breaking_off
    from mistral_fetch.sources.retry import RetryPolicy

    stop, chosen = StopSignal(), secrets.randbelow(2**32) if seed is None else seed
    settings = HttpSettings(
        connect_timeout_seconds=front.settings.connect_timeout,
        read_timeout_seconds=front.settings.read_timeout,
        retry=RetryPolicy(attempts=2),
        is_offline=front.settings.offline,
        proxy=front.settings.proxy,
        ca_bundle=front.settings.ca_bundle,
    )
    undo = stop_on_signals(stop.set)
    try:
        with HttpClient(settings) as http, breaking_off(http, stop, time.monotonic() + CHECK_SECONDS):
            finding = _find_out(http, url, manifest, pieces, chosen, stop)
    finally:
        undo()
    _print_finding(front, url, finding, chosen)
    return int(finding.verdict.exit_code)


def _find_out(http: Any, url: str, named: str | None, pieces: int, seed: int, stop: Any) -> MirrorFinding:
    from mistral_fetch.metalink import MAX_METALINK_BYTES, parse_metalink
    from mistral_fetch.publish.check_address import (
        addresses_below,
        addresses_in_manifest,
        claims_of,
        is_manifest_address,
    )
    from mistral_fetch.publish.mirror_check import MirrorCheck, MirrorFinding, Verdict, describe_error
    from mistral_fetch.sources.urls import split_http_url
    from mistral_fetch.transfer.local import read_local_file

    _check_url(url, split_http_url, has_manifest=named is not None or is_manifest_address(url))
    right = parse_metalink(read_local_file(named)) if named is not None else None
    try:
        if is_manifest_address(url):
            own = parse_metalink(http.get_bytes(url, MAX_METALINK_BYTES, stop=stop), url)
            addresses = addresses_in_manifest(own, url)
            known = {entry.path for entry in (right or own).files}
            addresses = [address for address in addresses if address.path in known]
        else:
            assert right is not None, "checked above"
            own, addresses = right, addresses_below(right, url)
    except (TransferError, AccessError) as error:
        return MirrorFinding(Verdict.UNREACHABLE, describe_error(error), ())
    if not addresses:
        return MirrorFinding(Verdict.STALE, "its manifest names none of the files of the right one", ())

    @cache
    def claims() -> dict[str, str]:
        return claims_of(http, right or own, url, addresses, is_own_manifest=right is None)

    finding = MirrorCheck(http, seed, pieces, claims, stop.check).run(right or own, addresses)
    if finding.verdict is Verdict.FINE and not finding.piece_count:
        raise AssuranceTooLow(
            f"nothing could be compared with what {url} sends",
            detail="expected piece hashes or a sha256 in the manifest, got none",
            hint="give a manifest with digests: --manifest FILE",
        )
    return finding


def _check_url(url: str, split: Any, *, has_manifest: bool) -> None:
    try:
        split(url)
    except TransferError as error:
        raise UsageError(error.what, detail=error.detail, hint=error.hint) from error
    if not has_manifest:
        raise UsageError(
            "it is not known what the mirror should have",
            detail="expected the address of a .meta4, or --manifest FILE",
            hint="mistral-fetch mirror check URL --manifest NAME.meta4",
        )


def _print_finding(front: FrontEnd, url: str, finding: MirrorFinding, seed: int) -> None:
    from mistral_fetch.cli.render import count
    from mistral_fetch.sources.urls import redact

    fields = {
        "url": redact(url),
        "verdict": finding.verdict.value,
        "reason": finding.reason,
        "pieces": finding.piece_count,
        "seed": seed,
        "files": [
            {
                "path": file.path,
                "url": file.url,
                "verdict": file.verdict.value,
                "reason": file.reason,
                "size": file.size,
                "validator": file.validator,
                "last_modified": file.modified,
                "right_ranges": [[proof.span.start, proof.span.end] for proof in file.proofs if proof.is_right],
                "wrong_ranges": [[proof.span.start, proof.span.end] for proof in file.proofs if not proof.is_right],
            }
            for file in finding.files
        ],
    }
    compared = f"{count(len(finding.files), 'file')}, {count(finding.piece_count, 'piece')} compared, --seed {seed}"
    lines = [f"{redact(url)}: {finding.verdict.value.replace('-', ' ')} ({compared})"]
    lines += [f"  {file.path}: {file.verdict.value}: {file.reason}" for file in finding.files if file.reason]
    if finding.reason and not any(file.reason == finding.reason for file in finding.files):
        lines.append(f"  {finding.reason}")
    front.result(fields, "\n".join(lines))
