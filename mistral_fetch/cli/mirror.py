"""``mirror`` and ``mirror check``: serve models on a local network, and look whether a mirror can be trusted."""

from __future__ import annotations

import secrets
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistral_fetch.cli.models import all_models, find_model, prepare, refuse_offline
from mistral_fetch.cli.options import FrontEnd, command, stop_on_signals, write_out
from mistral_fetch.cli.services import StatusListen, serving
from mistral_fetch.cli.terminal import json_line
from mistral_fetch.errors import AccessError, AssuranceTooLow, ExitCode, NotInCache, TransferError, UsageError
from mistral_fetch.units import format_size

if TYPE_CHECKING:
    from mistral_fetch.publish.mirror_check import MirrorFinding
    from mistral_fetch.publish.model import ModelFiles
    from mistral_fetch.publish.site import ServedModel

DEFAULT_LISTEN = "127.0.0.1:8080"
LOOK_SECONDS = 0.2
CHECK_SECONDS = 600.0
_CHECK_EXIT_CODES = (
    "Exit codes: 0 fine, 2 usage, 3 no such manifest, 6 unreachable or without ranges, 20 bad manifest, "
    "32 stale or lying, 33 nothing to compare with."
)
_EXIT_CODES = (
    "Exit codes: 0 stopped (SIGTERM, Ctrl-C) or duration reached, 2 usage, 3 not found, 6 offline, 9 disk, "
    "11 port in use, 40 the extra 'serve' is missing."
)


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(app, "mirror", epilog=_EXIT_CODES)(mirror)
    command(app, "mirror check", epilog=_CHECK_EXIT_CODES)(mirror_check)


def mirror(
    front: FrontEnd,
    ref: Annotated[
        str | None,
        typer.Argument(metavar="REF|DIR", help="What to serve (default: every complete model of the cache)."),
    ] = None,
    listen: Annotated[
        str,
        typer.Option("--listen", metavar="[HOST:]PORT[-PORT]", help=f"Where to listen (default: {DEFAULT_LISTEN})."),
    ] = DEFAULT_LISTEN,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="OUT", help="Where manifest and torrents are kept (default: in the cache)."),
    ] = None,
    duration: Annotated[
        float | None, typer.Option("--duration", metavar="SECONDS", help="Stop after this time.", min=0)
    ] = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="A line for each request.")] = False,
    status_listen: StatusListen = None,
) -> int:
    """Serve models over HTTP, read-only and with ranges, laid out as publish lays them out."""
    from mistral_fetch.publish.listen import check_free, parse_listen, told_ports
    from mistral_fetch.publish.metrics import Metrics
    from mistral_fetch.publish.mirror import MirrorServer
    from mistral_fetch.publish.notify import Supervisor
    from mistral_fetch.publish.site import build_site
    from mistral_fetch.sources.base import StopSignal

    refuse_offline(front, "mirror")
    address, stop, metrics, supervisor = parse_listen(listen), StopSignal(), Metrics("mirror"), Supervisor()
    with ExitStack() as stack:
        stack.callback(stop_on_signals(stop.set))
        check_free(address)
        status_url = stack.enter_context(serving(status_listen, metrics))
        served = _served(front, ref, out, supervisor, stop)
        site = build_site(served, has_index=ref is None)
        server = stack.enter_context(MirrorServer(address, site, metrics, logs_access=access_log))
        for line in told_ports(address, server.port):
            front.note(line)
        size = sum(model.read.manifest.size for model in served)
        names = ", ".join(model.name for model in served)
        metrics.offer(names, size, size)
        began = time.monotonic()
        while not (reason := _reason_to_end(stop, duration, began)):
            if server.is_running and not metrics.is_ready:
                metrics.set_ready(True)
                supervisor.ready(f"serving {names} at {server.url}")
                _print_ready(front, served, server.url, ref is None, status_url)
            supervisor.sign_of_life()
            stop.wait(LOOK_SECONDS)
        supervisor.stopping()
        metrics.set_ready(False)
    _print_end(front, metrics, time.monotonic() - began, reason)
    return 0


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


def _served(front: FrontEnd, ref: str | None, out: Path | None, supervisor: Any, stop: Any) -> list[ServedModel]:
    """Return what to serve, its manifests and torrents made where they are missing."""
    from mistral_fetch.publish.site import ServedModel

    models = [find_model(front, ref)] if ref is not None else all_models(front)
    if not models:
        raise NotInCache(
            f"there is nothing to serve in the cache at {front.settings.home}",
            detail="expected a complete model, got none",
            hint="pull one first, or name a directory: mistral-fetch mirror DIR",
        )
    served = []
    with front.reporter() as report:
        for name, model in _named_apart(models).items():
            supervisor.starting(f"preparing {name}")

            def report_or_stop(event: Any) -> None:
                stop.check()
                report(event)

            made = prepare(front, model, out, report_or_stop)
            served.append(ServedModel(name, made.out, made.read, made.files, model.name))
    return served


def _named_apart(models: list[ModelFiles]) -> dict[str, ModelFiles]:
    """Give models of one name an address each: two channels bring different files under one name."""
    named: dict[str, ModelFiles] = {}
    for model in models:
        name = model.name if model.name not in named else f"{model.name}-{model.content_digest[:8]}"
        named[name] = model
    return named


def _reason_to_end(stop: Any, duration: float | None, began: float) -> str:
    if stop.is_set():
        return "stopped"
    return "duration" if duration is not None and time.monotonic() - began >= duration else ""


def _print_ready(front: FrontEnd, served: list[ServedModel], url: str, has_index: bool, status_url: str) -> None:
    manifests = [f"{url}/{model.name}.meta4" for model in served]
    size = sum(model.read.manifest.size for model in served)
    if front.is_json:
        fields = {
            "event": "ready",
            "url": url,
            "models": [
                {"name": model.name, "manifest": manifest, "size": model.read.manifest.size}
                for model, manifest in zip(served, manifests, strict=True)
            ],
            "size": size,
            "index": f"{url}/" if has_index else None,
            "status_url": status_url or None,
        }
        write_out(json_line(fields))
        return
    what = served[0].name if len(served) == 1 else f"{len(served)} models"
    write_out(f"ready: serving {what} ({format_size(size)}) at {manifests[0] if len(served) == 1 else url + '/'}")
    if status_url:
        front.note(f"  status: {status_url}/status, {status_url}/metrics")


def _print_end(front: FrontEnd, metrics: Any, seconds: float, reason: str) -> None:
    sent = metrics.snapshot()["uploaded_bytes"].get("http", 0)
    if front.is_json:
        fields = {"event": "end", "uploaded_bytes": sent, "seconds": round(seconds, 3), "reason": reason}
        write_out(json_line(fields))
    else:
        front.note(f"{reason}: {format_size(sent)} sent in {seconds:.0f} s")


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
        if error.exit_code is ExitCode.INTERRUPTED:
            raise
        return MirrorFinding(Verdict.UNREACHABLE, describe_error(error), ())
    if not addresses:
        return MirrorFinding(Verdict.STALE, "its manifest names none of the files of the right one", ())
    claims = claims_of(http, right or own, url, addresses, is_own_manifest=right is None)
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
